"""The methods that reduce image tokens, and the rows in which each is compared.

The command line, tables and charts take names and colours from here. This module does not import torch.
"""

from __future__ import annotations

import math
import re
from ast import literal_eval
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from dymu.choices import EACH_ONCE, UNMERGE, Fill
from dymu.errors import BadBudget
from dymu.files import Count
from dymu.measure.charts import GREY, PALETTE

if TYPE_CHECKING:
    from dymu.pruning import Pruning
    from dymu.reducers import Reducer

FORMER = "compact-unsized"
"""What files of older versions call `original`."""

Remains = Literal["groups", "singles", "filled", "grid"]
"""What is left: groups of merged tokens, single tokens at their positions, such that stand for the others too where the
language model attends to groups, or the tokens of a smaller image."""


class Solved(NamedTuple):
    """The argument of a method that a budget is solved by, see `dymu.evaluation.solve`; by a larger number fewer tokens
    are left.

    Attributes:
        field: of the reducer.
        least: the least number that it takes.
    """

    field: str
    least: float = -math.inf


SAID = {"schedule", "fill"}
"""Arguments that the method's own take the place of, where it names them."""
FROM = "unmerge_from"
"""An argument of every method that leaves something to unmerge, see `dymu.apply`."""
ATTENTION = "attention"
QUESTION = "the question"


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: in files and on the command line; label, colour: in tables and charts.
        reducer: its class in `dymu.reducers`; empty where the method is another.
        pruning: its class in `dymu.pruning`, likewise.
        leaves: see `Remains`; it decides which ways to unmerge differ.
        schedules: how its merges may spread over the layers; None: as the thresholds do.
        square: whether it can keep square numbers of tokens only.
        of_images: whether its budget is of a whole image, also where that is cut into tiles.
        group: `control`; `E`, in the encoder or right behind it; `P`, on projected tokens; `L`, within the language
            model.
        needs: what it reads beside tokens.
        adapts: whether how many tokens are left depends on the picture.
        paper: its number at arXiv.
        arguments: from what to keep, to the reducer's arguments; None: it has a field `keep`.
        solves: what a number of tokens is solved by, on the images of a comparison, where the reducer takes none.
        settings: arguments of its class that make it this method.
    """

    name: str
    label: str
    colour: str
    reducer: str = ""
    leaves: Remains = "groups"
    schedules: tuple[str, ...] | None = ("",)
    square: bool = False
    of_images: bool = True
    group: str = ""
    needs: str = ""
    adapts: bool = False
    paper: str = ""
    arguments: Callable[[int | float], dict[str, Any]] | None = None
    solves: Solved | None = None
    pruning: str = ""
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def takes_number(self) -> bool:
        """Whether it is made from a number of tokens alone."""
        return bool(self.reducer or self.pruning)

    def check_options(self, options: str) -> None:
        """Raises: ValueError, where they are no arguments, or it takes none of that name."""
        named = options_of(options).keys()
        if named and not self.takes_number and (named != {FROM} or self.leaves == "grid"):
            but = "" if self.leaves == "grid" else f" but {FROM}"
            raise ValueError(f"{self.name} takes no further arguments{but}: leave {options!r} out.")

    def unmerges(self, way: str, options: str = "") -> str:
        """The first of the ways to unmerge that give the same as this one.

        Args:
            options: see `Row`; what stands for dropped tokens may be said there.
        """
        fill = options_of(options).get("fill")
        leaves = self.leaves if fill is None else "singles" if fill == "none" else "groups"
        of_singles = way if way in ("none", "restore") else "exact"
        return {"groups": way, "filled": way, "singles": of_singles, "grid": "none"}[leaves]

    def fill(self, way: str) -> Fill:
        """What stands for dropped tokens where the language model attends in this way."""
        return "nearest" if self.leaves == "filled" and way not in ("none", "original") else "none"

    def make(self, row: Row, keep: int | float, seed: int) -> Reducer:
        """The reducer for a row.

        Args:
            keep: of an image, a number of tokens, or a fraction of its own.
            seed: of the reducer's random numbers.

        Raises:
            TypeError: the reducer has no field for the budget.
            ValueError: the row names an argument that the method does not have.
        """
        kind: Any = getattr(import_module("dymu.reducers"), self.reducer)
        own = dict(self.settings)
        settings = {**own, "seed": seed, "schedule": row.schedule, "fill": self.fill(way_of(row))}
        if self.solves is None:
            settings["keep"] = keep
        options = row.arguments
        said = options.keys() & (SAID | own.keys())
        taken = {f.name: settings[f.name] for f in fields(kind) if f.name in settings.keys() - said}
        if self.arguments is not None:
            taken |= self.arguments(keep)
        elif "keep" not in taken and self.solves is None:
            raise TypeError(
                f"{self.reducer} has no field `keep`, so {self.name} would ignore its budget; add the field."
            )
        reducer: Reducer = self._made(kind, taken, options, row)
        return reducer

    def make_pruning(self, row: Row, part: float, seed: int, layers: int) -> Pruning:
        """What prunes for a row in a language model of so many layers.

        Args:
            part: of all image tokens, the mean over layers.
            seed: of its random numbers.

        Raises:
            BadBudget: it cannot drop as much.
            ValueError: the row names an argument that the method does not have, or the language model has too few
                layers.
        """
        kind: Any = getattr(import_module("dymu.pruning"), self.pruning)
        settings = {**dict(self.settings), "seed": seed, "fill": self.fill(way_of(row))}
        options = options_of(row.options)
        taken = {f.name: settings[f.name] for f in fields(kind) if f.name in settings.keys() - options.keys()}
        pruning: Pruning = self._made(kind, taken, options, row)
        return pruning.for_mean(part, layers)

    def _made(self, kind: Any, taken: dict[str, Any], options: Mapping[str, Any], row: Row) -> Any:
        """A class of the method's with some arguments, and a row's own."""
        if "keep" in options:
            raise ValueError(f"{self.name} keeps what the budget says: leave keep={options['keep']} out.")
        may = SAID | dict(self.settings).keys()
        own = [f.name for f in fields(kind) if f.name != "keep" and (f.name not in taken or f.name in may)]
        taken = dict(taken)
        for name, value in options.items():
            if name == FROM:
                continue
            if name not in own:
                raise ValueError(f"{self.name} has no argument {name!r}; it has {', '.join((*own, FROM))}.")
            taken[name] = value
        try:
            return kind(**taken)
        except TypeError as error:
            raise ValueError(f"{self.name} does not take {row.options!r}: {error}.") from error


def options_of(text: str) -> dict[str, Any]:
    """The arguments in `side=4,layers=(1,2)`.

    Raises:
        ValueError: it is no list of such.
    """
    found = dict[str, Any]()
    for part in _parts(text):
        name, equals, value = part.partition("=")
        if not (equals and name.isidentifier() and value):
            raise ValueError(f"{part!r} is no argument of a method: write name=value, several with commas between.")
        if name in found:
            raise ValueError(f"the argument {name} is given twice; give it once.")
        try:
            found[name] = literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _parts(text: str) -> list[str]:
    """The arguments, one by one."""
    return [part for part in re.split(r",(?![^(]*\))", text) if part]


def _of_zip(keep: int | float) -> dict[str, int | float]:
    """The paper's shares of 64 tokens."""
    if keep == 1 and not isinstance(keep, float):
        raise BadBudget(
            "vision-zip keeps a dominant token and one that gathers others: give it at least 2 of an image."
        )
    contextual = keep * 10 / 64 if isinstance(keep, float) and keep <= 1 else max(round(keep * 10 / 64), 1)
    return {"dominant": keep - contextual, "contextual": contextual}


def _prunes(name: str, label: str, colour: str, reducer: str, group: str, needs: str, paper: str) -> Method:
    return Method(name, label, colour, reducer, "filled", group=group, needs=needs, paper=paper)


def _within(name: str, label: str, colour: str, pruning: str, needs: str, paper: str, **settings: Any) -> Method:
    return Method(
        name, label, colour, pruning=pruning, leaves="filled", group="L", needs=needs, paper=paper,
        settings=tuple(settings.items()),
    )  # fmt: skip


LAST_ROW = "attention of the last token"

METHODS = {
    method.name: method
    for method in (
        Method("untouched", "untouched", "black"),
        Method(
            "dtome", "DToMe", PALETTE[0], schedules=None, group="E", needs="thresholds", adapts=True,
            paper="2504.17040",
        ),
        Method(
            "tome", "ToMe", PALETTE[1], "FixedMerge", schedules=("constant",), group="E", paper="2210.09461"
        ),
        Method("pool", "average pooling", PALETTE[2], "AveragePool", square=True, group="control"),
        Method("random", "random keep", GREY, "RandomKeep", leaves="singles", group="control"),
        Method("stride", "stride", PALETTE[4], "Stride", leaves="singles", group="control"),
        Method(
            "downscale", "smaller image", PALETTE[3], leaves="grid", square=True, of_images=False, group="control"
        ),
        _prunes("faster-vlm", "FasterVLM", PALETTE[5], "FasterVLM", "E", ATTENTION, "2412.01818v1"),
        _prunes("vis-pruner", "VisPruner", PALETTE[0], "VisPruner", "E", ATTENTION, "2412.01818"),
        Method(
            "vision-zip", "VisionZip", PALETTE[1], "VisionZip", of_images=False, group="E",
            needs=f"{ATTENTION}, keys", paper="2412.04467", arguments=_of_zip,
        ),
        Method(
            "pru-merge", "PruMerge", PALETTE[2], "PruMerge", group="E", adapts=True, needs=f"{ATTENTION}, keys",
            paper="2403.15388", solves=Solved("outliers"),
        ),
        _prunes("holo-v", "HoloV", PALETTE[3], "HoloV", "E", ATTENTION, "2510.02912"),
        Method(
            "v-scan", "VScan, first half", PALETTE[4], "VScan", group="E", needs=f"{ATTENTION} of two layers",
            paper="2505.22654",
        ),
        _prunes("saint", "SAINT", PALETTE[5], "SAINT", "E", "keys", "2503.11549"),
        Method(
            "pixel-prune", "PixelPrune", GREY, "PixelPrune", group="E", needs="pixels", adapts=True,
            solves=Solved("tolerance", 0.0),
        ),
        _prunes("div-prune", "DivPrune", PALETTE[0], "DivPrune", "P", "", "2503.02175"),
        _prunes("cd-pruner", "CDPruner", PALETTE[1], "CDPruner", "P", QUESTION, "2506.10967"),
        _prunes("mm-tok", "MMTok", PALETTE[2], "MMTok", "P", QUESTION, "2508.18264"),
        _prunes("dart", "DART on embeddings", PALETTE[3], "DARTEmbeddings", "P", QUESTION, "2502.11494"),
        _prunes("vid-com2", "VidCom2", PALETTE[4], "VidCom2", "P", "", "2505.14454"),
        Method("density-peaks", "density peaks", PALETTE[5], "DensityPeaks", group="P", paper="2406.05127"),
        Method(
            "density-threshold", "density peaks by a threshold", GREY, "DensityPeaks", group="P", adapts=True,
            paper="2406.05127", settings=(("least", 1),), solves=Solved("threshold"),
        ),
        Method("anchors", "RESTORE's anchors", PALETTE[0], "Anchors", group="P"),
        Method("ap-et", "ApET", PALETTE[1], "ApET", group="P"),
        Method("skip-vision", "Skip-Vision's merge", PALETTE[3], "SkipVision", group="P", paper="2503.21817"),
        Method(
            "hierarchical", "hierarchical pooling", PALETTE[2], "HierarchicalPool", group="P", paper="2409.14683"
        ),
        _within("fast-v", "FastV", PALETTE[0], "FastV", LAST_ROW, "2403.06764"),
        _within("pyramid-drop", "PyramidDrop", PALETTE[1], "PyramidDrop", LAST_ROW, "2410.17247"),
        _within("v-scan-drop", "VScan, second half", PALETTE[2], "PyramidDrop", LAST_ROW, "2505.22654", rates=(1 / 3,)),
        _within("reroute", "Reroute", PALETTE[3], "Reroute", LAST_ROW, ""),
        _within("sparse-vlm", "SparseVLM", PALETTE[4], "SparseVLM", "attention of the question", "2410.04417"),
        _within("dart-layers", "DART", PALETTE[5], "DART", "keys", "2502.11494"),
        Method(
            "skip-ffn", "skip-FFN", PALETTE[0], pruning="SkipFFN", leaves="singles", group="L", needs=LAST_ROW,
            paper="2503.21817",
        ),
        _within("layer-skip", "layer skipping", GREY, "LayerSkip", "", "2408.16730"),
    )
}  # fmt: skip
"""By name."""
COMPARED = [name for name in METHODS if name != "untouched"]


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to run the model.

    Attributes:
        method: one of `METHODS`.
        budget: image tokens to keep; 0 for `untouched`.
        unmerge: see `dymu.choices.Unmerge`; `FORMER` in files of older versions.
        schedule: how merges spread over the layers; empty where nothing merges in layers.
        options: further arguments of the method, `name=value` with commas between.
        solved: likewise the one that was solved for the budget, see `Method.solves`.
    """

    method: str
    budget: Count = 0
    unmerge: str = "none"
    schedule: str = ""
    options: str = ""
    solved: str = ""

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `options` and the one that is solved."""
        return options_of(f"{self.options},{self.solved}")

    @property
    def key(self) -> str:
        """Its name in files and tables: `dtome-96-exact-linear`."""
        way = self.unmerge if self.budget else ""
        parts = (self.method, str(self.budget or ""), way, self.schedule, self.options, self.solved)
        return "-".join(part for part in parts if part)


UNTOUCHED = Row("untouched")


def applying(named: str, keep: int | float, unmerge: str, layers: int, seed: int = 0) -> dict[str, Any]:
    """What `dymu.apply` takes for a method, with what stands for dropped tokens as the way to unmerge wants it.

    Args:
        named: a name, with further arguments if wanted: `holo-v:stretches=8`.
        keep: of an image, a number of tokens, or a fraction of its own; within the language model, a fraction, the mean
            over its layers.
        layers: of the language model.

    Raises:
        ValueError: there is no such method, or it takes no number; or an argument that it has not.
        BadBudget: nothing would be kept, or the method cannot drop as much.
    """
    name, _, options = named.partition(":")
    method = METHODS.get(name)
    if method is None or not method.takes_number:
        known = [one.name for one in METHODS.values() if one.takes_number]
        raise ValueError(f"{name!r} is no method that takes a number of tokens; choose some of {', '.join(known)}.")
    row = Row(name, 1, unmerge, (method.schedules or ("",))[0], options)
    check_solved(row)
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise BadBudget(f"{name} takes a number of image tokens, or a fraction of them, not {keep!r}.")
    if not method.pruning:
        return {"merge": method.make(row, keep, seed), **attending(row)}
    if not 0 < keep <= 1 or (isinstance(keep, int) and keep == 1):
        raise BadBudget(f"{name} takes a fraction of the image tokens, such as 0.3, not {keep:g}.")
    return {"prune": method.make_pruning(row, keep, seed, layers), **attending(row)}


def attending(row: Row) -> dict[str, Any]:
    """How the language model attends in a row, as `dymu.apply` takes it."""
    return {"unmerge": row.unmerge, FROM: options_of(row.options).get(FROM, 0)}


def is_solved(row: Row) -> bool:
    """Whether a row says all that its method needs, see `Method.solves`."""
    solves = METHODS[row.method].solves
    return solves is None or solves.field in row.arguments


def check_solved(row: Row) -> None:
    """Raises: ValueError, where the number that decides how many tokens are left is not known."""
    solves = METHODS[row.method].solves
    if solves is not None and not is_solved(row):
        raise ValueError(
            f"{row.method} leaves as many tokens as a picture needs, by {solves.field}: name that number "
            f"({row.method}:{solves.field}=…), or have it solved for a budget, as dymu evaluate does."
        )


def way_of(row: Row) -> str:
    """How a row unmerges, by its present name."""
    return "original" if row.unmerge == FORMER else row.unmerge


def check_names(methods: Iterable[str], unmerge: Iterable[str]) -> None:
    """Raises: ValueError, unless these are names of methods and of ways to unmerge."""
    for what, names, known in (("method", methods, tuple(METHODS)), ("way to unmerge", unmerge, UNMERGE)):
        for name in names:
            if name not in known:
                raise ValueError(f"the {what} {name!r} is unknown; choose some of {', '.join(known)}")


def _schedules(method: Method, options: str, schedules: Sequence[str]) -> Sequence[str]:
    if "schedule" in options_of(options):
        return ("",)
    return schedules if method.schedules is None else method.schedules


def rows_for(
    budgets: Iterable[int],
    methods: Iterable[str] = ("dtome",),
    unmerge: Iterable[str] = ("exact",),
    schedules: Sequence[str] = ("reverse_linear",),
) -> list[Row]:
    """The untouched model and every combination of the others, without those that would give the same results twice.

    Methods that can only keep squares take the square nearest to the budget. For single tokens all but
    `restore` and `none` equal `exact`, and a smaller image leaves nothing to unmerge. A layer to unmerge from goes with
    ways that unmerge. Where the number that a budget is solved by is named, one budget has the row.

    Args:
        methods: names, each with further arguments if wanted: `holo-v:stretches=8`.

    Raises:
        ValueError: an unknown method or way to unmerge.
    """
    budgets = sorted(set(budgets), reverse=True)
    named = [(name, ",".join(_parts(options))) for name, _, options in (method.partition(":") for method in methods)]
    ways = list(unmerge)
    check_names([name for name, _ in named], ways)
    for name, options in named:
        METHODS[name].check_options(options)
    rows = [UNTOUCHED]
    for budget in budgets:
        for method, options in ((METHODS[name], options) for name, options in named if name != "untouched"):
            kept = max(round(math.sqrt(budget)), 1) ** 2 if method.square else budget
            if budget < max(budgets) and method.solves is not None and method.solves.field in options_of(options):
                continue
            for way in ways:
                if (said := _from_layer(method, way, options)) is None:
                    continue
                for schedule in _schedules(method, options, schedules):
                    rows.append(Row(method.name, kept, method.unmerges(way, options), schedule, said))
    return list(dict.fromkeys(rows))


def _from_layer(method: Method, way: str, options: str) -> str | None:
    """The options of a row, without a layer to unmerge from where that changes nothing; None: this way unmerges in no
    layer.

    Raises:
        ValueError: it is no layer.
    """
    named = options_of(options)
    if FROM not in named:
        return options
    layer = named.pop(FROM)
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise ValueError(f"{FROM}={layer!r}: name a layer of the language model, counted from 0.")
    if layer and way in EACH_ONCE:
        return None
    if layer and method.unmerges("compact", options) == "compact":
        return options
    return ",".join(part for part in _parts(options) if not part.startswith(f"{FROM}="))
