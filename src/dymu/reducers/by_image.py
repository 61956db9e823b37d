"""Every image or video of a call reduced in a way of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from dymu.errors import BadBudget
from dymu.reducers.reducer import Candidates, Reduced, Reducer, Shown, SomeMerge, Stage, Tokens


@dataclass(frozen=True)
class ByImage(Reducer):
    """Of each image or video, in their order, its own rule.

    Args:
        rules: one for each; none of them acts ahead of the encoder.

    Raises:
        BadBudget: in use, there are more images or fewer.
        TypeError: a rule acts ahead of the encoder.
    """

    rules: tuple[Reducer, ...]
    focuses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for rule in self.rules:
            if type(rule).before_encoder is not Reducer.before_encoder:
                raise TypeError(f"{type(rule).__name__} acts ahead of the encoder, on all pictures of a call alike")

    def reads(self, layers: int) -> set[int | None]:
        return {layer for rule in self.rules for layer in rule.reads(layers)}

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        for rule in self.rules:
            rule.check_fits(layers, tokens)

    def check_shown(self, shown: Shown, images: Collection[int] | None = None) -> None:
        shown.check_by_image()
        if len(self.rules) != len(shown.items):
            raise BadBudget(
                f"{len(self.rules)} budgets were given for {len(shown.items)} {'videos' if shown.video else 'images'}; "
                "give one for each, images first, or None for those that keep the model's own."
            )
        for own in self._distinct.values():
            pairs = zip(shown.image, shown.item, strict=True)
            self.rules[own[0]].check_shown(shown, {image for image, item in pairs if item in own})

    def reduces(self, stage: Stage, shown: Shown) -> bool:
        return any(rule.reduces(stage, shown) for rule in self.rules)

    def in_layer(self, candidates: Candidates) -> SomeMerge | None:
        item = torch.tensor(candidates.shown.item, device=candidates.keys.device)[candidates.picture]
        some = None
        for own in self._distinct.values():
            rule = self.rules[own[0]]
            into = rule.in_layer(candidates) if rule.reduces("in_layer", candidates.shown) else None
            if into is not None:
                others = torch.tensor([number not in own for number in range(len(self.rules))], device=item.device)[
                    item
                ]
                into, still = into if isinstance(into, SomeMerge) else (into, torch.zeros_like(others))
                merges = SomeMerge(into.masked_fill(others[:, None], -1), still | others)
                some = merges if some is None else SomeMerge(merges.into.maximum(some.into), merges.still & some.still)
        return some

    def after_encoder(self, tokens: Tokens) -> Reduced | None:
        return self._chosen(tokens, "after_encoder", lambda rule: rule.after_encoder)

    def in_prompt(self, tokens: Tokens) -> Reduced | None:
        return self._chosen(tokens, "in_prompt", lambda rule: rule.in_prompt)

    def _chosen(
        self, tokens: Tokens, stage: Stage, method: Callable[[Reducer], Callable[[Tokens], Reduced | None]]
    ) -> Reduced | None:
        distinct = list(self._distinct.values())
        rules = [self.rules[own[0]] for own in distinct]
        answers = [method(rule)(tokens) if rule.reduces(stage, tokens.shown) else None for rule in rules]
        of_rule = {number: index for index, own in enumerate(distinct) for number in own}
        of_picture = [of_rule[item] for item in tokens.shown.item]
        return tokens.chosen(answers, torch.tensor(of_picture, device=tokens.picture.device))

    @cached_property
    def _distinct(self) -> dict[str, list[int]]:
        """The images of each rule; 1 token and 1.0 of all are equal, and not the same."""
        found: dict[str, list[int]] = {}
        for number, rule in enumerate(self.rules):
            found.setdefault(repr(rule), []).append(number)
        return found
