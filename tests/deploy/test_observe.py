"""docker-compose.observe.yml and what it mounts: dashboard, rules and page name what there is."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import AsyncIterator

import pytest
import yaml
from fednano.wire.errors import Unavailable

from tests.deploy.observed import (
    OBSERVE,
    ROOT,
    Services,
    alerts,
    metric_names,
    panels,
    running,
    sample_names,
)
from tests.llm.caller import score_request
from tests.models.causal import packed, several_labels
from tests.redis_server import RedisServer

BY_PROMETHEUS = {"up", "ALERTS"}  # it writes these itself
OVERLAY = ROOT / "docker-compose.observe.yml"
PAGE = ROOT / "docs" / "monitoring.md"
OPERATE = ROOT / "docs" / "operate.md"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="no promtool on PATH (Debian: apt-get install prometheus)"
)


@pytest.fixture
async def services(redis_server: RedisServer) -> AsyncIterator[Services]:
    async with running(redis_server.url) as made:
        yield made


@pytest.fixture
async def exported(services: Services) -> set[str]:
    """Every name that can be asked for."""
    return {name for found in (await services.scrape()).values() for name in sample_names(found)}


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (rpc) (rate(tokens_total{rpc="a b"}[5m]))', {"tokens_total"}),
        ("max(a) > 3 * increase(b[1d]) / 1e9 or (c unless on (le) d offset 5m)", set("abcd")),
        ("histogram_quantile(0.95, x:y_bucket) and absent(up == 1)", {"x:y_bucket", "up"}),
    ],
)
def test_the_metrics_of_an_expression_are_found(expression: str, names: set[str]) -> None:
    assert metric_names(expression) == names


async def test_the_dashboard_names_only_metrics_that_are_exported(exported: set[str]) -> None:
    found = {name for asked in panels().values() for one in asked for name in metric_names(one)}
    assert len(found) > 20
    assert found - exported - BY_PROMETHEUS == set()


async def test_the_rules_name_only_metrics_that_are_exported(exported: set[str]) -> None:
    found = {name for rule in alerts().values() for name in metric_names(rule["expr"])}
    assert len(found) > 10
    assert found - exported - BY_PROMETHEUS == set()


async def test_a_misspelt_name_would_be_seen(exported: set[str]) -> None:
    for wrong in ("fednano_llm_queue_dept", "fednano_llm_requests", "fednano_round_seconds"):
        assert metric_names(f"max({wrong}[5m])") - exported == {wrong}


async def test_every_metric_is_explained_and_no_other(services: Services) -> None:
    """With type and labels: rows are `name` | type | labels | meaning."""
    rows = re.findall(r"^\| `([a-z_]+)` \| (\w+) \|([^|]*)\|", PAGE.read_text(), re.MULTILINE)
    told = {name: kind for name, kind, _ in rows}
    labels = {name: set(re.findall(r"`(\w+)`", listed)) for name, _, listed in rows}
    found = {}
    for family in [family for found in (await services.scrape()).values() for family in found]:
        if not family.name.endswith("_created"):  # the client library's own
            name = family.name + ("_total" if family.type == "counter" else "")
            found[name] = family.type
            assert {key for s in family.samples for key in s.labels} - {"le"} <= labels[name], name
    assert told == found


def test_every_alert_is_explained() -> None:
    told = re.findall(r"^\| `(FedNano\w+)` \| (\w+) \|", PAGE.read_text(), re.MULTILINE)
    assert told == [(name, rule["labels"]["severity"]) for name, rule in alerts().items()]


def test_every_alert_says_what_it_means_and_where_help_is() -> None:
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("warning", "critical"), name
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}, name


@pytest.mark.skipif(not OPERATE.exists(), reason="docs/operate.md is not there")
def test_every_runbook_is_a_section_of_the_operators_page() -> None:
    titles = re.findall(r"^#+ (.+)$", OPERATE.read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for name, rule in alerts().items():
        page, anchor = rule["annotations"]["runbook"].split("#")
        assert page == "docs/operate.md", name
        assert anchor in anchors, name


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [
        ("check", "rules", "alerts.yml"),
        # Not the token's file: it is in the container only.
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_promtool_is_content(command: tuple[str, ...]) -> None:
    done = subprocess.run([PROMTOOL, *command], cwd=OBSERVE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_and_grafana_may_do_as_little_as_everybody_else() -> None:
    base = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    overlay = yaml.safe_load(OVERLAY.read_text())
    assert overlay["x-service"] == base["x-service"]
    for name in ("prometheus", "grafana"):
        service = overlay["services"][name]
        assert overlay["x-service"].items() <= service.items()
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"])
        assert int(service["user"].split(":")[0]) > 0
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert OBSERVE.joinpath("grafana/dashboards/fednano.json").exists()


def test_compose_takes_the_overlay() -> None:
    files = ["-f", "docker-compose.yml", "-f", OVERLAY.name]
    compose = ["docker", "compose", *files, "config", "--quiet"]
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("no docker compose here")
    done = subprocess.run(compose, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_overlay_mounts_is_there() -> None:
    services = yaml.safe_load(OVERLAY.read_text())["services"].values()
    volumes = [volume for service in services for volume in service.get("volumes", ())]
    paths = [volume.split(":")[0] for volume in volumes if volume.startswith("./")]
    assert len(paths) == 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


async def test_what_alerts_wait_for_is_exported_before_it_happens(services: Services) -> None:
    """A counter that is born with its first event shows no increase."""
    found = await services.scrape()
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for families in found.values()
        for family in families
        for sample in family.samples
    }
    assert samples["fednano_updates_total", "refused"] == 0
    assert samples["fednano_redis_errors_total", "unreachable"] == 0
    assert samples["fednano_llm_requests_total", "ForwardBackward", "INTERNAL"] == 0
    assert samples["fednano_llm_requests_total", "Score", "RESOURCE_EXHAUSTED"] == 0
    assert samples["fednano_llm_queue_limit",] == 64


async def test_calls_are_counted_by_how_they_end(services: Services) -> None:
    request = score_request(services.llm.header(), packed(services.engine), several_labels())
    await services.llm.stream("Score", request)
    families = (await services.scrape())["llm"]
    calls = next(f for f in families if f.name == "fednano_llm_requests")
    assert {tuple(s.labels.values()): s.value for s in calls.samples if s.value} == {
        ("Score", "OK"): 1
    }


async def test_a_redis_that_goes_away_is_counted(mortal_redis: RedisServer) -> None:
    async with running(mortal_redis.url) as services:
        mortal_redis.kill()
        with pytest.raises(Unavailable):
            await services.coordinator.store.ping()
        mortal_redis.start()
        families = (await services.scrape())["coordinator"]
        errors = next(f for f in families if f.name == "fednano_redis_errors")
        counted = {sample.labels["reason"]: sample.value for sample in errors.samples}
        assert counted.pop("unreachable") >= 1
        assert set(counted.values()) == {0}
