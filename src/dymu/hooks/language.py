"""Hooks for the language half of a model: full prompt -> merged prompt -> the full prompt's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from dymu.choices import CacheForm, Unmerge
from dymu.errors import BadPrompt, UnsupportedCache, UnsupportedModel
from dymu.families.resolve import Parts
from dymu.hooks.attention import Angles, LayerSteps, Rotations, angles_of
from dymu.hooks.cache import adopt, recall, remembered
from dymu.hooks.call import PIXELS, CallState, Mapped, Prompts, arguments_of
from dymu.hooks.pruned import Plan, Prompt, PrunedLayers, Stage
from dymu.hooks.refusals import (
    drops_out,
    refuse_attention_weights,
    refuse_compression,
    refuse_lost_features,
    refuse_packed,
    refuse_to_prune,
    refuse_to_recompute,
    refuse_unknown_videos,
    warn_of_dropout,
)
from dymu.hooks.replaced import Method
from dymu.hooks.versions import cache_among, cache_argument, cuts_logits, pop_cache
from dymu.pruning import Pruning
from dymu.pruning.pruning import check_stages
from dymu.token_map import TokenMap, take
from dymu.unmerging import History, NewTokens, Packed, Step, plan_step
from dymu.unmerging.virtual import as_phase, turn_between

CAPTURING = "transformers.utils.output_capturing"
"""Whose hooks stay once anybody has asked for hidden states; they do something only when asked again."""


@dataclass(frozen=True)
class Attending:
    """How the language model attends, see `dymu.apply`."""

    unmerge: Unmerge = "exact"
    representatives: int = 1
    backend: str = "auto"
    cache: CacheForm = "merged"
    unmerge_from: int = 0
    prune: Pruning | None = None


class LanguageHooks:
    """What stands around the module that holds both halves, the language model, and its rotary angles.

    Args:
        parts: of the model.
        state: of the running call.
        how: it attends.
    """

    def __init__(self, parts: Parts, state: CallState, how: Attending) -> None:
        self.parts, self._state, self._how = parts, state, how
        self.rotations = Rotations({}, {})

    def adopt(self, parts: Parts, rotations: Rotations) -> None:
        """Take over a language model, and how its layers rotate.

        Raises:
            UnsupportedModel: it cannot have the form of unmerging, or of the cache, or be pruned.
            ValueError: it has too few layers to be pruned so.
        """
        if self._how.unmerge == "representative" and parts.mixers:
            raise UnsupportedModel(
                'unmerge="representative" is for language models whose layers all attend, and some of this one\'s mix '
                'tokens in another way, on all of the full prompt; take unmerge="exact".'
            )
        if self._how.unmerge == "restore" and self._how.prune is not None:
            raise UnsupportedModel(
                'unmerge="restore" is for tokens that all layers run: leave prune out, or take another form.'
            )
        if self._how.unmerge == "restore" and (parts.decoder_kind.axes > 1 or len(rotations.interleaved) > 1):
            raise UnsupportedModel(
                'unmerge="restore" is for language models with one position for each token and one kind of rotary '
                'angles; take unmerge="compact".'
            )
        if self._how.cache == "fast" and parts.decoder_kind.shared is not None:
            raise UnsupportedModel(
                'cache="fast" would keep the keys that layers of this language model share once for each of them; '
                "leave cache out."
            )
        if self.by_layer:
            refuse_to_prune(parts, "prune" if self._how.prune is not None else "unmerge_from")
            if self._how.unmerge_from > len(parts.decoder_layers):
                raise ValueError(
                    f"unmerge_from={self._how.unmerge_from} is beyond the {len(parts.decoder_layers)} layers of the "
                    "language model; name one of them, or their number for none."
                )
            self._starts(parts)
        self.parts, self.rotations = parts, rotations

    @property
    def skips_mlps(self) -> bool:
        """Whether some tokens skip MLPs alone."""
        return self._how.prune is not None and self._how.prune.attends

    @property
    def by_layer(self) -> bool:
        """Whether layers differ in which tokens they run, or in how they attend."""
        return self._how.prune is not None or self._how.unmerge_from > 0

    def _starts(self, parts: Parts) -> tuple[int, ...]:
        """The layers from which on they do."""
        layers = len(parts.decoder_layers)
        prune = self._how.prune
        starts = set() if prune is None else set(check_stages(prune, prune.starts(layers), layers))
        return tuple(sorted((starts | {self._how.unmerge_from}) - {0, layers}))

    def _form(self, layer: int) -> Unmerge:
        """How a layer attends."""
        return self._how.unmerge if layer >= self._how.unmerge_from else "compact"

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
                items = [] if state.chunked else state.prompts.show_encoded(encoded, masked=True)
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
        state, decoder = self._state, self.parts.language_model
        within = state.unmerging, state.mapped, state.turns, state.wanted, state.pruned
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
        histories = self._histories(cache)
        history = histories[0]
        if not history.plain and history.consecutive != (self._how.unmerge == "none"):
            raise UnsupportedCache(
                f'this KV cache was filled {"with" if history.consecutive else "without"} unmerge="none", so that its '
                "positions are others; start with a new cache."
            )

        try:
            state.unmerging = False  # a layer's hook may ask the model, too
            mask = inputs.pop("attention_mask", None)
            if self.parts.family.both_ways is not None and state.inside:
                mask = state.mask  # what the model makes of it says more than which tokens are there
            present = _present(mask, batch, tokens, history, self._how.unmerge)
            for other in histories[1:]:
                other.hide(history.hidden)
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
            if leaders is None and present is None:
                new = NewTokens.identity(batch, tokens, embeds.device)
            else:
                index = torch.arange(tokens, device=embeds.device).expand(batch, tokens)
                merged = TokenMap.from_leaders(index if leaders is None else leaders, present)
                new = NewTokens.of(merged, positions, self._form(0), self._how.representatives)
                first = new.map.first()
                embeds = take(embeds, first)
                self._average_added_rows(inputs, new.map, first)
                rows = inputs.get(self.parts.decoder_kind.per_token or "")
                if rows is not None:
                    inputs[self.parts.decoder_kind.per_token or ""] = take(rows, first)
            if inputs.get("logits_to_keep") is not None:  # the module that called cuts off the rest
                inputs["logits_to_keep"] = 0
            block = self._block(batch, tokens, first=history.length == 0)
            restores = self._how.unmerge == "restore"

            def plan(
                new: NewTokens, history: History, last: bool, unmerge: Unmerge
            ) -> tuple[dict[str, Angles], LayerSteps]:
                running, state.unmerging = state.unmerging, False  # so that the rotary module says its own
                angles, turn = self._turns(embeds, positions, new, history)
                state.unmerging = running
                if last:
                    state.wanted = self._wanted(inputs, new)
                step = plan_step(
                    new,
                    history,
                    unmerge=unmerge,
                    backend=self._how.backend,
                    turn=turn,
                    place=place,
                    block=block,
                    beyond_window=self.parts.family.both_ways == "prefix",
                    distances=self._distances(embeds, history.length + tokens) if restores else None,
                    shown=self._shown(tokens) if restores else None,
                )
                return angles, self._layer_steps(step, history)

            state.mapped = Mapped(new.map, new.plain, present)
            state.wanted = state.pruned = packed = None
            if self.by_layer:
                read = tokens if state.prompted is None else min(state.prompted - history.length, tokens)
                prompt = Prompt(new, self._picture(tokens), present, positions, embeds, read if read > 0 else tokens)
                state.pruned = self._pruned(plan, histories, prompt, cache)
                begins = state.pruned.begin()
                state.turns, steps = begins.angles, begins.steps
            else:
                state.turns, steps = plan(new, history, True, self._how.unmerge)
                packed = self._packed(new)
            if packed is not None:
                wanted = state.wanted
                embeds = packed.pack(embeds)
                state.turns = {kind: (packed.pack(cos), packed.pack(sin)) for kind, (cos, sin) in state.turns.items()}
                state.wanted = None if wanted is None else packed.at(wanted)
                for name in (self.parts.decoder_kind.added_where, self.parts.decoder_kind.per_token):
                    if inputs.get(name or "") is not None:
                        inputs[name or ""] = packed.pack(inputs[name or ""])
            history.packed = packed
            state.unmerging = True
            output = forward(
                **inputs,
                inputs_embeds=embeds,
                position_ids=torch.arange(embeds.shape[1], device=embeds.device)[None],  # `rotary` has the angles
                **{cache_argument(type(decoder).forward): cache},
                dymu_step=steps,
            )
            for one in histories:
                one.packed = one.stored_by = None
            if state.pruned is not None:
                state.pruned.finish()
            if state.pruned is not None and state.pruned.ran and state.report is not None:
                state.report.ran = state.pruned.counts()
        except BaseException:
            if rewind is not None:
                rewind(state.unmerging)
            raise
        finally:
            state.unmerging, state.mapped, state.turns, state.wanted, state.pruned = within
        if not new.plain:

            def expand(hidden: Tensor) -> Tensor:
                return new.map.expand(hidden if packed is None else packed.pad(hidden))

            output.last_hidden_state = expand(output.last_hidden_state)
            if output.hidden_states is not None:
                output.hidden_states = tuple(map(expand, output.hidden_states))
        if cache is not None:
            history.remembered = {name: getattr(self.parts.inner, name) for name in self.parts.family.remembers}
            state.filled(cache, history)
        return output.to_tuple() if as_tuple else output

    def layer(self, index: int, forward: Method, *args: Any, **kwargs: Any) -> Any:
        """A layer runs the tokens that the pruning lets it run."""
        pruned = self._state.pruned
        if not self._state.unmerging or pruned is None:
            return forward(*args, **kwargs)
        arguments = arguments_of(self.parts.decoder_layers[index], "forward", args, kwargs)
        # Never compiled: which tokens run depends on the data, and what is traced would run others.
        return torch.compiler.disable(pruned.run)(index, forward, arguments)

    def feed(self, forward: Method, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The MLP of a layer, which some tokens may skip."""
        fed = None if self._state.pruned is None else self._state.pruned.fed
        if fed is None or not self._state.unmerging:
            return forward(x, *args, **kwargs)
        made = forward(x[fed][None], *args, **kwargs)
        if not isinstance(made, Tensor):
            raise UnsupportedModel("this language model's MLPs say more than one row for each token; leave prune out.")
        return made.new_zeros(*x.shape[:2], made.shape[-1]).index_put((fed,), made[0])

    def rotary(self, forward: Method, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The angles of representatives, while the language model runs on merged tokens."""
        if not self._state.unmerging:
            return forward(x, *args, **kwargs)
        kind = next((value for value in (*args, *kwargs.values()) if isinstance(value, str)), "")
        return self._state.turns[kind]

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

    def by_token(self, forward: Method, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In the last layer only what the asked outputs need is computed; the rest is 0."""
        wanted, mapped = self._state.wanted, self._state.mapped
        if wanted is None or mapped is None or not self._state.unmerging or x.ndim != 3:
            return forward(x, *args, **kwargs)
        made = forward(take(x, wanted), *args, **kwargs)
        if not isinstance(made, Tensor):  # and says more than one row each
            return forward(x, *args, **kwargs)
        rows = torch.arange(len(x), device=x.device)[:, None]
        return made.new_zeros(*x.shape[:2], made.shape[-1]).index_put((rows, wanted), made)

    def _histories(self, cache: Any) -> list[History]:
        """Of a KV cache, or of this forward alone, for each segment of layers that run the same tokens."""
        starts = self._starts(self.parts) if self.by_layer else ()
        if cache is None:
            return [History() for _ in range(len(starts) + 1)]
        return adopt(cache, self._how.cache, starts, len(self.parts.decoder_layers))

    def _layer_steps(self, step: Step, history: History) -> LayerSteps:
        modules, wanted = self.rotations.by_module, self._state.wanted
        in_windows = self.parts.family.both_ways == "windows"
        return LayerSteps(step, history, modules, in_windows, None if wanted is None else ([*modules][-1], wanted))

    def _pruned(self, plan: Plan, histories: list[History], prompt: Prompt, cache: Any) -> PrunedLayers:
        """The layers of a forward, each on what is left for it.

        Raises:
            BadPrompt: a prompt with images comes in chunks.
            UnsupportedModel: the layers would be computed again for gradients.
        """
        state, parts = self._state, self.parts
        if state.chunked is not None and self._how.prune is not None:
            raise BadPrompt(
                "a prompt that is prefilled in chunks cannot be pruned, since its last token is not known when its "
                "images come; leave prefill_chunk_size or prune out."
            )
        refuse_to_recompute(parts.decoder_layers)
        starts = (0, *self._starts(parts))
        stages = [Stage(start, self._form(start), history) for start, history in zip(starts, histories, strict=True)]
        how = self._how
        return PrunedLayers(parts, how.prune, stages, plan, prompt, cache, self.rotations, how.representatives)

    def _packed(self, new: NewTokens) -> Packed | None:
        """How rows that keep different numbers of tokens travel as one; None: they do not."""
        tokens = new.map
        if new.plain or self.parts.mixers or not bool((tokens.kept < tokens.width).any() & tokens.kept.any()):
            return None
        return Packed(torch.arange(tokens.width, device=tokens.kept.device) < tokens.kept[:, None])

    def _wanted(self, inputs: dict[str, Any], new: NewTokens) -> Tensor | None:
        """int64 [B, k], the merged tokens of which the last layer's output is asked for, where somebody asks for the
        last logits alone and nobody watches; None: of all."""
        asked, parts = self._state.last_logits, self.parts
        if not asked or not new.merged or asked >= new.map.tokens or not cuts_logits(type(parts.model).forward):
            return None
        within = [*parts.decoder_layers[-1].modules()]
        hooks = [
            hook
            for module in (parts.inner, *parts.language_model.children(), *within)
            for hook in module._forward_hooks.values()
        ]
        hooks += [hook for module in within for hook in module._forward_pre_hooks.values()]
        watched = any(getattr(hook, "__module__", "") != CAPTURING for hook in hooks)
        if watched or not parts.last_by_token or _captures(inputs, parts.language_model.config):
            return None
        return new.map.group[:, -asked:].clamp(min=0)

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

    def _turns(
        self, like: Tensor, positions: Tensor, new: NewTokens, history: History
    ) -> tuple[dict[str, Angles], Tensor | None]:
        """The rotary angles of representatives by kind, and what turns keys from there to their own positions, see
        `plan_step`.

        Args:
            positions: int64 [B, N] or [B, N, axes], of the new tokens.
        """
        if self._how.unmerge == "none" and not (new.plain and history.plain):
            history.consecutive = True
            return angles_of(self.parts, like, self._consecutive(new, history)), None
        angles = angles_of(self.parts, like, positions.permute(2, 0, 1) if positions.ndim == 3 else positions)
        if new.plain:
            return angles, None
        at = new.representative
        stands = {kind: (take(cos, at), take(sin, at)) for kind, (cos, sin) in angles.items()}
        return stands, new.turn(as_phase(*self.rotations.joined(angles))) if new.merged else None

    def _shown(self, tokens: int) -> Tensor | None:
        """bool [B, N], which of the new tokens are of images or videos, if that is known."""
        shown = None if self._state.prompts is None else self._state.prompts.shown
        return shown if shown is not None and shown.shape[1] == tokens else None

    def _picture(self, tokens: int) -> Tensor | None:
        """int64 [B, N], see `Prompt.picture`, if that is known."""
        picture = None if self._state.prompts is None else self._state.prompts.picture
        return picture if picture is not None and picture.shape[1] == tokens else None

    def _distances(self, like: Tensor, length: int) -> Tensor:
        """float32 [length]: log(2 - D(t)), where D is the mean cosine of what t positions rotate by."""
        angles = angles_of(self.parts, like, torch.arange(length, device=like.device)[None])
        turn = as_phase(*self.rotations.joined(angles))[0]
        cosine = turn_between(turn[:1], turn).real.mean(-1)
        return (2 - cosine).log().float()

    def _consecutive(self, new: NewTokens, history: History) -> Tensor:
        """int64 [B, M] or [axes, B, M]: positions that count merged tokens."""
        index = torch.arange(new.map.width, device=new.map.group.device).expand(new.map.batch, -1)
        if history.length:
            index = index + (history.keys.size > 0).sum(1, keepdim=True)
        axes = self.parts.decoder_kind.axes
        return index if axes == 1 else index.expand(axes, -1, -1)


def _captures(arguments: Mapping[str, Any], config: Any) -> bool:
    """Whether a call, or else the config, asks for what layers give on the way: hidden states, a router's logits."""
    named = {name for name in (*arguments, *vars(config)) if name.startswith("output_")}
    asked = {name: arguments.get(name) for name in named}
    return any(getattr(config, name, None) if value is None else value for name, value in asked.items())


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
    if history.length:
        hidden = ~earlier & (history.tokens.slot >= 0)
        if bool(hidden.any()):
            if unmerge == "none":
                raise ValueError(
                    'the attention_mask hides tokens that the KV cache holds, and with unmerge="none" those after them '
                    "would move up; give cached tokens the mask that they came with, or start with a new cache"
                )
            history.hide(hidden)
    return None if bool(newest.all()) else newest
