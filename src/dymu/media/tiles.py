"""Tiles by need: a small picture is cut into fewer tiles (RVTC of InternVL-X, arXiv 2503.21307)."""

from __future__ import annotations

import math
import operator


def tiles_for(width: int, height: int, side: int = 448, limit: int = 12) -> tuple[int, int]:
    """Into how many columns and rows of tiles to cut a picture, no more than cover it in its own pixels.

    Of the grids of that many tiles or fewer, that whose ratio of sides is nearest to the picture's; of equal ones that
    of more tiles, while the picture has more than half as many pixels as they do. `math.prod` of the answer is what
    processors such as InternVL's take as `max_patches`: they choose this very grid then.

    Args:
        width, height: of the picture, in pixels.
        side: of a tile.
        limit: of tiles; the processor's own is 12, or what the model was trained on.

    Raises:
        ValueError: one of them is no whole number from 1 on.
    """
    try:
        numbers = [operator.index(number) for number in (width, height, side, limit)]
    except TypeError:
        numbers = [0]
    if min(numbers) < 1:
        raise ValueError(
            f"a picture of {width} × {height} pixels cannot be cut into up to {limit} tiles of {side}: give whole "
            "numbers from 1 on."
        )
    most = min(limit, math.ceil(width / side) * math.ceil(height / side))
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most // i + 1)]
    best, least = (1, 1), math.inf
    for columns, rows in sorted(grids, key=math.prod):
        apart = abs(width / height - columns / rows)
        if apart < least or (apart == least and width * height > 0.5 * side**2 * columns * rows):
            best, least = (columns, rows), apart
    return best
