"""Videos as people have them -> a few RGB frames of one size, spread evenly over the whole.

`load` answers with the frames and with notes on whatever it did, in words for a person. What cannot be used raises
`BadVideo`: what it is, why not, what to do. Only the frames that are chosen are held in memory, however long the film.

| what comes in | what happens |
| --- | --- |
| a video file | decoded with PyAV (`pip install 'dymu[video]'`), turned upright, its pixels made square |
| an animated GIF, WebP, PNG or AVIF | read with Pillow alone |
| a folder | its images are the frames, in the order of their names, where 9 comes before 10 |
| a sequence of PIL images | they are the frames |
| more than 500 million pixels together | refused |
| more frames than asked for | those nearest to evenly spaced times, first and last included |
| a file cut short or damaged | the frames that can be decoded, and a note |
| playlists, addresses, streams | refused: nothing but the named file is ever opened |

Every frame is made RGB as `dymu.media.images` does it, and what that refuses is refused here.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image, UnidentifiedImageError

from dymu.errors import BadVideo
from dymu.files import expanded
from dymu.media import film, images
from dymu.media.frames import (
    Frames,
    LoadedVideo,
    as_frame,
    chosen_note,
    counted,
    pace,
    said_of,
    spread,
    too_many_pixels,
)

__all__ = ["LoadedVideo", "is_film", "load", "spread"]

ANIMATIONS: Final = ("GIF", "WEBP", "PNG", "AVIF")

_FILMS: Final = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".wmv")
_SIGNATURES: Final = (
    (0, rb"\x1aE\xdf\xa3"),  # Matroska and WebM
    (0, rb"RIFF....AVI "),
    (0, rb"\x00\x00\x01[\xb3\xba]"),  # MPEG
    (0, rb"FLV\x01|OggS|0&\xb2u\x8ef\xcf\x11|\x1f\x07\x00"),  # ..., WMV, DV
    (0, rb"(?:G.{187}){3}"),  # MPEG-TS
    (4, rb"(?:G.{191}){2}G"),  # the same of camcorders, each packet with its time
    (4, rb"ftyp(?!avi|mif|msf|hei|hev)|moov|mdat|wide|pnot|skip|free"),  # MP4 and MOV, but not AVIF and HEIC
)
"""Where they begin, and what the first bytes of each kind of video file are."""


def is_film(path: Path) -> bool:
    """Whether a file is a video for PyAV, by its first bytes; by its name only where they say nothing."""
    try:
        head = b""
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(600)
        if any(re.compile(kind, re.DOTALL).match(head, at) for at, kind in _SIGNATURES):
            return True
        return path.suffix.lower() in _FILMS and _picture_kind(path, str(path)) is None
    except (OSError, ValueError, BadVideo):  # `load` says what is wrong with it
        return path.suffix.lower() in _FILMS


def load(source: str | Path | Sequence[Image.Image], *, frames: int = 32) -> LoadedVideo:
    """At most `frames` frames of a video file, an animation, a folder of images, or a sequence of them.

    Raises:
        BadVideo: it cannot be read or used.
        DymuError: it takes PyAV, which is not installed.
    """
    if frames < 1:
        raise BadVideo(f"{frames} frames of a video show nothing: ask for at least 1.")
    if isinstance(source, Image.Image) or not isinstance(source, (Path, Sequence)):
        raise BadVideo(
            f"a {type(source).__name__} is not a video: give the path of one, a folder of images, or a list of images."
        )
    if isinstance(source, (str, Path)):
        return _from_path(expanded(source), str(source), frames)
    return _from_images(source, frames)


def _from_path(path: Path, name: str, frames: int) -> LoadedVideo:
    images.check_path(path, name, "video", BadVideo)
    if path.is_dir():
        return _from_folder(path, name, frames)
    with said_of(name):
        kind = _picture_kind(path, name)
        if kind in ANIMATIONS:
            return _from_animation(path, name, frames)
    if kind is not None:
        loaded = as_frame(path, name)
        return LoadedVideo([loaded.image], None, None, ("a still image: its one frame", *loaded.notes), 1)
    return film.read(path, name, frames)


# --- images, one by one ---


def _from_images(source: Sequence[Image.Image], frames: int) -> LoadedVideo:
    total = len(source)
    if not total:
        raise BadVideo("a sequence without images holds no frames: give at least 1.")
    collected = Frames("the sequence")
    for index in spread(range(total), frames):
        image = source[index]
        if not isinstance(image, Image.Image):
            raise BadVideo(
                f"frame {index + 1:,} of the sequence is a {type(image).__name__}, not a PIL image: open or convert it "
                "first."
            )
        collected.add(image.copy(), f"frame {index + 1:,}")  # a copy has no further frames to remark on
    return LoadedVideo(collected.kept, None, None, (*chosen_note(collected.kept, total), *collected.notes()), total)


def _from_folder(path: Path, name: str, frames: int) -> LoadedVideo:
    with said_of(name):
        inside = [file for file in path.iterdir() if not file.name.startswith(".")]
        frame_files = sorted(filter(_is_frame, inside), key=_by_number)
    if not frame_files:
        raise BadVideo(f"{name} is a folder without images: name one that holds the frames, or a video file.")
    collected = Frames(name, "image")
    for index in spread(range(len(frame_files)), frames):
        collected.add(frame_files[index], frame_files[index].name)
    notes = chosen_note(collected.kept, len(frame_files))
    if others := len(inside) - len(frame_files):
        notes.append(f"{counted(others, 'other file')} in the folder left out")
    return LoadedVideo(collected.kept, None, None, (*notes, *collected.notes()), len(frame_files))


def _is_frame(file: Path) -> bool:
    """By its name, even where it is damaged; else by its first bytes."""
    named = file.suffix.lower() in images.readable_suffixes()
    return named or (file.is_file() and _picture_kind(file, file.name) is not None)


def _by_number(file: Path) -> tuple[list[tuple[int, str]], str]:
    """Sorts names as people count: 9 before 10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", file.name)
    return [(int(part), "") if "0" <= part[0] <= "9" else (-1, part) for part in parts], file.name


# --- animations, by Pillow ---


def _picture_kind(path: Path, name: str) -> str | None:
    """Pillow's name of the format, None where it is no picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=images.readable_formats()) as opened:
                if opened.width * opened.height > images.MAX_PIXELS:
                    raise too_many_pixels(name)
                return opened.format
    except UnidentifiedImageError:
        return None


def _from_animation(path: Path, name: str, frames: int) -> LoadedVideo:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=ANIMATIONS) as opened:
            shown, durations, whole = _animation_times(opened)
            if not shown:
                raise BadVideo(f"{name} is damaged or cut short before its first whole frame: get a whole copy of it.")
            timed = all(duration > 0 for duration in durations)
            times = [sum(durations[:index]) / 1000 for index in range(len(durations))] if timed else range(len(shown))
            chosen = spread(times, frames)
            collected = Frames(name)
            for index in chosen:
                opened.seek(shown[index])
                collected.add(opened.copy(), f"frame {shown[index] + 1:,}")
    notes = chosen_note(collected.kept, len(shown))
    if len(shown) == 1 and whole:
        notes.append("a still image: its one frame")
    if not whole:
        notes.append(f"the file is damaged or cut short after {counted(len(shown), 'frame')}")
    fps, seconds = pace(times, chosen, durations[-1] / 1000) if timed else (None, None)
    return LoadedVideo(collected.kept, fps, seconds, (*notes, *collected.notes()), len(shown))


def _animation_times(opened: Any) -> tuple[list[int], list[float], bool]:
    """The frames that can be decoded, how many milliseconds each is shown (0: not said), and whether that is all."""
    shown: list[int] = []
    durations: list[float] = []
    try:
        total = getattr(opened, "n_frames", 1)
        for index in range(total):
            opened.seek(index)
            opened.load()
            if index == 0 and total > 1 and opened.info.get("default_image"):
                continue  # a PNG's picture for those who cannot show the animation
            shown.append(index)
            durations.append(float(opened.info.get("duration") or 0))
    except Exception:  # on damaged bytes decoders raise whatever they stumble over
        return shown, durations, False
    return shown, durations, True
