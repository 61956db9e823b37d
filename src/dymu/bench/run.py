"""Measure every variant of one model at every budget, batch and prompt."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch

from dymu.bench import probes
from dymu.bench.check import BATCH, Reference
from dymu.bench.prompts import PROMPTS, ids, images_in, inputs_of
from dymu.bench.results import FORMAT, Bench, Cell, Checked, Flops, Measured, continued, save
from dymu.bench.variants import UNTOUCHED, Variant, variants
from dymu.bench.workload import Workload, spread
from dymu.errors import AlreadyApplied
from dymu.families.resolve import resolve
from dymu.files import escaped
from dymu.handle import handle_of
from dymu.measure.costs import count
from dymu.measure.progress import Bar
from dymu.measure.provenance import device_name, versions
from dymu.measure.times import PARTS, Times
from dymu.measure.timing import interleaved
from dymu.measure.timing import measure as time_once

Inputs = dict[str, Any]
Answer = TypeVar("Answer")
COUNTED = Variant("dymu", "sdpa")
"""DyMU while its FLOPs are counted: a backend whose operations torch can count."""


class _LeftOut(Exception):
    """Why a cell or a variant cannot be measured."""


def bench(
    workload: Workload,
    output: str | os.PathLike[str],
    *,
    budgets: Sequence[int | float],
    batches: Sequence[int] = (1,),
    prompts: Sequence[str] = ("image-text",),
    backends: Sequence[str] = ("auto",),
    answer_tokens: int = 32,
    repeats: int = 7,
    limit_s: float = 300.0,
    seed: int = 0,
    command: str = "",
    progress: bool = True,
) -> Bench:
    """Time every variant in turn in every cell of budgets x batches x prompts, and write the result file.

    Backends whose outputs differ from the reference's are not timed. A file that holds some of the cells is continued.

    Args:
        workload: model and images; the model is as it was afterwards.
        output: the result file.
        budgets: average tokens of an image to keep; a float up to 1 is a fraction.
        batches: prompts that are run together.
        prompts: see `PROMPTS`.
        backends: of DyMU's attention, see `dymu.apply`.
        answer_tokens: length of the answer in the time from end to end.
        repeats: rounds, in each of which every variant is timed once.
        limit_s: for one cell. Where that is not enough for one round, the cell says so and holds no times.
        seed: of random words.
        command: recorded in the file.
        progress: show a bar on stderr, or lines where that is no terminal.

    Returns:
        The contents of the file.

    Raises:
        AlreadyApplied: DyMU is applied to the model.
        BadResults: `output` belongs to another run.
        BadBudget: a budget cannot be had.
        ValueError: an unknown prompt or backend.
    """
    unknown = set(prompts) - set(PROMPTS)
    if unknown:
        raise ValueError(f"unknown prompt {', '.join(sorted(unknown))}; choose some of {', '.join(PROMPTS)}")
    if handle_of(workload.model) is not None:
        raise AlreadyApplied("DyMU is applied to this model, so nothing could be compared; call handle.remove() first.")
    bench = Bench(
        dymu_bench=FORMAT,
        command=command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        model=workload.describe(),
        device=device_name(workload.model.device),
        dtype=str(workload.model.dtype).removeprefix("torch."),
        seed=seed,
        versions=versions("torch", "transformers", "triton"),
        full_tokens=workload.tokens,
        answer_tokens=answer_tokens,
        variants=variants(backends),
        checks={},
        cells=[],
    )
    possible = dict.fromkeys(workload.budget(budget) for budget in budgets)
    bench = continued(Path(output), msgspec.convert(escaped(msgspec.to_builtins(bench)), Bench))
    finished = {(cell.prompt, cell.batch, cell.budget) for cell in bench.cells}
    todo = [cell for cell in product(prompts, batches, possible) if cell not in finished]
    if not todo:
        return bench
    with Bar(progress, remaining=False) as bar:
        task = bar.add_task("comparing backends with the reference", total=len(todo))
        bench.checks = _checks(workload, bench.variants)
        run = _Run(workload, bench, repeats, limit_s)
        for prompt, batch, budget in todo:
            bar.update(task, description=f"{prompt} · batch {batch} · {budget:g} tokens")
            bench.cells.append(run.cell(prompt, batch, budget))
            save(Path(output), bench)
            bar.advance(task)
            why = f": {bench.cells[-1].left_out}" if bench.cells[-1].left_out else ""
            bar.say(f"{prompt} · batch {batch} · {budget:g} tokens{why} ({len(bench.cells)} measured)")
    return bench


def _checks(workload: Workload, compared: Sequence[Variant]) -> dict[str, Checked]:
    reference = Reference(workload.model, workload.shown([0] * BATCH))
    return {variant.name: reference.check(variant) for variant in compared if variant.backend}


@dataclass
class _Run:
    """What all cells share.

    Attributes:
        untouched_flops: of one prompt without DyMU, by the prompt's name.
    """

    workload: Workload
    bench: Bench
    repeats: int
    limit_s: float
    untouched_flops: dict[str, dict[str, int]] = field(default_factory=dict)

    def cell(self, prompt: str, batch: int, budget: int | float) -> Cell:
        """Measure every variant at one budget, batch and prompt."""
        ends = perf_counter() + self.limit_s
        counts = self.workload.kept(budget)
        images = spread(counts, batch * images_in(prompt))
        cell = Cell(prompt, batch, budget, [counts[image] for image in images])
        try:
            self._measure(cell, images, ends)
        except _LeftOut as why:
            return Cell(prompt, batch, budget, cell.kept, left_out=str(why))
        return cell

    def _measure(self, cell: Cell, images: Sequence[int], ends: float) -> None:
        """Fill in the cell's measurements, rounds of them until `ends` on the clock of `perf_counter`."""
        prompts = _Prompts(self.workload, cell, images, self.bench.seed)
        timed: dict[str, Callable[[], Times]] = {}
        for variant in self.bench.variants:
            checked = self.bench.checks.get(variant.name)
            if checked is not None and not checked.right:
                cell.variants[variant.name] = Measured(left_out=_refusal(checked))
                continue
            try:
                if self.workload.model.device.type != "cpu":  # compiles kernels and allocates workspaces
                    prompts.run(variant, time_once)
                peak_bytes, cache_bytes = prompts.run(variant, probes.memory)
            except _LeftOut as why:
                cell.variants[variant.name] = Measured(left_out=str(why))
                continue
            cell.variants[variant.name] = Measured(peak_bytes=peak_bytes, cache_bytes=cache_bytes)
            timed[variant.name] = partial(prompts.run, variant, time_once)
            if perf_counter() > ends:
                raise _LeftOut(f"one round takes longer than the limit of {self.limit_s:g} s")
        for name, rounds in interleaved(timed, repeats=self.repeats, limit_s=ends - perf_counter()).items():
            for part in PARTS:
                setattr(cell.variants[name], part, [round(getattr(times, part), 4) for times in rounds])
        for variant in self.bench.variants:
            if variant.backend and variant.name in timed:
                measured = cell.variants[variant.name]
                measured.merge_ms, measured.merge_of_ms = prompts.run(variant, probes.merging)
        cell.flops = self._flops(cell, images)

    def _flops(self, cell: Cell, images: Sequence[int]) -> dict[str, Flops]:
        """FLOPs of the untouched model and of DyMU, prompt by prompt, so that none is spent on padding."""
        total = {"untouched": Counter[str](), "dymu": Counter[str]()}
        for shown in np.split(np.array(images), cell.batch):
            single = msgspec.structs.replace(cell, batch=1)
            prompts = _Prompts(self.workload, single, shown.tolist(), self.bench.seed)
            if cell.prompt not in self.untouched_flops:
                self.untouched_flops[cell.prompt] = prompts.run(UNTOUCHED, _flops)
            total["untouched"].update(self.untouched_flops[cell.prompt])
            total["dymu"].update(prompts.run(COUNTED, _flops))
        return {name: Flops(**counted) for name, counted in total.items()}


def _flops(model: Any, inputs: Inputs) -> dict[str, int]:
    encoder, prefill, _ = count(model, inputs)
    return {"encoder_flops": encoder, "prefill_flops": prefill}


class _Prompts:
    """The prompts of a cell, and for the floor prompts with as many text tokens as remain of its images."""

    def __init__(self, workload: Workload, cell: Cell, images: Sequence[int], seed: int) -> None:
        self._model = workload.model
        parts = resolve(self._model)
        token, vocabulary = parts.placeholders["image"], parts.language_model.config.vocab_size

        def inputs(tokens: int, placeholder: bool) -> Inputs:
            words = ids(cell.prompt, cell.batch, tokens, token, vocabulary, placeholder, seed)
            return inputs_of(parts, words.to(self._model.device))

        counts = workload.kept(cell.budget)
        self._kept = sum(counts[image] for image in images)
        with _memory_errors():
            self._merging = workload.merging(cell.budget, images)
            self._shown = {**inputs(workload.tokens, True), **workload.shown(images)}
            self._short = inputs(round(fmean(cell.kept)), False)

    def run(self, variant: Variant, measure: Callable[[Any, Inputs], Answer]) -> Answer:
        """Call `measure` with the model, the variant applied to it, and the prompt.

        Raises:
            ValueError: other tokens are left than the workload says.
        """
        with _memory_errors(), variant.on(self._model, self._merging) as handle:
            measured = measure(self._model, self._short if variant.floor else self._shown)
            if handle is not None and sum(handle.last.kept) != self._kept:
                raise ValueError(f"{self._kept} tokens should be left of the images, and there are {handle.last.kept}")
            return measured


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Raise `_LeftOut` for every error of an allocator."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise _LeftOut("out of memory") from None
        raise


def _refusal(checked: Checked) -> str:
    if checked.error is None:
        return f"not timed, since it cannot run: {checked.why}"
    return f"not timed, since it is off from the reference by {checked.error:.1e} (allowed: {checked.allowed:.0e})"
