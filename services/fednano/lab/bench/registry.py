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


def _wire() -> Measure:
    from fednano.lab.bench.wire import measure

    return measure


def _slow_link() -> Measure:
    from fednano.lab.bench.slow_link import measure

    return measure


def _clients() -> Measure:
    from fednano.lab.bench.clients import measure

    return measure


def _fairness() -> Measure:
    from fednano.lab.bench.fairness import measure

    return measure


def _aggregate() -> Measure:
    from fednano.lab.bench.aggregate import measure

    return measure


def _coordinator() -> Measure:
    from fednano.lab.bench.coordinator import measure

    return measure


def _client_memory() -> Measure:
    from fednano.lab.bench.client_memory import measure

    return measure


def _federation() -> Measure:
    from fednano.lab.bench.federation import measure

    return measure


BENCHES = (
    Bench(
        "step",
        "split step over loopback / the same step with the whole model in one process",
        "at most 1.15 (tiny), 1.10 (100 M), 1.05 (7 B on a GPU)",
        _step,
    ),
    Bench(
        "step-cached",
        "split step with cached features / whole-model step that encodes every time",
        "at most 0.95",
        _step_cached,
    ),
    Bench(
        "wire",
        "bytes per step, factored / dense, LLaVA-1.5-7B's shape; their gradients",
        "at most 1/30; relative difference at most 1e-5",
        _wire,
    ),
    Bench(
        "slow-link",
        "seconds per step at 20, 100 and 1000 Mbit/s and 40 ms round trip, factored and dense",
        "at most loopback + bytes/rate + round trip + 10 %",
        _slow_link,
    ),
    Bench(
        "clients",
        "samples/s of 1 to 16 clients on one LLM / one large batch in one process",
        "GPU: at least 0.9; CPU: never below 1 client alone",
        _clients,
    ),
    Bench(
        "fairness",
        "p95 of small clients' steps beside one with huge batches / alone",
        "at most 3",
        _fairness,
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
    Bench(
        "client-memory",
        "disk of a client / of LLaVA-1.5-7B; its peak memory, beside the theoretical",
        "disk at most 5 %; memory is stated",
        _client_memory,
    ),
    Bench(
        "federation",
        "time, bytes and client memory to reach an accuracy: this project / PEFT LoRA in Flower",
        "at most 1 in bytes and client memory; time stated",
        _federation,
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
