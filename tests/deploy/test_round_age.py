"""How long a run is at its round, as the alert for a stuck one sees it."""

from __future__ import annotations

from fednano.coordinator.metrics import Metrics

from tests.coordinator import web
from tests.coordinator.web import Site

site = web.site


async def age(site: Site) -> float:
    metrics = Metrics()
    await metrics.refresh(site.store)
    return float(metrics.registry.get_sample_value("fednano_round_age_seconds") or 0)


async def test_a_round_ages_from_its_opening_on(site: Site) -> None:
    federation = await site.federation()
    await federation.play(2)
    assert await age(site) < 5
    site.clock.added += 100
    assert 100 <= await age(site) < 105
    await federation.train(2)
    await federation.evaluate(2)
    assert await age(site) < 5


async def test_a_failed_attempt_does_not_make_a_round_young_again(site: Site) -> None:
    federation = await site.federation(round_seconds=60)
    await federation.play(2)
    site.clock.added += 61
    await federation.beat(2, "training", 0.5)
    await federation.settle()
    assert (await site.store.round("trial", 2)).attempt == 2
    assert 61 <= await age(site) < 66


async def test_a_run_that_is_paused_or_over_is_not_late(site: Site) -> None:
    federation = await site.federation()
    await federation.play(2)
    await site.store.command("trial", "pause", "admin")
    site.clock.added += 10_000
    assert await age(site) == 0
    await site.store.command("trial", "stop", "admin")
    assert await age(site) == 0
