"""Units: the patches that a family regroups after its encoder into one token of the language model.

They travel, match and merge together, patch by patch. Class and register tokens are units of one patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dymu.merging.layout import Layout


@dataclass(frozen=True)
class Units:
    """How the patches of a picture make its units.

    Args:
        patches: of one unit, which follow each other.
        prefix: class and register tokens ahead of them.
    """

    patches: int = 1
    prefix: int = 0

    @property
    def single(self) -> bool:
        """Whether every unit is one patch."""
        return self.patches == 1

    def of_patches(self, layout: Layout) -> Layout:
        """From the layout of units to that of their patches."""
        if self.single:
            return layout
        extra = self.prefix * (self.patches - 1)
        lengths = tuple(length * self.patches - extra for length in layout.lengths)
        return Layout(layout.length * self.patches - extra, lengths)

    def gather(self, x: Tensor, layout: Layout) -> Tensor:
        """Patches as they travel, to units [..., patches * C] in `layout`; a prefix token is repeated."""
        if self.single:
            return x
        if not self.prefix:
            return x.reshape(*layout.shape, -1)
        patch, _ = self._places(layout)
        return x.flatten(0, 1)[patch].view(*layout.shape, -1)

    def spread(self, units: Tensor, layout: Layout) -> Tensor:
        """The inverse of `gather`."""
        if self.single:
            return units
        shape = self.of_patches(layout).shape
        if not self.prefix:
            return units.reshape(*shape, -1)
        _, there = self._places(layout)
        return units.reshape(layout.total, self.patches, -1)[there].view(*shape, -1)

    def repeat(self, values: Tensor, layout: Layout) -> Tensor:
        """One value for each unit in `layout`, to one for each patch."""
        if self.single:
            return values
        return self.spread(values[..., None].expand(*values.shape, self.patches), layout)[..., 0]

    def metric(self, keys: Tensor, layout: Layout) -> Tensor:
        """Keys [..., H, D] of patches, summed over the patches of each unit."""
        if self.single:
            return keys
        units = self.gather(keys.flatten(-2), layout)
        return units.view(*layout.shape, self.patches, *keys.shape[-2:]).sum(-3)

    def _places(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """int64 [S, patches], the patches of each unit among all; and bool, whether there is such a patch."""
        unit = layout.position
        first = (unit < self.prefix)[:, None]
        begin = self.of_patches(layout).start[:, 0].repeat_interleave(layout.length, output_size=layout.total)
        inner = torch.arange(self.patches, device=unit.device)
        behind = self.prefix + (unit[:, None] - self.prefix) * self.patches + inner
        return begin[:, None] + torch.where(first, unit[:, None], behind), ~first | (inner == 0)
