"""One picture and one question: what is forecast before the model runs, and what it answers both ways."""

from __future__ import annotations

import base64
import io
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image

from dymu.demo.groups import Groups, Watching, groups_of
from dymu.errors import BadImage, BadPrompt, BadThresholds
from dymu.families.resolve import resolve
from dymu.files import shortened
from dymu.forecast import Forecast
from dymu.handle import Handle
from dymu.hooks.cache import cache_bytes
from dymu.measure.times import Times
from dymu.measure.timing import measure_repeatedly
from dymu.media import images
from dymu.media.features import NAMES, SIDE, features
from dymu.prompting import check_length, check_question, generate, inputs_for, pixels_for
from dymu.report import Report
from dymu.thresholds import Thresholds

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in widths and heights of the picture."""

MOST_BOXES = 16

MAX_PIXELS = 50_000_000
"""Of a picture on the page; several visitors may decode one at a time."""
MAX_BYTES = 30 * 2**20
"""Of an uploaded file."""
MOST_CHARACTERS = 2_000
"""Of a question."""
MAX_NEW_TOKENS = 64
REPEATS, LIMIT_S = 3, 10.0
"""How often each way is timed, and after how many seconds no more."""
SHOWN = 960
"""Pixels of the longer side of a picture as the page shows it."""


@dataclass(frozen=True)
class Subject:
    """The model that the page asks.

    Attributes:
        title: what people call it.
        budget: where the dial stands at first.
        options: words of `dymu run` that say the same of where the model comes from and how it is loaded.
    """

    title: str
    model: Any
    processor: Any
    thresholds: Thresholds
    handle: Handle
    budget: float
    options: tuple[str, ...] = ()
    toy: bool = False

    @property
    def takes_videos(self) -> bool:
        return "video" in resolve(self.model).placeholders

    @property
    def span(self) -> tuple[float, float]:
        """The least and the greatest budget."""
        return self.thresholds.budgets[0], self.thresholds.budgets[-1]

    @property
    def tokens(self) -> float | None:
        """Image tokens of an untouched image; their mean where images differ; None: the thresholds do not say."""
        return self.thresholds.full


@dataclass(frozen=True)
class Picture:
    """What the page remembers of a visitor's picture.

    Attributes:
        name: of the file, as the visitor knows it.
        size: width and height.
        notes: what was done to make it RGB.
        small: all that a forecast looks at.
        tokens: image tokens with nothing merged; None: nothing says so before the model runs.
        complexity: bytes per pixel of a small JPEG of it.
    """

    name: str
    size: tuple[int, int]
    notes: tuple[str, ...]
    small: Image.Image
    tokens: int | None
    complexity: float


@dataclass(frozen=True)
class Side:
    """One way to ask: the answer, image tokens, bytes of the KV cache (None: it keeps none), and times once taken."""

    answer: str
    tokens: int
    cache_bytes: int | None
    times: Times | None = None


@dataclass(frozen=True)
class Promise:
    """Parts of the untouched model's cost that the counts of tokens let expect.

    Attributes:
        encoder: tokens in its layers, the mean over all of them.
        prefill: tokens of the prompt.
        each_token: bytes read for one more token: the language model's weights and the KV cache.
    """

    encoder: float
    prefill: float
    each_token: float


@dataclass(frozen=True)
class Asked:
    """What is known of a question so far; the later fields are None until then.

    Attributes:
        original: image tokens with nothing merged.
        repeats: how often each way was timed.
        shown: a data URL of the picture.
        boxes: where tokens merge last.
    """

    picture: Picture
    question: str
    budget: float
    forecast: Forecast | None
    merged: Side | None = None
    original: int = 0
    groups: Groups | None = None
    promise: Promise | None = None
    untouched: Side | None = None
    repeats: int = 0
    shown: str = ""
    boxes: tuple[Box, ...] = ()


def load(path: str | Path, name: str) -> images.LoadedImage:
    """A picture that was uploaded, in RGB.

    Raises:
        BadImage: it is none, or larger than the page takes; the sentence says `name`.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadImage(f"{name} is not here any more: choose it again.") from error
    if len(data) > MAX_BYTES:
        raise BadImage(f"{name} has more than the {MAX_BYTES // 2**20} MiB that this page takes: make it smaller.")
    try:
        with Image.open(io.BytesIO(data), formats=images.readable_formats()) as header:
            pixels = header.width * header.height
    except Exception:  # `images.load` says what is wrong with it
        pixels = 0
    if pixels > MAX_PIXELS:
        raise BadImage(
            f"{name} has {pixels / 1e6:.0f} million pixels, more than the {MAX_PIXELS / 1e6:.0f} million that this "
            "page takes: make it smaller."
        )
    return images.load(data, name)


def look(subject: Subject, loaded: images.LoadedImage, name: str) -> Picture:
    """What can be told of a picture before the model runs."""
    image = loaded.image
    small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    jpeg_bytes = math.exp(features(small)[NAMES.index("log_jpeg_bytes")])
    return Picture(name, image.size, loaded.notes, small, _untouched(subject, image), jpeg_bytes / SIDE**2)


def _untouched(subject: Subject, image: Image.Image) -> int | None:
    """Image tokens of a picture with nothing merged."""
    if subject.thresholds.image_tokens is None and subject.thresholds.encoder is not None:
        return subject.thresholds.encoder.tokens
    count = getattr(subject.processor, "_get_num_multimodal_tokens", None)
    if count is not None:
        (tokens,) = count(image_sizes=[image.size[::-1]])["num_image_tokens"]
        return int(tokens)
    token = resolve(subject.model).placeholders["image"]
    return int((pixels_for(subject.processor, [image])["input_ids"] == token).sum())


def forecast(subject: Subject, picture: Picture, budget: float, boxes: bool = False) -> Forecast | None:
    """How many image tokens a picture will keep; None: the thresholds do not tell.

    Args:
        boxes: whether something is in focus, so that it keeps the budget's share.

    Raises:
        BadBudget: it is outside the calibrated range.
    """
    try:
        told = subject.thresholds.forecast(picture.small, budget, tokens=picture.tokens)
    except BadThresholds:
        return None
    if not boxes or not subject.thresholds.full:
        return told
    share = max(round(told.most * budget / subject.thresholds.full), 1)
    return Forecast(share, share, told.least, told.most)


def check_asked(subject: Subject, question: str) -> str:
    """The question without blanks around it.

    Raises:
        BadPrompt: it is empty or too long, or see `check_question`.
    """
    question = question.strip()
    if not question:
        raise BadPrompt("there is no question yet: write one.")
    if len(question) > MOST_CHARACTERS:
        raise BadPrompt(f"the question has more than {MOST_CHARACTERS:,} characters: shorten it.")
    check_question(subject.processor, question)
    return question


def boxes_of(words: str) -> list[Box]:
    """One box a line: left, top, right and bottom, from 0 to 1.

    Raises:
        BadPrompt: a line is none, or there are too many.
    """
    boxes = list[Box]()
    for line in filter(None, map(str.strip, words.splitlines())):
        try:
            left, top, right, bottom = (float(part) for part in re.split(r"[,\s]+", line))
        except ValueError:
            left = top = right = bottom = math.nan
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise BadPrompt(
                f"{shortened(line)!r} is no box: write left, top, right and bottom in parts of the picture, such as "
                "0.1, 0.2, 0.5, 0.6."
            )
        boxes.append((left, top, right, bottom))
    if len(boxes) > MOST_BOXES:
        raise BadPrompt(f"{len(boxes)} boxes are more than {MOST_BOXES}: take some away.")
    return boxes


def ask(
    subject: Subject, loaded: images.LoadedImage, name: str, question: str, budget: float, boxes: Sequence[Box] = ()
) -> Iterator[Asked]:
    """Ask both ways, and measure both: what is known, as it becomes more.

    Between two answers no state of the library is held, so that each may be made in another thread.

    Args:
        boxes: where tokens merge last, so that others merge in their place.

    Raises:
        DymuError: it cannot be asked so.
    """
    question = check_asked(subject, question)
    model, processor, handle = subject.model, subject.processor, subject.handle
    picture = look(subject, loaded, name)
    told, shown = forecast(subject, picture, budget, bool(boxes)), as_jpeg_url(loaded.image, SHOWN)
    asked = Asked(picture, question, budget, told, shown=shown, boxes=tuple(boxes))
    inputs = inputs_for(model, processor, [([loaded.image], question)])
    check_length(model, inputs, "the picture")
    merged, report, watching = _merged(subject, inputs, budget, boxes)
    prompt = inputs["input_ids"].shape[1]
    groups = groups_of(report, watching, loaded.image, SHOWN)
    original = sum(report.original)
    asked = replace(asked, merged=merged, original=original, groups=groups, promise=promise(model, report, prompt))
    yield asked
    with handle.disabled():
        answer, stored = answered(model, processor, inputs)
    asked = replace(asked, untouched=Side(answer, original, stored))
    yield asked
    with handle.at(budget, focus=tuple(boxes) or None):
        runs, full_runs = measure_repeatedly(model, inputs, handle, repeats=REPEATS, limit_s=LIMIT_S)
    assert asked.untouched is not None
    yield replace(
        asked,
        merged=replace(merged, times=Times.medians(runs)),
        untouched=replace(asked.untouched, times=Times.medians(full_runs)),
        repeats=len(runs),
    )


def _merged(
    subject: Subject, inputs: dict[str, Any], budget: float, boxes: Sequence[Box]
) -> tuple[Side, Report, Watching]:
    """The answer with merged tokens."""
    handle = subject.handle
    with handle.at(budget, focus=tuple(boxes) or None), Watching.of(handle) as watching:
        answer, stored = answered(subject.model, subject.processor, inputs)
        report = handle.last
    return Side(answer, sum(report.kept), stored), report, watching


def answered(model: Any, processor: Any, inputs: dict[str, Any]) -> tuple[str, int | None]:
    """The greedy answer, and the bytes of the KV cache at the end of it; None where it keeps none."""
    texts, cache = generate(model, processor, inputs, MAX_NEW_TOKENS)
    return texts[0], None if cache is None else cache_bytes(cache)


def promise(model: Any, report: Report, prompt: int) -> Promise:
    """What the counts of a call let expect.

    Args:
        prompt: tokens of the prompt with nothing merged.
    """
    parts = resolve(model)
    entering = sum(item.shown[0, 0].numel() * item.pictures for item in report.items)
    left = [entering, *map(sum, report.layers)]
    # Half of a layer, its attention, comes ahead of the merge; layers that are not read do not run.
    through = sum(before + after for before, after in pairwise(left)) / 2
    language = parts.language_model
    weights = sum(parameter.nbytes for parameter in language.parameters())
    return Promise(
        encoder=through / (entering * len(parts.encoder_modules)),
        prefill=1 - (sum(report.original) - sum(report.kept)) / prompt,
        each_token=(weights + report.cache_bytes) / (weights + report.cache_bytes_full),
    )


def command(subject: Subject, picture: str, question: str, budget: float, *more: str) -> str:
    """The call of `dymu run` that does the same."""
    words = ["dymu", "run"]
    options = ["--budget", f"{budget:g}"]
    options += [*subject.options, *more, "--json"]
    if picture.startswith("-") or question.startswith("-"):
        return shlex.join([*words, *options, "--", picture, question])
    return shlex.join([*words, picture, question, *options])


def as_python(asked: Asked) -> str:
    """What the library does the same with; `dymu run` takes no boxes."""
    return (
        f"with handle.at({asked.budget:g}, focus={asked.boxes}):\n"
        f"    model.generate(**inputs, max_new_tokens={MAX_NEW_TOKENS})"
    )


def as_json(subject: Subject, asked: Asked) -> dict[str, Any]:
    """What `dymu run --compare --json` gives, and the forecast."""
    merged, untouched = asked.merged, asked.untouched
    assert merged is not None
    data = _side(merged, asked.original)
    if untouched is not None:
        data["untouched"] = _side(untouched, asked.original)
        if merged.times is not None and untouched.times is not None:
            data["repeats"] = asked.repeats
            data["time_to_first_token_ratio"] = round(merged.times.first_token_ms / untouched.times.first_token_ms, 4)
    return data | {
        "budget": asked.budget,
        "count": "mean",
        "focus": [list(box) for box in asked.boxes] or None,
        "guard": None,
        "unmerge": "exact",
        "cache": "merged",
        "model": subject.title,
        "thresholds": subject.thresholds.source,
        "notes": list(asked.picture.notes),
        "forecast": None if asked.forecast is None else msgspec.to_builtins(asked.forecast),
    }


def _side(side: Side, original: int) -> dict[str, Any]:
    data: dict[str, Any] = {
        "answer": side.answer,
        "original_tokens": original,
        "kept_tokens": side.tokens,
        "cache_bytes": side.cache_bytes,
    }
    if side.times is not None:
        data |= {name: round(value, 3) for name, value in msgspec.structs.asdict(side.times).items()}
    return data


def as_jpeg_url(image: Image.Image, longest: int) -> str:
    """A data URL of an RGB picture, whose longer side has at most so many pixels."""
    scale = min(longest / max(image.size), 1.0)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    encoded = io.BytesIO()
    shown = image if size == image.size else image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    shown.save(encoded, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()
