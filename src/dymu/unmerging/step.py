"""What one forward of the language model must know to attend as if no token had been merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from dymu.token_map import TokenMap
from dymu.unmerging.cache import History

Unmerge = Literal["exact", "compact", "compact-unsized", "none"]
"""How the language model attends to merged tokens.

- `exact`: every token of the full prompt is a virtual token at its own position (VTU, paper section 3.2).
- `compact`: every merged token is one, at the mean position of its group and with log(size) added to the logits of its
  key. Attention is M x M, so it would fit any kernel and any paged cache.
- `compact-unsized`: the same without log(size).
- `none`: every merged token is one, at consecutive positions, as if the prompt had been that short.

Only `exact` gives a prompt that is prefilled in chunks the logits of the whole: elsewhere, what merged stands once in
each chunk.
"""
UNMERGE: tuple[Unmerge, ...] = get_args(Unmerge)
COMPACT: tuple[Unmerge, ...] = ("compact", "compact-unsized")

Angles = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Positions [B, N] -> cosines and sines of their rotary angles, each [B, N, D]."""


@dataclass(frozen=True)
class Step:
    """The virtual tokens of one forward: Nk keys, of which the last Nq are the queries.

    Attributes:
        queries: Nq virtual tokens to the Mq merged ones that this forward computes.
        keys: int64 [B, Nk], the cache entry (without a cache: the merged token) behind each virtual key; -1 for none.
        cos, sin: [B, Nk, D], rotary angles of the virtual tokens.
        place: int64 [B, Nk], what a sliding window counts in: positions, or where merged tokens are virtual ones those.
        expand_queries: whether virtual queries differ from merged ones, in number or order.
        expand_keys: the same of the keys.
        padded: whether some rows have fewer tokens than others.
        bias: float32 [B, Nk], added to the logits of each virtual key; None for 0.
    """

    queries: TokenMap
    keys: Tensor
    cos: Tensor
    sin: Tensor
    place: Tensor
    expand_queries: bool
    expand_keys: bool
    padded: bool
    backend: str
    bias: Tensor | None = None
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None = None) -> Tensor | None:
        """[B or 1, 1, Nq, Nk]: which key each query sees (bool) or, with a bias, what is added to its logit (float32);
        None where plain causal attention over equally many queries and keys, or one query that sees every key, says
        the same.

        Args:
            window: sliding window in virtual tokens, or None.
        """
        tokens, seen = self.queries.tokens, self.keys.shape[1]
        if window is not None and window >= seen:
            window = None
        if window not in self._masks:
            mask = self._mask(tokens, seen, window)
            self._masks[window] = mask if self.bias is None else self._biased(mask, self.bias)
        return self._masks[window]

    def _mask(self, tokens: int, seen: int, window: int | None) -> Tensor | None:
        if not self.padded and window is None and (tokens == 1 or (tokens == seen and self.bias is None)):
            return None
        key = torch.arange(seen, device=self.keys.device)
        mask = (key <= key[seen - tokens :, None])[None]
        if window is not None:
            mask = mask & (self.place[:, seen - tokens :, None] - self.place[:, None] < window)
        if self.padded:
            mask = mask & (self.keys >= 0)[:, None]
            mask = mask | (self.queries.group < 0)[:, :, None]
        return mask[:, None]

    def _biased(self, mask: Tensor | None, bias: Tensor) -> Tensor:
        bias = bias[:, None, None]
        return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


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
        unmerge: see `Unmerge`. But for `exact`, a sliding window counts merged tokens.
        backend: name of the backend to compute it with.
    """
    history.append(queries, positions, plain)
    assert history.slot is not None
    assert history.position is not None
    keys, positions, bias = history.slot, history.position, None
    place = positions
    padded, expand_keys = history.padded, not history.plain
    if unmerge != "exact" and expand_keys:
        entries = TokenMap(keys, queries.kept, history.entries, padded)
        size = entries.size()
        if unmerge in COMPACT:
            positions = entries.average(positions.double()).float()
        else:
            positions = ((size > 0).cumsum(1) - 1).clamp(min=0)
        if unmerge == "compact":
            bias = size.clamp(min=1).log()
        keys = torch.where(size > 0, torch.arange(history.entries, device=size.device), -1)
        place = (keys >= 0).cumsum(1)
        queries = _merged_tokens(queries)
        padded = expand_keys = bool((keys < 0).any())
        plain = not queries.padded
    cos, sin = angles(positions)
    return Step(queries, keys, cos, sin, place, not plain, expand_keys, padded, backend, bias)


def _merged_tokens(queries: TokenMap) -> TokenMap:
    """Each merged token of `queries` as a token of its own."""
    own = torch.arange(queries.width, device=queries.group.device).expand(queries.batch, -1)
    group = torch.where(own < queries.kept[:, None], own, -1)
    return TokenMap(group, queries.kept, queries.width, bool((group < 0).any()))
