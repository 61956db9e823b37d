"""Merging once more, where tokens stand in the prompt.

A family that shrinks a large image or pools the frames of a video makes means over neighbours out of the encoder's
tokens. Nearly every mean is over others, so most of what was merged is apart again: of 169 places pooled from 576
tokens merged to 87, some 110 differ. So those tokens merge again by DToMe's own steps, as if in a further layer:
partners among the tokens of the same picture, a threshold, the size-weighted mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.merging import Layout, MergedTokens, above, best_partner
from dymu.placed import Placed
from dymu.token_map import TokenMap


@dataclass(frozen=True, eq=False)
class Standing:
    """The different tokens of some items, picture by picture.

    Attributes:
        x: float32 or wider, the tokens as the state's layout says; a row for each picture that shows any.
        state: which they were and how many places each stands at.
        token: int64 [N] for each item, the token at every place, among all that there were at first; -1 where none of
            a picture stands.
    """

    x: Tensor
    state: MergedTokens
    token: list[Tensor]

    @classmethod
    def of(cls, items: Sequence[Placed], features: Sequence[Tensor]) -> Standing:
        """Tokens of placed items, of which `features` [..., C] stand in the prompt."""
        device = features[0].device
        begins, pictures = 0, []
        leaders, own, first = [], [], 0
        for item in items:
            pictures.append(item.picture + begins)
            begins += item.pictures
            # Places that are no patch, and tokens that are gone, take no part.
            leaders.append(torch.where(item.patch & (item.leaders >= 0), item.leaders + first, -1))
            own.append(torch.arange(len(item.leaders), device=device) + first)
            first += len(item.leaders)
        leader, place, picture = torch.cat(leaders), torch.cat(own), torch.cat(pictures)
        leads = (leader == place).nonzero()[:, 0]
        leads = leads[picture[leads].argsort(stable=True)]
        length = torch.unique_consecutive(picture[leads], return_counts=True)[1]
        layout = Layout.of(length)
        number = leader.new_full((len(leader) + 1,), -1)
        number[leads] = torch.arange(len(leads), device=device)
        token = number[leader]
        size = torch.bincount(token[token >= 0], minlength=len(leads)).float()
        x = torch.cat([feature.flatten(0, -2) for feature in features])[leads]
        x = x if x.dtype == torch.float64 else x.float()
        shape = (1, layout.total) if layout.packed else (layout.batch, layout.longest)
        places = torch.arange(layout.longest, device=device).expand(layout.batch, -1)
        group = torch.where(layout.present, places, -1)
        state = MergedTokens(TokenMap(group, length, layout.longest, layout.packed), layout, size.view(shape))
        tokens = token.split([len(item.leaders) for item in items])
        return cls(x.unflatten(0, shape), state, list(tokens))

    @property
    def size(self) -> Tensor:
        """float32, in the layout: at how many places each token stands."""
        assert self.state.size is not None
        return self.state.size

    def match(self) -> tuple[Tensor, Tensor]:
        """Similarity and partner of each A token, see `best_partner`."""
        return best_partner(normalize(self.x, dim=-1), self.state.layout)

    def merge(self, into: Tensor) -> Standing:
        """Merge the A tokens into their partners `into`, see `merge_step`."""
        x, state = self.state.merge(self.x, into, 0)
        return replace(self, x=x, state=state)

    def settle(self, thresholds: Sequence[float]) -> Standing:
        """Merge what is more similar than the threshold of each round; above 1: that round merges nothing."""
        now = self
        for threshold in thresholds:
            if threshold <= 1:
                now = now.merge(above(threshold, *now.match()))
        return now

    def over_time(self, threshold: float, videos: Sequence[int]) -> Tensor:
        """Let tokens go on from frame to frame: int64 [S], for each token in the layout's order the one it is part of.

        A token that is more similar than `threshold` to one that stands in the frame before is part of it from then on.
        It is compared with that token as it first appeared, so that what changes slowly is not dragged along.

        Args:
            threshold: similarity.
            videos: of how many frames each of them consists.
        """
        unit = normalize(self.x.flatten(0, 1), dim=-1)
        joins = torch.arange(len(unit), device=unit.device)
        lengths, start = iter(self.state.layout.lengths), 0
        for frames in videos:
            before = joins[:0]
            for _ in range(frames):
                own = slice(start, start + next(lengths))
                if len(before):
                    with torch.autocast(unit.device.type, enabled=False):
                        similarity, partner = (unit[own] @ unit[before].T).max(1)
                    joins[own] = torch.where(similarity > threshold, before[partner], joins[own])
                before, start = joins[own], own.stop
        return joins

    def placed(
        self, items: Sequence[Placed], features: Sequence[Tensor], joins: Tensor | None = None
    ) -> tuple[list[Placed], list[Tensor]]:
        """The items as they lie after merging, and their features [N, C]: those of merged tokens are their mean.

        Args:
            items, features: that this was made of.
            joins: see `over_time`.
        """
        tokens, group = self.x.flatten(0, 1), self.state.map.group
        left = self.state.layout.index(group)[group >= 0]
        if joins is not None:
            number = (joins == torch.arange(len(joins), device=joins.device)).cumsum(0) - 1
            group = number[joins]
            count = int(number[-1]) + 1
            over_time = TokenMap(group[None], number[-1:] + 1, count)
            size = self.size.flatten()[:, None]
            tokens = (over_time.sum((tokens * size)[None]) / over_time.sum(size[None]))[0]
            left = group[left]
        settled = [
            _settled(item, feature, token, left, tokens)
            for item, feature, token in zip(items, features, self.token, strict=True)
        ]
        return [item for item, _ in settled], [feature for _, feature in settled]


def _settled(item: Placed, feature: Tensor, token: Tensor, left: Tensor, tokens: Tensor) -> tuple[Placed, Tensor]:
    """One item and its features, whose token n is the merged one `left[n]`."""
    stands = token >= 0
    merged = left[token.clamp(min=0)]
    own = torch.arange(len(token), device=token.device)
    first = torch.full((len(tokens),), len(own), device=own.device)
    first = first.scatter_reduce(0, merged[stands], own[stands], "amin")
    return (
        replace(item, leaders=torch.where(stands, first[merged], item.leaders)),
        torch.where(stands[:, None], tokens[merged].to(feature.dtype), feature),
    )


def settle(
    items: list[Placed], features: Any, rounds: Sequence[float], over_time: float | None
) -> tuple[list[Placed], Any]:
    """Merge the items of one call where they stand.

    Args:
        items: images, or videos.
        features: of each item, [..., C], in a list or as one tensor.
        rounds: see `Standing.settle`.
        over_time: see `Standing.over_time`; None: frames stay apart.

    Returns:
        The items as they lie then, and their features in the form that was given.
    """
    merges, joins_frames = any(threshold <= 1 for threshold in rounds), over_time is not None and items[0].video
    if not merges and not joins_frames:
        return items, features
    settled = [feature.flatten(0, -2) for feature in features]
    if merges:
        items, settled = Standing.of(items, settled).settle(rounds).placed(items, settled)
    if over_time is not None and joins_frames:
        standing = Standing.of(items, settled)
        joins = standing.over_time(over_time, [item.pictures for item in items])
        items, settled = standing.placed(items, settled, joins)
    if isinstance(features, Tensor):
        return items, torch.stack(settled).view_as(features)
    return items, [now.view_as(feature) for now, feature in zip(settled, features, strict=True)]
