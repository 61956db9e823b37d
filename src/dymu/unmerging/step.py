"""What one forward of the language model must know to attend as if no token had been merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from dymu.token_map import TokenMap
from dymu.unmerging.cache import History

Unmerge = Literal["exact", "none"]
UNMERGE: tuple[Unmerge, ...] = get_args(Unmerge)

Angles = Callable[[Tensor], tuple[Tensor, Tensor]]
"""int64 positions [B, N] -> cosines and sines of their rotary angles, each [B, N, D]."""


@dataclass(frozen=True)
class Step:
    """The virtual tokens of one forward: Nk keys, of which the last Nq are the queries.

    Attributes:
        queries: Nq virtual tokens to the Mq merged ones that this forward computes.
        keys: int64 [B, Nk], the cache entry (without a cache: the merged token) behind each virtual key; -1 for none.
        cos, sin: [B, Nk, D], rotary angles of the virtual tokens.
        expand_queries: whether virtual queries differ from merged ones, in number or order.
        expand_keys: the same of the keys.
        padded: whether some rows have fewer tokens than others.
    """

    queries: TokenMap
    keys: Tensor
    cos: Tensor
    sin: Tensor
    expand_queries: bool
    expand_keys: bool
    padded: bool
    backend: str
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None = None) -> Tensor | None:
        """bool [B or 1, 1, Nq, Nk]: which key each query sees; None where plain causal attention over equally many
        queries and keys, or one query that sees every key, says the same.

        Args:
            window: sliding window in tokens of the full prompt, or None.
        """
        tokens, seen = self.queries.tokens, self.keys.shape[1]
        if window is not None and window >= seen:
            window = None
        if window not in self._masks:
            self._masks[window] = self._mask(tokens, seen, window)
        return self._masks[window]

    def _mask(self, tokens: int, seen: int, window: int | None) -> Tensor | None:
        if not self.padded and window is None and tokens in (1, seen):
            return None
        key = torch.arange(seen, device=self.keys.device)
        query = key[seen - tokens :, None]
        mask = key <= query
        if window is not None:
            mask &= query - key < window
        mask = mask[None, None]
        if self.padded:
            mask = mask & (self.keys >= 0)[:, None, None]
            mask = mask | (self.queries.group < 0)[:, None, :, None]
        return mask


def plan_step(
    queries: TokenMap,
    positions: Tensor,
    history: History,
    angles: Angles,
    *,
    plain: bool,
    unmerge: Unmerge,
    backend: str,
) -> Step:
    """Add new tokens to the history and say how they attend.

    Args:
        queries: the new tokens of the full prompt to their merged ones.
        positions: int64 [B, N], rotary positions of the new tokens.
        history: what the cache holds; the new tokens are appended.
        angles: rotary angles of positions.
        plain: whether `queries` is the identity.
        unmerge: `exact`: one virtual token for each token of the full prompt. `none`: one for each merged token, at
            consecutive positions, as if the prompt had been that short.
        backend: name of the backend to compute it with.
    """
    history.append(queries, positions, plain)
    assert history.slot is not None
    assert history.position is not None
    keys, positions = history.slot, history.position
    padded, expand_keys = history.padded, not history.plain
    if unmerge == "none" and expand_keys:
        queries, keys, positions = _merged_tokens(queries, history)
        padded = expand_keys = bool((keys < 0).any())
        plain = not queries.padded
    cos, sin = angles(positions)
    return Step(queries, keys, cos, sin, not plain, expand_keys, padded, backend)


def _merged_tokens(queries: TokenMap, history: History) -> tuple[TokenMap, Tensor, Tensor]:
    """Queries, keys and consecutive positions when every merged token is a virtual token."""
    assert history.slot is not None
    batch, device = queries.batch, queries.group.device
    stored = torch.zeros(batch, history.entries + 1, dtype=torch.bool, device=device)
    stored = stored.scatter(1, history.slot % (history.entries + 1), True)[:, :-1]
    keys = torch.where(stored, torch.arange(history.entries, device=device), -1)
    own = torch.arange(queries.width, device=device).expand(batch, -1)
    group = torch.where(own < queries.kept[:, None], own, -1)
    padded = bool((group < 0).any())
    return (
        TokenMap(group, queries.kept, queries.width, padded),
        keys,
        (stored.cumsum(1) - 1).clamp(min=0),
    )
