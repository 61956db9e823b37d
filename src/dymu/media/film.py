"""Video files -> their frames, with PyAV: which there are, and the chosen ones decoded, upright, with square pixels.

Every frame's time is read from the packets, without decoding. Then each chosen frame is decoded from the key frame
before it. Where a file's times are no use for that, or where seeking fails, every frame is decoded in its turn.
"""

import bisect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from PIL import Image

from dymu.errors import BadVideo, DymuError
from dymu.media import images
from dymu.media.frames import Frames, LoadedVideo, chosen_note, counted, pace, said_of, spread, too_many_pixels

# FFmpeg reads more; some of it (playlists, concatenations, SDP) opens other files and addresses, and is left out.
CONTAINERS: Final = ("MP4", "MOV", "MKV", "WebM", "AVI", "MPEG", "TS", "FLV", "Ogg", "WMV")
_DEMUXERS: Final = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,dv,mp3,wav,flac,aac"
"""FFmpeg's names of them; the last four hold sound alone, and are opened only to say so."""

_BUFFER_BYTES: Final = 1 << 18
_SEEKS: Final = 3
"""How many key frames back to try: some containers land behind the one that was asked for."""
_SLACK: Final = 1.05
"""How much longer than its frames a file may say that all of it is, for its sound may well outlast them."""

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


class _Missed(Exception):
    """Seeking did not give a chosen frame; decoding one after the other will."""


@dataclass(frozen=True)
class _Survey:
    """The frames that a file holds, in the order in which they are shown.

    Attributes:
        times: of each frame, in seconds from the first.
        last: seconds for which the last frame is shown.
        stamps: `times` in ticks of the file's own clock, to seek by; None where frames can only be counted.
        keys: the stamps of key frames, from which decoding may start.
        notes: on what is missing.
    """

    times: list[float]
    last: float
    stamps: list[int] | None
    keys: list[int]
    notes: list[str]


def read(path: Path, name: str, frames: int) -> LoadedVideo:
    """At most `frames` frames of a video file, which messages call `name`.

    Raises:
        BadVideo: it cannot be read or used.
        DymuError: PyAV is not installed.
    """
    av = _pyav()
    with said_of(name):
        survey = _survey_packets(av, path, name)
        chosen = spread(survey.times, frames)
        collected = Frames(name)
        try:
            _seek_frames(av, path, name, survey, chosen, collected)
        except (_Missed, av.FFmpegError):
            survey = _survey_frames(av, path, name, survey)
            chosen = spread(survey.times, frames)
            collected = Frames(name)
            _count_frames(av, path, name, chosen, collected)
    fps, seconds = pace(survey.times, chosen, survey.last)
    notes = chosen_note(collected.kept, len(survey.times))
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
    """A file's container and video stream. FFmpeg gets the open file, never a name that may read as an address."""
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
            # Some AVIF animations begin with a still that stands for them.
            stream = max(streams, key=lambda each: each.frames) if streams[0].frames == 1 else streams[0]
            if stream.codec_context is None:
                raise BadVideo(f"{name} is encoded in a way that PyAV cannot decode: convert it to H.264 in MP4.")
            if stream.codec_context.width * stream.codec_context.height > images.MAX_PIXELS:
                raise too_many_pixels(name)
            # What several threads make of damaged frames depends on which of them comes first.
            stream.codec_context.thread_count = 1
            yield container, stream


class _Bytes:
    """An open file without its name, since FFmpeg would guess the format from that."""

    def __init__(self, file: Any) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _survey_packets(av: Any, path: Path, name: str) -> _Survey:
    """Reads all frames' times from the packets, without decoding any."""
    stamps: list[int | None] = []
    keys: list[int] = []
    damaged = False
    last = packets = 0
    with _opened(av, path, name) as (container, stream):
        try:
            for packet in container.demux(stream):
                packets += packet.dts is not None or packet.size > 0
                if not packet.size or packet.is_discard:  # an empty one shows the last frame on; a cut hides others
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
        base, (says, of_frames) = float(stream.time_base), _said_seconds(container, stream)
        promised = 0 if container.format.name == "avi" else stream.frames  # AVI counts empty packets too
    if not stamps and not damaged and not promised:
        raise BadVideo(f"{name} holds no frames: record or export it anew.")
    known = sorted(stamp for stamp in stamps if stamp is not None)
    notes: list[str] = []
    if not known or len(known) < len(stamps) or any(one == other for one, other in pairwise(known)):
        return _Survey([0.0] * len(stamps), 0.0, None, [], notes)
    times = [(stamp - known[0]) * base for stamp in known]
    length = times[-1] + last * base
    slack = length * (_SLACK - 1) + 1
    longest = max([last * base, *(after - before for before, after in pairwise(times))])
    if of_frames and longest:
        slack = min(slack, 1.5 * longest)
    if damaged or promised > packets:
        of = f" of {promised:,}" if promised > packets else ""
        notes.append(f"the file is damaged or cut short: {len(known):,}{of} frames could be read")
    elif says is not None and says > max(length, (known[-1] + last) * base) + slack:  # some count from zero
        notes.append(f"the file says that it lasts {says:,.1f} s, and holds frames for {length:,.1f} s")
    return _Survey(times, last * base, known, sorted(keys), notes)


def _said_seconds(container: Any, stream: Any) -> tuple[float | None, bool]:
    """How long the file says that it lasts, and whether that is said of the frames alone and may be relied on."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base), False
    tags = (text for tag, text in stream.metadata.items() if tag.upper().startswith("DURATION"))  # Matroska's
    told = re.fullmatch(r"([0-9]{1,6}):([0-9]{2}):([0-9]{2}(?:\.[0-9]+)?)", next(tags, ""))
    if told:
        return int(told[1]) * 3600 + int(told[2]) * 60 + float(told[3]), True
    alone = len(container.streams) == 1
    return (container.duration / 1_000_000, alone) if container.duration is not None else (None, False)


def _seek_frames(av: Any, path: Path, name: str, survey: _Survey, chosen: list[int], collected: Frames) -> None:
    """Decodes the chosen frames, and jumps to the key frame before each where that saves decoding."""
    if survey.stamps is None or not chosen:
        raise _Missed
    with _opened(av, path, name) as (container, stream):
        decoded = container.decode(stream)
        at = survey.stamps[0]
        for index in chosen:
            stamp = survey.stamps[index]
            before = survey.keys[: bisect.bisect_right(survey.keys, stamp)]
            frame = None
            if not before or before[-1] <= at:
                frame = _first_from(decoded, stamp)
            else:
                for key in before[: -_SEEKS - 1 : -1]:
                    container.seek(key, stream=stream)
                    decoded = container.decode(stream)
                    frame = _first_from(decoded, stamp)
                    if frame is not None and frame.pts == stamp:
                        break
            if frame is None or frame.pts != stamp or frame.is_corrupt:
                raise _Missed
            at = stamp
            _keep(frame, stream, index, collected)


def _first_from(decoded: Iterator[Any], stamp: int) -> Any:
    return next((frame for frame in decoded if frame.pts is None or frame.pts >= stamp), None)


def _survey_frames(av: Any, path: Path, name: str, before: _Survey) -> _Survey:
    """Decodes every frame for its time."""
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
        notes = [f"the file is damaged or cut short: {counted(len(stamps), 'frame')} could be read, {lost:,} not"]
    rising = sorted(stamp for stamp in stamps if stamp is not None)  # AVI tells times in the order of storage
    if len(rising) == len(stamps) and all(one < other for one, other in pairwise(rising)):
        times = [(stamp - rising[0]) * base for stamp in rising]
        last = before.last or (times[-1] / (len(times) - 1) if len(times) > 1 else 0.0)
    else:
        last = 1 / rate if rate else 0.0
        times = [index * last for index in range(len(stamps))] if rate else [float(i) for i in range(len(stamps))]
    return _Survey(times, last, None, [], notes)


def _count_frames(av: Any, path: Path, name: str, chosen: list[int], collected: Frames) -> None:
    """Decodes from the start and keeps the chosen frames."""
    indices = set(chosen)
    with _opened(av, path, name) as (container, stream):
        whole = (frame for frame in _decoded(av, container, stream) if frame is not None)
        for index, frame in zip(range(chosen[-1] + 1), whole, strict=False):
            if index in indices:
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


def _keep(frame: Any, stream: Any, index: int, collected: Frames) -> None:
    """Collects a decoded frame, its pixels made square and turned upright."""
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
    """The sign of a 16.16 fixed-point number; what rounding left beside zero counts as zero."""
    return 0 if abs(number) < 1 << 8 else 1 if number > 0 else -1
