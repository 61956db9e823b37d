"""What is compared: ways to run one model on one prompt. Data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dymu.apply import Handle, apply
from dymu.unmerging import BACKENDS
from dymu.unmerging.cache import CacheForm


@dataclass(frozen=True)
class Variant:
    """One way.

    Attributes:
        name: in files and tables.
        backend: of DyMU's attention; empty: DyMU is not applied, and the attention is the model's own (SDPA).
        cache: what DyMU's KV cache stores.
        floor: the language model is given as many text tokens as merged tokens remain, and no image.
    """

    name: str
    backend: str = ""
    cache: CacheForm = "merged"
    floor: bool = False

    @contextmanager
    def on(self, model: Any, merging: dict[str, Any]) -> Iterator[Handle | None]:
        """The model run this way, for a moment.

        Args:
            merging: what `dymu.apply` is to merge by.
        """
        if not self.backend:
            yield None
            return
        with apply(model, **merging, backend=self.backend, cache=self.cache) as handle:
            yield handle


UNTOUCHED = Variant("untouched")
FLOOR = Variant("untouched, fed M tokens", floor=True)
AUTHORS = Variant("authors' way (sdpa, expanded cache)", "sdpa", "expanded")
"""Queries, keys and values are expanded, and the KV cache stores keys and values so: one entry per original token."""


def timed_backends() -> list[str]:
    """Those that can be timed: all but the reference, which they are held against."""
    return ["auto", *(name for name in BACKENDS if name != "reference")]


def variants(backends: Iterable[str]) -> list[Variant]:
    """The untouched model, DyMU by each backend, the authors' way, and the floor; each once.

    Raises:
        ValueError: an unknown backend, or the reference, which is what the others are held against.
    """
    timed = timed_backends()
    for backend in backends:
        if backend not in timed:
            raise ValueError(f"cannot time the backend {backend!r}; choose some of {', '.join(timed)}")
    dymu = [Variant(f"dymu ({backend})", backend) for backend in dict.fromkeys(backends)]
    return [UNTOUCHED, *dymu, AUTHORS, FLOOR]
