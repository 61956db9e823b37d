"""Exact unmerging over pages of merged tokens: which virtual tokens a step of the engine has.

A page holds keys rotated to the position of each token's representative, as stock attention would have them, and
values. Beside it, by slot, stands what else a merged token stands for. So blocks may be shared, kept and used again.
Every backend of `dymu.unmerging` computes it: of one request at a time, over its own entries or over all pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dymu.token_map import TokenMap
from dymu.unmerging import Step


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

    def step(
        self, own: Tensor, new: int, frequencies: Tensor, *, each_query: bool, backend: str, rows: Tensor | None = None
    ) -> Step:
        """How the new tokens of a request attend to all of it.

        Args:
            own: int64 [n], the slots of its tokens, of which the last `new` ones are new, and were written.
            frequencies: float64 [P], rotary angle per position.
            each_query: whether tokens ask for every one they stand for, or once.
            backend: which will compute it.
            rows: int64 [n], where these tokens stand among the keys and values that the backend gets, see `Pages`;
                None: it gets the n of the request.
        """
        entry, offset = self.members[own].nonzero(as_tuple=True)
        stands = self.position[own]
        at, order = (self.begin[own][entry] + offset).sort()
        entry = entry[order]
        keys = (entry if rows is None else rows[entry])[None]
        index = torch.arange(len(entry), device=own.device)
        late = entry >= len(own) - new
        if not each_query:
            late &= at == stands[entry]
        asks = index[late]
        group = entry[asks] - (len(own) - new)
        queries = TokenMap(group[None], torch.tensor([new], device=own.device), new)
        by = (at - stands[entry]).double()
        turns = bool(by.any())
        return Step(
            queries,
            keys,
            index[None],
            backend,
            len(entry),
            turned=len(entry) if turns else 0,
            turn=_turn(by, frequencies)[None] if turns else None,
            at=asks[None],
            expands=len(group) > new,
        )


@dataclass(frozen=True)
class Pages:
    """All pages of a layer as one row of keys and one of values, without a copy, whatever the order in memory.

    Attributes:
        keys, values: [1, heads of keys, rows, D].
        apart: rows from one block to the next.
    """

    keys: Tensor
    values: Tensor
    apart: int

    @classmethod
    def of(cls, cache: Tensor) -> Pages:
        """Of the cache of a layer, [blocks, heads of keys, slots of a block, 2 D].

        Raises:
            ValueError: its blocks are not so many slots apart as a whole number.
        """
        blocks, heads, block, wide = cache.shape
        from_block, from_head, from_slot, one = cache.stride()
        if from_block % from_slot or one != 1:
            raise ValueError(f"pages with the strides {cache.stride()} are no rows of keys and values")
        apart = from_block // from_slot
        size = wide // 2
        shape, strides = (1, heads, (blocks - 1) * apart + block, size), (0, from_head, from_slot, 1)
        begins = cache.storage_offset(), cache.storage_offset() + size
        keys, values = (cache.as_strided(shape, strides, begin) for begin in begins)
        return cls(keys, values, apart)

    def rows(self, slots: Tensor, block: int) -> Tensor:
        """Where these slots stand in the rows; `block` slots a block."""
        return slots // block * self.apart + slots % block


def _turn(by: Tensor, frequencies: Tensor) -> Tensor:
    angle = by[:, None] * frequencies
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
