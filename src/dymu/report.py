"""What merged in the last call: counts, bytes, maps and a picture."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dymu.token_map import TokenMap


@dataclass
class Report:
    """What merged in one call of the model.

    Attributes:
        map: the tokens that the language model expects of each image, to the merged ones; None without images.
        layers: after each encoder layer, the tokens left of each image.
        prefix: class and register tokens among the tokens of each image; the rest is the grid of patches.
        grid: rows and columns of patches.
        seen: float [images, 3, rows, columns], what the encoder saw, averaged over each patch.
        cache_bytes: bytes of the KV cache after the last forward.
        cache_bytes_full: bytes that the same cache would have with every token in it.
    """

    map: TokenMap | None = None
    layers: list[list[int]] = field(default_factory=list)
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
    def kept(self) -> list[int]:
        """Merged tokens of each image."""
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
