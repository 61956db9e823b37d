"""Thresholds: when two tokens are alike enough to merge, per encoder layer and for every budget."""

from __future__ import annotations

import json
import math
import numbers
import os
import pickle
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec

from dymu.errors import BadBudget, BadThresholds
from dymu.files import Count, decoded, first_line, whole_file

FORMAT = "dymu-thresholds"
VERSION = 1
FILE_NAME = "thresholds.json"
"""In a model's folder."""

Positive = Annotated[int, msgspec.Meta(gt=0, le=2**53)] | Annotated[float, msgspec.Meta(gt=0)]


class Encoder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The vision encoder that thresholds belong to.

    Attributes:
        model_type: transformers' name of its architecture.
        layers: its layers in all; `depth` of them merge, from the first on.
        hidden_size, heads: its width and attention heads.
        tokens: image tokens of one picture without class token and registers, at calibration.
    """

    model_type: str
    layers: Count
    depth: Count
    hidden_size: Count
    heads: Count
    tokens: Count


class Calibrated(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Thresholds for one budget, and what they did to the calibration images.

    Attributes:
        budget: average number of image tokens to keep.
        thresholds: cosine similarity above which tokens merge, one per merging layer; above 1: no merging there.
        achieved, sd, min, max: image tokens that the calibration images kept; None where a file does not say.
        images, frames: the same per round of merging where an image, or a frame of a video, stands in the prompt; see
            `dymu.merging.in_prompt`. Empty where the family needs none.
    """

    budget: Positive
    thresholds: tuple[float, ...]
    achieved: float | None = None
    sd: float | None = None
    min: Count | None = None
    max: Count | None = None
    images: tuple[float, ...] = ()
    frames: tuple[float, ...] = ()


class OverTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A similarity for tokens of a video to go on from frame to frame, and what it did to the calibration videos.

    Attributes:
        budget: of the frames, as for images.
        per_second: average number of tokens to keep for each second of video.
        threshold: cosine similarity above which a token is part of one in the frame before.
        achieved: tokens per second that the calibration videos kept.
        videos: how many they were; seconds: how long together.
    """

    budget: Positive
    per_second: Positive
    threshold: float
    achieved: Positive
    videos: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    seconds: Positive


class Thresholds(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True, tag_field="format", tag=FORMAT):
    """When to merge, for every budget between the calibrated ones; a JSON file with its provenance.

    Attributes:
        calibrated: one entry per budget, smallest first.
        encoder: what they belong to; None where a file does not say (the authors' checkpoints).
        schedule: how merges spread over the layers.
        merge_layers: indices of the encoder layers that merge; None: all of them.
        over_time: one entry per budget and tokens per second, see `dymu.calibrate_videos`.
        model: the model's name or path at calibration.
        image_tokens: tokens of an untouched image, on average over the calibration images, where images are cut into
            tiles; None: every image is one picture.
        images: how many calibration images there were.
        skipped: images that could not be used: `{"image": ..., "why": ...}`.
        created: ISO 8601 date; dymu: version of this library.
        version: of the file format.

    Raises:
        ValueError: two entries of one budget, entries of different lengths, or `merge_layers` that no threshold is for.
    """

    calibrated: Annotated[tuple[Calibrated, ...], msgspec.Meta(min_length=1)]
    encoder: Encoder | None = None
    schedule: str = ""
    merge_layers: Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)] | None = None
    over_time: tuple[OverTime, ...] = ()
    model: str = ""
    image_tokens: Positive | None = None
    images: Count | None = None
    skipped: tuple[dict[str, str], ...] = ()
    created: str = ""
    dymu: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        in_order = tuple(sorted(self.calibrated, key=lambda entry: entry.budget))
        msgspec.structs.force_setattr(self, "calibrated", in_order)
        depths = {len(entry.thresholds) for entry in in_order}
        for lower, upper in pairwise(in_order):
            if lower.budget == upper.budget:
                raise ValueError(f"two entries in `calibrated` have the budget {upper.budget:g}")
        if len({(len(entry.images), len(entry.frames)) for entry in in_order}) != 1:
            raise ValueError("every budget in `calibrated` needs as many rounds of merging in the prompt")
        if len(depths) != 1 or depths == {0} or (self.encoder is not None and depths != {self.encoder.depth}):
            raise ValueError("every budget in `calibrated` needs one threshold per merging layer")
        if max(self.merge_layers or (0,)) >= max(depths):
            raise ValueError(f"`merge_layers` are {list(self.merge_layers or ())}, not some of 0 to {max(depths) - 1}")

    @cached_property
    def source(self) -> str:
        """The file they were loaded from, for messages; neither saved nor compared."""
        return ""

    @property
    def budgets(self) -> list[float]:
        """The calibrated budgets in image tokens, smallest first."""
        return [entry.budget for entry in self.calibrated]

    def tokens_for(self, budget: int | float | None) -> float:
        """A budget in image tokens: an int or a number above 1 is one already, 0.15 is a fraction of the full count.

        Raises:
            BadBudget: outside the calibrated range, or missing where several are calibrated.
        """
        lowest, highest = self.budgets[0], self.budgets[-1]
        span = f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"
        if budget is None:
            if len(self.calibrated) == 1:
                return lowest
            raise BadBudget(f"no budget was given; choose one from {span} image tokens, the range of {self}.")
        budget = number(budget)
        tokens = float(budget)
        if isinstance(budget, float) and 0 < budget <= 1:
            if self.encoder is None:
                raise BadBudget(f"{self} does not say how many tokens an image has; give the budget in tokens: {span}.")
            tokens *= self.image_tokens or self.encoder.tokens
            # A fraction was rounded to whole tokens on calibration.
            near = min(self.budgets, key=lambda calibrated: abs(calibrated - tokens))
            tokens = near if abs(near - tokens) <= 0.5 else tokens
        if not lowest - 0.5 <= tokens <= highest + 0.5:
            raise BadBudget(
                f"a budget of {budget:g} ({tokens:g} image tokens) is outside {span}, the range of {self}; "
                "choose one within, or calibrate for it (dymu calibrate -b)."
            )
        return min(max(tokens, lowest), highest)

    def per_layer(self, budget: int | float | None = None) -> list[float]:
        """One similarity per merging encoder layer, interpolated between the calibrated budgets around `budget`.

        Calibrated budgets are met; between two that are far apart the average strays, so calibrate for those that
        matter.

        Raises:
            BadBudget: see `tokens_for`.
        """
        return list(self.at(budget).thresholds)

    def at(self, budget: int | float | None = None) -> Calibrated:
        """Everything for one budget, see `per_layer`.

        Raises:
            BadBudget: see `tokens_for`.
        """
        tokens = self.tokens_for(budget)
        below, above, part = _around(self.budgets, tokens)
        lower, upper = self.calibrated[below], self.calibrated[above]
        if lower is upper:
            return upper

        def between(low: tuple[float, ...], high: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(_between(*pair, part) for pair in zip(low, high, strict=True))

        return Calibrated(
            budget=tokens,
            thresholds=between(lower.thresholds, upper.thresholds),
            images=between(lower.images, upper.images),
            frames=between(lower.frames, upper.frames),
        )

    def over_time_at(self, budget: int | float | None, per_second: int | float) -> float:
        """The similarity over time for so many tokens per second, at a calibrated budget; interpolated between those
        calibrated.

        Raises:
            BadBudget: nothing near was calibrated.
        """
        per_second = number(per_second, "tokens per second are a number")
        tokens = self.tokens_for(budget)
        entries = sorted((e for e in self.over_time if e.budget == tokens), key=lambda entry: entry.per_second)
        if not self.over_time:
            raise BadBudget(f"nothing in {self} is for videos over time; make it with `dymu calibrate-videos`.")
        if not entries:
            known = ", ".join(f"{known:g}" for known in sorted({entry.budget for entry in self.over_time}))
            raise BadBudget(
                f"tokens per second of video were calibrated at budgets of {known}, and not at {tokens:g}; "
                f"choose one of those, or calibrate for it with `dymu calibrate-videos`."
            )
        rates = [entry.per_second for entry in entries]
        if not rates[0] <= per_second <= rates[-1]:
            raise BadBudget(
                f"{per_second:g} tokens per second is outside {rates[0]:g} to {rates[-1]:g}, the range of {self} at a "
                f"budget of {tokens:g}; choose one within, or calibrate for it with `dymu calibrate-videos`."
            )
        below, above, part = _around(rates, per_second)
        return _between(entries[below].threshold, entries[above].threshold, part)

    def check_fits(self, encoder: Encoder, cuts_images: bool = False) -> None:
        """Refuse a model with another encoder; the number of tokens (the image size) may differ.

        Args:
            encoder: the model's.
            cuts_images: whether its family cuts images into tiles, so that a budget is of something else.

        Raises:
            BadThresholds: naming what differs.
        """
        if self.encoder is None:
            counts = {len(entry.thresholds) for entry in self.calibrated}
            if not counts <= {encoder.depth, encoder.layers}:
                raise BadThresholds(
                    f"{self} has thresholds for {max(counts)} layers, but the {encoder.model_type} encoder "
                    f"of the model merges in {encoder.depth} of {encoder.layers}; use the thresholds of this encoder."
                )
            return
        if cuts_images != (self.image_tokens is not None):
            ways = ("of one picture each", "cut into tiles")
            raise BadThresholds(
                f"{self} was calibrated on images {ways[not cuts_images]}, and this model's are {ways[cuts_images]}, "
                "so that its budgets mean something else; calibrate for this model with `dymu calibrate`."
            )
        differing = [
            f"{name.replace('_', ' ')} {getattr(self.encoder, name)} instead of {getattr(encoder, name)}"
            for name in ("model_type", "layers", "depth", "hidden_size", "heads")
            if getattr(self.encoder, name) != getattr(encoder, name)
        ]
        if differing:
            raise BadThresholds(
                f"{self} belongs to another vision encoder ({', '.join(differing)}); "
                "calibrate for this model with `dymu calibrate`."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, whole or not at all.

        Raises:
            BadThresholds: `load` would refuse it.
        """
        body = {"format": FORMAT, "version": VERSION} | msgspec.to_builtins(self)
        what, then = f"{self} cannot be saved as {path}", "correct that, or calibrate again."
        try:
            text = json.dumps(body, indent=2, allow_nan=False) + "\n"
        except ValueError as error:
            raise BadThresholds(f"{what} (a number in it is NaN or infinite); {then}") from error
        decoded(text.encode(), Thresholds, BadThresholds, what, then)
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Thresholds:
        """Read a JSON file, or the thresholds within one of the authors' `.pth` encoder checkpoints.

        Raises:
            BadThresholds: the file is missing, damaged, of another format or of a newer version.
        """
        source = Path(path)
        loaded = _from_checkpoint(source) if source.suffix.lower() in (".pth", ".pt") else _from_json(source)
        loaded.__dict__["source"] = str(source)
        return loaded

    def __str__(self) -> str:
        return f"the thresholds file {self.source}" if self.source else "this set of thresholds"


class _Header(msgspec.Struct, tag_field="format", tag=FORMAT):
    """What tells a thresholds file from other JSON, and its version."""

    version: Annotated[int, msgspec.Meta(ge=1, le=2**31)]


def beside(model: str, option: str) -> Path:
    """The thresholds file in a model's folder.

    Args:
        model: the folder; a hub name has none.
        option: how the user names another file, for the message.

    Raises:
        BadThresholds: there is none.
    """
    path = Path(model).expanduser() / FILE_NAME
    if not path.is_file():
        raise BadThresholds(
            f"{model} ships no {FILE_NAME}: name one with {option}, or make it with "
            f"`dymu calibrate {model} IMAGES... -b 0.3 -o {FILE_NAME}`."
        )
    return path


def number(value: Any, what: str = "a budget is a number of tokens or a fraction of them") -> int | float:
    """A number of any library's type as one of Python's own, which JSON can hold.

    Raises:
        BadBudget: it is none; a sentence that begins with `what`.
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise BadBudget(f"{what}, not {value!r}.")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _from_json(source: Path) -> Thresholds:
    try:
        text = source.read_bytes()
    except (OSError, ValueError) as error:
        raise BadThresholds(
            f"cannot read the thresholds file {source}: {first_line(error).lower()}; check the path, or make one with "
            "`dymu calibrate`."
        ) from error
    again = "it may be cut short or changed: fetch or calibrate it again."
    header = decoded(text, _Header, BadThresholds, f"{source} is no dymu thresholds file", again)
    if header.version > VERSION:
        raise BadThresholds(
            f"{source} has format version {header.version}, this dymu reads up to {VERSION}; update dymu."
        )
    return decoded(text, Thresholds, BadThresholds, f"{source} misstates something", again)


def _around(marks: Sequence[float], value: float) -> tuple[int, int, float]:
    """Indices of the rising `marks` around a value, and its distance from the lower one in parts of theirs.

    They are the same where it is one of them.
    """
    above = bisect_left(marks, value)
    if marks[above] == value:
        return above, above, 0.0
    return above - 1, above, (value - marks[above - 1]) / (marks[above] - marks[above - 1])


def _between(low: float, high: float, part: float) -> float:
    """Any threshold above 1 means "never", which a similarity of 1 is the nearest to."""
    return high if low > 1 else low + part * (min(high, 1.0) - low)


def _from_checkpoint(source: Path) -> Thresholds:
    """The authors' format: an encoder's state dict with a scalar `….<layer>.threshold` per layer, 1.0 for no merging.

    The budget stands in the file's name only (`ViT-L-14-336-tome-72out.pth`).
    """
    import torch

    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise BadThresholds(
            f"cannot read {source} as a checkpoint of tensors ({first_line(error)}); "
            "nothing in it was executed: check that it is one of the authors' encoder checkpoints."
        ) from error
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    by_layer: list[tuple[int, float]] = []
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if layer := re.search(r"(\d+)\.threshold$", str(name)):
            scalar = isinstance(value, torch.Tensor) and value.numel() == 1
            by_layer.append((int(layer[1]), value.item() if scalar else math.nan))
    layers, values = zip(*sorted(by_layer), strict=True) if by_layer else ((), ())
    if not layers or layers != tuple(range(len(layers))) or not all(map(math.isfinite, values)):
        raise BadThresholds(
            f"{source} holds no thresholds, one per layer; use one of the authors' encoder checkpoints."
        )
    named = re.search(r"(\d+)out", source.name)
    if not named or int(named[1]) == 0:
        raise BadThresholds(
            f"{source} does not say its budget, which the authors keep in the name; rename it to end with, "
            "for example, -72out.pth."
        )
    thresholds = tuple(2.0 if value >= 1 else value for value in values)
    return Thresholds((Calibrated(float(named[1]), thresholds),), model=source.stem)
