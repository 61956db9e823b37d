"""The methods that reduce image tokens, and the rows in which each is compared.

The command line, tables and charts take names and colours from here. This module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from dymu.choices import UNMERGE
from dymu.files import Count
from dymu.measure.charts import GREY, PALETTE

if TYPE_CHECKING:
    from dymu.reducers import Reducer

FORMER = "compact-unsized"
"""What files of older versions call `original`."""

Remains = Literal["groups", "singles", "grid"]
"""What is left: groups of merged tokens, single tokens at their positions, or the tokens of a smaller image."""


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: in files and on the command line; label, colour: in tables and charts.
        reducer: its class in `dymu.reducers`; empty where the method is another.
        leaves: see `Remains`; it decides which ways to unmerge differ.
        schedules: how its merges may spread over the layers; None: as the thresholds do.
        square: whether it can keep square numbers of tokens only.
        of_images: whether its budget is of a whole image, also where that is cut into tiles.
    """

    name: str
    label: str
    colour: str
    reducer: str = ""
    leaves: Remains = "groups"
    schedules: tuple[str, ...] | None = ("",)
    square: bool = False
    of_images: bool = True

    def unmerges(self, way: str) -> str:
        """The first of the ways to unmerge that give the same as this one."""
        of_singles = way if way in ("none", "restore") else "exact"
        return {"groups": way, "singles": of_singles, "grid": "none"}[self.leaves]

    def make(self, row: Row, part: float, seed: int) -> Reducer:
        """The reducer for a row.

        Args:
            part: fraction of an image's tokens to keep.
            seed: of the reducer's random numbers.

        Raises:
            TypeError: the reducer has no field for the budget.
        """
        kind: Any = getattr(import_module("dymu.reducers"), self.reducer)
        settings = {"keep": part, "seed": seed, "schedule": row.schedule}
        taken = {f.name: settings[f.name] for f in fields(kind) if f.name in settings}
        if "keep" not in taken:
            raise TypeError(
                f"{self.reducer} has no field `keep`, so {self.name} would ignore its budget; add the field."
            )
        reducer: Reducer = kind(**taken)
        return reducer


METHODS = {
    method.name: method
    for method in (
        Method("untouched", "untouched", "black"),
        Method("dtome", "DToMe", PALETTE[0], schedules=None),
        Method("tome", "ToMe", PALETTE[1], "FixedMerge", schedules=("constant",)),
        Method("pool", "average pooling", PALETTE[2], "AveragePool", square=True),
        Method("random", "random keep", GREY, "RandomKeep", leaves="singles"),
        Method("stride", "stride", PALETTE[4], "Stride", leaves="singles"),
        Method("downscale", "smaller image", PALETTE[3], leaves="grid", square=True, of_images=False),
    )
}
"""By name."""
COMPARED = [name for name in METHODS if name != "untouched"]


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to run the model.

    Attributes:
        method: one of `METHODS`.
        budget: image tokens to keep; 0 for `untouched`.
        unmerge: see `dymu.choices.Unmerge`; `FORMER` in files of older versions.
        schedule: how merges spread over the layers; empty where nothing merges in layers.
    """

    method: str
    budget: Count = 0
    unmerge: str = "none"
    schedule: str = ""

    @property
    def key(self) -> str:
        """Its name in files and tables: `dtome-96-exact-linear`."""
        parts = (self.method, str(self.budget or ""), self.unmerge if self.budget else "", self.schedule)
        return "-".join(part for part in parts if part)


UNTOUCHED = Row("untouched")


def way_of(row: Row) -> str:
    """How a row unmerges, by its present name."""
    return "original" if row.unmerge == FORMER else row.unmerge


def check_names(methods: Iterable[str], unmerge: Iterable[str]) -> None:
    """Raises: ValueError, unless these are names of methods and of ways to unmerge."""
    for what, names, known in (("method", methods, tuple(METHODS)), ("way to unmerge", unmerge, UNMERGE)):
        for name in names:
            if name not in known:
                raise ValueError(f"the {what} {name!r} is unknown; choose some of {', '.join(known)}")


def rows_for(
    budgets: Iterable[int],
    methods: Iterable[str] = ("dtome",),
    unmerge: Iterable[str] = ("exact",),
    schedules: Sequence[str] = ("reverse_linear",),
) -> list[Row]:
    """The untouched model and every combination of the others, without those that would give the same results twice.

    Methods that can only keep squares take the square nearest to the budget. For single tokens all but
    `restore` and `none` equal `exact`, and a smaller image leaves nothing to unmerge.

    Raises:
        ValueError: an unknown method or way to unmerge.
    """
    methods, ways = list(methods), list(unmerge)
    check_names(methods, ways)
    rows = [UNTOUCHED]
    for budget in sorted(set(budgets), reverse=True):
        for method in (METHODS[name] for name in methods if name != "untouched"):
            kept = max(round(math.sqrt(budget)), 1) ** 2 if method.square else budget
            for way in ways:
                for schedule in schedules if method.schedules is None else method.schedules:
                    rows.append(Row(method.name, kept, method.unmerges(way), schedule))
    return list(dict.fromkeys(rows))
