"""What a task is: examples with reference answers, and a rule that scores what a model answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class Example:
    """One question about one or several images.

    Attributes:
        images: RGB, in the order in which the question shows them.
        question: as the model is to read it, instructions on the form of the answer included.
        references: answers that count as right; more than one where people disagree.
        kind: what is asked for (`counting`, `colour`, ...); accuracy is told apart by it.
        measures: what is known of how complex the image is (`objects`, `words`, ...).
    """

    images: tuple[Image.Image, ...]
    question: str
    references: tuple[str, ...]
    kind: str
    measures: Mapping[str, float] = field(default_factory=dict)


class Task(Protocol):
    """Examples in an order whose every beginning is balanced over the kinds, so that fewer of them are a fair sample.

    Attributes:
        name: short, as in `--task NAME`.
        max_new_tokens: the longest answer worth waiting for.
        yes_no: kinds whose answers are yes or no; F1 of "yes" is told for them as well.
    """

    name: str
    max_new_tokens: int
    yes_no: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """The same example for the same index, on every machine."""
        ...

    def score(self, example: Example, answer: str) -> float:
        """From 0 (wrong) to 1 (right)."""
        ...

    def describe(self) -> dict[str, object]:
        """What must be equal for two runs to have asked the same: seed, files, version."""
        ...
