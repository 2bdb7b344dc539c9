"""One model over several processes: the first rank serves, the others compute what it computes.

torchrun starts the ranks and transformers divides the weights. Every rank then has to run the same
computations in the same order, so the first tells the others each of them before it begins, from the
device's own thread: that is the order. What is made on all ranks (a kept forward pass, an answer
that is being written) has a number; the others let go of it when the first has.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta
from itertools import count
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from fednano.llm.worker import Worker
from fednano.models.activations import Activation, Activations
from fednano.models.factored import Factored
from fednano.models.frozen import FrozenLLM
from fednano.models.generation import Answer, Written
from fednano.models.language_model import (
    ForwardResult,
    LowRank,
    Sampling,
    ScoreResult,
    Sequences,
    StepResult,
)
from fednano.wire.errors import Busy, FedNanoError, Unavailable

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
"""How often the ranks are heard of while nobody calls."""
_PATIENCE = timedelta(minutes=10)
"""How long a rank waits for another's word; an idle first rank speaks every BEAT_SECONDS."""

Verb = Literal[
    "embed", "step", "score", "forward", "activate", "descend", "answer", "write", "rest", "end"
]


@dataclass(frozen=True)
class Order:
    """One computation, as the first rank tells it."""

    verb: Verb
    given: tuple[Any, ...] = ()
    number: int = 0  # of what is made, or used
    numbers: tuple[int, ...] = ()  # where it is several
    forget: tuple[int, ...] = ()  # numbers that are not needed any more


class Ranks:
    """How orders travel: by torch.distributed, between processes of our own, over a group apart from
    the model's. All ranks make one, at the same point."""

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def tell(self, order: Order) -> None:
        """Tensors follow by themselves: within an object, 92 MB took ten times as long."""
        tensors: list[torch.Tensor] = []
        given = tuple(
            _mapped(value, lambda tensor: _take(tensor, tensors)) for value in order.given
        )
        dist.broadcast_object_list([replace(order, given=given)], src=0, group=self._group)
        for tensor in tensors:
            dist.broadcast(_bytes_of(tensor), src=0, group=self._group)

    def hear(self) -> Order:
        told: list[Any] = [None]
        dist.broadcast_object_list(told, src=0, group=self._group)
        order: Order = told[0]
        return replace(order, given=tuple(_mapped(value, self._fill) for value in order.given))

    def close(self) -> None:
        """Ends every group and waits for the threads of ours, which free the last order's tensors:
        one that is at it while Python ends aborts the process."""
        dist.destroy_process_group()
        del self._group  # the last reference: what joins the threads is its end

    def _fill(self, blank: _Blank) -> torch.Tensor:
        tensor = torch.empty(blank.shape, dtype=blank.dtype)
        dist.broadcast(_bytes_of(tensor), src=0, group=self._group)
        return tensor


@dataclass(frozen=True)
class _Blank:
    """Stands for a tensor that follows."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with its tensors changed to blanks, or back; they lie in it or in its fields."""
    if isinstance(value, torch.Tensor | _Blank):
        return change(value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    held = {field.name: getattr(value, field.name) for field in fields(value)}
    return replace(
        value,
        **{n: change(v) for n, v in held.items() if isinstance(v, torch.Tensor | _Blank)},
    )


def _take(tensor: torch.Tensor, tensors: list[torch.Tensor]) -> _Blank:
    tensors.append(tensor.detach().cpu().contiguous())
    return _Blank(tuple(tensor.shape), tensor.dtype)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory; gloo does not know every dtype."""
    return tensor.view(-1).view(torch.uint8)


@dataclass(frozen=True, eq=False)
class _Shared(Activation):
    """A forward pass that every rank keeps."""

    number: int


class LeadingLLM(FrozenLLM):
    """The first rank's. Its callers see no difference.

    What can be wrong with a request has been checked before a computation begins. So whatever a
    computation raises, here or on another rank, leaves the ranks apart: it is the last one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        fingerprint: str,
        name: str = "",
        activations: Activations | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(model, fingerprint, name, activations)
        self._ranks = ranks if ranks is not None else Ranks()
        self._numbers = count(1)
        self._forgotten: deque[int] = deque()  # filled by any thread
        self._answers: weakref.WeakKeyDictionary[Answer, int] = weakref.WeakKeyDictionary()
        self.lost: Exception | None = None

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        with self._together("embed", ids):
            return super().embed(ids)

    def step(self, sequences: Sequences, labels: torch.Tensor, weights: torch.Tensor) -> StepResult:
        with self._together("step", sequences, labels, weights):
            return super().step(sequences, labels, weights)

    def score(self, sequences: Sequences, labels: torch.Tensor) -> ScoreResult:
        with self._together("score", sequences, labels):
            return super().score(sequences, labels)

    def forward(
        self,
        sequences: Sequences,
        positions: torch.Tensor,
        keep: bool = True,
        origin: Factored | None = None,
    ) -> ForwardResult:
        if keep:  # by way of `activate`
            return super().forward(sequences, positions, origin=origin)
        with self._together("forward", sequences, positions, False):
            return super().forward(sequences, positions, keep=False)

    def activate(
        self, sequences: Sequences, positions: torch.Tensor, divisible: bool = False
    ) -> Activation:
        number = next(self._numbers)
        with self._together("activate", sequences, positions, number=number):
            made = super().activate(sequences, positions, divisible)
        shared = _Shared(made.values, made.logits, number)
        self._forget_with(shared, number)
        return shared

    def descend(self, activation: Activation, logits_gradient: torch.Tensor) -> torch.Tensor:
        assert isinstance(activation, _Shared)
        with self._together("descend", logits_gradient, number=activation.number):
            return super().descend(activation, logits_gradient)

    def answer(
        self, sequences: Sequences, sampling: Sampling, text_adapter: LowRank | None = None
    ) -> Answer:
        number = next(self._numbers)
        with self._together("answer", sequences, sampling, text_adapter, number=number):
            made = super().answer(sequences, sampling, text_adapter)
        self._answers[made] = number
        self._forget_with(made, number)
        return made

    def write(self, answers: Sequence[Answer]) -> list[Written]:
        """Other computations may come between two tokens, and a caller may leave after any."""
        numbers = tuple(self._answers[answer] for answer in answers)
        with self._together("write", numbers=numbers):
            return super().write(answers)

    def rest(self) -> None:
        """Computes nothing; frees what is forgotten, and fails where a rank is gone."""
        with self._together("rest"):
            pass

    def dismiss(self) -> None:
        """Lets the other ranks end. Raises FedNanoError where they have been lost."""
        with suppress(Unavailable), self._together("end"):
            pass
        if self.lost is not None:
            raise FedNanoError(f"a rank of this service was lost: {self.lost}")
        self._ranks.close()

    def _forget_with(self, made: object, number: int) -> None:
        """Time, room or use may end it, here alone: the others follow."""
        weakref.finalize(made, self._forgotten.append, number).atexit = False

    @contextmanager
    def _together(
        self, verb: Verb, *given: Any, number: int = 0, numbers: tuple[int, ...] = ()
    ) -> Iterator[None]:
        """The same on every rank. Raises Unavailable where that is no longer possible."""
        if self.lost is not None:
            raise Unavailable("a rank of this service was lost; it is ending")
        try:
            self._ranks.tell(Order(verb, given, number, numbers, self._take_forgotten()))
            yield
        except Exception as error:
            self.lost = error
            log.exception("rank lost", extra={"rank": 0, "during": verb})
            raise Unavailable("a rank of this service was lost; it is ending") from error

    def _take_forgotten(self) -> tuple[int, ...]:
        return tuple(self._forgotten.popleft() for _ in range(len(self._forgotten)))


class Follower:
    """Any other rank: computes what it hears."""

    def __init__(self, engine: FrozenLLM) -> None:
        self._engine = engine
        self.held: dict[int, Any] = {}

    def follow(self, order: Order) -> None:
        """The result is the first rank's to hand on."""
        for number in order.forget:
            self.held.pop(number, None)
        if order.verb in ("activate", "answer"):
            self.held[order.number] = getattr(self._engine, order.verb)(*order.given)
        elif order.verb == "descend":
            self._engine.descend(self.held[order.number], *order.given)
        elif order.verb == "write":
            self._engine.write([self.held[number] for number in order.numbers])
        elif order.verb not in ("rest", "end"):
            getattr(self._engine, order.verb)(*order.given)


def follow(engine: FrozenLLM) -> None:
    """Until the first rank says so. Raises FedNanoError where it is gone without a word, or where
    this rank can't compute what it was told: the process group ends together.

    Signals are the first rank's: it finishes what it has begun, and for that it needs the others.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ranks, follower, rank = Ranks(), Follower(engine), dist.get_rank()
    log.info("llm rank ready", extra={"rank": rank, "device": str(engine.device)})
    while True:
        try:
            order = ranks.hear()
            follower.follow(order)
        except Exception as error:
            log.exception("rank lost", extra={"rank": rank})
            raise FedNanoError(f"rank {rank} of this service can't go on: {error}") from error
        if order.verb == "end":
            break
    ranks.close()
    log.info("llm rank stopped", extra={"rank": rank})


@asynccontextmanager
async def kept_together(
    leader: LeadingLLM | None, worker: Worker, give_up: Callable[[], None]
) -> AsyncIterator[None]:
    """Notices a rank that has died while nobody calls, and gives up as soon as one has."""
    if leader is None:
        yield
        return
    watching = asyncio.create_task(_watch(leader, worker, give_up))
    try:
        yield
    finally:
        watching.cancel()


async def _watch(leader: LeadingLLM, worker: Worker, give_up: Callable[[], None]) -> None:
    while leader.lost is None:
        await asyncio.sleep(BEAT_SECONDS)
        with suppress(Busy, Unavailable):
            await worker.submit(leader.rest).result()
    give_up()
