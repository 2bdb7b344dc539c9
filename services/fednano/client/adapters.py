"""NanoAdapters: one low-rank residual map per modality, in the LLM's embedding space.

a_m(x) = x + s B_m A_m x with A [r, d], B [d, r] (FedNano, arXiv 2506.14824, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from fednano.models.language_model import LowRank, Modality
from fednano.wire.errors import InvalidRequest

Tensors = dict[str, NDArray[np.float32]]
MODALITIES = {"image": Modality.IMAGE, "text": Modality.TEXT}


class NanoAdapter(nn.Module):
    """x + s B A x for the tokens of one modality."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.down = nn.Parameter(down)  # A [rank, hidden]
        self.up = nn.Parameter(up)  # B [hidden, rank]
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The change only, s B A x: [tokens, hidden] to the same shape."""
        return self.scale * (x @ self.down.T) @ self.up.T

    def low_rank(self) -> LowRank:
        """A frozen view, to be sent along with Generate."""
        return LowRank(self.down.detach(), self.up.detach(), self.scale)


class _Beside(nn.Module):
    """Frozen rows of A, or columns of B, and those that are trained after them."""

    frozen: torch.Tensor

    def __init__(self, frozen: torch.Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("frozen", frozen)
        self._axis = axis

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.frozen, own], self._axis)


class NanoAdapters(nn.Module):
    """All adapters of a client, and their names in an update: `image.down`, `text.up` ..."""

    def __init__(self, adapters: Mapping[str, NanoAdapter]) -> None:
        super().__init__()
        self.by_name = nn.ModuleDict(adapters)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[np.float32]], scale: float) -> NanoAdapters:
        """From `<modality>.down` [r, d] and `<modality>.up` [d, r].

        Raises InvalidRequest for anything else.
        """
        names = {name.partition(".")[0] for name in tensors}
        wanted = {f"{name}.{part}" for name in names for part in ("down", "up")}
        if not names <= MODALITIES.keys() or wanted != tensors.keys():
            expected = "down and up of image and/or text"
            raise InvalidRequest.of("adapter", expected, ", ".join(sorted(tensors)) or "nothing")
        made = {}
        for name in sorted(names):
            down, up = (torch.tensor(tensors[f"{name}.{part}"]) for part in ("down", "up"))
            if down.ndim != 2 or up.shape != down.T.shape:
                got = f"down {list(down.shape)}, up {list(up.shape)}"
                raise InvalidRequest.of(f"adapter {name}", "down [r, d] and up [d, r]", got)
            made[name] = NanoAdapter(down, up, scale)
        return cls(made)

    def items(self) -> list[tuple[Modality, NanoAdapter]]:
        """In a fixed order."""
        found = []
        for name, module in self.by_name.items():
            assert isinstance(module, NanoAdapter)
            found.append((MODALITIES[name], module))
        return found

    def of(self, modality: Modality) -> NanoAdapter | None:
        return dict(self.items()).get(modality)

    @property
    def hidden_size(self) -> int:
        return int(self.items()[0][1].down.shape[1])

    def freeze_down(self) -> None:
        """From now on only B is trained (FFA-LoRA, Sun et al., ICLR 2024)."""
        for _, adapter in self.items():
            adapter.down.requires_grad_(False)

    def named(self) -> dict[str, nn.Parameter]:
        """Every parameter, by the name that travels."""
        return {
            f"{modality.name.lower()}.{part}": _own(adapter, part)
            for modality, adapter in self.items()
            for part in ("down", "up")
        }

    def put_beside(self, held: Mapping[str, NDArray[np.float32]]) -> None:
        """From now on these are added to what tensors of the same names, frozen, do (FLoRA, Wang et
        al., NeurIPS 2024)."""
        for modality, adapter in self.items():
            for axis, part in enumerate(("down", "up")):
                frozen = torch.tensor(held[f"{modality.name.lower()}.{part}"])
                beside = _Beside(frozen, axis)
                register_parametrization(adapter, part, beside, unsafe=True)  # of another shape

    def to_tensors(self) -> Tensors:
        """A copy of every parameter, fp32, by the names that travel."""
        return {name: p.detach().cpu().numpy().copy() for name, p in self.named().items()}


def _own(adapter: NanoAdapter, part: str) -> nn.Parameter:
    """What is trained of it: all, or `parametrizations.<part>.original` beside what is frozen."""
    return next(p for name, p in adapter.named_parameters() if part in name.split("."))
