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
    _, first = average_attention(stock, ids, group)
    embeds = stock.get_input_embeddings()(ids)
    embeds[ids == tiny.IMAGE_TOKEN] = features.double()
    tiny.close(embeds, embeds[first])
    return stock(inputs_embeds=embeds[None, first], use_cache=False).logits[0].to(model.dtype)


def unmerged_prompt_by_hand(
    model: Any,
    inputs: dict[str, Any],
    encoded: Any,
    group: Tensor,
    token: int = tiny.IMAGE_TOKEN,
    method: str = "get_image_features",
    form: str = "exact",
) -> Tensor:
    """`unmerged_by_hand` where the model itself puts features in place: it may do more with them, and with the prompt.

    Args:
        inputs: what the model takes for one prompt that shows images.
        encoded: what its `method` answered while images merged. Rows that the language model adds within
            (`deepstack_features`) are averaged over each group.
        group: int64 [image tokens], of all images one after the other.
        token: their placeholder.
        form: `representative`: in place of the mean over its group, each token gets what attention returns for the
            one whose position is nearest to the mean of the group's.
    """
    stock = copy.deepcopy(model).double()
    stock.set_experts_implementation("eager")  # the fast ones know no float64
    ids = inputs["input_ids"][0]
    share, first = average_attention(stock, ids, group, token, form)
    places = ids == token
    mean = share[first][:, places][places]

    def averaged(features: Any) -> Any:
        """Of all images, in the shape that they have: a tensor, or one for each image."""
        items = [features] if isinstance(features, Tensor) else list(features)
        rows = torch.cat([item.double().flatten(0, -2) for item in items])
        alike = (mean @ rows).split([item[..., 0].numel() for item in items])
        shaped = [new.view(item.shape) for new, item in zip(alike, items, strict=True)]
        return shaped[0] if isinstance(features, Tensor) else shaped

    answer = copy.copy(encoded)
    answer.pooler_output = averaged(encoded.pooler_output)
    if getattr(encoded, "deepstack_features", None) is not None:
        answer.deepstack_features = [averaged(features) for features in encoded.deepstack_features]
    setattr(resolve(stock).inner, method, lambda *_args, **_kwargs: answer)
    return stock(**inputs, use_cache=False).logits[0].to(model.dtype)


def average_attention(
    stock: Any, ids: Tensor, group: Tensor, token: int = tiny.IMAGE_TOKEN, form: str = "exact"
) -> tuple[Tensor, Tensor]:
    """Have what mixes a model's tokens answer the mean over each group; all else must find a group's tokens alike.

    Some norms compute in float32, so alike is to float32's rounding.

    Returns:
        float64 [N, N], how much of each token makes up that mean; int64 [N], the first token of each token's group.
    """
    parts = resolve(stock)
    label = -1 - torch.arange(len(ids))
    label[ids == token] = group
    same = (label == label[:, None]).double()
    share = same / same.sum(1, keepdim=True)
    first = same.argmax(1)
    taken = {"exact": share}

    def choose(_module: Any, args: Any, kwargs: Any) -> None:
        """By the positions [1, N] or [axes, 1, N] that the rotary module gets."""
        positions = next(
            x for x in (*args[1:], *kwargs.values()) if isinstance(x, Tensor) and not x.is_floating_point()
        )
        at = positions.reshape(-1, len(ids)).mT.double()
        away = (same.sum(1, keepdim=True) * at - same @ at).square().sum(1)  # whole numbers, so that ties are
        chosen = torch.where(same > 0, away, torch.inf).argmin(1)
        taken["representative"] = torch.nn.functional.one_hot(chosen, len(ids)).double()

    def average(_module: Any, _args: Any, output: Any) -> Any:
        mixed = taken[form]
        return (mixed @ output[0], *output[1:]) if isinstance(output, tuple) else mixed @ output

    def check(name: str, _module: Any, args: Any) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 and x.shape[-2] == len(ids):
            apart = (x - x[..., first, :]).abs().max()
            assert apart <= 1e-6 * x.abs().max(), f"tokens of one group differ where {name} gets them"

    parts.rotary.register_forward_pre_hook(choose, with_kwargs=True)
    mixing = (*parts.attentions, *parts.mixers)
    within = {module for mixer in mixing for module in mixer.modules()}
    for mixer in mixing:
        mixer.register_forward_hook(average)
    for name, module in parts.language_model.named_modules():
        if module not in within and ".experts." not in name:  # which get some of the tokens
            module.register_forward_pre_hook(functools.partial(check, name))
    return share, first
