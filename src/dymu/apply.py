"""The only file that changes a model, and the handle that changes it back."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel

from dymu.errors import AlreadyApplied, BadBudget, DymuError
from dymu.families import FAMILIES, Parts, resolve
from dymu.language_hooks import LanguageHooks
from dymu.merging import FixedMerge, MergeRule, ThresholdMerge
from dymu.report import Report
from dymu.thresholds import Encoder, Thresholds
from dymu.unmerging import CACHE_FORMS, NAME, UNMERGE, CacheForm, Unmerge, choose, no_rotation
from dymu.vision_hooks import VisionHooks

_MARK = "_dymu_handle"


def apply(
    model: PreTrainedModel,
    thresholds: Thresholds | str | os.PathLike[str] | None = None,
    *,
    budget: int | float | None = None,
    per_second: int | float | None = None,
    merge: MergeRule | None = None,
    unmerge: Unmerge = "exact",
    backend: str = "auto",
    cache: CacheForm = "merged",
) -> Handle:
    """Make a stock vision-language model merge image tokens, in place.

    Args:
        model: a transformers model of a described family (`dymu families`).
        thresholds: a `Thresholds`, or a file of them.
        budget: wanted average of image tokens per image, class token and registers not counted; a float up to 1 is a
            fraction of the full count. May be left out where the thresholds hold one budget only. The frames of a video
            keep the same fraction each.
        per_second: wanted average of tokens per second of video. Tokens that stay alike then go on from frame to
            frame. None: every frame is merged by itself, as in the paper.
        merge: another rule instead of thresholds, such as `FixedMerge(keep=94)`.
        unmerge: `exact`: the language model attends as if no token had been merged (VTU, paper section 3.2). `compact`:
            it sees each merged token once, at the mean position of its group and as heavy as its size. `none`: it sees
            merged tokens as a shorter prompt. See `dymu.unmerging.Unmerge`.
        backend: how to compute the attention: `auto`, `sdpa`, `triton` (on a GPU) or `reference` (slow).
        cache: `merged`: the KV cache holds one entry per merged token. `expanded`: one per token of the full prompt, as
            without DyMU; saves no memory, and the time to unmerge keys and values for each new token.

    Returns:
        A handle to change the budget, see what merged, and undo it all.

    Raises:
        UnsupportedModel: the model is of no described family.
        AlreadyApplied: DyMU is applied to this model already.
        BadThresholds, BadBudget: the thresholds or the budget do not fit.
        ValueError: an unknown `unmerge`, `backend` or `cache`, a rule that does not fit the encoder, both or neither of
            `thresholds` and `merge`, or `cache="expanded"` with another `unmerge` than `exact` or another backend than
            `sdpa`.
        TypeError: `merge` is no rule.
    """
    parts = resolve(model, FAMILIES)
    if _MARK in parts.inner.__dict__:
        raise AlreadyApplied(
            "DyMU is already applied to this model; set handle.budget to change the budget, "
            "or call handle.remove() first."
        )
    if (thresholds is None) == (merge is None):
        raise ValueError("give either thresholds (and a budget) or merge=, not both and not neither")
    if merge is not None and not hasattr(merge, "choosers"):
        raise TypeError(f"merge= takes a rule such as dymu.FixedMerge(keep=94), not {merge!r}")
    if isinstance(merge, FixedMerge):
        merge.check_fits(max(parts.feature_layers()))
    if unmerge not in UNMERGE:
        raise ValueError(f"unknown unmerge {unmerge!r}; choose {', '.join(UNMERGE)}")
    if thresholds is not None and not isinstance(thresholds, Thresholds):
        thresholds = Thresholds.load(thresholds)
    if cache not in CACHE_FORMS:
        raise ValueError(f"unknown cache {cache!r}; choose {' or '.join(CACHE_FORMS)}")
    if cache == "expanded" and (unmerge != "exact" or choose(backend) != "sdpa"):
        raise ValueError('cache="expanded" needs unmerge="exact" and the backend sdpa')
    handle = Handle(parts, thresholds, merge, LanguageHooks(parts, unmerge, choose(backend), cache))
    if thresholds is not None:
        thresholds.check_fits(encoder_of(parts), parts.family.cuts_images)
        handle.set_budget(budget, per_second)
    elif budget is not None or per_second is not None:
        raise BadBudget("a budget needs thresholds; with merge=, the rule says how much is kept.")
    parts.inner.__dict__[_MARK] = handle
    handle._install()
    return handle


def handle_of(model: PreTrainedModel) -> Handle | None:
    """The handle of a model of a described family; None where DyMU is not applied to it."""
    found: Handle | None = resolve(model, FAMILIES).inner.__dict__.get(_MARK)
    return found


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
        self, parts: Parts, thresholds: Thresholds | None, rule: MergeRule | None, language: LanguageHooks
    ) -> None:
        self._parts, self._thresholds = parts, thresholds
        self._language = language
        self._vision = VisionHooks(parts, rule, self._language.encoded)
        self._budget: float | None = None
        self._per_second: float | None = None
        self._undo: list[Callable[[], object]] = []
        self._disabled = 0

    @property
    def last(self) -> Report:
        """What merged in the last call."""
        return self._language.report

    @property
    def budget(self) -> float | None:
        """Wanted average of image tokens per image; set it in tokens or as a fraction, from the next image on.

        Raises:
            BadBudget: on setting, one outside the calibrated range, or any where a fixed rule merges.
        """
        return self._budget

    @budget.setter
    def budget(self, budget: int | float | None) -> None:
        self.set_budget(budget, self._per_second)

    @property
    def per_second(self) -> float | None:
        """Wanted average of tokens per second of video; None: every frame is merged by itself. Set it likewise.

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
            BadBudget: for which nothing was calibrated, or a fixed rule merges. Nothing has changed then.
        """
        if self._thresholds is None:
            raise BadBudget("this model merges by a fixed rule, which has no budget; apply thresholds instead.")
        if per_second is not None and "video" not in self._parts.placeholders:
            raise BadBudget("this model takes no videos, so it has no tokens per second; leave per_second out.")
        entry = self._thresholds.at(budget)
        over_time = None if per_second is None else self._thresholds.over_time_at(budget, per_second)
        self._vision.rule = ThresholdMerge(entry.thresholds, entry.images, entry.frames, over_time)
        self._budget, self._per_second = entry.budget, per_second

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The untouched model, for a moment. KV caches do not carry over, either way."""
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
        self._uninstall()
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
        parts, vision, language = self._parts, self._vision, self._language
        # The encoder merges.
        for modality in parts.placeholders:
            name = f"get_{modality}_features"
            self._set(parts.inner, name, vision.features(modality, getattr(parts.inner, name)))
        for index, module in enumerate(parts.encoder_modules):
            self._set(module, "forward", vision.layer(index, module.forward))
        self._hook(parts.tower.register_forward_hook(vision.after_tower, with_kwargs=True))
        if parts.pooler is not None:
            self._hook(parts.pooler.register_forward_pre_hook(vision.before_pooler))
        self._hook(parts.projector.register_forward_hook(vision.after_projector))
        # The language model unmerges.
        self._hook(parts.inner.register_forward_pre_hook(language.before_inner, with_kwargs=True))
        self._hook(parts.inner.register_forward_hook(language.after_inner, always_call=True))
        self._hook(parts.language_model.register_forward_pre_hook(language.before_decoder, with_kwargs=True))
        self._hook(parts.language_model.register_forward_hook(language.after_decoder))
        self._set(parts.rotary, "forward", no_rotation)
        for name, hook in (
            ("_prepare_multimodal_encoder_kwargs_for_generation", language.encode),
            ("_expand_multimodal_outputs", language.repeat),
            ("_prefill", language.prefill),
        ):
            self._set(parts.model, name, hook(getattr(parts.model, name)))
        for module in (parts.language_model, *parts.attentions):
            config = copy.copy(module.config)
            config._attn_implementation = NAME
            self._set(module, "config", config)

    def _uninstall(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _hook(self, registered: Any) -> None:
        self._undo.append(registered.remove)

    def _set(self, module: nn.Module, name: str, value: object) -> None:
        """Set an attribute of this instance, remembering what stood there."""
        if name in module.__dict__:
            self._undo.append(functools.partial(module.__dict__.__setitem__, name, module.__dict__[name]))
        else:
            self._undo.append(functools.partial(module.__dict__.pop, name))
        module.__dict__[name] = value
