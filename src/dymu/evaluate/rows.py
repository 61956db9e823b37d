"""What is compared: ways to run one model with fewer image tokens, each a `Row`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from dymu.apply import Handle, apply
from dymu.errors import BadBudget, UnsupportedModel
from dymu.families import FAMILIES, resolve
from dymu.merging import AveragePool, FixedMerge, MergeRule, RandomKeep, Reduction, Schedule
from dymu.thresholds import Thresholds
from dymu.unmerging import UNMERGE, Unmerge

Method = Literal["untouched", "dtome", "tome", "pool", "random", "downscale"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Row:
    """One way to run the model.

    Attributes:
        method: `untouched`; `dtome`: merging by threshold; `tome`: merging a fixed number per layer; `pool`: averaging
            the finished tokens over the fields of a grid; `random`: keeping tokens drawn at random; `downscale`: the
            stock model on a smaller image.
        budget: image tokens to keep; 0 for `untouched`. A square for `pool` and `downscale`.
        unmerge: see `dymu.unmerging.Unmerge`.
        schedule: how merges spread over the layers; empty where nothing merges in layers.
    """

    method: Method
    budget: int = 0
    unmerge: Unmerge = "none"
    schedule: Schedule | Literal[""] = ""

    @property
    def key(self) -> str:
        """Its name in files and tables: `dtome-96-exact-linear`."""
        parts = (self.method, str(self.budget or ""), self.unmerge if self.budget else "", self.schedule)
        return "-".join(part for part in parts if part)

    @property
    def side(self) -> int:
        """Tokens along each side, where the budget is a square."""
        return math.isqrt(self.budget)


UNTOUCHED = Row("untouched")


def rows_for(
    budgets: Iterable[int],
    methods: Iterable[Method] = ("dtome",),
    unmerge: Iterable[Unmerge] = ("exact",),
    schedules: Iterable[Schedule] = ("reverse_linear",),
) -> list[Row]:
    """The untouched model, and every combination of the others that says something of its own, once.

    ToMe always has its own schedule, `constant`. `pool` and `downscale` take the square nearest to the budget. Tokens
    that stay in their places (`random`) are as well off with `compact` as with `exact`, and a smaller image leaves
    nothing to unmerge.

    Raises:
        ValueError: an unknown method or way to unmerge.
    """
    methods, wanted, schedules = list(methods), list(unmerge), list(schedules)
    for given, known in ((methods, METHODS), (wanted, UNMERGE)):
        for name in given:
            if name not in known:
                raise ValueError(f"{name!r} is unknown; choose some of {', '.join(known)}")
    rows = [UNTOUCHED]
    for budget in sorted(set(budgets), reverse=True):
        square = max(round(math.sqrt(budget)), 1) ** 2
        for method in methods:
            for way in wanted:
                if method == "dtome":
                    rows += [Row(method, budget, way, schedule) for schedule in schedules]
                elif method == "tome":
                    rows.append(Row(method, budget, way, "constant"))
                elif method == "random":
                    rows.append(Row(method, budget, "none" if way == "none" else "exact"))
                elif method == "pool":
                    rows.append(Row(method, square, way))
                elif method == "downscale":
                    rows.append(Row(method, square))
    return list(dict.fromkeys(rows))


def check(row: Row, model: Any, tokens: int, thresholds: Mapping[str, Thresholds]) -> None:
    """Find out whether a row can be had, before any work.

    Args:
        tokens: of one image, unmerged.

    Raises:
        BadBudget: it keeps more tokens than there are, or fewer than its method can; or there are no thresholds for it.
        UnsupportedModel: its method keeps so many tokens of a picture, and the model cuts images into several.
        BadThresholds: see `dymu.apply`.
    """
    if row.method not in ("untouched", "dtome") and resolve(model, FAMILIES).family.cuts_images:
        raise UnsupportedModel(
            f"{row.method} keeps a number of tokens of each picture, and this model cuts images into several; "
            "compare dtome with the untouched model."
        )
    if row.budget > tokens:
        raise BadBudget(f"a budget of {row.budget} is more than the {tokens} image tokens that there are; take less.")
    rule = _rule(row, 0)
    if rule is not None:
        rule.choosers(tokens, max(resolve(model, FAMILIES).feature_layers()))
    if isinstance(rule, Reduction):
        rule.reduction(1, tokens, torch.device("cpu"))
    if row.method == "dtome":
        with applied(row, model, None, thresholds):
            pass


@contextmanager
def applied(
    row: Row, model: Any, processor: Any, thresholds: Mapping[str, Thresholds], seed: int = 0
) -> Iterator[Handle | None]:
    """The model (and for `downscale` the processor) as the row wants it, for a moment.

    Args:
        thresholds: by their schedule.
        seed: of what is drawn at random.

    Raises:
        BadBudget: there are no thresholds of the row's schedule.
        UnsupportedModel: the row cannot be had with this model.
    """
    if row.method == "untouched":
        yield None
    elif row.method == "downscale":
        with _downscaled(model, processor, row.side):
            yield None
    elif row.method == "dtome":
        if row.schedule not in thresholds:
            raise BadBudget(
                f"there are no thresholds of the schedule {row.schedule!r}; calibrate them with "
                f"`dymu calibrate … --schedule {row.schedule}`."
            )
        with apply(model, thresholds[row.schedule], budget=row.budget, unmerge=row.unmerge) as handle:
            yield handle
    else:
        with apply(model, merge=_rule(row, seed), unmerge=row.unmerge) as handle:
            yield handle


def _rule(row: Row, seed: int) -> MergeRule | None:
    """What `dymu.apply` is to merge by; None where that is thresholds or nothing."""
    if row.method == "tome":
        return FixedMerge(row.budget, row.schedule or "constant")
    if row.method == "pool":
        return AveragePool(row.side)
    return RandomKeep(row.budget, seed) if row.method == "random" else None


@contextmanager
def _downscaled(model: Any, processor: Any, side: int) -> Iterator[None]:
    """The stock model on images of `side` x `side` patches, its position embedding interpolated."""
    parts = resolve(model, FAMILIES)
    images = processor.image_processor
    crop, patch = getattr(images, "crop_size", None), parts.tower.config.patch_size
    size = images.size
    if size is None or not {"shortest_edge", "height"} & set(dict(size)):
        raise UnsupportedModel("this image processor has no fixed size that could be made smaller.")
    pixels = side * patch
    interpolates = "interpolate_pos_encoding" in inspect.signature(parts.tower.forward).parameters

    def interpolated(_tower: object, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "interpolate_pos_encoding": True}

    hook = parts.tower.register_forward_pre_hook(interpolated, with_kwargs=True) if interpolates else None
    square = {"height": pixels, "width": pixels}
    if "shortest_edge" in dict(size):  # as much is cropped as of the full image
        shown = crop["height"] if crop is not None else size["shortest_edge"]
        images.size = type(size)(shortest_edge=round(size["shortest_edge"] * pixels / shown))
    else:
        images.size = type(size)(**square)
    if crop is not None:
        images.crop_size = type(crop)(**square)
    try:
        yield
    finally:
        images.size = size
        if crop is not None:
            images.crop_size = crop
        if hook is not None:
            hook.remove()
