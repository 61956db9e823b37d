"""Reduce tokens where they stand in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dymu.item import Item
from dymu.merging import PictureTokens
from dymu.reducers.answers import check_reduced
from dymu.reducers.reducer import Reducer, Shown, Tokens
from dymu.token_map import TokenMap, leaders_of, take


def tokens_of(items: Sequence[Item], features: Sequence[Tensor], shown: Shown) -> Tokens:
    """The tokens of some items in the prompt, by the `features` [N, C] of each."""
    # Learned and dropped tokens take no part.
    parts = [torch.where(item.patch & (item.leaders >= 0), item.leaders, -1) for item in items]
    tokens = TokenMap.from_leaders(pad_sequence(parts, True, -1))
    first = tuple(accumulate((item.pictures for item in items), initial=0))
    focus = None

    def placed(of_pictures: Sequence[Tensor]) -> Tensor:
        rows = [_placed(item, of_pictures[begin:]) for item, begin in zip(items, first, strict=False)]
        return pad_sequence(rows, True)

    if shown.focus is not None:
        focus = placed(shown.focus)
    padded = pad_sequence([feature.flatten(0, -2) for feature in features], True)
    return Tokens(
        features=take(padded, tokens.first()),
        map=tokens,
        counts=tokens.kept.tolist(),
        picture=pad_sequence([item.picture for item in items], True),
        first=first,
        shown=shown,
        find_grids=lambda: [item.grids for item in items],
        find_location=lambda: pad_sequence([item.location for item in items], True, torch.nan),
        find_places=placed,
        focus=focus,
    )


def _placed(item: Item, of_pictures: Sequence[Tensor]) -> Tensor:
    """[N, ...] of the tokens of an item, of what stands at the patches of its pictures, [rows, columns, ...]; 0 at
    learned tokens. Numbers of a token that lies between patches are interpolated, as features of frames are (of tiles
    that a family shrinks once they are put together, only about so at their seams); what is no number is that of the
    nearest patch."""
    device = item.patch.device
    found = torch.zeros(len(item.patch), *of_pictures[0].shape[2:], dtype=of_pictures[0].dtype, device=device)
    for number in range(item.pictures):
        own, grid = (item.patch & (item.picture == number)).nonzero()[:, 0], of_pictures[number].to(device)
        at = item.at[own].clamp(min=0).minimum(torch.tensor(grid.shape[:2], device=device) - 1)
        if not grid.is_floating_point():
            found[own] = grid[tuple(at.round().long().mT)]
            continue
        low, high = at.floor().long(), at.ceil().long()
        part = (at - low).to(grid.dtype).view(-1, 2, *(1,) * (grid.ndim - 2))
        found[own] = sum(
            of_rows * of_columns * grid[row, column]
            for row, of_rows in ((low[:, 0], 1 - part[:, 0]), (high[:, 0], part[:, 0]))
            for column, of_columns in ((low[:, 1], 1 - part[:, 1]), (high[:, 1], part[:, 1]))
        )
    return found


def picture_tokens(items: Sequence[Item], features: Sequence[Tensor]) -> PictureTokens:
    """The tokens of some items in the prompt, picture by picture."""
    nothing = torch.empty(0)
    return tokens_of(items, features, Shown(nothing, (), False, False)).by_picture()[0]


def reduce_in_prompt(reducer: Reducer, items: list[Item], features: Any, shown: Shown) -> tuple[list[Item], Any]:
    """The items of one call and their features, reduced where they stand in the prompt.

    Args:
        features: of each item, [..., C], in a list or as one tensor, as they are returned.
    """
    if not reducer.reduces("in_prompt", shown):
        return items, features
    there = [index for index, item in enumerate(items) if item.pictures]
    if len(there) < len(items):  # some prompts show nothing
        some = reduce_in_prompt(reducer, [items[index] for index in there], [features[index] for index in there], shown)
        items, features = list(items), list(features)
        for index, item, feature in zip(there, *some, strict=True):
            items[index], features[index] = item, feature
        return items, features
    tokens = tokens_of(items, features, shown)
    reduced = reducer.in_prompt(tokens)
    if reduced is None:
        return items, features
    reduced = check_reduced(reduced, reducer, "in_prompt", tokens)
    merged = tokens.features_of(reduced)
    places = reduced.map if reduced.of_places else tokens.map.then(reduced.map)
    pairs = zip(items, features, tokens.map.group, places.group, merged, strict=True)
    changed = [_reduced(*row) for row in pairs]
    after = [feature for _, feature in changed]
    return [item for item, _ in changed], torch.stack(after) if isinstance(features, Tensor) else after


def _reduced(item: Item, feature: Tensor, token: Tensor, group: Tensor, merged: Tensor) -> tuple[Item, Tensor]:
    """One item and its features [..., C], with the place n of it, if it had a `token`, now of the merged one
    `group[n]`, or dropped."""
    token, label = token[: len(item.leaders)], group[: len(item.leaders)]
    leaders = torch.where(token < 0, item.leaders, leaders_of(label[None], len(merged))[0])
    stands = (label >= 0).view(*feature.shape[:-1], 1)
    features = merged[label.clamp(min=0)].view_as(feature).to(feature.dtype)
    return replace(item, leaders=leaders), torch.where(stands, features, feature)
