"""Unmerging once more, by transformers' own code and a mean over each group; of the library, only descriptions."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

import tiny
from dymu.families.resolve import resolve


def unmerged_by_hand(model: Any, ids: Tensor, features: Tensor, group: Tensor) -> Tensor:
    """Logits [N, vocab] of one prompt: all N tokens pass the stock decoder, and what each attention returns for a token
    is replaced by the mean over its group.

    This is the formula of exact unmerging. The tokens of a group are alike whenever a layer begins, so projections,
    norms and MLPs make of each what they make of the merged token; positions alone tell them apart, and only attention
    sees those. The mean may be taken behind the output projection, which is affine. It is computed in float64 as far
    as transformers lets it (norms and angles stay in float32), and returned in the model's type.

    Args:
        ids: int64 [N], the prompt; `tiny.IMAGE_TOKEN` stands for every image token.
        features: [image tokens, C], as `get_image_features` gives them. Those of one group are alike but for the
            rounding of what a family pools or shrinks, and the first counts.
        group: int64 [image tokens], at least 0.

    Raises:
        AssertionError: tokens of one group differ outside of attention: `features` do, or the description misses a
            module that mixes tokens.
    """
    stock = copy.deepcopy(model).double()
    parts = resolve(stock)
    places = ids == tiny.IMAGE_TOKEN
    label = -1 - torch.arange(len(ids))
    label[places] = group
    same = (label == label[:, None]).double()
    share = same / same.sum(1, keepdim=True)
    first = same.argmax(1)

    def average(_module: Any, _args: Any, output: Any) -> Any:
        return (share @ output[0], *output[1:]) if isinstance(output, tuple) else share @ output

    def check(name: str, _module: Any, args: Any) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 and x.shape[-2] == len(ids):
            apart = (x - x[..., first, :]).abs().max()
            assert apart <= 1e-9 * x.abs().max(), f"tokens of one group differ where {name} gets them"

    within = {module for attention in parts.attentions for module in attention.modules()}
    for attention in parts.attentions:
        attention.register_forward_hook(average)
    for name, module in parts.language_model.named_modules():
        if module not in within:
            module.register_forward_pre_hook(functools.partial(check, name))
    embeds = stock.get_input_embeddings()(ids)
    embeds[places] = features.double()
    tiny.close(embeds, embeds[first])
    return stock(inputs_embeds=embeds[None, first], use_cache=False).logits[0].to(model.dtype)
