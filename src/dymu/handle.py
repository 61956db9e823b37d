"""`apply` and the handle that undoes it: the only file that changes a model for longer than a call."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args

from torch import nn
from transformers import PreTrainedModel

from dymu.choices import CACHE_FORMS, UNMERGE, CacheForm, Unmerge
from dymu.errors import AlreadyApplied, BadBudget, DymuError, UnsupportedModel
from dymu.families.resolve import Parts, resolve
from dymu.hooks.attention import NAME
from dymu.hooks.call import CallState
from dymu.hooks.generation import GenerationHooks
from dymu.hooks.language import LanguageHooks
from dymu.hooks.vision import VisionHooks
from dymu.reducers import Reducer, Stage, ThresholdMerge
from dymu.report import Report
from dymu.thresholds import Encoder, Thresholds
from dymu.unmerging import choose
from dymu.unmerging.virtual import no_rotation

_MARK = "_dymu_handle"


def apply(
    model: PreTrainedModel,
    thresholds: Thresholds | str | os.PathLike[str] | None = None,
    *,
    budget: int | float | None = None,
    per_second: int | float | None = None,
    merge: Reducer | None = None,
    unmerge: Unmerge = "exact",
    backend: str = "auto",
    cache: CacheForm = "merged",
) -> Handle:
    """Make a stock vision-language model merge image tokens, in place.

    Args:
        model: a transformers model of a described family (`dymu families`).
        thresholds: a `Thresholds`, or a file of them.
        budget: average of image tokens per image, class token and registers not counted; a float up to 1 is a
            fraction of the full count. May be left out where the thresholds hold one budget only. The frames of a video
            keep the same fraction each.
        per_second: average of tokens per second of video. Tokens that stay alike are then kept from frame to frame.
            None: every frame is merged by itself, as in the paper.
        merge: another way to have fewer tokens instead of thresholds, such as `FixedMerge(keep=94)`.
        unmerge: `exact`: the language model attends as if no token had been merged (VTU, paper section 3.2). `compact`:
            it sees each merged token once, at the mean position of its group and as heavy as its size. `original`: the
            same, all as heavy as one. `none`: it sees merged tokens as a shorter prompt. See `dymu.choices.Unmerge`.
        backend: how to compute the attention: `auto`, `sdpa`, `triton` (on a GPU) or `reference` (slow).
        cache: `merged`: the KV cache holds one entry per merged token. `expanded`: one per token of the full prompt, as
            without DyMU; saves no memory, and the time to unmerge keys and values for each new token.

    Returns:
        A handle to change the budget, see what merged, and undo it all.

    Raises:
        UnsupportedModel: the model is of no described family, or reads image features that no layer made.
        AlreadyApplied: DyMU is applied to this model already.
        BadThresholds, BadBudget: the thresholds or the budget do not fit.
        ValueError: an unknown `unmerge`, `backend` or `cache`, a reducer that does not fit the encoder, both or neither
            of `thresholds` and `merge`, or `cache="expanded"` with another `unmerge` than `exact` or another backend
            than `sdpa`.
        TypeError: `merge` is no `Reducer`, or acts in no stage.
    """
    parts = resolve(model)
    if max(parts.feature_layers()) == 0:
        raise UnsupportedModel("this model reads its image features ahead of the first encoder layer: none can merge.")
    if _MARK in parts.inner.__dict__:
        raise AlreadyApplied(
            "DyMU is already applied to this model; set handle.budget to change the budget, or call handle.remove() "
            "first (dymu.handle_of(model) gives the handle)."
        )
    if (thresholds is None) == (merge is None):
        raise ValueError("give either thresholds (and a budget) or merge=, not both and not neither")
    if merge is not None:
        if not isinstance(merge, Reducer):
            raise TypeError(f"merge= takes a dymu.Reducer such as dymu.FixedMerge(keep=94), not {merge!r}")
        if all(getattr(type(merge), stage) is getattr(Reducer, stage) for stage in get_args(Stage)):
            raise TypeError(f"{type(merge).__name__} defines none of {', '.join(get_args(Stage))}: it reduces nothing")
        merge.check_fits(max(parts.feature_layers()))
    if unmerge not in UNMERGE:
        raise ValueError(f"unknown unmerge {unmerge!r}; choose {', '.join(UNMERGE)}")
    if thresholds is not None and not isinstance(thresholds, Thresholds):
        thresholds = Thresholds.load(thresholds)
    if cache not in CACHE_FORMS:
        raise ValueError(f"unknown cache {cache!r}; choose {' or '.join(CACHE_FORMS)}")
    if cache == "expanded" and (unmerge != "exact" or choose(backend) != "sdpa"):
        raise ValueError('cache="expanded" needs unmerge="exact" and the backend sdpa')
    handle = Handle(parts, thresholds, merge, unmerge, choose(backend), cache)
    if thresholds is not None:
        thresholds.check_fits(encoder_of(parts), parts.family.cuts_images)
        handle.set_budget(budget, per_second)
    elif budget is not None or per_second is not None:
        raise BadBudget("a budget needs thresholds; with merge=, the rule says how much is kept.")
    parts.inner.__dict__[_MARK] = handle
    handle._install()
    return handle


@contextmanager
def applied(model: PreTrainedModel, options: dict[str, Any] | None) -> Iterator[Handle | None]:
    """The model with DyMU applied inside `with`, see `apply` for the `options`; None leaves the model as it is."""
    if options is None:
        yield None
        return
    with apply(model, **options) as handle:
        yield handle


def handle_of(model: PreTrainedModel) -> Handle | None:
    """The handle of a model; None where DyMU is not applied to it.

    Raises:
        UnsupportedModel: the model is of no described family.
    """
    handle: Handle | None = resolve(model).inner.__dict__.get(_MARK)
    return handle


def encoder_of(parts: Parts, tokens: int = 0) -> Encoder:
    """Describe the vision encoder that thresholds belong to."""
    config = parts.tower.config
    return Encoder(
        model_type=config.model_type,
        layers=len(parts.encoder_layers),
        depth=max(parts.feature_layers()),
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        tokens=tokens,
    )


def name_of(model: nn.Module) -> str:
    """The model's name on the hub, or its folder's without the path to it."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    path = Path(name).expanduser()
    return path.resolve().name if name and (path.is_absolute() or path.exists()) else name


class Handle:
    """A model with DyMU applied. Usable as a context manager, which removes it at the end."""

    def __init__(
        self,
        parts: Parts,
        thresholds: Thresholds | None,
        reducer: Reducer | None,
        unmerge: Unmerge,
        backend: str,
        cache: CacheForm,
    ) -> None:
        self._parts, self._thresholds, self._state = parts, thresholds, CallState()
        self._language = LanguageHooks(parts, self._state, unmerge, backend, cache)
        self._generation = GenerationHooks(parts, self._state)
        self._vision = VisionHooks(parts, reducer, self._state.encoded, self._state.text_of)
        self._budget: float | None = None
        self._per_second: float | None = None
        self._undo = ExitStack()
        self._disabled = 0

    @property
    def last(self) -> Report:
        """What merged in the last call."""
        return self._state.report

    @property
    def budget(self) -> float | None:
        """Average of image tokens per image; set it in tokens or as a fraction, from the next image on.

        Raises:
            BadBudget: on setting, one outside the calibrated range, or any where another reducer merges.
        """
        return self._budget

    @budget.setter
    def budget(self, budget: int | float | None) -> None:
        self.set_budget(budget, self._per_second)

    @property
    def per_second(self) -> float | None:
        """Average of tokens per second of video; None: every frame is merged by itself. Set it likewise.

        Raises:
            BadBudget: on setting, one for which nothing was calibrated.
        """
        return self._per_second

    @per_second.setter
    def per_second(self, per_second: int | float | None) -> None:
        self.set_budget(self._budget, per_second)

    def set_budget(self, budget: int | float | None, per_second: int | float | None = None) -> None:
        """Set `budget` and `per_second` together, from the next image or video on.

        Raises:
            BadBudget: for which nothing was calibrated, or another reducer merges. Nothing has changed then.
        """
        if self._thresholds is None:
            raise BadBudget("this model merges by a fixed rule, which has no budget; apply thresholds instead.")
        if per_second is not None and "video" not in self._parts.placeholders:
            raise BadBudget("this model takes no videos, so it has no tokens per second; leave per_second out.")
        entry = self._thresholds.at(budget)
        over_time = None if per_second is None else self._thresholds.over_time_at(budget, per_second)
        self._vision.reducer = ThresholdMerge(entry.thresholds, entry.images, entry.frames, over_time)
        self._budget, self._per_second = entry.budget, per_second

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The untouched model inside `with`. KV caches do not carry over, either way."""
        self._disabled += 1
        self._uninstall()
        try:
            yield
        finally:
            self._disabled -= 1
            if self._parts.inner.__dict__.get(_MARK) is self and not self._disabled:
                self._install()

    def remove(self) -> None:
        """Give the model back as it was."""
        try:
            self._uninstall()
        finally:
            if self._parts.inner.__dict__.get(_MARK) is self:
                del self._parts.inner.__dict__[_MARK]

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise DymuError(
            "a model cannot be copied while DyMU is applied to it: the copy would run this model's layers; "
            "call handle.remove() first (save_pretrained works as ever)."
        )

    def _install(self) -> None:
        """Hang in everything, or nothing after an error."""
        try:
            self._install_all()
        except BaseException:
            self.remove()
            raise

    def _install_all(self) -> None:
        parts, vision, language = self._parts, self._vision, self._language
        # The encoder merges.
        for modality in parts.placeholders:
            name = f"get_{modality}_features"
            self._set(parts.inner, name, vision.features(modality, getattr(parts.inner, name)))
        for index, module in enumerate(parts.encoder_modules):
            self._set(module, "forward", vision.layer(index, module.forward))
        self._hook(parts.tower.register_forward_pre_hook(vision.before_tower, with_kwargs=True))
        self._hook(parts.tower.register_forward_hook(vision.after_tower))
        if parts.pooler is not None:
            self._hook(parts.pooler.register_forward_pre_hook(vision.before_pooler))
        self._hook(parts.projector.register_forward_hook(vision.after_projector))
        # The language model unmerges.
        self._hook(parts.inner.register_forward_pre_hook(language.before_inner, with_kwargs=True))
        self._hook(parts.inner.register_forward_hook(language.after_inner, always_call=True))
        self._hook(parts.language_model.register_forward_pre_hook(language.before_decoder, with_kwargs=True))
        self._hook(parts.language_model.register_forward_hook(language.after_decoder))
        self._set(parts.rotary, "forward", no_rotation)
        for name, replacing in self._generation.names.items():
            self._set(parts.model, name, replacing(getattr(parts.model, name)))
        for module in (parts.language_model, *parts.attentions):
            config = copy.copy(module.config)
            config._attn_implementation = NAME
            self._set(module, "config", config)

    def _uninstall(self) -> None:
        """Undo everything, last things first, also after an error in one of them."""
        self._undo.close()

    def _hook(self, registered: Any) -> None:
        self._undo.callback(registered.remove)

    def _set(self, module: nn.Module, name: str, value: object) -> None:
        """Set an attribute of this instance, and remember what it was."""
        undo: Callable[..., object]
        if name in module.__dict__:
            undo = functools.partial(module.__dict__.__setitem__, name, module.__dict__[name])
        else:
            undo = functools.partial(module.__dict__.pop, name, None)
        self._undo.callback(undo)
        module.__dict__[name] = value
