"""The pictures of one call: how an encoder's layers get their patches, and how these travel while they merge."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from dymu.choices import Arrangement
from dymu.merging.encoder_layer import Angles, MergedTokens
from dymu.merging.layout import Layout
from dymu.merging.units import Units
from dymu.token_map import TokenMap


@dataclass(frozen=True)
class Pictures:
    """The pictures of one call.

    Args:
        grids: rows and columns of the patches of each.
        side: rows, and columns, of the patches of a unit.
        prefix: class and register tokens ahead of each picture's patches.
        arrangement: how the layers get them.
        regroups: whether what follows the layers regroups patches by itself, hence needs all of them.
        cut: whether the encoder gets patches, and not pixels that it cuts into patches.
        length: P, where pictures are padded.
        order: int64 [units], of each unit, row after row, its place in the order of the layers; None: the same.
    """

    grids: tuple[tuple[int, int], ...]
    side: int = 1
    prefix: int = 0
    arrangement: Arrangement = "batch"
    regroups: bool = False
    cut: bool = False
    length: int = 0
    order: Tensor | None = field(default=None, compare=False)

    @property
    def units(self) -> Units:
        return Units(self.side**2, self.prefix)

    @property
    def patches(self) -> int:
        """Of all pictures."""
        return sum(rows * columns for rows, columns in self.grids)

    @property
    def unit_grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the units of each."""
        return tuple((rows // self.side, columns // self.side) for rows, columns in self.grids)

    @property
    def restores(self) -> bool:
        """Whether the layers' output must hold all patches: where they are regrouped, or taken apart by picture."""
        return self.arrangement == "raster" or self.regroups

    def enter(self, x: Tensor, angles: Angles | None, window: Tensor | None) -> tuple[Tensor, MergedTokens]:
        """What the first layer gets, as it travels, and which tokens these are.

        Args:
            x: see `Arrangement`.
            angles: [S, D] each, in the same order; in a batch, of the N patches of a picture or of all T tokens of one,
                [N, D] or [T, D].
            window: int64 [units], see `MergedTokens`.
        """
        units = self.layout(x.device)
        shape = self.units.of_patches(units).shape
        if self.arrangement == "padded":
            there = self.there(x.device)
            x, angles = x[there], angles and (angles[0][there], angles[1][there])
        if angles is not None and self.arrangement == "batch":
            angles = self.for_all(angles, x)
        x, *angles_of_units = (
            self.to_units(part.reshape(*x.shape[:-1], -1)).reshape(*shape, -1) for part in (x, *(angles or ()))
        )
        angles = (angles_of_units[0], angles_of_units[1]) if angles else None
        return x, MergedTokens.unmerged(units, self.units, angles, window)

    def for_all(self, angles: Angles, x: Tensor) -> Angles:
        """Of all tokens of a batch [B, T, C]: what stands ahead of patches is not rotated."""
        cos, sin = angles
        ahead = (0, 0, x.shape[1] - cos.shape[-2], 0)
        return pad(cos, ahead, value=1.0).expand(len(x), -1, -1), pad(sin, ahead).expand(len(x), -1, -1)

    def window(self, segments: Tensor) -> Tensor | None:
        """int64 [units], the window of each, where a layer's patches attend from one of `segments` to the next, int64
        [any]: where they begin among all, and the end; None: whole pictures do."""
        lengths = segments.diff()
        units = lengths[lengths > 0] // self.side**2
        if len(units) == len(self.grids):
            return None
        return torch.arange(len(units), device=units.device).repeat_interleave(units)

    def leave(self, x: Tensor, state: MergedTokens) -> Tensor:
        """What the last layer gives: merged tokens, [pictures, M, C] padded or [S, C]; or all patches, see `restores`,
        in the order of the layers, [pictures, prefix + N, C], [S, C], or padded with zeros [pictures, P, C]."""
        if not self.restores:
            return x.flatten(0, 1) if self.arrangement == "packed" else state.layout.pad(x)
        original = self.layout(x.device)
        units = self.expand(state.units.gather(x, state.layout), state).unflatten(0, original.shape)
        patches = self._from_units(state.units.spread(units, original))
        if self.arrangement != "padded":
            return patches
        there = self.there(x.device)
        return patches.new_zeros(*there.shape, patches.shape[-1]).index_put((there,), patches)

    def there(self, device: torch.device) -> Tensor:
        """bool [pictures, P], whether there is a patch, where pictures are padded."""
        counts = torch.tensor([rows * columns for rows, columns in self.grids], device=device)
        return torch.arange(self.length, device=device) < counts[:, None]

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

    def entering(self, tokens: TokenMap) -> tuple[TokenMap, Tensor]:
        """In the order of the layers, behind the prefix, what is said of the units of every picture, row after row.

        Args:
            tokens: from the units [pictures, N]; the first one of each group enters the encoder.

        Returns:
            The same map, and int64 [pictures, M], the unit that enters for each of the M.
        """
        units = Pictures(self.unit_grids).layout(tokens.group.device)
        leaders = units.index(tokens.first().gather(1, tokens.group.clamp(min=0)))
        leaders = torch.cat([row[:length] for row, length in zip(leaders, units.lengths, strict=True)])
        place = (
            torch.arange(units.total, device=leaders.device) if self.order is None else self.order.to(leaders.device)
        )
        of_layers = pad_sequence(list(self.by_layers(place[leaders]).split(units.lengths)), True, -1)
        here = torch.where(of_layers < 0, -1, of_layers - units.start)
        ordered = TokenMap.from_leaders(here)
        enters = (
            torch.where(here == torch.arange(here.shape[1], device=here.device), here, here.shape[1]).sort(1).values
        )
        return ordered.after(self.prefix), self._behind(enters[:, : ordered.width].clamp(max=here.shape[1] - 1))

    def _behind(self, units: Tensor) -> Tensor:
        """Indices [pictures, M] of units, with the prefix ahead of them."""
        prefix = torch.arange(self.prefix, device=units.device).expand(len(units), -1)
        return torch.cat((prefix, units + self.prefix), 1)

    def by_layers(self, x: Tensor) -> Tensor:
        """What stands for each unit [units, ...], row after row, in the order of the layers."""
        return x if self.order is None else x[self.order.to(x.device).argsort()]

    def by_rows(self, x: Tensor) -> Tensor:
        """The inverse of `by_layers`."""
        return x if self.order is None else x[self.order.to(x.device)]

    def to_patches(self, units: Tensor) -> Tensor:
        """What stands for each unit [S, C], picture after picture, prefix tokens included, to every patch in the order
        of the layers, [pictures, prefix + N, C] or [S, C]."""
        layout = self.layout(units.device)
        patches = units.repeat(1, self.side**2).unflatten(0, layout.shape)
        return self._from_units(self.units.spread(patches, layout))

    def first_of_units(self, x: Tensor) -> Tensor:
        """The first patch of each unit, of patches [pictures, N, C] or [S, C] row after row: [..., units, C]."""
        return x[..., self._order(x.device), :][..., :: self.side**2, :]

    def to_units(self, x: Tensor) -> Tensor:
        """Patches in the order of the layers, [pictures, prefix + N, C] or [S, C], with those of a unit together."""
        if self.arrangement == "packed" or self.side == 1:
            return x
        if self.arrangement != "batch":
            return x.flatten(0, -2)[self._order(x.device)]
        return torch.cat((x[:, : self.prefix], x[:, self.prefix :][:, self._order(x.device)]), 1)

    def _from_units(self, x: Tensor) -> Tensor:
        """The inverse of `to_units`, of patches as they travel while nothing is merged."""
        if self.arrangement != "batch":
            x = x.flatten(0, 1)
            return x if self.arrangement == "packed" or self.side == 1 else x[self._order(x.device).argsort()]
        if self.side == 1:
            return x
        return torch.cat((x[:, : self.prefix], x[:, self.prefix :][:, self._order(x.device).argsort()]), 1)

    def _order(self, device: torch.device) -> Tensor:
        """int64 [N] of each picture in a batch, or [S] of all: the patches row after row, unit after unit."""
        grids = self.grids[:1] if self.arrangement == "batch" else self.grids
        orders, begin, side = [], 0, self.side
        for rows, columns in grids:
            index = torch.arange(rows * columns, device=device) + begin
            orders.append(index.view(rows // side, side, columns // side, side).transpose(1, 2).flatten())
            begin += rows * columns
        return torch.cat(orders)
