"""How many tokens each layer of the encoder removes (paper section 4.3)."""

from __future__ import annotations

from collections.abc import Collection

from dymu.choices import SCHEDULES, Schedule
from dymu.errors import BadBudget


def removals(
    tokens: int, keep: float, layers: int, schedule: Schedule, merging: Collection[int] | None = None
) -> list[float]:
    """How many tokens each layer should remove so that `keep` of `tokens` remain.

    `constant` removes the same number everywhere, `linear` more in early layers, `reverse_linear` more in late ones
    (paper section 4.3). Tokens merge in pairs, and behind a class token one may be left over, so no layer is asked for
    more than half of what reaches it but one; what it cannot, the others do in proportion. Where only some layers are `merging`, they remove everything, in the same proportion to one another.

    Args:
        tokens: of an image.
        keep: of them in the end.
        layers: how many the encoder has.
        schedule: where to remove.
        merging: indices of the layers that may; None: all.

    Raises:
        ValueError: `schedule` is unknown, or `merging` names no layer or one that there is not.
        BadBudget: `keep` is more than `tokens`, or less than merging all pairs in every merging layer leaves.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    chosen = set(range(layers) if merging is None else merging)
    if not chosen or not chosen <= set(range(layers)):
        raise ValueError(f"cannot merge in layers {sorted(chosen)}; name some of 0 to {layers - 1}")
    lowest = 1 + (tokens - 1) / 2 ** len(chosen)
    if not lowest <= keep <= tokens:
        raise BadBudget(
            f"cannot keep {keep:g} of {tokens} tokens in {len(chosen)} layers, each of which at most halves them; "
            f"keep between {lowest:.3g} and {tokens}."
        )
    rising = range(1, layers + 1)
    weights = {
        "constant": [1] * layers,
        "linear": list(reversed(rising)),
        "reverse_linear": list(rising),
    }[schedule]

    def removed_at(scale: float) -> list[float]:
        left, removed = float(tokens), []
        for weight in (weight if layer in chosen else 0 for layer, weight in enumerate(weights)):
            removed.append(min(scale * weight, (left - 1) / 2))
            left -= removed[-1]
        return removed

    low, high = 0.0, float(tokens)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(removed_at(middle)) < tokens - keep else (low, middle)
    return removed_at(high)
