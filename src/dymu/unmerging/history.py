"""What the entries of a KV cache of merged tokens stand for."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dymu.token_map import TokenMap, take
from dymu.unmerging.packed import Packed


@dataclass(frozen=True)
class Tokens:
    """Some tokens of the full prompt.

    Attributes:
        slot: int64 [B, N], the cache entry behind each token; -1: it is not there.
        place: int64 [B, N], which one it is of the tokens that are there, from 0.
        represents: bool [B, N], whether the key of its entry stands at its position; None: that of each does.
        turn: complex [B, N, P], from the rotary angles of its entry's key to its own; None: they are the same.
    """

    slot: Tensor
    place: Tensor
    represents: Tensor | None = None
    turn: Tensor | None = None

    def at(self, index: Any) -> Tokens:
        """These rows, or these tokens."""
        represents, turn = (part if part is None else part[index] for part in (self.represents, self.turn))
        return Tokens(self.slot[index], self.place[index], represents, turn)

    def in_order(self, order: Tensor) -> Tokens:
        """The tokens at int64 [B, N] of each row."""
        return self.at((torch.arange(len(order), device=order.device)[:, None], order))

    def then(self, others: Tokens) -> Tokens:
        """Followed by these."""
        represents, turn = None, None
        if self.represents is not None or others.represents is not None:
            both = (x.represents if x.represents is not None else x.slot >= 0 for x in (self, others))
            represents = torch.cat([*both], 1)
        given = next((x.turn for x in (self, others) if x.turn is not None), None)
        if given is not None:
            none = given[:, :0]
            turn = torch.cat(
                [x.turn if x.turn is not None else pad_turns(none, x.slot.shape[1]) for x in (self, others)], 1
            )
        return Tokens(
            torch.cat((self.slot, others.slot), 1), torch.cat((self.place, others.place), 1), represents, turn
        )


ROOM = 64
"""Tokens that there is room for ahead, so that a new one of each row is no copy of all before."""


class Keys:
    """Cached tokens as virtual keys: first those whose entry's key stands elsewhere, then one for each entry.

    Args:
        slots, places, sizes: of these, and of tokens that may follow, see `slot`, `place`, `size`.
        turn: complex [B, E, P], see `Tokens`; None: none has to turn.
        turned: E.
        count: E + M, how many of them there are so far.
        reach: entries from the first one on, behind which there is none that a key to turn is of.

    Attributes:
        memo: what is computed of the keys that turn, for all tokens that follow.
    """

    def __init__(
        self, slots: Tensor, places: Tensor, sizes: Tensor, turn: Tensor | None, turned: int, count: int, reach: int
    ) -> None:
        self._slots, self._places, self._sizes = slots, places, sizes
        self.turn, self.turned, self.count, self.reach = turn, turned, count, reach
        self.memo = dict[Any, Any]()

    @property
    def inference(self) -> bool:
        """Whether they were made in inference mode, and are of no use for gradients."""
        return self._slots.is_inference()

    @property
    def slot(self) -> Tensor:
        """int64 [B, E + M], the entry behind each; -1 for none."""
        return self._slots[:, : self.count]

    @property
    def place(self) -> Tensor:
        """int64 [B, E + M], see `Tokens`."""
        return self._places[:, : self.count]

    @property
    def size(self) -> Tensor:
        """float32 [B, M], tokens behind each entry."""
        return self._sizes[:, : self.count - self.turned]

    @property
    def absent(self) -> Tensor:
        """float32 [B, E + M], to be added to the logits of each: 0, or -inf for none."""
        if "absent" not in self.memo or self.memo["absent"].shape != self._slots.shape:
            self.memo["absent"] = torch.zeros_like(self._slots, dtype=torch.float32).masked_fill(
                self._slots < 0, -torch.inf
            )
        absent: Tensor = self.memo["absent"]
        return absent[:, : self.count]

    @classmethod
    def of(cls, tokens: Tokens, entries: int) -> Keys:
        there = tokens.slot >= 0
        represents = there if tokens.represents is None else there & tokens.represents
        others = there & ~represents
        kept = others.sum(1, keepdim=True)
        turned = int(kept.max())
        order = (~others).byte().argsort(dim=1, stable=True)[:, :turned]
        slot = tokens.slot.gather(1, order)
        slot = torch.where(torch.arange(turned, device=slot.device) < kept, slot, -1)
        turn = None if tokens.turn is None else take(tokens.turn, order)
        own = torch.where(represents, tokens.slot, entries)
        begin = tokens.slot.new_full((len(slot), entries + 1), -1)
        place = begin.scatter(1, own, tokens.place)[:, :entries]
        direct = torch.where(place < 0, -1, torch.arange(entries, device=slot.device))
        behind = torch.where(there, tokens.slot, entries)
        size = begin.float().zero_().scatter_add_(1, behind, torch.ones_like(own, dtype=torch.float32))[:, :entries]
        places = torch.cat((tokens.place.gather(1, order), place), 1)
        keys = cls(torch.cat((slot, direct), 1), places, size, turn, turned, turned + entries, entries)
        return keys._with_room(tokens.place[:, -1:] + 1, ROOM)

    def _with_room(self, next_place: Tensor, room: int) -> Keys:
        """The same with room for more tokens, of which the first would stand at `next_place`, int64 [B, 1]."""
        ahead = torch.arange(room, device=self._slots.device).expand(len(self._slots), -1)
        slots = torch.cat((self._slots, ahead + self._slots.shape[1] - self.turned), 1)
        places = torch.cat((self._places, ahead + next_place), 1)
        sizes = torch.cat((self._sizes, torch.ones_like(ahead, dtype=self._sizes.dtype)), 1)
        return Keys(slots, places, sizes, self.turn, self.turned, self.count, self.reach)

    def then(self, tokens: int) -> Keys:
        """Followed by so many tokens of every row, each an entry of its own."""
        keys, count = self, self.count + tokens
        if count > self._slots.shape[1]:
            keys = self._with_room(self._places[:, -1:] + 1, max(tokens, ROOM))
        after = Keys(keys._slots, keys._places, keys._sizes, self.turn, self.turned, count, self.reach)
        after.memo = self.memo
        return after

    def next_places(self, tokens: int) -> Tensor:
        """int64 [B, tokens]: the places of so many tokens of every row that follow."""
        return self.then(tokens)._places[:, self.count : self.count + tokens]

    def as_tokens(self) -> Tokens:
        """The same, each with a turn of its own if any has one."""
        if self.turn is None:
            return Tokens(self.slot, self.place)
        return Tokens(self.slot, self.place, None, pad_turns(self.turn, self.count))

    def at(self, rows: Tensor) -> Keys:
        """These rows."""
        turn = None if self.turn is None else self.turn[rows]
        return Keys(self._slots[rows], self._places[rows], self._sizes[rows], turn, self.turned, self.count, self.reach)


class History:
    """What the entries of one cache stand for; shared by its layers.

    Args:
        fast: whether the cache keeps the keys of tokens that no entry stands at, at their own positions, see `Keys`.

    Attributes:
        length: tokens of the full prompt so far.
        entries: entries stored per row (the widest row's).
        plain: whether so far no token was merged and none is missing.
        gaps: whether an entry, or a token, is missing in some row.
        consecutive: whether positions count merged tokens, so that tokens cannot be told apart any more.
        packed: how the rows of the newest tokens travel as one; None: they do not.
        hidden: bool [B, N], tokens that the present call does not see; None: it sees all.
        report: what the caller says of it; copies have copies.
        sizes: what the caller knows of bytes: of an entry of all rows, by the window of the layers, and of the rest.
        remembered: what the caller knows of its tokens beside, by name.
        interrupted: whether something else that the cache remembers is no longer of these tokens.
        stored_by: the layer of a fast cache that stored keys last, while a call lasts.
    """

    def __init__(self, fast: bool = False) -> None:
        self.fast = fast
        self.reset()

    def reset(self) -> None:
        self._pieces: tuple[Tokens, ...] = ()
        self._later = 0
        self._keys: Keys | None = None
        self.stored_by: Any = None
        self.hidden: Tensor | None = None
        self.packed: Packed | None = None
        self.report: Any = None
        self.sizes: tuple[dict[int | None, int], int] | None = None
        self.remembered = dict[str, Any]()
        self.length = self.entries = 0
        self.interrupted = self.gaps = self.consecutive = False
        self.plain = True

    def _write_later(self) -> tuple[Tokens, ...]:
        """The pieces, and behind them the newest tokens, as many as `_later` says, which so far only the keys knew."""
        if self._later and self._keys is not None:
            keys, later, self._later = self._keys, slice(-self._later, None), 0
            self._pieces = (*self._pieces, Tokens(keys.slot[:, later], keys.place[:, later]))
        return self._pieces

    @property
    def tokens(self) -> Tokens:
        """All so far; there must be some."""
        self._write_later()
        while len(self._pieces) > 1:
            *before, one, two = self._pieces
            self._pieces = (*before, one.then(two))
        return self._pieces[0]

    @property
    def keys(self) -> Keys:
        """All so far that the present call sees; there must be some."""
        if self.hidden is not None:
            tokens = self.tokens
            return Keys.of(replace(tokens, slot=tokens.slot.masked_fill(self.hidden, -1)), self.entries)
        if self._keys is None or (self._keys.inference and not torch.is_inference_mode_enabled()):
            self._keys = Keys.of(self.tokens, self.entries)
        return self._keys

    @property
    def newest(self) -> Tokens:
        """Those that were appended last."""
        return self._write_later()[-1]

    def places(self, present: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
        """int64 [B, N]: where new tokens stand among those that are there, bool [B, N]; None: all are."""
        if present is None and self._keys is not None:
            return self._keys.next_places(tokens)
        if present is None:
            place = torch.arange(tokens, device=device).expand(batch, -1)
        else:
            place = (present.cumsum(1) - 1).clamp(min=0)
        return place + self.newest.place[:, -1:] + 1 if self.length else place

    def append(
        self,
        tokens: TokenMap,
        place: Tensor,
        *,
        plain: bool,
        represents: Tensor | None = None,
        turn: Tensor | None = None,
    ) -> None:
        """Add tokens of the full prompt whose merged forms are about to be stored after the present entries.

        Args:
            place: see `places`.
            plain: whether `tokens` is the identity.
            represents, turn: see `Tokens`.
        """
        if plain and self._keys is not None:
            self._keys, self._later = self._keys.then(tokens.tokens), self._later + tokens.tokens
        else:
            self._write_later()
            slot = tokens.group + self.entries
            slot = torch.where(tokens.group < 0, -1, slot) if tokens.padded else slot
            self._pieces, self._keys = (*self._pieces, Tokens(slot, place, represents, turn)), None
        self.length += tokens.tokens
        self.entries += tokens.width
        self.plain = self.plain and plain
        if not plain and not self.gaps:
            self.gaps = tokens.padded or bool((tokens.kept < tokens.width).any())
        if self.hidden is not None:
            self.hidden = torch.cat((self.hidden, torch.zeros_like(tokens.group, dtype=torch.bool)), 1)

    def hide(self, hidden: Tensor | None) -> None:
        """Of the tokens so far, those that the present call does not see, bool [B, N], such as what stands behind a
        shorter answer; None: it sees all."""
        self.hidden = hidden
        if hidden is not None:
            self.plain, self.gaps = False, True

    def copy(self) -> History:
        """The history so far, which appending to this one leaves as it is."""
        return copy.copy(self)

    def restore(self, earlier: History) -> None:
        """Forget what came after `earlier`, an earlier copy of this history."""
        self.__dict__.update(earlier.__dict__)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.length:
            rows = rows.to(self._pieces[0].slot.device)
            self._pieces = (self.tokens.at(rows),)
            self._keys = None if self._keys is None else self._keys.at(rows)
            self.sizes = None
            self.hidden = None if self.hidden is None else self.hidden[rows]

    def keep(self, kept: Tensor) -> Tensor:
        """Forget some entries, and what they stand for: it is as if these tokens were not there.

        Args:
            kept: bool [B, entries].

        Returns:
            int64 [B, K], which entries are left, in order; past a row's end others that stand for nothing.
        """
        tokens, count = self.tokens, kept.sum(1)
        slot = (kept.cumsum(1) - 1).masked_fill(~kept, -1)
        slot = torch.where(tokens.slot < 0, -1, slot.gather(1, tokens.slot.clamp(min=0)))
        self._pieces, self._keys = (replace(tokens, slot=slot),), None
        self.entries, self.gaps, self.plain = int(count.max()), True, False
        return (~kept).byte().argsort(dim=1, stable=True)[:, : self.entries]

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens, and the entries that only they needed."""
        if length >= self.length:
            return
        self._write_later()
        self._keys = None
        self.hidden = None if self.hidden is None else self.hidden[:, :length]
        if length:
            tokens = self.tokens.at((slice(None), slice(length)))
            self._pieces, self.length = (tokens,), length
            self.entries, self.gaps = int(tokens.slot.max()) + 1, self.gaps or not self.plain
        else:
            self._pieces, self.hidden, self.length, self.entries = (), None, 0, 0
            self.plain, self.gaps, self.consecutive = True, False, False


def pad_turns(turn: Tensor, tokens: int) -> Tensor:
    """Turns [B, T, P] followed by those of tokens that need not turn: [B, tokens, P]."""
    still = turn.new_ones(len(turn), tokens - turn.shape[1], turn.shape[-1])
    return torch.cat((turn, still), 1)
