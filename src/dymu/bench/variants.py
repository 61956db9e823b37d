"""The ways to run one model on one prompt that are compared."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import msgspec

from dymu.choices import Unmerge

if TYPE_CHECKING:
    from dymu.handle import Handle


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way.

    Attributes:
        name: in files and tables.
        backend: of DyMU's attention; empty: DyMU is not applied, and the model attends as usual (SDPA).
        cache: the form of DyMU's KV cache. (Files of dymu 0.1.0 also hold `expanded`: a rotated entry for every token.)
        floor: the prompt has as many text tokens as merged tokens remain, and no image.
    """

    name: str
    backend: str = ""
    cache: str = "merged"
    floor: bool = False
    unmerge: Unmerge = "exact"

    def on(self, model: Any, merging: dict[str, Any]) -> AbstractContextManager[Handle | None]:
        """Apply this variant to the model while the context lasts; the handle is None where DyMU is not applied.

        Args:
            merging: arguments of `dymu.apply` that say what merges.
        """
        from dymu.handle import applied

        options = {**merging, "backend": self.backend, "unmerge": self.unmerge, "cache": self.cache}
        return applied(model, options if self.backend else None)


UNTOUCHED = Variant("untouched")
FLOOR = Variant("untouched, fed M tokens", floor=True)


def timed_backends() -> list[str]:
    """Names of the backends that can be timed: all but the reference, which they are compared with.

    By hand, so that the command line can refuse others before torch is imported.
    """
    return ["auto", "sdpa", *(["triton"] if find_spec("triton") else [])]


def variants(backends: Iterable[str]) -> list[Variant]:
    """The untouched model, DyMU by each backend, exact and as quick as it can be, and the floor; each once.

    Raises:
        ValueError: an unknown backend, or the reference, which the others are compared with.
    """
    from dymu.unmerging import BACKENDS

    for backend in backends:
        if backend == "reference" or backend not in BACKENDS:
            raise ValueError(f"cannot time the backend {backend!r}; choose some of {', '.join(timed_backends())}")
    dymu = [variant for backend in dict.fromkeys(backends) for variant in (exact(backend), quick(backend))]
    return [UNTOUCHED, *dymu, FLOOR]


def exact(backend: str) -> Variant:
    """DyMU as it is by default."""
    return Variant(f"dymu ({backend})", backend)


def quick(backend: str) -> Variant:
    """DyMU with one query of each group, and a cache that also holds turned keys."""
    return Variant(f"dymu ({backend}), representative, fast cache", backend, "fast", unmerge="representative")
