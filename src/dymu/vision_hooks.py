"""What is hooked into the vision half of a model: pictures -> fewer tokens, projected, copied to stock places."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dymu.families import Modality, Parts
from dymu.merging import MergeRule, MergeRun, Settling
from dymu.placed import Placed
from dymu.placement import place, seen_by
from dymu.settling import settle
from dymu.unmerging import carry_leaders

Encoded = Callable[[Modality, list[Placed], list[Tensor], Sequence[Tensor]], object]
"""Called with every batch that was encoded: how its items lie, the tokens left of each picture after each layer, and
the features of each item."""


@dataclass
class _Call:
    """One batch of pictures on its way.

    Attributes:
        dropped: leading encoder tokens that the language model does not get.
        pixels: [pictures, 3, height, width], once the encoder got them.
        expanded: whether the features were copied to all tokens already.
    """

    run: MergeRun
    dropped: int
    pixels: Tensor | None = None
    expanded: bool = False

    def expand(self, features: Tensor) -> Tensor:
        self.expanded = True
        return self.run.map.drop(self.dropped).expand(features)


class VisionHooks:
    """Hooks for `get_image_features` and `get_video_features`, the encoder's layers, the encoder, and what follows it.

    Args:
        parts: of the model.
        rule: which tokens merge; may be set anew between calls.
        encoded: see `Encoded`.
    """

    def __init__(self, parts: Parts, rule: MergeRule | None, encoded: Encoded) -> None:
        self.rule = rule
        self._parts, self._encoded = parts, encoded
        self._call: _Call | None = None

    def features(self, modality: Modality, get_features: Callable[..., Any]) -> Callable[..., Any]:
        """`get_features` whose encoder merges, and whose features carry their token maps wherever they go."""
        family, signature = self._parts.family, inspect.signature(get_features)

        @functools.wraps(get_features)
        def merging(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            as_dict = kwargs.pop("return_dict", None)
            dropped = self._parts.dropped(given.get(family.select_strategy))
            layers = self._parts.feature_layers(given)
            assert self.rule is not None
            call = _Call(MergeRun(self.rule, max(layers), max(self._parts.prefix, dropped)), dropped)
            self._call = call
            try:
                output = get_features(*args, **kwargs, return_dict=True)
            finally:
                self._call = None
            assert call.pixels is not None
            seen = seen_by(call.pixels, call.run.map.tokens - self._parts.prefix)
            placed = place(self._parts, modality, args, kwargs, call.run.map, seen)
            if isinstance(self.rule, Settling):
                rounds = self.rule.rounds(modality == "video")
                placed, output.pooler_output = settle(placed, output.pooler_output, rounds, self.rule.over_time)
            carry_leaders(output.pooler_output, [item.leaders for item in placed])
            kept = [state.map.kept - dropped for state in call.run.states[1 : call.run.depth + 1]]
            self._encoded(modality, placed, kept, output.pooler_output)
            return output.to_tuple() if as_dict is False else output

        return merging

    def layer(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Encoder layer `index` that merges between its attention and its MLP, or that does not run, see `MergeRun`."""
        layer = self._parts.encoder_layers[index]

        @functools.wraps(forward)
        def merging_layer(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._call is None:
                return forward(hidden_states, *args, **kwargs)
            return self._call.run.layer(index, layer, hidden_states)

        return merging_layer

    def after_tower(self, _tower: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Features of several layers are joined token by token, so bring them all to the tokens left at the end.

        The features of layers that did not run, since the language model reads none of them, are None.
        """
        if self._call is None:
            return
        self._call.pixels = args[0] if args else kwargs["pixel_values"]
        run = self._call.run
        if output.hidden_states is not None:
            output.hidden_states = tuple(
                None if hidden is None or layers > run.depth else run.in_final_tokens(hidden, layers)
                for layers, hidden in enumerate(output.hidden_states)
            )

    def before_pooler(self, _pooler: nn.Module, args: Any) -> Any:
        """Pooling needs every token in its place."""
        return args if self._call is None else (self._call.expand(args[0]), *args[1:])

    def after_projector(self, _projector: nn.Module, _args: Any, features: Tensor) -> Tensor:
        """Copy the projected features [B, M, C] to all N tokens of each picture, which the family's own code places."""
        return features if self._call is None or self._call.expanded else self._call.expand(features)
