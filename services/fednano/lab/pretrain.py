"""Make the embedded model: `python -m fednano.lab.pretrain --out DIR --seed 0`.

Three stages. First the vision tower and the projector learn to tell what is on a picture, with
linear heads on the *flattened* projected tokens (a mean-pooled head does not learn, and without
this stage the second stays at chance). Then the whole model learns to answer questions: three
about a picture, packed behind one image prefix, each with positions of its own and blind to the
others. A short third stage shows it more scenes.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from fednano.lab import pretrain_report, tiny_llava
from fednano.lab.renders import COLOURS, NOUNS, TRAIN_FONTS, Picture, ask, render

log = logging.getLogger(__name__)

IGNORED = -100  # a label without a loss
QUESTIONS = 3  # a picture and step of the second stage
_CHUNK = 500  # pictures that one seed makes


@dataclass(frozen=True)
class Settings:
    """One pre-training run; chosen on training fonts and validation handwriting."""

    seed: int = 0
    images: int = 40_000
    steps_1: int = 1_500
    steps_2: int = 2_400
    steps_3: int = 400
    batch_1: int = 96
    batch_2: int = 48
    lr_1: float = 1.5e-3
    lr_2: float = 1.2e-3
    lr_3: float = 6e-4
    eval_images: int = 1_000


@dataclass(frozen=True)
class Corpus:
    """Pictures, and their pixels as one array [n, 3, side, side]."""

    pictures: tuple[Picture, ...]
    pixels: Tensor

    def batch(self, rng: np.random.Generator, count: int) -> tuple[list[Picture], Tensor]:
        chosen = rng.integers(len(self.pictures), size=count)
        return [self.pictures[i] for i in chosen], normalised(self.pixels[torch.from_numpy(chosen)])


@dataclass(frozen=True)
class Packed:
    """Questions and answers behind the image prefix; `tokens` counts the prefix."""

    ids: Tensor  # [batch, tokens - prefix]
    positions: Tensor  # [batch, tokens]
    mask: Tensor  # [batch, 1, tokens, tokens], added to the attention's scores
    labels: Tensor  # [batch, tokens], already shifted: what the token at this place predicts


def normalised(pixels: Tensor) -> Tensor:
    """uint8 to what the image processor gives, -1..1."""
    return pixels.float() / 127.5 - 1


def render_corpus(count: int, seed: int, workers: int, scenes: float = 0.2) -> Corpus:
    """`count` training renders; the result does not depend on the number of workers."""
    sizes = [min(_CHUNK, count - start) for start in range(0, count, _CHUNK)]
    seeds = [seed * 1_000_000 + i for i in range(len(sizes))]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        made = pool.map(render, sizes, seeds, repeat(TRAIN_FONTS), repeat(scenes))
        pictures = [picture for chunk in made for picture in chunk]
    pixels = np.stack([picture.pixels for picture in pictures]).transpose(0, 3, 1, 2)
    return Corpus(tuple(pictures), torch.from_numpy(np.ascontiguousarray(pixels)))


def image_tokens(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """[n, 3, side, side] to [n, image tokens, width], after the projector."""
    seen = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
    return cast(Tensor, model.model.multi_modal_projector(seen))


class Heads(nn.Module):
    """The first stage's linear heads: noun and colour of the first and of a second thing."""

    def __init__(self) -> None:
        super().__init__()
        width = tiny_llava.IMAGE_TOKENS * tiny_llava.WIDTH
        sizes = (len(NOUNS), len(COLOURS), len(NOUNS), len(COLOURS))
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """`labels` [n, 4], ignored where there is no second thing."""
        flat = tokens.flatten(1)
        losses = [
            cross_entropy(head(flat), labels[:, i], ignore_index=IGNORED, reduction="sum")
            for i, head in enumerate(self.heads)
        ]
        return torch.stack(losses) @ flat.new_tensor((1.0, 0.3, 1.0, 0.3)) / len(labels)


def things_seen(pictures: Sequence[Picture]) -> Tensor:
    """[n, 4]: noun, colour, second noun, second colour."""
    colours = list(COLOURS)
    labels = torch.full((len(pictures), 4), IGNORED)
    for row, picture in zip(labels, pictures, strict=True):
        for slot, thing in enumerate(picture.things):
            row[2 * slot] = NOUNS.index(thing.noun)
            row[2 * slot + 1] = colours.index(thing.colour)
    return labels


def pack(asked: Sequence[Sequence[tuple[str, str]]]) -> Packed:
    """Every row's questions and answers one after another, padded to the longest row."""
    prefix = 1 + tiny_llava.IMAGE_TOKENS  # <user> and the picture
    rows = [[_encoded(question, answer) for question, answer in row] for row in asked]
    longest = prefix + max(sum(len(ids) for ids, _ in row) for row in rows)
    ids = np.full((len(rows), longest), tiny_llava.PAD)
    labels = np.full((len(rows), longest), IGNORED)
    positions = np.tile(np.arange(longest), (len(rows), 1))
    segment = np.zeros((len(rows), longest), dtype=np.int64)  # 0 is the prefix
    for r, row in enumerate(rows):
        start = prefix
        for s, (tokens, first) in enumerate(row):
            stop = start + len(tokens)
            ids[r, start:stop] = tokens
            labels[r, start + first - 1 : stop - 1] = tokens[first:]
            positions[r, start:stop] = prefix + np.arange(len(tokens))
            segment[r, start:stop] = s + 1
            start = stop
    return Packed(
        torch.from_numpy(ids[:, prefix:]),
        torch.from_numpy(positions),
        _block_mask(segment),
        torch.from_numpy(labels),
    )


def _block_mask(segment: NDArray[np.int64]) -> Tensor:
    """Causal, and a segment sees the prefix (0) and itself. [batch, tokens] to an additive mask."""
    here, there = segment[:, :, None], segment[:, None, :]
    seen = ((here == there) | (there == 0)) & np.tri(segment.shape[1], dtype=bool)
    return torch.where(torch.from_numpy(seen), 0.0, -torch.inf)[:, None]


@cache
def _encoded(question: str, answer: str) -> tuple[tuple[int, ...], int]:
    """Ids of question, <assistant>, answer, </s>; and where the answer begins."""
    encode = _tokenizer().encode
    before = [*encode(question), tiny_llava.ASSISTANT]
    return (*before, *encode(answer), tiny_llava.EOS), len(before)


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return tiny_llava.build_tokenizer()


def answer_loss(model: LlavaForConditionalGeneration, pixels: Tensor, packed: Packed) -> Tensor:
    """Mean loss over the answers' tokens; logits only where there is a label."""
    table = model.model.language_model.embed_tokens
    user = table.weight[tiny_llava.USER].expand(len(pixels), 1, -1)
    hidden = torch.cat([user, image_tokens(model, pixels), table(packed.ids)], dim=1)
    out = model.model.language_model(
        inputs_embeds=hidden, attention_mask=packed.mask, position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state  # fmt: skip
    answered = packed.labels != IGNORED
    return cross_entropy(model.lm_head(out[answered]), packed.labels[answered])


def optimizer_of(
    modules: Sequence[nn.Module], lr: float, decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    params = {id(p): p for module in modules for p in module.parameters()}.values()
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


def scheduled(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine to 2 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass(frozen=True)
class Stage:
    """What the two stages share: steps, progress and one optimiser step."""

    progress: Progress
    task: TaskID
    steps: int
    warmup: int
    optimizer: torch.optim.AdamW
    peak: float

    def step(self, number: int, loss: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * scheduled(number, self.steps, self.warmup)
        self.optimizer.zero_grad()
        loss.backward()
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(params, 1.0)
        self.optimizer.step()
        self.progress.advance(self.task)
        if number % 50 == 0:
            self.progress.update(self.task, loss=f"{loss.item():.3f}")
            log.info("step %d of %d: loss %.4f", number, self.steps, loss.item())


def see(
    model: LlavaForConditionalGeneration, corpus: Corpus, settings: Settings, progress: Progress
) -> None:
    """Stage 1: what is on the picture. The heads are thrown away."""
    device = next(model.parameters()).device
    rng = np.random.default_rng([settings.seed, 1])
    heads = Heads().to(device)
    parts = [model.model.vision_tower, model.model.multi_modal_projector, heads]
    optimizer = optimizer_of(parts, settings.lr_1, 0.02, (0.9, 0.999))
    task = progress.add_task("1 seeing", total=settings.steps_1, loss="")
    stage = Stage(progress, task, settings.steps_1, 50, optimizer, settings.lr_1)
    for number in range(settings.steps_1):
        pictures, pixels = corpus.batch(rng, settings.batch_1)
        tokens = image_tokens(model, pixels.to(device))
        stage.step(number, heads.loss(tokens, things_seen(pictures).to(device)))


def answer(
    model: LlavaForConditionalGeneration, corpus: Corpus, settings: Settings, progress: Progress
) -> None:
    """Stage 2: questions about the picture, through the whole model."""
    task = progress.add_task("2 answering", total=settings.steps_2, loss="")
    optimizer = optimizer_of([model], settings.lr_2, 0.05, (0.9, 0.98))
    stage = Stage(progress, task, settings.steps_2, 100, optimizer, settings.lr_2)
    _answer(model, corpus, settings, stage, np.random.default_rng([settings.seed, 2]))


def answer_scenes(
    model: LlavaForConditionalGeneration, corpus: Corpus, settings: Settings, progress: Progress
) -> None:
    """Stage 3: the same with more scenes, or "Is there a circle?" is always answered with no."""
    task = progress.add_task("3 scenes", total=settings.steps_3, loss="")
    optimizer = optimizer_of([model], settings.lr_3, 0.05, (0.9, 0.98))
    stage = Stage(progress, task, settings.steps_3, 50, optimizer, settings.lr_3)
    _answer(model, corpus, settings, stage, np.random.default_rng([settings.seed, 3]))


def _answer(
    model: LlavaForConditionalGeneration,
    corpus: Corpus,
    settings: Settings,
    stage: Stage,
    rng: np.random.Generator,
) -> None:
    device = next(model.parameters()).device
    for number in range(stage.steps):
        pictures, pixels = corpus.batch(rng, settings.batch_2)
        packed = pack([ask(picture, QUESTIONS, rng) for picture in pictures])
        packed = Packed(*(part.to(device) for part in vars(packed).values()))
        stage.step(number, answer_loss(model, pixels.to(device), packed))


def pretrain(out: Path, settings: Settings, device: str, workers: int) -> dict[str, float]:
    """Train, write the model and its card to `out`; gives the card's figures."""
    torch.manual_seed(settings.seed)
    started = time.monotonic()
    model = tiny_llava.build_model(len(_tokenizer()))
    nn.Module.to(model, device)
    corpus = render_corpus(settings.images, settings.seed, workers)
    with _progress() as progress:
        see(model, corpus, settings, progress)
        answer(model, corpus, settings, progress)
        scenes = render_corpus(settings.images // 4, settings.seed + 500, workers, scenes=0.45)
        answer_scenes(model, scenes, settings, progress)
    minutes = (time.monotonic() - started) / 60
    tiny_llava.save(model.cpu(), out)
    figures = pretrain_report.measure(out, settings.eval_images, settings.seed)
    pretrain_report.write_card(out, asdict(settings), figures, minutes, _hardware(device))
    return figures


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"a CPU ({torch.get_num_threads()} thread(s) of torch)" if device == "cpu" else device


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns) as progress:
        yield progress


def main() -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="for rendering")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its default")
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    device = given.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings(**{name: getattr(given, name) for name in asdict(defaults)})
    console = Console()
    for name, figure in pretrain(given.out, settings, device, given.workers).items():
        console.print(f"{name}: {figure:.3f}")


if __name__ == "__main__":
    main()
