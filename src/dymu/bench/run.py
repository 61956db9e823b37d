"""Measure one model at every budget, batch and prompt layout, in every way that is compared."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dymu import __version__
from dymu.apply import handle_of
from dymu.bench import measure
from dymu.bench.check import BATCH, Checked, Reference
from dymu.bench.layouts import LAYOUTS, ids, images_in
from dymu.bench.results import BenchFile
from dymu.bench.subject import Subject, spread
from dymu.bench.variants import UNTOUCHED, Variant, variants
from dymu.errors import AlreadyApplied
from dymu.evaluate.run import device_name
from dymu.families import FAMILIES, resolve
from dymu.timing import Times, interleaved
from dymu.timing import measure as time_once

Inputs = dict[str, Any]
Found = TypeVar("Found")
OUT_OF_MEMORY = "out of memory"
COUNTED = Variant("dymu", "sdpa")
"""DyMU while its FLOPs are counted: on operations that torch can count."""


class _OutOfMemory(Exception):
    """Raised in the place of whatever an allocator raises."""


def bench(
    subject: Subject,
    output: str | os.PathLike[str],
    *,
    budgets: Sequence[int | float],
    batches: Sequence[int] = (1,),
    layouts: Sequence[str] = ("image-text",),
    backends: Sequence[str] = ("auto",),
    answer_tokens: int = 32,
    repeats: int = 7,
    limit_s: float = 300.0,
    seed: int = 0,
    command: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Time every variant in turn in every cell of budgets x batches x layouts, and write the result file.

    Backends that do not compute what the reference computes are not timed. A file that holds some of the cells is
    continued.

    Args:
        subject: what is measured; its model is as it was afterwards.
        output: the result file.
        budgets: wanted average of tokens of an image; a float up to 1 is a fraction.
        batches: prompts that are run together.
        layouts: see `LAYOUTS`.
        backends: of DyMU's attention, see `dymu.apply`.
        answer_tokens: of the answer whose time from end to end is told.
        repeats: rounds, in each of which every variant is timed once.
        limit_s: for one cell. Where that is not enough for one round, the cell says so and holds no times.
        seed: of random words.
        command: how it was called, for the record.
        progress: show a bar on stderr, if that is a terminal.

    Returns:
        What the file holds.

    Raises:
        AlreadyApplied: DyMU is applied to the model.
        BadBench: `output` belongs to another run.
        BadBudget: a budget cannot be had.
        ValueError: an unknown layout or backend.
    """
    unknown = set(layouts) - set(LAYOUTS)
    if unknown:
        raise ValueError(f"unknown layout {', '.join(sorted(unknown))}; choose some of {', '.join(LAYOUTS)}")
    if handle_of(subject.model) is not None:
        raise AlreadyApplied("DyMU is applied to this model, so nothing could be compared; call handle.remove() first.")
    compared = variants(backends)
    wanted = list(dict.fromkeys(subject.budget(budget) for budget in budgets))
    header = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": subject.describe(),
        "device": device_name(subject.model.device),
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "seed": seed,
        "versions": _versions(),
        "full_tokens": subject.tokens,
        "answer_tokens": answer_tokens,
        "variants": [asdict(variant) for variant in compared],
        "checks": {},
    }
    file = BenchFile(Path(output), header)
    cells = [
        cell
        for cell in product(layouts, batches, wanted)
        if not file.has(layout=cell[0], batch=cell[1], budget=cell[2])
    ]
    if not cells:
        return file.body
    untouched: dict[str, dict[str, int]] = {}
    with _bar(progress) as bar:
        task = bar.add_task("holding backends against the reference", total=len(cells))
        checks = _checks(subject, compared)
        file.body["checks"] = {name: asdict(found) for name, found in checks.items()}
        for layout, batch, budget in cells:
            bar.update(task, description=f"{layout} · batch {batch} · {budget:g} tokens")
            cell = _cell(subject, compared, checks, layout, batch, budget, repeats, limit_s, seed, untouched)
            file.add(cell)
            bar.advance(task)
    return file.body


def _checks(subject: Subject, compared: Sequence[Variant]) -> dict[str, Checked]:
    reference = Reference(subject.model, subject.shown([0] * BATCH))
    return {variant.name: reference.check(variant) for variant in compared if variant.backend}


def _cell(
    subject: Subject,
    compared: Sequence[Variant],
    checks: dict[str, Checked],
    layout: str,
    batch: int,
    budget: int | float,
    repeats: int,
    limit_s: float,
    seed: int,
    untouched: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """Everything of one budget, batch and layout; `untouched` as in `_flops`."""
    ends = perf_counter() + limit_s
    counts = subject.kept(budget)
    images = spread(counts, batch * images_in(layout))
    kept = [counts[image] for image in images]
    found: dict[str, dict[str, Any]] = {}
    cell: dict[str, Any] = {"layout": layout, "batch": batch, "budget": budget, "kept": kept}
    try:
        with _memory_errors():
            prompts = _Prompts(
                subject, layout, batch, images, round(fmean(kept)), subject.merging(budget, images), seed
            )
        timed: dict[str, Callable[[], Times]] = {}
        for variant in compared:
            checked = checks.get(variant.name)
            if checked is not None and not checked.right:
                found[variant.name] = {"left_out": _refusal(checked)}
                continue
            try:
                if subject.model.device.type != "cpu":  # kernels to compile, workspaces to take
                    prompts.run(variant, time_once)
                found[variant.name] = prompts.run(variant, measure.memory)
            except _OutOfMemory:
                found[variant.name] = {"left_out": OUT_OF_MEMORY}
                continue
            timed[variant.name] = partial(prompts.run, variant, time_once)
            if perf_counter() > ends:
                return {**cell, "left_out": f"one round takes longer than the limit of {limit_s:g} s"}
        for name, runs in interleaved(timed, repeats=repeats, limit_s=ends - perf_counter()).items():
            found[name] |= {part.name: [round(getattr(run, part.name), 4) for run in runs] for part in fields(Times)}
        for variant in compared:
            if variant.backend and variant.name in timed:
                found[variant.name] |= prompts.run(variant, measure.merging)
        counted = _flops(subject, layout, batch, budget, images, seed, untouched)
    except _OutOfMemory:
        return {**cell, "left_out": OUT_OF_MEMORY}
    return {**cell, "variants": found, "flops": counted}


def _flops(
    subject: Subject,
    layout: str,
    batch: int,
    budget: int | float,
    images: Sequence[int],
    seed: int,
    untouched: dict[str, dict[str, int]],
) -> dict[str, dict[str, int]]:
    """FLOPs of the untouched model and of DyMU, prompt by prompt, so that none is spent on padding.

    Args:
        untouched: those of one prompt in each layout that was counted already; this one's is added.
    """
    total = {"untouched": Counter[str](), "dymu": Counter[str]()}
    for row in range(batch):
        own = images[row * len(images) // batch : (row + 1) * len(images) // batch]
        prompts = _Prompts(subject, layout, 1, own, 0, subject.merging(budget, own), seed)
        if layout not in untouched:
            untouched[layout] = prompts.run(UNTOUCHED, measure.flops)
        total["untouched"].update(untouched[layout])
        total["dymu"].update(prompts.run(COUNTED, measure.flops))
    return {name: dict(found) for name, found in total.items()}


class _Prompts:
    """The prompts of one cell: with images, and for the floor of as many text tokens as remain.

    Args:
        left: tokens of an image that remain, on average.
        merging: what `dymu.apply` is to merge by.
    """

    def __init__(
        self,
        subject: Subject,
        layout: str,
        batch: int,
        images: Sequence[int],
        left: int,
        merging: dict[str, Any],
        seed: int,
    ) -> None:
        self._model, self._merging = subject.model, merging
        config = resolve(self._model, FAMILIES).language_model.config
        token = resolve(self._model, FAMILIES).placeholders["image"]

        def prompt(tokens: int, placeholder: bool) -> Inputs:
            words = ids(layout, batch, tokens, token, config.vocab_size, placeholder, seed).to(self._model.device)
            return {"input_ids": words, "attention_mask": torch.ones_like(words)}

        self._shown = {**prompt(subject.tokens, True), **subject.shown(images)}
        self._short = prompt(left, False)

    def run(self, variant: Variant, of: Callable[[Any, Inputs], Found]) -> Found:
        """What `of` says of the model, run as the variant wants."""
        with _memory_errors(), variant.on(self._model, self._merging):
            return of(self._model, self._short if variant.floor else self._shown)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Whatever an allocator raises becomes an `_OutOfMemory`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise _OutOfMemory from None
        raise


def _refusal(checked: Checked) -> str:
    if checked.error is None:
        return f"not timed, since it cannot run: {checked.why}"
    return f"not timed, since it is off from the reference by {checked.error:.1e} (allowed: {checked.allowed:.0e})"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "dymu": __version__}
    for name in ("torch", "transformers", "triton"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _bar(wanted: bool) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal))
