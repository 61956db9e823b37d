"""How far a model with fewer image tokens is from the untouched one, token by token of the untouched answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, equal, nn

from dymu.families.resolve import resolve
from dymu.prompting import Answer, logits_of


def divergences(
    model: nn.Module, untouched: Sequence[Answer], answers: Sequence[Answer], inputs_of: Callable[[list[int]], Any]
) -> list[float | None]:
    """KL(untouched ‖ model) for each prompt: the mean over the tokens of the untouched answer, in nats.

    Where both answers have the same tokens, the logits that they came from say it. For the others the model runs once
    more, over prompt and untouched answer.

    Args:
        model: as it answered.
        inputs_of: what the model takes for the prompts of these indices.

    Returns:
        A number for each prompt; None where it is not finite, or where the untouched answer holds a placeholder,
        which would ask for another image.
    """
    placeholders = set(resolve(model).placeholders.values())
    pairs = list(zip(untouched, answers, strict=True))
    logits = {index: after.logits for index, (before, after) in enumerate(pairs) if equal(before.tokens, after.tokens)}
    others = [
        index
        for index, (before, _) in enumerate(pairs)
        if index not in logits and placeholders.isdisjoint(before.tokens.tolist())
    ]
    if others:
        said = [untouched[index].tokens for index in others]
        logits.update(zip(others, logits_of(model, inputs_of(others), said), strict=True))
    return [
        divergence(before.logits, logits[index]) if index in logits else None for index, before in enumerate(untouched)
    ]


def divergence(untouched: Tensor, other: Tensor) -> float | None:
    """The mean over T of KL(untouched ‖ other), in nats, of logits [T, V] each; None where it is not finite."""
    p, q = (logits.float().log_softmax(-1) for logits in (untouched, other.to(untouched.device)))
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    mean = terms.sum(-1).mean().item()
    return round(max(mean, 0.0), 6) if math.isfinite(mean) else None
