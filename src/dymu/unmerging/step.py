"""What one forward of the language model must know to attend as if no token had been merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from dymu.choices import COMPACT, Unmerge
from dymu.token_map import TokenMap
from dymu.unmerging.history import History
from dymu.unmerging.virtual import as_phase

Angles = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Positions [B, N], or [B, N, axes] -> cosines and sines of their rotary angles, each [B, N, D]."""

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """The virtual tokens of one forward: Nk keys, of which the last Nq are the queries, in the order in which they see
    each other.

    Attributes:
        queries: Nq virtual tokens to the Mq merged ones that this forward computes.
        keys: int64 [B, Nk], the cache entry (without a cache: the merged token) behind each virtual key; -1 for none.
        phase: complex [B, Nk, D / 2], cos + i sin of the rotary angles of the virtual tokens.
        place: int64 [B, Nk], what a sliding window counts in: tokens that are there; for `compact`, `original` and
            `none`, merged ones.
        expand_queries: whether virtual queries differ from merged ones, in number or order.
        expand_keys: whether virtual keys differ from cache entries, in number or order.
        padded: whether absent keys (-1) may come before present ones; if not, causality hides them.
        rotated: whether the cache holds keys and values of virtual tokens, the keys rotated (`cache="expanded"`).
        bias: float32 [B, Nk], added to the logits of each virtual key; None for 0.
        block: int64 [B, Nq]: queries with the same number see each other's keys, also later ones; -1: there are none.
            None: no query has any.
        beyond_window: whether they do wherever these are, and not within a sliding window alone.
    """

    queries: TokenMap
    keys: Tensor
    phase: Tensor
    place: Tensor
    expand_queries: bool
    expand_keys: bool
    padded: bool
    backend: str
    rotated: bool = False
    bias: Tensor | None = None
    block: Tensor | None = None
    beyond_window: bool = False
    _results: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def once(self, name: Any, compute: Callable[[], T]) -> T:
        """What `compute` returns, computed in the first decoder layer that asks for `name` and kept for the others."""
        if name not in self._results:
            self._results[name] = compute()
        result: T = self._results[name]
        return result

    @property
    def query_phase(self) -> Tensor:
        """complex [B, Nq, D / 2]"""
        return self.phase[:, self.phase.shape[1] - self.queries.tokens :]

    @property
    def cos(self) -> Tensor:
        """[B, Nk, D], both halves alike."""
        return torch.cat((self.phase.real, self.phase.real), -1)

    @property
    def sin(self) -> Tensor:
        """[B, Nk, D], both halves alike."""
        return torch.cat((self.phase.imag, self.phase.imag), -1)

    def causal(self, window: int | None = None) -> bool:
        """Whether plain causal attention over equally many queries and keys, or one query that sees every key, is all
        that a mask could say.

        Args:
            window: sliding window in virtual tokens, or None.
        """
        tokens, seen = self.queries.tokens, self.keys.shape[1]
        whole = window is None or window >= seen
        plain = self.bias is None and self.block is None and not self.padded
        return whole and plain and (tokens == 1 or tokens == seen)

    def sees(self, start: int, end: int) -> int:
        """How many keys, from the first on, any of the queries from `start` to `end` may see."""
        before = self.keys.shape[1] - self.queries.tokens
        if self.block is None:
            return before + end
        ends: list[int] = self.once("block ends", lambda: _ends(self.block).tolist())  # type: ignore[arg-type]
        return before + max(ends[start:end])

    def mask(self, window: int | None = None, start: int = 0, end: int | None = None) -> Tensor:
        """[B or 1, 1, end - start, keys]: which key each of the queries from `start` to `end` sees (bool) or, with a
        bias, what is added to its logit (float32). Of the keys, those up to the last that any of these queries sees.

        Args:
            window: sliding window in virtual tokens, or None.
        """
        tokens, seen = self.queries.tokens, self.keys.shape[1]
        end = tokens if end is None else end
        first, last, sees = seen - tokens + start, seen - tokens + end, self.sees(start, end)
        key = torch.arange(sees, device=self.keys.device)
        mask = (key <= key[first:last, None])[None]
        block = None
        if self.block is not None:
            own = self.block[:, start:end, None]
            others = pad(self.block, (seen - tokens, 0), value=-1)[:, None, :sees]
            block = (own >= 0) & (own == others)
            mask = mask | block
        if window is not None and window < seen:
            near = self.place[:, None, :sees] > self.place[:, first:last, None] - window
            mask = mask & (near if block is None or not self.beyond_window else near | block)
        if self.padded:
            mask = mask & (self.keys[:, None, :sees] >= 0)
            mask = mask | (self.queries.group[:, start:end] < 0)[:, :, None]
        if self.bias is not None:
            mask = self.bias[:, None, :sees].masked_fill(~mask, -torch.inf)
        return mask[:, None]


def plan_step(
    queries: TokenMap,
    positions: Tensor,
    history: History,
    angles: Angles,
    *,
    plain: bool,
    unmerge: Unmerge,
    backend: str,
    place: Tensor | None = None,
    block: Tensor | None = None,
    beyond_window: bool = False,
) -> Step:
    """Add new tokens to the history and say how they attend.

    Args:
        queries: the new tokens of the full prompt to their merged ones.
        positions: int64 [B, N], or [B, N, axes], rotary positions of the new tokens.
        history: what the cache holds; the new tokens are appended.
        angles: rotary angles of positions.
        plain: whether `queries` is the identity.
        unmerge: see `Unmerge`.
        backend: name of the backend to compute it with.
        place: int64 [B, N], see `History.places`; None: the positions.
        block, beyond_window: int64 [B, N], see `Step`.
    """
    first = history.length == 0
    if block is not None:
        block = block.masked_fill(queries.group < 0, -1)
    if unmerge != "exact" and not (plain and history.plain):
        return _merged_tokens(queries, positions, history, angles, plain, unmerge, backend, place, block, beyond_window)
    if history.length and history.phase is None:
        assert history.position is not None
        history.phase = as_phase(*angles(history.position))
    keys, place = history.append(queries, positions, plain, as_phase(*angles(positions)), place)
    assert history.phase is not None
    step = Step(
        queries,
        keys,
        history.phase,
        place,
        expand_queries=not plain,
        expand_keys=not (history.plain or history.expanded),
        padded=history.padded,
        backend=backend,
        rotated=history.expanded,
        block=block,
        beyond_window=beyond_window,
    )
    return _absent_last(step) if first and step.padded and not step.rotated else step


def _merged_tokens(
    queries: TokenMap,
    positions: Tensor,
    history: History,
    angles: Angles,
    plain: bool,
    unmerge: Unmerge,
    backend: str,
    place: Tensor | None,
    block: Tensor | None,
    beyond_window: bool,
) -> Step:
    """Every merged token is one virtual token."""
    first = history.length == 0
    slot, _ = history.append(queries, positions, plain, place=place)
    entries = TokenMap(slot, queries.kept, history.entries, history.padded)
    size = entries.size()
    rank = (size > 0).cumsum(1)
    if unmerge in COMPACT:
        assert history.position is not None
        positions = entries.average(history.position.double()).float()
    else:
        positions = (rank - 1).clamp(min=0)
        positions = positions if history.position is None or history.position.ndim == 2 else positions[..., None]
    keys = torch.where(size > 0, torch.arange(history.entries, device=size.device), -1)
    group = torch.arange(queries.width, device=keys.device).expand(queries.batch, -1)
    group = torch.where(group < queries.kept[:, None], group, -1)
    ragged = bool((group < 0).any())
    if block is not None:
        block = block.gather(1, queries.first()).masked_fill(group < 0, -1)
    return Step(
        TokenMap(group, queries.kept, queries.width, ragged),
        keys,
        as_phase(*angles(positions)),
        rank,
        expand_queries=ragged,
        expand_keys=False,
        padded=not first and bool((keys < 0).any()),
        backend=backend,
        bias=size.clamp(min=1).log() if unmerge == "compact" else None,
        block=block,
        beyond_window=beyond_window,
    )


def _absent_last(step: Step) -> Step:
    """The same virtual tokens with the absent ones behind the others, so that causality alone hides them."""
    order = (step.keys < 0).int().argsort(dim=1, stable=True)
    return replace(
        step,
        queries=replace(step.queries, group=step.queries.group.gather(1, order)),
        keys=step.keys.gather(1, order),
        phase=step.phase.gather(1, order[..., None].expand_as(step.phase)),
        place=step.place.gather(1, order),
        block=None if step.block is None else step.block.gather(1, order),
        expand_queries=True,
        expand_keys=True,
        padded=False,
    )


def _ends(block: Tensor) -> Tensor:
    """int64 [N]: of the tokens that have a block [B, N] in any row, behind its last token; of others, behind them."""
    index = torch.arange(block.shape[1], device=block.device).expand_as(block)
    numbers = torch.where(block < 0, 0, block + 1)
    last = torch.zeros(len(block), int(numbers.max()) + 1, dtype=torch.long, device=block.device)
    last = last.scatter_reduce(1, numbers, index, "amax")
    return torch.where(block < 0, index, last.gather(1, numbers)).amax(0) + 1
