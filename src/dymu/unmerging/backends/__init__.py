"""Ways to compute the same attention, all with the signature of `reference.attend`."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from dymu.unmerging.backends import reference, sdpa

Backend = Callable[..., Tensor]


def _triton(*args: Any, **kwargs: Any) -> Tensor:
    """Imports Triton, which takes a while, when it first computes."""
    from dymu.unmerging.backends import triton

    return triton.attend(*args, **kwargs)


BACKENDS: dict[str, Backend] = {"reference": reference.attend, "sdpa": sdpa.attend}
if find_spec("triton"):
    BACKENDS["triton"] = _triton
IN_FLOAT64 = ("reference", "sdpa")
"""Backends that compute in float64 too; others in float32 and less."""


def choose(name: str) -> str:
    """The backend for `name`. `auto` is `sdpa`: `triton` has yet to be measured on a GPU.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name == "auto":
        return "sdpa"
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose auto, {' or '.join(BACKENDS)}")
    return name
