"""One way each to compute the same attention; all have the signature of `reference.attend`."""

from collections.abc import Callable

from torch import Tensor

from dymu.unmerging.backends import reference, sdpa

Backend = Callable[..., Tensor]

BACKENDS: dict[str, Backend] = {"reference": reference.attend, "sdpa": sdpa.attend}


def choose(name: str) -> str:
    """The backend for `name`. `auto` is `sdpa`: the one other than the reference so far.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name == "auto":
        return "sdpa"
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose auto, {' or '.join(BACKENDS)}")
    return name
