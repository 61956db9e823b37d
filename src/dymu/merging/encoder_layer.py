"""One encoder layer in two halves, between which tokens merge, and the tokens of a batch on their way through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from dymu.merging.attention import sized_attention
from dymu.merging.layout import Layout
from dymu.merging.match import best_partner, similarity_metric
from dymu.merging.merge import merge_step, merge_tokens
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
        merge_map, layout = merge_step(into, self.layout, prefix)
        x, size = merge_tokens(x, self.size, merge_map, self.layout, layout)
        # No original is dropped, also where a row of `merge_map` is padded.
        return x, MergedTokens(replace(self.map.then(merge_map), padded=self.map.padded), layout, size)
