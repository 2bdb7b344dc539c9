"""One example, whatever it was read from: a question about images, and the answer.

The built-in tasks and the JSONL reader all end in this type, so that the trainer knows one.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Example:
    """A question about images (none, one or several) and the answer that is wanted."""

    id: str
    images: tuple[Image.Image, ...]
    question: str
    answer: str
    kind: str = ""  # of question, for accuracies apart
    candidates: tuple[str, ...] = ()
    """Where there are any, the example is scored by which of them the model finds likeliest."""
