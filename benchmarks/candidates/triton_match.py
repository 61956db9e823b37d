"""`match.best_partner` in one Triton kernel: scores are formed tile by tile and never reach memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dymu.merging.layout import Layout
from dymu.merging.match import a_count

ROWS, COLUMNS = 32, 32
"""Tokens of A and of B at a time."""


@triton.jit
def match(
    metric, start, length, similarity, partner, prefix, most, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of A tokens of one image against all of its B tokens. Grid: (tiles, B)."""
    image = tl.program_id(1)
    begin = tl.load(start + image)
    tokens = tl.load(length + image).to(tl.int32)
    first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2
    a = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)
    real = (channel < CHANNELS)[None, :]
    has = first_a + 2 * a < tokens
    rows = tl.load(metric + (begin + first_a + 2 * a)[:, None] * CHANNELS + channel[None, :], has[:, None] & real, 0.0)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    chosen = tl.zeros((ROWS,), tl.int32)
    for block in range(0, (tokens + 1 - first_b) // 2, COLUMNS):
        b = block + tl.arange(0, COLUMNS)
        is_b = first_b + 2 * b < tokens
        columns = tl.load(
            metric + (begin + first_b + 2 * b)[:, None] * CHANNELS + channel[None, :], is_b[:, None] & real, 0.0
        )
        score = tl.dot(rows, tl.trans(columns), input_precision="ieee")
        score = tl.where(is_b[None, :], score, float("-inf"))
        top, at = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        chosen = tl.where(top > best, block + at, chosen)
        best = tl.maximum(top, best)
    best = tl.where(has, best, float("-inf"))
    tl.store(similarity + image * most + a, best, a < most)
    tl.store(partner + image * most + a, chosen.to(tl.int64), a < most)


def best_partner(metric: Tensor, layout: Layout, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """See `dymu.merging.match.best_partner`; of equally similar partners the first.

    Raises:
        ValueError: metric is not float32, in which merges are decided.
    """
    if metric.dtype != torch.float32:
        raise ValueError(f"the Triton kernel matches in float32, not in {metric.dtype}; use dymu.merging.match.")
    channels, longest = metric.shape[-1], layout.longest
    most = a_count(longest, prefix)
    start = layout.length.cumsum(0) - layout.length
    similarity = metric.new_empty(layout.batch, most)
    partner = metric.new_empty(layout.batch, most, dtype=torch.long)
    if most:
        with torch.cuda.device_of(metric):
            match[(triton.cdiv(most, ROWS), layout.batch)](
                metric.contiguous(), start, layout.length, similarity, partner, prefix, most,
                CHANNELS=channels, PADDED=max(16, triton.next_power_of_2(channels)), ROWS=ROWS, COLUMNS=COLUMNS,
            )  # fmt: skip
    return similarity, partner
