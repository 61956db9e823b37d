"""Measurements of a prompt besides its times: memory, and the time for merging."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dymu.families.resolve import resolve
from dymu.hooks.cache import cache_bytes
from dymu.hooks.versions import cache_of
from dymu.measure.timing import behind_their_places, next_token, now

Inputs = Mapping[str, Any]


@torch.no_grad()
def memory(model: Any, inputs: Inputs) -> tuple[int, int]:
    """Peak bytes of the first forward and a token after it, beyond those held before, and bytes of the KV cache after
    the first forward.

    On an accelerator its allocator counts them; on a CPU they are added up over all allocations of tensors.
    """
    with _peak(model.device) as peak:
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        stored = cache_bytes(cache_of(output))
        next_token(model, output, inputs["attention_mask"], behind_their_places(resolve(model), inputs))
    return peak(), stored


@contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """A function that returns, after the context, the most bytes held at once beyond those at its start."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        yield lambda: torch.accelerator.max_memory_allocated() - before
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce itself on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield lambda: _most_held(profiled)


def _most_held(profiled: profile) -> int:
    assert profiled.profiler is not None
    results = profiled.profiler.kineto_results
    assert results is not None
    changes: list[tuple[int, int]] = [
        (event.start_ns(), event.nbytes())  # type: ignore[attr-defined]
        for event in results.events()
        if event.name() == "[memory]"
    ]
    changes.sort(key=lambda change: change[0])
    return max(accumulate((size for _, size in changes), initial=0))


@torch.no_grad()
def merging(model: Any, inputs: Inputs) -> tuple[float, float]:
    """Milliseconds of merging, between each layer's attention and its MLP (where the residual is added too), and of the
    whole image features.

    Every mark waits for the accelerator, which costs time: use their ratio only.
    """
    parts = resolve(model)
    spans: list[float] = []
    attended = 0.0

    def attention_ends(*_: object) -> None:
        nonlocal attended  # a module may serve the MLP too, so the last end ahead of the MLP counts
        attended = now()

    def mlp_begins(*_: object) -> None:
        spans.append(now() - attended)

    hooks = []
    for layer in parts.encoder_layers[: max(parts.feature_layers())]:
        modules = [part for part in (layer.out, *layer.after_attention) if isinstance(part, nn.Module)]
        hooks.append(modules[-1].register_forward_hook(attention_ends))
        hooks.append(layer.norm2.register_forward_pre_hook(mlp_begins, prepend=True))
    try:
        takes = inspect.signature(type(parts.inner).get_image_features).parameters
        shown = {name: value for name, value in inputs.items() if name in takes}
        begins = now()
        parts.inner.get_image_features(**shown)
        whole = now() - begins
    finally:
        for hook in hooks:
            hook.remove()
    return 1e3 * sum(spans), 1e3 * whole
