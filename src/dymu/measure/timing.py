"""How long a model takes for a prompt: the vision part, the rest of the first forward, each token.

One method for every model, whether DyMU is applied or not: stock calls of `forward`, and one hook that marks where the
language model begins.
"""

from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import nn

from dymu.families.resolve import Parts, resolve
from dymu.handle import Handle
from dymu.hooks.call import PIXELS
from dymu.hooks.versions import going_on
from dymu.measure.times import Times

DECODE_STEPS = 8
"""Tokens after the first that each measurement generates, whatever the answer."""


@torch.no_grad()
def measure(model: nn.Module, inputs: Mapping[str, Any]) -> Times:
    """Time one prompt once, for a model of a described family and the inputs of its processor."""
    language_model_begins: list[float] = []

    def mark(*_: Any) -> None:
        language_model_begins.append(now())

    parts = resolve(model)
    # The first of its hooks, so that what DyMU does to the prompt counts as prefill.
    hook = parts.language_model.register_forward_pre_hook(mark, prepend=True)
    begins = now()
    try:
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    finally:
        hook.remove()
    prefilled = now()
    mask, behind = inputs["attention_mask"], behind_their_places(parts, inputs)
    for _ in range(DECODE_STEPS):
        output, mask = next_token(model, output, mask, behind)
    ends = now()
    return Times(
        encoder_ms=1e3 * (language_model_begins[0] - begins),
        prefill_ms=1e3 * (prefilled - language_model_begins[0]),
        decode_ms_per_token=1e3 * (ends - prefilled) / DECODE_STEPS,
    )


def next_token(
    model: nn.Module, output: Any, mask: torch.Tensor, behind: torch.Tensor | None = None
) -> tuple[Any, torch.Tensor]:
    """Run the likeliest token after `output`, whose mask is [B, N]; return the new output and its mask [B, N + 1].

    Args:
        behind: see `behind_their_places`.
    """
    mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
    words = output.logits[:, -1:].argmax(-1)
    named = {} if behind is None else {"position_ids": mask.sum(1, keepdim=True) - 1 + behind}
    return model(input_ids=words, attention_mask=mask, use_cache=True, **going_on(model, output), **named), mask


def behind_their_places(parts: Parts, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """int64 [B, 1]: how far the positions of what follows the prompt of the last call are from its places, for models
    whose positions have several axes; others count by themselves.

    Args:
        inputs: of that call.
    """
    if parts.decoder_kind.axes == 1:
        return None
    shows = any(inputs.get(name) is not None for name in PIXELS)
    remembered = [getattr(parts.inner, name) for name in parts.family.remembers] if shows else []
    behind: torch.Tensor = remembered[0] if remembered else inputs["attention_mask"].new_zeros(1, 1)
    return behind


def measure_repeatedly(
    model: nn.Module,
    inputs: Mapping[str, Any],
    handle: Handle | None = None,
    *,
    repeats: int = 5,
    limit_s: float = 30.0,
) -> tuple[list[Times], list[Times]]:
    """Time the model as it is and, with a handle, also with DyMU disabled: (as it is, untouched).

    The two alternate, see `interleaved`. Run the model once before, to warm up. Timing stops after `repeats`, or once
    `limit_s` seconds have passed, but never before one of each.
    """

    def untouched() -> Times:
        assert handle is not None
        with handle.disabled():
            return measure(model, inputs)

    variants: dict[str, Callable[[], Times]] = {"as it is": partial(measure, model, inputs)}
    if handle is not None:
        variants["untouched"] = untouched
    runs = interleaved(variants, repeats=repeats, limit_s=limit_s)
    return runs["as it is"], runs.get("untouched", [])


def interleaved(variants: Mapping[str, Callable[[], Times]], *, repeats: int, limit_s: float) -> dict[str, list[Times]]:
    """Call each variant's function in turn, so that other load on the machine slows all of them alike.

    Each goes first in one round and last in another. It stops after `repeats` rounds, or with the round in which
    `limit_s` seconds have gone by.
    """
    runs: dict[str, list[Times]] = {name: [] for name in variants}
    order = list(variants.items())
    end = perf_counter() + limit_s
    for _ in range(repeats):
        for name, timed in order:
            runs[name].append(timed())
        order = [*order[1:], *order[:1]]
        if perf_counter() > end:
            break
    return runs


def now() -> float:
    """Seconds, once the accelerator has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return perf_counter()
