"""The language-model half of DyMU: attention behaves as if no token had been merged (paper section 3.2). Torch only."""

from dymu.unmerging.backends import BACKENDS, check_backend
from dymu.unmerging.history import History
from dymu.unmerging.packed import Packed
from dymu.unmerging.prompt import NewTokens, leaders_within, place_leaders
from dymu.unmerging.step import Step, plan_step

__all__ = [
    "BACKENDS",
    "History",
    "NewTokens",
    "Packed",
    "Step",
    "check_backend",
    "leaders_within",
    "place_leaders",
    "plan_step",
]
