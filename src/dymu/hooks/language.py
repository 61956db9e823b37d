"""Hooks for the language half of a model: full prompt -> merged prompt -> the full prompt's outputs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from dymu.choices import COMPACT, CacheForm, Unmerge
from dymu.errors import BadPrompt, UnsupportedCache, UnsupportedModel
from dymu.families.resolve import Parts
from dymu.hooks.attention import Angles, LayerSteps, Rotations, angles_of
from dymu.hooks.cache import adopt, recall, remembered
from dymu.hooks.call import PIXELS, CallState, Mapped, Prompts, arguments_of
from dymu.hooks.refusals import (
    drops_out,
    refuse_attention_weights,
    refuse_compression,
    refuse_lost_features,
    refuse_packed,
    refuse_unknown_videos,
    warn_of_dropout,
)
from dymu.hooks.replaced import Method
from dymu.hooks.versions import cache_among, cache_argument, pop_cache
from dymu.token_map import TokenMap, take
from dymu.unmerging import History, in_mean_order, plan_step


class LanguageHooks:
    """What stands around the module that holds both halves, the language model, and its rotary angles.

    Args:
        parts: of the model.
        state: of the running call.
        unmerge, backend, cache: see `dymu.apply`.
    """

    def __init__(self, parts: Parts, state: CallState, unmerge: Unmerge, backend: str, cache: CacheForm) -> None:
        self.parts, self._state = parts, state
        self._unmerge, self._backend, self._cache = unmerge, backend, cache
        self.rotations = Rotations({}, {})
        self._still = dict[Any, Angles]()

    def rotate(self, rotations: Rotations) -> None:
        """Take over how the layers rotate.

        Raises:
            UnsupportedModel: a cache of rotated keys cannot be filled so.
        """
        if self._cache == "expanded" and not rotations.plain:
            raise UnsupportedModel(
                'cache="expanded" knows layers that all turn the two halves of whole heads by the same angles, and '
                "this language model's turn otherwise; leave cache out."
            )
        self.rotations = rotations

    def inner(self, forward: Method, *args: Any, **kwargs: Any) -> Any:
        """Find the placeholders of this call's images and videos."""
        state, parts = self._state, self.parts
        inputs = arguments_of(parts.inner, "forward", args, kwargs)
        refuse_attention_weights(inputs, parts.language_model.config)
        refuse_unknown_videos(inputs, parts.placeholders)
        refuse_compression(inputs.get(parts.family.compresses or ""))
        recall(parts.inner, cache_among(inputs))
        ids = inputs.get("input_ids")
        encoded = inputs.get("mm_encoder_outputs") or {}
        ahead = any(output is not None for output in encoded.values())
        before = state.prompts, state.asked, state.collecting, state.knows_ids
        encoding, mask, types, inside = state.encoding, state.mask, state.types, state.inside
        try:
            state.prompts = state.asked = state.encoding = None
            state.mask, state.inside = inputs.get("attention_mask"), True
            state.types = inputs.get(self._types_argument or "")
            state.knows_ids = ids is not None
            if ahead or any(inputs.get(name) is not None for name in PIXELS):
                state.knows_ids = True
                state.prompts = state.asked = Prompts.of(parts, ids, inputs.get("inputs_embeds"), state.mask)
                items = [] if state.chunked else state.prompts.show_encoded(encoded)
                if not (ahead and state.generating):
                    state.begin_report(items)
                state.collecting = True
            elif not state.generating:
                state.begin_report(cache=cache_among(inputs))
            return forward(*args, **kwargs)
        finally:
            state.prompts, state.asked, state.collecting, state.knows_ids = before
            state.encoding, state.mask, state.types, state.inside = encoding, mask, types, inside

    def decoder(self, forward: Method, *args: Any, **kwargs: Any) -> Any:
        """Keep one token of each group, plan the attention over all, and give all tokens the outputs of their groups.

        A call that ends in an error leaves the cache as it was, or marks it as of no use, see `remembered`.
        """
        state, decoder, within = self._state, self.parts.language_model, (self._state.unmerging, self._state.mapped)
        inputs = arguments_of(decoder, "forward", args, kwargs)
        refuse_attention_weights(inputs, decoder.config)
        if decoder.training and drops_out(decoder):
            warn_of_dropout(state.calls.warned)
        as_tuple = inputs.pop("return_dict", None) is False
        embeds, ids = inputs.pop("inputs_embeds", None), inputs.pop("input_ids", None)
        knows_ids = state.knows_ids or embeds is None
        if embeds is None:
            embeds = decoder.get_input_embeddings()(ids)
        batch, tokens = embeds.shape[:2]

        cache, use_cache = pop_cache(inputs), inputs.get("use_cache")
        if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=decoder.config)
        rewind = None if cache is None else remembered(cache)
        history = History() if cache is None else adopt(cache, self._cache)
        if history.expanded and self._cache != "expanded":
            raise UnsupportedCache(
                'this KV cache holds all tokens, which only DyMU with cache="expanded" goes on with; '
                "start with a new cache."
            )

        try:
            state.unmerging = False  # a layer's hook may ask the model, too
            mask = inputs.pop("attention_mask", None)
            if self.parts.family.both_ways is not None and state.inside:
                mask = state.mask  # what the model makes of it says more than which tokens are there
            present = _present(mask, batch, tokens, history, self._unmerge)
            place = history.places(present, batch, tokens, embeds.device)
            positions = inputs.pop("position_ids", None)
            if positions is None:
                positions = torch.arange(history.length, history.length + tokens, device=embeds.device)[None]
            elif mask is None and cache is None:
                refuse_packed(positions)
            positions = self._by_axis(positions).expand(
                batch, tokens, *(() if self.parts.decoder_kind.axes == 1 else (-1,))
            )
            leaders = state.leaders(history.length, tokens)
            if leaders is None and not knows_ids and tokens > 1:
                refuse_lost_features(embeds, present, decoder.get_input_embeddings(), self.parts.learned)
            plain = leaders is None and present is None
            if plain:
                merged = TokenMap.identity(batch, tokens, embeds.device)
            else:
                index = torch.arange(tokens, device=embeds.device).expand(batch, tokens)
                merged = TokenMap.from_leaders(index if leaders is None else leaders, present)
                if self._unmerge in COMPACT:
                    merged = in_mean_order(merged)
                first = merged.first()
                embeds = take(embeds, first)
                self._average_added_rows(inputs, merged, first)
                rows = inputs.get(self.parts.decoder_kind.per_token or "")
                if rows is not None:
                    inputs[self.parts.decoder_kind.per_token or ""] = take(rows, first)
            if inputs.get("logits_to_keep") is not None:  # the module that called cuts off the rest
                inputs["logits_to_keep"] = 0
            step = plan_step(
                merged,
                positions,
                history,
                functools.partial(self._angles, embeds),
                plain=plain,
                unmerge=self._unmerge,
                backend=self._backend,
                place=place,
                block=self._block(batch, tokens, first=history.length == 0),
                beyond_window=self.parts.family.both_ways == "prefix",
            )
            state.mapped = Mapped(merged, plain, present)
            state.unmerging = True
            output = forward(
                **inputs,
                inputs_embeds=embeds,
                position_ids=torch.arange(merged.width, device=embeds.device)[None],  # the step has the angles
                **{cache_argument(type(decoder).forward): cache},
                dymu_step=LayerSteps(step, self.rotations.by_module, self.parts.family.both_ways == "windows"),
            )
        except BaseException:
            if rewind is not None:
                rewind(state.unmerging)
            raise
        finally:
            state.unmerging, state.mapped = within
        if not plain:
            output.last_hidden_state = merged.expand(output.last_hidden_state)
            if output.hidden_states is not None:
                output.hidden_states = tuple(merged.expand(hidden) for hidden in output.hidden_states)
        if cache is not None:
            history.remembered = {name: getattr(self.parts.inner, name) for name in self.parts.family.remembers}
            state.filled(cache, history)
        return output.to_tuple() if as_tuple else output

    def rotary(self, forward: Method, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Angles that leave queries and keys as they are, while the language model runs on merged tokens."""
        if not self._state.unmerging:
            return forward(x, *args, **kwargs)
        kind = next((value for value in (*args, *kwargs.values()) if isinstance(value, str)), "")
        key = (x.dtype, x.device, kind)
        if key not in self._still:
            axes = self.parts.decoder_kind.axes
            position = torch.zeros(*([axes] if axes > 1 else []), 1, 1, dtype=torch.long, device=x.device)
            cos, sin = forward(x[:1, :1], position, *([kind] if kind else []))
            self._still[key] = torch.ones_like(cos), torch.zeros_like(sin)
        return self._still[key]

    def mixer(self, forward: Method, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What mixes tokens without attention runs on all of the full prompt; of a group, the mean of what it gives."""
        mapped = self._state.mapped
        if not self._state.unmerging or mapped is None:
            return forward(hidden_states, *args, **kwargs)
        del kwargs["dymu_step"]
        if "attention_mask" in kwargs:
            kwargs["attention_mask"] = mapped.present
        if mapped.plain:
            return forward(hidden_states, *args, **kwargs)
        return mapped.tokens.average(forward(mapped.tokens.expand(hidden_states), *args, **kwargs))

    def _average_added_rows(self, inputs: dict[str, Any], merged: TokenMap, first: Tensor) -> None:
        """Of the rows that the language model adds behind its first layers, the mean of each group."""
        kind = self.parts.decoder_kind
        where, rows = (inputs.get(name) for name in (kind.added_where or "", kind.added_rows or ""))
        if where is None or rows is None:
            return
        real = torch.arange(merged.width, device=first.device) < merged.kept[:, None]
        inputs[kind.added_where or ""] = there = where.gather(1, first) & real
        inputs[kind.added_rows or ""] = [
            merged.average(added.new_zeros(*where.shape, added.shape[-1]).masked_scatter(where[..., None], added))[
                there
            ]
            for added in rows
        ]

    @property
    def _types_argument(self) -> str | None:
        """Of `inner`: which argument says which tokens attend to later ones, see `Family.both_ways`."""
        both_ways = self.parts.family.both_ways
        if both_ways != "windows":
            return None if both_ways is None else "token_type_ids"
        sees = getattr(self.parts.language_model.config, "use_bidirectional_attention", None)
        return "mm_token_type_ids" if sees == "vision" else None

    def _block(self, batch: int, tokens: int, first: bool) -> Tensor | None:
        """int64 [B, N], the new tokens that attend to later ones, see `Step.block`.

        Args:
            first: whether no tokens came before.

        Raises:
            BadPrompt: it is not known of all new tokens whether they do.
        """
        types, both_ways = self._state.types, self.parts.family.both_ways
        if both_ways == "prefix" and types is None and first and tokens > 1 and self._state.inside:
            raise BadPrompt(
                f"it is not known which tokens this model reads both ways; give it {self._types_argument}, 0 for the "
                "prompt and 1 for what it said, as its processor makes them."
            )
        if types is None or tokens == 1 or (both_ways == "prefix" and not first):
            return None
        if types.ndim != 2 or len(types) != batch or (types.shape[1] < tokens and not first):
            raise BadPrompt(
                f"the {self._types_argument} are {list(types.shape)}, and the new tokens are {[batch, tokens]}; give "
                "one for each."
            )
        types = types[:, -tokens:]
        if both_ways == "prefix":
            block = torch.where(types == 0, 0, -1)
        else:
            of_image = (types == 1) | ((types == 2) & (both_ways == "windows"))
            begins = of_image & ~pad(of_image, (1, 0))[:, :-1]
            block = torch.where(of_image, begins.cumsum(1) - 1, -1)
        block = pad(block, (0, tokens - block.shape[1]), value=-1)  # proposed tokens of assisted decoding have no kind
        return block if bool((block >= 0).any()) else None

    def _by_axis(self, positions: Tensor) -> Tensor:
        """Positions [B, N], or [axes, B, N] with or without a row for texts ahead, as [B, N] or [B, N, axes]."""
        axes = self.parts.decoder_kind.axes
        if axes == 1:
            return positions
        if positions.ndim == 2:
            return positions[..., None].expand(-1, -1, axes)
        return positions[-axes:].expand(axes, -1, -1).permute(1, 2, 0)

    def _angles(self, like: Tensor, positions: Tensor) -> Angles:
        positions = positions.permute(2, 0, 1) if positions.ndim == 3 else positions
        return self.rotations.joined(angles_of(self.parts, like, positions))


def _present(mask: Any, batch: int, tokens: int, history: History, unmerge: Unmerge) -> Tensor | None:
    """bool [B, N], whether each new token is there; None: all are. Cached tokens that the mask hides are not seen.

    Raises:
        ValueError: the mask is not [B, N], or hides cached tokens from those that are numbered consecutively.
    """
    history.hide(None)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        what = f"one of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"DyMU needs an attention_mask [B, N] of 0 and 1, got {what}; "
            "pass the padding mask and leave causality to the model"
        )
    if mask.shape != (batch, history.length + tokens):
        raise ValueError(
            f"the attention_mask is {list(mask.shape)}, and the tokens in the KV cache and the new ones are "
            f"{[batch, history.length + tokens]}; give a mask over all of them"
        )
    if bool(mask.all()):
        return None
    earlier, newest = mask[:, :-tokens].bool(), mask[:, -tokens:].bool()
    if history.slot is not None:
        hidden = ~earlier & (history.slot >= 0)
        if bool(hidden.any()):
            if unmerge == "none":
                raise ValueError(
                    'the attention_mask hides tokens that the KV cache holds, and with unmerge="none" those after them '
                    "would move up; give cached tokens the mask that they came with, or start with a new cache"
                )
            history.hide(hidden)
    return None if bool(newest.all()) else newest
