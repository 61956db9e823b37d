"""What differs between the versions of transformers that dymu supports. The one place that knows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from transformers import Cache, cache_utils
from transformers.generation import utils as generation

EMPTY_LAYERS: tuple[type, ...] = tuple(filter(None, (getattr(cache_utils, "DummyLayer", None),)))
"""What stands in a KV cache for layers that take the keys and values of others, where anything does."""

CACHE_NAMES = ("cache", "past_key_values")
"""The KV cache, as an argument and in outputs: from transformers 5.24 on, and before."""


@functools.cache
def cache_argument(forward: Callable[..., Any]) -> str:
    """The name under which a module's `forward` takes its KV cache."""
    parameters = inspect.signature(forward).parameters
    return next(name for name in CACHE_NAMES if name in parameters)


@functools.cache
def cuts_logits(forward: Callable[..., Any]) -> bool:
    """Whether a model's `forward` gives fewer logits where it is asked for the last ones; others ignore that."""
    return "logits_to_keep" in inspect.signature(forward).parameters


def cache_among(arguments: Mapping[str, Any]) -> Cache | None:
    """The KV cache among the arguments of a call; callers may still use the older name."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def pop_cache(arguments: MutableMapping[str, Any]) -> Cache | None:
    """Take the KV cache out of the arguments of a call."""
    cache = cache_among(arguments)
    for name in CACHE_NAMES:
        arguments.pop(name, None)
    return cache


def cache_of(output: Any) -> Any:
    """The KV cache in the output of a model or of `generate`."""
    return next((getattr(output, name) for name in CACHE_NAMES if hasattr(output, name)), None)


def going_on(model: Any, output: Any) -> dict[str, Any]:
    """The argument with which a model goes on from the cache of an earlier output."""
    return {cache_argument(type(model).forward): cache_of(output)}


def cuts_encoded_images() -> bool:
    """Whether chunked prefill cuts the features of encoded images along with the prompt (from transformers 5.23 on)."""
    return hasattr(generation, "_slice_mm_encoder_output")
