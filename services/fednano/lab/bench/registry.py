"""Which benches there are. A new one is a module with `measure` and an entry here."""

from __future__ import annotations

from collections.abc import Sequence

from fednano.lab.bench.rows import Bench, Measure
from fednano.wire.errors import InvalidRequest


def _step() -> Measure:
    from fednano.lab.bench.step import measure

    return measure


def _step_cached() -> Measure:
    from fednano.lab.bench.step import measure_cached

    return measure_cached


def _clients() -> Measure:
    from fednano.lab.bench.clients import measure

    return measure


def _aggregate() -> Measure:
    from fednano.lab.bench.aggregate import measure

    return measure


def _coordinator() -> Measure:
    from fednano.lab.bench.coordinator import measure

    return measure


BENCHES = (
    Bench(
        "step",
        "split step over loopback, dense / the same step with the whole model in one process",
        "at most 1.15 (tiny), 1.10 (100 M)",
        _step,
    ),
    Bench(
        "step-cached",
        "split step with cached features / whole-model step that encodes every time",
        "at most 0.95",
        _step_cached,
    ),
    Bench(
        "clients",
        "samples/s of 1 to 16 clients on one LLM / one large batch in one process",
        "GPU: at least 0.9; CPU: never below 1 client alone",
        _clients,
    ),
    Bench(
        "aggregate",
        "mean / Flower's FedAvg; Fisher merging from Redis / a bare GET; memory",
        "at least 2 x Flower; at least 0.8 of GET; memory does not grow",
        _aggregate,
    ),
    Bench(
        "coordinator",
        "simulated clients long-polling, fetching and submitting on one coordinator",
        "p99 of NextTask at most 250 ms beyond its wait; nothing lost",
        _coordinator,
    ),
)


def chosen(names: Sequence[str]) -> list[Bench]:
    """In the order asked for. Raises InvalidRequest."""
    known = {bench.name: bench for bench in BENCHES}
    for name in names:
        if name not in known:
            raise InvalidRequest.of("NAME", f"one of {', '.join(known)}", repr(name))
    if not names:
        raise InvalidRequest.of("NAME", f"one or more of {', '.join(known)}", "nothing")
    return [known[name] for name in dict.fromkeys(names)]
