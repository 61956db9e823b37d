"""How far a model with fewer image tokens is from the untouched one, token by token of the untouched answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, equal, nn

from dymu.families.resolve import resolve
from dymu.prompting import Answer, logits_of


def divergences(
    model: nn.Module, untouched: Sequence[Answer], answers: Sequence[Answer], inputs: dict[str, Any]
) -> list[float | None]:
    """KL(untouched ‖ model) for each prompt: the mean over the tokens of the untouched answer, in nats.

    Where both answers have the same tokens, the logits that they came from say it. For the others the model runs once
    more, over prompts and untouched answers.

    Args:
        model: as it answered.
        inputs: what it took.

    Returns:
        A number for each prompt; None where it is not finite, or where the untouched answer holds a placeholder,
        which would ask for another image.
    """
    logits: list[Tensor | None] = [
        after.logits if equal(before.tokens, after.tokens) else None
        for before, after in zip(untouched, answers, strict=True)
    ]
    if any(of_prompt is None for of_prompt in logits):
        placeholders = torch.tensor(list(resolve(model).placeholders.values()))
        held = [torch.isin(before.tokens, placeholders.to(before.tokens.device)) for before in untouched]
        ids = inputs["input_ids"]
        word = int(ids[~torch.isin(ids, placeholders.to(ids.device))][-1])
        said = [before.tokens.where(~placeholder, word) for before, placeholder in zip(untouched, held, strict=True)]
        again = logits_of(model, inputs, said)
        logits = [
            same if same is not None else None if placeholder.any() else other
            for same, other, placeholder in zip(logits, again, held, strict=True)
        ]
    return [
        None if after is None else divergence(before.logits, after)
        for before, after in zip(untouched, logits, strict=True)
    ]


def divergence(untouched: Tensor, other: Tensor) -> float | None:
    """The mean over T of KL(untouched ‖ other), in nats, of logits [T, V] each; None where it is not finite."""
    p, q = (logits.float().log_softmax(-1) for logits in (untouched, other.to(untouched.device)))
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    mean = terms.sum(-1).mean().item()
    return round(max(mean, 0.0), 6) if math.isfinite(mean) else None
