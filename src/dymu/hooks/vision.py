"""Hooks for the vision half of a model: pictures -> fewer tokens, projected, copied to all tokens they stand for."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dymu.errors import BadPrompt, UnsupportedModel
from dymu.families.resolve import Modality, Parts, find
from dymu.hooks.call import CallState, Features, Prompts, arguments_of, carry_items
from dymu.hooks.focus import InFocus
from dymu.hooks.probe import differ, mixing
from dymu.hooks.refusals import (
    drops_out,
    refuse_absent_patches,
    refuse_arguments,
    refuse_attention_weights,
    refuse_checkpointing,
    refuse_late_windows,
    warn_of_dropout,
    warn_of_hooks,
)
from dymu.hooks.replaced import Method
from dymu.hooks.trace import locations, order_of, pictures_of, pixels_of, seen_by, trace
from dymu.item import Item
from dymu.merging import MergedTokens, Pictures
from dymu.reducers import EncoderRun, Reducer, Shown, reduce_in_prompt
from dymu.token_map import take


@dataclass
class _Call:
    """A running call of `get_image_features` or `get_video_features`.

    Attributes:
        modality, args, kwargs: what it was called with.
        arguments: the same by name.
        layers: see `Parts.feature_layers`.
        dropped: leading encoder tokens that the language model does not get.
        run: once the encoder got its pixels.
        seen: of each picture the colours of its units, then.
        expanded: whether the features were copied to all tokens already.
        windows: by the identity of the segments that a layer gets, these and the windows that they are.
    """

    modality: Modality
    args: Sequence[Any]
    kwargs: dict[str, Any]
    arguments: dict[str, Any]
    layers: list[int]
    dropped: int
    run: EncoderRun | None = None
    seen: Tensor | Sequence[Tensor] = ()
    expanded: bool = False
    windows: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    @property
    def running(self) -> EncoderRun:
        assert self.run is not None
        return self.run

    def expand(self, features: Tensor) -> Tensor:
        self.expanded = True
        return self.running.map.drop(self.dropped).expand(features)

    def window(self, segments: Tensor) -> Tensor | None:
        """See `Pictures.window`."""
        if id(segments) not in self.windows:
            self.windows[id(segments)] = segments, self.running.pictures.window(segments)
        return self.windows[id(segments)][1]


def _check_prompts(ids: Any, present: Any) -> None:
    """Raises: BadPrompt, where these are no ids [B, N], or no mask of them."""
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise BadPrompt("input_ids beside images are the ids [prompts, tokens] of the prompts that show them.")
    if present is not None and not (isinstance(present, Tensor) and present.shape == ids.shape):
        raise BadPrompt("attention_mask beside images says which of input_ids are there: give one as large.")


class VisionHooks:
    """What stands around `get_image_features` and `get_video_features`, the encoder, its layers, and what follows it.

    Args:
        parts: of the model.
        state: of the running call.
        reducer: which tokens merge; may be replaced between calls.
    """

    def __init__(self, parts: Parts, state: CallState, reducer: Reducer | None) -> None:
        self.parts, self.reducer, self._state = parts, reducer, state
        self.focus: InFocus | None = None
        self._proved = False

    def into(self, parts: Parts) -> None:
        """From the next call on, stand around these parts."""
        self.parts, self._proved = parts, False

    def features(self, modality: Modality, get_features: Method, *args: Any, **kwargs: Any) -> Any:
        """`get_features` with an encoder that merges. Its features carry their items wherever they go.

        The prompts that ask about them may come along as `input_ids` and `attention_mask`, for reducers that read them.

        Raises:
            UnsupportedModel: what is asked of the encoder cannot be had with merged tokens.
        """
        state, before = self._state, self._state.asked
        ids = kwargs.pop("input_ids", None)
        present = None if ids is None else kwargs.pop("attention_mask", None)
        if ids is not None:
            _check_prompts(ids, present)
        try:
            if ids is not None:
                state.asked = Prompts.of(self.parts, ids, present=present)
            return self._features(modality, get_features, *args, **kwargs)
        finally:
            state.asked = before

    def _features(self, modality: Modality, get_features: Method, *args: Any, **kwargs: Any) -> Any:
        state, family = self._state, self.parts.family
        within = state.encoding
        if within is not None and within.run is None and (modality, within.modality) == ("image", "video"):
            return get_features(*args, **kwargs)  # some families encode videos by the method for images
        arguments = arguments_of(self.parts.inner, f"get_{modality}_features", args, kwargs)
        refuse_attention_weights(arguments, self.parts.tower.config)
        refuse_arguments(arguments, family.refuses)
        refuse_checkpointing(self.parts.encoder_modules)
        warn_of_hooks(self.parts.encoder_attentions, state.calls.warned)
        if self.parts.tower.training and any(map(drops_out, self.parts.encoder_attentions)):
            warn_of_dropout(state.calls.warned)
        as_dict = kwargs.pop("return_dict", None)
        dropped = self.parts.dropped(arguments.get(family.select_strategy or ""))
        call = _Call(modality, args, kwargs, arguments, self.parts.feature_layers(arguments), dropped)
        try:
            state.encoding = call
            output = get_features(*args, **kwargs, return_dict=True)
        finally:
            state.encoding = within
        run = call.run
        if run is None or not call.expanded or len(run.states) != len(self.parts.encoder_modules) + 1:
            raise UnsupportedModel(
                "parts of the model were exchanged while a call ran; exchange them between calls, and ask again."
            )
        if run.gives_features and len(call.layers) > 1:
            raise UnsupportedModel(
                f"{type(run.reducer).__name__} gives features of its own instead of one layer's, and this "
                "model reads several layers; set its feature layer to one."
            )
        items = trace(self.parts, modality, args, kwargs, run.pictures, run.map, call.seen)
        items, output.pooler_output = reduce_in_prompt(run.reducer, items, output.pooler_output, run.shown)
        kept = torch.stack([state.map.kept - dropped for state in run.states[1 : run.depth + 1]])
        each = kept.split([item.pictures for item in items], dim=1)
        items = [replace(item, kept_by_layer=layers) for item, layers in zip(items, each, strict=True)]
        if "text" in run.shown.__dict__:  # the reducer has read it
            texts = iter(run.shown.text)
            read = [[next(texts) for _ in range(item.pictures)] for item in items]
            items = [replace(item, chosen_for=of[0]) if of else item for item, of in zip(items, read, strict=True)]
        self._prove(items, output.pooler_output)
        carry_items(output.pooler_output, items)
        state.encoded(modality, items, output.pooler_output)
        state.counted(run)
        return output.to_tuple() if as_dict is False else output

    def _prove(self, items: Sequence[Item], features: Features) -> None:
        """At the first call in which anything merges: raises UnsupportedModel where tokens of a group differ."""
        if self._proved or not any(item.kept < len(item.leaders) for item in items):
            return
        for item, of_item in zip(items, features, strict=True):
            if item.pictures and differ(of_item.detach().flatten(0, -2), item.leaders):
                raise mixing(self.parts.projector or self.parts.merger or self.parts.inner)
        self._proved = True

    def tower(self, forward: Method, *args: Any, **kwargs: Any) -> Any:
        """The encoder: a reducer may show it other pixels, and its features come in the tokens left at the end.

        Features of several layers are joined token by token, hence all in the same tokens; those of layers that did not
        run, since the language model reads none of them, are None.
        """
        call = self._state.encoding
        if call is None:
            return forward(*args, **kwargs)
        assert self.reducer is not None
        named = None if args else next(name for name in ("pixel_values", "hidden_states") if name in kwargs)
        pixels = args[0] if named is None else kwargs[named]
        pictures = pictures_of(self.parts, call.modality, call.arguments, pixels)
        pictures = replace(pictures, order=order_of(self.parts, args, kwargs, pictures))
        if pictures.restores and len(call.layers) > 1:
            raise UnsupportedModel(
                "this model reads features of several encoder layers and regroups them or takes pictures of several "
                "sizes, which dymu does not know yet; set its feature layer to one."
            )
        call.seen = seen_by(pictures, self.parts, pixels)
        shown = self._shown(call, pictures, pixels)
        rule, focus = self._state.rule(self.reducer, shown), self._state.focus or self.focus
        if focus is not None:
            apart = self.parts.family.tells_images != "items"
            grids = focus.grids(shown, self._state.own, pictures, apart, self.parts.patch_sides)
            rule, shown = focus.around(rule), replace(shown, focus=grids)
        depth = max(call.layers)
        behind = None
        if depth < len(self.parts.encoder_modules):
            behind = functools.partial(self.parts.encoder_layer, depth)
        run = EncoderRun(rule, depth, shown, pictures, call.dropped, behind, self._state.memory)
        call.run, pixels = run, run.pixels(pixels)
        if named is None:
            args = (pixels, *args[1:])
        else:
            kwargs = {**kwargs, named: pixels}
        output = forward(*args, **kwargs)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(
                None if hidden is None else run.in_final_tokens(hidden, layers)
                for layers, hidden in enumerate(output.hidden_states)
            )
        return output

    def layer(self, index: int, forward: Method, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Encoder layer `index`, which merges between its attention and its MLP, or does not run: see `EncoderRun`."""
        call = self._state.encoding
        if call is None:
            return forward(hidden_states, *args, **kwargs)
        kind = self.parts.tower_kind
        angles = window = None
        if kind.arrangement == "batch":
            refuse_absent_patches(kwargs.get("attention_mask", args[0] if args else None))
        if kind.angles is not None:
            angles = kwargs[kind.angles]
        if kind.segments is not None:
            window = call.window(kwargs[kind.segments])
            refuse_late_windows(call.running.states[0].window if index else window, window)
        layer = self.parts.encoder_layer(index)
        return call.running.layer(index, layer, hidden_states, angles, window, window is not None)

    def pooler(self, forward: Method, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Pool the features [B, M, C] copied to all tokens."""
        call = self._state.encoding
        return forward(features if call is None else call.expand(features), *args, **kwargs)

    def merger(self, forward: Method, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Make a token of the patches [S', C] of each merged unit, and copy it to all that it stands for; or make
        tokens of all patches [pictures, N, C], among them of those that some layers before the last gave."""
        call = self._state.encoding
        if call is None:
            return forward(features, *args, **kwargs)
        call.expanded, run, taps = True, call.running, self.parts.tower_kind.taps
        if taps is None:
            return run.expand(forward(features, *args, **kwargs))
        layers = find(self.parts.tower, taps)
        tapped = [
            given if layer + 1 >= run.depth else run.pictures.leave(given, run.states[layer + 1])
            for layer, given in zip(layers, args[0], strict=True)
        ]
        return forward(features, tapped, *args[1:], **kwargs)

    def places(self, forward: Method, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add to each token [pictures, N, C] something of its place; to those of a group, the mean."""
        call, placed = self._state.encoding, forward(tokens, *args, **kwargs)
        if call is None:
            return placed
        units = call.running.map.drop(call.dropped)
        return units.expand(units.average(placed))

    def side_merger(self, forward: Method, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The same part way through the encoder, where other tokens may have merged than at its end."""
        call, tokens = self._state.encoding, forward(features, *args, **kwargs)
        return tokens if call is None else call.running.expand(tokens)

    def projector(self, forward: Method, *args: Any, **kwargs: Any) -> Any:
        """Project merged features and copy them to all N tokens of each picture, which the family's code arranges."""
        call = self._state.encoding
        if call is None or call.expanded:
            return forward(*args, **kwargs)
        run = call.running
        if not run.pictures.restores:
            return call.expand(forward(*args, **kwargs))
        call.expanded = True
        if run.pictures.arrangement == "raster" or self.parts.family.regroups == "projector":
            return forward(*args, **kwargs)
        # Of the tokens of each group, all alike, one is projected.
        features = args[0] if args else next(iter(kwargs.values()))
        if features.ndim == 2:
            return run.expand(forward(features[run.first]))
        units = run.map.drop(call.dropped)
        if features.shape[:2] != units.group.shape:
            raise UnsupportedModel(
                f"{type(self.parts.projector).__name__} got {list(features.shape[:2])} tokens and should get one for "
                f"each unit of {run.pictures.side} × {run.pictures.side} patches; dymu does not know how this model "
                "makes them."
            )
        return units.expand(forward(take(features, units.first())))

    def _shown(self, call: _Call, pictures: Pictures, pixels: Tensor) -> Shown:
        parts, grids = self.parts, pictures.unit_grids

        @functools.cache
        def untouched() -> list[Item]:
            """The items with nothing merged."""
            tokens = MergedTokens.unmerged(pictures.layout(pixels.device)).map
            colours = [torch.zeros(3, *grid, dtype=torch.float32, device=pixels.device) for grid in grids]
            within, self._state.encoding = self._state.encoding, None  # the family's code runs on signatures
            try:
                return trace(parts, call.modality, call.args, call.kwargs, pictures, tokens, colours)
            finally:
                self._state.encoding = within

        how = "items" if call.modality == "video" else parts.family.tells_images
        by_image = how == "items" or (self._state.asked is not None and self._state.asked.ids is not None)

        def items() -> Sequence[Sequence[int]]:
            if call.modality == "image" and not parts.family.cuts_images:
                return [(count - call.dropped + parts.prefix,) for count in map(math.prod, grids)]
            of_items = [
                torch.bincount(item.picture[item.patch], minlength=item.pictures).tolist() for item in untouched()
            ]
            if how == "items" or not by_image:
                return of_items
            return self._state.by_image(how, [count for item in of_items for count in item])

        def text() -> list[Tensor]:
            texts = self._state.text_of(call.modality, [len(item.leaders) for item in untouched()])
            return [text for text, item in zip(texts, untouched(), strict=True) for _ in range(item.pictures)]

        return Shown(
            pixels=pixels_of(pictures, parts, pixels),
            grids=grids,
            single=call.modality == "image" and not parts.family.cuts_images,
            video=call.modality == "video",
            by_image=by_image,
            find_items=items,
            find_text=text,
            find_location=lambda: locations(untouched(), pictures),
            embed=lambda ids: parts.inner.get_input_embeddings()(ids),
        )
