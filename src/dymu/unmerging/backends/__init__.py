"""Ways to compute the same attention, all with the signature of `reference.attend`."""

import functools
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dymu.unmerging.backends import reference, sdpa
from dymu.unmerging.step import Step

Backend = Callable[..., Tensor]


def _triton(*args: Any, **kwargs: Any) -> Tensor:
    """Imports Triton, which takes a while, when it first computes."""
    from dymu.unmerging.backends import triton

    return triton.attend(*args, **kwargs)


LARGEST = 256
"""Channels of a head, beyond which our kernels were not tried."""
MANY = 4096
"""Virtual queries from which on, where merged tokens ask for all of theirs, torch's kernel on expanded tensors was the
faster on a GPU (docs/triton.md)."""


def faster_on_gpu(step: Step) -> str:
    """The backend that measured faster for a step in half precision on an NVIDIA GPU."""
    tokens, merged = step.queries.tokens, step.queries.width
    return "triton" if step.turned and not merged < tokens >= MANY else "sdpa"


@functools.cache
def _builds_kernels(device: torch.device) -> bool:
    """Whether Triton can be expected to work for a device: Ampere or later, and a C compiler for its launchers."""
    if "triton" not in BACKENDS or device.type != "cuda" or torch.version.cuda is None:
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _auto(query: Tensor, key: Tensor, value: Tensor, step: Step, *args: Any, **kwargs: Any) -> Tensor:
    """`triton` where it was measured to be faster, and `sdpa`; also where what counts operations would not see ours."""
    backend = "sdpa"
    if (
        query.dtype.itemsize == 2
        and query.shape[-1] <= LARGEST
        and _builds_kernels(query.device)
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))
    ):
        backend = faster_on_gpu(step)
    return BACKENDS[backend](query, key, value, step, *args, **kwargs)


BACKENDS: dict[str, Backend] = {"reference": reference.attend, "sdpa": sdpa.attend, "auto": _auto}
if find_spec("triton"):
    BACKENDS["triton"] = _triton
IN_FLOAT64 = ("reference", "sdpa", "auto")
"""Backends that compute in float64 too; others in float32 and less."""


def check_backend(name: str) -> str:
    """The name of a backend.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose {' or '.join(BACKENDS)}")
    return name
