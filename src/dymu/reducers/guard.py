"""Guard: pictures with something in focus keep no less than their share of tokens, whatever they look like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dymu.reducers.focus import Around, merges_of, out_of_focus_first
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
        guarded = out_of_focus_first(torch.where(less, most, 0), candidates)
        into = torch.where(less[candidates.picture, None], guarded, into)
        return into if still is None else SomeMerge(into, still)

    def in_prompt(self, tokens: Tokens) -> Reduced | None:
        return self.to_share(tokens, self.rule.in_prompt(tokens), less_only=True)
