"""Thresholds: when two tokens are alike enough to merge, per encoder layer and for every budget."""

from __future__ import annotations

import json
import math
import numbers
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dymu.errors import BadBudget, BadThresholds

FORMAT = "dymu-thresholds"
VERSION = 1


@dataclass(frozen=True)
class Encoder:
    """The vision encoder that thresholds belong to.

    Attributes:
        model_type: transformers' name of its architecture.
        layers: its layers in all; `depth` of them merge, from the first on.
        hidden_size, heads: its width and attention heads.
        tokens: image tokens of one picture without class token and registers, at calibration.
    """

    model_type: str
    layers: int
    depth: int
    hidden_size: int
    heads: int
    tokens: int


@dataclass(frozen=True)
class Calibrated:
    """Thresholds for one budget, and what they did to the calibration images.

    Attributes:
        budget: wanted average number of image tokens.
        thresholds: cosine similarity above which tokens merge, one per merging layer; above 1: no merging there.
        achieved, sd, min, max: image tokens that the calibration images kept; None where a file does not say.
        images, frames: the same per round of merging where an image, or a frame of a video, stands in the prompt; see
            `dymu.settling`. Empty where the family's layout needs none.
    """

    budget: float
    thresholds: tuple[float, ...]
    achieved: float | None = None
    sd: float | None = None
    min: int | None = None
    max: int | None = None
    images: tuple[float, ...] = ()
    frames: tuple[float, ...] = ()


@dataclass(frozen=True)
class OverTime:
    """A similarity for tokens of a video to go on from frame to frame, and what it did to the calibration videos.

    Attributes:
        budget: of the frames, as for images.
        per_second: wanted average number of tokens for each second of video.
        threshold: cosine similarity above which a token is part of one in the frame before.
        achieved: tokens per second that the calibration videos kept.
        videos: how many they were; seconds: how long together.
    """

    budget: float
    per_second: float
    threshold: float
    achieved: float
    videos: int
    seconds: float


@dataclass(frozen=True)
class Thresholds:
    """When to merge, for every budget between the calibrated ones; a JSON file with its provenance.

    Attributes:
        calibrated: one entry per budget, smallest first.
        encoder: what they belong to; None where a file does not say (the authors' checkpoints).
        schedule: how merges spread over the layers.
        merge_layers: indices of the encoder layers that merge; None: all of them.
        over_time: one entry per budget and tokens per second, see `dymu.calibrate_videos`.
        model: the model's name or path at calibration.
        image_tokens: tokens of an untouched image, on average over those they were found on, where images are cut into
            tiles; None: every image is one picture.
        images: how many images they were found on.
        skipped: images that could not be used: `{"image": ..., "why": ...}`.
        created: ISO 8601 date; dymu: version of this library.
    """

    calibrated: tuple[Calibrated, ...]
    encoder: Encoder | None = None
    schedule: str = ""
    merge_layers: tuple[int, ...] | None = None
    over_time: tuple[OverTime, ...] = ()
    model: str = ""
    image_tokens: float | None = None
    images: int | None = None
    skipped: tuple[Mapping[str, str], ...] = ()
    created: str = ""
    dymu: str = ""
    source: str = field(default="", compare=False)
    """The file they were loaded from, for messages; not saved."""

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
        if isinstance(budget, bool) or not hasattr(budget, "__float__"):
            raise BadBudget(f"a budget is a number of tokens or a fraction of them, not {budget!r}.")
        wanted = float(budget)
        if not _whole(budget) and 0 < wanted <= 1:
            if self.encoder is None:
                raise BadBudget(f"{self} does not say how many tokens an image has; give the budget in tokens: {span}.")
            wanted *= self.image_tokens or self.encoder.tokens
            # A fraction was rounded to whole tokens on calibration.
            near = min(self.budgets, key=lambda calibrated: abs(calibrated - wanted))
            wanted = near if abs(near - wanted) <= 0.5 else wanted
        if not lowest - 0.5 <= wanted <= highest + 0.5:
            raise BadBudget(
                f"a budget of {budget:g} ({wanted:g} image tokens) is outside {span}, the range of {self}; "
                "choose one within, or calibrate for it (dymu calibrate -b)."
            )
        return min(max(wanted, lowest), highest)

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
        wanted = self.tokens_for(budget)
        above = next(index for index, entry in enumerate(self.calibrated) if entry.budget >= wanted)
        upper = self.calibrated[above]
        if upper.budget == wanted or above == 0:
            return upper
        lower = self.calibrated[above - 1]
        part = (wanted - lower.budget) / (upper.budget - lower.budget)

        def between(low: tuple[float, ...], high: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(_between(*pair, part) for pair in zip(low, high, strict=True))

        return Calibrated(
            budget=wanted,
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
        if isinstance(per_second, bool) or not hasattr(per_second, "__float__"):
            raise BadBudget(f"tokens per second are a number, not {per_second!r}.")
        wanted = self.tokens_for(budget)
        entries = sorted((e for e in self.over_time if e.budget == wanted), key=lambda entry: entry.per_second)
        if not self.over_time:
            raise BadBudget(f"nothing in {self} is for videos over time; make it with `dymu calibrate-videos`.")
        if not entries:
            known = ", ".join(f"{known:g}" for known in sorted({entry.budget for entry in self.over_time}))
            raise BadBudget(
                f"tokens per second of video were calibrated at budgets of {known}, and not at {wanted:g}; "
                f"choose one of those, or calibrate for it with `dymu calibrate-videos`."
            )
        if not entries[0].per_second <= per_second <= entries[-1].per_second:
            raise BadBudget(
                f"{per_second:g} tokens per second is outside {entries[0].per_second:g} to "
                f"{entries[-1].per_second:g}, the range of {self} at a budget of {wanted:g}; "
                "choose one within, or calibrate for it with `dymu calibrate-videos`."
            )
        above = next(index for index, entry in enumerate(entries) if entry.per_second >= per_second)
        upper, lower = entries[above], entries[max(above - 1, 0)]
        if upper.per_second == per_second:
            return upper.threshold
        part = (per_second - lower.per_second) / (upper.per_second - lower.per_second)
        return _between(lower.threshold, upper.threshold, part)

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
                f"{self} was found on images {ways[not cuts_images]}, and this model's are {ways[cuts_images]}, so "
                "that its budgets mean something else; calibrate for this model with `dymu calibrate`."
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
        """Write a JSON file, whole or not at all."""
        target = Path(path)
        body = {key: value for key, value in asdict(self).items() if key != "source"}
        body = {"format": FORMAT, "version": VERSION, **body}
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            temporary.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Thresholds:
        """Read a JSON file, or the thresholds within one of the authors' `.pth` encoder checkpoints.

        Raises:
            BadThresholds: the file is missing, damaged, of another format or of a newer version.
        """
        source = Path(path)
        if source.suffix.lower() in (".pth", ".pt"):
            return _from_checkpoint(source)
        try:
            body = json.loads(source.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadThresholds(
                f"cannot read the thresholds file {source}: {(error.strerror or str(error)).lower()}; "
                "check the path, or make one with `dymu calibrate`."
            ) from error
        except ValueError as error:
            raise BadThresholds(
                f"{source} is not whole JSON ({error}); it may be cut short: fetch or calibrate it again."
            ) from error
        return _from_json(body, source)

    def __str__(self) -> str:
        return f"the thresholds file {self.source}" if self.source else "these thresholds"


def _whole(budget: object) -> bool:
    """Whether a number is of a type for whole numbers, Python's or numpy's."""
    return isinstance(budget, numbers.Integral)


def _check_numbers(budget: object, *thresholds: object) -> None:
    """Raises: ValueError, unless the budget is a positive and each threshold a finite number."""
    for value in (budget, *thresholds):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{value!r} is not a finite number")
    if not isinstance(budget, int | float) or budget <= 0:
        raise ValueError(f"a budget of {budget!r} keeps nothing")


def _layers(given: object, depth: int) -> tuple[int, ...] | None:
    """Raises: ValueError, unless they are a list of indices of `depth` layers, or None."""
    if given is None:
        return None
    if not isinstance(given, list) or not given or not all(type(i) is int and 0 <= i < depth for i in given):
        raise ValueError(f"the layers that merge are {given!r}, not a list of numbers from 0 to {depth - 1}")
    return tuple(given)


def _between(low: float, high: float, part: float) -> float:
    """Any threshold above 1 means "never", which a similarity of 1 is the nearest to."""
    return high if low > 1 else low + part * (min(high, 1.0) - low)


def _calibrated(entry: Mapping[str, Any]) -> Calibrated:
    given = {"images": (), "frames": (), **entry}
    return Calibrated(**given | {name: tuple(map(float, given[name])) for name in ("thresholds", "images", "frames")})


def _from_json(body: Any, source: Path) -> Thresholds:
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise BadThresholds(f"{source} is JSON but not a dymu thresholds file; make one with `dymu calibrate`.")
    version = body.get("version")
    if type(version) is not int or version < 1:
        raise BadThresholds(f"{source} has no valid format version ({version!r}); fetch or calibrate it again.")
    if version > VERSION:
        raise BadThresholds(f"{source} has format version {version}, this dymu reads up to {VERSION}; update dymu.")
    known = {item.name for item in fields(Thresholds)} - {
        "source",
        "calibrated",
        "encoder",
        "skipped",
        "merge_layers",
        "over_time",
    }
    try:
        calibrated = sorted((_calibrated(entry) for entry in body["calibrated"]), key=lambda entry: entry.budget)
        encoder = Encoder(**body["encoder"]) if body.get("encoder") else None
        for entry in calibrated:
            _check_numbers(entry.budget, *entry.thresholds, *entry.images, *entry.frames)
        over_time = tuple(OverTime(**entry) for entry in body.get("over_time", ()))
        for found in over_time:
            _check_numbers(found.budget, found.threshold, found.achieved, found.seconds, found.videos)
            _check_numbers(found.per_second)
        if body.get("image_tokens") is not None:
            _check_numbers(body["image_tokens"])
        lengths = {len(entry.thresholds) for entry in calibrated}
        if len({(len(entry.images), len(entry.frames)) for entry in calibrated}) != 1:
            raise ValueError("every budget needs as many rounds of merging in the prompt")
        if len(lengths) != 1 or (encoder is not None and lengths != {encoder.depth}):
            raise ValueError("every budget needs one threshold per merging layer")
        return Thresholds(
            calibrated=tuple(calibrated),
            encoder=encoder,
            skipped=tuple(body.get("skipped", ())),
            over_time=over_time,
            merge_layers=_layers(body.get("merge_layers"), lengths.pop()),
            source=str(source),
            **{key: body[key] for key in known & body.keys()},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadThresholds(
            f"{source} lacks or misstates something ({type(error).__name__}: {error}); fetch or calibrate it again."
        ) from error


def _from_checkpoint(source: Path) -> Thresholds:
    """The authors' format: an encoder's state dict with a scalar `….<layer>.threshold` per layer, 1.0 for no merging.

    The wanted number of tokens stands in the file's name only (`ViT-L-14-336-tome-72out.pth`).
    """
    import torch

    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise BadThresholds(
            f"cannot read {source} as a checkpoint of tensors ({str(error).splitlines()[0]}); "
            "nothing in it was executed: check that it is one of the authors' encoder checkpoints."
        ) from error
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    found: dict[int, float] = {}
    for name, value in state.items() if isinstance(state, Mapping) else ():
        layer = re.search(r"(\d+)\.threshold$", str(name))
        if layer and isinstance(value, torch.Tensor) and value.numel() == 1 and int(layer[1]) not in found:
            found[int(layer[1])] = value.item()
        elif layer:
            found = {}
            break
    if not found or sorted(found) != list(range(len(found))) or not all(map(math.isfinite, found.values())):
        raise BadThresholds(
            f"{source} holds no thresholds, one per layer; use one of the authors' encoder checkpoints."
        )
    named = re.search(r"(\d+)out", source.name)
    if not named or int(named[1]) == 0:
        raise BadThresholds(
            f"{source} does not say its budget, which the authors keep in the name; rename it to end with, "
            "for example, -72out.pth."
        )
    thresholds = tuple(2.0 if found[layer] >= 1 else found[layer] for layer in sorted(found))
    return Thresholds((Calibrated(float(named[1]), thresholds),), model=source.stem, source=str(source))
