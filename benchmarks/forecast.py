"""How long it takes to tell from its pixels what a picture will keep: `python -m benchmarks.forecast`.

On one core, of a photo at several sizes: the features of decoded pixels, and the whole from the bytes of a JPEG file,
most of which is decoding.
"""

from __future__ import annotations

import io
from statistics import median
from time import perf_counter
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from benchmarks import record
from benchmarks.load import PHOTOS
from dymu.forecast import LOG_TOKENS, BudgetForecast, Forecasts
from dymu.media.features import NAMES, features
from dymu.thresholds import Calibrated, Encoder, Thresholds

SIZES = ((336, 336), (1152, 864), (4000, 3000))
"""Width and height: what an encoder sees, one megapixel, and a photo of a phone."""


def some() -> Thresholds:
    """Thresholds with forecasts, whose numbers make no difference to time."""
    names = (*NAMES, LOG_TOKENS)
    slopes = tuple(np.linspace(-0.1, 0.1, len(names)).tolist())
    entries = tuple(BudgetForecast(budget, -1.0, slopes, 0.1, 0.4) for budget in (20.0, 77.0))
    forecasts = Forecasts(names, (1.0,) * len(names), (1.0,) * len(names), entries)
    encoder = Encoder("dinov2", layers=12, depth=10, hidden_size=384, heads=6, tokens=256)
    calibrated = tuple(Calibrated(entry.budget, (0.5,) * 10) for entry in entries)
    return Thresholds(calibrated, encoder=encoder, forecasts=forecasts)


def main(
    repeats: int = 30,
    name: Annotated[str, typer.Option(help="Of the result file.")] = "forecast",
) -> None:
    """Time every size and write the result file."""
    thresholds, rows = some(), []
    for width, height in SIZES:
        image = Image.open(PHOTOS[0]).convert("RGB").resize((width, height))
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=90)
        of_pixels, of_file = [], []
        for _ in range(repeats):
            began = perf_counter()
            features(image)
            between = perf_counter()
            thresholds.forecast(encoded.getvalue(), 38)
            of_pixels.append(1000 * (between - began))
            of_file.append(1000 * (perf_counter() - between))
        row = {
            "width": width,
            "height": height,
            "features_ms": round(median(of_pixels), 2),
            "features_least_ms": round(min(of_pixels), 2),
            "from_jpeg_ms": round(median(of_file), 2),
            "from_jpeg_least_ms": round(min(of_file), 2),
        }
        print(row)
        rows.append(row)
    print(record.write(name, {"repeats": repeats, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
