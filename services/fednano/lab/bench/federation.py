"""What it takes to reach an accuracy on the demo: this project, against PEFT LoRA on the whole model in
Flower's simulation. Same machine, same shards in the same order, same batches, same test set."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from fednano.lab.bench.aggregate import flower_python
from fednano.lab.bench.federation_data import write_examples
from fednano.lab.bench.federation_ours import Reached, Wire, federate, first_reaching
from fednano.lab.bench.rows import BenchFailed, Reach, Row, Surroundings
from fednano.lab.federation import TINY_MODEL, Federation
from fednano.lab.processes import ProcessFailed
from fednano.wire.run_config import RunConfig

_FLOWER_SIDE = Path(__file__).with_name("flower_federation.py")  # not to be imported here
_WIRES = (Wire("dense", "fp32"), Wire("factored", "fp32"), Wire("factored", "int8"))
_TARGET, _QUICK_TARGET = 0.85, 0.75  # the model has 0.735 before any training
_BESIDE_FLOWER = ("torch", "transformers", "peft", "pillow")
_DESCRIPTIONS = ("README.md", "figures.json")  # in the checkpoint's folder, needed by nobody
_MIB = 1 << 20
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class Job:
    """What Flower's side is asked to do."""

    folder: str
    model: str
    target: float
    clients: int
    rounds: int
    epochs: int
    batch: int
    clip: float
    max_new_tokens: int
    seed: int
    rank: int = 16
    alpha: int = 32  # a scale of 2, as our adapters'
    learning_rate: float = 5e-3  # of AdamW; chosen on validation data: docs/performance.md

    @classmethod
    def of(cls, config: RunConfig, target: float, folder: Path) -> Job:
        """The run's, where it is not LoRA's own."""
        return cls(
            folder=str(folder),
            model=str(TINY_MODEL),
            target=target,
            clients=config.clients,
            rounds=config.rounds,
            epochs=config.training.epochs,
            batch=config.training.batch_size,
            clip=config.training.max_grad_norm,
            max_new_tokens=config.evaluation.max_new_tokens,
            seed=config.seed,
        )


def measure(around: Surroundings) -> Iterator[Row]:
    """Each wire of ours, then Flower's side, each until its test accuracy reaches the target."""
    config, target = _config(around.quick), _QUICK_TARGET if around.quick else _TARGET
    python = lora_python(around)
    federation = Federation(around.directory, around.processes)
    begun = time.monotonic()
    federation.start_services()
    services = time.monotonic() - begun
    ours = {}
    for wire in _WIRES:
        around.say(f"this project by the {wire} wire, until {target:.0%} are right")
        found = federate(federation, config, wire, target)
        ours[wire] = replace(found, start_up=found.start_up + services)
    around.processes.stop_all()
    around.say(f"PEFT LoRA in Flower's simulation, until {target:.0%} are right")
    job = Job.of(config, target, around.directory)
    lora, told = _lora(around, python, config, job)
    for wire in _WIRES:
        compared = Compared(
            job, config, wire, ours[wire], lora, told, _size(federation.halves / "edge")
        )
        yield from compared.rows()


def _config(quick: bool) -> RunConfig:
    """The demo's, but that nobody scores on data of its own: LoRA's clients don't either."""
    clients = 2 if quick else 4
    body = {
        "name": "bench",
        "clients": clients,
        "min_clients": clients,
        "rounds": 2 if quick else 10,
        "evaluation": {"evaluators": 1, "own_data": "never"},
    }
    return RunConfig.model_validate(body)


@dataclass(frozen=True)
class Compared:
    """One of our wires beside LoRA."""

    job: Job
    config: RunConfig
    wire: Wire
    ours: Reached
    lora: Reached
    told: Mapping[str, str | int]  # of Flower's side: versions, trained parameters
    edge: int  # bytes of the edge half

    def rows(self) -> Iterator[Row]:
        """The reaches are held against the wire that is meant to spare the link, and for all the bytes
        that a client needs to get there; those of the rounds are a part of them."""
        ahead = Reach("at most", 1.0) if self.wire == _WIRES[-1] else None
        ours, lora = self.ours, self.lora
        yield self._bytes("with what it needs to start", self.edge, _whole(), ahead)
        yield self._bytes("of them the rounds' traffic", 0, 0, None)
        yield self._row(
            "peak memory of a client",
            ours.peak / lora.peak,
            {
                "ours MiB": ours.peak / _MIB,
                "LoRA MiB": lora.peak / _MIB,
                "of it Flower and Ray, before torch MiB": lora.before / _MIB,
            },
            ahead,
        )
        yield self._row(
            "time",
            ours.seconds / lora.seconds,
            {
                "ours s": ours.seconds,
                "LoRA s": lora.seconds,
                "ours, busiest client CPU s": ours.busiest,
                "LoRA, busiest client wall s": lora.busiest,
                "ours, start-up s": ours.start_up,
                "LoRA, start-up s": lora.start_up,
            },
            None,
        )

    def _bytes(self, what: str, edge: int, whole: int, reach: Reach | None) -> Row:
        ours, lora = self.ours, self.lora
        totals = [edge + ours.sent + ours.received, whole + lora.sent + lora.received]
        parts = {
            "ours MiB": totals[0] / _MIB,
            "LoRA MiB": totals[1] / _MIB,
            "ours sent MiB": ours.sent / _MIB,
            "LoRA sent MiB": lora.sent / _MIB,
        }
        if whole:
            parts |= {"edge half MiB": edge / _MIB, "whole model MiB": whole / _MIB}
        return self._row(f"bytes per client, {what}", totals[0] / totals[1], parts, reach)

    def _row(self, what: str, figure: float, parts: dict[str, float], reach: Reach | None) -> Row:
        rounds = {
            "ours, rounds": self.ours.round,
            "LoRA, rounds": self.lora.round,
            "ours, accuracy": self.ours.accuracy[self.ours.round],
            "LoRA, accuracy": self.lora.accuracy[self.lora.round],
        }
        case = f"{what}, to {self.job.target:g}: {self.wire} wire / PEFT LoRA in Flower"
        return Row("federation", case, figure, "x", self._setting, rounds | parts, reach)

    @property
    def _setting(self) -> dict[str, str | int | float]:
        job, config = self.job, self.config
        return {
            "model": "tiny",
            "clients": job.clients,
            "partition": config.data.partition,
            "batch": job.batch,
            "local epochs": job.epochs,
            "seed": job.seed,
            "dtype": "fp32",
            "wire": f"{self.wire} over loopback, LoRA's records fp32",
            "ours": f"{config.strategy.name}, rank {config.adapter.rank}, learning rate "
            f"{config.training.learning_rate:g}",
            "LoRA": f"FedAvg, rank {job.rank} on q, k, v, o of the LLM, alpha {job.alpha}, "
            f"learning rate {job.learning_rate:g}",
            **self.told,
        }


def _lora(
    around: Surroundings, python: Path, config: RunConfig, job: Job
) -> tuple[Reached, dict[str, str | int]]:
    write_examples(around.directory, config)
    path, result = around.directory / "lora.json", around.directory / "lora.result"
    path.write_text(json.dumps(asdict(job)))
    command = [str(python), str(_FLOWER_SIDE), str(path), str(result)]
    around.processes.run("flower", command, _ENVIRONMENT)
    found = json.loads(result.read_text())
    told = {"LoRA parameters": found["parameters"]}
    versions = {f"Flower's {name}": found[name] for name in ("flwr", "ray", "peft", "torch")}
    return lora_reached(found, job.target), told | versions


def lora_reached(found: Mapping[str, Any], target: float) -> Reached:
    """From what Flower's side wrote. Raises BenchFailed where it did not get there."""
    number = first_reaching(target, found["accuracy"], "PEFT LoRA in Flower")
    notes = [note for note in found["notes"] if note["round"] <= number]
    clients = {note["client"] for note in notes}

    def each(key: str) -> list[float]:
        return [sum(n[key] for n in notes if n["client"] == client) for client in clients]

    return Reached(
        round=number,
        accuracy=found["accuracy"],
        start_up=found["start-up"],
        seconds=sum(found["seconds"][:number]),
        busiest=max(each("seconds")),
        sent=mean(each("sent")),
        received=mean(each("received")),
        peak=max(note["peak"] for note in notes),
        before=max(note["before"] for note in notes),
    )


def lora_python(around: Surroundings) -> Path:
    """Flower's interpreter, with torch, transformers and PEFT of this environment's versions beside
    it: they are added where they are missing. Raises BenchFailed."""
    python, venv = flower_python(around), around.flower_venv
    wanted = [f"{name}=={version(name).partition('+')[0]}" for name in _BESIDE_FLOWER]
    ready = venv / f".{' '.join(wanted)}"
    if ready.exists():
        return python
    around.say(f"installing {', '.join(wanted)} into {venv} (once)")
    try:
        install = [str(python), "-m", "pip", "install", "--quiet", *wanted]
        around.processes.run("pip", install, {})
    except ProcessFailed as error:
        raise BenchFailed(f"PEFT could not be installed into {venv}: {error}") from None
    ready.touch()
    return python


def _size(directory: Path) -> int:
    files = (path for path in directory.iterdir() if path.name not in _DESCRIPTIONS)
    return sum(path.stat().st_size for path in files)


def _whole() -> int:
    """Bytes of the files of the whole checkpoint."""
    return _size(TINY_MODEL)
