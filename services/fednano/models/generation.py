"""Writing tokens one by one from embedded prompts, several answers at a time, with a key-value cache.

Answers that are written together share one batch of rows, padded on the left, and its cache. They may
come and go between any two tokens. What an answer says does not depend on its company, but for the
rounding of a larger batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from fednano.models.caches import can_grow, gathered, narrowed
from fednano.models.language_model import LowRank, NewToken, Sampling
from fednano.models.padding import Padding
from fednano.wire.errors import InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Written = list[NewToken] | Exception
"""What a step gave one answer."""
Write = Callable[[Sequence["Answer"]], list[Written]]
_numbers = count()


class Plan:
    """How tokens are chosen and fed back, and when a sample has ended."""

    def __init__(
        self,
        sampling: Sampling,
        stop_ids: Sequence[int],
        max_positions: int,
        text_adapter: LowRank | None = None,
    ) -> None:
        self.sampling = sampling
        self.stop_ids = frozenset(sampling.stop_ids or stop_ids)
        self.max_positions = max_positions
        self.text_adapter = text_adapter

    def ends(self, token: int, written: int, prompt: int) -> bool:
        """True for an end token, the last one asked for, or one that no position is left to feed."""
        full = written >= self.sampling.max_new_tokens or prompt + written > self.max_positions
        return full or token in self.stop_ids

    def generator(self, sample: int) -> torch.Generator:
        """Random numbers of a sample's own, whatever else is in the batch and wherever it runs."""
        return torch.Generator().manual_seed((self.sampling.seed * 1_000_003 + sample) % 2**63)


class Answer:
    """What one request is written, as far as it is known. Nothing is lost with its cache: that can be
    computed again from the prompts and the tokens."""

    def __init__(self, prompts: torch.Tensor, lengths: tuple[int, ...], plan: Plan) -> None:
        """prompts [tokens, hidden], packed."""
        self.number = next(_numbers)
        self.plan = plan
        self.samples = list(range(len(lengths)))  # those still being written
        self.batch: Batch | None = None  # that holds its cache, once it has been fed
        self._prompts = prompts.split(lengths)
        self._generators = [plan.generator(i) for i in self.samples]
        self._ids: list[list[int]] = [[] for _ in lengths]

    @property
    def ended(self) -> bool:
        return not self.samples

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row so far."""
        return tuple(len(self._prompts[i]) + len(self._ids[i]) for i in self.samples)

    def lose(self) -> None:
        """Lets go of the cache."""
        self.batch = None

    def everything(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """Each row's tokens so far, as they are fed [tokens, hidden]."""
        rows = [self._prompts[i] for i in self.samples]
        if not self._ids[self.samples[0]]:
            return rows
        ids = torch.tensor([self._ids[i] for i in self.samples], device=rows[0].device)
        written = self._vectors(model, ids.flatten()).unflatten(0, ids.shape)
        return [torch.cat(parts) for parts in zip(rows, written, strict=True)]

    def newest(self, model: PreTrainedModel) -> torch.Tensor:
        """Each row's last token, as it is fed [live, hidden]."""
        ids = torch.tensor([self._ids[i][-1] for i in self.samples])
        return self._vectors(model, ids.to(self._prompts[0].device))

    def choose(self, logits: torch.Tensor) -> list[NewToken]:
        """A token for each row of logits [live, vocabulary]; rows that end with it are live no more."""
        if bool(logits.isnan().any()):
            raise InvalidRequest.of("embeddings", "values that give finite logits", "NaN")
        tokens = []
        for sample, token in zip(self.samples, self._chosen(logits), strict=True):
            self._ids[sample].append(token)
            written, prompt = len(self._ids[sample]), len(self._prompts[sample])
            tokens.append(NewToken(sample, token, self.plan.ends(token, written, prompt)))
        self.samples = [token.sample for token in tokens if not token.end]
        return tokens

    def _chosen(self, logits: torch.Tensor) -> list[int]:
        if self.plan.sampling.temperature == 0:
            return [int(token) for token in logits.argmax(dim=-1).tolist()]
        probabilities = _probabilities(logits, self.plan.sampling).cpu()
        return [
            int(torch.multinomial(row, 1, generator=self._generators[sample]))
            for sample, row in zip(self.samples, probabilities, strict=True)
        ]

    def _vectors(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = model.get_input_embeddings()(ids)
        if self.plan.text_adapter is not None:
            vectors = self.plan.text_adapter(vectors.float()).to(vectors.dtype)
        return vectors


class Batch:
    """Rows that have been fed together: whose they are, and their cache.

    It knows answers by their numbers only: held by nobody else, one is gone, and its cache with it.
    """

    def __init__(self, rows: list[tuple[int, int]], mask: torch.Tensor, cache: Any) -> None:
        self.rows = rows  # number of the answer, and sample, of each
        self.mask = mask  # [rows, tokens so far, the longest's]
        self.cache = cache

    def where(self, answers: Sequence[Answer]) -> list[int]:
        """The rows of those answers that are still being written."""
        live = {(answer.number, sample) for answer in answers for sample in answer.samples}
        return [place for place, row in enumerate(self.rows) if row in live]


@torch.inference_mode()
def write(model: PreTrainedModel, answers: Sequence[Answer]) -> list[Written]:
    """The next token of each unfinished sample of `answers`, none of which has ended.

    Where this raises, the answers have lost their caches and may be tried again: no token was chosen.
    """
    fresh = [answer for answer in answers if answer.batch is None]
    going = [answer for answer in answers if answer.batch is not None]
    try:
        logits = _begin(model, fresh) if fresh else {}
        for some in _together(going):
            logits |= _go_on(model, some)
    except Exception:
        for answer in answers:
            answer.lose()
        raise
    return [_chosen(answer, logits[answer.number]) for answer in answers]


def _chosen(answer: Answer, logits: torch.Tensor) -> Written:
    """One answer that can't go on does not end the others."""
    written: Written
    try:
        written = answer.choose(logits)
    except Exception as error:
        answer.samples, written = [], error
    if answer.ended:
        answer.lose()
    return written


def _begin(model: PreTrainedModel, answers: Sequence[Answer]) -> dict[int, torch.Tensor]:
    """Feeds the prompts; logits [live, vocabulary] by answer."""
    fed = [row for answer in answers for row in answer.everything(model)]
    padding = Padding.of(tuple(len(row) for row in fed), fed[0].device)
    output = _output(model, padding.pad(torch.cat(fed)), padding.mask, padding.position_ids, None)
    batch = Batch(_rows(answers), padding.mask, output.past_key_values)
    for answer in answers:
        answer.batch = batch
    return _by_answer(output, answers)


def _together(answers: Sequence[Answer]) -> list[list[Answer]]:
    """All in one, but for a model whose cache is not a row of tokens: there each batch for itself."""
    batches = {id(answer.batch): answer.batch for answer in answers}
    if all(batch is not None and can_grow(batch.cache) for batch in batches.values()):
        return [list(answers)] if answers else []
    return [[answer for answer in answers if id(answer.batch) == batch] for batch in batches]


def _go_on(model: PreTrainedModel, answers: Sequence[Answer]) -> dict[int, torch.Tensor]:
    """Feeds the newest tokens; logits [live, vocabulary] by answer."""
    batch = _batch_of(answers)
    order = [number for number, _ in batch.rows]
    answers = sorted(answers, key=lambda answer: order.index(answer.number))
    fed = torch.cat([answer.newest(model) for answer in answers])[:, None]
    positions = batch.mask.sum(dim=1, keepdim=True)
    mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], dim=1)
    output = _output(model, fed, mask, positions, batch.cache)
    batch.mask, batch.cache = mask, output.past_key_values
    return _by_answer(output, answers)


def _batch_of(answers: Sequence[Answer]) -> Batch:
    """The one batch that holds their live rows and no other, made from those that they are in."""
    found = {id(answer.batch): answer.batch for answer in answers if answer.batch is not None}
    batches = [(batch, batch.where(answers)) for batch in found.values()]
    first, kept = batches[0]
    if len(batches) == 1 and len(kept) == len(first.rows):
        return first
    masks = [batch.mask[rows] for batch, rows in batches]
    width = max(int(mask.sum(dim=1).max()) for mask in masks)
    if not can_grow(first.cache):
        width = first.mask.shape[1]
    made = Batch(
        [batch.rows[row] for batch, rows in batches for row in rows],
        torch.cat([_widened(mask, width) for mask in masks]),
        gathered(
            [narrowed(batch.cache, rows, batch.mask.shape[1], width) for batch, rows in batches]
        ),
    )
    for answer in answers:
        answer.batch = made
    return made


def _rows(answers: Sequence[Answer]) -> list[tuple[int, int]]:
    return [(answer.number, sample) for answer in answers for sample in answer.samples]


def _widened(mask: torch.Tensor, width: int) -> torch.Tensor:
    """The last `width` columns, or more of padding before them."""
    short = max(0, width - mask.shape[1])
    return torch.cat(
        [mask.new_zeros(len(mask), short), mask[:, max(0, mask.shape[1] - width) :]], 1
    )


def _output(
    model: PreTrainedModel,
    fed: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    cache: Any,
) -> Any:
    return model(
        inputs_embeds=fed,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )


def _by_answer(output: Any, answers: Sequence[Answer]) -> dict[int, torch.Tensor]:
    """Their rows lie in the order of `answers`."""
    parts = output.logits[:, -1].float().split([len(answer.samples) for answer in answers])
    return {answer.number: part for answer, part in zip(answers, parts, strict=True)}


def _probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[live, vocabulary]; what lies outside the nucleus of mass top_p gets 0."""
    probabilities = (logits / sampling.temperature).softmax(dim=-1)
    if sampling.top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    outside = ordered.cumsum(dim=-1) - ordered >= sampling.top_p  # mass before it suffices
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0))
