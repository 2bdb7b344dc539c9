"""Writing tokens one by one from embedded prompts, with a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fednano.models.language_model import LowRank, NewToken, Sampling
from fednano.models.padding import Padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate(
    model: PreTrainedModel, prompts: torch.Tensor, padding: Padding, plan: Plan
) -> Iterator[list[NewToken]]:
    """prompts [tokens, hidden], packed; a token for each unfinished sample at every step."""
    writer = _Writer(model, prompts, padding, plan)
    while writer.samples:
        yield writer.step()


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


class _Writer:
    """The state between two steps: the cache, and what is fed next."""

    def __init__(
        self, model: PreTrainedModel, prompts: torch.Tensor, padding: Padding, plan: Plan
    ) -> None:
        self._model = model
        self._plan = plan
        self._prompt_lengths = padding.lengths
        self._generators = [plan.generator(i) for i in range(len(padding.lengths))]
        self._cache: Any = None
        self._fed = padding.pad(prompts)  # [live, new tokens, hidden]
        self._mask = padding.mask  # [live, all tokens so far]
        self._position_ids = padding.position_ids  # [live, new tokens]
        self._written = 0
        self.samples = list(range(len(padding.lengths)))  # those still being written

    @torch.inference_mode()
    def step(self) -> list[NewToken]:
        """Feeds what is due and chooses the next token of each sample."""
        output = self._model(
            inputs_embeds=self._fed,
            attention_mask=self._mask,
            position_ids=self._position_ids,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        self._written += 1
        chosen = self._choose(output.logits[:, -1].float())  # [live]
        tokens = [
            NewToken(
                sample, token, self._plan.ends(token, self._written, self._prompt_lengths[sample])
            )
            for sample, token in zip(self.samples, chosen.tolist(), strict=True)
        ]
        self._feed(chosen, [row for row, token in enumerate(tokens) if not token.end])
        return tokens

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [live, vocabulary] to token ids [live]."""
        if self._plan.sampling.temperature == 0:
            return logits.argmax(dim=-1)
        probabilities = _probabilities(logits, self._plan.sampling).cpu()
        draws = [
            torch.multinomial(row, 1, generator=self._generators[sample])
            for sample, row in zip(self.samples, probabilities, strict=True)
        ]
        return torch.cat(draws).to(logits.device)

    def _feed(self, chosen: torch.Tensor, keep: list[int]) -> None:
        """Prepares the next step for the rows `keep`; finished samples leave the batch."""
        if len(keep) < len(self.samples):
            self.samples = [self.samples[row] for row in keep]
            if not keep:
                return
            rows = torch.tensor(keep)  # of no device: the cache's layers may lie on several
            self._cache.batch_select_indices(rows)
            chosen, self._mask = chosen[rows], self._mask[rows]
            self._position_ids = self._position_ids[rows]
        vectors = self._model.get_input_embeddings()(chosen)  # [live, hidden]
        if self._plan.text_adapter is not None:
            vectors = self._plan.text_adapter(vectors.float()).to(vectors.dtype)
        self._fed = vectors[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(chosen), 1)], dim=1)
        self._position_ids = self._position_ids[:, -1:] + 1


def _probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[live, vocabulary]; what lies outside the nucleus of mass top_p gets 0."""
    probabilities = (logits / sampling.temperature).softmax(dim=-1)
    if sampling.top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    outside = ordered.cumsum(dim=-1) - ordered >= sampling.top_p  # mass before it suffices
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0))
