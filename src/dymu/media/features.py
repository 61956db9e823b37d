"""Nine features of the pixels of a picture that tell how many image tokens it will keep.

Seven were chosen among some thirty by what they tell of photos, scenes and pages that were left out of a fit, and the
last two by what they add where photos, pages and screenshots are mixed (docs/forecast.md). What an encoder merges are
patches alike in colour and texture to another: so the shares of neighbouring patches that differ in these come first.
No network is asked.
"""

from __future__ import annotations

import io
from typing import Final

import numpy as np
from PIL import Image

from dymu.media.images import as_rgb

NAMES: Final = (
    "log_jpeg_bytes",
    "colour_steps_4",
    "colour_steps_12",
    "texture_steps_2",
    "texture_steps_6",
    "log_contrast",
    "log_colourfulness",
    "log_detail_across",
    "grey_steps_32",
)
"""Of the features, in order. A fit belongs to these names, so that a feature that changes gets another one."""

SIDE: Final = 192
"""Pixels of the square that a picture is resized to."""
PATCH: Final = 12
"""Rows, and columns, of a patch of it, in pixels."""
QUALITY: Final = 75
"""Of the JPEG."""
COLOUR_STEPS: Final = (4, 12)
"""Levels of 255 by which the mean colours of two patches differ, in the channel where they differ most."""
TEXTURE_STEPS: Final = (2, 6)
"""Levels by which the standard deviations of the grey of two patches differ."""
GREY_STEP: Final = 32
"""Levels by which the grey of two pixels differs where there is an edge."""


def features(image: Image.Image) -> tuple[float, ...]:
    """The features `NAMES` of a picture of any mode and size; all finite, whatever the pixels.

    It is resized to a small square first, as most encoders do: by whole factors, and then smoothly.

    Returns:
        The log of the bytes of a JPEG of the small picture; the shares of neighbouring patches whose mean colours,
        and whose standard deviations, differ by more than a step; the logs of 1 + the standard deviation of grey and
        of 1 + the mean distance between the strongest and the weakest channel; the log of 1 + the mean difference in
        grey between a pixel and the one to its right, which is large where there are letters; and the share of
        neighbouring pixels whose grey differs by more than a step.
    """
    image = image if image.mode == "RGB" else as_rgb(image)
    small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=QUALITY)
    channels = np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))
    colourfulness = (channels.max(0) - channels.min(0)).mean()
    grey = channels.mean(0, dtype=np.float32)
    colours = _patches(channels).mean((2, 4), dtype=np.float32)
    textures = _patches(grey[None]).std((2, 4))
    of_colour, of_texture = _between_neighbours(colours), _between_neighbours(textures)
    down, across = (np.abs(np.diff(grey, axis=axis)) for axis in (0, 1))
    return (
        float(np.log(encoded.tell())),
        *(float((of_colour > step).mean()) for step in COLOUR_STEPS),
        *(float((of_texture > step).mean()) for step in TEXTURE_STEPS),
        float(np.log1p(grey.std())),
        float(np.log1p(colourfulness)),
        float(np.log1p(across.mean())),
        float(((down > GREY_STEP).mean() + (across > GREY_STEP).mean()) / 2),
    )


def _patches(channels: np.ndarray) -> np.ndarray:
    """[channels, rows, PATCH, columns, PATCH] of [channels, SIDE, SIDE]."""
    count = SIDE // PATCH
    return channels.reshape(-1, count, PATCH, count, PATCH)


def _between_neighbours(patches: np.ndarray) -> np.ndarray:
    """The largest difference of any channel between each patch of [channels, rows, columns] and the one below it, and
    the one to its right."""
    return np.concatenate([np.abs(np.diff(patches, axis=axis)).max(0).ravel() for axis in (1, 2)])
