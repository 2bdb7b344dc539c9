"""Strategies that know an adapter to be a product B A: `<modality>.down` is A [r, d] and
`<modality>.up` is B [d, r]. The mean of the factors is not the mean of the products."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fednano.coordinator.records import Tensors
from fednano.coordinator.strategies.means import FedAvg
from fednano.coordinator.strategies.state import State
from fednano.coordinator.strategies.updates import BLOCK, Doubles, Readable, View, blocks
from fednano.wire.low_rank import DOWN, UP


@dataclass(frozen=True)
class FrozenDown:
    """A stays as it was before any training, B is averaged by samples: then the mean of the
    products is the product of the means. Whatever a client sends as its A is not read.

    FFA-LoRA: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024.
    """

    def auxiliary(self, names: Iterable[str]) -> tuple[str, ...]:
        return ()

    def advance(self, before: State, updates: Iterable[Readable], block: int = BLOCK) -> State:
        views = [
            View(update, update.samples, {n: s for n, s in update.shapes.items() if n.endswith(UP)})
            for update in updates
        ]
        return State(before.adapter | FedAvg().aggregate(views, block))


@dataclass(frozen=True)
class ProductMean:
    """The best approximation, at the adapter's rank, of the mean weighted by samples of the
    products B_k A_k: its truncated SVD U S V^T, as B = U S and A = V^T. Clients' ranks may differ.

    FlexLoRA: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks
    and Client Resources", NeurIPS 2024, section 3. The scale s is every client's and outside both
    factors, so it cancels. Each singular vector's sign is chosen so that the largest element of
    its row of A is positive. Where a singular value is 0 the row of A stays what it was: with
    B = 0 and A = 0 neither would ever get a gradient.
    """

    def auxiliary(self, names: Iterable[str]) -> tuple[str, ...]:
        return ()

    def advance(self, before: State, updates: Iterable[Readable], block: int = BLOCK) -> State:
        samples = sum(update.samples for update in updates)
        adapter: Tensors = {}
        for name in sorted(before.adapter):
            if not name.endswith(DOWN):
                continue
            modality, down = name.removesuffix(DOWN), before.adapter[name].copy()
            up = np.zeros(down.T.shape, np.float32)
            products = _Products()
            for update in updates:
                factors = (_whole(update, modality + part, block) for part in (UP, DOWN))
                products.add(update.samples / samples, *factors)
            left, right = products.decomposed(len(down))
            up[:, : len(right)], down[: len(right)] = left, right
            adapter |= {modality + UP: up, name: down}
        return State(adapter)


@dataclass(frozen=True)
class Stack:
    """What clients trained in this round is added to what all earlier rounds made: factors that lie
    side by side, [A, A_1, ..., A_K] and [B, n_1/n B_1, ..., n_K/n B_K], have the product
    B A + sum n_k/n B_k A_k, without a mean of factors and without loss. Clients' ranks may differ.

    FLoRA: Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
    Low-Rank Adaptations", NeurIPS 2024. There clients fold the stack into their copy of the weights.
    Here nobody holds weights that could take it, so the stack itself is the adapter: frozen for
    clients, who start every round with a fresh A and B = 0 beside it. Its rank grows round by round,
    up to d: from then on B is the whole map [d, d] and A is 1, and still nothing is lost. Above
    `most`, where that is less, it is factored again as ProductMean does, without its smallest parts.

    What a round adds is factored by itself before it is stacked, which changes no product: as it came,
    every client could read every other's factors out of the stack.
    """

    most: int = 0
    """Rank; 0: d."""

    def auxiliary(self, names: Iterable[str]) -> tuple[str, ...]:
        return ()

    def advance(self, before: State, updates: Iterable[Readable], block: int = BLOCK) -> State:
        samples = sum(update.samples for update in updates)
        adapter: Tensors = {}
        for name in sorted(before.adapter):
            if not name.endswith(DOWN):
                continue
            modality, down = name.removesuffix(DOWN), before.adapter[name]
            up = before.adapter[modality + UP]
            added, stack = _Products(), _Products()
            for update in updates:
                factors = (_whole(update, modality + part, block) for part in (UP, DOWN))
                added.add(update.samples / samples, *factors)
            stack.add(1.0, up.astype(np.float64), down.astype(np.float64))
            stack.add(1.0, *added.decomposed(len(up)))
            left, right = stack.side_by_side(min(self.most or len(up), len(up)))
            adapter |= {modality + UP: left.astype(np.float32), name: right.astype(np.float32)}
        return State(adapter)


class _Products:
    """A weighted sum of products B A, held as factors [d, q] and [q, d] that lie side by side; no
    [d, d] matrix is made while q is smaller than d."""

    def __init__(self) -> None:
        self._lefts: list[Doubles] = []
        self._rights: list[Doubles] = []

    def add(self, weight: float, left: Doubles, right: Doubles) -> None:
        self._lefts.append(weight * left)
        self._rights.append(right)
        if sum(len(held) for held in self._rights) > 2 * len(left):
            # Any rank above d is redundant: so many clients don't take more memory than a few.
            basis, core, other = self._condensed()
            self._lefts, self._rights = [basis @ core], [other]

    def side_by_side(self, most: int) -> tuple[Doubles, Doubles]:
        """[d, p] and [p, d] as they were added, without what is 0. Where p would be more than `most`
        they are `decomposed`, or their product and 1 if that is d. p is at least 1, as an adapter has
        one row."""
        left, right = np.concatenate(self._lefts, axis=1), np.concatenate(self._rights)
        used: NDArray[np.bool_] = np.asarray(left.any(axis=0))
        used[0] |= not used.any()
        if used.sum() <= most:
            return left[:, used], right[used]
        return self.decomposed(most) if most < len(left) else (left @ right, np.eye(len(left)))

    def _condensed(self) -> tuple[Doubles, Doubles, Doubles]:
        """Q [d, p], core [p, p] and P [p, d] with orthonormal Q and P, p at most d."""
        basis, left = np.linalg.qr(np.concatenate(self._lefts, axis=1))
        other, right = np.linalg.qr(np.concatenate(self._rights).T)
        return basis, left @ right.T, other.T

    def decomposed(self, rank: int) -> tuple[Doubles, Doubles]:
        """U S [d, p] and V^T [p, d], p at most `rank`: as many as the sum has."""
        basis, core, other = self._condensed()
        u, values, v = np.linalg.svd(core)
        noise = values[0] * len(values) * np.finfo(np.float64).eps
        found = min(rank, int((values > noise).sum()))
        left, right = basis @ (u[:, :found] * values[:found]), v[:found] @ other
        largest = np.abs(right).argmax(axis=1)
        signs = np.sign(right[np.arange(found), largest])
        return left * signs, right * signs[:, None]


def _whole(update: Readable, name: str, block: int) -> Doubles:
    """A tensor, read in ranges."""
    shape = update.shapes[name]
    pieces = [update.read(spans)[0] for spans in blocks({name: shape}, block)]
    return np.concatenate(pieces).reshape(shape).astype(np.float64)
