"""Videos as people have them -> a few RGB frames of one size, spread evenly over the whole.

`load` answers with the frames and with notes on whatever it did, in words for a person. What cannot be used raises
`BadVideo`: what it is, why not, what to do. Only the frames that are chosen are held in memory, however long the film.

| what comes in | what happens |
| --- | --- |
| a video file | decoded with PyAV (`pip install 'dymu[video]'`), turned upright, its pixels made square |
| an animated GIF, WebP, PNG or AVIF | read with Pillow alone |
| a folder | its images are the frames, in the order of their names, where 9 comes before 10 |
| a sequence of PIL images | they are the frames |
| more frames than asked for | those nearest to evenly spaced times, first and last included |
| a file cut short or damaged | the frames that can be decoded, and a note |
| playlists, addresses, streams | refused: nothing but the named file is ever opened |

Every frame is made RGB as `dymu.images` does it, and what that refuses is refused here.
"""

import bisect
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from PIL import Image, UnidentifiedImageError

from dymu import images
from dymu.errors import BadImage, BadVideo, DymuError

# FFmpeg reads more; some of it (playlists, concatenations, SDP) opens other files and addresses, and is left out.
CONTAINERS: Final = ("MP4", "MOV", "MKV", "WebM", "AVI", "MPEG", "TS", "FLV", "Ogg", "WMV")
_DEMUXERS: Final = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,dv,mp3,wav,flac,aac"
"""FFmpeg's names of them; the last four hold sound alone, and are read so far as to say so."""

ANIMATIONS: Final = ("GIF", "WEBP", "PNG", "AVIF")
IN_FOLDERS: Final = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".pgm")

_BUFFER_BYTES: Final = 1 << 18
_SEEKS: Final = 3
"""How many key frames back to try: some containers land behind the one that was asked for."""
_SLACK: Final = 1.05
"""How much longer than its frames a file may say it is, for its sound may well outlast them."""

_UPRIGHT: Final = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""Signs of a display matrix (a, b, c, d), which shows (x, y) at (ax + cy, bx + dy) -> the same in Pillow's words."""


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
        return _from_path(Path(source).expanduser(), str(source), frames)
    return _from_images(source, frames)


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
        wanted = times[0] + nth * step
        after = min(bisect.bisect_left(times, wanted), len(times) - 1)
        nearest = after - 1 if after and wanted - times[after - 1] < times[after] - wanted else after
        earliest = chosen[-1] + 1 if chosen else 0
        latest = len(times) - (count - nth)  # leaves one each for those to come
        chosen.append(min(max(nearest, earliest), latest))
    chosen[-1] = len(times) - 1  # however the last sum was rounded
    return chosen


class _Frames:
    """Collects frames as they come, made RGB and held to one size."""

    def __init__(self, name: str, unit: str = "frame") -> None:
        self.kept: list[Image.Image] = []
        self._name, self._unit = name, unit
        self._first = ""
        self._notes: Counter[str] = Counter()

    def add(self, source: Path | Image.Image, what: str) -> None:
        loaded = _as_frame(source, f"{what} of {self._name}")
        width, height = loaded.image.size
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
            note if count == len(self.kept) else f"{note} ({_counted(count, self._unit)})"
            for note, count in self._notes.items()
        ]


def _as_frame(source: Path | Image.Image, what: str) -> images.LoadedImage:
    try:
        return images.load(source)
    except BadImage as error:
        sentence = str(error)
        for subject in (str(source), "this image"):
            if sentence.startswith(subject):
                sentence = what + sentence[len(subject) :]
                break
        raise BadVideo(sentence) from error


def _from_path(path: Path, name: str, frames: int) -> LoadedVideo:
    _check_path(path, name)
    if path.is_dir():
        return _from_folder(path, name, frames)
    with _said_of(name):
        kind = _picture_kind(path, name)
        if kind in ANIMATIONS:
            return _from_animation(path, name, frames)
    if kind is not None:
        loaded = _as_frame(path, name)
        return LoadedVideo([loaded.image], None, None, ("a still image: its one frame", *loaded.notes), 1)
    return _from_film(path, name, frames)


def _check_path(path: Path, name: str) -> None:
    if "://" in name:
        raise BadVideo(f"{name} is an address, and only files are read: download it first.")
    try:
        exists, is_file, is_folder = path.exists(), path.is_file(), path.is_dir()
        empty = is_file and path.stat().st_size == 0
    except (OSError, ValueError) as error:  # too long a name, a zero byte, no right to look
        raise BadVideo(f"{name!r} cannot be looked up ({_first_line(error)}): check it.") from error
    if not exists:
        raise BadVideo(f"{name} does not exist: check the path.")
    if not is_file and not is_folder:
        raise BadVideo(f"{name} is no ordinary file: save the video to one first.")
    if empty:
        raise BadVideo(f"{name} is empty: get a whole copy of it.")


@contextmanager
def _said_of(name: str) -> Iterator[None]:
    """Whatever decoders stumble over, in one sentence."""
    try:
        yield
    except BadVideo:
        raise
    except PermissionError as error:
        raise BadVideo(f"{name} may not be read by this user: change its permissions.") from error
    except MemoryError as error:
        raise BadVideo(f"{name} does not fit into memory: make it smaller first.") from error
    except Image.DecompressionBombError as error:
        raise BadVideo(_too_many_pixels(name)) from error
    except Exception as error:
        raise BadVideo(f"{name} is damaged or cut short ({_first_line(error)}): get a whole copy of it.") from error


def _too_many_pixels(name: str) -> str:
    limit = images.MAX_PIXELS // 1_000_000
    return f"{name} has frames of more than the {limit} million pixels allowed: make it smaller first."


# --- images, one by one ---


def _from_images(source: Sequence[Image.Image], frames: int) -> LoadedVideo:
    total = len(source)
    if not total:
        raise BadVideo("a sequence without images holds no frames: give at least 1.")
    collected = _Frames("the sequence")
    for index in spread(range(total), frames):
        image = source[index]
        if not isinstance(image, Image.Image):
            raise BadVideo(
                f"frame {index + 1:,} of the sequence is a {type(image).__name__}, not a PIL image: open or convert it "
                "first."
            )
        collected.add(image.copy(), f"frame {index + 1:,}")  # a copy has no further frames to remark on
    return LoadedVideo(collected.kept, None, None, (*_chosen_note(collected.kept, total), *collected.notes()), total)


def _from_folder(path: Path, name: str, frames: int) -> LoadedVideo:
    with _said_of(name):
        inside = [file for file in path.iterdir() if not file.name.startswith(".")]
        found = sorted((file for file in inside if file.suffix.lower() in IN_FOLDERS), key=_by_number)
    if not found:
        raise BadVideo(f"{name} is a folder without images: name one that holds the frames, or a video file.")
    collected = _Frames(name, "image")
    for index in spread(range(len(found)), frames):
        collected.add(found[index], found[index].name)
    notes = _chosen_note(collected.kept, len(found))
    if others := len(inside) - len(found):
        notes.append(f"{_counted(others, 'other file')} in the folder left out")
    return LoadedVideo(collected.kept, None, None, (*notes, *collected.notes()), len(found))


def _by_number(file: Path) -> tuple[list[tuple[int, str]], str]:
    """Sorts names as people count: 9 before 10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", file.name)
    return [(int(part), "") if "0" <= part[0] <= "9" else (-1, part) for part in parts], file.name


# --- animations, by Pillow ---


def _picture_kind(path: Path, name: str) -> str | None:
    """Pillow's name of the format, None where it is no picture."""
    Image.init()
    known: list[str] = [kind for kind in images.FORMATS if kind in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=known) as opened:
                if opened.width * opened.height > images.MAX_PIXELS:
                    raise BadVideo(_too_many_pixels(name))
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
            collected = _Frames(name)
            for index in chosen:
                opened.seek(shown[index])
                collected.add(opened.copy(), f"frame {shown[index] + 1:,}")
    notes = _chosen_note(collected.kept, len(shown))
    if len(shown) == 1 and whole:
        notes.append("a still image: its one frame")
    if not whole:
        notes.append(f"the file is damaged or cut short after {_counted(len(shown), 'frame')}")
    fps, seconds = _pace(times, chosen, durations[-1] / 1000) if timed else (None, None)
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


# --- films, by PyAV ---


class _Missed(Exception):
    """Seeking did not give the wanted frames; decoding one after the other will."""


@dataclass(frozen=True)
class _Survey:
    """What there is to choose from: `times` of the frames in seconds, and the file's own clock where it can be sought.

    `stamps` are the frames' times in ticks; None where frames can only be counted.
    """

    times: list[float]
    last: float
    stamps: list[int] | None
    keys: list[int]
    notes: list[str]


def _from_film(path: Path, name: str, frames: int) -> LoadedVideo:
    av = _pyav()
    with _said_of(name):
        survey = _survey_packets(av, path, name)
        chosen = spread(survey.times, frames)
        collected = _Frames(name)
        try:
            _seek_frames(av, path, name, survey, chosen, collected)
        except (_Missed, av.FFmpegError):
            survey = _survey_frames(av, path, name, survey)
            chosen = spread(survey.times, frames)
            collected = _Frames(name)
            _count_frames(av, path, name, chosen, collected)
    fps, seconds = _pace(survey.times, chosen, survey.last)
    notes = _chosen_note(collected.kept, len(survey.times))
    return LoadedVideo(collected.kept, fps, seconds, (*notes, *survey.notes, *collected.notes()), len(survey.times))


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise DymuError(
            "reading video files takes PyAV: install it with `pip install 'dymu[video]'`, or give a folder of frames."
        ) from error
    return av


@contextmanager
def _opened(av: Any, path: Path, name: str) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream. FFmpeg gets an open file, never a name that it could read as an address."""
    with path.open("rb") as file:
        try:
            options = {"format_whitelist": _DEMUXERS, "protocol_whitelist": ""}
            container = av.open(
                _Bytes(file), container_options=options, buffer_size=_BUFFER_BYTES, metadata_errors="replace"
            )
        except av.FFmpegError as error:
            raise BadVideo(
                f"{name} is damaged, cut short, or no video in a format read here ({', '.join(CONTAINERS)}): get a "
                "whole copy of it, or convert it to MP4."
            ) from error
        with container:
            covers = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & covers]
            if not streams:
                held = "only sound" if container.streams.audio else "no pictures"
                raise BadVideo(f"{name} holds {held}: give a file with a video stream.")
            stream = streams[0]
            if stream.codec_context is None:
                raise BadVideo(f"{name} is encoded in a way that PyAV cannot decode: convert it to H.264 in MP4.")
            if stream.codec_context.width * stream.codec_context.height > images.MAX_PIXELS:
                raise BadVideo(_too_many_pixels(name))
            stream.thread_type = "AUTO"
            yield container, stream


class _Bytes:
    """An open file without its name, from which FFmpeg would guess."""

    def __init__(self, file: Any) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _survey_packets(av: Any, path: Path, name: str) -> _Survey:
    """All frames' times without decoding any: every packet says its own."""
    stamps: list[int | None] = []
    keys: list[int] = []
    damaged = False
    last = 0
    with _opened(av, path, name) as (container, stream):
        try:
            for packet in container.demux(stream):
                if not packet.size or packet.is_discard:
                    continue
                if packet.is_corrupt:
                    damaged = True
                    continue
                stamps.append(packet.pts)
                last = packet.duration or last
                if packet.is_keyframe and packet.pts is not None:
                    keys.append(packet.pts)
        except av.FFmpegError:
            damaged = True
        base, promised, says = float(stream.time_base), stream.frames, _said_seconds(container, stream)
    if not stamps and not damaged and not promised:
        raise BadVideo(f"{name} holds no frames: record or export it anew.")
    known = sorted(stamp for stamp in stamps if stamp is not None)
    notes: list[str] = []
    if not known or len(known) < len(stamps) or any(one == other for one, other in pairwise(known)):
        return _Survey([0.0] * len(stamps), 0.0, None, [], notes)
    times = [(stamp - known[0]) * base for stamp in known]
    length = times[-1] + last * base
    if damaged or promised > len(known):
        of = f" of {promised:,}" if promised > len(known) else ""
        notes.append(f"the file is damaged or cut short: {len(known):,}{of} frames could be read")
    elif says is not None and says > length * _SLACK + 1:
        notes.append(f"the file says that it lasts {says:,.1f} s, and holds frames for {length:,.1f} s")
    return _Survey(times, last * base, known, sorted(keys), notes)


def _said_seconds(container: Any, stream: Any) -> float | None:
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return container.duration / 1_000_000 if container.duration is not None else None


def _seek_frames(av: Any, path: Path, name: str, survey: _Survey, chosen: list[int], collected: _Frames) -> None:
    """Decode the chosen frames, jumping to the key frame before each where that saves decoding."""
    if survey.stamps is None or not chosen:
        raise _Missed
    with _opened(av, path, name) as (container, stream):
        decoded = container.decode(stream)
        at = survey.stamps[0]
        for index in chosen:
            wanted = survey.stamps[index]
            before = survey.keys[: bisect.bisect_right(survey.keys, wanted)]
            frame = None
            if not before or before[-1] <= at:
                frame = _first_from(decoded, wanted)
            else:
                for key in before[: -_SEEKS - 1 : -1]:
                    container.seek(key, stream=stream)
                    decoded = container.decode(stream)
                    frame = _first_from(decoded, wanted)
                    if frame is not None and frame.pts == wanted:
                        break
            if frame is None or frame.pts != wanted or frame.is_corrupt:
                raise _Missed
            at = wanted
            _keep(frame, stream, index, collected)


def _first_from(decoded: Iterator[Any], wanted: int) -> Any:
    return next((frame for frame in decoded if frame.pts is None or frame.pts >= wanted), None)


def _survey_frames(av: Any, path: Path, name: str, before: _Survey) -> _Survey:
    """All frames' times by decoding every one of them."""
    stamps: list[int | None] = []
    lost = 0
    with _opened(av, path, name) as (container, stream):
        for frame in _decoded(av, container, stream):
            if frame is None:
                lost += 1
            else:
                stamps.append(frame.pts)
        base, rate = float(stream.time_base), float(stream.average_rate or stream.guessed_rate or 0)
    if not stamps:
        raise BadVideo(f"{name} is damaged or cut short before its first whole frame: get a whole copy of it.")
    notes = before.notes
    if lost and not notes:
        notes = [f"the file is damaged or cut short: {_counted(len(stamps), 'frame')} could be read, {lost:,} not"]
    rising = [stamp for stamp in stamps if stamp is not None]
    if len(rising) == len(stamps) and all(one < other for one, other in pairwise(rising)):
        times = [(stamp - rising[0]) * base for stamp in rising]
        last = before.last or (times[-1] / (len(times) - 1) if len(times) > 1 else 0.0)
    else:
        last = 1 / rate if rate else 0.0
        times = [index * last for index in range(len(stamps))] if rate else [float(i) for i in range(len(stamps))]
    return _Survey(times, last, None, [], notes)


def _count_frames(av: Any, path: Path, name: str, chosen: list[int], collected: _Frames) -> None:
    """Decode from the start, keeping the chosen."""
    wanted = set(chosen)
    with _opened(av, path, name) as (container, stream):
        whole = (frame for frame in _decoded(av, container, stream) if frame is not None)
        for index, frame in zip(range(chosen[-1] + 1), whole, strict=False):
            if index in wanted:
                _keep(frame, stream, index, collected)


def _decoded(av: Any, container: Any, stream: Any) -> Iterator[Any]:
    """Every frame in turn, None for one that cannot be decoded, until nothing more can be read."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            yield None
            return
        if packet is None:
            return
        try:
            for frame in packet.decode():
                yield None if frame.is_corrupt else frame
        except av.EOFError:
            return
        except av.FFmpegError:
            yield None


def _keep(frame: Any, stream: Any, index: int, collected: _Frames) -> None:
    image = frame.to_image()
    aspect = stream.sample_aspect_ratio or 1
    if aspect != 1:  # DVDs and camcorders store pixels that are not square
        image = image.resize((max(round(image.width * aspect), 1), image.height), Image.Resampling.BICUBIC)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = memoryview(bytes(matrix)).cast("i")[:5]
        way = _UPRIGHT.get((_sign(a), _sign(b), _sign(c), _sign(d)))
        image = image if way is None else image.transpose(way)
    collected.add(image, f"frame {index + 1:,}")


def _sign(number: int) -> int:
    """Of a 16.16 fixed-point number; what rounding left beside zero is zero."""
    return 0 if abs(number) < 1 << 8 else 1 if number > 0 else -1


# --- words and numbers ---


def _pace(times: Sequence[float], chosen: list[int], last: float) -> tuple[float | None, float | None]:
    """Frames a second of the chosen, and the seconds that all frames last."""
    whole = times[-1] - times[0] + last
    apart = times[chosen[-1]] - times[chosen[0]]
    return ((len(chosen) - 1) / apart if apart > 0 else None), (whole if whole > 0 else None)


def _chosen_note(kept: list[Image.Image], total: int) -> list[str]:
    return [f"{len(kept):,} of {total:,} frames"] if len(kept) < total else []


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
