"""One encoder layer that merges between its attention and its MLP, and the run of a batch through all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from dymu.merging.attention import sized_attention
from dymu.merging.layout import Layout
from dymu.merging.match import best_partner, similarity_metric
from dymu.merging.merge import merge_step, merge_tokens, reduce_tokens
from dymu.merging.rule import Chooser, MergeRule, Reduction
from dymu.token_map import TokenMap


@dataclass(frozen=True)
class EncoderLayer:
    """The parts of one encoder layer, computed for inference (no dropout)."""

    norm1: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    out: nn.Module
    after_attention: tuple[nn.Module, ...]
    norm2: nn.Module
    mlp: nn.Module
    after_mlp: tuple[nn.Module, ...]
    heads: int

    def attend(self, x: Tensor, state: MergedTokens) -> tuple[Tensor, Tensor]:
        """The attention half of the layer.

        Args:
            x: tokens, in the state's layout, with C channels.
            state: which tokens there are, and how many each stands for.

        Returns:
            Tokens after the residual, and the [..., H, D] keys of the attention, both in the same layout.
        """
        normed, layout = self.norm1(x), state.layout
        key = self.key(normed)
        by_head = (
            [rows.unflatten(-1, (self.heads, -1)).transpose(1, 2) for rows in layout.split(part)]
            for part in (self.query(normed), key, self.value(normed))
        )
        buckets = zip(*by_head, state.log_sizes, strict=True)
        attended = layout.join([sized_attention(*bucket).transpose(1, 2).flatten(2) for bucket in buckets])
        update = self.out(attended)
        for module in self.after_attention:
            update = module(update)
        return x + update, key.unflatten(-1, (self.heads, -1))

    def feed_forward(self, x: Tensor) -> Tensor:
        """The MLP half of the layer, for tokens in any layout."""
        update: Tensor = self.mlp(self.norm2(x))
        for module in self.after_mlp:
            update = module(update)
        return x + update


@dataclass(frozen=True, eq=False)
class MergedTokens:
    """A batch of images part way through the encoder: which tokens are left and how many each stands for."""

    map: TokenMap
    layout: Layout
    """How the tokens travel."""
    size: Tensor | None = None
    """float32, in that layout; None while every token stands for itself."""

    @classmethod
    def unmerged(cls, embedded: Tensor) -> MergedTokens:
        """Of [B, T, C] embedded images."""
        batch, tokens = embedded.shape[:2]
        return cls(TokenMap.identity(batch, tokens, embedded.device), Layout.equal(batch, tokens, embedded.device))

    @cached_property
    def log_sizes(self) -> list[Tensor | None]:
        """What attention adds to the logits of each key: float32 [b, t] for each bucket of the layout, -inf past an
        image's end; None: all 0."""
        if self.size is None:
            return [None]
        buckets = zip(self.layout.split(self.size.log()), self.layout.absent(), strict=True)
        return [rows if absent is None else rows.masked_fill_(absent, -torch.inf) for rows, absent in buckets]

    def match(self, keys: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
        """Similarity and partner of each A token, see `best_partner`; `keys` are [..., H, D] in the layout."""
        return best_partner(similarity_metric(keys), self.layout, prefix)

    def merge(self, x: Tensor, into: Tensor, prefix: int) -> tuple[Tensor, MergedTokens]:
        """Merge the A tokens of x, in the layout, into their partners `into`, see `merge_step`."""
        step, layout = merge_step(into, self.layout, prefix)
        x, size = merge_tokens(x, self.size, step, self.layout, layout)
        # No original goes, also where a row of `step` is padded.
        return x, MergedTokens(replace(self.map.then(step), padded=self.map.padded), layout, size)


class MergeRun:
    """One batch on its way through the encoder.

    Args:
        rule: which tokens merge.
        depth: encoder layers that run and may merge, from the first on.
        prefix: leading tokens that never merge.
    """

    def __init__(self, rule: MergeRule, depth: int, prefix: int) -> None:
        self.rule, self.depth, self.prefix = rule, depth, prefix
        self.states: list[MergedTokens] = []
        self._choosers: list[Chooser | None] = []

    def layer(self, index: int, layer: EncoderLayer, x: Tensor) -> Tensor:
        """Run encoder layer `index` on what the layer before it gave.

        Fewer tokens may come out. Between layers they travel as the states' layouts say; the last of `depth` gives
        [B, T, C] again, and those past it give back what they are given, since nobody reads their features.
        """
        if index == 0:
            self.states = [MergedTokens.unmerged(x)]
            self._choosers = list(self.rule.choosers(x.shape[1] - self.prefix, self.depth))
        state = self.states[-1]
        if index < self.depth:
            x, keys = layer.attend(x, state)
            chooser = self._choosers[index]
            if chooser is not None:
                similarity, partner = state.match(keys, self.prefix)
                x, state = state.merge(x, chooser(similarity, partner), self.prefix)
            x = layer.feed_forward(x)
        if index + 1 == self.depth:
            x = state.layout.pad(x)
            if isinstance(self.rule, Reduction):
                step = self.rule.reduction(len(x), x.shape[1] - self.prefix, x.device).after(self.prefix)
                x, _ = reduce_tokens(x, state.map.size(), step)
                state = MergedTokens(state.map.then(step), Layout.of(step.kept))
        self.states.append(state)
        return x

    @property
    def map(self) -> TokenMap:
        """Encoder tokens, prefix included, to those that are left."""
        return self.states[-1].map

    def in_final_tokens(self, hidden: Tensor, layers: int) -> Tensor:
        """Average what the first `layers` layers gave down to the tokens left at the end, [B, M, C]."""
        if layers >= self.depth:
            return hidden
        state, final = self.states[layers], self.map
        hidden = state.layout.pad(hidden)
        if state.map is final:
            return hidden
        group = final.group.gather(1, state.map.first())
        onward = TokenMap(torch.where(state.layout.present, group, -1), final.kept, final.width, padded=True)
        return reduce_tokens(hidden, state.map.size(), onward)[0]
