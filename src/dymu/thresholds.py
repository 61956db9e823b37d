"""Thresholds: when two tokens are alike enough to merge, per encoder layer and for every budget."""

from __future__ import annotations

import json
import math
import numbers
import os
import re
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec

from dymu.errors import BadBudget, BadOutput, BadThresholds, DymuError
from dymu.files import Count, decoded, escaped, expanded, first_line, whole_file
from dymu.forecast import Forecast, Forecasts
from dymu.schedule import fewest_of_any

FORMAT = "dymu-thresholds"
VERSION = 3
"""1 counted pairs from behind class token and registers; 2 counts from the first token; 3 may hold forecasts and
dials."""
FILE_NAME = "thresholds.json"
"""In a model's folder or hub repository."""
_CHECKPOINTS = (".pth", ".pt")
CLOSE = 1.3
"""Ratio of two calibrated budgets between which others may be interpolated, see docs/counts.md."""
FEW = 4
"""Tokens between two budgets that are close whatever their ratio: they are whole numbers."""

Positive = Annotated[int, msgspec.Meta(gt=0, le=2**53)] | Annotated[float, msgspec.Meta(gt=0)]


class Encoder(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The vision encoder that thresholds belong to.

    Attributes:
        model_type: transformers' name of its architecture.
        layers: its layers in all; `depth` of them merge, from the first on.
        hidden_size, heads: its width and attention heads.
        tokens: image tokens of one picture without class token and registers, at calibration; where pictures differ,
            their mean, rounded.
        unit: rows, and columns, of the patches that become one image token.
    """

    model_type: str
    layers: Count
    depth: Count
    hidden_size: Count
    heads: Count
    tokens: Count
    unit: Count = 1


class Dial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A lower budget that is met where only the last layer merges more.

    Attributes:
        budget: image tokens that the calibration images kept on average.
        threshold: the last layer's.
    """

    budget: Positive
    threshold: float


class Calibrated(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Thresholds for one budget, and what they did to the calibration images.

    Attributes:
        budget: average number of image tokens to keep.
        thresholds: cosine similarity above which tokens merge, one per merging layer; above 1: no merging there.
        achieved, sd, min, max: image tokens that the calibration images kept; None where a file does not say.
        images, frames: the same per round of merging where an image, or a frame of a video, stands in the prompt; see
            `dymu.merging.in_prompt`. Empty where the family needs none.
        dial: budgets below this one, falling. Between them a lower budget never has an image keep more, since what
            reaches the last layer is the same. Empty where something merges behind the last layer.
    """

    budget: Positive
    thresholds: tuple[float, ...]
    achieved: float | None = None
    sd: float | None = None
    min: Count | None = None
    max: Count | None = None
    images: tuple[float, ...] = ()
    frames: tuple[float, ...] = ()
    dial: tuple[Dial, ...] = ()


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
        forecasts: what tells of a picture how many tokens it will keep, see `forecast`; None: too few images for it.
        model: the model's name or path at calibration.
        image_tokens: tokens of an untouched image, on average over the calibration images, where images are cut into
            tiles or have sizes of their own; None: every image is one picture, and all have as many.
        images: how many calibration images there were.
        skipped: images that could not be used: `{"image": ..., "why": ...}`.
        created: ISO 8601 date; dymu: version of this library.
        version: of the file format; files of an older one keep theirs.

    Raises:
        ValueError: two entries of one budget, entries of different lengths, `merge_layers` that no threshold is for,
            or forecasts for other budgets.
    """

    calibrated: Annotated[tuple[Calibrated, ...], msgspec.Meta(min_length=1)]
    encoder: Encoder | None = None
    schedule: str = ""
    merge_layers: Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)] | None = None
    over_time: tuple[OverTime, ...] = ()
    forecasts: Forecasts | None = None
    model: str = ""
    image_tokens: Positive | None = None
    images: Count | None = None
    skipped: tuple[dict[str, str], ...] = ()
    created: str = ""
    dymu: str = ""
    version: Annotated[int, msgspec.Meta(ge=1, le=VERSION)] = VERSION

    def __post_init__(self) -> None:
        in_order = tuple(sorted(self.calibrated, key=lambda entry: entry.budget))
        msgspec.structs.force_setattr(self, "calibrated", in_order)
        depths = {len(entry.thresholds) for entry in in_order}
        for entry in in_order:
            falling = [entry.budget, *(dial.budget for dial in entry.dial)]
            if any(lower >= upper for upper, lower in pairwise(falling)):
                raise ValueError(f"the dial of the budget {entry.budget:g} does not fall")
            marks = [min(entry.thresholds[-1], 1.0) if entry.thresholds else 1.0, *(d.threshold for d in entry.dial)]
            if entry.dial and any(not -2 <= lower <= upper for upper, lower in pairwise(marks)):
                raise ValueError(f"the thresholds on the dial of the budget {entry.budget:g} do not fall")
        for lower, upper in pairwise(in_order):
            if lower.budget == upper.budget:
                raise ValueError(f"two entries in `calibrated` have the budget {upper.budget:g}")
        if len({(len(entry.images), len(entry.frames)) for entry in in_order}) != 1:
            raise ValueError("every budget in `calibrated` needs as many rounds of merging in the prompt")
        if len(depths) != 1 or depths == {0} or (self.encoder is not None and depths != {self.encoder.depth}):
            raise ValueError("every budget in `calibrated` needs one threshold per merging layer")
        if max(self.merge_layers or (0,)) >= max(depths):
            raise ValueError(f"`merge_layers` are {list(self.merge_layers or ())}, not some of 0 to {max(depths) - 1}")
        if self.forecasts is not None and [entry.budget for entry in self.forecasts.budgets] != self.budgets:
            raise ValueError("`forecasts` need one entry for every budget in `calibrated`")

    @cached_property
    def source(self) -> str:
        """The file or repository they were loaded from, for messages; copied with them, neither saved nor compared."""
        return ""

    @property
    def full(self) -> float | None:
        """Tokens of an untouched image, on average over those of calibration; None where a file does not say."""
        return self.image_tokens or (None if self.encoder is None else float(self.encoder.tokens)) or None

    @property
    def budgets(self) -> list[float]:
        """The calibrated budgets in image tokens, smallest first."""
        return [entry.budget for entry in self.calibrated]

    def tokens_for(self, budget: int | float | None, nearest: bool = False) -> float:
        """A budget in image tokens: an int or a number above 1 is one already, 0.15 is a fraction of the full count.

        Where images have different numbers of tokens (tiles, native resolution), it is the mean over images like those
        of calibration: others keep about the same fraction of theirs.

        Args:
            nearest: whether one outside the calibrated range is the nearest in it.

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
        if not (nearest and tokens > 0) and not lowest - 0.5 <= tokens <= highest + 0.5:
            asked = f"a budget of {budget:g} ({tokens:g} image tokens)"
            why = f"is outside {span}, the range of {self}; choose one within"
            if lowest == highest:
                why = f"is not {span}, the only one of {self}; choose that"
            raise BadBudget(f"{asked} {why}, or calibrate for it (dymu calibrate -b).")
        return min(max(tokens, lowest), highest)

    def per_layer(self, budget: int | float | None = None) -> list[float]:
        """One similarity per merging encoder layer.

        Calibrated budgets are met, and so are those on the dial of the next higher one. Others are interpolated over
        the logarithm of the budgets around: between two whose ratio is at most `CLOSE` the average strays by some 3 %,
        between others by more, of which a warning tells.

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
        below, above, part = _around([math.log(budget) for budget in self.budgets], math.log(tokens))
        lower, upper = self.calibrated[below], self.calibrated[above]
        if lower is upper:
            return upper
        if upper.dial and tokens >= upper.dial[-1].budget:
            return _on_dial(upper, tokens)
        if upper.dial:
            upper = _on_dial(upper, upper.dial[-1].budget)
            _, _, part = _around([math.log(lower.budget), math.log(upper.budget)], math.log(tokens))
        if upper.budget - lower.budget > max((CLOSE - 1) * lower.budget, FEW):
            warnings.warn(
                f"a budget of {tokens:g} tokens lies between {lower.budget:g} and {upper.budget:g}, the next that "
                f"{self} was calibrated for, which is far: images may keep another number on average; calibrate for "
                "it, or without naming budgets for all.",
                stacklevel=2,
            )

        def between(low: tuple[float, ...], high: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(_between(*pair, part) for pair in zip(low, high, strict=True))

        return Calibrated(
            budget=tokens,
            thresholds=between(lower.thresholds, upper.thresholds),
            images=between(lower.images, upper.images),
            frames=between(lower.frames, upper.frames),
        )

    def forecast(self, image: Any, budget: int | float | None = None, *, tokens: Any = None) -> Forecast:
        """How many image tokens a picture will keep, told from its pixels before any encoder runs.

        Tokens are those that budgets count: newlines and other tokens that stand for themselves come on top.

        Args:
            image: a path, an image of Pillow, an array, bytes or a row of a data set, as `dymu.media.images.load` takes
                it.
            budget: see `tokens_for`; between two calibrated budgets the forecasts are interpolated.
            tokens: image tokens of this picture with nothing merged, or the model's processor, which counts them.
                Needed where images differ in that (tiles, native resolution). A processor counts newlines and marks of
                tiles, too, which puts forecasts some percent too high.

        Raises:
            BadImage: the picture cannot be read.
            BadBudget: see `tokens_for`.
            BadThresholds: they hold no forecasts, or such of another version of dymu.
            DymuError: `tokens` are missing, or neither a number above 0 nor a processor that counts.
        """
        from dymu.forecast import LOG_TOKENS
        from dymu.media.features import NAMES, features
        from dymu.media.images import load

        again = "calibrate again with at least 20 images (dymu calibrate)"
        if self.forecasts is None:
            raise BadThresholds(f"{self} holds no forecasts of what a picture keeps; {again}.")
        if self.forecasts.features != (*NAMES, LOG_TOKENS):
            raise BadThresholds(f"{self} holds forecasts from features that this dymu does not measure; {again}.")
        entry = self.at(budget)
        pixels = load(image).image
        most = self._untouched(tokens, pixels.size)
        merging = sum(threshold <= 1 for threshold in (*entry.thresholds, *entry.images))
        if self.image_tokens is None:
            least = fewest_of_any(most, merging)
        else:  # of its tiles and windows nothing is known here
            least = 1 if merging else most
        mean, reserve = self.forecasts.at((*features(pixels), math.log(most)), entry.budget)
        return Forecast(
            expected=min(max(mean * most, float(least)), float(most)),
            reserve=min(max(math.ceil(reserve * most), least), most),
            least=least,
            most=most,
        )

    def _untouched(self, tokens: Any, size: tuple[int, int]) -> int:
        """Tokens of a picture of a size (width, height) with nothing merged, see `forecast`."""
        if tokens is None and self.image_tokens is None and self.encoder is not None:
            return self.encoder.tokens
        if tokens is None:
            raise DymuError(
                f"by {self} images differ in how many tokens they have: give tokens=, those of this one or the model's "
                "processor, which counts them."
            )
        if count := getattr(tokens, "_get_num_multimodal_tokens", None):
            (tokens,) = count(image_sizes=[size[::-1]])["num_image_tokens"]
        if isinstance(tokens, bool) or not isinstance(tokens, numbers.Integral) or tokens < 1:
            raise DymuError(
                f"tokens are a whole number of at least 1, or a processor of transformers that counts those of an "
                f"image, not {tokens!r}."
            )
        return int(tokens)

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

    def check_fits(self, encoder: Encoder, cuts_images: bool = False, prefix: int = 0) -> None:
        """Refuse a model with another encoder; the number of tokens (the image size) may differ.

        Args:
            encoder: the model's.
            cuts_images: whether its family cuts images into tiles, so that a budget is of something else.
            prefix: tokens of a picture ahead of those that merge: class token and registers.

        Raises:
            BadThresholds: naming what differs.
        """
        if prefix and self.version == 1:
            raise BadThresholds(
                f"{self} was calibrated with an older pairing of tokens, which did not count the {prefix} ahead of the "
                "image's own; calibrate again with `dymu calibrate`."
            )
        if self.encoder is None:
            counts = {len(entry.thresholds) for entry in self.calibrated}
            if not counts <= {encoder.depth, encoder.layers}:
                raise BadThresholds(
                    f"{self} has thresholds for {max(counts)} layers, but the {encoder.model_type} encoder "
                    f"of the model merges in {encoder.depth} of {encoder.layers}; use the thresholds of this encoder."
                )
            return
        # Of an image that is one picture the mean stands in both, where images differ.
        one_picture = self.image_tokens is None or round(self.image_tokens) == self.encoder.tokens
        if self.image_tokens is None if cuts_images else not one_picture:
            ways = ("of one picture each", "cut into tiles")
            raise BadThresholds(
                f"{self} was calibrated on images {ways[not cuts_images]}, and this model's are {ways[cuts_images]}, "
                "so that its budgets mean something else; calibrate for this model with `dymu calibrate`."
            )
        differing = [
            f"{name.replace('_', ' ')} {getattr(self.encoder, name)} instead of {getattr(encoder, name)}"
            for name in ("model_type", "layers", "depth", "hidden_size", "heads", "unit")
            if getattr(self.encoder, name) != getattr(encoder, name)
        ]
        if differing:
            raise BadThresholds(
                f"{self} belongs to another vision encoder ({', '.join(differing)}); "
                "calibrate for this model with `dymu calibrate`."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, whole or not at all; bytes of names that are no UTF-8 are written as escapes.

        Raises:
            BadThresholds: `load` would refuse it.
            BadOutput: the file cannot be written.
        """
        text = self._encoded(f"saved as {path}")
        with whole_file(path) as partial:
            partial.write_bytes(text)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, **options: Any
    ) -> str:
        """Upload as `thresholds.json` to a model's repository on the Hugging Face Hub, which is created if it is not
        there.

        Args:
            repo_id: `owner/name`.
            private, token: see `huggingface_hub.create_repo`.
            options: see `huggingface_hub.upload_file`, such as `revision`, `commit_message` and `create_pr`.

        Returns:
            The address of the commit.

        Raises:
            BadThresholds: `load` would refuse them.
            BadOutput: the hub does not take them.
        """
        import huggingface_hub

        text = self._encoded(f"uploaded to {repo_id}")
        try:
            huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
            commit = huggingface_hub.upload_file(
                path_or_fileobj=text, path_in_repo=FILE_NAME, repo_id=repo_id, token=token, **options
            )
        except Exception as error:  # the hub's client raises its own, and those of what it stands on
            raise BadOutput(
                f"{self} cannot be uploaded to {repo_id} ({_why(error)}); check the name, the connection and "
                "`hf auth login`."
            ) from error
        return str(commit.commit_url)

    def _encoded(self, goal: str) -> bytes:
        """As JSON that `load` takes."""
        body = escaped({"format": FORMAT, "version": self.version} | msgspec.to_builtins(self))
        what, then = f"{self} cannot be {goal}", "correct that, or calibrate again."
        try:
            text = json.dumps(body, indent=2, allow_nan=False).encode() + b"\n"
        except ValueError as error:
            raise BadThresholds(f"{what} (a number in it is NaN or infinite); {then}") from error
        decoded(text, Thresholds, BadThresholds, what, then)
        return text

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, revision: str | None = None) -> Thresholds:
        """Read a JSON file, or the thresholds within one of the authors' `.pth` encoder checkpoints.

        Args:
            path: the file; the folder of a model, or a repository on the Hugging Face Hub (`owner/name`), with a
                `thresholds.json` in it.
            revision: of the repository: a branch, tag or commit.

        Raises:
            BadThresholds: the file is missing, damaged, of another format or of a newer version.
        """
        if not isinstance(path, str | os.PathLike):
            raise BadThresholds(
                f"thresholds are a dymu.Thresholds, a file, a model's folder or a hub name, not {type(path).__name__}."
            )
        source = _located(path, "name a file, or", revision) or expanded(path)
        if source.exists() and not source.is_file():
            raise BadThresholds(f"{path} is no ordinary file, so it holds no thresholds: name a file.")
        return _load(path, source)

    def __str__(self) -> str:
        return f"the thresholds file {self.source}" if self.source else "this set of thresholds"

    def __repr__(self) -> str:
        encoder = self.encoder and f"{self.encoder.model_type} of {self.encoder.layers} layers"
        budgets = ", ".join(f"{budget:g}" for budget in self.budgets)
        return f"<Thresholds for {budgets} image tokens, {encoder or 'no encoder named'}, {self.source or 'not saved'}>"

    def __copy__(self) -> Thresholds:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), msgspec.structs.astuple(self), {"source": self.source}


class _Header(msgspec.Struct, tag_field="format", tag=FORMAT):
    """What tells a thresholds file from other JSON, and its version."""

    version: Annotated[int, msgspec.Meta(ge=1, le=2**31)]


def beside(model: str, option: str, revision: str | None = None) -> Thresholds:
    """The thresholds in a model's folder or hub repository.

    Args:
        model: the folder or hub name, such as `model.config._name_or_path`; empty for a model that has neither.
        option: how the user names others, for the message.
        revision: of the repository.

    Raises:
        BadThresholds: there are none, or the file is damaged.
    """
    instead = f"name one with {option}, or"
    path = _located(model, instead, revision) if model else None
    if path is None:
        raise BadThresholds(_none_in(model, "", instead))
    return _load(model, path)


def number(value: Any, what: str = "a budget is a number of tokens or a fraction of them") -> int | float:
    """A number of any library's type as one of Python's own, which JSON can hold.

    Raises:
        BadBudget: it is none; a sentence that begins with `what`.
    """
    try:
        value = value.item() if hasattr(value, "item") else value  # of NumPy and PyTorch
        if isinstance(value, bool | str | bytes | bytearray | memoryview):
            raise TypeError
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # the last two from arrays of several, and huge ones
        raise BadBudget(f"{what}, not {value!r}.") from None


def _is_hub_name(path: str | os.PathLike[str]) -> bool:
    """Whether it has the form `owner/name`, and nothing here is called that."""
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", os.fspath(path), re.ASCII)
    return bool(named) and not str(path).lower().endswith((".json", *_CHECKPOINTS)) and not os.path.lexists(path)


def _located(path: str | os.PathLike[str], instead: str, revision: str | None) -> Path | None:
    """The thresholds file in a folder or a hub repository; None where `path` is neither.

    Raises:
        BadThresholds: there is none in it.
    """
    if os.path.isdir(folder := expanded(path)):
        if not (folder / FILE_NAME).is_file():
            raise BadThresholds(_none_in(path, "", instead))
        return folder / FILE_NAME
    if not _is_hub_name(path):
        return None
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(str(path), FILE_NAME, revision=revision))
    except Exception as error:  # the hub's client raises its own, and those of what it stands on
        raise BadThresholds(_none_in(path, f" (it is no folder here, and {_why(error)})", instead)) from error


def _none_in(model: str | os.PathLike[str], why: str, instead: str) -> str:
    return (
        f"{model or 'this model'} ships no {FILE_NAME}{why}: {instead} make it with "
        f"`dymu calibrate {model or 'MODEL'} IMAGES... -b 0.3 -o {FILE_NAME}`."
    )


def _why(error: Exception) -> str:
    """What the hub's client means."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | ConnectionError):
        return "the hub cannot be reached, nor has its cache here any"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository, or does not show it to you"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.EntryNotFoundError):
        return "the repository has no such file"
    return first_line(error).rstrip(".:")


def _load(name: str | os.PathLike[str], path: Path) -> Thresholds:
    """The thresholds in a file, which was named so."""
    loaded = _from_checkpoint(path) if path.suffix.lower() in _CHECKPOINTS else _from_json(path)
    loaded.__dict__["source"] = str(name if _is_hub_name(name) else path)
    return loaded


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


def _on_dial(entry: Calibrated, tokens: float) -> Calibrated:
    """The entry with the threshold of its last layer for so many tokens."""
    *before, last = entry.thresholds
    rising = [*reversed(entry.dial), Dial(entry.budget, last)]
    below, above, part = _around([dial.budget for dial in rising], tokens)
    threshold = _between(rising[below].threshold, rising[above].threshold, part)
    return Calibrated(tokens, (*before, threshold), images=entry.images, frames=entry.frames)


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch speaks to its authors of what it has not seen before
            state = torch.load(source, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        by_name = ((re.search(r"(\d+)\.threshold$", str(name)), value) for name, value in state.items())
        by_layer = sorted((int(layer[1]), float(value)) for layer, value in by_name if layer)
    except Exception as error:  # on damaged bytes torch raises whatever it stumbles over
        raise BadThresholds(
            f"cannot read {source} as a checkpoint of tensors ({first_line(error)}); "
            "nothing in it was executed: check that it is one of the authors' encoder checkpoints."
        ) from error
    layers, values = zip(*by_layer, strict=True) if by_layer else ((), ())
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
