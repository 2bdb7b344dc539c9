"""One example of visual question answering, whatever it was read from.

The built-in digits and the JSONL reader both end in this type, so that the trainer knows one.
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
