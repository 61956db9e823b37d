"""What the hooks of one model share while a call is running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dymu.errors import BadPrompt
from dymu.families.resolve import Modality, Parts
from dymu.item import Item
from dymu.report import Report
from dymu.unmerging.prompt import Features, carried_leaders, leaders_within, place_leaders

PIXELS = ("pixel_values", "pixel_values_videos")
"""Arguments of a call that hold images, or videos."""


class Prompts:
    """The prompts of one call, and the images and videos that they show.

    Args:
        placeholders: for each kind of item bool [B, N], its placeholders.
        ids: int64 [B, N], if known.
        present: [B, N], the attention mask; None: all are there.

    Attributes:
        leaders: int64 [B, N], see `place_leaders`; None while no item was merged.
    """

    def __init__(
        self, placeholders: Mapping[Modality, Tensor], ids: Tensor | None = None, present: Tensor | None = None
    ) -> None:
        self.placeholders, self.ids, self.present = placeholders, ids, present
        self.leaders: Tensor | None = None

    @classmethod
    def of(cls, parts: Parts, ids: Tensor | None, embeds: Tensor | None = None, present: Any = None) -> Prompts:
        """Of int64 ids [B, N], or of embeddings [B, N, C], whose placeholders have the embeddings of their ids."""
        tokens = parts.placeholders
        if ids is not None:
            if isinstance(present, Tensor) and present.ndim == 2:
                present = present[:, -ids.shape[1] :]  # the newest are these
            return cls({modality: ids == token for modality, token in tokens.items()}, ids, present)
        if embeds is None:
            return cls({})
        table = parts.inner.get_input_embeddings()
        rows = table(torch.tensor(list(tokens.values()), device=embeds.device))
        return cls(dict(zip(tokens, ((embeds == row).all(-1) for row in rows), strict=True)))

    def show(self, modality: Modality, features: Features) -> None:
        """Take over the leaders that the features of the images, or of the videos, carry.

        Raises:
            BadPrompt: the prompts have more or fewer placeholders than the items have tokens.
        """
        mask = self.placeholders[modality]
        there, needed = int(mask.sum()), sum(feature.shape[:-1].numel() for feature in features)
        if there != needed:
            raise BadPrompt(
                f"the prompts have {there} {modality} placeholders, but the {len(features)} {modality}s given need "
                f"{needed}; write one placeholder per {modality} into the text, let the processor expand it, and give "
                f"{'an image' if modality == 'image' else 'a video'} only once, with the turn that shows it."
            )
        carried = carried_leaders(features)
        if carried is not None:
            ends = {0, *accumulate(len(item) for item in carried)}
            for row, end in enumerate(mask.sum(1).cumsum(0).tolist()):
                if end not in ends:
                    raise BadPrompt(
                        f"the {modality} placeholders of prompt {row} do not fit whole {modality}s, though those of "
                        f"all prompts together do; give every prompt the placeholders of its own {modality}s."
                    )
            if self.leaders is None:
                self.leaders = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
            self.leaders = place_leaders(self.leaders, mask, carried)

    def show_encoded(self, outputs: Mapping[str, Any]) -> None:
        """Take over the leaders of items that were encoded ahead of the call."""
        for modality in self.placeholders:
            if outputs.get(modality) is not None:
                self.show(modality, outputs[modality].pooler_output)

    def text_of(self, modality: Modality, tokens: Sequence[int]) -> list[Tensor]:
        """The ids int64 [words] of the prompt that shows each item, without placeholders and padding.

        Args:
            tokens: of each item, in order.

        Raises:
            BadPrompt: no ids are known, or they show other items.
        """
        if self.ids is None:
            raise BadPrompt("the question is asked for and not known: give the model input_ids along with the images.")
        shown = self.placeholders[modality].sum(1).tolist()
        if sum(shown) != sum(tokens):
            raise BadPrompt(
                f"the prompts have {sum(shown)} {modality} placeholders, but the {len(tokens)} {modality}s given need "
                f"{sum(tokens)}, so that it is not known which question is asked about which."
            )
        words = torch.ones_like(self.ids, dtype=torch.bool)
        if isinstance(self.present, Tensor) and self.present.shape == words.shape:
            words = self.present.bool()
        for mask in self.placeholders.values():
            words = words & ~mask
        ends = list(accumulate(shown))
        rows = [
            next(row for row, end in enumerate(ends) if begin < end) for begin in accumulate(tokens[:-1], initial=0)
        ]
        return [self.ids[row][words[row]] for row in rows]


class CallState:
    """Shared by the hooks of one model.

    Attributes:
        report: what merged in the last call.
        prompts: of the running forward, if it shows anything.
        asked: the prompts that pictures are encoded for, within a forward or ahead of one.
        collecting: whether items that are encoded add to the report, instead of beginning a new one.
        chunked: while a prompt with encoded images is prefilled in chunks, the number of tokens before it, and its
            leaders int64 [B, N].
    """

    def __init__(self) -> None:
        self.report = Report()
        self.prompts: Prompts | None = None
        self.asked: Prompts | None = None
        self.collecting = False
        self.chunked: tuple[int, Tensor] | None = None

    def begin_report(self) -> None:
        self.report, self.collecting = Report(), True

    def encoded(self, modality: Modality, items: list[Item], kept: list[Tensor], features: Features) -> None:
        """See `dymu.hooks.vision.Encoded`."""
        self.report = (self.report if self.collecting else Report()).with_more(items, kept)
        if self.prompts is not None:
            self.prompts.show(modality, features)

    def text_of(self, modality: Modality, tokens: Sequence[int]) -> list[Tensor]:
        """See `Prompts.text_of`."""
        return (self.asked or Prompts({})).text_of(modality, tokens)

    def leaders(self, start: int, tokens: int) -> Tensor | None:
        """int64 [B, tokens], the leaders of the prompt's tokens from `start` on; None where no token is merged."""
        if self.chunked is not None:
            first, leaders = self.chunked
            return leaders_within(leaders, start - first, tokens)
        return None if self.prompts is None else self.prompts.leaders


def arguments_of(signature: Signature, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    if not args:
        return dict(kwargs)
    arguments: dict[str, Any] = signature.bind(*args, **kwargs).arguments
    return {**arguments.pop("kwargs", {}), **arguments}


def length(cache: Any) -> int:
    """Tokens of the full prompt in a KV cache; None: 0."""
    return 0 if cache is None else cache.get_seq_length()
