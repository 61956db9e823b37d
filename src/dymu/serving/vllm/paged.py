"""Exact unmerging over pages of merged tokens, in torch: which virtual tokens a step has, and what they attend to.

A page holds keys rotated to the position of each token's representative, as stock attention would have them, and values.
Beside it, by slot, stands what else a merged token stands for. So blocks may be shared, kept and used again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class Slots:
    """By slot of the cache: where the token in it stands, and for which tokens of its image.

    Args:
        slots: how many there are.
        longest: L, tokens of an image at most.

    Attributes:
        position: int32 [slots], of its representative.
        begin: int32 [slots], the position of the first token of its image.
        members: bool [slots, L], those of its image that it stands for, counted from there.
    """

    def __init__(self, slots: int, longest: int, device: torch.device) -> None:
        self.position = torch.zeros(slots, dtype=torch.int32, device=device)
        self.begin = torch.zeros_like(self.position)
        self.members = torch.zeros(slots, longest, dtype=torch.bool, device=device)

    def write(self, slots: Tensor, position: Tensor, begin: Tensor, members: Tensor) -> None:
        """For new tokens: int64 slots [T], position and begin [T], members [T, L]."""
        self.position[slots] = position.int()
        self.begin[slots] = begin.int()
        self.members[slots] = members


@dataclass(frozen=True)
class Row:
    """The virtual tokens of one request.

    Attributes:
        queries: which of the step's tokens are its own.
        own: int64 [entries], the slots of its tokens.
        key: int64 [K], of each virtual key the entry among these, and
        key_turn: complex [K, P], what turns it on from its representative's position.
        query: int64 [Q], of each virtual query the token among `queries`, and
        query_turn: complex [Q, P]; None: none turns.
        seen: bool [Q, K]; None: all.
        size: int64 [T], virtual queries of each token; None: one each.
    """

    queries: slice
    own: Tensor
    key: Tensor
    key_turn: Tensor
    query: Tensor
    query_turn: Tensor | None
    seen: Tensor | None
    size: Tensor | None


def rows_of(
    slots: Slots,
    tables: Tensor,
    block: int,
    begins: Sequence[int],
    lengths: Sequence[int],
    frequencies: Tensor,
    each_query: bool,
) -> list[Row]:
    """The virtual tokens of each request of a step, whose new tokens were written.

    Args:
        tables: int [requests, blocks], the block table; `block` slots each.
        begins: where the new tokens of each request begin among all of the step, and where the last ones end.
        lengths: tokens in the cache of each request, with the new ones.
        frequencies: float64 [P], rotary angle per position.
        each_query: whether tokens ask for every one they stand for, or once.
    """
    rows = []
    for request, (first, last, length) in enumerate(zip(begins[:-1], begins[1:], lengths, strict=True)):
        if first == last:
            continue
        blocks = tables[request, : -(-length // block)].long()
        own = (blocks[:, None] * block + torch.arange(block, device=blocks.device)).flatten()[:length]
        key, offset = slots.members[own].nonzero(as_tuple=True)
        stands = slots.position[own]
        at = slots.begin[own][key] + offset
        key_turn = _turn(at - stands[key], frequencies)
        new = length - (last - first)
        query, query_turn, size = torch.arange(last - first, device=own.device), None, None
        asks = stands[new:]
        if each_query and bool((slots.members[own[new:]].sum(1) > 1).any()):
            late = key >= new
            query, asks, query_turn = key[late] - new, at[late], key_turn[late]
            size = torch.bincount(query, minlength=last - first)
        seen = None if last - first == 1 and size is None else at <= asks[:, None]
        rows.append(Row(slice(first, last), own, key, key_turn, query, query_turn, seen, size))
    return rows


def _turn(by: Tensor, frequencies: Tensor) -> Tensor:
    angle = by.double()[:, None] * frequencies
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the two halves of the heads of x [N, H, D] by complex [N, P]; channels beyond 2 P stay."""
    half = turn.shape[1]
    low, high, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    cos, sin = turn.real[:, None], turn.imag[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest.float()), -1).to(x.dtype)


def attend(row: Row, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """What a request's new tokens get, [T, H, D].

    Args:
        query: [T, H, D], rotated to the positions of their representatives.
        keys, values: [entries, heads of keys, D], of `row.own`.
    """
    asked = query[row.query] if row.query_turn is None else turned(query[row.query], row.query_turn)
    found = scaled_dot_product_attention(
        asked.transpose(0, 1)[None],
        turned(keys[row.key], row.key_turn).transpose(0, 1)[None],
        values[row.key].transpose(0, 1)[None],
        attn_mask=row.seen,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )[0].transpose(0, 1)
    if row.size is None:
        return found
    summed = torch.zeros_like(query, dtype=torch.float32).index_add_(0, row.query, found.float())
    return (summed / row.size[:, None, None]).to(query.dtype)
