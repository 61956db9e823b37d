"""What the hooks of one model know of the calls that run, each thread for itself."""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dymu.errors import BadPrompt, DymuError
from dymu.families.resolve import Modality, Parts
from dymu.hooks.cache import cache_bytes, history_of, untouched_bytes
from dymu.hooks.drift import Drift
from dymu.hooks.focus import InFocus
from dymu.hooks.pruned import PrunedLayers
from dymu.item import Item
from dymu.reducers import ByImage, EncoderRun, Focus, LayerMemory, Reducer, Shown
from dymu.report import Report
from dymu.token_map import TokenMap
from dymu.unmerging import History, leaders_within, place_leaders

_log = logging.getLogger("dymu")

PIXELS = ("pixel_values", "pixel_values_videos")
"""Arguments of a call that hold images, or videos."""


_CARRIED = "_dymu_item"

Features = Tensor | Sequence[Tensor]
"""Of the images or videos of a call: [N, C] each, or where all have as many tokens [items, N, C]."""


def carry_items(features: Features, items: Sequence[Item]) -> None:
    """Let each item's features carry it wherever generation, or a caller, takes them."""
    if isinstance(features, Tensor):
        setattr(features, _CARRIED, list(items))
        return
    for feature, item in zip(features, items, strict=True):
        setattr(feature, _CARRIED, item)


def carried_items(features: Features) -> list[Item] | None:
    """The items that the features carry; None for features that carry none, or not all."""
    if isinstance(features, Tensor):
        return getattr(features, _CARRIED, None)
    if not all(hasattr(feature, _CARRIED) for feature in features):
        return None
    return [getattr(feature, _CARRIED) for feature in features]


def refuse_merged_features(arguments: Mapping[str, Any]) -> None:
    """Raises BadPrompt where the untouched model would get items that were encoded with merging."""
    for modality, output in (arguments.get("mm_encoder_outputs") or {}).items():
        if output is not None and carried_items(output.pooler_output) is not None:
            raise BadPrompt(
                f"these {modality}s were encoded with DyMU, which is disabled now; encode them again within "
                "handle.disabled(), or ask without."
            )


class Prompts:
    """The prompts of one call, and the images and videos that they show.

    Args:
        placeholders: for each kind of item bool [B, N], its placeholders.
        ids: int64 [B, N], if known.
        present: [B, N], the attention mask; None: all are there.

    Attributes:
        leaders: int64 [B, N], see `place_leaders`; None while no item is shown.
    """

    def __init__(
        self, placeholders: Mapping[Modality, Tensor], ids: Tensor | None = None, present: Tensor | None = None
    ) -> None:
        self.placeholders, self.ids, self.present = placeholders, ids, present
        self.leaders: Tensor | None = None
        self._pictures = dict[Modality, Tensor]()

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

    def show(self, modality: Modality, features: Features) -> list[Item]:
        """Take over the token maps that the features of the images, or of the videos, carry.

        Raises:
            BadPrompt: the prompts have more or fewer placeholders than the items have tokens, or features carry none.
        """
        mask = self.placeholders[modality]
        there, needed = int(mask.sum()), sum(feature.shape[:-1].numel() for feature in features)
        if there != needed:
            raise BadPrompt(
                f"the prompts have {there} {modality} placeholders, but the {len(features)} {modality}s given need "
                f"{needed}; write one placeholder per {modality} into the text, let the processor expand it, and give "
                f"{'an image' if modality == 'image' else 'a video'} only once, with the turn that shows it."
            )
        carried = carried_items(features)
        if carried is None:
            raise BadPrompt(
                f"the features of the {modality}s carry no token map: they were made without DyMU, or copied, cast or "
                f"cut since; give the output of get_{modality}_features as it is, such as "
                f'mm_encoder_outputs={{"{modality}": output}}, or the pixels, or ask within handle.disabled().'
            )
        ends = {0, *accumulate(len(item.leaders) for item in carried)}
        for row, end in enumerate(mask.sum(1).cumsum(0).tolist()):
            if end not in ends:
                raise BadPrompt(
                    f"the {modality} placeholders of prompt {row} do not fit whole {modality}s, though those of "
                    f"all prompts together do; give every prompt the placeholders of its own {modality}s."
                )
        if self.leaders is None:
            self.leaders = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        self.leaders = place_leaders(self.leaders, mask, [item.leaders for item in carried])
        starts = accumulate((item.pictures for item in carried), initial=0)
        numbered = [item.picture + start for item, start in zip(carried, starts, strict=False)]
        self._pictures[modality] = torch.cat(numbered).to(mask.device)
        return carried

    def _check_questions(self, modality: Modality, items: Sequence[Item]) -> None:
        """Raises: BadPrompt, where tokens were chosen for prompts that begin otherwise than these."""
        known = self.present is None or (isinstance(self.present, Tensor) and self.present.ndim == 2)
        if self.ids is None or not known or all(item.chosen_for is None for item in items):
            return
        texts = self.text_of(modality, [len(item.leaders) for item in items])
        for item, text in zip(items, texts, strict=True):
            if item.chosen_for is not None and not torch.equal(text[: len(item.chosen_for)], item.chosen_for):
                raise BadPrompt(
                    f"the tokens of this {modality} were chosen for another question: encode it again along with this "
                    "one, or take a reducer that reads none."
                )

    @property
    def shown(self) -> Tensor | None:
        """bool [B, N], the placeholders of all images and videos; None: nothing is shown."""
        masks = list(self.placeholders.values())
        return torch.stack(masks).any(0) if masks else None

    @property
    def picture(self) -> Tensor | None:
        """int64 [B, N], which picture (image, tile, frame) each token is of, numbered throughout; -1: of none. None:
        nothing is shown."""
        shown, start = self.shown, 0
        if shown is None:
            return None
        picture = torch.where(shown, 0, -1)
        for modality, numbers in self._pictures.items():
            picture = picture.masked_scatter(self.placeholders[modality], numbers + start)
            start += 1 + int(numbers.max())
        return picture

    def show_encoded(self, outputs: Mapping[str, Any], masked: bool = False) -> list[Item]:
        """Take over the token maps of items that were encoded ahead of the call.

        Args:
            masked: whether `present` says which tokens are there, so that questions can be told apart.

        Raises:
            BadPrompt: see `show`, or tokens were chosen for other questions.
        """
        items = list[Item]()
        for modality in self.placeholders:
            if outputs.get(modality) is not None:
                carried = self.show(modality, outputs[modality].pooler_output)
                if masked:
                    self._check_questions(modality, carried)
                items += carried
        return items

    def images(self, how: str) -> list[int]:
        """How many placeholders each image has, in order; see `Family.tells_images`. The ids must be known."""
        assert self.ids is not None
        lengths = list[int]()
        for ids, shown in zip(self.ids.tolist(), self.placeholders["image"].tolist(), strict=True):
            starts = [at for at, there in enumerate(shown) if there and not (at and shown[at - 1])]
            ahead = [ids[at - 1] if at else None for at in starts]
            runs = [shown[at:].index(False) if False in shown[at:] else len(shown) - at for at in starts]
            whole = [how == "runs" or name == ahead[-1 if how == "last" else 0] for name in ahead]
            first = [True, *whole][: len(whole)] if how == "last" else whole
            for begins, run in zip(first, runs, strict=True):
                if begins:
                    lengths.append(0)
                lengths[-1] += run
        return lengths

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


class Calls:
    """The calls of one model in all threads.

    Attributes:
        running: threads in which a call runs, under which DyMU is not removed.
        closing: whether it is about to be, so that no call begins.
        removed: whether it was.
        disabled: by thread, how many `handle.disabled()` it is in.
        newest: report of the newest call.
        drift: of images from the tokens that they were calibrated to keep; None: they were not.
        warned: what was said once and needs no saying again.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.running = set[int]()
        self.closing = self.removed = False
        self.disabled = Counter[int]()
        self.newest = Report()
        self.drift: Drift | None = None
        self.warned = set[str]()


@dataclass(frozen=True)
class Mapped:
    """The tokens of a running forward of the language model.

    Attributes:
        tokens: of the full prompt, to the merged ones.
        plain: whether these are the same.
        present: bool [B, N], those of the full prompt that are there; None: all are.
    """

    tokens: TokenMap
    plain: bool
    present: Tensor | None


class CallState(threading.local):
    """What the hooks of one model share while a call runs; every thread has its own.

    Attributes:
        within_call: whether a call of this thread runs.
        report: what merged in this thread's last call; None: it made none.
        prompts: of the running forward, if it shows anything.
        asked: the prompts that pictures are encoded for, within a forward or ahead of one.
        collecting: whether items that are encoded add to the report, instead of beginning a new one.
        generating: whether `generate` runs, whose forwards share one report, and
        prompted: how many tokens its prompts have, those in the cache among them; None: that is not known.
        inside: whether the module that holds both halves runs.
        mask: the padding mask [B, N] that the running forward was given, and
        types: the kinds of its tokens, int64 [B, N], where they say which tokens attend to later ones.
        knows_ids: whether the running forward was given ids, so that it is known where pictures stand.
        chunked: while a prompt with encoded images is prefilled in chunks, the number of tokens before it, and its
            leaders int64 [B, N].
        encoding: the running call of `get_image_features` or `get_video_features`.
        unmerging: whether the language model runs on merged tokens.
        mapped: these, then, and
        turns: cosines and sines of their rotary angles, by kind, and
        wanted: int64 [B, k], those of which the last layer's output is asked for; None: all; and
        pruned: its layers, where each runs some of them only.
        rules: how images of this thread are reduced, all or each in its own way; None: as the handle says.
        focus: what is in focus in them; None: as the handle says.
        memory: of earlier calls that encode the same pictures with the same weights; None: there is none.
        images: how many images the running call has shown, ahead of its videos.
        last_logits: of how many last tokens the running forward was asked for logits; 0: of all.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.within_call = False
        self.report: Report | None = None
        self._cache: weakref.ref[Any] | None = None
        self.rules: Reducer | tuple[Reducer, ...] | None = None
        self.focus: InFocus | None = None
        self.memory: LayerMemory | None = None
        self._forget()

    def _forget(self) -> None:
        self.prompts: Prompts | None = None
        self.asked: Prompts | None = None
        self.collecting = self.generating = self.knows_ids = self.unmerging = self.inside = False
        self.chunked: tuple[int, Tensor] | None = None
        self.prompted: int | None = None
        self.encoding: Any = None
        self.mapped: Mapped | None = None
        self.turns: dict[str, tuple[Tensor, Tensor]] = {}
        self.wanted: Tensor | None = None
        self.pruned: PrunedLayers | None = None
        self.last_logits = self.images = 0
        self.mask: Any = None
        self.types: Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether this thread's calls merge."""
        return not self.calls.disabled[threading.get_ident()] and not self.calls.removed

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around all that belongs to one call of this thread, which begins and ends, however it does, with nothing of
        another."""
        thread = threading.get_ident()
        try:
            self.within_call = True
            self._forget()
            with self.calls.changed:
                self.calls.changed.wait_for(lambda: not self.calls.closing)
                self.calls.running.add(thread)
            yield
        finally:
            self.within_call = False
            self._forget()
            with self.calls.changed:
                self.calls.running.discard(thread)
                self.calls.changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no call runs, and let none begin.

        Raises:
            DymuError: a call of this very thread runs.
        """
        if self.within_call:
            raise DymuError("DyMU cannot be removed from within a call of the model: remove it when the call is over.")
        with self.calls.changed:
            try:
                self.calls.closing = True
                self.calls.changed.wait_for(lambda: not self.calls.running)
                yield
            finally:
                self.calls.closing = False
                self.calls.changed.notify_all()

    @contextmanager
    def alone_within(self) -> Iterator[None]:
        """At the beginning of a call: wait until no call of another thread runs, and let none begin."""
        thread = threading.get_ident()
        with self.calls.changed:
            self.calls.running.discard(thread)  # so that two threads do not wait for each other
            self.calls.changed.notify_all()
            try:
                self.calls.changed.wait_for(lambda: not self.calls.running)
                yield
            finally:
                self.calls.running.add(thread)

    @property
    def last(self) -> Report:
        """The report of this thread's last call; where it made none, of the newest call of any."""
        return self.calls.newest if self.report is None else self.report

    def begin_report(self, items: Sequence[Item] = (), cache: Any = None) -> None:
        """Begin the report of a call; of one that goes on with a KV cache, go on with the cache's."""
        history = history_of(cache) if length(cache) else None
        going_on = None if history is None else history.report
        self.report = self.calls.newest = going_on or Report(list(items))
        self._cache = None if going_on is None else weakref.ref(cache)

    def filled(self, cache: Any, history: History) -> None:
        """Report the bytes of the KV cache after a forward; a call may have others beside, as with guidance."""
        if self.report is None:
            self.begin_report()
        assert self.report is not None
        if self._cache is None:
            self._cache, history.report = weakref.ref(cache), self.report
        if self._cache() is cache:
            self.report.cache_bytes, self.report.cache_bytes_full = cache_bytes(cache), untouched_bytes(cache)

    def encoded(self, modality: Modality, items: list[Item], features: Features) -> None:
        """Add items that were encoded to the report, and to the prompts of the running forward."""
        if not self.collecting or self.report is None:
            self.begin_report()
        assert self.report is not None
        self.report.items += [item for item in items if item.pictures]  # some families give a prompt without one
        if _log.isEnabledFor(logging.DEBUG):
            original, kept = [len(item.leaders) for item in items], [item.kept for item in items]
            _log.debug("%ss of %s tokens keep %s", modality, original, kept)
        if self.prompts is not None:
            self.prompts.show(modality, features)

    def rule(self, usual: Reducer, shown: Shown) -> Reducer:
        """How to reduce what a call shows.

        Raises:
            BadBudget: it does not fit, or there are more budgets than images, or fewer.
        """
        rule = usual if self.rules is None else self.rules
        if isinstance(rule, tuple):
            rule = ByImage(rule[self.own(shown)])
        rule.check_shown(shown)
        return rule

    def counted(self, run: EncoderRun) -> None:
        """Report whether images keep as many tokens as they were calibrated to."""
        usual = self.rules is None and not isinstance(run.reducer, Focus) and not run.shown.video
        if self.calls.drift is not None and self.report is not None and usual and run.shown.counts:
            kept = [length - run.protected for length in run.states[run.depth].layout.lengths]
            self.report.drift = self.calls.drift.add(kept, run.shown.counts)

    def own(self, shown: Shown) -> slice:
        """Which of what is said of each image of the running call, and then of each video, is of these."""
        videos = (self.asked or Prompts({})).placeholders.get("video")
        if shown.video:
            return slice(self.images, None)
        self.images = len(shown.items)
        return slice(self.images if videos is not None and bool(videos.any()) else None)

    def by_image(self, how: str, counts: Sequence[int]) -> list[list[int]]:
        """The tokens of pictures, image by image.

        Args:
            how: see `Family.tells_images`.
            counts: of each picture.

        Raises:
            BadPrompt: the prompts show other pictures.
        """
        lengths = (self.asked or Prompts({})).images(how)
        left, images = iter(counts), list[list[int]]()
        for length in lengths:
            images.append([])
            while sum(images[-1]) < length:
                images[-1].append(next(left, length))
        if list(map(sum, images)) != lengths or next(left, None) is not None:
            raise BadPrompt(
                f"the prompts have {sum(lengths)} image placeholders, but the {len(counts)} pictures given need "
                f"{sum(counts)}: let the model's own processor make both."
            )
        return images

    def text_of(self, modality: Modality, tokens: Sequence[int]) -> list[Tensor]:
        """See `Prompts.text_of`."""
        return (self.asked or Prompts({})).text_of(modality, tokens)

    def leaders(self, start: int, tokens: int) -> Tensor | None:
        """int64 [B, tokens], the leaders of the prompt's tokens from `start` on; None where no token is merged."""
        if self.chunked is not None:
            first, leaders = self.chunked
            return leaders_within(leaders, start - first, tokens)
        return None if self.prompts is None else self.prompts.leaders


def arguments_of(module: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, as the module's class says; somebody may have wrapped the method."""
    if not args:
        return dict(kwargs)
    arguments: dict[str, Any] = inspect.signature(getattr(type(module), name)).bind(module, *args, **kwargs).arguments
    by_name = {**arguments.pop("kwargs", {}), **arguments}
    del by_name["self"]
    return by_name


def length(cache: Any) -> int:
    """Tokens of the full prompt in a KV cache; None: 0."""
    return 0 if cache is None else cache.get_seq_length()
