"""Hooks for the language half of a model: full prompt -> merged prompt -> the full prompt's outputs."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dymu.choices import COMPACT, CacheForm, Unmerge
from dymu.errors import UnsupportedCache
from dymu.families.resolve import Parts
from dymu.hooks.cache import adopt, cache_bytes
from dymu.hooks.call import PIXELS, CallState, Prompts, arguments_of, length
from dymu.hooks.versions import cache_among, cache_argument, cache_of, pop_cache
from dymu.report import Report
from dymu.token_map import TokenMap, take
from dymu.unmerging import History, in_mean_order, plan_step


class LanguageHooks:
    """Hooks for the module that holds both halves, and for the language model.

    Args:
        parts: of the model.
        state: of the running call.
        unmerge, backend, cache: see `dymu.apply`.
    """

    def __init__(self, parts: Parts, state: CallState, unmerge: Unmerge, backend: str, cache: CacheForm) -> None:
        self._parts, self._state = parts, state
        self._unmerge, self._backend, self._cache = unmerge, backend, cache
        self._angles = parts.rotary.forward
        self._inner_signature = inspect.signature(parts.inner.forward)
        self._decoder_signature = inspect.signature(parts.language_model.forward)
        self._cache_argument = cache_argument(parts.language_model.forward)
        self._map: TokenMap | None = None
        self._plain = True

    def before_inner(self, _inner: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Find the placeholders of this call's images and videos."""
        state = self._state
        inputs = arguments_of(self._inner_signature, args, kwargs)
        encoded = inputs.get("mm_encoder_outputs") or {}
        if not any(encoded.values()) and all(inputs.get(name) is None for name in PIXELS):
            if not length(cache_among(inputs)):
                state.report = Report()
            return
        state.prompts = state.asked = Prompts.of(
            self._parts, inputs.get("input_ids"), inputs.get("inputs_embeds"), inputs.get("attention_mask")
        )
        state.prompts.show_encoded(encoded)
        if not any(encoded.values()):
            state.begin_report()

    def after_inner(self, *_: Any) -> None:
        """Forget this call's items, also after an error."""
        self._state.prompts = self._state.asked = None
        self._state.collecting = False

    def before_decoder(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Keep one token of each group, and plan the attention over all."""
        inputs = arguments_of(self._decoder_signature, args, kwargs)
        embeds, ids = inputs.pop("inputs_embeds", None), inputs.pop("input_ids", None)
        if embeds is None:
            embeds = decoder.get_input_embeddings()(ids)
        batch, tokens = embeds.shape[:2]

        cache, use_cache = pop_cache(inputs), inputs.get("use_cache")
        if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        history = History() if cache is None else adopt(cache, self._cache)
        if history.expanded and self._cache != "expanded":
            raise UnsupportedCache(
                'this KV cache holds all tokens, which only DyMU with cache="expanded" goes on with; '
                "start with a new cache."
            )

        present = _present(inputs.pop("attention_mask", None), tokens, history, self._unmerge)
        positions = inputs.pop("position_ids", None)
        if positions is None:
            positions = torch.arange(history.length, history.length + tokens, device=embeds.device)[None]
        leaders = self._state.leaders(history.length, tokens)
        self._plain = leaders is None and present is None
        if self._plain:
            self._map = TokenMap.identity(batch, tokens, embeds.device)
        else:
            index = torch.arange(tokens, device=embeds.device).expand(batch, tokens)
            self._map = TokenMap.from_leaders(index if leaders is None else leaders, present)
            if self._unmerge in COMPACT:
                self._map = in_mean_order(self._map)
            embeds = take(embeds, self._map.first())
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
            **inputs,
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
            history, report = adopt(cache), self._state.report
            report.cache_bytes = stored = cache_bytes(cache)
            report.cache_bytes_full = stored * history.length // max(history.entries, 1)
        if not self._plain:
            output.last_hidden_state = expand(output.last_hidden_state)
            if output.hidden_states is not None:
                output.hidden_states = tuple(expand(hidden) for hidden in output.hidden_states)
        return output


def _present(mask: Any, tokens: int, history: History, unmerge: Unmerge) -> Tensor | None:
    """bool [B, N], whether each new token is there; None: all are. Cached tokens that the mask hides go.

    Raises:
        ValueError: the mask is not [B, N], or hides cached tokens from those that are numbered consecutively.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        what = f"one of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"DyMU needs an attention_mask [B, N] of 0 and 1, got {what}; "
            "pass the padding mask and leave causality to the model"
        )
    if bool(mask.all()):
        return None
    earlier, newest = mask[:, :-tokens].bool(), mask[:, -tokens:].bool()
    if history.slot is not None and earlier.shape == history.slot.shape:
        hidden = ~earlier & (history.slot >= 0)
        if bool(hidden.any()):
            if unmerge == "none":
                raise ValueError(
                    'the attention_mask hides tokens that the KV cache holds, and with unmerge="none" those after them '
                    "would move up; give cached tokens the mask that they came with, or start with a new cache"
                )
            history.hide(hidden)
    return None if bool(newest.all()) else newest
