"""Sample images -> Thresholds: at which similarity tokens merge so that so many of them stay on average."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from msgspec.structs import replace
from torch import nn

from dymu.calibration import forecast
from dymu.calibration.layerwise import Batch, Run, Sizes, summed_up
from dymu.calibration.quantile import Alone, Together
from dymu.calibration.samples import ImageSource, Samples, processor_of, transform_of, why_none
from dymu.calibration.spill import Spill
from dymu.choices import SCHEDULES, Schedule
from dymu.errors import DymuError
from dymu.families.encoders import LoneEncoder, parts_of
from dymu.families.resolve import Parts
from dymu.handle import encoder_of, name_of
from dymu.measure.progress import Bar
from dymu.schedule import fewest, layers_to_merge_in, removals
from dymu.thresholds import CLOSE, Thresholds, number
from dymu.version import __version__

GRID = (0.05, 0.0625, 0.08, 0.1, 0.125, 0.16, 0.2, 0.25, 0.32, 0.4, 0.5, 0.64, 0.8, 1.0)
"""Budgets where none are named, as fractions of all tokens: so close that any other can be had between them."""

TRIES = 4
"""At a budget for images whose tiles are partly padding."""

TOLERANCE = 0.005
"""Part of a budget by which the achieved average may miss it before a warning says so."""


def calibrate(
    model: nn.Module,
    processor: Any,
    images: Iterable[ImageSource] | ImageSource,
    budgets: Iterable[int | float] | int | float | None = None,
    *,
    schedule: Schedule = "reverse_linear",
    merge_layers: Iterable[int] | None = None,
    batch_size: int = 8,
    memory_limit_bytes: int = 2 * 2**30,
    progress: bool = True,
) -> Thresholds:
    """Find the thresholds at which a model keeps so many tokens of sample images on average.

    It goes layer by layer (paper section 3.1 averages per-batch thresholds instead, and misses its budgets): all
    images' tokens wait at layer l, its threshold is put where exactly as many edges of all images lie above it as the
    schedule asks for, they merge, and all go on to layer l + 1. So each budget is met on these images but for ties,
    and on others of their kind but for chance. It costs one forward pass of the merging layers per budget, of which
    the embedding and the first attention are shared; up to four where images are cut into tiles that hold padding.

    Of 20 images or more it also fits what tells, from the pixels of a picture alone, how many tokens it will keep: see
    `Thresholds.forecast`.

    Args:
        model: a transformers model of a described family, or a vision encoder by itself, with or without DyMU applied;
            it is not changed.
        processor: the model's processor or image processor; for an encoder of timm or open_clip, what turns a PIL image
            into a tensor [3, height, width].
        images: a folder, or paths, PIL images, arrays, tensors, bytes or rows of a data set, as `dymu.media.images`
            takes them; gone through once. What cannot be read is skipped, and named in a warning.
        budgets: image tokens (class token and registers not counted) to keep on average, one number or several; a float
            up to 1 is a fraction of all of them, rounded to whole tokens. Where images have different numbers of tokens
            (tiles, native resolution), both are of the mean over images, and large ones keep more. None: those of
            `GRID` that halving tokens in every layer can leave, between which any other is within some 3 %.
        schedule: where to merge: `constant`, `linear` or `reverse_linear` (more in later layers; the paper's choice).
        merge_layers: indices of the encoder layers that merge, at the same budgets; None: all. Fewer merges cost
            less time but each takes more tokens at once, see docs/encoder.md.
        batch_size: pictures (images, or tiles of them) that go through a layer together, at least; but for rounding,
            the thresholds do not depend on it.
        memory_limit_bytes: hidden states beyond so many bytes wait in a temporary file, see `Spill`. An image takes
            tokens * width * bytes per number, twice that where there are several budgets.
        progress: show a bar on stderr, or lines where that is no terminal.

    Raises:
        UnsupportedModel: the model is of no described family.
        BadBudget: a budget is no number, above the number of tokens, or below what halving them in every layer leaves.
        BadOutput: the disk has no room for hidden states.
        DymuError: no image could be used, the processor makes no pictures or such that the model does not take, the
            model has no such `merge_layers` or does not read them, or it reads several layers and pools what they give.
        ValueError: an unknown `schedule`, no `budgets`, or a `batch_size` below 1.
    """
    thresholds, left_out = share(
        model, processor, images, budgets, Alone(), schedule, merge_layers, batch_size, memory_limit_bytes, progress
    )
    warn(thresholds, left_out)
    return thresholds


def share(
    model: nn.Module,
    processor: Any,
    images: Iterable[ImageSource] | ImageSource,
    budgets: Iterable[int | float] | int | float | None,
    together: Together,
    schedule: Schedule = "reverse_linear",
    merge_layers: Iterable[int] | None = None,
    batch_size: int = 8,
    memory_limit_bytes: int = 2 * 2**30,
    progress: bool = True,
) -> tuple[Thresholds, list[str]]:
    """A worker's part of `calibrate`, see there: with the same thresholds for all workers, and what was left out of
    this one's folders.

    Args:
        images: this worker's own. Where workers have whole batches each, thresholds are those of one worker with all.
        together: what the workers tell each other: of their edges how many lie where, and of every image its counts.
    """
    several = isinstance(budgets, Iterable) and getattr(budgets, "ndim", 1) > 0
    several = several and not isinstance(budgets, str | bytes | bytearray | memoryview)
    named: list[int | float] | None = None
    if budgets is not None:
        named = [number(budget) for budget in (cast(Iterable[Any], budgets) if several else [budgets])]
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if named == [] or not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ValueError("calibrate needs at least one budget, and a whole number of at least 1 as batch_size")
    parts = parts_of(model)
    prefix, depth = max(parts.prefix, parts.dropped()), max(parts.feature_layers())
    if depth == 0:
        raise DymuError("this model reads its image features ahead of the first encoder layer, so no layer can merge.")
    merging_layers = layers_to_merge_in(range(depth) if merge_layers is None else merge_layers, depth)
    samples = Samples(_to_pixels(processor, parts), images, parts)
    batches: list[Batch] = []
    with ExitStack() as opened:
        opened.enter_context(torch.inference_mode())
        bar = opened.enter_context(Bar(progress))
        spill = opened.enter_context(Spill(memory_limit_bytes))
        run = Run(parts, merging_layers, prefix, together)

        def removed(sizes: Sizes, keep: float) -> list[float]:
            return removals(sizes.tokens, keep, depth, schedule, merging_layers)

        def possible(sizes: Sizes) -> list[int | float]:
            lowest = fewest(sizes.tokens, len(merging_layers))
            grid = [part for part in GRID if part * sizes.tokens >= lowest]
            targets = sizes.targets(grid if named is None else named)
            for target in targets:
                removed(sizes, sizes.per_picture(target))
            return targets

        reading = bar.add_task("reading images", total=samples.expected)
        for embedded in samples.batches(batch_size, lambda: bar.update(reading, advance=1, total=samples.expected)):
            batches.append(run.begin(embedded, spill))
            if len(batches) == 1 and embedded.alike and (first := run.sizes(batches, Alone())).alike:
                possible(first)  # so that what cannot be met is refused before all are read
        used = sum(together.gather([samples.used]))
        skipped = together.gather(samples.skipped)
        if not used:
            raise DymuError(f"no image could be used for calibration: {why_none(skipped)}")
        sizes = run.sizes(batches, together)
        targets = possible(sizes)

        # Where the last layer merges, and nothing behind it, it alone makes the difference to the next budget.
        dials = merging_layers[-1] == depth - 1 and not sizes.mixes and not sizes.videos
        lowest = {upper: max(lower, upper / CLOSE) for lower, upper in pairwise(targets)} if dials else {}
        merging = [target for target in targets if target < sizes.full or target in lowest]
        slots = [batch.slots for batch in batches]
        if len(merging) > 1 or not sizes.plain:
            spare = [tuple(spill.slot(slot.capacity_bytes) for slot in of_batch) for of_batch in slots]
        kept_of: dict[float, list[int]] = {}
        calibrated = []
        for target in merging:
            aim = sizes.per_picture(target)
            for _ in range(TRIES):
                task = bar.add_task(f"budget {target:g}", total=(depth - 1) * len(batches))
                thresholds, ended = run.thresholds(
                    removed(sizes, aim),
                    batches,
                    slots if sizes.plain and target == merging[-1] else spare,
                    lambda task=task: bar.advance(task),  # type: ignore[misc]
                )
                kept = run.kept(ended, thresholds[-1], sizes)
                achieved = sum(kept) / len(kept)
                if sizes.plain or sizes.mixes or abs(achieved - target) <= TOLERANCE * target:
                    break
                # Merged tokens of a tile may show nothing but padding, which the language model never gets.
                aim = min(max(aim * target / achieved, fewest(sizes.tokens, len(merging_layers))), sizes.tokens)
            images_rounds: tuple[float, ...] = ()
            frames_rounds: tuple[float, ...] = ()
            if sizes.mixes or sizes.videos:
                with Spill(memory_limit_bytes) as room:
                    images_rounds, kept, frames_rounds = run.in_prompt(target, ended, thresholds[-1], sizes, room)
            entry = summed_up(target, thresholds, kept, images_rounds, frames_rounds)
            if target == sizes.full:
                entry = sizes.untouched(depth)
            if target in lowest:
                entry = replace(entry, dial=run.dial(ended, entry, lowest[target], sizes))
            calibrated.append(entry)
            kept_of[target] = kept
        if len(merging) < len(targets):
            calibrated.append(sizes.untouched(depth))
            kept_of[calibrated[-1].budget] = sizes.counts
        measured = together.gather([image.features for batch in batches for image in batch.images])

    found = Thresholds(
        calibrated=tuple(calibrated),
        encoder=encoder_of(parts, round(sizes.tokens)),
        schedule=schedule,
        merge_layers=None if merge_layers is None else merging_layers,
        model=name_of(model),
        image_tokens=None if sizes.alike and not parts.cuts_images else sizes.full,
        forecasts=forecast.fit(measured, sizes.counts, kept_of),
        images=used,
        skipped=tuple(skipped),
        created=datetime.now(UTC).date().isoformat(),
        dymu=__version__,
    )
    return found, samples.left_out


def _to_pixels(processor: Any, parts: Parts | LoneEncoder) -> Any:
    if isinstance(parts, LoneEncoder) and not hasattr(parts.tower, "config"):
        return transform_of(processor)
    return processor_of(processor, "image")


def warn(found: Thresholds, left_out: Iterable[str]) -> None:
    """Say what is amiss with thresholds, to the caller of who calls this."""
    for folder in left_out:
        warnings.warn(folder, stacklevel=3)
    used = found.images or 0
    if found.skipped:
        named = "; ".join(f"{skipped['image']} {skipped['why']}" for skipped in found.skipped)
        warnings.warn(f"skipped {len(found.skipped)} of {len(found.skipped) + used} images: {named}", stacklevel=3)
    for entry in found.calibrated:
        assert entry.achieved is not None
        if abs(entry.achieved - entry.budget) > max(TOLERANCE * entry.budget, 0.5 / used):
            warnings.warn(
                f"for a budget of {entry.budget:g} tokens the images keep {entry.achieved:.2f} on average: too many of "
                "their tokens are exactly alike, too few are left to merge, or their tiles are mostly padding; "
                "calibrate on more varied images.",
                stacklevel=3,
            )
