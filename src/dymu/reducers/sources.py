"""What reducers may read of the encoder's layers: attention, keys, features. Nothing is computed that nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from dymu.merging import EncoderLayer, MergedTokens, Pictures
from dymu.token_map import at_least_float32


@dataclass(frozen=True, eq=False)
class _Ahead:
    """What an encoder layer got."""

    layer: EncoderLayer
    x: Tensor
    state: MergedTokens
    windowed: bool


class Sources:
    """What one run of the encoder tells of its patches (units), picture by picture."""

    def __init__(self) -> None:
        self._pictures, self._depth = Pictures(()), 0
        self._wanted: list[int] = []
        self._behind: Callable[[], EncoderLayer] | None = None
        self._ahead: dict[int, _Ahead] = {}

    def follow(
        self, pictures: Pictures, depth: int, wanted: Collection[int | None], behind: Callable[[], EncoderLayer] | None
    ) -> None:
        """Begin.

        Args:
            depth: layers that run.
            wanted: those that are read, see `Reducer.reads`.
            behind: the layer behind the last one that runs; None: there is none.
        """
        if not isinstance(wanted, Collection):
            raise ValueError(f"a reducer's `reads` must answer layers, such as (-1,), not {wanted!r}.")
        self._pictures, self._depth, self._behind = pictures, depth, behind
        self._wanted = [self._index(layer) for layer in wanted]

    def passed(self, index: int, layer: EncoderLayer, x: Tensor, state: MergedTokens, windowed: bool) -> None:
        """Keep what layer `index` gets, if it is read; of layers that attend within windows, the last one that does not
        stands for those behind it."""
        for wanted in self._wanted:
            before = self._ahead.get(wanted)
            if index <= wanted < self._depth and (not windowed or before is None or before.windowed):
                self._ahead[wanted] = _Ahead(layer, x, state, windowed)

    def finished(self, layer: EncoderLayer, x: Tensor, state: MergedTokens) -> None:
        """Keep what the last layer gave, if it is read."""
        if self._depth in self._wanted:
            behind = layer if self._behind is None else self._behind()
            self._ahead[self._depth] = _Ahead(behind, x, state, windowed=False)

    def attention(self, layer: int | None = -1, heads: bool = True) -> list[Tensor]:
        """For each picture float32 [rows, columns], the attention that each patch gets in a layer: from the class token
        where the encoder has one, else from all patches on average. The class token's own part is left out.

        Args:
            layer: see `Reducer.reads`.
            heads: whether each head attends by itself, of which the mean is taken, or all channels as one head.
        """
        ahead = self._of(layer)
        state, scale = ahead.state, ahead.layer.scaling
        query, key = map(at_least_float32, ahead.layer.asked(ahead.x, state))
        key = key.repeat_interleave(query.shape[-2] // key.shape[-2], -2)
        if not heads:
            query, key, scale = query.flatten(-2).unsqueeze(-2), key.flatten(-2).unsqueeze(-2), None
        rows = state.rows(ahead.windowed).patches
        query, key = (rows.pad(part.reshape(*rows.shape, *part.shape[2:])) for part in (query, key))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        asks = slice(1) if self._pictures.prefix else slice(None)
        logs = torch.zeros(key.shape[:2], device=key.device)
        if state.size is not None:
            sizes = state.units.repeat(state.size, state.layout)
            logs = rows.pad(sizes.view(rows.shape)).log()
        received = torch.zeros_like(logs)
        for row, length in enumerate(rows.lengths):
            for head in range(query.shape[-2]):
                logits = query[row, :length][asks, head] @ key[row, :length, head].mT * scale + logs[row, :length]
                received[row, :length] += logits.softmax(-1).mean(0) / query.shape[-2]
        return [grid[..., 0] for grid in self._by_picture(rows.pack(received[..., None]), state)]

    def keys(self, layer: int | None = -1, heads: bool = True) -> list[Tensor]:
        """For each picture float32 [rows, columns, D], the keys of a layer ahead of rotation.

        Args:
            layer: see `Reducer.reads`.
            heads: whether their mean over heads is taken, or those of all heads side by side.
        """
        ahead = self._of(layer)
        _, key, _ = ahead.layer.project(ahead.layer.norm1(ahead.x))
        key = at_least_float32(key)
        return self._by_picture(key.mean(-2) if heads else key.flatten(-2), ahead.state)

    def features(self) -> list[Tensor]:
        """For each picture float32 [rows, columns, C], what the last layer gave; of a unit, the mean of its patches."""
        ahead = self._of(None)
        return self._by_picture(at_least_float32(ahead.x), ahead.state)

    def _index(self, layer: Any) -> int:
        if layer is None:
            return self._depth
        if isinstance(layer, bool) or not isinstance(layer, Integral) or not -self._depth <= int(layer) < self._depth:
            raise ValueError(f"a reducer reads encoder layer {layer!r} of {self._depth} that run; name one of those.")
        return int(layer) % self._depth

    def _of(self, layer: int | None) -> _Ahead:
        index = self._index(layer)
        if index not in self._ahead:
            raise ValueError(f"a reducer reads encoder layer {layer}, which its `reads` does not name; name it there.")
        return self._ahead[index]

    def _by_picture(self, x: Tensor, state: MergedTokens) -> list[Tensor]:
        """Patches as they travel [..., C], to each picture's units [rows, columns, C]; a merged one stands at all its
        places."""
        pictures, units = self._pictures, state.units.gather(x.view(*state.patches.shape, -1), state.layout)
        units = units.unflatten(-1, (state.units.patches, -1)).mean(-2)
        ahead = pictures.layout(x.device).lengths
        patches = torch.cat([part[pictures.prefix :] for part in pictures.expand(units, state).split(ahead)])
        counts = [rows * columns for rows, columns in pictures.unit_grids]
        parts = pictures.by_rows(patches).split(counts)
        return [part.unflatten(0, grid) for part, grid in zip(parts, pictures.unit_grids, strict=True)]
