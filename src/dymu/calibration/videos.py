"""Sample videos -> Thresholds that also say when tokens go on from frame to frame."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from dymu.calibration.quantile import NEVER
from dymu.calibration.samples import ImageSource, arguments_for, processor_of
from dymu.errors import BadBudget, BadVideo, DymuError
from dymu.families.resolve import resolve
from dymu.handle import apply
from dymu.measure.progress import Bar
from dymu.media import images
from dymu.media.videos import LoadedVideo, load
from dymu.merging import PictureTokens
from dymu.reducers import picture_tokens
from dymu.thresholds import OverTime, Thresholds, number

VideoSource = str | os.PathLike[str] | LoadedVideo | Sequence[ImageSource] | np.ndarray | Tensor

HALVINGS = 40
"""Of the range of similarities, to find one."""

ALIKE = 1 - 1e-5
"""The highest similarity that is more than chance: equal tokens differ in their last digits."""

TOLERANCE = 0.02
"""Part of a number of tokens per second by which the achieved one may miss it before a warning says so."""


def calibrate_videos(
    model: PreTrainedModel,
    processor: Any,
    videos: Iterable[VideoSource] | VideoSource,
    thresholds: Thresholds | str | os.PathLike[str],
    per_second: int | float | Iterable[int | float],
    *,
    budget: int | float | None = None,
    frames: int = 32,
    fps: float | None = None,
    progress: bool = True,
) -> Thresholds:
    """Find the similarities at which sample videos keep so many tokens per second on average.

    The paper merges every frame by itself and names merging over time as future work. Here a token that is
    alike to one of the frame before is part of it, so that what stands still is stored once; every frame keeps its
    positions, since the language model unmerges them all.

    Args:
        model: a transformers model of a family that takes videos, without DyMU applied; it is not changed.
        processor: the model's processor.
        videos: files, folders of frames, or frames as `dymu.media.images` takes images: lists of them, or arrays
            [frames, ...]; gone through once.
        thresholds: of the model, for images, or a file of them.
        per_second: tokens per second of video to keep on average. No clip can keep more than its frames keep each by
            itself, over its seconds.
        budget: of the frames, one of those in the thresholds; may be left out where there is one only.
        frames: of each video, at most, spread over its length. It should be as dense as on use.
        fps: frames per second of videos that do not say how long they are, as folders and lists of frames do not; of
            all their frames, also where fewer are looked at.
        progress: show a bar on stderr, or lines where that is no terminal.

    Returns:
        The thresholds, with an entry in `over_time` for each number in `per_second`, smallest first.

    Raises:
        AlreadyApplied: DyMU is applied to the model; remove it first.
        BadVideo: one cannot be used, or does not say how long it is; or an `fps` that is not above 0.
        BadThresholds: the thresholds do not fit.
        BadBudget: a number of tokens that the videos cannot keep.
        DymuError: no video was given, or the model's family takes none.
    """
    rates = sorted(
        {
            float(number(rate, "tokens per second are a number"))
            for rate in (per_second if isinstance(per_second, Iterable) else [per_second])
        }
    )
    one = isinstance(videos, str | os.PathLike | LoadedVideo) or getattr(videos, "ndim", 5) == 4
    sources: Any = [videos] if one else videos
    if not isinstance(sources, Iterable):
        raise BadVideo(f"a {type(videos).__name__} holds no videos: give files, folders of frames, or lists of frames.")
    thresholds = thresholds if isinstance(thresholds, Thresholds) else Thresholds.load(thresholds)
    if fps is not None and not fps > 0:
        raise BadVideo(f"{fps:g} frames per second show nothing: give a number above 0.")
    parts = resolve(model)
    if "video" not in parts.placeholders:
        raise DymuError(f"a {type(model).__name__} takes no videos; take a model that does, see `dymu families`.")
    to_pixels = processor_of(processor, "video")
    samples: list[_Sample] = []
    with torch.inference_mode(), Bar(progress) as bar, apply(model, thresholds, budget=budget) as handle:
        task = bar.add_task("reading videos", total=len(sources) if isinstance(sources, Sized) else None)
        for index, source in enumerate(sources, 1):
            video = _loaded(source, frames)
            seconds = video.seconds or (video.of / fps if fps else 0)
            if not seconds:
                name = source if isinstance(source, str | os.PathLike) else f"video {index}"
                raise BadVideo(f"{name} does not say how long it is: say how many frames per second it has, with fps.")
            made = to_pixels(videos=[list(video.frames)], return_tensors="pt", do_sample_frames=False)
            features = parts.inner.get_video_features(**arguments_for(parts, "video", to_pixels, made)).pooler_output
            (item,) = handle.last.items
            samples.append(_Sample(picture_tokens([item], list(features)), item.pictures, seconds))
            bar.advance(task)
        tokens_per_image = thresholds.at(handle.budget).budget
    if not samples:
        raise DymuError("no video was given for calibration; give files, folders of frames, or frames.")
    entries = [_over_time(samples, tokens_per_image, rate) for rate in rates]
    for entry in entries:
        if abs(entry.achieved - entry.per_second) > TOLERANCE * entry.per_second:
            warnings.warn(
                f"for {entry.per_second:g} tokens per second the videos keep {entry.achieved:.2f}: too much in them is "
                "exactly alike from frame to frame, or they are too few; calibrate on more, and more varied ones.",
                stacklevel=2,
            )
    others = [e for e in thresholds.over_time if (e.budget, e.per_second) not in {(tokens_per_image, n) for n in rates}]
    over_time = sorted([*others, *entries], key=lambda entry: (entry.budget, entry.per_second))
    return msgspec.structs.replace(thresholds, over_time=tuple(over_time))


def _loaded(source: Any, frames: int) -> LoadedVideo:
    """At most so many frames of a video."""
    if isinstance(source, LoadedVideo):
        return source
    if isinstance(source, str | os.PathLike):
        return load(Path(source), frames=frames)
    if not isinstance(source, Iterable):
        raise BadVideo(
            f"a {type(source).__name__} is not a video: give a file, a folder of frames, or a list of frames."
        )
    return load([one if isinstance(one, Image.Image) else images.load(one).image for one in source], frames=frames)


@dataclass(frozen=True)
class _Sample:
    """The tokens of a video, every frame merged by itself. What the encoder sees at once may be several frames."""

    tokens: PictureTokens
    frames: int
    seconds: float

    def kept(self, threshold: float) -> int:
        """Tokens once those above the threshold go on from frame to frame."""
        return int(self.tokens.over_time(threshold, [self.frames]).unique().numel())


def _over_time(samples: Sequence[_Sample], budget: float, per_second: float) -> OverTime:
    """The similarity at which the samples keep `per_second` tokens per second."""
    seconds = sum(sample.seconds for sample in samples)

    def achieved(threshold: float) -> float:
        return sum(sample.kept(threshold) for sample in samples) / seconds

    fewest, most = achieved(-NEVER), achieved(NEVER)
    if not fewest <= per_second <= most:
        raise BadBudget(
            f"the videos keep {fewest:.1f} to {most:.1f} tokens per second at a budget of {budget:g}, and cannot keep "
            f"{per_second:g}; choose a number within, or another budget."
        )
    low, high = -1.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if achieved(middle) <= per_second else (low, middle)
    threshold = NEVER if per_second == most else min(low, ALIKE)
    return OverTime(budget, per_second, threshold, achieved(threshold), len(samples), seconds)
