"""Guard: pictures with something in focus keep no less than their share of tokens, whatever they look like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dymu.reducers.focus import Around, focus_last, merges_of
from dymu.reducers.reducer import Candidates, Reduced, SomeMerge, Tokens


@dataclass(frozen=True)
class Guard(Around):
    """Another rule, but where it would leave less of a picture with something in focus than its share.

    There as many merge as leave the share, and what is in focus merges last.

    Args:
        rule: which tokens merge, and what each picture's share is, see `ThresholdMerge.share`.
    """

    def in_layer(self, candidates: Candidates) -> Tensor | SomeMerge | None:
        answer = self.rule.in_layer(candidates)
        if answer is None or candidates.focus is None:
            return answer
        into, still = answer if isinstance(answer, SomeMerge) else (answer, None)
        due, most = merges_of(into, candidates), self.beyond_share(candidates)
        less = candidates.focus.any(1) & (most >= 0) & (due > most)
        guarded = focus_last(torch.where(less, most, 0), candidates)
        into = torch.where(less[candidates.picture, None], guarded, into)
        return into if still is None else SomeMerge(into, still)

    def in_prompt(self, tokens: Tokens) -> Reduced | None:
        reduced = self.rule.in_prompt(tokens)
        if reduced is None or tokens.focus is None:
            return reduced
        shown, shares = tokens.shown, self.shares(tokens.shown)
        of_image = dict(zip(shown.image, shares, strict=True))
        goal = [
            0 if (share := of_image[image]) is None else share.kept_of(count)
            for image, count in enumerate(shown.image_tokens)
        ]
        by_picture, _, pictures = tokens.then(reduced).by_picture()
        image = torch.tensor(shown.image, device=pictures.device)
        less = by_picture.left(image[pictures], len(goal)) < torch.tensor(goal, device=image.device)
        focus = torch.tensor([bool(grid.any()) for grid in shown.focus or ()], device=image.device)
        in_focus = torch.zeros_like(less).index_put((image,), focus, accumulate=True)
        if not bool((less & in_focus).any()):
            return reduced
        return tokens.chosen(
            [reduced, tokens.merge_to([max(count, 1) for count in goal])], (less & in_focus)[image].long()
        )
