"""`fednano account`: what a model costs its clients, from its configuration alone.

Models are built on the meta device, where tensors have shapes and no memory.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from fednano.models.account_options import Fisher, LoraTargets, Plan, WireDType
from fednano.models.account_traffic import Epoch, Shapes, Step, Traffic, exchange
from fednano.models.language_model import Modality, Segment
from fednano.models.llava import LlavaFront
from fednano.models.split import FAMILIES
from fednano.wire.errors import InvalidRequest
from fednano.wire.tensor_pb2 import BF16, FP16, FP32, INT8, DType

_HERE = Path(__file__).parent
_CONFIGS = _HERE / "configs"
_FP32_BYTES = 4
_NOT_COUNTED = ".post_layernorm."
"""CLIP's last norm: FedNano's count of encoder parameters leaves it out (arXiv 2506.14824)."""


_TARGETS: dict[LoraTargets, Any] = {
    LoraTargets.QUERY_VALUE: ["q_proj", "v_proj"],
    LoraTargets.ALL_LINEAR: "all-linear",
}
_DTYPES: dict[WireDType, DType] = {
    WireDType.FP32: FP32,
    WireDType.FP16: FP16,
    WireDType.BF16: BF16,
    WireDType.INT8: INT8,
}


@dataclass(frozen=True)
class Size:
    parameters: int
    bytes: int

    @classmethod
    def of(cls, tensors: list[torch.Tensor]) -> Size:
        sizes = [(t.numel(), t.numel() * t.element_size()) for t in tensors]
        return cls(sum(n for n, _ in sizes), sum(b for _, b in sizes))


@dataclass(frozen=True)
class Sizes:
    """A model's two halves, as `fednano split` cuts them."""

    name: str
    family: str
    hidden_size: int
    dtype: str
    tokens_per_image: int
    whole: Size
    edge: Size
    edge_parts: dict[str, Size]
    embedding_table: Size  # in the LLM half; in the edge half too where it is split with it
    embedding_row_bytes: (
        int  # on the wire, for each distinct text token that a client asks for, once
    )
    llm: Size


@dataclass(frozen=True)
class Exchanged:
    """What is trained and exchanged every round. Traffic is one client's in one round."""

    trained: Size
    share: float  # of the whole model's parameters
    client_bytes: int  # frozen weights that a client holds
    traffic: Traffic


@dataclass(frozen=True)
class Wire:
    """One client's traffic; a round includes the adapters."""

    once: Traffic  # per run, with the first epoch
    step: Traffic
    epoch: Traffic
    round: Traffic


@dataclass(frozen=True)
class Paper:
    """As FedNano counts: without the connector, the encoder's last norm, the embedding table, and
    without activations."""

    encoder_parameters: int
    client_parameters: int
    client_share: float
    upload_parameters: int
    upload_share: float


@dataclass(frozen=True)
class Account:
    sizes: Sizes
    plan: Plan
    adapters: Exchanged
    dense: Wire
    factored: Wire
    pays_after_epochs: float | None  # the factored wire's uploads; None: never
    lora: Exchanged
    paper: Paper


def built_in() -> dict[str, Path]:
    """Names whose configuration ships with the project."""
    found = {path.parent.name: path.parent for path in sorted(_CONFIGS.glob("*/config.json"))}
    return {"tiny-llava": _HERE / "tiny_llava", **found}


class MetaModel:
    """A model that has shapes and no weights, and its halves."""

    def __init__(self, model: str) -> None:
        """`model` is a checkpoint's directory, a built-in name or a hub id.

        Raises InvalidRequest where it is none of them, or of a family that is not known.
        """
        self.name = model
        self.config = _config(model)
        self.family = FAMILIES[self.config.model_type]
        dtype = self.config.dtype or torch.float32
        with torch.device("meta"):
            self.whole: PreTrainedModel = AutoModelForImageTextToText.from_config(
                self.config, dtype=dtype
            )
        self.edge: dict[str, torch.Tensor] = self.family.edge_weights(self.whole)
        self.llm = self.family.causal_lm(self.whole)
        self.llm.tie_weights()

    def sizes(self) -> Sizes:
        table: Any = self.whole.get_input_embeddings()
        return Sizes(
            name=self.name,
            family=self.config.model_type,
            hidden_size=self.config.get_text_config().hidden_size,
            dtype=str(self.whole.dtype).removeprefix("torch."),
            tokens_per_image=self._tokens_per_image(),
            whole=Size.of(list(self.whole.parameters())),
            edge=Size.of(list(self.edge.values())),
            edge_parts={part: Size.of(self._part(part)) for part in self.family.EDGE_PARTS},
            embedding_table=Size.of([table.weight]),
            embedding_row_bytes=table.weight.shape[1] * _FP32_BYTES,
            llm=Size.of(list(self.llm.parameters())),
        )

    def encoder_parameters(self) -> int:
        """As FedNano counts them."""
        return Size.of(self._part(self.family.EDGE_PARTS[0], _NOT_COUNTED)).parameters

    def _part(self, part: str, but: str = "\0") -> list[torch.Tensor]:
        return [t for n, t in self.edge.items() if n.startswith(f"{part}.") and but not in n]

    def _tokens_per_image(self) -> int:
        """What the client's half makes of one image."""
        vision = self.config.vision_config
        with torch.device("meta"):
            front = LlavaFront(self.config).to(self.whole.dtype)
            image = torch.empty(1, vision.num_channels, vision.image_size, vision.image_size)
            return len(front.encode(image)[0])

    def lora(self, rank: int, targets: LoraTargets) -> Shapes:
        """The tensors that PEFT trains and saves where it is put on the LLM half."""
        config = LoraConfig(r=rank, target_modules=_TARGETS[targets], task_type="CAUSAL_LM")
        with warnings.catch_warnings(), torch.device("meta"):
            # PEFT asks transformers by a name that is on its way out.
            warnings.filterwarnings("ignore", category=FutureWarning)
            peft = get_peft_model(self.llm, config, low_cpu_mem_usage=True)
        saved = get_peft_model_state_dict(peft, save_embedding_layers=False)
        peft.unload()
        return {name: tuple(tensor.shape) for name, tensor in saved.items()}


def _config(model: str) -> Any:
    disable_progress_bar()
    place = Path(model) if Path(model).is_dir() else built_in().get(model, model)
    try:
        # Never the code of a repository: a configuration is all that is wanted.
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InvalidRequest(
            f"{model!r} has no configuration to be read. Expected a checkpoint's directory,"
            f" a built-in name ({', '.join(built_in())}), or the id of a model on the Hugging Face"
            f" hub that can be reached or is in the local cache: {reason}"
        ) from None
    if config.model_type not in FAMILIES:
        wanted = f"one of {', '.join(FAMILIES)}"
        raise InvalidRequest.of(f"{model}: model_type", wanted, config.model_type)
    return config


def account(model: MetaModel, plan: Plan) -> Account:
    """Everything of one client; rounds and clients multiply."""
    sizes = model.sizes()
    if plan.image_tokens is None:
        plan = replace(plan, image_tokens=sizes.tokens_per_image)
    shapes = _adapter_shapes(plan, sizes.hidden_size)
    adapters = _exchanged(shapes, plan, sizes, sizes.edge.bytes)
    dense, factored = _wires(plan, sizes.hidden_size, adapters.traffic)
    lora = _exchanged(model.lora(plan.lora_rank, plan.lora_targets), plan, sizes, sizes.whole.bytes)
    paper = _paper(model.encoder_parameters(), adapters.trained.parameters, sizes.whole.parameters)
    saved = dense.epoch.total - factored.epoch.total
    pays = factored.once.total / saved if saved > 0 else None
    return Account(sizes, plan, adapters, dense, factored, pays, lora, paper)


def _paper(encoder: int, uploaded: int, whole: int) -> Paper:
    held = encoder + uploaded
    return Paper(encoder, held, held / whole, uploaded, uploaded / whole)


def _adapter_shapes(plan: Plan, hidden: int) -> Shapes:
    down, up = (plan.rank, hidden), (hidden, plan.rank)
    parts = {"down": down, "up": up}
    return {f"{m}.{part}": shape for m in plan.modalities for part, shape in parts.items()}


def _exchanged(shapes: Shapes, plan: Plan, sizes: Sizes, client_bytes: int) -> Exchanged:
    parameters = sum(rows * columns for rows, columns in shapes.values())
    return Exchanged(
        trained=Size(parameters, parameters * _FP32_BYTES),
        share=parameters / sizes.whole.parameters,
        client_bytes=client_bytes,
        traffic=exchange(shapes, plan.fisher is not Fisher.NONE),
    )


def _segments(text: int, image: int) -> tuple[Segment, ...]:
    """Of one sample: the text's first token, the image, the rest of the text."""
    if not image:
        return (Segment(Modality.TEXT, 0, text),)
    return (
        Segment(Modality.TEXT, 0, 1),
        Segment(Modality.IMAGE, 1, image),
        Segment(Modality.TEXT, 1 + image, text - 1),
    )


def _wires(plan: Plan, hidden: int, adapters: Traffic) -> tuple[Wire, Wire]:
    step = Step(
        samples=plan.batch_size,
        segments=_segments(plan.prompt_tokens + plan.answer_tokens, plan.image_tokens or 0),
        hidden=hidden,
        rank=plan.rank,
        modalities=frozenset(Modality[m.name] for m in plan.modalities),
        dtype=_DTYPES[plan.wire_dtype],
    )
    epoch = Epoch.of(step, plan.samples)
    passes = plan.epochs + (plan.fisher is Fisher.EXTRA_PASS)
    asking = 0 if plan.fisher is Fisher.NONE else 1  # the last pass asks for the Fisher too
    factored = epoch.factored() * (passes - asking) + epoch.factored(want_fisher=True) * asking
    return (
        Wire(Traffic(), step.dense(), epoch.dense(), epoch.dense() * passes + adapters),
        Wire(epoch.first(), step.factored(), epoch.factored(), factored + adapters),
    )
