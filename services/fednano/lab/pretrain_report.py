"""What a pre-trained model can do, and the model card that says so.

The model is read back as anybody reads it, through the Auto classes, and has to generate its
answers: a figure is the share of answers that are right word for word.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from fednano.client.digits import Split, examples_of, load_split
from fednano.lab.renders import HELD_OUT_FONTS, TRAIN_FONTS, Picture, all_questions, render

Asked = tuple[str, Image.Image, str, str]  # kind, image, question, answer
FIGURES = "figures.json"
_FRESH_SEED = 777_000_001  # of the pictures that are asked about; no corpus uses it
_BATCH = 250


def load(directory: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model in fp32 and processor."""
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(directory)


def measure(directory: Path, images: int, seed: int) -> dict[str, float]:
    """Accuracy by set and kind of question: fonts never seen, then real handwriting, untuned."""
    model, processor = load(directory)
    figures: dict[str, float] = {}
    for name, asked in (("held-out fonts", prints(images, seed)), ("scenes", scenes(images, seed))):
        right = accuracy(model, processor, asked)
        figures |= {f"{name}/{kind}": share for kind, share in right.items()}
    splits: tuple[Split, ...] = ("validation", "test")
    for split in splits:
        right = accuracy(model, processor, handwriting(split, images))
        figures |= {f"handwriting {split}/{kind}": share for kind, share in right.items()}
        figures[f"handwriting {split}/mean"] = float(np.mean(list(right.values())))
    return figures


def prints(images: int, seed: int) -> list[Asked]:
    """Every question that fits, about digits in the fonts that training never saw."""
    return _asked(render(images, _FRESH_SEED + seed, HELD_OUT_FONTS, scenes=0.0), seed)


def scenes(images: int, seed: int) -> list[Asked]:
    """Every question that fits, about fresh pictures of one or two shapes."""
    return _asked(render(images, _FRESH_SEED + seed, scenes=1.0), seed)


def _asked(pictures: Iterable[Picture], seed: int) -> list[Asked]:
    rng = np.random.default_rng([_FRESH_SEED, seed])
    return [
        (kind, Image.fromarray(picture.pixels), question, answer)
        for picture in pictures
        for kind, (question, answer) in all_questions(picture, rng).items()
    ]


def handwriting(split: Split, images: int) -> list[Asked]:
    """The federation's questions about a split of the handwritten digits, or its first ones."""
    return [
        (example.id.rsplit("-", 1)[1], example.images[0], example.question, example.answer)
        for digit in load_split(split)[:images]
        for example in examples_of(digit)
    ]


def accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, asked: Sequence[Asked]
) -> dict[str, float]:
    """Share of exact answers by kind of question."""
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(asked), _BATCH):
        batch = asked[start : start + _BATCH]
        given = answers(model, processor, [(image, question) for _, image, question, _ in batch])
        for (kind, _, _, wanted), got in zip(batch, given, strict=True):
            right[kind].append(got == wanted)
    return {kind: float(np.mean(hits)) for kind, hits in right.items()}


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    asked: Iterable[tuple[Image.Image, str]],
) -> list[str]:
    """Greedy answers to one question about each image."""
    images, prompts = [], []
    for image, question in asked:
        prompts.append(prompt(processor, question))
        images.append(image)
    fed = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    out = cast(Any, model).generate(**fed, do_sample=False, max_new_tokens=16)
    new = out[:, fed["input_ids"].shape[1] :]
    return [str(text) for text in processor.batch_decode(new, skip_special_tokens=True)]


def prompt(processor: LlavaProcessor, question: str) -> str:
    """One turn of the user: an image, then the question."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    turn: list[dict[str, Any]] = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(turn, add_generation_prompt=True))


def write_card(
    directory: Path,
    settings: dict[str, int | float],
    figures: dict[str, float],
    minutes: float,
    hardware: str,
) -> None:
    """README.md and figures.json beside the weights."""
    written = {"settings": settings, "minutes": round(minutes, 1), "figures": figures}
    (directory / FIGURES).write_text(json.dumps(written, indent=2) + "\n")
    rows = "\n".join(
        f"| {set_} | {kind} | {100 * share:.1f} % |"
        for (set_, kind), share in ((name.split("/"), share) for name, share in figures.items())
    )
    command = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in settings.items())
    card = _CARD.format(
        rows=rows,
        command=command,
        minutes=minutes,
        hardware=hardware,
        fonts=", ".join(TRAIN_FONTS),
        held_out=", ".join(HELD_OUT_FONTS),
        eval_images=settings["eval_images"],
    )
    (directory / "README.md").write_text(card)


_CARD = """\
---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---
# tiny_llava

A LLaVA of 1.6 million parameters, made so that FedNano can be tried, tested and measured where
nothing can be downloaded. It reads printed digits and simple coloured shapes on 32 x 32 pixels and
answers short English questions about them. It knows nothing else.

It is a stock `LlavaForConditionalGeneration`: CLIP vision tower (32 px, patches of 8 px, width 128,
4 layers, 16 image tokens), two-layer projector, Llama (width 128, 4 layers, feed-forward 384, tied
embeddings). The tokenizer knows about a hundred words; any other word is `<unk>`.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(DIRECTORY, dtype="float32")
processor = AutoProcessor.from_pretrained(DIRECTORY)
```

## How it was made
```
python -m fednano.lab.pretrain --out DIRECTORY {command}
```
It took {minutes:.0f} minutes on {hardware}, rendering included.
First the vision tower and the projector learn to name what is on a render (heads thrown away),
then the whole model learns to answer, in the end with more scenes.

Data: renders made by the script itself, bent, coarsened, coloured and made noisy; 80 % digits, 8 %
one shape, 12 % two shapes (55, 18 and 27 % in the end).
Fonts in training: {fonts}.
Held out: {held_out}.

No handwriting was trained on. While the recipe was developed, its steps and its mix were decided
with the validation split of the handwriting and with *other* renders in the held-out fonts in view,
so the figures on held-out fonts are of fonts never trained on, but not of fonts never looked at.
The test split of the handwriting decided nothing.

## What it can do
Greedy answers that are right word for word. Held-out fonts: every fitting question about
{eval_images} fresh digits in them, distorted as in training. Scenes: {eval_images} fresh
pictures of shapes.
Handwriting: scikit-learn's digits (UCI, CC BY 4.0), before any tuning.

| set | question | right |
| --- | --- | --- |
{rows}

Questions in training: "What digit is this?" (name), "Write the digit as a numeral." (numeral),
"Is the digit even?" (parity), "Is the digit greater than four?" (greater), "What colour is it?",
"Is there a circle?" (presence), "What shape is this?", "Describe the picture." (caption: "the digit
seven in red", "a red circle and a blue square"), and a few rewordings.

## Limits
A toy by intent: no result on it says how a large model behaves. Colours are the six it was shown,
a picture with several digits is beyond it, and it answers questions it does not understand anyway.
"""
