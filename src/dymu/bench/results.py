"""A result file: one JSON object, written anew and whole after every cell: a killed run loses one cell at most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from dymu.bench.variants import UNTOUCHED, Variant
from dymu.files import Amount, Count, decoded, whole_file
from dymu.measure.results import BadResults, Number, check_same_run, read_bytes
from dymu.measure.times import PARTS

FORMAT: Literal[1] = 1
Operations = Annotated[float, msgspec.Meta(gt=0, le=1e30)]
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
        encoder_ms, prefill_ms, decode_ms_per_token: of every round, see `dymu.measure.times.Times`.
        merge_ms, merge_of_ms: see `dymu.bench.probes.merging`; None where nothing merges.
    """

    left_out: str = ""
    peak_bytes: Count = 0
    cache_bytes: Count = 0
    encoder_ms: list[Amount] = []
    prefill_ms: list[Amount] = []
    decode_ms_per_token: list[Amount] = []
    merge_ms: Amount | None = None
    merge_of_ms: Annotated[float, msgspec.Meta(gt=0, le=1e30)] | None = None

    def __post_init__(self) -> None:
        if (self.merge_ms is None) != (self.merge_of_ms is None):
            raise ValueError("one of `merge_ms` and `merge_of_ms` is missing")

    @property
    def merge_share(self) -> float | None:
        """Part of the encoder's time that merging takes."""
        return None if self.merge_ms is None or self.merge_of_ms is None else self.merge_ms / self.merge_of_ms


class Flops(msgspec.Struct, forbid_unknown_fields=True):
    """Counted floating-point operations of all prompts of a cell."""

    encoder_flops: Operations
    prefill_flops: Operations


class Cell(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One prompt, batch and budget.

    Attributes:
        prompt: its name, see `dymu.bench.prompts`.
        budget: of an image, in tokens.
        kept: image tokens that remain of each image.
        left_out: why it has no measurements; empty where it has.
        variants: by name.
        flops: of `untouched` and `dymu`.
    """

    prompt: str = msgspec.field(name="layout")
    batch: Count
    budget: Number
    kept: Annotated[list[Count], msgspec.Meta(min_length=1)]
    left_out: str = ""
    variants: dict[str, Measured] = {}
    flops: dict[str, Flops] = {}

    def fault(self, variants: Sequence[Variant]) -> str:
        """Why the cell of a finished measurement cannot be told as ratios; empty where it can."""
        missing = {variant.name for variant in variants} - set(self.variants)
        if missing:
            return f"it lacks {', '.join(sorted(missing))}"
        measured = [one for one in self.variants.values() if not one.left_out]
        rounds = {len(getattr(one, part)) for one in measured for part in PARTS}
        if len(rounds) > 1 or 0 in rounds:
            return "its variants, or their parts, differ in their number of rounds"
        full = self.variants[UNTOUCHED.name]
        if not full.left_out and not all(
            (full.peak_bytes, full.cache_bytes, *(ms for part in PARTS for ms in getattr(full, part)))
        ):
            return "a time or a size of the untouched model is 0"
        if self.flops and set(self.flops) != {"untouched", "dymu"}:
            return "`flops` are not of `untouched` and `dymu`"
        return ""


class Model(msgspec.Struct, forbid_unknown_fields=True):
    """The model: its name, what its weights are (a hash of them, or random), and by what it merges."""

    name: str
    weights: str
    merges: str


class Bench(msgspec.Struct, forbid_unknown_fields=True):
    """The contents of a result file.

    Attributes:
        full_tokens: of an image, unmerged.
        answer_tokens: of the answer in the time from end to end.
        checks: by name of the variant.
        cells: the finished ones.
    """

    dymu_bench: Literal[1]
    command: str
    date: str
    model: Model
    device: str
    dtype: str
    seed: int
    versions: dict[str, str]
    full_tokens: Count
    answer_tokens: Count
    variants: list[Variant]
    checks: dict[str, Checked]
    cells: list[Cell]

    def __post_init__(self) -> None:
        if UNTOUCHED not in self.variants[:1]:
            raise ValueError("`variants` do not begin with the untouched model")


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
        fault = "" if cell.left_out else cell.fault(bench.variants)
        if fault:
            raise BadResults(
                f"cell {number} of {path} is damaged ({fault}); delete it there, and dymu bench measures it anew."
            )
    return bench
