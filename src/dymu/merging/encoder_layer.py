"""One encoder layer in two halves, between which tokens merge, and the tokens of a batch on their way through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dymu.merging.attention import sized_attention
from dymu.merging.layout import Layout
from dymu.merging.match import best_partner, halves, similarity_metric
from dymu.merging.merge import merge_step, merge_tokens
from dymu.merging.units import Units
from dymu.token_map import TokenMap, at_least_float32, take

Angles = tuple[Tensor, Tensor]
"""Cosines and sines [..., D] of the rotary angles of tokens, both halves alike, as the tokens travel."""


@dataclass(frozen=True)
class EncoderLayer:
    """The parts of one encoder layer, computed for inference (no dropout).

    Attributes:
        projections: the query, key and value projections, or the one that does all three, one after the other.
        norms: of queries, keys and values; None: there is none.
        norms_heads: whether these norms go over each head, or over all channels.
        after_attention, after_mlp: what the two updates go through; parameters are factors.
    """

    norm1: nn.Module
    projections: tuple[nn.Module, ...]
    norms: tuple[nn.Module | None, nn.Module | None, nn.Module | None]
    norms_heads: bool
    out: nn.Module
    after_attention: tuple[nn.Module | Tensor, ...]
    norm2: nn.Module
    mlp: nn.Module
    after_mlp: tuple[nn.Module | Tensor, ...]
    heads: int
    turning: int = 1
    """Parts of each head, each of which rotates its own two halves."""
    scaling: float | None = None
    """Factor on the logits; None: one over the root of the head's size."""

    def attend(self, x: Tensor, state: MergedTokens, windowed: bool = False) -> tuple[Tensor, Tensor]:
        """The attention half of the layer.

        Args:
            x: patches, in the state's layout, with C channels.
            state: which tokens there are, and how many each stands for.
            windowed: whether tokens attend within their windows, and not within the whole image.

        Returns:
            Patches after the residual, and the [..., H, D] keys of the attention ahead of norms and rotation, both in
            the same layout.
        """
        projected = self.project(self.norm1(x))
        query, key, value = self._turned(projected, state)
        rows = state.rows(windowed)
        by_head = (
            [
                bucket.transpose(1, 2)
                for bucket in rows.patches.split(part.reshape(*rows.patches.shape, *part.shape[2:]))
            ]
            for part in (query, key, value)
        )
        buckets = zip(*by_head, rows.log_sizes, strict=True)
        attended = rows.patches.join(
            [
                sized_attention(q, k, v, log_size, scaling=self.scaling).transpose(1, 2).flatten(2)
                for q, k, v, log_size in buckets
            ]
        )
        update = _through(self.after_attention, self.out(attended.view(*x.shape[:2], -1)))
        return x + update, projected[1]

    def asked(self, x: Tensor, state: MergedTokens) -> tuple[Tensor, Tensor]:
        """The queries [..., H, D] and keys [..., Hkv, D] that attend, with norms and rotation; see `attend`."""
        query, key, _ = self._turned(self.project(self.norm1(x)), state)
        return query, key

    def feed_forward(self, x: Tensor) -> Tensor:
        """The MLP half of the layer, for tokens in any layout."""
        update: Tensor = self.mlp(self.norm2(x))
        return x + _through(self.after_mlp, update)

    def project(self, normed: Tensor) -> tuple[Tensor, ...]:
        """Queries [..., H, D], and keys and values [..., Hkv, D], which may have fewer heads."""
        if len(self.projections) > 1:
            query, key, value = (part(normed) for part in self.projections)
        else:
            (fused,) = self.projections
            if isinstance(fused, nn.MultiheadAttention):
                projected = linear(normed, fused.in_proj_weight, fused.in_proj_bias)
            else:
                projected = fused(normed)
            shared = (projected.shape[-1] - normed.shape[-1]) // 2
            query, key, value = projected.split((normed.shape[-1], shared, shared), -1)
        size = query.shape[-1] // self.heads
        return tuple(part.unflatten(-1, (-1, size)) for part in (query, key, value))

    def _turned(self, projected: tuple[Tensor, ...], state: MergedTokens) -> tuple[Tensor, ...]:
        query, key, value = map(self._normed, self.norms, projected)
        if state.angles is not None:
            query, key = (rotated(part, state.angles, self.turning) for part in (query, key))
        return query, key, value

    def _normed(self, norm: nn.Module | None, x: Tensor) -> Tensor:
        if norm is None:
            return x
        normed: Tensor = norm(x) if self.norms_heads else norm(x.flatten(-2)).view_as(x)
        return normed


def _through(parts: Sequence[nn.Module | Tensor], update: Tensor) -> Tensor:
    for part in parts:
        update = update * part if isinstance(part, Tensor) else part(update)
    return update


def rotated(x: Tensor, angles: Angles, parts: int = 1) -> Tensor:
    """Rotate [..., H, D] queries or keys in float32 or wider: elements i and i + D / 2 together, or the like of each of
    so many parts of D."""
    cos, sin = (part.unsqueeze(-2) for part in angles)
    wide = at_least_float32(x)
    first, second = wide.unflatten(-1, (parts, -1)).chunk(2, -1)
    return (wide * cos + torch.cat((-second, first), -1).flatten(-2) * sin).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Rows:
    """Who attends to whom in a layer, and who may merge with whom: the tokens of an image, or of a window.

    Attributes:
        units: the layout of their tokens.
        patches: the layout of the patches of these.
        log_sizes: what attention adds to the logits of each key: float32 [b, t] for each bucket of `patches`, -inf past
            a row's end; None: all 0.
    """

    units: Layout
    patches: Layout
    log_sizes: list[Tensor | None]


@dataclass(frozen=True, eq=False)
class MergedTokens:
    """A batch of images part way through the encoder: which tokens are left and how many each stands for.

    Attributes:
        map: from each image's tokens (units) ahead of the first layer.
        layout: how the tokens travel, image by image.
        size: float32, in that layout; None while every token stands for itself.
        units: how many patches a token is.
        angles: of the patches, where the encoder rotates; those of a merged token are the means over its group.
        window: int64 [S], the window that each token stands in, rising; None: there are no windows.
    """

    map: TokenMap
    layout: Layout
    size: Tensor | None = None
    units: Units = field(default_factory=Units)
    angles: Angles | None = None
    window: Tensor | None = None

    @classmethod
    def unmerged(
        cls, layout: Layout, units: Units | None = None, angles: Angles | None = None, window: Tensor | None = None
    ) -> MergedTokens:
        """Of images as they are embedded."""
        tokens = TokenMap.identity(layout.batch, layout.longest, layout.length.device)
        if layout.packed:
            tokens = TokenMap(torch.where(layout.present, tokens.group, -1), layout.length, layout.longest, padded=True)
        return cls(tokens, layout, None, units or Units(), angles, window)

    def some(self, x: Tensor, tokens: TokenMap, enters: Tensor) -> tuple[Tensor, MergedTokens]:
        """Of patches as they travel, ahead of the first layer, those that enter it; each unit that does weighs as much
        as all that it stands for.

        Args:
            tokens: from these units.
            enters: int64 [images, M], the unit that enters for each of the M, rising.
        """
        layout = Layout.of(tokens.kept)

        def taken(part: Tensor) -> Tensor:
            return layout.pack(take(self.layout.pad(part), enters))

        x, *angles = (
            self.units.spread(taken(self.units.gather(part, self.layout)), layout) for part in (x, *(self.angles or ()))
        )
        window = None if self.window is None else taken(self.window.view(self.layout.shape)).flatten()
        turns = (angles[0], angles[1]) if angles else None
        return x, MergedTokens(tokens, layout, layout.pack(tokens.size()), self.units, turns, window)

    @cached_property
    def patches(self) -> Layout:
        """How the patches travel."""
        return self.units.of_patches(self.layout)

    def rows(self, windowed: bool) -> Rows:
        """Within which tokens attend and merge."""
        return self._windows if windowed else self._images

    @cached_property
    def _images(self) -> Rows:
        return self._rows(self.layout)

    @cached_property
    def _windows(self) -> Rows:
        assert self.window is not None
        return self._rows(Layout.of(torch.unique_consecutive(self.window, return_counts=True)[1]))

    def _rows(self, units: Layout) -> Rows:
        patches = self.units.of_patches(units)
        absents = patches.absent()
        logs: list[Tensor | None]
        if self.size is None:
            logs = [None if absent is None else torch.zeros_like(absent, dtype=torch.float32) for absent in absents]
        else:
            logs = [*patches.split(self.units.repeat(self.size.log(), self.layout).view(patches.shape))]
        pairs = zip(logs, absents, strict=True)
        masked = [x if x is None or absent is None else x.masked_fill(absent, -torch.inf) for x, absent in pairs]
        return Rows(units, patches, masked)

    def picture(self, windowed: bool) -> Tensor:
        """int64 [rows], the image that each of the `rows` is of."""
        begins = self.rows(windowed).units.start[:, 0]
        return torch.searchsorted(self.layout.length.cumsum(0), begins, right=True)

    def match(
        self, keys: Tensor, prefix: int, windowed: bool = False, apart: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Similarity and partner of each A token of every row, see `best_partner`; `keys` are [..., H, D] of patches,
        as they travel."""
        rows = self.rows(windowed).units
        metric = similarity_metric(self.units.metric(keys, self.layout))
        return best_partner(metric.reshape(*rows.shape, -1), rows, prefix, apart)

    def merge(
        self, x: Tensor, into: Tensor, prefix: int, windowed: bool = False, still: Tensor | None = None
    ) -> tuple[Tensor, MergedTokens]:
        """Merge the A tokens of every row of x, patches as they travel, into their partners, see `merge_step`."""
        rows = self.rows(windowed).units
        merge_map, after = merge_step(into, rows, prefix, still)
        goal = rows.pack(after.index(merge_map.group)).flatten()
        window = None
        if self.window is not None:
            merge_map, after, goal, window = self._with_windows(goal, after, into, prefix, rows)
        travelling = [self.units.gather(part, self.layout) for part in (x, *(self.angles or ()))]
        means, size = merge_tokens(travelling, self.size, goal, after)
        x, *angles = (self.units.spread(part, after) for part in means)
        # No original is dropped, also where a row of `merge_map` is padded.
        merged = replace(self.map.then(merge_map), padded=self.map.padded)
        state = MergedTokens(merged, after, size, self.units, (angles[0], angles[1]) if angles else None, window)
        return x, state

    def _with_windows(
        self, goal: Tensor, after: Layout, into: Tensor, prefix: int, rows: Layout
    ) -> tuple[TokenMap, Layout, Tensor, Tensor]:
        """A merge of `rows`, where each merged token stands in the window of the partner: as a map of images, with the
        layout of these, where each token goes, and the windows after it."""
        assert self.window is not None
        in_a, _ = halves(prefix)
        merges = torch.zeros(rows.batch, rows.longest, dtype=torch.bool, device=goal.device)
        merges[:, in_a] = into >= 0
        stands = ~rows.pack(merges).flatten()
        window = torch.empty(after.total, dtype=torch.long, device=goal.device)
        window[goal[stands]] = self.window[stands]
        window, order = window.sort(stable=True)
        goal = order.argsort()[goal]
        ends = self.layout.length.cumsum(0)
        image = torch.searchsorted(ends, torch.arange(len(goal), device=goal.device)[stands], right=True)
        layout = Layout.of(torch.bincount(image, minlength=self.layout.batch))
        group = self.layout.pad(goal.view(self.layout.shape)) - layout.start
        if self.layout.packed:
            group = group.masked_fill(~self.layout.present, -1)
        return TokenMap(group, layout.length, layout.longest, self.layout.packed), layout, goal, window
