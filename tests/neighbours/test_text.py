"""Where text is, by the detector of another package."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from dymu.media import masks


def test_lines_of_text_are_found_and_nothing_else() -> None:
    image = Image.new("RGB", (600, 400), "white")
    draw = ImageDraw.Draw(image)
    for line in range(3):
        draw.text((40, 40 + 40 * line), "a line of some words to be read", fill="black", font_size=24)
    draw.rectangle((0, 250, 600, 400), fill="darkred")
    assert masks.detects_text()
    found = masks.text(image)
    assert found.shape == (400, 600)
    assert found[40:150, 40:330].mean() > 0.3
    assert found[180:].mean() == 0
    assert masks.text(Image.new("RGB", (5, 3000), "grey")).shape == (3000, 5)
    assert not masks.text(Image.fromarray(np.zeros((9, 9), np.uint8))).any()
