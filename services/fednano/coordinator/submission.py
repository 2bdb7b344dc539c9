"""An update as it arrives: received chunk by chunk, and checked before anything is kept."""

from __future__ import annotations

import hashlib
import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fednano.coordinator.metrics import KINDS
from fednano.coordinator.records import Tensors
from fednano.coordinator.store_members import Spent
from fednano.coordinator.store_updates import UpdateMeta
from fednano.coordinator.strategies import CONTROL, FISHER, Strategy
from fednano.wire.codec import FLOATS, Array, Payload
from fednano.wire.coordinator_pb2 import Costs, SubmitHead, SubmitRequest
from fednano.wire.errors import InvalidRequest
from fednano.wire.low_rank import DOWN, cut
from fednano.wire.run_config import RunConfig
from fednano.wire.tensor_pb2 import DType, TensorSpec

_MAX_METRICS = 100
_MAX_METRIC_NAME = 64
_MAX_BYTES = 1 << 40  # of one kind in one report
_MAX_SECONDS = 1e9  # likewise
_MAX_SAMPLES = 1 << 40
_LONGEST_REASON = 500


class Refused(Exception):
    """The update can't be used; the text, which goes to Redis, says why."""

    def __init__(self, reason: str) -> None:
        cut = len(reason) > _LONGEST_REASON
        super().__init__(reason[: _LONGEST_REASON - 3] + "..." if cut else reason)


@dataclass(frozen=True)
class Rules:
    """What an update of this round must look like."""

    base_digest: str
    base: Tensors  # as much of it as the client trains
    strategies: Sequence[Strategy]  # the one that leads, and its shadows
    max_norm: float  # times max(1, norm of the base)

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """Names of the tensors that any of them needs beside the adapter."""
        needed = (name for one in self.strategies for name in one.auxiliary(self.base))
        return tuple(dict.fromkeys(needed))


def started_from(base: Tensors, config: RunConfig, member: int | None) -> Tensors:
    """What the member of this index trains and sends back, as its training starts: the round's
    adapter, cut to its rank where members have their own. With `flora` it is what they add to that;
    they draw their A by themselves, so 0 stands for it."""
    rank = config.adapter.rank_of(member or 0)
    if config.strategy.name == "flora":
        return {
            name: np.zeros((rank, tensor.shape[1]), np.float32)
            if name.endswith(DOWN)
            else np.zeros((tensor.shape[0], rank), np.float32)
            for name, tensor in base.items()
        }
    return cut(base, rank) if config.adapter.ranks else base


async def receive_head(stream: AsyncIterator[SubmitRequest]) -> SubmitHead:
    """The stream's first message. Raises InvalidRequest."""
    async for request in stream:
        if request.HasField("head"):
            return request.head
        break
    raise InvalidRequest("the first message of Submit must be its head")


async def receive_payload(
    stream: AsyncIterator[SubmitRequest], head: SubmitHead, limit: int
) -> tuple[Payload, str]:
    """All chunks, and their SHA-256. Raises BadTensor where more or less comes than announced."""
    payload = Payload([*head.tensors, *head.auxiliary], limit)
    digest = hashlib.sha256()
    async for request in stream:
        if not request.HasField("chunk"):
            raise InvalidRequest("after its head, Submit carries chunks only")
        payload.feed(request.chunk)
        digest.update(request.chunk)
    payload.buffers()
    return payload, digest.hexdigest()


def update_meta(head: SubmitHead, rules: Rules) -> UpdateMeta:
    """What the head tells of its update, after every check that needs no chunk. Raises Refused."""
    if head.base != rules.base_digest:
        raise Refused(_text("base", f"the digest {rules.base_digest}", head.base or "nothing"))
    if not 1 <= head.samples <= _MAX_SAMPLES:
        raise Refused(_text("samples", f"1 to {_MAX_SAMPLES}", head.samples))
    needed = rules.auxiliary
    shapes = {name: array.shape for name, array in rules.base.items()}
    _check_specs("tensors", head.tensors, shapes)
    _check_specs("auxiliary", head.auxiliary, {name: shapes[_partner_of(name)] for name in needed})
    try:
        metrics = metrics_of(head.metrics)
    except InvalidRequest as error:
        raise Refused(error.detail) from None
    return UpdateMeta(head.samples, metrics, [spec.name for spec in head.auxiliary])


def checked(head: SubmitHead, payload: Payload, digest: str, rules: Rules) -> Tensors:
    """Adapter and auxiliary tensors, fp32. Raises Refused."""
    if digest != head.digest:
        raise Refused(_text("digest", head.digest or "the SHA-256 of the chunks", digest))
    arrays = {name: _floats(name, array) for name, array in payload.arrays().items()}
    needed = rules.auxiliary
    for name in needed:
        if name.startswith(FISHER) and (arrays[name] < 0).any():
            raise Refused(_text(name, "squares, so 0 or more", "negative numbers"))
    _check_norm(arrays, rules)
    controls = [arrays[name] for name in needed if name.startswith(CONTROL)]
    _check_length(f"norm of {CONTROL}*", controls, rules.max_norm)
    return arrays


def _partner_of(name: str) -> str:
    """The adapter's tensor that an auxiliary one goes with, such as `text.up` of `fisher.text.up`."""
    return name.partition(".")[2]


def _floats(name: str, array: Array) -> NDArray[np.float32]:
    values = array.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise Refused(_text(name, "finite numbers", "NaN or infinity"))
    return values


def _check_specs(
    field: str, specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    announced = {spec.name: spec for spec in specs}
    if announced.keys() != shapes.keys():
        raise Refused(_text(field, sorted(shapes) or "none", sorted(announced) or "none"))
    if len(specs) > len(announced):
        raise Refused(_text(field, "each tensor once", "one of them twice"))
    for name, spec in announced.items():
        if tuple(spec.shape) != shapes[name]:
            raise Refused(_text(f"{name}.shape", list(shapes[name]), list(spec.shape)))
        if spec.dtype not in FLOATS:
            names = ", ".join(DType.Name(dtype) for dtype in FLOATS)
            raise Refused(_text(f"{name}.dtype", f"one of {names}", DType.Name(spec.dtype)))


def _check_norm(arrays: Tensors, rules: Rules) -> None:
    """The step that the client took must not be absurd."""
    step = [arrays[name] - rules.base[name] for name in rules.base]
    limit = rules.max_norm * max(1.0, _norm(rules.base.values()))
    _check_length("norm of (update - base)", step, limit)


def _check_length(what: str, arrays: Iterable[NDArray[np.float32]], limit: float) -> None:
    norm = _norm(arrays)
    if norm > limit:
        raise Refused(_text(what, f"at most {limit:.6g}", f"{norm:.6g}"))


def _norm(arrays: Iterable[NDArray[np.float32]]) -> float:
    return math.sqrt(sum(map(_square, arrays)))


def _square(array: NDArray[np.float32]) -> float:
    values = array.astype(np.float64)
    return float(np.vdot(values, values))


def _text(field: str, expected: object, got: object) -> str:
    return f"{field}: expected {expected}, got {got}"


def metrics_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """A client's metrics, sorted. Raises InvalidRequest where they can't be kept."""
    if len(metrics) > _MAX_METRICS:
        raise InvalidRequest.of("metrics", f"at most {_MAX_METRICS}", len(metrics))
    for name, value in metrics.items():
        if not 0 < len(name) <= _MAX_METRIC_NAME:
            raise InvalidRequest.of("metrics", f"names of 1 to {_MAX_METRIC_NAME} characters", name)
        if not math.isfinite(value):
            raise InvalidRequest.of(f"metrics.{name}", "a finite number", value)
    return dict(sorted(metrics.items()))


def spent_of(costs: Costs) -> Spent:
    """What a client spent; kinds that nobody knows are counted as "other"."""
    for field in ("client_seconds", "server_seconds"):
        value = getattr(costs, field)
        if not 0 <= value <= _MAX_SECONDS:
            raise InvalidRequest.of(f"costs.{field}", f"0 to {_MAX_SECONDS:.0f}", value)
    return Spent(
        _amounts("costs.sent_bytes", costs.sent_bytes),
        _amounts("costs.received_bytes", costs.received_bytes),
        costs.client_seconds,
        costs.server_seconds,
    )


def _amounts(field: str, amounts: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for kind, amount in amounts.items():
        known = kind if kind in KINDS else "other"
        found[known] = found.get(known, 0) + amount
        if found[known] > _MAX_BYTES:
            raise InvalidRequest.of(f"{field}.{known}", f"at most {_MAX_BYTES}", found[known])
    return found
