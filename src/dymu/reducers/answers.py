"""What a reducer may not answer, said in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dymu.errors import BadBudget
from dymu.merging import Layout, a_count
from dymu.reducers.reducer import Reduced, Reducer, Stage, Tokens
from dymu.token_map import TokenMap


def check_reduced(answer: Any, reducer: Reducer, stage: Stage, tokens: Tokens) -> Reduced:
    """What a reducer answered, if it fits the tokens that it was asked to reduce.

    Raises:
        BadBudget: nothing is left of an image.
        ValueError: it is no `Reduced`, its map is none of these tokens, or its features are of another shape or kind.
    """
    name = f"{type(reducer).__name__}.{stage}"
    if not isinstance(answer, Reduced):
        raise ValueError(f"{name} must answer a Reduced, or None for no change, and answered a {_kind(answer)}.")
    reduced: Reduced = answer
    width = tokens.map.tokens if reduced.of_places else tokens.map.width
    there = tokens.map.group >= 0 if reduced.of_places else tokens.present
    reduced = replace(reduced, map=_checked(reduced.map, (len(tokens.features), width), there.device, name, there))
    features, expected = reduced.features, (len(tokens.features), reduced.map.width, tokens.features.shape[-1])
    if features is None and reduced.of_places:
        raise ValueError(f"{name} answered a map from places without features; give both.")
    if features is not None:
        shape = list(features.shape) if isinstance(features, Tensor) else _kind(features)
        if shape != list(expected):
            raise ValueError(f"{name} answered features {shape}; its map asks for {list(expected)}.")
        if not features.is_floating_point():
            raise ValueError(f"{name} answered features of {features.dtype}; give floating-point numbers.")
    empty = (reduced.map.kept < 1) & (tokens.map.kept > 0)
    is_of_items = stage == "in_prompt" or tokens.shown.single  # of an image's tiles, some may go
    if bool(empty.any() if is_of_items else empty.all()):
        raise BadBudget(f"{name} leaves no token of an image; keep at least one of each.")
    return reduced


def check_entering(
    answer: Any, before: Tensor, counts: Sequence[int], reducer: Reducer
) -> tuple[Tensor, TokenMap | None]:
    """The pixels and the map that a reducer's `before_encoder` answered, if they fit.

    Args:
        before: the pixels that it was shown.
        counts: patches (units) of each picture.

    Raises:
        BadBudget: nothing of a picture enters.
        ValueError: they do not fit.
    """
    name = f"{type(reducer).__name__}.before_encoder"
    if answer is None:
        return before, None
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[0], Tensor):
        raise ValueError(f"{name} must answer (pixels, map), or None for no change, and answered a {_kind(answer)}.")
    pixels, tokens = answer
    if not pixels.is_floating_point():
        raise ValueError(f"{name} answered pixels of {pixels.dtype}; give floating-point numbers.")
    if pixels.ndim != before.ndim or len(pixels) != len(before):
        raise ValueError(f"{name} answered pixels {list(pixels.shape)} for {list(before.shape)}; give as many.")
    if tokens is not None:
        tokens = _checked(tokens, (len(counts), max(counts)), before.device, name)
        if bool((tokens.kept < 1).any()):
            raise BadBudget(f"{name} lets nothing of a picture enter; let at least one patch of each.")
        group = tokens.group
        there = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        if not torch.equal((group >= 0).cpu(), there):
            raise ValueError(
                f"{name} answered a map that drops patches, or names some that a picture does not have; say -1 past a "
                "picture's end alone, and for others which one enters in their place."
            )
    return pixels, tokens


def check_partners(into: Any, still: Any, rows: Layout, prefix: int, reducer: Reducer) -> None:
    """Refuse what is no answer of `Reducer.in_layer` about the tokens of some rows; `merge_step` looks at the numbers.

    Args:
        prefix: see `Candidates`.

    Raises:
        ValueError: it is none.
    """
    name, shape = f"{type(reducer).__name__}.in_layer", (rows.batch, a_count(rows.longest, prefix))
    if not isinstance(into, Tensor) or into.dtype != torch.int64 or tuple(into.shape) != shape:
        raise ValueError(
            f"{name} must answer int64 {list(shape)}, the partner of each A token or -1, and answered {_kind(into)}."
        )
    if still is not None and (not isinstance(still, Tensor) or still.dtype != torch.bool or still.shape != shape[:1]):
        raise ValueError(f"{name} must say bool [{shape[0]}], which rows do not merge, and said {_kind(still)}.")


def _checked(
    tokens: Any, shape: tuple[int, int], device: torch.device, name: str, there: Tensor | None = None
) -> TokenMap:
    if not isinstance(tokens, TokenMap):
        raise ValueError(f"{name} must answer a TokenMap, and answered a {_kind(tokens)}.")
    group, kept = tokens.group, tokens.kept
    typed = isinstance(tokens.width, int) and isinstance(group, Tensor) and isinstance(kept, Tensor)
    if typed and tuple(group.shape) != shape:
        raise ValueError(f"{name} was asked about tokens {list(shape)} and answered a map of {list(group.shape)}.")
    whole, dropped = typed and group.dtype == kept.dtype == torch.int64 and tuple(kept.shape) == shape[:1], True
    whole = whole and group.device == kept.device == device
    if whole:
        width = max(tokens.width, 1)
        counts = group.new_zeros(shape[0], width).scatter_add(1, group.clamp(0, width - 1), (group >= 0).long())
        named = torch.arange(width, device=group.device) < kept[:, None]
        fits = ((group >= -1) & (group < tokens.width)).all() & ((counts > 0) == named).all()
        fits = fits if there is None else fits & ~((group >= 0) & ~there).any()
        whole, dropped = torch.stack((fits, (group < 0).any())).tolist()
    if not whole:
        raise ValueError(
            f"{name} answered a map that is none: number the groups of each row in int64 from 0 on with none left out, "
            "-1 for dropped tokens and for those past a row's end, all on the device of the tokens, as "
            "TokenMap.from_leaders does."
        )
    return replace(tokens, padded=True) if dropped and not tokens.padded else tokens


def _kind(answer: Any) -> str:
    return f"{answer.dtype} {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
