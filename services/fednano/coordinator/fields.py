"""Records as Redis hashes and as JSON, by their types."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import TypeAdapter

from fednano.coordinator.records import ClientRecord, RoundRecord, RunRecord
from fednano.wire.placements import Shapes

T = TypeVar("T")


class Fields(Generic[T]):
    """A dataclass as a Redis hash: strings as they are, everything else as JSON."""

    def __init__(self, cls: type[T], hidden: tuple[str, ...] = ()) -> None:
        self._adapter: TypeAdapter[T] = TypeAdapter(cls)
        self._hidden = hidden
        hints = get_type_hints(cls)
        self._texts = {
            name
            for name, hint in hints.items()
            if hint is str or (isinstance(hint, type) and issubclass(hint, StrEnum))
        }

    def values(self, record: T) -> dict[str, Any]:
        """JSON values of all fields."""
        values: dict[str, Any] = self._adapter.dump_python(record, mode="json")
        return values

    def dump(self, record: T) -> dict[str, str]:
        return {
            name: value if name in self._texts else json.dumps(value)
            for name, value in self.values(record).items()
        }

    def load(self, found: dict[str, str]) -> T:
        values = {
            name: text if name in self._texts else json.loads(text) for name, text in found.items()
        }
        return self._adapter.validate_python(values)

    def public(self, record: T) -> str:
        """What an event tells: the fields that aren't hidden, as JSON."""
        values = self.values(record)
        return json.dumps({k: v for k, v in values.items() if k not in self._hidden})


@dataclass(frozen=True)
class StoredRun(RunRecord):
    """A run with what only the coordinator needs."""

    version: int = 0
    enrol_until: float = 0.0
    hidden_size: int = 0  # of the LLM, from the first member
    weights: Shapes = ()  # that the run's placement trains, from the first member, too
    best_accuracy: float | None = None
    resume_to: str = ""  # the state that a pause interrupted

    def public(self) -> RunRecord:
        return _narrow(RunRecord, self)


@dataclass(frozen=True)
class StoredRound(RoundRecord):
    """A round with what only the coordinator needs."""

    version: int = 0
    base: str = ""  # digest that training starts from
    base_handed: str = ""  # of what a strategy hands out with that; "" where there is none
    handed: str = ""  # the same after the merge, for the next round
    evaluators: tuple[str, ...] = ()  # who is waited for while evaluating

    def public(self) -> RoundRecord:
        return _narrow(RoundRecord, self)


@dataclass(frozen=True)
class StoredClient(ClientRecord):
    """A member with what only the coordinator needs."""

    session: str = ""
    token_id: str = ""
    token_name: str = ""
    token_expires_ms: int = 0  # of its token for the LLM service
    task: str = ""  # "train:<round>:<attempt>" or "evaluate:...": what it was handed last

    def public(self) -> ClientRecord:
        return _narrow(ClientRecord, self)


def _narrow(cls: type[T], record: Any) -> T:
    return cls(**{field.name: getattr(record, field.name) for field in fields(cls)})  # type: ignore[arg-type]


_RUN_EXTRAS = ("version", "enrol_until", "hidden_size", "weights", "best_accuracy", "resume_to")
_LARGE = ("config", "members")  # every member that joins makes an event
RUN = Fields(StoredRun, hidden=(*_LARGE, *_RUN_EXTRAS))
ROUND = Fields(StoredRound, hidden=("version", "base", "base_handed", "handed", "evaluators"))
_CLIENT_EXTRAS = ("session", "token_id", "token_name", "token_expires_ms", "task")
CLIENT = Fields(StoredClient, hidden=_CLIENT_EXTRAS)
