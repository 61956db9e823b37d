"""What every test shares."""

import os

# Before anything imports transformers: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._device
from hypothesis import settings
from torch import Tensor

from dymu.merging import layout

# Before anything imports triton: its kernels run on the CPU here. With 0, as in benchmarks/gpu.sh, on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Models here are tiny: a second thread costs more than it computes.
torch.set_num_threads(1)
# And so are pictures, which come in several buckets all the same.
layout.SHORT = 1

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_POISON = dict.fromkeys(_FLOATS, torch.nan) | {dtype: torch.iinfo(dtype).max for dtype in _INTEGERS}


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Fill what `make` leaves uninitialised, so that no test passes by what happened to lie in memory.

    By NaN, or by the largest integer, which is odd and no index of anything. Only what is made from Python is filled;
    `torch.use_deterministic_algorithms` would fill more, but also run other kernels than users run.
    """

    @functools.wraps(make)
    def filled(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        # Not what torch.compile traces with: Inductor refuses graphs that fill, and plans memory of its own.
        if type(tensor) is Tensor and tensor.dtype in _POISON:
            tensor.detach().fill_(_POISON[tensor.dtype])
        return tensor

    return filled


# `with torch.device("meta")`, under which transformers builds models, looks up the functions that it changes when it is
# first asked; it must find the original ones.
torch.utils._device._device_constructors()
for _name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
    setattr(torch, _name, _poisoned(getattr(torch, _name)))
for _name in ("new_empty", "new_empty_strided"):
    setattr(Tensor, _name, _poisoned(getattr(Tensor, _name)))

settings.register_profile("dymu", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("dymu")


@pytest.fixture(autouse=True)
def _inference() -> None:
    """One seed for each test, and no graph of gradients unless a test asks for it."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
