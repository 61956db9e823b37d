"""One encoder layer that merges between its attention and its MLP, and the run of a batch through all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dymu.merging.match import best_partner, similarity_metric
from dymu.merging.merge import merge_map, merge_tokens
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

    def attend(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The attention half of the layer.

        Args:
            x: [B, T, C] tokens.
            bias: [B, 1, 1, T] added to every query's logits (the log of each key's size), or None.

        Returns:
            [B, T, C] tokens after the residual, and the [B, T, H, D] keys of the attention.
        """
        normed = self.norm1(x)
        query, key, value = (
            project(normed).unflatten(-1, (self.heads, -1)) for project in (self.query, self.key, self.value)
        )
        attended = scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias
        )
        update = self.out(attended.transpose(1, 2).flatten(2))
        for module in self.after_attention:
            update = module(update)
        return x + update, key

    def feed_forward(self, x: Tensor) -> Tensor:
        """The MLP half of the layer, [B, T, C] to [B, T, C]."""
        update: Tensor = self.mlp(self.norm2(x))
        for module in self.after_mlp:
            update = module(update)
        return x + update


@dataclass(frozen=True)
class MergedTokens:
    """A batch of images part way through the encoder: which tokens are left and how many each stands for."""

    map: TokenMap
    size: Tensor | None = None
    """float32 [B, T]; None while every token stands for itself."""

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """log(size) as an additive attention bias [B, 1, 1, T]; -inf past a row's end; None when it would be all 0."""
        return None if self.size is None else self.size.log()[:, None, None].to(dtype)

    def match(self, keys: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
        """Similarity and partner of each A token, see `best_partner`; `keys` are [B, T, H, D]."""
        length = self.map.kept - prefix if self.ragged else None
        return best_partner(similarity_metric(keys, prefix), length)

    def merge(self, x: Tensor, into: Tensor, prefix: int) -> tuple[Tensor, MergedTokens]:
        """Merge the A tokens of x [B, T, C] into their partners `into`, see `merge_map`."""
        return self.take(x, merge_map(into, self.map.kept, x.shape[1], prefix))

    def take(self, x: Tensor, step: TokenMap) -> tuple[Tensor, MergedTokens]:
        """Merge x [B, T, C] as `step` says."""
        size = torch.ones(x.shape[:2], device=x.device) if self.size is None else self.size
        x, size = merge_tokens(x, size, step)
        return x, MergedTokens(self.map.then(step), size)

    @property
    def ragged(self) -> bool:
        """Whether rows may have different lengths."""
        return self.size is not None and self.map.batch > 1


class MergeRun:
    """One batch on its way through the encoder.

    Args:
        rule: which tokens merge.
        depth: encoder layers that merge, from the first on.
        prefix: leading tokens that never merge.
    """

    def __init__(self, rule: MergeRule, depth: int, prefix: int) -> None:
        self.rule, self.depth, self.prefix = rule, depth, prefix
        self.states: list[MergedTokens] = []
        self._choosers: list[Chooser | None] = []

    def layer(self, index: int, layer: EncoderLayer, x: Tensor) -> Tensor:
        """Run encoder layer `index` on x [B, T, C]; fewer tokens may come out."""
        if index == 0:
            self.states = [MergedTokens(TokenMap.identity(x.shape[0], x.shape[1], x.device))]
            self._choosers = list(self.rule.choosers(x.shape[1] - self.prefix, self.depth))
        state = self.states[-1]
        x, keys = layer.attend(x, state.bias(x.dtype))
        chooser = self._choosers[index] if index < self.depth else None
        if chooser is not None:
            similarity, partner = state.match(keys, self.prefix)
            x, state = state.merge(x, chooser(similarity, partner), self.prefix)
        x = layer.feed_forward(x)
        if index + 1 == self.depth and isinstance(self.rule, Reduction):
            step = self.rule.reduction(len(x), x.shape[1] - self.prefix, x.device).after(self.prefix)
            x, state = state.take(x, step)
        self.states.append(state)
        return x

    @property
    def map(self) -> TokenMap:
        """Encoder tokens, prefix included, to those that are left."""
        return self.states[-1].map

    def in_final_tokens(self, hidden: Tensor, layers: int) -> Tensor:
        """Average the [B, T, C] output of the first `layers` layers down to the tokens left at the end."""
        if self.states[layers] is self.states[-1]:
            return hidden
        early, final = self.states[layers].map, self.map
        group = final.group.gather(1, early.first())
        absent = torch.arange(early.width, device=group.device)[None] >= early.kept[:, None]
        onward = TokenMap(torch.where(absent, -1, group), final.kept, final.width, padded=True)
        return merge_tokens(hidden, early.size(), onward)[0]
