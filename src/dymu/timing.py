"""How long a model takes for a prompt: the vision part, the rest of the first forward, each token.

One method for every model, whether DyMU is applied or not: stock calls of `forward`, and one hook that marks where the
language model begins.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from dymu.apply import Handle
from dymu.families import FAMILIES, resolve
from dymu.hooks.versions import going_on

DECODE_STEPS = 8
"""Tokens after the first that each measurement generates, whatever the answer."""


@dataclass(frozen=True)
class Times:
    """Wall-clock milliseconds of one prompt, or the medians of several."""

    encoder_ms: float
    """From the start of the first forward to the start of the language model: the vision part."""
    prefill_ms: float
    """The rest of the first forward: the language model over the whole prompt, and the logits."""
    decode_ms_per_token: float
    """From one token to the next, after the first."""

    @property
    def first_token_ms(self) -> float:
        return self.encoder_ms + self.prefill_ms

    @classmethod
    def medians(cls, runs: list["Times"]) -> "Times":
        return cls(**{field.name: median(getattr(r, field.name) for r in runs) for field in fields(cls)})


@torch.no_grad()
def measure(model: nn.Module, inputs: Mapping[str, Any]) -> Times:
    """Time one prompt once, for a model of a described family and what its processor gives."""
    language_model_begins: list[float] = []

    def mark(*_: Any) -> None:
        language_model_begins.append(now())

    # The first of its hooks, so that what DyMU does to the prompt counts as prefill.
    hook = resolve(model, FAMILIES).language_model.register_forward_pre_hook(mark, prepend=True)
    begins = now()
    try:
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    finally:
        hook.remove()
    prefilled = now()
    mask = inputs["attention_mask"]
    for _ in range(DECODE_STEPS):
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        output = model(
            input_ids=output.logits[:, -1:].argmax(-1),
            attention_mask=mask,
            use_cache=True,
            **going_on(model, output),
        )
    ends = now()
    return Times(
        encoder_ms=1e3 * (language_model_begins[0] - begins),
        prefill_ms=1e3 * (prefilled - language_model_begins[0]),
        decode_ms_per_token=1e3 * (ends - prefilled) / DECODE_STEPS,
    )


def measure_repeatedly(
    model: nn.Module,
    inputs: Mapping[str, Any],
    handle: Handle | None = None,
    *,
    repeats: int = 5,
    limit_s: float = 30.0,
) -> tuple[list[Times], list[Times]]:
    """Time the model as it is and, given its handle, with DyMU disabled: (as it is, untouched).

    The two alternate, see `interleaved`. Warm up first. It stops after `repeats`, or once `limit_s` seconds have gone
    by, but never before one of each.
    """

    def situation(context: Callable[[], Any]) -> Times:
        with context():
            return measure(model, inputs)

    variants = {"as it is": partial(situation, nullcontext)}
    if handle is not None:
        variants["untouched"] = partial(situation, handle.disabled)
    runs = interleaved(variants, repeats=repeats, limit_s=limit_s)
    return runs["as it is"], runs.get("untouched", [])


def interleaved(variants: Mapping[str, Callable[[], Times]], *, repeats: int, limit_s: float) -> dict[str, list[Times]]:
    """Take each variant's times in turn: what the machine does meanwhile weighs on all alike.

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
    """Seconds, once the accelerator has finished what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return perf_counter()
