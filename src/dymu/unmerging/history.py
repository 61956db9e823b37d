"""What the entries of a KV cache of merged, un-rotated tokens stand for."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from dymu.token_map import TokenMap


class History:
    """What the entries of one cache stand for; shared by its layers.

    Args:
        expanded: whether the cache stores an entry for every token of the full prompt.

    Attributes:
        slot: int64 [B, N], the cache entry behind each token of the full prompt so far; -1 for padding.
        position: int64 [B, N], or [B, N, axes], the rotary position of each of them.
        place: int64 [B, N], which one it is of the tokens that are there, from 0.
        phase: complex [B, N, D / 2], their rotary angles; None while nobody needs them.
        entries: entries stored per row (the widest row's).
        plain: whether so far no token was merged and none is missing.
        padded: whether some row misses tokens.
        newest: map of the tokens that were appended last to their merged ones.
        hidden: bool [B, N], tokens that the present call does not see; None: it sees all.
        report: what the caller says of it; copies have copies.
        remembered: what the caller knows of its tokens beside, by name.
        interrupted: whether something else that the cache remembers is no longer of these tokens.
    """

    def __init__(self, expanded: bool = False) -> None:
        self.expanded = expanded
        self.reset()

    def reset(self) -> None:
        self.slot: Tensor | None = None
        self.position: Tensor | None = None
        self.place: Tensor | None = None
        self.phase: Tensor | None = None
        self.newest: TokenMap | None = None
        self.hidden: Tensor | None = None
        self.report: Any = None
        self.remembered = dict[str, Any]()
        self.interrupted = False
        self.entries = 0
        self.plain, self.padded = True, False

    @property
    def length(self) -> int:
        """Tokens of the full prompt so far."""
        return 0 if self.slot is None else self.slot.shape[1]

    def places(self, present: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
        """int64 [B, N]: where new tokens stand among those that are there, bool [B, N]; None: all are."""
        if present is None:
            place = torch.arange(tokens, device=device).expand(batch, -1)
        else:
            place = (present.cumsum(1) - 1).clamp(min=0)
        if self.place is None or not self.length:
            return place
        return place + self.place.amax(1, keepdim=True) + 1

    def append(
        self,
        tokens: TokenMap,
        position: Tensor,
        plain: bool,
        phase: Tensor | None = None,
        place: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add tokens of the full prompt whose merged forms are about to be stored after the present entries.

        Args:
            place: see `places`; None: the positions.

        Returns:
            `slot` (-1 for hidden ones too) and `place` of all tokens so far.
        """
        place = position if place is None else place
        group = torch.arange(tokens.tokens, device=tokens.group.device) if self.expanded else tokens.group
        slot = (group + self.entries).expand_as(tokens.group)
        if tokens.padded:
            slot = torch.where(tokens.group < 0, -1, slot)
        if self.slot is not None and self.position is not None and self.place is not None:
            slot, place = torch.cat((self.slot, slot), 1), torch.cat((self.place, place), 1)
            position = torch.cat((self.position, position), 1)
            phase = None if phase is None or self.phase is None else torch.cat((self.phase, phase), 1)
        self.slot, self.position, self.place, self.phase = slot, position, place, phase
        self.entries += tokens.tokens if self.expanded else tokens.width
        self.plain, self.padded = self.plain and plain, self.padded or tokens.padded
        self.newest = tokens
        if self.hidden is not None:
            self.hidden = torch.cat((self.hidden, torch.zeros_like(tokens.group, dtype=torch.bool)), 1)
            slot = slot.masked_fill(self.hidden, -1)
        return slot, place

    def hide(self, hidden: Tensor | None) -> None:
        """Of the tokens so far, those that the present call does not see, bool [B, N], such as what stands behind a
        shorter answer; None: it sees all."""
        self.hidden = hidden
        if hidden is not None:
            self.plain, self.padded = False, True

    def copy(self) -> History:
        """The history so far, which appending to this one leaves as it is."""
        return copy.copy(self)

    def restore(self, earlier: History) -> None:
        """Forget what came after `earlier`, an earlier copy of this history."""
        self.__dict__.update(earlier.__dict__)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.slot is not None:
            self._index(rows.to(self.slot.device))

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens, and the entries that only they needed."""
        if self.slot is not None and length < self.length:
            self._index((slice(None), slice(length)))
            held = int(self.slot.max()) + 1 if self.slot.numel() else 0
            self.entries = length if self.expanded else held

    def _index(self, index: Any) -> None:
        assert self.slot is not None
        assert self.position is not None
        assert self.place is not None
        self.slot, self.position, self.place = self.slot[index], self.position[index], self.place[index]
        self.phase = None if self.phase is None else self.phase[index]
        self.hidden = None if self.hidden is None else self.hidden[index]
