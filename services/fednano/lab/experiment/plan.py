"""What an experiment compares: a YAML file of tables, each of which is a grid of cells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fednano.settings import invalid
from fednano.wire.errors import InvalidRequest, Problem
from fednano.wire.placements import PlacementName
from fednano.wire.run_config import Modality, RunConfig, StrategyConfig, StrategyName

_VERSION = 1
"""Of what a cell's figures mean: those of another version are not taken for its own."""

Reach = Literal["federated", "local", "centralised"]
Personal = Literal["", "fine-tuned", "feddpa-f"]
_ALONE: tuple[Reach, ...] = ("local", "centralised")
_PERSONAL: tuple[Personal, ...] = ("fine-tuned", "feddpa-f")
_USUAL: PlacementName = "nano-adapters"
_WITHIN = (
    ("adapter", "rank"),
    ("adapter", "modalities"),
    ("data", "source"),
    ("data", "partition"),
)
_VARIED = (
    *("name", "clients", "min_clients", "seed"),
    *("strategy", "shadows", "personal", "placement", "deterministic"),
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Method(_Section):
    """Who trains with whom, how updates are merged, and what each client makes of the result.

    A name alone says it all: a strategy of docs/strategies.md; `local` (each client by itself);
    `centralised` (one client that has everybody's data); `fine-tuned` (fedavg, then each client goes
    on by itself); `feddpa-f` (FedDPA-F: the same, and both adapters are mixed for each question).
    """

    name: str
    label: str = ""
    strategy: StrategyConfig = StrategyConfig(name="fedavg")
    training: dict[str, Any] = Field(default_factory=dict)
    """Of a RunConfig, where it differs from the plan's: a learning rate of its own ..."""
    placement: PlacementName = "nano-adapters"
    """Which weights are trained: beside the split (NanoAdapters), the connector's, or in the LLM."""
    shadows: tuple[StrategyConfig, ...] = ()
    """That merge the same updates, one step each: curves beside the method's own."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """A name, or a mapping of the name, perhaps a label, and the strategy's settings."""
        if isinstance(given, cls):
            return given
        told = {"name": given} if isinstance(given, str) else given
        if not isinstance(told, Mapping) or not isinstance(told.get("name"), str):
            raise ValueError(f"methods: expected a name, or a mapping with one, got {told!r}")
        settings = {k: v for k, v in told.items() if k not in cls.model_fields}
        shadows = [_mapping(shadow) for shadow in told.get("shadows", ())]
        name, strategy = told["name"], told.get("strategy", "fedavg")
        if name in get_args(StrategyName):
            strategy = name
        elif name not in (*_ALONE, *_PERSONAL):
            known = ", ".join((*get_args(StrategyName), *_ALONE, *_PERSONAL))
            raise ValueError(f"methods: expected one of {known}, got {name!r}")
        elif name in _ALONE and (settings or shadows or "strategy" in told):
            raise ValueError(
                f"methods: expected no settings for {name}, which merges nothing, got some"
            )
        merging = StrategyConfig.model_validate({**_mapping(strategy), **settings})
        label = told.get("label") or (merging.label if name == merging.name else name)
        rest = {"training": told.get("training", {}), "shadows": shadows}
        if (placement := told.get("placement", _USUAL)) != _USUAL:
            rest["placement"] = placement
            label = told.get("label") or f"{label}, {placement}"
        return {"name": name, "label": label, "strategy": merging, **rest}

    @property
    def reach(self) -> Reach:
        return next((reach for reach in _ALONE if reach == self.name), "federated")

    @property
    def personal(self) -> Personal:
        return next((kind for kind in _PERSONAL if kind == self.name), "")


class Attack(_Section):
    """What some clients do to the others: their training labels are wrong, or what they send is.

    `label-flip`: of each kind of question, the answer that comes after the right one. `sign-flip`:
    factor times the way back, instead of the step that training took. `scale`: factor times that step.
    """

    kind: Literal["none", "label-flip", "sign-flip", "scale"] = "none"
    clients: int = Field(1, ge=1, description="of them; drawn by the seed")
    factor: float = Field(0.0, ge=0, le=1e6, description="0: 1 for sign-flip, 10 for scale")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        return {"kind": given} if isinstance(given, str) else given

    @property
    def label(self) -> str:
        how = f" x {self.factor:g}" if self.factor else ""
        return "none" if self.kind == "none" else f"{self.clients} {self.kind}{how}"

    @property
    def times(self) -> float:
        """What an attacker's step is multiplied with; 1 where it sends what it trained."""
        if self.kind == "sign-flip":
            return -(self.factor or 1.0)
        return (self.factor or 10.0) if self.kind == "scale" else 1.0


Adapters = Annotated[tuple[Modality, ...], Field(min_length=1)]


class Grid(_Section):
    """Every combination of these is a cell."""

    methods: tuple[Method, ...] = Field((), description="by their published names")
    partitions: tuple[str, ...] = Field(("dirichlet:0.5",), min_length=1)
    clients: tuple[Annotated[int, Field(ge=1)], ...] = Field((4,), min_length=1)
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field((16,), min_length=1)
    adapters: tuple[Adapters, ...] = Field((("image", "text"),), min_length=1)
    attacks: tuple[Attack, ...] = Field((Attack(),), min_length=1)
    tasks: tuple[Literal["digits", "scenes"], ...] = Field(("digits",), min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)
    baseline: str = Field("", description="label of the method that others are tested against")
    tests: Literal["together", "apart"] = Field(
        "together", description="over the mean of all settings, or of each by itself"
    )
    run: dict[str, Any] = Field(
        default_factory=dict, description="of every cell: a RunConfig, without what varies"
    )

    @field_validator(
        *("methods", "partitions", "clients", "ranks", "adapters", "attacks", "tasks", "seeds")
    )
    @classmethod
    def _once(cls, given: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        for index, one in enumerate(given):
            if one in given[:index]:
                raise ValueError(f"{info.field_name}: expected each once, got {_shown(one)} twice")
        return given


class Table(Grid):
    """A grid with a name; what it doesn't say is the plan's."""

    name: str = Field(min_length=1)


@dataclass(frozen=True)
class Cell:
    """One federation: all that its figures depend on."""

    method: Method
    attack: Attack
    config: RunConfig
    split: str

    @cached_property
    def key(self) -> str:
        """Equal for cells that would give equal figures; what they are called doesn't matter."""
        told = {
            "version": _VERSION,
            "reach": self.method.reach,
            "personal": self.method.personal,
            "attack": None if self.attack.kind == "none" else self.attack.model_dump(mode="json"),
            "config": self.config.model_dump(
                mode="json", exclude={"name", "personal", "placement"}
            ),
            "split": self.split,
        }
        if self.method.placement != _USUAL:
            told["placement"] = self.method.placement
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def setting(self) -> dict[str, str | int]:
        """What else than method and seed it is told from others by, in the order of columns."""
        config = self.config
        return {
            "task": config.data.source,
            "partition": config.data.partition,
            "clients": config.clients,
            "rank": config.adapter.rank,
            "adapters": "+".join(config.adapter.modalities),
            "attack": self.attack.label,
        }


class Plan(Grid):
    """The whole file."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    about: str = Field("", description="a sentence for the report")
    model: str = Field(
        "", description="directory of a checkpoint; empty: the tiny model that ships"
    )
    split: Literal["validation", "test"] = Field(
        "test", description="what is scored; hyper-parameters are chosen on validation"
    )
    tables: tuple[Table, ...] = Field((), description="several grids; none: the plan's own is one")

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Raises InvalidRequest that names the field, also for a cell that can't be."""
        try:
            given = yaml.safe_load(path.read_text())
        except OSError as error:
            raise InvalidRequest.of("plan", "a file", f"{path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InvalidRequest.of(str(path), "YAML", str(error).replace("\n", " ")) from None
        if not isinstance(given, dict):
            raise InvalidRequest.of(str(path), "a mapping", type(given).__name__)
        try:
            return cls.model_validate(_spread(given))
        except ValidationError as error:
            raise invalid(error) from None

    @model_validator(mode="after")
    def _possible(self) -> Plan:
        names = [table.name for table in self.grids]
        if len(set(names)) < len(names):
            raise ValueError(f"tables: expected a name of its own for each, got {names}")
        for table in self.grids:
            _check_run(table.run)
            if not table.methods:
                raise ValueError(f"methods: expected at least one for {table.name!r}, got none")
            labels = [method.label for method in table.methods]
            if len(set(labels)) < len(labels):
                raise ValueError(f"methods: expected a label of its own for each, got {labels}")
            if table.baseline and table.baseline not in labels:
                raise ValueError(f"baseline: expected one of {labels}, got {table.baseline!r}")
            list(self.cells_of(table))
        return self

    def cells_in(self, names: Sequence[str]) -> list[Cell]:
        """Of those tables, each once; of all where none is named. Raises InvalidRequest."""
        known = [table.name for table in self.grids]
        for name in names:
            if name not in known:
                raise InvalidRequest.of("--table", f"one of {', '.join(known)}", name)
        chosen = [table for table in self.grids if table.name in names or not names]
        found = {cell.key: cell for table in chosen for cell in self.cells_of(table)}
        return list(found.values())

    @property
    def grids(self) -> tuple[Table, ...]:
        own = {name: getattr(self, name) for name in Grid.model_fields}
        return self.tables or (Table(name=self.name, **own),)

    def cells_of(self, table: Grid) -> Iterator[Cell]:
        """Raises ValueError for one that can't be."""
        axes = (table.tasks, table.partitions, table.clients, table.ranks, table.adapters)
        for setting in product(*axes, table.attacks):
            for method, seed in product(table.methods, table.seeds):
                yield self._cell(table.run, method, seed, *setting)

    def cells(self) -> list[Cell]:
        """Of all tables, each once."""
        return self.cells_in(())

    def _cell(
        self,
        run: Mapping[str, Any],
        method: Method,
        seed: int,
        task: str,
        partition: str,
        clients: int,
        rank: int,
        adapters: tuple[str, ...],
        attack: Attack,
    ) -> Cell:
        if attack.kind != "none" and attack.clients >= clients:
            raise ValueError(
                f"attacks.clients: expected fewer than {clients}, got {attack.clients}"
            )
        least = max(each.least_updates for each in (method.strategy, *method.shadows))
        body = {
            **run,
            "name": "cell",
            "clients": clients,
            "min_clients": min(clients, max(2, least)),
            "seed": seed,
            "deterministic": True,
            "strategy": method.strategy,
            "shadows": method.shadows,
            "personal": method.personal or "none",
            "placement": method.placement,
            "training": {**_section(run, "training"), **method.training},
            "adapter": {**_section(run, "adapter"), "rank": rank, "modalities": adapters},
            "data": {**_section(run, "data"), "source": task, "partition": partition},
        }
        try:
            config = RunConfig.model_validate(body)
        except ValidationError as error:
            refused = invalid(error).problems[0]
            told = f"method {method.label}, {partition}, {clients} clients, rank {rank}"
            found = replace(refused, field=f"run.{refused.field}", got=f"{refused.got} ({told})")
            raise ValueError(str(found)) from None
        if problem := _unfit(method, attack, config):
            raise ValueError(str(problem))
        return Cell(method, attack, config, self.split)


def _spread(given: dict[str, Any]) -> dict[str, Any]:
    """What a table doesn't say is the plan's."""
    shared = {name: given[name] for name in Grid.model_fields if name in given}
    tables = given.get("tables")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        return given
    return {**given, "tables": [_completed(table, shared) for table in tables]}


def _completed(table: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """Its `run` changes some of the plan's."""
    runs = [held for held in (shared.get("run"), table.get("run")) if isinstance(held, dict)]
    changed = {"run": runs[0] | runs[1]} if len(runs) == 2 else {}
    return {**shared, **table, **changed}


def _check_run(run: Mapping[str, Any]) -> None:
    """Raises ValueError for what the grid says."""
    inner = [(s, n, _section(run, s)) for s, n in _WITHIN]
    told = [(name, run) for name in _VARIED] + [(f"{s}.{n}", held) for s, n, held in inner]
    for name, held in told:
        key = name.rpartition(".")[2]
        if key in held:
            raise ValueError(
                f"run.{name}: expected nothing, as the grid says it, got {held[key]!r}"
            )


def _section(run: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Raises ValueError where it is something else."""
    found = run.get(name, {})
    if not isinstance(found, dict):
        raise ValueError(f"run.{name}: expected a mapping, got {found!r}")
    return found


def _unfit(method: Method, attack: Attack, config: RunConfig) -> Problem | None:
    """What can't be computed here, or would be something else than it says."""
    training, strategy = config.training, config.strategy.name
    if training.wire_dtype != "fp32":
        return Problem(
            "run.training.wire_dtype", "fp32: nothing crosses a wire here", training.wire_dtype
        )
    if training.wire != "dense":
        return Problem("run.training.wire", "dense: nothing crosses a wire here", training.wire)
    unequal = strategy == "flora" or bool(config.adapter.ranks)
    if unequal and attack.times != 1.0:
        expected = "label-flip where clients send other shapes than they get"
        return Problem("attacks", expected, f"{attack.label} ({method.label})")
    return None


def _mapping(given: Any) -> dict[str, Any]:
    """A strategy's name, or a mapping with it and its settings."""
    return dict(given) if isinstance(given, Mapping) else {"name": given}


def _shown(one: Any) -> str:
    return str(one.label) if isinstance(one, Method | Attack) else repr(one)
