"""Sample images -> Thresholds: at which similarity tokens merge so that a wanted number of them stays on average."""

from __future__ import annotations

import numbers
import operator
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from dymu import __version__
from dymu.apply import encoder_of, name_of
from dymu.errors import BadBudget, BadImage, DymuError
from dymu.families import FAMILIES, Parts, resolve
from dymu.images import load
from dymu.merging import SCHEDULES, EncoderLayer, MergedTokens, Schedule, above, removals
from dymu.shelf import Place, Shelf
from dymu.thresholds import Calibrated, Thresholds

ImageSource = str | os.PathLike[str] | Image.Image

NEVER = 2.0
"""A threshold that no cosine reaches."""

TOLERANCE = 0.005
"""Part of a budget by which the achieved average may miss it before a warning says so."""


def calibrate(
    model: nn.Module,
    processor: Any,
    images: Iterable[ImageSource],
    budgets: Iterable[int | float],
    *,
    schedule: Schedule = "reverse_linear",
    merge_layers: Iterable[int] | None = None,
    batch_size: int = 8,
    memory_limit_bytes: int = 2 * 2**30,
    progress: bool = True,
) -> Thresholds:
    """Find the thresholds at which a model keeps the wanted number of tokens on sample images.

    It goes layer by layer (paper section 3.1 averages per-batch thresholds instead, and misses its budgets): all
    images' tokens wait at layer l, its threshold is put where exactly as many edges of all images lie above it as the
    schedule asks for, they merge, and all go on to layer l + 1. So each budget is met on these images but for ties,
    and on others of their kind but for chance. It costs one forward pass of the merging layers per budget, of which
    the embedding and the first attention are shared.

    Args:
        model: a transformers model of a described family, with or without DyMU applied; it is not changed.
        processor: the model's processor or image processor.
        images: paths or PIL images, gone through once. What cannot be read is skipped, and named in a warning.
        budgets: image tokens (class token and registers not counted) to keep on average; a float up to 1 is a fraction
            of all of them, rounded to whole tokens.
        schedule: where to merge: `constant`, `linear` or `reverse_linear` (more in later layers; the paper's choice).
        merge_layers: indices of the encoder layers that merge, at the same budgets; None: all. Fewer merges cost
            less time but each takes more tokens at once, see docs/encoder.md.
        batch_size: images that go through a layer together; but for rounding, the thresholds do not depend on it.
        memory_limit_bytes: hidden states beyond so many bytes wait in a temporary file, see `Shelf`. An image takes
            tokens * width * bytes per number, twice that where there are several budgets.
        progress: show a bar on stderr, if that is a terminal.

    Raises:
        UnsupportedModel: the model is of no described family.
        BadBudget: a budget is no number, above the number of tokens, or below what halving them in every layer leaves.
        DymuError: no image could be used, the processor does not make one picture of one size of each, or the model
            has no such `merge_layers` or does not read them.
        ValueError: an unknown `schedule`, no `budgets`, or a `batch_size` below 1.
    """
    wanted = [_number(budget) for budget in budgets]
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if not wanted or batch_size < 1:
        raise ValueError("calibrate needs at least one budget, and a batch_size of at least 1")
    parts = resolve(model, FAMILIES)
    prefix, depth = max(parts.prefix, parts.dropped()), max(parts.feature_layers())
    if depth == 0:
        raise DymuError("this model reads its image features ahead of the first encoder layer, so no layer can merge.")
    merging_layers = _indices(range(depth) if merge_layers is None else merge_layers, depth)
    pictures = _Pictures(getattr(processor, "image_processor", processor), images)
    batches: list[_Batch] = []
    tokens, targets = 0, list[int | float]()
    with ExitStack() as opened:
        opened.enter_context(torch.inference_mode())
        bar = opened.enter_context(_bar(progress))
        shelf = opened.enter_context(Shelf(memory_limit_bytes))
        run = _Run(parts.encoder_layers[:depth], merging_layers, prefix)

        reading = bar.add_task("reading images", total=pictures.expected)
        for pixels in pictures.batches(batch_size, lambda: bar.advance(reading)):
            embedded = _embed(parts, pixels)
            if not batches:
                tokens = embedded.shape[1] - prefix
                targets = _targets(wanted, tokens, depth, schedule, merging_layers)
            batches.append(run.begin(embedded, shelf.place(embedded.nbytes)))
        if not batches:
            raise DymuError(f"no image could be used for calibration: {pictures.why_none()}")

        merging = [target for target in targets if target < tokens]
        own = [batch.place for batch in batches]
        if len(merging) > 1:
            spare = [shelf.place(place.capacity_bytes) for place in own]
        calibrated = []
        for target in merging:
            task = bar.add_task(f"budget {target:g}", total=(depth - 1) * len(batches))
            calibrated.append(
                run.calibrated(
                    target,
                    removals(tokens, target, depth, schedule, merging_layers),
                    batches,
                    own if target == merging[-1] else spare,
                    lambda task=task: bar.advance(task),  # type: ignore[misc]
                )
            )
        if targets[-1] == tokens:
            calibrated.append(Calibrated(tokens, (NEVER,) * depth, tokens, 0.0, tokens, tokens))

    _warn(pictures, calibrated)
    return Thresholds(
        calibrated=tuple(calibrated),
        encoder=encoder_of(parts, tokens),
        schedule=schedule,
        merge_layers=None if merge_layers is None else merging_layers,
        model=name_of(model),
        images=pictures.used,
        skipped=tuple(pictures.skipped),
        created=datetime.now(UTC).date().isoformat(),
        dymu=__version__,
    )


@dataclass(frozen=True)
class _Batch:
    """Some images between the attention of a layer and its merging."""

    place: Place
    """Holds their tokens, in the state's layout."""
    state: MergedTokens
    similarity: Tensor
    """[B, A] of each A token to its best partner, -inf where a row has no such token; see `best_partner`. [B, 0] where
    the layer does not merge."""
    partner: Tensor


class _Run:
    """All images on their way through the encoder, layer by layer, by the arithmetic of inference."""

    def __init__(self, layers: Sequence[EncoderLayer], merging: Collection[int], prefix: int) -> None:
        self._layers, self._merging, self._prefix = layers, merging, prefix

    def begin(self, embedded: Tensor, place: Place) -> _Batch:
        """Embedded images [B, T, C] through the first attention."""
        return self._attend(0, embedded, MergedTokens.unmerged(embedded), place)

    def calibrated(
        self,
        budget: int | float,
        removed: Sequence[float],
        batches: Sequence[_Batch],
        places: Sequence[Place],
        advance: Callable[[], object],
    ) -> Calibrated:
        """Find the thresholds at which layer l removes `removed[l]` tokens per image, and run the images through.

        Args:
            budget: what the result is for.
            removed: one number per layer.
            batches: from `begin`; not changed, but for the places they share with `places`.
            places: where each batch may keep its tokens from here on.
            advance: called when a batch has gone through a layer.
        """
        images = sum(batch.state.map.batch for batch in batches)
        thresholds: list[float] = []
        wanted, merged = 0.0, 0
        for index, removed_here in enumerate(removed):
            wanted += images * removed_here  # what earlier layers could not remove is still among it
            edges = torch.cat([batch.similarity.flatten() for batch in batches])
            threshold, count = threshold_for(edges[edges.isfinite()], round(wanted) - merged)
            thresholds.append(threshold)
            merged += count
            if index + 1 < len(removed):
                onward = []
                for batch, place in zip(batches, places, strict=True):
                    onward.append(self._next(index, batch, threshold, place))
                    advance()
                batches = onward
        kept = torch.cat([b.state.map.kept - self._prefix - (b.similarity > thresholds[-1]).sum(1) for b in batches])
        achieved, sd = int(kept.sum()) / images, kept.double().std(correction=0).item()
        return Calibrated(budget, tuple(thresholds), achieved, sd, int(kept.min()), int(kept.max()))

    def _next(self, index: int, batch: _Batch, threshold: float, place: Place) -> _Batch:
        """Merge, finish layer `index` and go through the next one's attention."""
        x, state = batch.place.get().to(batch.similarity.device), batch.state
        if threshold <= 1:
            x, state = state.merge(x, above(threshold, batch.similarity, batch.partner), self._prefix)
        return self._attend(index + 1, self._layers[index].feed_forward(x), state, place)

    def _attend(self, index: int, x: Tensor, state: MergedTokens, place: Place) -> _Batch:
        x, keys = self._layers[index].attend(x, state)
        if index in self._merging:
            similarity, partner = state.match(keys, self._prefix)
        else:
            similarity, partner = keys.new_empty(state.map.batch, 0), state.layout.length.new_empty(state.map.batch, 0)
        place.put(x)
        return _Batch(place, state, similarity, partner)


def threshold_for(edges: Tensor, count: int) -> tuple[float, int]:
    """The threshold that `count` of `edges` (similarities, [E]) lie above, and how many really do.

    It is the middle between the last edge that merges and the first that does not (or the end of the cosine's range),
    as a number that float32 holds. Where equal edges leave no place for it, the nearest count that has one is taken.
    """
    edges = edges.double().sort(descending=True).values
    if len(edges) == 0:
        return NEVER, 0
    count = min(max(count, 0), len(edges))
    if count:
        above, at_least = int((edges > edges[count - 1]).sum()), int((edges >= edges[count - 1]).sum())
        count = at_least if at_least - count < count - above else (count if at_least == count else above)
    last = edges[count - 1].item() if count else max(1.0, edges[0].item() + 1e-6)
    first = edges[count].item() if count < len(edges) else min(-1.0, edges[-1].item() - 1e-6)
    middle = torch.tensor((last + first) / 2, dtype=torch.float32).item()
    return (middle if first <= middle < last else first), count


class _Stop(Exception):
    """Ends a vision encoder's forward at its first layer."""


def _embed(parts: Parts, pixels: Tensor) -> Tensor:
    """What the first encoder layer would be given, [B, T, C], for pictures [B, 3, height, width].

    The encoder itself is run and stopped there, so that its way of embedding need not be known.
    """
    taken: list[Tensor] = []

    def take(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    parameter = next(parts.tower.parameters())
    hook = parts.encoder_modules[0].register_forward_pre_hook(take, with_kwargs=True)
    try:
        parts.tower(pixels.to(parameter.device, parameter.dtype))
    except _Stop:
        pass
    finally:
        hook.remove()
    return taken[0]


class _Pictures:
    """Sample images on their way to pixels; gone through once.

    Attributes:
        expected: how many there are, if that is known ahead.
        used: how many could be used so far.
        skipped: those that could not, and why.
    """

    def __init__(self, image_processor: Any, images: Iterable[ImageSource]) -> None:
        if isinstance(images, str | os.PathLike | Image.Image):
            images = [images]
        self._processor, self._images = image_processor, images
        self._size: torch.Size | None = None
        self.expected = len(images) if isinstance(images, Sized) else None
        self.used = 0
        self.skipped: list[dict[str, str]] = []

    def batches(self, size: int, advance: Callable[[], object]) -> Iterator[Tensor]:
        """Pixels [B, 3, height, width], as the processor gives them; `advance` is called after each image."""
        waiting: list[Tensor] = []
        for number, source in enumerate(self._images, 1):
            pixels = self._pixels(source, number)
            advance()
            if pixels is not None:
                self.used += 1
                waiting.append(pixels)
            if len(waiting) == size:
                yield torch.cat(waiting)
                waiting = []
        if waiting:
            yield torch.cat(waiting)

    def _pixels(self, source: ImageSource, number: int) -> Tensor | None:
        """[1, 3, height, width], or None where the image cannot be read."""
        name = getattr(source, "filename", "") or f"image {number}" if isinstance(source, Image.Image) else str(source)
        try:
            image = load(source if isinstance(source, Image.Image) else Path(source)).image
        except BadImage as error:
            self.skipped.append({"image": name, "why": str(error).removeprefix(f"{name} ")})
            return None
        pixels = self._processor(images=[image], return_tensors="pt")["pixel_values"]
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or len(pixels) != 1:
            raise DymuError(
                "the image processor cuts images into several pictures, which calibration does not know yet; "
                "switch that off in the processor."
            )
        self._size = self._size or pixels.shape[2:]
        if pixels.shape[2:] != self._size:
            raise DymuError(
                f"the image processor makes pictures of different sizes ({_by(self._size)} and {_by(pixels.shape[2:])} "
                "pixels), which calibration does not know yet; set it to one size."
            )
        return pixels

    def why_none(self) -> str:
        """For an error: why there is nothing to calibrate on."""
        if not self.skipped:
            return "none was given; give paths or PIL images."
        first = self.skipped[0]
        return f"all {len(self.skipped)} were skipped, the first because {first['image']} {first['why']}"


def _by(size: torch.Size) -> str:
    return f"{size[1]} × {size[0]}"


def _number(budget: Any) -> int | float:
    """A budget as a number of Python's own, which JSON can hold.

    Raises:
        BadBudget: it is none.
    """
    if isinstance(budget, bool) or not hasattr(budget, "__float__"):
        raise BadBudget(f"a budget is a number of tokens or a fraction of them, not {budget!r}.")
    return int(budget) if isinstance(budget, numbers.Integral) else float(budget)


def _indices(layers: Iterable[int], depth: int) -> tuple[int, ...]:
    """The layers to merge in, each once, in rising order.

    Raises:
        DymuError: they are not some of the first `depth` layers.
    """
    given = list(layers)
    try:
        found = sorted({operator.index(layer) for layer in given})
    except TypeError:
        found = []
    if not found or not 0 <= found[0] <= found[-1] < depth:
        raise DymuError(
            f"the layers to merge in, {found or given}, are not some of the layers 0 to {depth - 1} that feed "
            "this model; name some of those."
        )
    return tuple(found)


def _targets(
    budgets: Sequence[int | float], tokens: int, depth: int, schedule: Schedule, merging: Sequence[int]
) -> list[int | float]:
    """The budgets in tokens, each once, smallest first.

    Raises:
        BadBudget: one of them cannot be met.
    """
    targets = {
        round(budget * tokens) if isinstance(budget, float) and 0 < budget <= 1 else budget for budget in budgets
    }
    for target in targets:
        removals(tokens, target, depth, schedule, merging)
    return sorted(targets)


def _warn(pictures: _Pictures, calibrated: Sequence[Calibrated]) -> None:
    if pictures.skipped:
        total = len(pictures.skipped) + pictures.used
        named = "; ".join(f"{skipped['image']} {skipped['why']}" for skipped in pictures.skipped)
        warnings.warn(f"skipped {len(pictures.skipped)} of {total} images: {named}", stacklevel=3)
    for entry in calibrated:
        assert entry.achieved is not None
        if abs(entry.achieved - entry.budget) > max(TOLERANCE * entry.budget, 0.5 / pictures.used):
            warnings.warn(
                f"for a budget of {entry.budget:g} tokens the images keep {entry.achieved:.2f} on average: too many of "
                "their tokens are exactly alike, or too few are left to merge; calibrate on more varied images.",
                stacklevel=3,
            )


def _bar(wanted: bool) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal))
