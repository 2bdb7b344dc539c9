"""Who may take part in a round, and what can't be combined with leaving some of them out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from fednano.wire.section import Section

if TYPE_CHECKING:
    from fednano.wire.run_config import RunConfig

MOST_CLIENTS = 100_000


class AsynchronousConfig(Section):
    """Rounds that wait for nobody. Clients start from the newest adapter whenever they are done with
    the one before; a round merges what they added, to whichever adapter that was."""

    buffer: int = Field(ge=1, le=MOST_CLIENTS, description="updates after which the server merges")
    max_staleness: int = Field(
        10,
        ge=0,
        le=10_000,
        description="an update counts 1 / sqrt(1 + merges since it started), and is refused as late"
        " beyond so many",
    )
    server_learning_rate: float = Field(1.0, gt=0, le=100, description="of the server's step")


def check_participation(run: RunConfig) -> None:
    """Raises ValueError for what makes no sense together."""
    if run.cohort and not run.min_clients <= run.cohort <= run.clients:
        raise ValueError(
            f"cohort: expected 0 or {run.min_clients} to {run.clients}, got {run.cohort}"
        )
    if run.spares:
        _check_spares(run)
    if run.late_joiners:
        _check_late_joiners(run)
    if run.asynchronous is not None:
        _check_asynchronous(run, run.asynchronous)


def _check_spares(run: RunConfig) -> None:
    if run.deterministic:
        raise ValueError(
            "spares: expected 0 where deterministic is true, as who is among the first differs from"
            f" run to run, got {run.spares}"
        )
    if not run.cohort:
        raise ValueError(f"spares: expected 0 without a cohort to be sampled, got {run.spares}")
    if run.cohort + run.spares > run.clients:
        raise ValueError(
            f"spares: expected at most {run.clients - run.cohort}, which clients ({run.clients})"
            f" leaves beyond cohort ({run.cohort}), got {run.spares}"
        )


def _check_late_joiners(run: RunConfig) -> None:
    expected = "late_joiners: expected false"
    if run.data.dealt:
        raise ValueError(
            f"{expected} for data.source {run.data.source}, whose shards are dealt when enrolment"
            " closes, got true"
        )
    if run.deterministic:
        raise ValueError(
            f"{expected} where deterministic is true, as the members of every round must be those of"
            " the first, got true"
        )
    if run.strategy.name == "scaffold":
        raise ValueError(
            f"{expected} for strategy.name scaffold, whose c is a mean over members that stay, got"
            " true"
        )


def _check_asynchronous(run: RunConfig, how: AsynchronousConfig) -> None:
    if run.strategy.name != "fedavg":
        raise ValueError(
            "asynchronous: expected strategy.name fedavg, as the mean of what was added to several"
            f" adapters is all that is merged then, got {run.strategy.name}"
        )
    for field, given, why in (
        ("shadows", len(run.shadows), "updates that started from several adapters"),
        ("deterministic", run.deterministic, "updates in the order in which they come"),
        ("cohort", run.cohort, "the updates of all members"),
    ):
        if given:
            raise ValueError(f"{field}: expected none with asynchronous, which merges {why}")
    if not run.min_clients <= how.buffer <= run.clients:
        raise ValueError(
            f"asynchronous.buffer: expected {run.min_clients} (min_clients) to {run.clients}"
            f" (clients), got {how.buffer}"
        )
    if how.max_staleness >= run.retention.rounds:
        raise ValueError(
            f"asynchronous.max_staleness: expected less than retention.rounds"
            f" ({run.retention.rounds}), as adapters must be kept for whoever started from them, got"
            f" {how.max_staleness}"
        )


def most_at_once(run: RunConfig) -> int:
    """The most updates that a round may merge."""
    return run.cohort or (MOST_CLIENTS if run.late_joiners else run.clients)
