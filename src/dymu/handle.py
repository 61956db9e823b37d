"""`apply` and the handle that undoes it: the only file that changes a model for longer than a call."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, get_args

from torch import nn
from transformers import PreTrainedModel

from dymu.choices import CACHE_FORMS, EACH_ONCE, UNMERGE, UNTOUCHED, CacheForm, Unmerge
from dymu.counts import NOTHING, Budget, Count
from dymu.errors import AlreadyApplied, BadBudget, BadFocus, DymuError, UnsupportedModel
from dymu.families.encoders import METHODS, LoneEncoder, parts_of, type_of
from dymu.families.resolve import Parts
from dymu.files import expanded
from dymu.hooks.attention import NAME
from dymu.hooks.call import PIXELS, Calls, CallState, refuse_merged_features
from dymu.hooks.drift import Drift
from dymu.hooks.encoder import EncoderHooks
from dymu.hooks.focus import InFocus, spec_of
from dymu.hooks.generation import GenerationHooks
from dymu.hooks.language import Attending, LanguageHooks
from dymu.hooks.probe import check_layers
from dymu.hooks.refusals import warn_of_hooks
from dymu.hooks.replaced import Around, Method, Replaced, by_thread, config_view, refuse_copy
from dymu.hooks.vision import VisionHooks
from dymu.media import masks
from dymu.pruning import Pruning
from dymu.reducers import LayerMemory, Reducer, Stage
from dymu.report import Report
from dymu.thresholds import Encoder, Thresholds, beside
from dymu.unmerging import check_backend

_MARK = "_dymu_handle"
_ABSENT = object()
_APPLYING = threading.Lock()


def apply(
    model: PreTrainedModel,
    thresholds: Thresholds | str | os.PathLike[str] | None = None,
    *,
    budget: int | float | None = None,
    per_second: int | float | None = None,
    at_most: int | float | None = None,
    exactly: int | float | None = None,
    focus: Any = None,
    focus_adds: bool = False,
    guard: Literal["text"] | None = None,
    merge: Reducer | None = None,
    unmerge: Unmerge = "exact",
    representatives: int = 1,
    backend: str = "auto",
    cache: CacheForm = "merged",
    unmerge_from: int = 0,
    prune: Pruning | None = None,
) -> Handle:
    """Make a stock vision-language model, or a vision encoder by itself, merge image tokens, in place.

    An encoder by itself gives merged tokens copied to all places, so that features and what is pooled of them have
    stock shapes; see docs/encoders-alone.md.

    Args:
        model: a transformers model of a described family (`dymu families`), also within PEFT's wrapper or others; or a
            vision encoder of transformers, timm or open_clip.
        thresholds: a `Thresholds`, or where they are: a file, a model's folder or a hub name, see `Thresholds.load`.
            Left out, and no `merge` given: those beside the model.
        budget: average of image tokens per image, class token and registers not counted; a float up to 1 is a
            fraction of the full count. May be left out where the thresholds hold one budget only. The frames of a video
            keep the same fraction each.
        per_second: average of tokens per second of video. Tokens that stay alike are then kept from frame to frame.
            None: every frame is merged by itself, as in the paper.
        at_most: tokens that no image, and no frame of a video, goes beyond: of one that keeps more, the most similar
            ones merge on, and nothing changes for others. A float up to 1 is a fraction of its own. Without a `budget`
            it is the average, too.
        exactly: tokens that every image, and every frame of a video, keeps, instead of an average; merges spread over
            the layers as they were calibrated to. Pictures with NaN or infinities, whose tokens cannot be compared,
            keep more, also than `at_most`.
        focus: where in the picture tokens merge last, so that others merge in their place: `text` (by a detector,
            `pip install 'dymu[text]'`), `edges`, a box, boxes, points, a mask, or a function from a picture to a mask;
            a list has one for each image of a call. See `dymu.hooks.focus.spec_of`.
            Pictures with something in focus keep the budget's share of their tokens.
        focus_adds: whether tokens in focus never merge, and the others as without focus, so that more are kept; a cap
            goes ahead.
        guard: `text`: pictures of writing and drawings, by a test of their pixels, keep the budget's share of their
            tokens, and their strokes merge last; other pictures are as they were.
        merge: another way to have fewer tokens instead of thresholds, such as `FixedMerge(keep=94)`.
        unmerge: of a language model, as are `backend` and `cache`. `exact`: it attends as if no token had been merged
            (VTU, paper section 3.2). `representative`: the same, but each merged token asks once, for one member of its
            group. `compact`: it sees each merged token once, at the position in the middle of its group and as heavy as
            its size. `original`: the same, all as heavy as one. `restore`: as `compact`, and while a prompt is read,
            keys far away weigh more. `none`: it sees them as a shorter prompt. See `dymu.choices.Unmerge`.
        representatives: with `unmerge="representative"`, how often each merged token asks: 1, or 2 for one member of
            each half of its group, and the mean of what they get.
        backend: how to compute the attention: `sdpa`, `triton` (on a GPU), `reference` (slow), or `auto`: what measured
            fastest, see docs/triton.md.
        cache: `merged`: the KV cache holds one entry per merged token, M / N of the untouched cache. `fast`: also the
            keys of all tokens, (N + M) / 2N, which saves the time to unmerge them for each new token.
        unmerge_from: the layer of the language model from which on it attends as `unmerge` says; those ahead of it see
            each merged token once, as in `compact`.
        prune: which image tokens the layers of the language model run, such as `dymu.pruning.FastV(keep=0.5)`; by
            itself, with nothing merged ahead of them.

    Returns:
        A handle to change the budget, see what merged, and undo it all.

    Raises:
        UnsupportedModel: the model is of no described family, its layers do not compute what the description says, it
            reads image features that no layer made, or its language model cannot be unmerged, or pruned, so.
        AlreadyApplied: DyMU is applied to this model already.
        BadThresholds, BadBudget: the thresholds or the budget do not fit.
        BadFocus: what is in focus is no part of a picture.
        ValueError: an unknown `unmerge`, `backend` or `cache`, or any of them for an encoder by itself, a reducer that
            does not fit the encoder, both `thresholds` and `merge`, `cache="fast"` or an `unmerge_from` with an
            `unmerge` that shows each merged token once, or an `unmerge_from` or `prune` of layers that there are not.
        TypeError: `merge` is no `Reducer`, or acts in no stage; or `prune` is no `Pruning`.
    """
    if thresholds is not None and merge is not None:
        raise ValueError("give either thresholds (and a budget) or merge=, not both")
    if prune is not None and not isinstance(prune, Pruning):
        raise TypeError(f"prune= takes a dymu.pruning.Pruning such as dymu.pruning.FastV(keep=0.5), not {prune!r}")
    if prune is not None and prune.fill not in ("none", "nearest"):
        raise ValueError(f"{type(prune).__name__}(fill={prune.fill!r}): within the language model, none or nearest.")
    counted = any(number is not None for number in (budget, per_second, at_most, exactly))
    if prune is not None and thresholds is None and merge is None and not counted:
        merge = NOTHING
    calibrated = _load(model, thresholds) if merge is None else None
    with _APPLYING:
        parts = parts_of(model)
        if max(parts.feature_layers()) == 0:
            raise UnsupportedModel(
                "this model reads its image features ahead of the first encoder layer: none can merge."
            )
        if any(_MARK in module.__dict__ for module in _marked(parts)):
            raise AlreadyApplied(
                "DyMU is already applied to this model; set handle.budget to change the budget, or call "
                "handle.remove() first (dymu.handle_of(model) gives the handle)."
            )
        if unmerge not in UNMERGE:
            raise ValueError(f"unknown unmerge {unmerge!r}; choose {', '.join(UNMERGE)}")
        if cache not in CACHE_FORMS:
            raise ValueError(f"unknown cache {cache!r}; choose {' or '.join(CACHE_FORMS)}")
        if representatives not in (1, 2) or (representatives == 2 and unmerge != "representative"):
            raise ValueError('representatives= takes 1, or 2 with unmerge="representative"')
        if cache == "fast" and unmerge in EACH_ONCE:
            raise ValueError(
                f'cache="fast" keeps the keys of all tokens, and with unmerge="{unmerge}" each merged token has one; '
                "leave cache out."
            )
        if isinstance(unmerge_from, bool) or not isinstance(unmerge_from, int) or unmerge_from < 0:
            raise ValueError(f"unmerge_from={unmerge_from!r}: name a layer of the language model, counted from 0.")
        if unmerge_from and unmerge in EACH_ONCE:
            raise ValueError(
                f'unmerge_from goes with unmerge="exact" or "representative": unmerge="{unmerge}" unmerges in no layer.'
            )
        how = Attending(unmerge, representatives, check_backend(backend), cache, unmerge_from, prune)
        if isinstance(parts, LoneEncoder) and how != Attending():
            raise ValueError(
                "an encoder by itself has no language model: leave unmerge, backend, cache, unmerge_from and prune out"
            )
        if merge is not None:
            _check_reducer(merge)
            if counted:
                raise BadBudget("a budget needs thresholds; with merge=, the rule says how much is kept.")
        handle = Handle(parts, calibrated, merge, how)
        handle._check_fits(parts)
        if merge is None:
            handle.set_budget(budget, per_second, at_most=at_most, exactly=exactly)
        handle.set_focus(focus, adds=focus_adds, guard=guard)
        try:
            handle._install(parts)
            handle._check(parts)
            handle._places = handle._where(parts)
        except BaseException:
            handle.remove()
            raise
        return handle


def _load(model: Any, named: Thresholds | str | os.PathLike[str] | None) -> Thresholds:
    """The thresholds that are given or named, or those beside the model. May ask the hub."""
    if named is not None:
        return named if isinstance(named, Thresholds) else Thresholds.load(named)
    config: Any = getattr(parts_of(model).model, "config", None)
    revision = getattr(config, "_commit_hash", None)
    return beside(getattr(config, "_name_or_path", ""), "dymu.apply(model, thresholds)", revision)


def _check_reducer(merge: Any) -> None:
    if not isinstance(merge, Reducer):
        raise TypeError(f"merge= takes a dymu.Reducer such as dymu.FixedMerge(keep=94), not {merge!r}")
    if all(getattr(type(merge), stage) is getattr(Reducer, stage) for stage in get_args(Stage)):
        raise TypeError(f"{type(merge).__name__} defines none of {', '.join(get_args(Stage))}: it reduces nothing")


@contextmanager
def applied(model: PreTrainedModel, options: dict[str, Any] | None) -> Iterator[Handle | None]:
    """The model with DyMU applied inside `with`, see `apply` for the `options`; None leaves the model as it is."""
    if options is None:
        yield None
        return
    with apply(model, **options) as handle:
        yield handle


@contextmanager
def remembering(handle: Handle, memory: LayerMemory) -> Iterator[None]:
    """Inside `with`, let this thread's calls take what layers gave of the same pictures with the same weights."""
    state = handle._state
    state.memory = memory
    try:
        yield
    finally:
        state.memory = None


def handle_of(model: PreTrainedModel) -> Handle | None:
    """The handle of a model; None where DyMU is not applied to it.

    Raises:
        UnsupportedModel: the model is of no described family.
    """
    handle: Handle | None = _marked(parts_of(model))[0].__dict__.get(_MARK)
    return handle


def encoder_of(parts: Parts | LoneEncoder, tokens: int = 0) -> Encoder:
    """Describe the vision encoder that thresholds belong to."""
    return Encoder(
        model_type=type_of(parts.tower),
        layers=len(parts.encoder_layers),
        depth=max(parts.feature_layers()),
        hidden_size=parts.width,
        heads=parts.heads,
        tokens=tokens,
        unit=parts.side() if isinstance(parts, Parts) else 1,
    )


def check_fits(thresholds: Thresholds, parts: Parts | LoneEncoder) -> None:
    """Raises: BadThresholds, where they are not for these parts."""
    thresholds.check_fits(encoder_of(parts), parts.cuts_images, max(parts.prefix, parts.dropped()))


def _marked(parts: Parts | LoneEncoder) -> tuple[nn.Module, ...]:
    """The modules that know the handle, so that none is changed twice."""
    return (parts.tower,) if isinstance(parts, LoneEncoder) else (parts.inner, parts.tower)


def name_of(model: nn.Module) -> str:
    """The model's name on the hub, or its folder's without the path to it."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    path = expanded(name)
    return path.resolve().name if name and (path.is_absolute() or path.exists()) else name


class Handle:
    """A model with DyMU applied. Usable as a context manager, which removes it at the end."""

    def __init__(
        self,
        parts: Parts | LoneEncoder,
        thresholds: Thresholds | None,
        reducer: Reducer | None,
        how: Attending,
    ) -> None:
        self._thresholds, self._calls = thresholds, Calls()
        self._parts, self._state, self._pruning = parts, CallState(self._calls), how.prune
        self._vision: VisionHooks | EncoderHooks
        if isinstance(parts, LoneEncoder):
            self._vision = EncoderHooks(parts, self._state, reducer)
        else:
            self._vision = VisionHooks(parts, self._state, reducer)
            self._language = LanguageHooks(parts, self._state, how)
            self._generation = GenerationHooks(parts, self._state)
        self._count = Count()
        self._tokens: float | None = None
        self._undo: list[Callable[[], object]] = []
        self._staying = 0
        """How many of these stay while parts are exchanged."""
        self._places: Places | None = None
        """None while something is amiss."""
        self._refused: str | None = None

    @property
    def last(self) -> Report:
        """What merged in the last call of this thread; in one that made none, in the newest call of any, such as a
        thread that streams."""
        return self._state.last

    @property
    def budget(self) -> float | None:
        """Average of image tokens per image, or what each keeps exactly; set it in tokens or as a fraction, from the
        next image on.

        Raises:
            BadBudget: on setting, one outside the calibrated range, or any where another reducer merges.
        """
        return self._tokens

    @budget.setter
    def budget(self, budget: int | float | None) -> None:
        self._set(self._count.at(budget))

    @property
    def per_second(self) -> float | None:
        """Average of tokens per second of video; None: every frame is merged by itself. Set it likewise.

        Raises:
            BadBudget: on setting, one for which nothing was calibrated.
        """
        return self._count.per_second

    @per_second.setter
    def per_second(self, per_second: int | float | None) -> None:
        self._set(replace(self._count, per_second=per_second))

    @property
    def at_most(self) -> int | float | None:
        """Tokens that no image goes beyond; see `apply`."""
        return self._count.at_most

    @property
    def exactly(self) -> int | float | None:
        """Tokens that every image keeps; see `apply`."""
        return self._count.exactly

    def set_budget(
        self,
        budget: int | float | None = None,
        per_second: int | float | None = None,
        *,
        at_most: int | float | None = None,
        exactly: int | float | None = None,
    ) -> None:
        """Set all counts together, from the next image or video on; see `apply`.

        Raises:
            BadBudget: for which nothing was calibrated, or another reducer merges. Nothing has changed then.
        """
        self._set(Count(budget, per_second, at_most, exactly))

    def _set(self, count: Count) -> None:
        if count.exactly is not None:
            self._refuse_more()
        rule, tokens = self._rule(count)
        self._vision.reducer, self._tokens, self._count = rule, tokens, count
        self._calls.drift = self._drift(count)

    def _refuse_more(self) -> None:
        """Raises: BadBudget, where what is in focus lets some pictures keep more."""
        focus = self._vision.focus
        if focus is not None and focus.inside is not None:
            raise BadBudget("a focus adds tokens here, so that pictures keep several numbers: call set_focus() first.")

    def _drift(self, count: Count) -> Drift | None:
        """None: nothing says how many tokens images keep on average."""
        if self._thresholds is None or count.exactly is not None or count.at_most is not None:
            return None
        full = self._thresholds.full
        entry = self._thresholds.at(count.budget)
        return None if full is None else Drift(entry.budget / full, entry.sd and entry.sd / entry.budget)

    def _rule(self, count: Count) -> tuple[Reducer, float]:
        """See `Count.rule`."""
        if self._calls.removed:
            raise BadBudget("DyMU was removed from this model; apply it again to set a budget.")
        if self._thresholds is None:
            raise BadBudget("this model merges by a fixed rule, which has no budget; apply thresholds instead.")
        parts = self._parts
        if count.per_second is not None and (isinstance(parts, LoneEncoder) or "video" not in parts.placeholders):
            raise BadBudget("this model takes no videos, so it has no tokens per second; leave per_second out.")
        return count.rule(self._thresholds)

    def _in_focus(self, focus: Any, adds: bool, exact: bool) -> InFocus | None:
        """See `apply`.

        Args:
            exact: whether every image keeps as many tokens.
        """
        if self._calls.removed:
            raise BadFocus("DyMU was removed from this model; apply it again to set a focus.")
        if focus is None and adds:
            raise BadFocus("focus_adds says nothing without a focus; give one, or leave it out.")
        if focus is not None and self._pruning is not None and self._vision.reducer == NOTHING:
            raise BadFocus("nothing merges in the encoder, so that nothing can merge last there; leave the focus out.")
        if focus is not None and not getattr(self._vision.reducer, "focuses", False):
            raise BadFocus(f"{type(self._vision.reducer).__name__} knows no focus; take thresholds, or FixedMerge.")
        if adds and exact:
            raise BadFocus("every image keeps exactly so many tokens, so that none can be added; leave focus_adds out.")
        inside = NOTHING if adds else None
        if isinstance(focus, list):
            if focus and isinstance(focus[0], int | float):
                raise BadFocus(f"a list has one focus for each image: give a box as a tuple, {tuple(focus)!r}.")
            return InFocus(tuple(map(spec_of, focus)), inside)
        return None if focus is None else InFocus(spec_of(focus), inside)

    def set_focus(self, focus: Any = None, *, adds: bool = False, guard: Literal["text"] | None = None) -> None:
        """Set what is in focus, from the next image on; see `apply`.

        Raises:
            BadFocus: it is no part of a picture, or both a focus and a guard are given. Nothing has changed then.
        """
        if guard is None:
            found = self._in_focus(focus, adds, exact=self._count.exactly is not None)
        elif guard != "text" or focus is not None or adds:
            raise BadFocus('guard= takes "text" alone, without focus and focus_adds; give one of them.')
        elif self._thresholds is None:
            raise BadFocus("text is guarded by thresholds, and this model merges by a fixed rule; leave guard out.")
        elif self._thresholds.full is None:
            raise BadFocus(f"{self._thresholds} does not say how many tokens an image has; calibrate again.")
        else:
            found = self._in_focus(masks.strokes, adds=False, exact=False)
        self._vision.focus = found

    @contextmanager
    def at(
        self,
        budget: Budget | Iterable[Budget] = None,
        *,
        at_most: int | float | None = None,
        exactly: int | float | None = None,
        focus: Any = None,
        focus_adds: bool = False,
    ) -> Iterator[None]:
        """Other counts, or another focus, inside `with`, for calls of this thread; others go on with the handle's.

        `model.generate(..., dymu_budget=..., dymu_focus=...)` does the same for one call.

        Args:
            budget: in the sense of the handle's: an average, under its cap if it has both; the cap, where it has that
                alone; or what images keep exactly. `untouched`: nothing merges. Several: one for each image of a call,
                then for each video; None among them is the handle's own. So images of earlier turns can cost less.
            at_most, exactly, focus, focus_adds: see `apply`; instead of the handle's.

        Raises:
            BadFocus: see `set_focus`; in a call, more of them than images, or fewer.
            BadBudget: see `set_budget`; in a call, more budgets than images, or fewer.
        """
        if self._calls.removed:
            raise BadBudget("DyMU was removed from this model; apply it again to set a budget or a focus.")
        several: list[Budget] | None = None
        if isinstance(budget, Iterable) and not isinstance(budget, str | bytes) and getattr(budget, "ndim", 1) > 0:
            several = list(budget)
        count = self._count
        if exactly is not None:
            if budget is not None:
                raise BadBudget("give either exactly=, or a budget.")
            if focus is None:
                self._refuse_more()
            count = Count(exactly=exactly)
        elif at_most is not None:
            if budget == UNTOUCHED if several is None else UNTOUCHED in several:
                raise BadBudget("give either a cap, or a budget of 'untouched'.")
            mean = self._tokens if count.exactly is None else None
            count = Count(mean, count.per_second, at_most)
        if several is None:
            rules: Reducer | tuple[Reducer, ...] = self._rule_of(budget, count)  # type: ignore[arg-type]
        else:
            rules = tuple(self._rule_of(one, count) for one in several)
        state, before = self._state, (self._state.rules, self._state.focus)
        found = self._in_focus(focus, focus_adds, exact=count.exactly is not None)
        try:
            state.rules = state.rules if budget is at_most is exactly is None else rules
            state.focus = found or state.focus
            yield
        finally:
            state.rules, state.focus = before

    def _rule_of(self, budget: Budget, count: Count) -> Reducer:
        """For an image with another budget, in the sense of `count`."""
        if budget == UNTOUCHED:
            return NOTHING
        if budget is None and count is self._count:
            assert self._vision.reducer is not None
            return self._vision.reducer
        if isinstance(budget, str):
            raise BadBudget(f"a budget is a number of tokens, a fraction of them or {UNTOUCHED!r}, not {budget!r}.")
        if budget is None:
            return self._rule(count)[0]
        capped = count.at_most is not None and count is not self._count
        return self._rule(replace(count, budget=budget) if capped else count.at(budget))[0]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The untouched model inside `with`, in this thread: calls of others go on merging. KV caches and encoded
        images do not carry over, either way."""
        thread, disabled = threading.get_ident(), self._calls.disabled
        disabled[thread] += 1
        try:
            yield
        finally:
            disabled[thread] -= 1

    def remove(self) -> None:
        """Give the model back as it was, when the calls of other threads are over. What somebody else put in place of
        something of ours stays.

        Raises:
            DymuError: a call of this thread runs. Nothing has changed then.
        """
        with self._state.alone():
            self._calls.removed = True
            self._uninstall()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()

    def __repr__(self) -> str:
        how = "removed" if self._calls.removed else repr(self._vision.reducer)
        if self._thresholds is not None and not self._calls.removed:
            how = str(self._count if self._count.exactly is not None else replace(self._count, budget=self._tokens))
        if self._pruning is not None and not self._calls.removed:
            how = f"{how}, {self._pruning}"
        return f"<dymu.Handle of {type(self._parts.model).__name__}: {how}>"

    def _run(self, around: Around, method: Method, *args: Any, **kwargs: Any) -> Any:
        """A call of the model: of the outermost one, the parts are those that the model has now."""
        budget, focus = kwargs.pop("dymu_budget", None), kwargs.pop("dymu_focus", None)
        if budget is not None or focus is not None:
            if not self._state.active:
                raise BadBudget(
                    "DyMU is disabled or removed here, so that dymu_budget and dymu_focus say nothing: leave them out."
                )
            asks = isinstance(self._parts, Parts) and around in (self._forward, self._generation.generate)
            if asks and len(args) < 2 and all(kwargs.get(name) is None for name in PIXELS):
                raise BadBudget(
                    "no pictures come with this call, so that dymu_budget and dymu_focus say nothing: give them along "
                    "with pixel_values, or to the call that encodes the pictures."
                )
            with self.at(budget, focus=focus):
                return self._run(around, method, *args, **kwargs)
        if self._state.within_call:
            return self._merging(around, method, *args, **kwargs)
        with self._state.call():
            if self._state.active and around != self._forward:  # which does
                self._follow()
            return self._merging(around, method, *args, **kwargs)

    def _merging(self, around: Around, method: Method, *args: Any, **kwargs: Any) -> Any:
        if not self._state.active:
            refuse_merged_features(kwargs)
            return method(*args, **kwargs)
        return around(method, *args, **kwargs)

    def _run_within(self, around: Around, method: Method, *args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs) if self._state.active else method(*args, **kwargs)

    def _follow(self, seeing: bool = True) -> None:
        """Hang everything into the parts that somebody put in place of those before.

        Args:
            seeing: whether pictures may be encoded; where none is, the vision half is looked at with the next.

        Raises:
            UnsupportedModel: they are not what the description says.
        """
        seeing = seeing or self._refused is not None
        if not _unchanged(self._places, seeing):
            with self._state.alone_within():
                if not _unchanged(self._places, seeing):
                    self._places = None
                    parts = parts_of(self._parts.model)
                    self._uninstall(down_to=self._staying)
                    self._install(parts)
                    try:
                        self._check(parts)
                        self._refused = None
                    except (DymuError, ValueError) as error:
                        self._refused = str(error)
                    self._places = self._where(parts)
        if self._refused is not None:
            raise UnsupportedModel(self._refused)

    def _where(self, parts: Parts | LoneEncoder) -> Places:
        """Where everything hangs."""
        more: tuple[nn.Module, ...] = ()
        if isinstance(parts, Parts) and self._language.by_layer:
            more = parts.decoder_layers
            more += parts.decoder_mlps if self._language.skips_mlps else ()
        return _places(parts, more)

    def _check_fits(self, parts: Parts | LoneEncoder) -> None:
        """Refuse parts that the thresholds, or the reducer, are not for."""
        if self._thresholds is not None:
            check_fits(self._thresholds, parts)
        elif self._vision.reducer is not None:
            self._vision.reducer.check_fits(max(parts.feature_layers()))

    def _check(self, parts: Parts | LoneEncoder) -> None:
        """Refuse parts that are not what the descriptions, or the thresholds, say."""
        self._check_fits(parts)
        rotations = check_layers(parts)
        if isinstance(parts, Parts):
            self._language.adopt(parts, rotations)

    def _forward(self, forward: Method, *args: Any, **kwargs: Any) -> Any:
        """Each forward of the whole, also within `generate`."""
        self._follow(seeing=len(args) > 1 or any(kwargs.get(name) is not None for name in PIXELS))
        state, before = self._state, self._state.last_logits
        asked = kwargs.get("logits_to_keep", 0)
        try:
            watched = kwargs.get("output_hidden_states") or kwargs.get("labels") is not None
            state.last_logits = asked if isinstance(asked, int) and not watched else 0
            return forward(*args, **kwargs)
        finally:
            state.last_logits = before

    def _install(self, parts: Parts | LoneEncoder) -> None:
        self._parts = parts
        if not self._undo:  # these stay while parts are exchanged: each call finds out whether the rest is in place
            if isinstance(parts, Parts):
                self._call(parts.model, "generate", self._generation.generate)
            for name in METHODS:
                if hasattr(parts.model, name) and parts.model is not parts.tower:
                    self._call(parts.model, name, self._forward)
            self._staying = len(self._undo)
        for module in _marked(parts):
            self._undo.append(functools.partial(self._unmark, module))
            module.__dict__[_MARK] = self
        if isinstance(parts, LoneEncoder):
            self._install_encoder(parts)
        else:
            self._install_model(parts)
        warn_of_hooks(parts.encoder_attentions, self._calls.warned)
        for module in {id(module): module for module in (parts.model, *_marked(parts))}.values():
            self._put(module, "__getstate__", refuse_copy)

    def _install_encoder(self, parts: LoneEncoder) -> None:
        encoder = self._vision
        assert isinstance(encoder, EncoderHooks)
        encoder.parts = parts
        for name in METHODS:
            if hasattr(parts.tower, name):
                self._call(parts.tower, name, functools.partial(encoder.encode, name))
        for index, module in enumerate(parts.encoder_modules):
            self._within(module, "forward", functools.partial(encoder.layer, index))

    def _install_model(self, parts: Parts) -> None:
        vision, language, generation, state = self._vision, self._language, self._generation, self._state
        assert isinstance(vision, VisionHooks)
        vision.into(parts)
        language.parts = generation.parts = parts
        if parts.family.remembers:
            self._undo.append(by_thread(parts.inner, parts.family.remembers, lambda: state.active))
        self._call(parts.inner, "forward", language.inner)
        # The encoder merges.
        for modality in parts.placeholders:
            self._call(parts.inner, f"get_{modality}_features", functools.partial(vision.features, modality))
        self._within(parts.tower, "forward", vision.tower)
        for index, module in enumerate(parts.encoder_modules):
            self._within(module, "forward", functools.partial(vision.layer, index))
        if parts.pooler is not None:
            self._within(parts.pooler, "forward", vision.pooler)
        if parts.merger is not None:
            self._within(parts.merger, "forward", vision.merger)
        if parts.places is not None:
            self._within(parts.places, "forward", vision.places)
        for module in parts.side_mergers:
            self._within(module, "forward", vision.side_merger)
        if parts.projector is not None:
            self._within(parts.projector, "forward", vision.projector)
        # The language model unmerges.
        self._call(parts.language_model, "forward", language.decoder)
        self._within(parts.rotary, "forward", language.rotary)
        for module in parts.mixers:
            self._within(module, "forward", language.mixer)
        for index, module in enumerate(parts.decoder_layers if language.by_layer else ()):
            self._within(module, "forward", functools.partial(language.layer, index))
        for module in parts.decoder_mlps if language.skips_mlps else ():
            self._within(module, "forward", language.feed)
        for module in parts.last_by_token:
            self._within(module, "forward", language.by_token)
        choosing = parts.choosing_attention
        views = {id(module.config): config_view(module.config, lambda: NAME) for module in choosing}
        for module in choosing:
            self._put(module, "config", views[id(module.config)])
        view = config_view(parts.language_model.config, lambda: NAME if state.unmerging else None)
        self._put(parts.language_model, "config", view)
        if parts.family.both_ways is not None:  # then the module that holds both halves makes masks
            within = config_view(view, lambda: NAME if state.active else None)
            self._put(parts.inner, "config", config_view(parts.inner.config, lambda: None, within))
        for name, around in generation.names.items():
            self._within(parts.model, name, around)
        self._put(parts.language_model, "__getstate__", refuse_copy)

    def _uninstall(self, down_to: int = 0) -> None:
        """Undo everything but the first things, the last first; what an interruption leaves, the next time does."""
        while len(self._undo) > down_to:
            self._undo[-1]()
            self._undo.pop()

    def _unmark(self, module: nn.Module) -> None:
        if module.__dict__.get(_MARK) is self:
            del module.__dict__[_MARK]

    def _call(self, module: nn.Module, name: str, around: Around) -> None:
        """Put `around` a method that callers call."""
        self._put(module, name, Replaced(getattr(module, name), functools.partial(self._run, around)))

    def _within(self, module: nn.Module, name: str, around: Around) -> None:
        """Put `around` a method that runs within a call."""
        self._put(module, name, Replaced(getattr(module, name), functools.partial(self._run_within, around)))

    def _put(self, module: nn.Module, name: str, value: object) -> None:
        """Set an attribute of this instance, and remember what it was."""
        before = module.__dict__.get(name, _ABSENT)

        def undo() -> None:
            if isinstance(value, Replaced):
                value.retired = True
            if module.__dict__.get(name, _ABSENT) is not value:
                return  # somebody else has set or removed it since
            if before is _ABSENT:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before

        self._undo.append(undo)
        module.__dict__[name] = value


Place = tuple[dict[str, Any], str, Any]
"""A namespace, a name in it, and what had that name when DyMU was hung in."""


@dataclass(frozen=True)
class Places:
    """Where everything hangs: what only pictures pass through, and the rest. Of an encoder by itself all is rest."""

    vision: Sequence[Place]
    rest: Sequence[Place]


def _places(parts: Parts | LoneEncoder, more: tuple[nn.Module, ...] = ()) -> Places:
    """The ways from the model to the modules that DyMU relies on, and what stands in the place of their `forward` and
    `config`; `more`: some of the language model."""
    paths = {id(module): path for path, module in parts.model.named_modules()}
    vision, rest = dict[tuple[int, str], Place](), dict[tuple[int, str], Place]()
    of_vision = set[int]() if isinstance(parts, LoneEncoder) else {id(module) for module in parts.vision if module}
    for module in (*parts.relied_on, *more):
        if module is None:
            continue
        places = vision if id(module) in of_vision else rest
        path, parent = paths.get(id(module), ""), parts.model
        for name in path.split(".") if path else ():
            child: Any = parent._modules[name]
            places[id(parent), name] = (parent._modules, name, child)
            parent = child
        for name in ("forward", "config"):
            places[id(module), name] = (module.__dict__, name, module.__dict__.get(name))
    return Places([place for key, place in vision.items() if key not in rest], list(rest.values()))


def _unchanged(places: Places | None, seeing: bool) -> bool:
    """Whether all is as it was; `seeing`: in the vision half, too."""
    if places is None:
        return False
    for within, name, value in places.rest:
        if within.get(name) is not value:
            return False
    return not seeing or all(within.get(name) is value for within, name, value in places.vision)
