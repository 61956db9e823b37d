"""The only file that changes a model, and the handle that changes it back."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from transformers import DynamicCache, PreTrainedModel

from dymu.errors import AlreadyApplied, BadBudget, BadPrompt
from dymu.families import FAMILIES, Parts, resolve
from dymu.merging import MergeRule, MergeRun, ThresholdMerge
from dymu.report import Report
from dymu.thresholds import Encoder, Thresholds
from dymu.token_map import TokenMap
from dymu.unmerging import (
    NAME,
    UNMERGE,
    History,
    Unmerge,
    adopt,
    cache_bytes,
    choose,
    image_leaders,
    leaders_within,
    no_rotation,
    plan_step,
    prompt_leaders,
    prompt_map,
)

_MARK = "_dymu_handle"
_LEADERS = "_dymu_leaders"


def apply(
    model: PreTrainedModel,
    thresholds: Thresholds | str | os.PathLike[str] | None = None,
    *,
    budget: int | float | None = None,
    merge: MergeRule | None = None,
    unmerge: Unmerge = "exact",
    backend: str = "auto",
) -> Handle:
    """Make a stock vision-language model merge image tokens, in place.

    Args:
        model: a transformers model of a described family (`dymu families`).
        thresholds: a `Thresholds`, or a file of them.
        budget: wanted average of image tokens per image; a float up to 1 is a fraction of the full count. May be left
            out where the thresholds hold one budget only.
        merge: another rule instead of thresholds, such as `FixedMerge(keep=94)`.
        unmerge: `exact`: the language model attends as if no token had been merged (VTU, paper section 3.2). `none`: it
            sees merged tokens as a shorter prompt.
        backend: how to compute the attention: `auto`, `sdpa` or `reference`.

    Returns:
        A handle to change the budget, see what merged, and undo it all.

    Raises:
        UnsupportedModel: the model is of no described family.
        AlreadyApplied: DyMU is applied to this model already.
        BadThresholds, BadBudget: the thresholds or the budget do not fit.
        ValueError: an unknown `unmerge` or `backend`, or both or neither of `thresholds` and `merge`.
    """
    parts = resolve(model, FAMILIES)
    if hasattr(parts.inner, _MARK):
        raise AlreadyApplied(
            "DyMU is already applied to this model; set handle.budget to change the budget, "
            "or call handle.remove() first."
        )
    if (thresholds is None) == (merge is None):
        raise ValueError("give either thresholds (and a budget) or merge=, not both and not neither")
    if unmerge not in UNMERGE:
        raise ValueError(f"unknown unmerge {unmerge!r}; choose {' or '.join(UNMERGE)}")
    if thresholds is not None and not isinstance(thresholds, Thresholds):
        thresholds = Thresholds.load(thresholds)
    handle = Handle(parts, thresholds, merge, unmerge, choose(backend))
    if thresholds is not None:
        thresholds.check_fits(encoder_of(parts))
        handle.budget = budget
    elif budget is not None:
        raise BadBudget("a budget needs thresholds; with merge=, the rule says how much is kept.")
    handle._install()
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


class Handle:
    """A model with DyMU applied. Usable as a context manager, which removes it at the end.

    Attributes:
        last: what merged in the last call, a `Report`.
    """

    def __init__(
        self,
        parts: Parts,
        thresholds: Thresholds | None,
        rule: MergeRule | None,
        unmerge: Unmerge,
        backend: str,
    ) -> None:
        self.last = Report()
        self._parts, self._thresholds, self._rule = parts, thresholds, rule
        self._unmerge: Unmerge = unmerge
        self._backend = backend
        self._budget: float | None = None
        self._inner_signature = inspect.signature(parts.inner.forward)
        self._decoder_signature = inspect.signature(parts.language_model.forward)
        self._undo: list[Callable[[], object]] = []
        self._run: MergeRun | None = None
        self._dropped = 0
        self._features: list[Tensor] | None = None
        self._image_tokens: Tensor | None = None
        self._map: TokenMap | None = None
        self._chunked: tuple[int, Tensor] | None = None

    @property
    def budget(self) -> float | None:
        """Wanted average of image tokens per image; set it in tokens or as a fraction, from the next image on."""
        return self._budget

    @budget.setter
    def budget(self, budget: int | float | None) -> None:
        if self._thresholds is None:
            raise BadBudget("this model merges by a fixed rule, which has no budget; apply thresholds instead.")
        self._rule = ThresholdMerge(tuple(self._thresholds.per_layer(budget)))
        self._budget = self._thresholds.tokens_for(budget)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The untouched model, for a moment. KV caches do not carry over, either way."""
        self._uninstall()
        try:
            yield
        finally:
            self._install()

    def remove(self) -> None:
        """Give the model back as it was."""
        self._uninstall()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _install(self) -> None:
        parts = self._parts
        self._set(parts.inner, _MARK, self)
        # The encoder merges.
        self._set(parts.inner, "get_image_features", self._merging(parts.inner.get_image_features))
        for index, module in enumerate(parts.encoder_modules):
            self._set(module, "forward", self._merging_layer(index, module.forward))
        self._hook(parts.tower.register_forward_hook(self._after_tower))
        self._hook(parts.projector.register_forward_hook(self._after_projector))
        # The language model unmerges.
        self._hook(parts.inner.register_forward_pre_hook(self._before_inner, with_kwargs=True))
        self._hook(parts.inner.register_forward_hook(self._after_inner, always_call=True))
        self._hook(parts.language_model.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        self._hook(parts.language_model.register_forward_hook(self._after_decoder, with_kwargs=True))
        self._hook(parts.rotary.register_forward_hook(no_rotation))
        if hasattr(parts.model, "_prefill"):
            self._set(parts.model, "_prefill", self._prefilling(parts.model._prefill))
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

    # Encoder: image -> fewer tokens, projected, then copied to the places that the family's own code fills.

    def _merging(self, get_image_features: Callable[..., Any]) -> Callable[..., Any]:
        family = self._parts.family
        signature = inspect.signature(get_image_features)

        @functools.wraps(get_image_features)
        def merging(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            self._dropped = self._parts.dropped(given.get(family.select_strategy))
            layers = self._parts.feature_layers(given.get(family.feature_layer))
            assert self._rule is not None
            self._run = MergeRun(self._rule, max(layers), max(self._parts.prefix, self._dropped))
            try:
                output = get_image_features(*args, **kwargs)
                self._encoded(self._run, given["pixel_values"], output.pooler_output)
            finally:
                self._run = None
            return output

        return merging

    def _merging_layer(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        layer = self._parts.encoder_layers[index]

        @functools.wraps(forward)
        def merging_layer(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._run is None:
                return forward(hidden_states, *args, **kwargs)
            return self._run.layer(index, layer, hidden_states)

        return merging_layer

    def _after_tower(self, _tower: nn.Module, _args: Any, output: Any) -> None:
        """Features of several layers are joined token by token, so bring them all to the tokens left at the end."""
        run = self._run
        if run is not None and output.hidden_states is not None:
            output.hidden_states = tuple(
                None if hidden is None else run.in_final_tokens(hidden, layers)
                for layers, hidden in enumerate(output.hidden_states)
            )

    def _after_projector(self, _projector: nn.Module, _args: Any, features: Tensor) -> Tensor:
        return features if self._run is None else self._run.map.drop(self._dropped).expand(features)

    def _encoded(self, run: MergeRun, pixel_values: Tensor, features: list[Tensor]) -> None:
        """Let every image's features carry their token map, wherever generation takes them."""
        images = run.map.drop(self._dropped)
        for feature, leaders in zip(features, image_leaders(images), strict=True):
            setattr(feature, _LEADERS, leaders)
        self._features = features
        self._check_room()
        prefix = self._parts.prefix - self._dropped if self._parts.class_token else 0
        grid = _grid(run.map.tokens - self._parts.prefix, pixel_values)
        self.last = Report(
            map=images,
            layers=[(state.map.kept - self._dropped).tolist() for state in run.states[1 : run.depth + 1]],
            prefix=prefix,
            grid=grid,
            seen=adaptive_avg_pool2d(pixel_values.detach().float(), grid).cpu(),
        )

    # Language model: the full prompt -> merged prompt -> the full prompt's outputs.

    def _before_inner(self, inner: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Learn where this call's images stand in the prompt."""
        given = self._inner_signature.bind(*args, **kwargs).arguments
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        encoded = (given.get("mm_encoder_outputs") or {}).get("image")
        self._features = None if encoded is None else encoded.pooler_output
        self._image_tokens = None
        if encoded is not None or given.get("pixel_values") is not None:
            token = self._parts.image_token_id
            if ids is not None:
                self._image_tokens = ids == token
            elif embeds is not None:
                of_token = inner.get_input_embeddings()(torch.tensor(token, device=embeds.device))
                self._image_tokens = (embeds == of_token).all(-1)
            self._check_room()
        elif not _length(given.get("past_key_values")):
            self.last = Report()

    def _check_room(self) -> None:
        """Raises: BadPrompt, where the prompts' placeholders are not as many as the images' features."""
        if self._image_tokens is None or self._features is None or self._chunked is not None:
            return
        places, tokens = int(self._image_tokens.sum()), sum(len(feature) for feature in self._features)
        if places != tokens:
            raise BadPrompt(
                f"the prompts have {places} image placeholders, but the {len(self._features)} images given need "
                f"{tokens}; write one placeholder per image into the text and let the processor expand it."
            )

    def _after_inner(self, *_: Any) -> None:
        """Forget this call's images, also where it failed."""
        self._image_tokens = self._features = None

    def _prefilling(self, prefill: Callable[..., Any]) -> Callable[..., Any]:
        """Chunked prefill cuts the features of encoded images into pieces that no longer carry their token maps, so
        remember those of the whole prompt meanwhile."""
        signature = inspect.signature(prefill)

        @functools.wraps(prefill)
        def prefilling(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            inputs = given["model_kwargs"]
            encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
            if given["generation_config"].prefill_chunk_size is not None and encoded is not None:
                ids, mask, past = given["input_ids"], inputs.get("attention_mask"), _length(inputs["past_key_values"])
                if mask is None or mask.shape[1] == ids.shape[1]:
                    ids = ids[:, past:]
                leaders = _carried(encoded.pooler_output)
                if leaders is not None:
                    self._chunked = past, prompt_leaders(ids == self._parts.image_token_id, leaders)
            try:
                return prefill(*args, **kwargs)
            finally:
                self._chunked = None

        return prefilling

    def _leaders(self, batch: int, start: int, tokens: int) -> Tensor | None:
        """Leaders of the prompt's tokens from `start` on, or None where no token is merged."""
        places, features = self._image_tokens, self._features
        if self._chunked is not None:
            first, leaders = self._chunked
            return leaders_within(leaders, start - first, tokens)
        if places is None or features is None or places.shape != (batch, tokens):
            return None
        carried = _carried(features)
        return None if carried is None else prompt_leaders(places, carried)

    def _before_decoder(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = self._decoder_signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        embeds, ids = given.pop("inputs_embeds", None), given.pop("input_ids", None)
        if embeds is None:
            embeds = decoder.get_input_embeddings()(ids)
        batch, tokens = embeds.shape[:2]

        cache, use_cache = given.pop("past_key_values", None), given.get("use_cache")
        if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        history = History() if cache is None else adopt(cache)

        present = _present(given.pop("attention_mask", None), tokens)
        positions = given.pop("position_ids", None)
        if positions is None:
            positions = torch.arange(history.length, history.length + tokens, device=embeds.device)[None]
        leaders = self._leaders(batch, history.length, tokens)
        plain = leaders is None and present is None
        if plain:
            self._map = TokenMap.identity(batch, tokens, embeds.device)
        else:
            own = torch.arange(tokens, device=embeds.device).expand(batch, tokens)
            self._map = prompt_map(own if leaders is None else leaders, present)
            embeds = embeds[torch.arange(batch, device=embeds.device)[:, None], self._map.first()]
        step = plan_step(
            self._map,
            positions.expand(batch, tokens),
            history,
            functools.partial(self._parts.rotary.forward, embeds),
            plain=plain,
            unmerge=self._unmerge,
            backend=self._backend,
        )
        own = torch.arange(self._map.width, device=embeds.device)[None]
        return (), {
            **given,
            "inputs_embeds": embeds,
            "position_ids": own,
            "past_key_values": cache,
            "dymu_step": step,
        }

    def _after_decoder(self, _decoder: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        assert self._map is not None
        expand, cache = self._map.expand, output.past_key_values
        if cache is not None:
            self.last.cache_bytes = stored = cache_bytes(cache)
            history = adopt(cache)
            self.last.cache_bytes_full = stored * history.length // max(history.entries, 1)
        output.last_hidden_state = expand(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = tuple(expand(hidden) for hidden in output.hidden_states)
        return output


def _carried(features: list[Tensor]) -> list[Tensor] | None:
    """The leaders that each image's features carry; None for features that were not merged here."""
    if not all(hasattr(feature, _LEADERS) for feature in features):
        return None
    return [getattr(feature, _LEADERS) for feature in features]


def _length(cache: Any) -> int:
    return 0 if cache is None else cache.get_seq_length()


def _present(mask: Tensor | None, tokens: int) -> Tensor | None:
    """bool [B, N], which of the new tokens are there; None: all of them."""
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(
            f"DyMU needs an attention_mask [B, N] of 0 and 1, got one of shape {tuple(mask.shape)}; "
            "pass the padding mask and leave causality to the model"
        )
    present = mask[:, -tokens:].bool()
    return None if bool(present.all()) else present


def _grid(patches: int, pixel_values: Tensor) -> tuple[int, int]:
    """Rows and columns of `patches` patches over pictures [B, 3, height, width]."""
    height, width = pixel_values.shape[-2:]
    rows = max(round((patches * height / width) ** 0.5), 1)
    return rows, patches // rows
