"""Representative queries of a long prompt: keys near a query are all tokens', those further back one per group.

Behind a window the places of a group share one logit: at the mean of their rotations so far, which is shorter than 1
where they differ, plus the log of their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dymu.unmerging.step import Step

LONG = 2048
"""Prompts from so many tokens on are attended so: where it measures quicker than all keys."""
QUERIES, WINDOW = 64, 32
"""Queries that share their far keys, and places before the first of them that are near."""


@dataclass(frozen=True)
class Piece:
    """Some queries of a row.

    Attributes:
        start, end: of the queries.
        near, seen: the keys from `near` to `seen` are those of all tokens.
        far: int64 [F], entries whose groups have places before.
        turn: complex [F, P], what rotates their keys.
        bias: float32 [end - start, F + seen - near], added to the logits.
    """

    start: int
    end: int
    near: int
    seen: int
    far: Tensor
    turn: Tensor | None
    bias: Tensor


def applies(step: Step, window: int | None, softcap: float | None) -> bool:
    """Whether the queries of a step are attended so."""
    whole = window is None or window >= step.length
    return step.merged is not None and step.length >= LONG and whole and softcap is None


def pieces(step: Step, row: int) -> list[Piece]:
    """The pieces of a row. Queries behind the last one of several tokens are one piece, which sees all keys."""
    assert step.merged is not None
    merged, last = int(step.merged[row]), step.queries.tokens
    starts = [*range(0, merged, QUERIES), *([merged] if merged < last else [])]
    at: list[int] = step.query_at[row].tolist()
    slots, turn = step.keys[row], None if step.turn is None else step.turn[row]
    number = torch.zeros(int(slots.max()) + 1, device=slots.device)
    total = None if turn is None else turn.new_zeros(len(number), turn.shape[-1])
    counted, found = 0, list[Piece]()
    for start, end in pairwise([*starts, last]):
        near = max(0, at[start] - WINDOW) if start < merged else 0
        there = (slots[counted:near] >= 0).nonzero()[:, 0] + counted
        number = number.index_add(0, slots[there], torch.ones_like(there, dtype=number.dtype))
        if total is not None and turn is not None:
            total = total.index_add(0, slots[there], turn[there])
        counted = max(counted, near)
        far = number.nonzero()[:, 0] if near else slots[:0]
        mask = step.mask(None, start, end)
        sees = mask[row if len(mask) > 1 else 0, 0, :, near:]
        bias = torch.cat((number[far].log().expand(len(sees), -1), sees.float().log()), 1)
        mean = None if total is None else total[far] / number[far, None]
        found.append(Piece(start, end, near, near + sees.shape[1], far, mean, bias))
    return found
