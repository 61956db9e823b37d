"""The language-model half of DyMU: attention behaves as if no token had been merged (paper section 3.2)."""

from dymu.unmerging.attention import NAME
from dymu.unmerging.backends import BACKENDS, choose
from dymu.unmerging.cache import CACHE_FORMS, CacheForm, History, adopt, cache_bytes
from dymu.unmerging.prompt import (
    Features,
    carried_leaders,
    carry_leaders,
    in_mean_order,
    leaders_within,
    place_leaders,
    prompt_map,
)
from dymu.unmerging.rotary import no_rotation
from dymu.unmerging.step import COMPACT, UNMERGE, Step, Unmerge, plan_step

__all__ = [
    "BACKENDS",
    "CACHE_FORMS",
    "COMPACT",
    "NAME",
    "UNMERGE",
    "CacheForm",
    "Features",
    "History",
    "Step",
    "Unmerge",
    "adopt",
    "cache_bytes",
    "carried_leaders",
    "carry_leaders",
    "choose",
    "in_mean_order",
    "leaders_within",
    "no_rotation",
    "place_leaders",
    "plan_step",
    "prompt_map",
]
