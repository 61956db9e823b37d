"""Sample images -> Thresholds: at which similarity tokens merge so that a wanted number of them stays on average."""

from __future__ import annotations

import inspect
import numbers
import operator
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate
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
from dymu.merging import SCHEDULES, MergedTokens, Schedule, above, merge_step, removals
from dymu.placed import Placed
from dymu.placement import features_of, grid, place
from dymu.settling import Standing
from dymu.shelf import Place, Shelf
from dymu.thresholds import Calibrated, Thresholds
from dymu.token_map import TokenMap

ImageSource = str | os.PathLike[str] | Image.Image

NEVER = 2.0
"""A threshold that no cosine reaches."""

ROUNDS = 6
"""Of merging where tokens stand in the prompt; each takes about a quarter where nine in ten are to go."""

TRIES = 4
"""At a budget for images whose tiles are partly padding."""

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
    samples = _Samples(getattr(processor, "image_processor", processor), images, parts)
    batches: list[_Batch] = []
    with ExitStack() as opened:
        opened.enter_context(torch.inference_mode())
        bar = opened.enter_context(_bar(progress))
        shelf = opened.enter_context(Shelf(memory_limit_bytes))
        run = _Run(parts, merging_layers, prefix)

        def spread(layout: _Layout, keep: float) -> list[float]:
            return removals(layout.tokens, keep, depth, schedule, merging_layers)

        def possible(layout: _Layout) -> list[int | float]:
            targets = layout.targets(wanted)
            for target in targets:
                spread(layout, layout.per_picture(target))
            return targets

        reading = bar.add_task("reading images", total=samples.expected)
        for embedded, inputs in samples.batches(batch_size, lambda: bar.advance(reading)):
            batches.append(run.begin(embedded, inputs, shelf.place(embedded.nbytes)))
            if len(batches) == 1 and (first := run.layout(batches)).plain:
                possible(first)  # so that what cannot be met is refused before all are read
        if not batches:
            raise DymuError(f"no image could be used for calibration: {samples.why_none()}")
        layout = run.layout(batches)
        targets = possible(layout)

        merging = [target for target in targets if target < layout.full]
        own = [batch.place for batch in batches]
        if len(merging) > 1 or not layout.plain:
            spare = [shelf.place(place.capacity_bytes) for place in own]
        calibrated = []
        for target in merging:
            aim = layout.per_picture(target)
            for _ in range(TRIES):
                task = bar.add_task(f"budget {target:g}", total=(depth - 1) * len(batches))
                thresholds, ended = run.thresholds(
                    spread(layout, aim),
                    batches,
                    own if layout.plain and target == merging[-1] else spare,
                    lambda task=task: bar.advance(task),  # type: ignore[misc]
                )
                found = run.calibrated(target, thresholds, ended, layout, shelf)
                achieved = found.achieved or 0.0
                if layout.plain or layout.mixes or abs(achieved - target) <= TOLERANCE * target:
                    break
                # Merged tokens of a tile may show nothing but padding, which the language model never gets.
                aim = min(max(aim * target / achieved, layout.tokens / 2 ** len(merging_layers)), layout.tokens)
            calibrated.append(found)
        if len(merging) < len(targets):
            calibrated.append(layout.untouched(depth))

    _warn(samples, calibrated)
    return Thresholds(
        calibrated=tuple(calibrated),
        encoder=encoder_of(parts, layout.tokens),
        schedule=schedule,
        merge_layers=None if merge_layers is None else merging_layers,
        model=name_of(model),
        image_tokens=None if layout.plain else layout.full,
        images=samples.used,
        skipped=tuple(samples.skipped),
        created=datetime.now(UTC).date().isoformat(),
        dymu=__version__,
    )


@dataclass(frozen=True)
class _Layout:
    """How the sample images lie in the prompt.

    Attributes:
        tokens: patches of one picture.
        counts: patches of every image, as the language model gets them.
        plain: whether every image is one picture.
        mixes: whether some images are shrunk, see `dymu.placed.Placed.mixes`.
        videos: whether the family takes videos that can be followed.
    """

    tokens: int
    counts: list[int]
    plain: bool
    mixes: bool
    videos: bool

    @property
    def full(self) -> float:
        """Tokens of an untouched image, on average."""
        return self.tokens if self.plain else sum(self.counts) / len(self.counts)

    def targets(self, budgets: Sequence[int | float]) -> list[int | float]:
        """The budgets in tokens, each once, smallest first.

        Raises:
            BadBudget: one is more than there are.
        """
        targets = {
            min(round(budget * self.full), self.full) if isinstance(budget, float) and 0 < budget <= 1 else budget
            for budget in budgets
        }
        if not self.plain and max(targets) > self.full:
            raise BadBudget(
                f"cannot keep {max(targets):g} tokens of images that have {self.full:.1f} on average; take fewer."
            )
        return sorted(targets)

    def per_picture(self, target: float) -> float:
        """Of `target` tokens of an image, those of one picture."""
        return target if self.plain else self.tokens * target / self.full

    def untouched(self, depth: int) -> Calibrated:
        """What keeps every token."""
        never = (NEVER,) * ROUNDS
        return _calibrated(self.full, (NEVER,) * depth, self.counts, never * self.mixes, never * self.videos)


def _calibrated(
    target: float,
    thresholds: Sequence[float],
    kept: Sequence[int],
    images: tuple[float, ...],
    frames: tuple[float, ...],
) -> Calibrated:
    counts = torch.tensor(kept)
    return Calibrated(
        budget=target,
        thresholds=tuple(thresholds),
        achieved=int(counts.sum()) / len(kept),
        sd=counts.double().std(correction=0).item(),
        min=int(counts.min()),
        max=int(counts.max()),
        images=images,
        frames=frames,
    )


@dataclass(frozen=True)
class _Inputs:
    """What the model's `get_image_features` takes for one image, without its pixels, and its number of pictures."""

    given: dict[str, Any]
    pictures: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every picture."""
        height, width = self.given["pixel_values"].shape[-2:]
        return height, width


@dataclass(frozen=True)
class _Batch:
    """The pictures of some images between the attention of a layer and its merging."""

    images: list[_Inputs]
    place: Place
    """Holds their tokens, in the state's layout."""
    state: MergedTokens
    similarity: Tensor
    """[B, A] of each A token to its best partner, -inf where a row has no such token; see `best_partner`. [B, 0] where
    the layer does not merge."""
    partner: Tensor


class _Run:
    """All images on their way through the encoder, layer by layer, by the arithmetic of inference."""

    def __init__(self, parts: Parts, merging: Collection[int], prefix: int) -> None:
        self._parts, self._merging, self._prefix = parts, merging, prefix
        self._layers = parts.encoder_layers[: max(parts.feature_layers())]

    def begin(self, embedded: Tensor, images: list[_Inputs], place: Place) -> _Batch:
        """The embedded pictures [B, T, C] of some images, through the first attention."""
        return self._attend(0, embedded, MergedTokens.unmerged(embedded), images, place)

    def thresholds(
        self,
        removed: Sequence[float],
        batches: Sequence[_Batch],
        places: Sequence[Place],
        advance: Callable[[], object],
    ) -> tuple[list[float], Sequence[_Batch]]:
        """Find the thresholds at which layer l removes `removed[l]` tokens per picture, and run the pictures through.

        Args:
            removed: one number per layer.
            batches: from `begin`; not changed, but for the places they share with `places`.
            places: where each batch may keep its tokens from here on.
            advance: called when a batch has gone through a layer.

        Returns:
            The thresholds, and the batches ahead of the last merging.
        """
        pictures = sum(batch.state.map.batch for batch in batches)
        thresholds: list[float] = []
        wanted, merged = 0.0, 0
        for index, removed_here in enumerate(removed):
            wanted += pictures * removed_here  # what earlier layers could not remove is still among it
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
        return thresholds, batches

    def calibrated(
        self, target: float, thresholds: Sequence[float], batches: Sequence[_Batch], layout: _Layout, shelf: Shelf
    ) -> Calibrated:
        """What the thresholds do to the images as they stand in the prompt, and the rounds that settle them there.

        Args:
            target: what it is for.
            thresholds, batches: from `thresholds`.
        """
        maps = [self._final_map(batch, thresholds[-1]) for batch in batches]
        items = [self.placed(batch, tokens) for batch, tokens in zip(batches, maps, strict=True)]
        kept = [item.budgeted for placed in items for item in placed]
        images: tuple[float, ...] = ()
        frames: tuple[float, ...] = ()
        if layout.mixes or layout.videos:
            hidden = [self._hidden(batch, thresholds[-1]) for batch in batches]
        if layout.mixes:
            standing = [
                _Shelved.put(Standing.of([item], [features]), shelf)
                for batch, tokens, states, placed in zip(batches, maps, hidden, items, strict=True)
                for item, features in zip(placed, self._features(batch, tokens, states), strict=True)
            ]
            images, standing = rounds(standing, round(target * len(kept)))
            kept = [image.standing.state.layout.total for image in standing]
        if layout.videos:
            standing, patches = [], 0
            for batch, tokens, states in zip(batches, maps, hidden, strict=True):
                given = {"pixel_values_videos": _hollow(len(batch.images), 1, 3, *batch.images[0].size)}
                first = torch.tensor([start for start, _ in _spans(batch.images)], device=states.device)
                tokens = TokenMap(tokens.group[first], tokens.kept[first], tokens.width)
                placed = place(
                    self._parts, "video", (), given, tokens, self._unseen(batch.images[0], len(first), tokens)
                )
                features = features_of(self._parts, "video", (), given, tokens, states[first])
                standing.append(_Shelved.put(Standing.of(placed, list(features)), shelf))
                patches += sum(int(item.patch.sum()) for item in placed)
            frames, _ = rounds(standing, round(target / layout.full * patches))
        return _calibrated(target, thresholds, kept, images, frames)

    def layout(self, batches: Sequence[_Batch]) -> _Layout:
        """How the images of unmerged batches lie in the prompt."""
        items = [item for batch in batches for item in self.placed(batch, batch.state.map)]
        tokens = batches[0].state.map.tokens - self._prefix
        counts = [item.budgeted for item in items]
        plain = all(item.pictures == 1 and count == tokens for item, count in zip(items, counts, strict=True))
        parts = self._parts
        # Features of several layers are not kept, and what settles frames needs them.
        videos = "video" in parts.placeholders and not parts.pools_with_weights and len(parts.feature_layers()) == 1
        return _Layout(tokens, counts, plain, any(item.mixes for item in items), videos)

    def placed(self, batch: _Batch, tokens: TokenMap) -> list[Placed]:
        """How the images lie in the prompt, once `tokens` of their pictures were merged."""
        items = []
        for image, (start, end) in zip(batch.images, _spans(batch.images), strict=True):
            own = TokenMap(tokens.group[start:end], tokens.kept[start:end], tokens.width)
            items += place(self._parts, "image", (), image.given, own, self._unseen(image, image.pictures, own))
        return items

    def _unseen(self, image: _Inputs, pictures: int, tokens: TokenMap) -> Tensor:
        """Colours of pictures that nobody will look at, [pictures, 3, rows, columns]."""
        rows, columns = grid(tokens.tokens - self._parts.prefix, *image.size)
        return torch.zeros(pictures, 3, rows, columns, device=tokens.group.device)

    def _features(self, batch: _Batch, tokens: TokenMap, hidden: Tensor) -> Iterator[Tensor]:
        """The features [N, C] of each image, of its pictures' merged tokens [B, M, C]."""
        for image, (start, end) in zip(batch.images, _spans(batch.images), strict=True):
            own = TokenMap(tokens.group[start:end], tokens.kept[start:end], tokens.width)
            yield from features_of(self._parts, "image", (), image.given, own, hidden[start:end])

    def _final_map(self, batch: _Batch, threshold: float) -> TokenMap:
        """Encoder tokens of each picture to those left after the last layer."""
        if threshold > 1:
            return batch.state.map
        step, _ = merge_step(above(threshold, batch.similarity, batch.partner), batch.state.layout, self._prefix)
        return replace(batch.state.map.then(step), padded=False)

    def _hidden(self, batch: _Batch, threshold: float) -> Tensor:
        """[B, M, C], the tokens left after the last layer."""
        x, state = self._merged(batch, threshold)
        return state.layout.pad(self._layers[-1].feed_forward(x))

    def _merged(self, batch: _Batch, threshold: float) -> tuple[Tensor, MergedTokens]:
        x, state = batch.place.get().to(batch.similarity.device), batch.state
        if threshold <= 1:
            x, state = state.merge(x, above(threshold, batch.similarity, batch.partner), self._prefix)
        return x, state

    def _next(self, index: int, batch: _Batch, threshold: float, place: Place) -> _Batch:
        """Merge, finish layer `index` and go through the next one's attention."""
        x, state = self._merged(batch, threshold)
        return self._attend(index + 1, self._layers[index].feed_forward(x), state, batch.images, place)

    def _attend(self, index: int, x: Tensor, state: MergedTokens, images: list[_Inputs], place: Place) -> _Batch:
        x, keys = self._layers[index].attend(x, state)
        if index in self._merging:
            similarity, partner = state.match(keys, self._prefix)
        else:
            similarity, partner = keys.new_empty(state.map.batch, 0), state.layout.length.new_empty(state.map.batch, 0)
        place.put(x)
        return _Batch(images, place, state, similarity, partner)


def _spans(images: Sequence[_Inputs]) -> list[tuple[int, int]]:
    """Where the pictures of each image begin and end."""
    ends = list(accumulate(image.pictures for image in images))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _hollow(*shape: int) -> Tensor:
    """What looks like pixels and takes no memory."""
    return torch.zeros((), dtype=torch.bool).expand(shape)


@dataclass(frozen=True)
class _Shelved:
    """Tokens that stand in the prompt and wait on a shelf."""

    standing: Standing
    place: Place

    @classmethod
    def put(cls, standing: Standing, shelf: Shelf) -> _Shelved:
        return cls(standing, shelf.place(standing.x.nbytes))._keep(standing)

    def _keep(self, standing: Standing) -> _Shelved:
        self.place.put(standing.x)
        return _Shelved(replace(standing, x=standing.x[:0]), self.place)

    def get(self) -> Standing:
        return replace(self.standing, x=self.place.get().to(self.standing.size.device))

    def merge(self, into: Tensor) -> _Shelved:
        return self._keep(self.get().merge(into))


def rounds(standing: list[_Shelved], goal: int) -> tuple[tuple[float, ...], list[_Shelved]]:
    """The thresholds at which `ROUNDS` rounds of merging leave `goal` tokens of all items together; and those tokens.

    Every round takes the same part of what is there.
    """
    first = left = sum(one.standing.state.layout.total for one in standing)
    thresholds = []
    for number in range(1, ROUNDS + 1):
        matches = [one.get().match() for one in standing]
        edges = torch.cat([similarity.flatten() for similarity, _ in matches])
        wanted = left - max(round(first * (goal / first) ** (number / ROUNDS)), goal)
        threshold, count = threshold_for(edges[edges.isfinite()], wanted) if wanted > 0 else (NEVER, 0)
        thresholds.append(threshold)
        left -= count
        if count:
            standing = [one.merge(above(threshold, *match)) for one, match in zip(standing, matches, strict=True)]
    return tuple(thresholds), standing


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


def _embed(parts: Parts, given: dict[str, Any]) -> Tensor:
    """What the first encoder layer would be given, [pictures, T, C], for what `get_image_features` is given.

    The model itself is run and stopped there, so that its ways of cutting and embedding need not be known.
    """
    taken: list[Tensor] = []

    def take(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    parameter = next(parts.tower.parameters())
    pixels = given["pixel_values"].to(parameter.device, parameter.dtype)
    hook = parts.encoder_modules[0].register_forward_pre_hook(take, with_kwargs=True)
    try:
        parts.inner.get_image_features(**{**given, "pixel_values": pixels})
    except _Stop:
        pass
    finally:
        hook.remove()
    return taken[0]


class _Samples:
    """Sample images on their way into the encoder; gone through once.

    Attributes:
        expected: how many there are, if that is known ahead.
        used: how many could be used so far.
        skipped: those that could not, and why.
    """

    def __init__(self, image_processor: Any, images: Iterable[ImageSource], parts: Parts) -> None:
        if isinstance(images, str | os.PathLike | Image.Image):
            images = [images]
        self._processor, self._images, self._parts = image_processor, images, parts
        self._takes = inspect.signature(type(parts.inner).get_image_features).parameters
        self._size: torch.Size | None = None
        self.expected = len(images) if isinstance(images, Sized) else None
        self.used = 0
        self.skipped: list[dict[str, str]] = []

    def batches(self, size: int, advance: Callable[[], object]) -> Iterator[tuple[Tensor, list[_Inputs]]]:
        """Embedded pictures [B, T, C] of some images, at least `size` of them but for the last; `advance` is called
        after each image."""
        waiting: list[tuple[Tensor, _Inputs]] = []
        for number, source in enumerate(self._images, 1):
            found = self._embedded(source, number)
            advance()
            if found is not None:
                self.used += 1
                waiting.append(found)
            if sum(image.pictures for _, image in waiting) >= size:
                yield torch.cat([embedded for embedded, _ in waiting]), [image for _, image in waiting]
                waiting = []
        if waiting:
            yield torch.cat([embedded for embedded, _ in waiting]), [image for _, image in waiting]

    def _embedded(self, source: ImageSource, number: int) -> tuple[Tensor, _Inputs] | None:
        """One image, or None where it cannot be read."""
        name = getattr(source, "filename", "") or f"image {number}" if isinstance(source, Image.Image) else str(source)
        try:
            image = load(source if isinstance(source, Image.Image) else Path(source)).image
        except BadImage as error:
            self.skipped.append({"image": name, "why": str(error).removeprefix(f"{name} ")})
            return None
        made = self._processor(images=[image], return_tensors="pt")
        given = {key: value for key, value in made.items() if key in self._takes}
        pixels = given["pixel_values"]
        self._size = self._size or pixels.shape[-2:]
        if pixels.shape[-2:] != self._size:
            raise DymuError(
                f"the image processor makes pictures of different sizes ({_by(self._size)} and "
                f"{_by(pixels.shape[-2:])} pixels), which calibration does not know yet; set it to one size."
            )
        embedded = _embed(self._parts, given)
        return embedded, _Inputs({**given, "pixel_values": _hollow(*pixels.shape)}, len(embedded))

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


def _warn(samples: _Samples, calibrated: Sequence[Calibrated]) -> None:
    if samples.skipped:
        total = len(samples.skipped) + samples.used
        named = "; ".join(f"{skipped['image']} {skipped['why']}" for skipped in samples.skipped)
        warnings.warn(f"skipped {len(samples.skipped)} of {total} images: {named}", stacklevel=3)
    for entry in calibrated:
        assert entry.achieved is not None
        if abs(entry.achieved - entry.budget) > max(TOLERANCE * entry.budget, 0.5 / samples.used):
            warnings.warn(
                f"for a budget of {entry.budget:g} tokens the images keep {entry.achieved:.2f} on average: too many of "
                "their tokens are exactly alike, or too few are left to merge; calibrate on more varied images.",
                stacklevel=3,
            )


def _bar(wanted: bool) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal))
