"""`fednano runs` and `fednano tokens` against a real server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from fednano.rest_client import RestClient, RestSettings, read_events
from fednano.runs_cli import read_config, runs_app, tokens_app
from fednano.wire.errors import InvalidRequest
from typer import Typer
from typer.testing import CliRunner, Result

from tests.coordinator import web
from tests.coordinator.web import ADMIN, Site, config, serving

site = web.site
CLEAN = {name: None for name in os.environ if name.startswith("FEDNANO_")}


async def call(app: Typer, site: Site, *arguments: str, **env: str | None) -> Result:
    """The command in a thread of its own, since the server lives in this one."""
    settings = {**CLEAN, "FEDNANO_URL": site.url, "FEDNANO_TOKEN": ADMIN, "COLUMNS": "120", **env}
    invoke = partial(CliRunner().invoke, app, list(arguments), env=settings)
    return await asyncio.to_thread(invoke)


async def runs(site: Site, *arguments: str, **env: str | None) -> Result:
    return await call(runs_app, site, *arguments, **env)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config().model_dump(mode="json")))
    return path


async def test_apply_is_idempotent(site: Site, run_file: Path) -> None:
    first = await runs(site, "apply", "-f", str(run_file))
    again = await runs(site, "apply", "-f", str(run_file))
    assert (first.output, first.exit_code) == ("run trial created\n", 0)
    assert (again.output, again.exit_code) == ("run trial unchanged\n", 0)


async def test_apply_of_another_configuration_names_what_differs(
    site: Site, run_file: Path
) -> None:
    await runs(site, "apply", "-f", str(run_file))
    refused = await runs(site, "apply", "-f", str(run_file), "--set", "training.epochs=7")
    assert refused.exit_code == 1
    assert "training.epochs" in refused.stderr
    assert "Traceback" not in refused.output


async def test_create_takes_settings(site: Site) -> None:
    made = await runs(
        site, "create", "mine", "--set", "rounds=3", "--set", "strategy.name=fedavg", "--json"
    )
    assert made.exit_code == 0
    assert json.loads(made.stdout)["config"]["strategy"]["name"] == "fedavg"
    assert (await site.store.run("mine")).config.rounds == 3


async def test_a_bad_setting_is_a_usage_error_that_names_the_field(site: Site) -> None:
    refused = await runs(site, "create", "mine", "--set", "training.epochs=none")
    assert refused.exit_code == 2
    assert "training.epochs" in refused.stderr


@pytest.mark.parametrize("setting", ["rounds", "=3", "training.=1", "name.first=x", "rounds=[1"])
def test_a_setting_that_is_none_is_refused(run_file: Path, setting: str) -> None:
    with pytest.raises(InvalidRequest, match=r"--set|section"):
        read_config(run_file, [setting])


@pytest.mark.parametrize("text", ["- a list", "{", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRequest):
        read_config(path, [])


async def test_list_and_show_tell_where_a_run_stands(site: Site) -> None:
    assert (await runs(site, "list")).output == "no runs yet\n"
    await (await site.federation()).play(3)
    listed = await runs(site, "list")
    assert "trial" in listed.output
    assert "2/3" in listed.output
    shown = await runs(site, "show", "trial")
    accuracy = (await site.store.round("trial", 2)).metrics["accuracy"]
    assert f"{accuracy:.3f}" in shown.output
    told = json.loads((await runs(site, "show", "trial", "--json")).stdout)
    assert [one["number"] for one in told["rounds"]] == [0, 1, 2, 3]
    assert len(told["clients"]) == 3


async def test_list_reads_every_page(site: Site) -> None:
    for number in range(3):
        await site.store.create_run(config(f"run-{number}"), "admin")
    with RestClient(RestSettings(url=site.url, token=ADMIN)) as client:
        client.page = 2
        found = await asyncio.to_thread(client.items, "/runs")
    assert [run["name"] for run in found] == ["run-2", "run-1", "run-0"]


async def test_commands_are_obeyed_or_explained(site: Site) -> None:
    await site.federation()
    assert (await runs(site, "pause", "trial")).output == "run trial is paused\n"
    assert (await runs(site, "resume", "trial")).output == "run trial is running\n"
    assert json.loads((await runs(site, "stop", "trial", "--json")).stdout)["state"] == "stopped"
    refused = await runs(site, "pause", "trial")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: ")


async def test_watch_ends_with_the_run(site: Site) -> None:
    federation = await site.federation()
    watching = asyncio.create_task(runs(site, "watch", "trial"))
    await asyncio.sleep(0.5)
    await federation.play(4)
    watched = await asyncio.wait_for(watching, 20)
    assert watched.exit_code == 0, watched.output
    assert "finished" in watched.output
    assert "round 3 of 3" in watched.output


@pytest.mark.parametrize("flags", [(), ("--json",)])
async def test_watch_of_a_stopped_run_fails(site: Site, flags: tuple[str, ...]) -> None:
    await site.federation()
    await site.store.command("trial", "stop", "admin")
    assert (await runs(site, "watch", "trial", *flags)).exit_code == 1


async def test_watch_as_json_is_one_event_a_line(site: Site) -> None:
    await (await site.federation()).play(4)
    watched = await runs(site, "watch", "trial", "--json")
    events = [json.loads(line) for line in watched.stdout.splitlines()]
    stored = await site.store.events("trial")
    assert [event["id"] for event in events] == [event.id for event in stored][: len(events)]
    assert events[-1]["data"]["state"] == "finished"


async def test_watch_goes_on_after_the_coordinator_was_away(site: Site) -> None:
    federation = await site.federation()
    async with serving(site.app) as url:
        watching = asyncio.create_task(runs(site, "watch", "trial", "--json", FEDNANO_URL=url))
        await asyncio.sleep(0.7)
    await federation.play(4)
    site.app.state.streams = type(site.app.state.streams)(site.store)
    async with serving(site.app, int(url.rsplit(":", 1)[1])):
        watched = await asyncio.wait_for(watching, 20)
    assert watched.exit_code == 0
    assert "reconnecting" in watched.stderr
    ids = [json.loads(line)["id"] for line in watched.stdout.splitlines()]
    assert len(ids) == len(set(ids))


async def test_an_interrupted_watch_leaves_quietly(site: Site) -> None:
    await site.federation()
    code = "from fednano.runs_cli import runs_app; runs_app()"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, "watch", "trial"),
        env={**os.environ, "FEDNANO_URL": site.url, "FEDNANO_TOKEN": ADMIN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while site.app.state.streams.open == 0:  # noqa: ASYNC110 (another process's doing)
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, error = await asyncio.wait_for(process.communicate(), 10)
    assert process.returncode == 130
    assert b"Traceback" not in out + error


async def test_tokens_are_made_listed_and_revoked(site: Site, tmp_path: Path) -> None:
    made = await call(tokens_app, site, "create", "--role", "viewer", "eve")
    secret_file = tmp_path / "token"
    secret_file.write_text(made.stdout)
    flags = ("--token-file", str(secret_file))
    assert (await runs(site, "list", *flags, FEDNANO_TOKEN=None)).exit_code == 0
    assert (await runs(site, "create", "mine", *flags, FEDNANO_TOKEN=None)).exit_code == 1
    (token,) = json.loads((await call(tokens_app, site, "list", "--json")).stdout)
    assert made.stdout.strip() not in json.dumps(token)
    revoked = await call(tokens_app, site, "revoke", token["id"])
    assert revoked.output == f"token {token['id']} of eve is revoked\n"
    assert (await runs(site, "list", *flags, FEDNANO_TOKEN=None)).exit_code == 1
    assert "revoked" in (await call(tokens_app, site, "list")).output


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"FEDNANO_TOKEN": None}, "no token"),
        ({"FEDNANO_URL": "ftp://127.0.0.1"}, "url: expected http://"),
        ({"FEDNANO_URL": "http://fednano.example:8080"}, "--insecure"),
        ({"FEDNANO_CA": "/no/such/file", "FEDNANO_URL": "https://127.0.0.1"}, "ca: expected"),
    ],
)
async def test_a_wrong_setting_is_a_usage_error(
    site: Site, env: dict[str, str | None], words: str
) -> None:
    refused = await runs(site, "list", **env)
    assert refused.exit_code == 2
    assert words in refused.stderr


async def test_nobody_there_is_a_failure_with_a_sentence(site: Site) -> None:
    for command in (["list"], ["watch", "trial"]):
        refused = await runs(site, *command, FEDNANO_URL="http://127.0.0.1:1")
        assert refused.exit_code == 1
        assert refused.stderr.startswith("error: no answer from http://127.0.0.1:1")


def test_a_stream_is_parsed_by_its_rules() -> None:
    text = ["retry: 5", "", ": open", "", "id: 1-0", "event: run", 'data: {"a":1}', "", "id: 2-0"]
    first, second = read_events(text)
    assert first is None
    assert second is not None
    assert (second.id, second.kind, second.data) == ("1-0", "run", {"a": 1})
