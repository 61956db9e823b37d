"""Hooks for the vision half of a model: pictures -> fewer tokens, projected, copied to all tokens they stand for."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dymu.errors import UnsupportedModel
from dymu.families.resolve import Modality, Parts
from dymu.hooks.call import arguments_of
from dymu.hooks.trace import grid, locations, seen_by, trace
from dymu.item import Item
from dymu.reducers import EncoderRun, Reducer, Shown, reduce_in_prompt
from dymu.token_map import TokenMap
from dymu.unmerging.prompt import carry_leaders

Encoded = Callable[[Modality, list[Item], list[Tensor], Sequence[Tensor]], object]
"""Called with every batch that was encoded: its items, the tokens left of each picture after each layer, and the
features of each item."""

TextOf = Callable[[Modality, Sequence[int]], list[Tensor]]
"""For items of so many tokens each, the ids of the prompts that show them."""


@dataclass
class _Call:
    """A running call of `get_image_features` or `get_video_features`.

    Attributes:
        modality, args, kwargs: what it was called with.
        layers: see `Parts.feature_layers`.
        dropped: leading encoder tokens that the language model does not get.
        run: once the encoder got its pixels.
        expanded: whether the features were copied to all tokens already.
    """

    modality: Modality
    args: Sequence[Any]
    kwargs: dict[str, Any]
    layers: list[int]
    dropped: int
    run: EncoderRun | None = None
    expanded: bool = False

    @property
    def running(self) -> EncoderRun:
        assert self.run is not None
        return self.run

    def expand(self, features: Tensor) -> Tensor:
        self.expanded = True
        return self.running.map.drop(self.dropped).expand(features)


class VisionHooks:
    """Hooks for `get_image_features` and `get_video_features`, the encoder's layers, the encoder, and what follows it.

    Args:
        parts: of the model.
        reducer: which tokens merge; may be replaced between calls.
        encoded: see `Encoded`.
        text_of: see `TextOf`.
    """

    def __init__(self, parts: Parts, reducer: Reducer | None, encoded: Encoded, text_of: TextOf) -> None:
        self.reducer = reducer
        self._parts, self._encoded, self._text_of = parts, encoded, text_of
        self._call: _Call | None = None

    def features(self, modality: Modality, get_features: Callable[..., Any]) -> Callable[..., Any]:
        """`get_features` whose encoder merges, and whose features carry their token maps wherever they go."""
        family, signature = self._parts.family, inspect.signature(get_features)

        @functools.wraps(get_features)
        def merging(*args: Any, **kwargs: Any) -> Any:
            arguments = arguments_of(signature, args, kwargs)
            as_dict = kwargs.pop("return_dict", None)
            dropped = self._parts.dropped(arguments.get(family.select_strategy))
            call = _Call(modality, args, kwargs, self._parts.feature_layers(arguments), dropped)
            self._call = call
            try:
                output = get_features(*args, **kwargs, return_dict=True)
            finally:
                self._call = None
            run = call.running
            if run.gives_features and len(call.layers) > 1:
                raise UnsupportedModel(
                    f"{type(run.reducer).__name__} gives features of its own instead of one layer's, and this "
                    "model reads several layers; set its feature layer to one."
                )
            seen = seen_by(run.shown.pixels, run.shown.rows, run.shown.columns)
            items = trace(self._parts, modality, args, kwargs, run.map, seen)
            items, output.pooler_output = reduce_in_prompt(run.reducer, items, output.pooler_output, run.shown)
            carry_leaders(output.pooler_output, [item.leaders for item in items])
            kept = [state.map.kept - dropped for state in run.states[1 : run.depth + 1]]
            self._encoded(modality, items, kept, output.pooler_output)
            return output.to_tuple() if as_dict is False else output

        return merging

    def before_tower(self, _tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Begin to reduce; a reducer may show the encoder other pixels."""
        if self._call is None:
            return None
        assert self.reducer is not None
        pixels = args[0] if args else kwargs["pixel_values"]
        shown = self._shown(self._call, pixels)
        run = EncoderRun(self.reducer, max(self._call.layers), shown, self._parts.prefix, self._call.dropped)
        self._call.run, pixels = run, run.pixels(pixels)
        return ((pixels, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": pixels})

    def layer(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Encoder layer `index`, which merges between its attention and its MLP, or does not run: see `EncoderRun`."""
        layer = self._parts.encoder_layers[index]

        @functools.wraps(forward)
        def merging_layer(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._call is None:
                return forward(hidden_states, *args, **kwargs)
            return self._call.running.layer(index, layer, hidden_states)

        return merging_layer

    def after_tower(self, _tower: nn.Module, _args: Any, output: Any) -> None:
        """Features of several layers are joined token by token, so bring them all to the tokens left at the end.

        The features of layers that did not run, since the language model reads none of them, are None.
        """
        if self._call is None:
            return
        run = self._call.running
        if output.hidden_states is not None:
            output.hidden_states = tuple(
                None if hidden is None or layers > run.depth else run.in_final_tokens(hidden, layers)
                for layers, hidden in enumerate(output.hidden_states)
            )

    def before_pooler(self, _pooler: nn.Module, args: Any) -> Any:
        """Copy the features [B, M, C] to all tokens ahead of pooling."""
        return args if self._call is None else (self._call.expand(args[0]), *args[1:])

    def after_projector(self, _projector: nn.Module, _args: Any, features: Tensor) -> Tensor:
        """Copy the projected features [B, M, C] to all N tokens of each picture, which the family's code arranges."""
        return features if self._call is None or self._call.expanded else self._call.expand(features)

    def _shown(self, call: _Call, pixels: Tensor) -> Shown:
        rows, columns = grid(self._parts, pixels)

        @functools.cache
        def untouched() -> list[Item]:
            """The items with nothing merged."""
            tokens = TokenMap.identity(len(pixels), self._parts.prefix + rows * columns, pixels.device)
            colours = torch.zeros(len(pixels), 3, rows, columns, device=pixels.device)
            return trace(self._parts, call.modality, call.args, call.kwargs, tokens, colours)

        def text() -> list[Tensor]:
            texts = self._text_of(call.modality, [len(item.leaders) for item in untouched()])
            return [text for text, item in zip(texts, untouched(), strict=True) for _ in range(item.pictures)]

        return Shown(
            pixels=pixels,
            rows=rows,
            columns=columns,
            single=call.modality == "image" and not self._parts.family.cuts_images,
            video=call.modality == "video",
            find_text=text,
            find_location=lambda: locations(untouched(), rows, columns),
        )
