"""SCAFFOLD at a client: its gradient is corrected by what everybody's is, less what its own is.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
algorithm 1. c is the server's control, c_i the client's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fednano.client import private_files
from fednano.client.adapters import NanoAdapters, Tensors
from fednano.client.private_files import under

CONTROL = "control."
_BEFORE, _AFTER = "before.", "after."


class Correction:
    """A round's local steps with c - c_i, and the c_i that they end in.

    That is the mean over the steps of the batches' own gradients, neither corrected nor clipped. For
    plain SGD it is the paper's option II, c_i - c + (x - y_i) / (K eta), as the step that it measures
    is eta times the corrected gradient. A step of AdamW has another length, which says nothing of the
    gradient; the mean does whatever the optimiser.
    """

    def __init__(self, adapters: NanoAdapters, correction: Tensors) -> None:
        """`correction` is c - c_i; a tensor that it lacks is 0."""
        self._trained = {n: p for n, p in adapters.named().items() if p.requires_grad}
        self._correction = {
            name: p.new_tensor(correction[name]) if name in correction else torch.zeros_like(p)
            for name, p in self._trained.items()
        }
        self._sums = {name: torch.zeros_like(p) for name, p in self._trained.items()}
        self._steps = 0

    @torch.no_grad()
    def apply(self) -> None:
        """To the gradients of one step, in place; one that isn't there was 0."""
        self._steps += 1
        for name, parameter in self._trained.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._sums[name] += parameter.grad
            parameter.grad += self._correction[name]

    def mean(self) -> Tensors:
        """The new c_i, by the adapters' tensors."""
        count = max(self._steps, 1)
        return {name: (total / count).cpu().numpy() for name, total in self._sums.items()}


@dataclass(frozen=True)
class _Kept:
    """c_i before and after the training for an update that the coordinator accepted."""

    round: int
    before: Tensors
    after: Tensors


@dataclass
class Controls:
    """A client's c_i by run: its own, that never leave it but for how much they change. In memory
    always; on disk too where there is a directory, so that they outlive the process.

    A client that lost its c_i goes on with 0, as one that joins late does: its next update is
    corrected by c alone, and c keeps what the lost c_i added to it. The round's adapter is a mean of
    trained ones all the same.
    """

    client: str = ""
    directory: Path | None = None  # that exists
    _kept: dict[str, _Kept] = field(default_factory=dict)

    def of(self, run: str, number: int) -> Tensors:
        """c_i as round `number` starts with it, by the adapters' tensors; {} where it is 0.

        An attempt that is repeated starts with what the one before started with: what the client
        sent for that was not merged.
        """
        if run not in self._kept and (found := self._read(run)) is not None:
            self._kept[run] = found
        kept = self._kept.get(run)
        if kept is None or kept.round > number:  # of an earlier run by the same name
            return {}
        return kept.after if kept.round < number else kept.before

    def moved(self, run: str, number: int, gradient: Tensors) -> Tensors:
        """What goes with the update of a round whose training ended in this c_i: by how much it
        changed, as `control.<tensor>`. Nothing for {}, which is any other strategy's."""
        changed = less(gradient, self.of(run, number)) if gradient else {}
        return {CONTROL + name: delta for name, delta in changed.items()}

    def keep(self, run: str, number: int, gradient: Tensors) -> None:
        """That update was accepted."""
        if not gradient:
            return
        self._kept[run] = kept = _Kept(number, self.of(run, number), gradient)
        if self.directory is None:
            return
        tensors = {_BEFORE + name: held for name, held in kept.before.items()}
        tensors |= {_AFTER + name: held for name, held in kept.after.items()}
        private_files.save(self._path(run), tensors, {"round": str(kept.round)})

    def forget(self, run: str) -> None:
        """The run is over."""
        self._kept.pop(run, None)
        if self.directory is not None:
            self._path(run).unlink(missing_ok=True)

    def _path(self, run: str) -> Path:
        assert self.directory is not None
        return self.directory / f"controls.{run}.{self.client}.safetensors"

    def _read(self, run: str) -> _Kept | None:
        """None where there is nothing that can be read."""
        found = private_files.load(self._path(run)) if self.directory is not None else None
        if found is None:
            return None
        tensors, about = found
        return _Kept(int(about["round"]), under(_BEFORE, tensors), under(_AFTER, tensors))


def less(one: Tensors, other: Tensors) -> Tensors:
    """one - other; a tensor that either lacks is 0 there."""
    found = {name: held.copy() for name, held in one.items()}
    for name, held in other.items():
        found[name] = found.get(name, np.zeros_like(held)) - held
    return found
