"""Hooks for a vision encoder by itself, which gives merged tokens copied to all places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from dymu.errors import BadImage, UnsupportedModel
from dymu.families.encoders import LoneEncoder
from dymu.hooks.call import CallState, arguments_of
from dymu.hooks.focus import InFocus
from dymu.hooks.refusals import (
    drops_out,
    refuse_attention_weights,
    refuse_checkpointing,
    refuse_masks,
    warn_of_dropout,
    warn_of_hooks,
)
from dymu.hooks.replaced import Method
from dymu.hooks.trace import locations
from dymu.item import Item
from dymu.merging import MergedTokens, Pictures
from dymu.reducers import Reducer, Shown, WholeRun
from dymu.token_map import TokenMap, leaders_of


class EncoderHooks:
    """What stands around the methods of an encoder that take pixels, and around its layers.

    Args:
        parts: of the encoder.
        state: of the running call.
        reducer: which tokens merge; may be replaced between calls.
    """

    def __init__(self, parts: LoneEncoder, state: CallState, reducer: Reducer | None) -> None:
        self.parts, self.reducer, self._state = parts, reducer, state
        self.focus: InFocus | None = None

    def encode(self, name: str, method: Method, *args: Any, **kwargs: Any) -> Any:
        """The encoder's method `name`, in which tokens merge.

        Raises:
            UnsupportedModel: what is asked of the encoder cannot be had with merged tokens.
            BadImage: it is not known which patches are padding.
        """
        state, parts, reducer = self._state, self.parts, self.reducer
        outer: WholeRun | None = state.encoding
        if outer is not None and not outer.states:  # one method calls another; later, a hook asks something else
            return method(*args, **kwargs)
        assert reducer is not None
        arguments = arguments_of(parts.tower, name, args, kwargs)
        refuse_attention_weights(arguments, getattr(parts.tower, "config", None))
        refuse_checkpointing(parts.tower.modules())
        warn_of_hooks(parts.encoder_attentions, state.calls.warned)
        if parts.tower.training and any(map(drops_out, parts.encoder_attentions)):
            warn_of_dropout(state.calls.warned)
        pixels = args[0] if args else kwargs.get(parts.pixels)
        if not isinstance(pixels, Tensor):
            return method(*args, **kwargs)  # which says so
        run = self._run(reducer, pixels, arguments)
        seen = run.pixels(pixels)
        if seen.shape != pixels.shape:
            raise UnsupportedModel(
                f"{type(reducer).__name__} shows the encoder smaller pictures, and an encoder by itself has features "
                "at all places; give it smaller pictures yourself."
            )
        try:
            state.encoding = run
            output = method(seen, *args[1:], **kwargs) if args else method(**{**kwargs, parts.pixels: seen})
        finally:
            state.encoding = outer
        if len(run.states) < 2:
            raise UnsupportedModel(
                "parts of the model were exchanged while a call ran; exchange them between calls, and ask again."
            )
        kept = torch.stack([state.map.kept for state in run.states[1:]]) - parts.prefix
        covered = (1.0, 1.0)
        if parts.tower_kind.shapes is None:
            (rows, columns), (height, width) = run.pictures.grids[0], parts.patch_sides
            covered = (rows * height / pixels.shape[-2], columns * width / pixels.shape[-1])
        seen_by_patch = _colours(parts, run.pictures, pixels)
        state.begin_report(items_of(run.pictures, run.map, seen_by_patch, covered, kept))
        state.counted(run)
        return output

    def layer(self, index: int, forward: Method, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Encoder layer `index`, which merges between its attention and its MLP."""
        run = self._state.encoding
        if run is None:
            return forward(x, *args, **kwargs)
        kind, module = self.parts.tower_kind, self.parts.encoder_modules[index]
        angles = None if kind.angles is None else kwargs.pop(kind.angles)
        if kind.present is None:
            arguments = arguments_of(module, "forward", (x, *args), kwargs) if args else kwargs
            refuse_masks(module, {name: value for name, value in arguments.items() if value is not x})
        return run.layer(index, self.parts.encoder_layer(index), x, angles)

    def _run(self, reducer: Reducer, pixels: Tensor, arguments: Mapping[str, Any]) -> WholeRun:
        parts = self.parts
        pictures = pictures_in(parts, pixels.shape, arguments)

        def location() -> Tensor:
            tokens = MergedTokens.unmerged(pictures.layout(pixels.device)).map
            return locations(items_of(pictures, tokens, _colours(parts, pictures, pixels)), pictures)

        shown = Shown(_seen(parts, pictures, pixels), pictures.grids, single=True, video=False, find_location=location)
        reducer, focus = self._state.rule(reducer, shown), self._state.focus or self.focus
        if focus is not None:
            grids = focus.grids(shown, self._state.own, pictures, False, parts.patch_sides)
            reducer, shown = focus.around(reducer), replace(shown, focus=grids)
        where = ""
        if reducer.reduces("in_prompt", shown):
            where = "in the prompt, which an encoder by itself has not"
        elif parts.tower_kind.shapes is not None and reducer.reduces("before_encoder", shown):
            where = "on whole pictures, of which this encoder gets patches"
        if where:
            raise UnsupportedModel(f"{type(reducer).__name__} acts {where}; take another reducer.")
        padded = parts.tower_kind.present is not None
        return WholeRun(reducer, len(parts.encoder_modules), shown, pictures, padded)


def pictures_in(parts: LoneEncoder, shape: Sequence[int], arguments: Mapping[str, Any]) -> Pictures:
    """The pictures in pixels of some shape.

    Args:
        arguments: of the encoder's call, by name.

    Raises:
        BadImage: padding is among the patches, and not named as such.
    """
    kind = parts.tower_kind
    if kind.shapes is None:
        (height, width), (rows, columns) = shape[-2:], parts.patch_sides
        return Pictures(((height // rows, width // columns),) * shape[0], prefix=parts.prefix)
    shapes: Tensor = arguments[kind.shapes]
    grids = tuple((rows, columns) for rows, columns in shapes.tolist())
    if kind.present is not None:
        given = arguments.get(kind.present)
        patches = torch.arange(shape[1], device=shapes.device) < shapes.prod(-1, keepdim=True)
        present = torch.ones_like(patches) if given is None else given.to(patches.device).bool()
        if not torch.equal(present, patches):
            raise BadImage(
                f"{kind.present} does not say that the first rows × columns patches of each picture, by {kind.shapes}, "
                "are there and the others are padding; give both as the processor makes them."
            )
    return Pictures(grids, prefix=parts.prefix)


def items_of(
    pictures: Pictures,
    tokens: TokenMap,
    colours: Sequence[Tensor],
    covered: tuple[float, float] = (1.0, 1.0),
    kept: Tensor | None = None,
) -> list[Item]:
    """Every picture as an item, whose tokens are its patches.

    Args:
        tokens: from a picture's tokens, class and register tokens included.
        colours: of each picture [3, rows, columns].
        covered: see `Item.covered`.
        kept: int64 [layers, pictures], see `Item.kept_by_layer`.
    """
    patches = tokens.drop(pictures.prefix)
    leaders = leaders_of(patches.group, patches.width)
    items = []
    for number, (seen, (rows, columns)) in enumerate(zip(colours, pictures.grids, strict=True)):
        index = torch.arange(rows * columns, device=leaders.device)
        items.append(
            Item(
                leaders=leaders[number, : len(index)],
                patch=torch.ones_like(index, dtype=torch.bool),
                picture=torch.zeros_like(index),
                at=torch.stack((index // columns, index % columns), 1).float(),
                seen=seen.flatten(1).mT,
                shown=seen[None],
                video=False,
                covered=covered,
                **({} if kept is None else {"kept_by_layer": kept[:, number : number + 1]}),
            )
        )
    return items


def _seen(parts: LoneEncoder, pictures: Pictures, pixels: Tensor) -> Tensor | list[Tensor]:
    """Of each picture what the encoder sees: [3, height, width], or its patches [N, any]."""
    if parts.tower_kind.shapes is None:
        return pixels
    return [picture[: rows * columns] for picture, (rows, columns) in zip(pixels, pictures.grids, strict=True)]


def _colours(parts: LoneEncoder, pictures: Pictures, pixels: Tensor) -> list[Tensor]:
    """Of each picture [3, rows, columns], the mean colour of each patch; of other channels than three, their mean."""
    seen = _seen(parts, pictures, pixels.detach())
    if isinstance(seen, Tensor):
        colours = list(avg_pool2d(seen.float(), parts.patch_sides))
    else:
        means = (patches.float().unflatten(-1, (-1, 3)).mean(-2) for patches in seen)
        colours = [mean.mT.unflatten(1, grid) for mean, grid in zip(means, pictures.grids, strict=True)]
    return [part if len(part) == 3 else part.mean(0, keepdim=True).expand(3, -1, -1) for part in colours]
