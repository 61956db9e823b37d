"""What is hooked into the language half of a model: full prompt -> merged prompt -> the full prompt's outputs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dymu.errors import BadPrompt, UnsupportedCache
from dymu.families import Modality, Parts
from dymu.hooks.versions import cache_among, cache_argument, cache_of, cuts_encoded_images, pop_cache, version
from dymu.placed import Placed
from dymu.report import Report
from dymu.token_map import TokenMap
from dymu.unmerging import (
    COMPACT,
    CacheForm,
    Features,
    History,
    Unmerge,
    adopt,
    cache_bytes,
    carried_leaders,
    carry_leaders,
    in_mean_order,
    leaders_within,
    place_leaders,
    plan_step,
    prompt_map,
)

PIXELS = ("pixel_values", "pixel_values_videos")
"""What a call is given that shows images, or videos."""


class _Call:
    """The images and videos of one call of the model.

    Args:
        places: bool [B, N] for each kind of item, their placeholders in the prompts.

    Attributes:
        leaders: int64 [B, N], see `place_leaders`; None until items came that DyMU merged.
    """

    def __init__(self, places: Mapping[Modality, Tensor]) -> None:
        self.places = places
        self.leaders: Tensor | None = None

    def show(self, modality: Modality, features: Features) -> None:
        """Put the features of the images, or of the videos, in their places.

        Raises:
            BadPrompt: the prompts have more or fewer placeholders than the items have tokens.
        """
        mask = self.places[modality]
        places, tokens = int(mask.sum()), sum(feature.shape[:-1].numel() for feature in features)
        if places != tokens:
            raise BadPrompt(
                f"the prompts have {places} {modality} placeholders, but the {len(features)} {modality}s given need "
                f"{tokens}; write one placeholder per {modality} into the text, let the processor expand it, and give "
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
        """The same for whatever was encoded ahead of the call."""
        for modality in self.places:
            if outputs.get(modality) is not None:
                self.show(modality, outputs[modality].pooler_output)


class LanguageHooks:
    """Hooks for the module that holds both halves, for the language model, and for how generation takes features about.

    Attributes:
        report: what merged in the last call.
    """

    def __init__(self, parts: Parts, unmerge: Unmerge, backend: str, cache: CacheForm) -> None:
        self.report = Report()
        self._parts, self._unmerge, self._backend, self._cache = parts, unmerge, backend, cache
        self._angles = parts.rotary.forward
        self._inner_signature = inspect.signature(parts.inner.forward)
        self._decoder_signature = inspect.signature(parts.language_model.forward)
        self._cache_argument = cache_argument(parts.language_model.forward)
        self._call: _Call | None = None
        self._collecting = False
        self._chunked: tuple[int, Tensor] | None = None
        self._map: TokenMap | None = None
        self._plain = True

    def encoded(self, modality: Modality, items: list[Placed], kept: list[Tensor], features: Features) -> None:
        """Take note of items that the vision half has encoded, within a call or ahead of one."""
        self.report = (self.report if self._collecting else Report()).with_more(items, kept)
        if self._call is not None:
            self._call.show(modality, features)

    def before_inner(self, _inner: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Learn where this call's images and videos stand in the prompt."""
        given = self._inner_signature.bind(*args, **kwargs).arguments if args else kwargs
        encoded = given.get("mm_encoder_outputs") or {}
        if not any(encoded.values()) and all(given.get(name) is None for name in PIXELS):
            if not _length(cache_among(given)):
                self.report = Report()
            return
        self._call = self._call_of(given.get("input_ids"), given.get("inputs_embeds"))
        self._call.show_encoded(encoded)
        if not any(encoded.values()):
            self.report, self._collecting = Report(), True

    def after_inner(self, *_: Any) -> None:
        """Forget this call's items, also where it failed."""
        self._call, self._collecting = None, False

    def encode(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """Generation encodes images and videos one after the other, ahead of the first forward."""

        @functools.wraps(encode)
        def encoding(inputs: dict[str, Any]) -> Any:
            if any(inputs.get(name) is not None for name in PIXELS):
                self.report, self._collecting = Report(), True
            try:
                return encode(inputs)
            finally:
                self._collecting = False

        return encoding

    def prefill(self, prefill: Callable[..., Any]) -> Callable[..., Any]:
        """Chunked prefill cuts the features of encoded items into pieces that no longer carry their token maps, so
        remember those of the whole prompt meanwhile."""
        signature = inspect.signature(prefill)

        @functools.wraps(prefill)
        def prefilling(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            inputs = given["model_kwargs"]
            encoded = inputs.get("mm_encoder_outputs") or {}
            if given["generation_config"].prefill_chunk_size is not None and any(encoded.values()):
                if not cuts_encoded_images():
                    raise BadPrompt(
                        f"transformers {version()} cannot prefill a prompt with images in chunks; leave "
                        "prefill_chunk_size out, or update transformers to 5.23 or newer."
                    )
                ids, mask = given["input_ids"], inputs.get("attention_mask")
                past = _length(cache_among(inputs))
                if mask is None or mask.shape[1] == ids.shape[1]:
                    ids = ids[:, past:]
                whole = self._call_of(ids)
                whole.show_encoded(encoded)
                self._chunked = None if whole.leaders is None else (past, whole.leaders)
            try:
                return prefill(*args, **kwargs)
            finally:
                self._chunked = None

        return prefilling

    def repeat(self, repeat: Callable[..., Any]) -> Callable[..., Any]:
        """Beams repeat the encoded items of each prompt, and with them their token maps.

        Done here instead of by `repeat`, which loses the maps; that of transformers 5.18 also mixes up the order of
        several images of one prompt.
        """

        @functools.wraps(repeat)
        def repeating(
            ids: Tensor | None, outputs: dict[str, Any], expand_size: int = 1, inputs_embeds: Tensor | None = None
        ) -> dict[str, Any]:
            call = self._call_of(ids if ids is not None and ids.numel() else None, inputs_embeds)
            call.show_encoded(outputs)
            for modality, mask in call.places.items():
                if outputs.get(modality) is not None:
                    output = outputs[modality]
                    output.pooler_output = _repeated(output.pooler_output, mask.sum(1).tolist(), expand_size)
            return outputs

        return repeating

    def _call_of(self, ids: Tensor | None, embeds: Tensor | None = None) -> _Call:
        placeholders = self._parts.placeholders
        if ids is not None:
            return _Call({modality: ids == token for modality, token in placeholders.items()})
        if embeds is None:
            return _Call({})
        tokens = torch.tensor(list(placeholders.values()), device=embeds.device)
        masks = [(embeds == token).all(-1) for token in self._parts.inner.get_input_embeddings()(tokens)]
        return _Call(dict(zip(placeholders, masks, strict=True)))

    def before_decoder(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Keep one token of each group, and plan the attention over all."""
        given = dict(kwargs)
        if args:
            given = self._decoder_signature.bind(*args, **kwargs).arguments
            given |= given.pop("kwargs", {})
        embeds, ids = given.pop("inputs_embeds", None), given.pop("input_ids", None)
        if embeds is None:
            embeds = decoder.get_input_embeddings()(ids)
        batch, tokens = embeds.shape[:2]

        cache, use_cache = pop_cache(given), given.get("use_cache")
        if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        history = History() if cache is None else adopt(cache, self._cache)
        if history.expanded and self._cache != "expanded":
            raise UnsupportedCache(
                'this KV cache holds all tokens, which only DyMU with cache="expanded" goes on with; '
                "start with a new cache."
            )

        present = _present(given.pop("attention_mask", None), tokens)
        positions = given.pop("position_ids", None)
        if positions is None:
            positions = torch.arange(history.length, history.length + tokens, device=embeds.device)[None]
        leaders = self._leaders(history.length, tokens)
        self._plain = leaders is None and present is None
        if self._plain:
            self._map = TokenMap.identity(batch, tokens, embeds.device)
        else:
            own = torch.arange(tokens, device=embeds.device).expand(batch, tokens)
            self._map = prompt_map(own if leaders is None else leaders, present)
            if self._unmerge in COMPACT:
                self._map = in_mean_order(self._map)
            embeds = embeds[torch.arange(batch, device=embeds.device)[:, None], self._map.first()]
        step = plan_step(
            self._map,
            positions.expand(batch, tokens),
            history,
            functools.partial(self._angles, embeds),
            plain=self._plain,
            unmerge=self._unmerge,
            backend=self._backend,
        )
        merged = torch.arange(self._map.width, device=embeds.device)[None]
        return (), {
            **given,
            "inputs_embeds": embeds,
            "position_ids": merged,  # not rotated by: the step has the angles
            self._cache_argument: cache,
            "dymu_step": step,
        }

    def after_decoder(self, _decoder: Any, _args: Any, output: Any) -> Any:
        """Give each token of the full prompt the output of its merged token."""
        assert self._map is not None
        expand, cache = self._map.expand, cache_of(output)
        if cache is not None:
            history = adopt(cache)
            self.report.cache_bytes = stored = cache_bytes(cache)
            self.report.cache_bytes_full = stored * history.length // max(history.entries, 1)
        if not self._plain:
            output.last_hidden_state = expand(output.last_hidden_state)
            if output.hidden_states is not None:
                output.hidden_states = tuple(expand(hidden) for hidden in output.hidden_states)
        return output

    def _leaders(self, start: int, tokens: int) -> Tensor | None:
        """int64 [B, tokens], the leaders of the prompt's tokens from `start` on; None where no token is merged."""
        if self._chunked is not None:
            first, leaders = self._chunked
            return leaders_within(leaders, start - first, tokens)
        return None if self._call is None else self._call.leaders


def _repeated(features: Features, tokens: Sequence[int], times: int) -> Features:
    """The features of all items of each prompt, so many times in a row; they carry their leaders.

    Args:
        tokens: of each prompt, the placeholders.
    """
    order, rest = list[int](), iter(range(len(features)))
    for wanted in tokens:
        items = list[int]()
        while wanted > 0:
            items.append(next(rest))
            wanted -= features[items[-1]].shape[:-1].numel()
        order += items * times
    leaders = carried_leaders(features)
    repeated = features[order] if isinstance(features, Tensor) else [features[item] for item in order]
    if leaders is not None:
        carry_leaders(repeated, [leaders[item] for item in order])
    return repeated


def _length(cache: Any) -> int:
    return 0 if cache is None else cache.get_seq_length()


def _present(mask: Any, tokens: int) -> Tensor | None:
    """bool [B, N], which of the new tokens are there; None: all of them.

    Raises:
        ValueError: the mask is not [B, N].
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        what = f"one of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"DyMU needs an attention_mask [B, N] of 0 and 1, got {what}; "
            "pass the padding mask and leave causality to the model"
        )
    newest = mask[:, -tokens:]
    return None if bool(newest.all()) else newest.bool()
