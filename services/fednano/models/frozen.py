"""The frozen LLM in this process: the engine of the LLM service, and the client's reference.

Everything goes through the stock forward with `inputs_embeds`, so that families which scale
embeddings or soft-cap logits are right by construction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from fednano.models import checkpoint
from fednano.models.activations import Activation, Activations, Fed
from fednano.models.choices import Checkpointing
from fednano.models.compute import (
    AS_MADE,
    Compute,
    keep_4bit_as_stored,
    quantisation,
    quantised,
)
from fednano.models.devices import DeviceName, pick_device
from fednano.models.factored import Factored
from fednano.models.generation import Answer, Plan, Written, write
from fednano.models.language_model import (
    ForwardResult,
    LowRank,
    NewToken,
    Sampling,
    ScoreResult,
    Sequences,
    StepResult,
)
from fednano.models.layers import compile_layers, layers
from fednano.models.memory import free_memory, out_of_memory, recomputed
from fednano.models.padding import Padding, Predictions
from fednano.models.parallel import ONE_DEVICE, Spread, home
from fednano.wire.errors import InvalidRequest, UnknownActivation

log = logging.getLogger(__name__)

R = TypeVar("R")
DTypeName = Literal["auto", "fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_UNBOUNDED = 1 << 20


class FrozenLLM:
    """A causal LM without a single trainable weight: embeddings in; losses, gradients, tokens out.

    One thread at a time may use it, but for `embed`. Results lie on the device of the values that
    were sent; gradients have the model's dtype. On a CPU the same request gives the same bytes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        fingerprint: str,
        name: str = "",
        activations: Activations | None = None,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self._fingerprint = fingerprint
        self.name = name or model.config.model_type
        if activations is None:
            activations = Activations("local", tokens=1 << 16, seconds=600)
        self.activations = activations
        self._recompute: Checkpointing = "auto"

    @classmethod
    def load(
        cls,
        directory: Path,
        device: DeviceName = "auto",
        dtype: DTypeName = "auto",
        fingerprint: str | None = None,
        activations: Activations | None = None,
        spread: Spread = ONE_DEVICE,
        compute: Compute = AS_MADE,
    ) -> Self:
        """The causal LM in `directory`: the half that `fednano split` wrote, or a stock checkpoint.

        `fingerprint` replaces the recorded one; a stock checkpoint's is computed. Quantised weights
        are part of it. Raises InvalidRequest where there is no such model, or no such device, or it
        can't be spread or computed so.
        """
        compute.check(spread)
        name, found = directory.resolve().name, fingerprint
        if (directory / checkpoint.RECORD).is_file():
            record = checkpoint.read_record(directory, "llm")
            name, found = record.name, fingerprint or record.fingerprint
        place = pick_device(device)
        found = found or checkpoint.fingerprint(directory)
        options = spread.options(directory) | compute.options(place, pick_dtype(dtype, place))
        model = _from_pretrained(directory, dtype=pick_dtype(dtype, place), **options)
        if compute.weights == "nf4":
            keep_4bit_as_stored(model)
        placed = model if "device_map" in options or spread.tensor_parallel else model.to(place)
        engine = cls(placed, quantised(found, compute.weights), name, activations)
        engine.recompute(compute.recomputes(spread))
        if compute.compile:
            engine.check_layers("compile")
            compile_layers(model)
        return engine

    def recompute(self, when: Checkpointing) -> None:
        """When layers are computed again on the way back, so that less is kept for it; auto: where
        one sample's graph does not fit. The results are the same bytes.

        Raises InvalidRequest where the family's layers can't be.
        """
        if when == "on":
            self.check_layers("gradient_checkpointing")
        self._recompute = when

    def check_layers(self, field: str) -> None:
        """Raises InvalidRequest where transformers does not mark the family's layers, so that
        nothing can be done with each."""
        if not layers(self._model):
            raise InvalidRequest.of(field, "a family whose layers transformers marks", self.name)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def hidden_size(self) -> int:
        return int(self._model.get_input_embeddings().embedding_dim)

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return int(self._model.get_output_embeddings().weight.shape[0])

    @property
    def table_rows(self) -> int:
        """Rows of the embedding table."""
        return int(self._model.get_input_embeddings().num_embeddings)

    @property
    def parameters(self) -> int:
        return int(self._model.num_parameters())

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def precision(self) -> str:
        """As people are told: the dtype, and what its weights were quantised to, as bfloat16+nf4."""
        return quantised(str(self.dtype).removeprefix("torch."), quantisation(self._fingerprint))

    @cached_property
    def device(self) -> torch.device:
        """Where inputs go and logits come from."""
        return home(self._model)

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sequence that the model was made for."""
        config = self._model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or _UNBOUNDED)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The model's own end tokens."""
        for config in (self._model.generation_config, self._model.config.get_text_config()):
            ids = getattr(config, "eos_token_id", None)
            if ids is not None:
                return (ids,) if isinstance(ids, int) else tuple(ids)
        return ()

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [tokens] to what the model feeds itself for them [tokens, hidden].

        That is the embedding table's row, scaled where the family does so.
        """
        vectors: torch.Tensor = self._model.get_input_embeddings()(ids.to(self.device))
        return vectors.to(ids.device)

    def step(self, sequences: Sequences, labels: torch.Tensor, weights: torch.Tensor) -> StepResult:
        """Loss and gradient in one go: one forward, one backward, to the inputs only."""
        divisible = len(sequences.lengths) > 1  # smaller batches cost less than computing again
        return self._with_graph(lambda: self._step(sequences, labels, weights), divisible)

    @torch.inference_mode()
    def score(self, sequences: Sequences, labels: torch.Tensor) -> ScoreResult:
        """Loss and teacher-forced hits, no gradient."""
        padding = self._padding(sequences)
        predictions = padding.predictions(labels)
        losses, logits = self._losses(self._placed(sequences), padding, predictions)
        hits = predictions.sums((logits.argmax(dim=-1) == predictions.targets).int())
        home = sequences.values.device
        sums, counts = predictions.sums(losses), _counts(predictions)
        return ScoreResult(sums.to(home), counts.to(home), hits.int().to(home))

    def forward(
        self,
        sequences: Sequences,
        positions: torch.Tensor,
        keep: bool = True,
        origin: Factored | None = None,
    ) -> ForwardResult:
        """Logits at `positions` [wanted]; `keep` holds the graph for `backward`, and beside it the
        `origin` of the sequences, for whoever wants that."""
        home = sequences.values.device
        if not keep:
            with torch.no_grad():
                logits = self._logits(self._placed(sequences), self._padding(sequences), positions)
            return ForwardResult("", logits.to(home))
        activation = self.activate(sequences, positions)
        name = self.activations.put(activation, origin)
        return ForwardResult(name, activation.logits.detach().to(home))

    def backward(
        self,
        activation: str,
        logits_gradient: torch.Tensor,
        sequences: Sequences | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The gradient [tokens, hidden] for `logits_gradient` [wanted, vocabulary].

        An activation serves once. Where it is gone it is computed again from `sequences` and
        `positions`; without them, raises UnknownActivation. Raises InvalidRequest for another shape
        than that of the logits.
        """
        kept = self.activations.get(activation)
        if kept is not None:
            held = kept.activation
            made = self.activate(held.sequences, held.positions) if isinstance(held, Fed) else held
        elif sequences is None or positions is None:
            raise UnknownActivation("the activation is gone; send the embeddings again")
        else:
            made = self.activate(sequences, positions)
        if made.logits.shape != logits_gradient.shape:
            raise InvalidRequest.of(
                "logits_gradient", list(made.logits.shape), list(logits_gradient.shape)
            )
        self.activations.drop(activation)
        return self.descend(made, logits_gradient)

    def backward_again(
        self,
        sequences: Sequences,
        positions: torch.Tensor,
        logits_gradient: torch.Tensor,
        divisible: bool = False,
    ) -> torch.Tensor:
        """`backward` of a pass of which nothing was kept; `divisible`: fewer could be tried instead."""
        made = self.activate(sequences, positions, divisible)
        gradient = self.descend(made, logits_gradient.to(self.device))
        return gradient.to(sequences.values.device)

    def activate(
        self, sequences: Sequences, positions: torch.Tensor, divisible: bool = False
    ) -> Activation:
        """A forward pass with its graph, from which `descend` goes back, once."""
        return self._with_graph(lambda: self._activate(sequences, positions), divisible)

    def descend(self, activation: Activation, logits_gradient: torch.Tensor) -> torch.Tensor:
        """logits_gradient [wanted, vocabulary] to the gradient [tokens, hidden]."""
        above = logits_gradient.to(activation.logits)
        gradient = _gradient(activation.logits, activation.values, above)
        return gradient.to(logits_gradient.device)

    def generate(
        self, sequences: Sequences, sampling: Sampling, text_adapter: LowRank | None = None
    ) -> Iterator[list[NewToken]]:
        """Tokens as they are known; see `models.generation`."""
        answer = self.answer(sequences, sampling, text_adapter)
        while not answer.ended:
            (written,) = self.write([answer])
            if isinstance(written, Exception):
                raise written
            yield written

    def answer(
        self, sequences: Sequences, sampling: Sampling, text_adapter: LowRank | None = None
    ) -> Answer:
        """One that `write` goes on with; nothing is computed yet."""
        if text_adapter is not None:
            text_adapter = LowRank(
                text_adapter.down.to(self.device, torch.float32),
                text_adapter.up.to(self.device, torch.float32),
                text_adapter.scale,
            )
        plan = Plan(sampling, self.stop_ids, self.max_positions, text_adapter)
        return Answer(self._placed(sequences), sequences.lengths, plan)

    def write(self, answers: Sequence[Answer]) -> list[Written]:
        """The next token of each unfinished sample of each answer, in one batch.

        Where this raises, no answer has changed but for its cache: each may be tried again.
        """
        return write(self._model, answers)

    def _with_graph(self, compute: Callable[[], R], divisible: bool = False) -> R:
        """Once more with layers computed again on the way back, where that is the last resort."""
        if self._recompute != "on":
            try:
                return compute()
            except Exception as error:
                last = self._recompute == "auto" and not divisible and layers(self._model)
                if not last or not out_of_memory(error):
                    raise
            free_memory()  # out here: the error's frames hold tensors
            log.warning("layers computed again for want of memory")
        with recomputed(self._model):
            return compute()

    def _step(
        self, sequences: Sequences, labels: torch.Tensor, weights: torch.Tensor
    ) -> StepResult:
        padding = self._padding(sequences)
        values = self._leaf(sequences)
        predictions = padding.predictions(labels)
        # Before the forward pass: a copy waits for what a GPU has been given to do.
        weights = weights.to(self.device, torch.float32)
        with torch.enable_grad():
            losses, _ = self._losses(values, padding, predictions)
            sums = predictions.sums(losses)
            total = sums @ weights.to(sums)
            gradient = _gradient(total, values)
        home = sequences.values.device
        return StepResult(sums.detach().to(home), _counts(predictions).to(home), gradient.to(home))

    def _activate(self, sequences: Sequences, positions: torch.Tensor) -> Activation:
        values = self._leaf(sequences)
        with torch.enable_grad():
            return Activation(values, self._logits(values, self._padding(sequences), positions))

    def _padding(self, sequences: Sequences) -> Padding:
        return Padding.of(sequences.lengths, self.device)

    def _placed(self, sequences: Sequences) -> torch.Tensor:
        return sequences.values.detach().to(self.device, self.dtype)

    def _leaf(self, sequences: Sequences) -> torch.Tensor:
        return self._placed(sequences).requires_grad_()

    def _losses(
        self, values: torch.Tensor, padding: Padding, predictions: Predictions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each labelled token [labelled] and the logits behind it."""
        logits = self._logits(values, padding, predictions.positions)
        return cross_entropy(logits, predictions.targets, reduction="none"), logits

    def _logits(
        self, values: torch.Tensor, padding: Padding, positions: torch.Tensor
    ) -> torch.Tensor:
        """Logits [wanted, vocabulary] float32 at packed `positions`, and nowhere else."""
        positions = positions.to(self.device, torch.long)
        columns, column = padding.columns[positions].unique(return_inverse=True)
        output: Any = self._model(
            inputs_embeds=padding.pad(values),
            attention_mask=padding.mask,
            position_ids=padding.position_ids,
            use_cache=False,
            logits_to_keep=columns.tolist(),  # a tensor might lie on another device than the last layer
        )
        logits: torch.Tensor = output.logits[padding.rows[positions], column]
        return logits.float()


def _from_pretrained(directory: Path, **options: Any) -> Any:
    """Raises InvalidRequest where there is no such model, or it can't be had so."""
    try:
        return AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, **options)
    except (OSError, ValueError, ImportError) as error:
        raise InvalidRequest.of("model", "a causal language model", error) from error


def pick_dtype(name: DTypeName, device: torch.device) -> torch.dtype:
    """auto: fp32 on a CPU; on a GPU bf16, or fp16 where it can't do that."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _counts(predictions: Predictions) -> torch.Tensor:
    return torch.tensor(predictions.counts, dtype=torch.int32)


def _gradient(
    output: torch.Tensor, values: torch.Tensor, direction: torch.Tensor | None = None
) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(output, values, direction)
    return gradient
