"""What merged in the last call: counts, bytes, maps and a picture."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch import Tensor

from dymu.drawing import draw
from dymu.token_map import TokenMap


@dataclass
class Report:
    """What merged in one call of the model.

    Attributes:
        map: the tokens that the language model expects of each image, to the merged ones; None without images.
        kept_by_layer: after each encoder layer that may merge, int64 [images], the tokens left.
        prefix: class and register tokens among the tokens of each image, which never merge and which no budget counts;
            the rest is the grid of patches.
        grid: rows and columns of patches.
        seen: float [images, 3, rows, columns], what the encoder saw, averaged over each patch.
        cache_bytes: bytes of the KV cache after the last forward.
        cache_bytes_full: bytes that the same cache would have with every token in it.
    """

    map: TokenMap | None = None
    kept_by_layer: list[Tensor] = field(default_factory=list)
    prefix: int = 0
    grid: tuple[int, int] = (0, 0)
    seen: Tensor | None = None
    cache_bytes: int = 0
    cache_bytes_full: int = 0

    @property
    def original(self) -> list[int]:
        """Tokens of each image that the language model expects."""
        return [] if self.map is None else [self.map.tokens] * self.map.batch

    @property
    def layers(self) -> list[list[int]]:
        """After each encoder layer that may merge, the tokens left of each image."""
        return [kept.tolist() for kept in self.kept_by_layer]

    @property
    def kept(self) -> list[int]:
        """Merged tokens of each image; an image that transformers encodes once per beam (before 5.23) counts so."""
        return [] if self.map is None else self.map.kept.tolist()

    @property
    def cache_bytes_saved(self) -> int:
        """Bytes of KV cache that merging saves."""
        return self.cache_bytes_full - self.cache_bytes

    def group(self, i: int = 0) -> Tensor:
        """int64 [N]: for image i, the merged token behind every token the language model expects.

        Raises:
            IndexError: the call had no image i.
        """
        if self.map is None or not -self.map.batch <= i < self.map.batch:
            count = 0 if self.map is None else self.map.batch
            raise IndexError(f"the last call had {count} images, so there is no image {i}")
        return self.map.group[i]

    def draw(self, image: Image.Image, i: int = 0) -> Image.Image:
        """Image i with every group of merged patches outlined and filled with its mean colour.

        Args:
            image: the image that was image i of the last call, of any mode and size.

        Returns:
            An RGB picture, see `dymu.drawing.draw`. A patch that stands for itself keeps its pixels; what the encoder
            did not see of the image is dimmed.

        Raises:
            IndexError: the call had no image i.
            BadImage: `image` cannot be used at all.
            ValueError: `image` is another image, or the call's image tokens are no grid.
        """
        group = self.group(i).cpu().numpy()[self.prefix :]
        rows, columns = self.grid
        unseen = rows * columns - len(group)  # patches that the family drops from the front
        if unseen < 0 or self.seen is None:
            raise ValueError(f"{len(group)} image tokens are no grid of {rows} × {columns} patches that could be drawn")
        group = np.concatenate([np.full(unseen, -1), group]).reshape(rows, columns)
        return draw(image, group, self.seen[i].permute(1, 2, 0).cpu().numpy())
