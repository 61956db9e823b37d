"""Who attends to whom, as tiles: computed once per forward on the tensors' device, without waiting for it, and read by
the kernels of all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

NONE = 2**31 - 1
"""Index of a key that is absent: later than any query, so no query sees it."""
SPAN = 512
"""Virtual tokens of one entry share a chunk where they lie in the same stretch of so many. Longer stretches make fewer
chunks, but chunks that reach further past the queries that may see only a part of them."""


@dataclass(frozen=True)
class QueryTiles:
    """Virtual queries in their order, cut into tiles of `width`, each tile sorted by group.

    Attributes:
        index: int32 [B, tiles * width], which of the Nk virtual tokens each row is; -1 for none.
        group: int32 [B, tiles * width], the merged query it is a copy of; -1 for none.
        first, last: int64 [B, tiles], the smallest and largest index in each tile; NONE and -1 if it has none.
    """

    index: Tensor
    group: Tensor
    first: Tensor
    last: Tensor


@dataclass(frozen=True)
class KeyTiles:
    """Virtual keys cut into chunks, which are 1, 2, 4, ... virtual tokens of one cache entry; the chunks of one size,
    in the order of their first tokens, fill tiles of `width` virtual keys. Column `turn * chunks + chunk` of a tile is
    the turn-th token of its chunk.

    Attributes:
        index: int32 [B, sizes, tiles, width], which of the Nk virtual tokens each column is; NONE for none.
        slot: int32 [B, sizes, tiles, width], its cache entry; 0 for none.
    """

    index: Tensor
    slot: Tensor

    def visits(self, queries: QueryTiles, position: Tensor, window: int | None) -> Tensor:
        """int32 [B, query tiles, sizes, 3]: of each size, the first key tile that some query of the tile may see, the
        first that some query does not see whole, and the end.

        Args:
            queries: the tiles that visit.
            position: int64 [B, Nk], what the window counts in.
            window: sliding window in virtual tokens, or None. With one, no tile is taken to be seen whole.
        """
        sizes = self.index.shape[1]
        index = self.index.long()
        first, last = (edge[:, None].expand(-1, sizes, -1).contiguous() for edge in (queries.first, queries.last))
        end = torch.searchsorted(index[..., 0].contiguous(), last, right=True)
        if window is None:
            start = torch.zeros_like(end)
            whole = torch.searchsorted(index.amax(-1).cummax(-1).values, first, right=True).minimum(end)
        else:
            there = index < NONE
            key_count = _gather(position, index).masked_fill(~there, torch.iinfo(torch.int64).min)
            query_count = _gather(position, queries.index.long()).masked_fill(queries.index < 0, NONE)
            oldest = query_count.view(*queries.first.shape, -1).amin(-1) - window
            oldest = oldest[:, None].expand(-1, sizes, -1).contiguous()
            start = torch.searchsorted(key_count.amax(-1).cummax(-1).values, oldest, right=True)
            whole = start
        return torch.stack((start, whole, end), -1).transpose(1, 2).contiguous().int()


def query_tiles(group: Tensor, at: Tensor, width: int) -> QueryTiles:
    """Cut the queries with these groups, int64 [B, Nq], that are these virtual tokens, [B or 1, Nq], into tiles."""
    batch, tokens = group.shape
    at = pad(at.expand(batch, -1), (0, -tokens % width)).view(batch, -1, width)
    group = torch.where(group < 0, NONE, group)
    group, order = pad(group, (0, -tokens % width), value=NONE).view(batch, -1, width).sort(dim=-1, stable=True)
    index = at.gather(-1, order)
    absent = group == NONE
    first, last = index.masked_fill(absent, NONE).amin(-1), index.masked_fill(absent, -1).amax(-1)
    index, group = (x.masked_fill(absent, -1).flatten(1).int() for x in (index, group))
    return QueryTiles(index, group, first, last)


def key_tiles(keys: Tensor, width: int, sizes: tuple[int, ...]) -> KeyTiles:
    """Cut virtual keys into tiles for many queries.

    Args:
        keys: int64 [B, Nk], the cache entry of each; -1 for none.
        width: virtual keys of a tile.
        sizes: tokens of a chunk, falling powers of two that end with 1.
    """
    tokens = keys.shape[1]
    here = torch.arange(tokens, device=keys.device)
    run = torch.where(keys < 0, 1 << 62, (here // SPAN << 32) + keys)  # the tokens of one entry in one stretch
    run, order = run.sort(dim=1, stable=True)
    start = torch.searchsorted(run, run)
    count = torch.searchsorted(run, run, right=True) - start
    turn, start, count = (here - start), start, count.masked_fill(run == 1 << 62, 0)
    indices = []
    for size in sizes:
        inside = (turn >= 0) & (turn < count // size * size)
        lead = order.gather(1, (start + turn // size * size).clamp(0, tokens - 1))
        rank, chosen = torch.where(inside, lead * size + turn % size, NONE << 8).sort(1)
        index = order.gather(1, chosen).masked_fill(rank == NONE << 8, NONE)
        index = pad(index, (0, -tokens % width), value=NONE).view(len(keys), -1, width // size, size)
        indices.append(index.transpose(2, 3).flatten(2))
        used = count // size * size
        turn, start, count = turn - used, start + used, count - used
    return _with_slots(torch.stack(indices, 1), keys)


def sorted_keys(keys: Tensor, width: int) -> KeyTiles:
    """Cut virtual keys, int64 [B, Nk], into tiles for a few queries that see nearly all: in the order of their cache
    entries, so that neighbouring columns read the same entry, as chunks of one token."""
    slot, order = torch.where(keys < 0, NONE, keys).sort(dim=1, stable=True)
    index = pad(order.masked_fill(slot == NONE, NONE), (0, -keys.shape[1] % width), value=NONE)
    return _with_slots(index.view(len(keys), 1, -1, width), keys)


def _with_slots(index: Tensor, keys: Tensor) -> KeyTiles:
    slot = _gather(keys, index).masked_fill(index == NONE, 0)
    return KeyTiles(index.int(), slot.int())


def _gather(row: Tensor, index: Tensor) -> Tensor:
    """row[b, index[b, ...]] for int64 row [B, Nk]; anything where index is not one of them."""
    return row.gather(1, index.clamp(0, row.shape[1] - 1).flatten(1)).view(index.shape)
