"""Frames of a video: which to keep, how they become RGB of one size, and the words for what was done to them."""

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from dymu.errors import BadImage, BadVideo
from dymu.files import first_line
from dymu.media import images

MAX_PIXELS: Final = 500_000_000
"""Of all frames together: 1.5 GB."""


@dataclass(frozen=True)
class LoadedVideo:
    """RGB frames of one size in their order, and what was done to get them.

    `fps` is the mean rate of these frames, not of the source's; `seconds` is how long the source's frames last. Both
    are None where no times are known. `of` is how many frames the source has.
    """

    frames: list[Image.Image]
    fps: float | None
    seconds: float | None
    notes: tuple[str, ...]
    of: int


def spread(times: Sequence[float], count: int) -> list[int]:
    """Which of the frames shown at `times` (rising) to keep: `count` of them, or all where there are fewer.

    Those nearest to evenly spaced times from the first to the last, none twice; a single one is the first.
    """
    if count >= len(times):
        return list(range(len(times)))
    if count == 1:
        return [0]
    step = (times[-1] - times[0]) / (count - 1)
    chosen: list[int] = []
    for nth in range(count):
        time = times[0] + nth * step
        after = min(bisect.bisect_left(times, time), len(times) - 1)
        nearest = after - 1 if after and time - times[after - 1] < times[after] - time else after
        earliest = chosen[-1] + 1 if chosen else 0
        latest = len(times) - (count - nth)  # leaves one each for those to come
        chosen.append(min(max(nearest, earliest), latest))
    chosen[-1] = len(times) - 1  # however the last sum was rounded
    return chosen


class Frames:
    """Collects frames as they come, makes them RGB and refuses a second size."""

    def __init__(self, name: str, unit: str = "frame") -> None:
        self.kept: list[Image.Image] = []
        self._name, self._unit = name, unit
        self._first = ""
        self._notes: Counter[str] = Counter()

    def add(self, source: Path | Image.Image, what: str) -> None:
        loaded = as_frame(source, f"{what} of {self._name}")
        width, height = loaded.image.size
        if (len(self.kept) + 1) * width * height > MAX_PIXELS:
            raise BadVideo(
                f"the frames of {self._name}, {width:,} × {height:,} pixels each, have together more than the "
                f"{MAX_PIXELS // 1_000_000} million pixels allowed: ask for fewer, or make them smaller."
            )
        if not self.kept:
            self._first = what
        elif (width, height) != self.kept[0].size:
            across, down = self.kept[0].size
            raise BadVideo(
                f"the frames of {self._name} differ in size, {self._first} is {across:,} × {down:,} pixels and {what} "
                f"is {width:,} × {height:,}: make them one size first."
            )
        self.kept.append(loaded.image)
        self._notes.update(loaded.notes)

    def notes(self) -> list[str]:
        """What was done to the frames, and to how many of them where not to all."""
        return [
            note if count == len(self.kept) else f"{note} ({counted(count, self._unit)})"
            for note, count in self._notes.items()
        ]


def as_frame(source: Path | Image.Image, what: str) -> images.LoadedImage:
    """An image as `images.load` gives it; what that refuses is a `BadVideo` about `what`."""
    try:
        return images.load(source)
    except BadImage as error:
        sentence = str(error)
        for subject in (str(source), "this image"):
            if sentence.startswith(subject):
                sentence = what + sentence[len(subject) :]
                break
        raise BadVideo(sentence) from error


# --- words and numbers ---


@contextmanager
def said_of(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises into one sentence about the file."""
    try:
        yield
    except BadVideo:
        raise
    except PermissionError as error:
        raise BadVideo(f"{name} may not be read by this user: change its permissions.") from error
    except MemoryError as error:
        raise BadVideo(f"{name} does not fit into memory: make it smaller first.") from error
    except Image.DecompressionBombError as error:
        raise too_many_pixels(name) from error
    except Exception as error:
        raise BadVideo(f"{name} is damaged or cut short ({first_line(error)}): get a whole copy of it.") from error


def too_many_pixels(name: str) -> BadVideo:
    return BadVideo(images.too_many_pixels(f"{name} has frames of"))


def pace(times: Sequence[float], chosen: list[int], last: float) -> tuple[float | None, float | None]:
    """Frames a second of the chosen ones, and the seconds that all frames last, of which the last one lasts `last`."""
    whole = times[-1] - times[0] + last
    apart = times[chosen[-1]] - times[chosen[0]]
    return ((len(chosen) - 1) / apart if apart > 0 else None), (whole if whole > 0 else None)


def chosen_note(kept: list[Image.Image], total: int) -> list[str]:
    return [f"{len(kept):,} of {total:,} frames"] if len(kept) < total else []


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
