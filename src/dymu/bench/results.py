"""A result file: one JSON object, written anew and whole after every cell: a killed run loses one cell at most."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from dymu.bench.variants import Variant
from dymu.files import Count, decoded, whole_file
from dymu.measure.results import BadResults, Number, check_same_run, read_bytes

FORMAT: Literal[1] = 1
SAME = ("model", "device", "dtype", "seed", "versions", "variants", "answer_tokens")
"""Fields in which a run and its continuation must agree."""


class Checked(msgspec.Struct, forbid_unknown_fields=True):
    """A variant's relative error from the reference; None where it could not run at all, for `why`."""

    error: float | None
    allowed: float
    why: str = ""

    @property
    def right(self) -> bool:
        return self.error is not None and self.error <= self.allowed


class Measured(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The measurements of one variant in one cell.

    Attributes:
        left_out: why it has none; empty where it has.
        peak_bytes, cache_bytes: see `dymu.bench.probes.memory`.
        encoder_ms, prefill_ms, decode_ms_per_token: of every round, see `dymu.measure.timing.Times`.
        merge_ms, merge_of_ms: see `dymu.bench.probes.merging`; None where nothing merges.
    """

    left_out: str = ""
    peak_bytes: Count = 0
    cache_bytes: Count = 0
    encoder_ms: list[float] = []
    prefill_ms: list[float] = []
    decode_ms_per_token: list[float] = []
    merge_ms: float | None = None
    merge_of_ms: float | None = None


class Cell(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One prompt, batch and budget.

    Attributes:
        prompt: its name, see `dymu.bench.prompts`.
        budget: of an image, in tokens.
        kept: image tokens that remain of each image.
        left_out: why it has no measurements; empty where it has.
        variants: by name.
        flops: counted `encoder_flops` and `prefill_flops` of `untouched` and `dymu`.
    """

    prompt: str = msgspec.field(name="layout")
    batch: Count
    budget: Number
    kept: list[Count]
    left_out: str = ""
    variants: dict[str, Measured] = {}
    flops: dict[str, dict[str, Number]] = {}


class Bench(msgspec.Struct, forbid_unknown_fields=True):
    """The contents of a result file.

    Attributes:
        model: see `Workload.describe`.
        full_tokens: of an image, unmerged.
        answer_tokens: of the answer in the time from end to end.
        checks: by name of the variant.
        cells: the finished ones.
    """

    dymu_bench: Literal[1]
    command: str
    date: str
    model: dict[str, str]
    device: str
    dtype: str
    seed: int
    versions: dict[str, str]
    full_tokens: Count
    answer_tokens: Count
    variants: Annotated[list[Variant], msgspec.Meta(min_length=1)]
    checks: dict[str, Checked]
    cells: list[Cell]


def continued(path: Path, bench: Bench) -> Bench:
    """The run with the checks and the finished cells of its result file, if there is one.

    Raises:
        BadResults: the file belongs to another run, or is none.
    """
    if not path.exists():
        return bench
    before = load(path)
    check_same_run(path, bench, before, SAME)
    finished = [cell for cell in before.cells if not cell.left_out]
    return msgspec.structs.replace(bench, checks=before.checks, cells=finished)


def save(path: Path, bench: Bench) -> None:
    """Write a result file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(bench), indent=1) + b"\n")


def load(path: Path) -> Bench:
    """Read a result file, finished or not.

    Raises:
        BadResults: it is none, or damaged: which field, and why.
    """
    other_version = f"{path} is no result file of this version of dymu bench"
    bench = decoded(read_bytes(path), Bench, BadResults, other_version, "name one that it wrote.")
    for number, cell in enumerate(bench.cells, 1):
        missing = {variant.name for variant in bench.variants} - set(cell.variants)
        if missing and not cell.left_out:
            raise BadResults(
                f"cell {number} of {path} is damaged (it lacks {', '.join(sorted(missing))}); delete it there, and "
                "dymu bench measures it anew."
            )
    return bench
