"""What `fednano client` prints, and with what it ends."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import torch
from fednano.cli import app
from fednano.client.cli import Meanwhile
from fednano.client.daemon import config_of
from fednano.wire import coordinator_pb2 as pb
from fednano.wire.errors import InvalidRequest, Unsupported
from fednano.wire.run_config import RunConfig


def test_a_service_that_is_asked_again_is_one_line_like_a_finding(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = logging.getLogger("fednano.client.somewhere")
    with Meanwhile():
        log.warning("the LLM service is asked again", extra={"reason": "not\n[bold]yet " * 20})
        log.info("something else")
    log.warning("no longer")
    out, err = capsys.readouterr()
    assert not out
    assert err == f"... the LLM service is asked again: {('not [bold]yet ' * 20).strip()}\n"


def test_ask_tells_of_a_service_that_is_asked_again_beside_the_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: object) -> Iterator[str]:
        logging.getLogger("fednano.client.calls").warning("asked again", extra={"reason": "away"})
        yield from ("se", "ven")

    monkeypatch.setattr("fednano.client.ask.answer", answer)
    command = ["ask", "What digit is this?", "--json"]
    monkeypatch.setenv("FEDNANO_CLIENT_TOKEN", "secret")
    monkeypatch.setenv("FEDNANO_CLIENT_EDGE", "unused")
    app(command, standalone_mode=False)
    out, err = capsys.readouterr()
    assert json.loads(out)["answer"] == "seven"
    assert err == "... asked again: away\n"


def test_a_setting_of_a_newer_coordinator_ends_the_client_with_its_name() -> None:
    told = RunConfig(name="trial").model_dump() | {"colour": "red"}
    with pytest.raises(Unsupported, match=r"run 'trial' asks for what .* doesn't know: colour"):
        config_of(pb.Membership(run="trial", config_json=json.dumps(told)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_told_before_a_run_is_joined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDNANO_CLIENT_TOKEN", "secret")
    command = ["client", "run", "--edge", "unused", "--device", "cuda"]
    with pytest.raises(InvalidRequest, match=r"device: expected a CUDA device .* got none"):
        app(command, standalone_mode=False)
