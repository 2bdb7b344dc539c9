"""What is logged can be followed from a client through the services, and acts in no terminal."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fednano import logs
from fednano.client.adapters import NanoAdapters
from fednano.client.batches import Batch
from fednano.client.edge import EdgeHalf, NanoEdge
from fednano.client.examples import Example
from fednano.client.remote import Caller, RemoteLanguageModel
from fednano.client.replicas import Replicas
from fednano.lab.federation import Federation
from fednano.lab.processes import Processes
from fednano.models.frozen import FrozenLLM
from fednano.wire.errors import PermissionDenied, Unauthenticated, WrongModel
from fednano.wire.headers import make_header
from fednano.wire.sessions import Identity, SessionSigner
from fednano.wire.tensor_pb2 import Header

from tests.client.serving import PRIVATE, Served, served
from tests.coordinator import web
from tests.lab.conftest import small_run, state_of, wait_for

site = web.site
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
Line = dict[str, Any]
Lines = Callable[[str], list[Line]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What has been logged under a name so far, each line as a service would write it."""
    written, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(written), root.level
    handler.setFormatter(logs.formatter("test", json=True))
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)

    def named(event: str) -> list[Line]:
        found = [json.loads(line) for line in written.getvalue().splitlines()]
        return [line for line in found if line["event"] == event]

    yield named
    root.removeHandler(handler)
    root.setLevel(level)


@dataclass
class Ward:
    """A client in a run, in its third round."""

    port: int
    client: str = "ward-7"
    run: str = "trial"

    def header(self) -> Header:
        return make_header(self.client, run=self.run, round_number=3)

    def model(self) -> RemoteLanguageModel:
        token, _ = SessionSigner(PRIVATE).issue(Identity("ward-7", "site", "trial"))
        return RemoteLanguageModel(
            Replicas(f"127.0.0.1:{self.port}"), Caller(self.header, lambda: token)
        )


@pytest.fixture
def port(frozen: FrozenLLM) -> Iterator[int]:
    with served(frozen) as service:
        yield service.port


@pytest.fixture
def arguments(
    edge: EdgeHalf, examples: list[Example], adapters: NanoAdapters
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    batch = Batch.of([edge.prepare(example) for example in examples])
    return batch.sequences(NanoEdge(adapters)(batch).detach()), batch.labels, WEIGHTS


def written(logged: Callable[[logging.Logger], None], json: bool = False) -> str:
    """What a service's handler makes of a line."""
    stream, log = io.StringIO(), logging.Logger("told")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.formatter("llm", json))
    log.addHandler(handler)
    logged(log)
    return stream.getvalue()


def test_no_character_of_a_message_acts_in_a_terminal() -> None:
    nasty = "\x1b]0;owned\x07\r\nforged line\x9b2J\u202e\u2028"
    text = written(lambda log: log.info(f"event {nasty}", extra={"reason": nasty, "n": 3}))
    assert r"event \x1b]0;owned\x07\r\nforged line\x9b2J\u202e\u2028" in text
    assert text.count("\n") == 1
    assert text.isascii()
    assert text.replace("\n", "").isprintable()


def test_what_people_write_stays_readable() -> None:
    assert "Übung für 患者" in written(
        lambda log: log.info("x", extra={"reason": "Übung für 患者"})
    )


@pytest.mark.parametrize("as_json", [False, True])
def test_a_traceback_shows_code_and_no_values(as_json: bool) -> None:
    def fail(log: logging.Logger) -> None:
        token = "sword" + "fish"
        try:
            raise ValueError(f"{len(token)} letters\x1b[2J")
        except ValueError:
            log.exception("failed")

    text = written(fail, as_json)
    assert "raise ValueError" in text
    assert "9 letters" in text
    assert "swordfish" not in text
    assert "\x1b" not in text


def test_a_stream_s_refusal_names_the_call_that_its_client_logged(
    port: int, lines: Lines, arguments: Any
) -> None:
    model = Ward(port).model()
    model.card.fingerprint = "of another model"
    with pytest.raises(WrongModel):
        model.step(*arguments)
    (told,), (refused,) = lines("call failed"), lines("request refused")
    assert refused["request_id"] == told["request_id"]
    assert refused["rpc"] == told["rpc"] == "/fednano.v1.LanguageModel/ForwardBackward"
    ids = {"run": "trial", "round": 3, "client": "ward-7", "level": "info", "service": "test"}
    assert ids.items() <= refused.items()
    assert ids.items() <= told.items()


def test_each_further_try_keeps_the_request_s_id(
    frozen: FrozenLLM, lines: Lines, arguments: Any
) -> None:
    service = Served(frozen, queue=1)
    models = [Ward(service.port).model() for _ in range(8)]
    with ThreadPoolExecutor(8) as people:
        list(people.map(lambda model: model.step(*arguments), models))
    service.stop()
    again = [line["request_id"] for line in lines("the LLM service is asked again")]
    assert again
    assert sorted(again) == sorted(line["request_id"] for line in lines("request refused"))
    done = [line for line in lines("call served") if line["rpc"].endswith("/ForwardBackward")]
    assert set(again) <= {line["request_id"] for line in done if line["status"] == "OK"}
    assert all(line["seconds"] > 0 for line in done)


def test_ids_of_a_caller_are_cut_and_escaped(port: int, lines: Lines) -> None:
    with pytest.raises(PermissionDenied):
        Ward(port, client="\x1b[31mred" + "x" * 1000).model()
    (line,) = lines("request refused")
    assert line["client"].startswith(r"\x1b[31mredxxx")
    assert len(line["client"]) < 150


def test_one_without_a_token_is_told_at_debug_only(port: int, lines: Lines) -> None:
    caller = Caller(Ward(port).header, lambda: "wrong")
    with pytest.raises(Unauthenticated):
        RemoteLanguageModel(Replicas(f"127.0.0.1:{port}"), caller)
    (line,) = lines("request refused")
    assert line["level"] == "debug"
    assert line["request_id"] == lines("call failed")[0]["request_id"]


async def test_a_problem_s_request_id_is_in_the_log_with_its_run(
    site: web.Site, lines: Lines
) -> None:
    reply = await site.http.get("/runs/nobody/rounds/2", headers={"X-Request-ID": "of-the-caller"})
    assert reply.json()["request_id"] == "of-the-caller"
    (line,) = lines("http request")
    assert (line["request_id"], line["run"], line["round"]) == ("of-the-caller", "nobody", 2)
    assert line["status"] == 404


async def test_a_request_inherits_nothing_of_the_one_before(site: web.Site, lines: Lines) -> None:
    await site.http.get("/runs/nobody")
    await site.http.get("/memory")
    first, second = lines("http request")
    assert first["run"] == "nobody"
    assert "run" not in second
    assert first["request_id"] != second["request_id"]


def lines_of(path: Path) -> list[Line]:
    """A process's lines; what other programs wrote between them left out."""
    return [json.loads(text) for text in path.read_text().splitlines() if text[:1] == "{"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_grep_follows_a_client_s_round_through_all_services(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for service in ("LLM", "COORDINATOR", "CLIENT"):
        monkeypatch.setenv(f"FEDNANO_{service}_LOG_JSON", "true")
        monkeypatch.setenv(f"FEDNANO_{service}_LOG_LEVEL", "debug")
    with Processes(tmp_path) as processes:
        federation = Federation(tmp_path, processes)
        federation.start_services()
        data = {"limit": 48, "evaluation_limit": 4}
        config = small_run("followed", clients=1, min_clients=1, rounds=1, data=data)
        federation.create_run(config)
        federation.start_client("evaluator", "followed", "evaluator", once="true")
        federation.start_client("ward", "followed", once="true")
        wait_for(lambda: state_of(federation, "followed") in ("finished", "failed"), "run", 200)
    ward, llm, coordinator = (
        lines_of(tmp_path / f"{name}.log") for name in ("ward", "llm", "coordinator")
    )
    whose = {"run": "followed", "round": 1, "client": "ward"}
    for event in ("training", "update accepted"):
        (line,) = (line for line in ward if line["event"] == event)
        assert whose.items() <= line.items()
    for rpc, service in (("/ForwardBackward", llm), ("/Submit", coordinator)):
        made = [line for line in ward if line["event"] == "call made" and line["rpc"].endswith(rpc)]
        assert made
        for call in made:
            (serving,) = (
                line
                for line in service
                if line["event"] == "call served" and line.get("request_id") == call["request_id"]
            )
            assert whose.items() <= serving.items()
    (update,) = (line for line in coordinator if line["event"] == "update")
    assert whose.items() <= update.items()
    assert update["request_id"] in {line.get("request_id") for line in ward}
