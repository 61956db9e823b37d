"""Virtual token unmerging written straight from the formula, one head and one query at a time. Slow, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from dymu.unmerging.step import Step


def _rotate(vector: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = vector.shape[0] // 2
    rotated = vector.clone()
    for i in range(half):
        rotated[i] = vector[i] * cos[i] - vector[i + half] * sin[i]
        rotated[i + half] = vector[i + half] * cos[i + half] + vector[i] * sin[i + half]
    return rotated


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Step,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention over virtual tokens (paper section 3.2): expand, rotate, attend causally, average over each group.

    Args:
        query: [B, H, Mq, D], un-rotated.
        key, value: [B, Hkv, entries, D], un-rotated; H is a multiple of Hkv.
        step: the virtual tokens.
        scaling: factor on the logits.
        window: sliding window in virtual tokens, or None.
        softcap: what logits approach, c tanh(x / c), before the bias; None: they are as they are.

    Returns:
        [B, Mq, H, D]; 0 for merged tokens past a row's end.
    """
    batch, heads, _, size = query.shape
    shared = heads // key.shape[1]
    cos, sin = step.cos, step.sin
    seen, tokens = step.keys.shape[1], step.queries.tokens
    total = query.new_zeros(batch, step.queries.width, heads, size)
    count = query.new_zeros(batch, step.queries.width)
    for b in range(batch):
        visible = [n for n in range(seen) if step.keys[b, n] >= 0]
        for n in range(tokens):
            if step.queries.group[b, n] >= 0:
                count[b, step.queries.group[b, n]] += 1
        for h in range(heads):
            entry = step.keys[b]
            virtual_keys = {n: _rotate(key[b, h // shared, entry[n]], cos[b, n], sin[b, n]) for n in visible}
            for n in range(tokens):
                merged = step.queries.group[b, n]
                if merged < 0:
                    continue
                at = seen - tokens + n
                seen_keys = [j for j in visible if _sees(step, b, n, j, window)]
                virtual_query = _rotate(query[b, h, merged], cos[b, at], sin[b, at])
                logits = torch.stack([virtual_query @ virtual_keys[j] * scaling for j in seen_keys])
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if step.bias is not None:
                    logits = logits + step.bias[b, seen_keys]
                weights = logits.softmax(0)
                total[b, merged, h] += sum(
                    weight * value[b, h // shared, entry[j]] for weight, j in zip(weights, seen_keys, strict=True)
                )
    return total / count.clamp(min=1)[:, :, None, None]


def _sees(step: Step, row: int, query: int, key: int, window: int | None) -> bool:
    before = step.keys.shape[1] - step.queries.tokens
    at, other = before + query, key - before
    blocks = None if step.block is None else step.block[row]
    in_block = blocks is not None and other >= 0 and bool(blocks[query] >= 0) and bool(blocks[query] == blocks[other])
    near = window is None or bool(step.place[row, at] - step.place[row, key] < window)
    return (key <= at or in_block) and (near or (in_block and step.beyond_window))
