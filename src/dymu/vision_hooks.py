"""What is hooked into the vision half of a model: image -> fewer tokens, projected, copied to stock places."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from dymu.families import Parts
from dymu.merging import MergeRule, MergeRun
from dymu.report import Report
from dymu.unmerging import carry_leaders, image_leaders


class VisionHooks:
    """Hooks for `get_image_features`, the encoder's layers, the encoder and the projector.

    Args:
        parts: of the model.
        rule: which tokens merge; may be set anew between calls.
        encoded: called with every batch of images that was encoded: its report and the features of each image.
    """

    def __init__(self, parts: Parts, rule: MergeRule | None, encoded: Callable[[Report, list[Tensor]], object]) -> None:
        self.rule = rule
        self._parts, self._encoded = parts, encoded
        self._run: MergeRun | None = None
        self._dropped = 0

    def image_features(self, get_image_features: Callable[..., Any]) -> Callable[..., Any]:
        """`get_image_features` whose encoder merges, and whose features carry their token maps wherever they go."""
        family, signature = self._parts.family, inspect.signature(get_image_features)

        @functools.wraps(get_image_features)
        def merging(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            as_dict = kwargs.pop("return_dict", None)
            self._dropped = self._parts.dropped(given.get(family.select_strategy))
            layers = self._parts.feature_layers(given.get(family.feature_layer))
            assert self.rule is not None
            self._run = MergeRun(self.rule, max(layers), max(self._parts.prefix, self._dropped))
            try:
                output = get_image_features(*args, **kwargs, return_dict=True)
                self._finish(self._run, given["pixel_values"], output.pooler_output)
            finally:
                self._run = None
            return output.to_tuple() if as_dict is False else output

        return merging

    def layer(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Encoder layer `index` that merges between its attention and its MLP, or that does not run, see `MergeRun`."""
        layer = self._parts.encoder_layers[index]

        @functools.wraps(forward)
        def merging_layer(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._run is None:
                return forward(hidden_states, *args, **kwargs)
            return self._run.layer(index, layer, hidden_states)

        return merging_layer

    def after_tower(self, _tower: nn.Module, _args: Any, output: Any) -> None:
        """Features of several layers are joined token by token, so bring them all to the tokens left at the end.

        The features of layers that did not run, since the language model reads none of them, are None.
        """
        run = self._run
        if run is not None and output.hidden_states is not None:
            output.hidden_states = tuple(
                None if hidden is None or layers > run.depth else run.in_final_tokens(hidden, layers)
                for layers, hidden in enumerate(output.hidden_states)
            )

    def after_projector(self, _projector: nn.Module, _args: Any, features: Tensor) -> Tensor:
        """Copy the projected features [B, M, C] to all N tokens of each image, which the family's own code places."""
        return features if self._run is None else self._run.map.drop(self._dropped).expand(features)

    def _finish(self, run: MergeRun, pixel_values: Tensor, features: list[Tensor]) -> None:
        images = run.map.drop(self._dropped)
        carry_leaders(features, image_leaders(images))
        grid = _grid(run.map.tokens - self._parts.prefix, pixel_values)
        report = Report(
            map=images,
            kept_by_layer=[state.map.kept - self._dropped for state in run.states[1 : run.depth + 1]],
            prefix=max(self._parts.prefix - self._dropped, 0),
            grid=grid,
            seen=adaptive_avg_pool2d(pixel_values.detach().float(), grid),
        )
        self._encoded(report, features)


def _grid(patches: int, pixel_values: Tensor) -> tuple[int, int]:
    """Rows and columns of `patches` patches over pictures [B, 3, height, width]."""
    height, width = pixel_values.shape[-2:]
    rows = max(round((patches * height / width) ** 0.5), 1)
    return rows, patches // rows
