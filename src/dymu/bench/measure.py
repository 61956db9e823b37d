"""What a prompt takes besides time: memory, the merge's own share of the encoder, counted FLOPs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dymu.evaluate.costs import ATTENTION_FLOPS
from dymu.families import FAMILIES, resolve
from dymu.hooks.versions import cache_of, going_on
from dymu.timing import now
from dymu.unmerging import cache_bytes

Inputs = Mapping[str, Any]
WORDS = ("input_ids", "attention_mask")
"""What a prompt is given that no image is."""


@torch.no_grad()
def memory(model: Any, inputs: Inputs) -> dict[str, int]:
    """Bytes: `peak_bytes` that the first forward and a token after it hold at once, on top of what was held before, and
    `cache_bytes` of the KV cache after the first forward.

    On an accelerator by its allocator's own count, on a CPU by every tensor that was made and freed meanwhile.
    """
    with _peak(model.device) as peak:
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        stored = cache_bytes(cache_of(output))
        mask = inputs["attention_mask"]
        model(
            input_ids=output.logits[:, -1:].argmax(-1),
            attention_mask=torch.cat((mask, mask.new_ones(len(mask), 1)), 1),
            use_cache=True,
            **going_on(model, output),
        )
    return {"peak_bytes": peak(), "cache_bytes": stored}


@contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """Afterwards, the answer to a call: the most bytes that were held at once, beyond those at the start."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        yield lambda: torch.accelerator.max_memory_allocated() - before
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce itself on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        yield lambda: _most_held(found)


def _most_held(found: profile) -> int:
    assert found.profiler is not None
    results = found.profiler.kineto_results
    assert results is not None
    changes = [
        (event.start_ns(), event.nbytes())  # type: ignore[attr-defined]
        for event in results.events()
        if event.name() == "[memory]"
    ]
    held = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        most = max(most, held)
    return most


@torch.no_grad()
def merging(model: Any, inputs: Inputs) -> dict[str, float]:
    """Milliseconds of the image features: `merge_ms` between each layer's attention and its MLP, where tokens find
    partners and merge (and the residual is added), and `merge_of_ms` of everything.

    Every mark waits for the accelerator, which costs time: this run says the share, not how long it takes.
    """
    parts = resolve(model, FAMILIES)
    spans: list[float] = []
    attended = 0.0

    def attention_ends(*_: object) -> None:
        nonlocal attended  # a module may serve the MLP too, so the last end ahead of the MLP counts
        attended = now()

    def mlp_begins(*_: object) -> None:
        spans.append(now() - attended)

    hooks = []
    for layer in parts.encoder_layers[: max(parts.feature_layers())]:
        last = (layer.out, *layer.after_attention)[-1]
        hooks.append(last.register_forward_hook(attention_ends))
        hooks.append(layer.norm2.register_forward_pre_hook(mlp_begins, prepend=True))
    try:
        begins = now()
        model.get_image_features(**{name: value for name, value in inputs.items() if name not in WORDS})
        whole = now() - begins
    finally:
        for hook in hooks:
            hook.remove()
    return {"merge_ms": 1e3 * sum(spans), "merge_of_ms": 1e3 * whole}


@torch.no_grad()
def flops(model: Any, inputs: Inputs) -> dict[str, int]:
    """FLOPs of the first forward, `encoder_flops` up to the language model and `prefill_flops` from there on.

    Counted as it runs, see `dymu.evaluate.costs.cost`.
    """
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
    vision: list[int] = []
    hook = resolve(model, FAMILIES).language_model.register_forward_pre_hook(
        lambda *_: vision.append(counter.get_total_flops()), prepend=True
    )
    try:
        with counter:
            model(**inputs, use_cache=True, logits_to_keep=1)
    finally:
        hook.remove()
    return {"encoder_flops": vision[0], "prefill_flops": counter.get_total_flops() - vision[0]}
