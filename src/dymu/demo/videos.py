"""One video and one question, asked both ways."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from dymu.demo.asked import Side, Subject, answered, check_asked
from dymu.errors import BadVideo
from dymu.media.contact_sheet import contact_sheet
from dymu.media.frames import LoadedVideo
from dymu.prompting import check_length, video_inputs_for

NO_VIDEOS = "This model takes no videos: start the page with one that does, such as a llava_onevision (--model)."
MOST_FRAMES = 32


@dataclass(frozen=True)
class AskedVideo:
    """What is known of a question about a video so far.

    Attributes:
        fresh: of each frame (or pair of frames, as the encoder sees them) the tokens that no frame before had.
        each: tokens of each with nothing merged.
        sheet: the frames with their groups; None: they cannot be drawn.
    """

    name: str
    question: str
    budget: float
    seconds: float | None
    notes: tuple[str, ...]
    merged: Side
    original: int
    fresh: tuple[int, ...]
    each: tuple[int, ...]
    sheet: Image.Image | None
    untouched: Side | None = None


def ask_video(subject: Subject, video: LoadedVideo, name: str, question: str, budget: float) -> Iterator[AskedVideo]:
    """Ask both ways: what is known, as it becomes more.

    Raises:
        DymuError: it cannot be asked so.
    """
    if not subject.takes_videos:
        raise BadVideo(NO_VIDEOS)
    question = check_asked(subject, question)
    model, processor, handle = subject.model, subject.processor, subject.handle
    inputs = video_inputs_for(model, processor, video.frames, question, video.fps)
    check_length(model, inputs, f"{len(video.frames)} frames")
    with handle.at(budget):
        answer, stored = answered(model, processor, inputs)
        report = handle.last
    (item,) = report.items
    each = torch.bincount(item.picture[item.patch], minlength=item.pictures).tolist()
    try:
        drawn = report.draw_frames(video.frames)
        sheet = contact_sheet(drawn, labels=[f"{fresh} new" for fresh in item.fresh], longest=1280)
    except ValueError:
        sheet = None
    now = AskedVideo(
        name, question, budget, video.seconds, tuple(video.notes), Side(answer, sum(report.kept), stored),
        sum(report.original), tuple(item.fresh), tuple(each), sheet,
    )  # fmt: skip
    yield now
    with handle.disabled():
        answer, stored = answered(model, processor, inputs)
    yield replace(now, untouched=Side(answer, now.original, stored))


def as_json(subject: Subject, now: AskedVideo) -> dict[str, Any]:
    """What `dymu run --json` gives for a video, and the tokens of each frame."""
    return {
        "answer": now.merged.answer,
        "original_tokens": now.original,
        "kept_tokens": now.merged.tokens,
        "cache_bytes": now.merged.cache_bytes,
        "untouched": None
        if now.untouched is None
        else {"answer": now.untouched.answer, "cache_bytes": now.untouched.cache_bytes},
        "budget": now.budget,
        "model": subject.title,
        "notes": list(now.notes),
        "seconds": now.seconds,
        "tokens_of_frames": list(now.fresh),
    }
