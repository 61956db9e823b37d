"""The pictures of one call: how an encoder's layers get their patches, and how these travel while they merge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dymu.choices import Arrangement
from dymu.merging.encoder_layer import Angles, MergedTokens
from dymu.merging.layout import Layout
from dymu.merging.units import Units


@dataclass(frozen=True)
class Pictures:
    """The pictures of one call.

    Args:
        grids: rows and columns of the patches of each.
        side: rows, and columns, of the patches of a unit.
        prefix: class and register tokens ahead of each picture's patches.
        arrangement: how the layers get them.
    """

    grids: tuple[tuple[int, int], ...]
    side: int = 1
    prefix: int = 0
    arrangement: Arrangement = "batch"

    @property
    def units(self) -> Units:
        return Units(self.side**2, self.prefix)

    @property
    def unit_grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the units of each."""
        return tuple((rows // self.side, columns // self.side) for rows, columns in self.grids)

    @property
    def restores(self) -> bool:
        """Whether the layers' output must hold all patches, row after row, since the family regroups them or takes
        pictures of several sizes apart."""
        return self.arrangement == "raster" or (self.arrangement == "batch" and self.side > 1)

    def enter(self, x: Tensor, angles: Angles | None, window: Tensor | None) -> tuple[Tensor, MergedTokens]:
        """What the first layer gets, as it travels, and which tokens these are.

        Args:
            x: see `Arrangement`.
            angles: [S, D] each, in the same order.
            window: int64 [units], see `MergedTokens`.
        """
        units = self.layout(x.device)
        shape = self.units.of_patches(units).shape
        x, *angles_of_units = (
            self._to_units(part.reshape(*x.shape[:-1], -1)).reshape(*shape, -1) for part in (x, *(angles or ()))
        )
        angles = (angles_of_units[0], angles_of_units[1]) if angles else None
        return x, MergedTokens.unmerged(units, self.units, angles, window)

    def leave(self, x: Tensor, state: MergedTokens) -> Tensor:
        """What the last layer gives: merged tokens, [pictures, M, C] padded or [S, C]; or all patches where the layers'
        output must hold them, see `restores`."""
        if self.arrangement == "packed":
            return x.flatten(0, 1)
        if not self.restores:
            return state.layout.pad(x)
        original = self.layout(x.device)
        units = self.expand(state.units.gather(x, state.layout), state).unflatten(0, original.shape)
        patches = state.units.spread(units, original)
        if self.arrangement == "raster":
            return patches.flatten(0, 1)[self._raster(x.device)][None]
        behind = patches[:, self.prefix :]
        return torch.cat((patches[:, : self.prefix], behind[:, self._raster(x.device)]), 1)

    def layout(self, device: torch.device) -> Layout:
        """Of the units, prefix tokens included, ahead of the first layer."""
        lengths = tuple(self.prefix + rows * columns for rows, columns in self.unit_grids)
        return Layout(torch.tensor(lengths, device=device), lengths)

    def expand(self, merged: Tensor, state: MergedTokens) -> Tensor:
        """Copy merged units, as they travel [..., C], to all that there were [S, C]; 0 for dropped ones."""
        original = self.layout(merged.device)
        group = original.pack(state.layout.index(state.map.group.clamp(min=0))).flatten()
        rows = merged.flatten(0, 1).index_select(0, group)
        if not state.map.padded:
            return rows
        return rows.masked_fill((original.pack(state.map.group).flatten() < 0)[:, None], 0)

    def to_patches(self, units: Tensor) -> Tensor:
        """What stands for each unit [S, ...], picture after picture, prefix tokens included, to every patch in the
        arrangement of the layers."""
        if self.arrangement == "batch":
            rows = units.unflatten(0, (len(self.grids), -1))
            if self.side == 1:
                return rows
            patches = rows[:, self.prefix :].repeat_interleave(self.side**2, 1)
            return torch.cat((rows[:, : self.prefix], patches[:, self._raster(units.device)]), 1)
        patches = units.repeat_interleave(self.side**2, 0)
        return patches if self.arrangement == "packed" else patches[self._raster(units.device)][None]

    def first_of_units(self, x: Tensor) -> Tensor:
        """The first patch of each unit, of patches [pictures, N, C] or [S, C] row after row: [..., units, C]."""
        return x[..., self._order(x.device), :][..., :: self.side**2, :]

    def _to_units(self, x: Tensor) -> Tensor:
        """Patches with those of a unit together."""
        if self.arrangement == "packed" or self.side == 1:
            return x
        order = self._order(x.device)
        if self.arrangement == "raster":
            return x[:, order]
        return torch.cat((x[:, : self.prefix], x[:, self.prefix :][:, order]), 1)

    def _order(self, device: torch.device) -> Tensor:
        """int64 [N] of each picture in a batch, or [S] of all: the patches row after row, unit after unit."""
        grids = self.grids[:1] if self.arrangement == "batch" else self.grids
        orders, begin, side = [], 0, self.side
        for rows, columns in grids:
            index = torch.arange(rows * columns, device=device) + begin
            blocks = index.view(rows // side, side, columns // side, side).transpose(1, 2)
            orders.append(blocks.flatten())
            begin += rows * columns
        return torch.cat(orders)

    def _raster(self, device: torch.device) -> Tensor:
        return self._order(device).argsort()
