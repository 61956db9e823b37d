"""Run a model in the way of a row."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from dymu.choices import EACH_ONCE
from dymu.errors import BadBudget, UnsupportedModel
from dymu.evaluation.methods import FROM, METHODS, Row, attending, check_names, check_solved, options_of, way_of
from dymu.families.resolve import Parts, find, resolve
from dymu.handle import Handle, applied, handle_of, remembering
from dymu.hooks.refusals import refuse_to_prune
from dymu.reducers import LayerMemory
from dymu.thresholds import Thresholds


def check(row: Row, model: Any, tokens: int, thresholds: Mapping[str, Thresholds]) -> None:
    """Check, before any work, that a model can run a row.

    Args:
        tokens: of one image, unmerged.
        thresholds: by their schedule.

    Raises:
        BadBudget: it keeps more tokens than there are, or fewer than its method can; or there are no thresholds for it.
        UnsupportedModel: its method's budget is of a picture, and the model cuts images into several.
        BadThresholds: see `dymu.apply`.
        ValueError: an unknown method or way to unmerge, or a number that is still to be solved.
    """
    check_names([row.method], [row.unmerge])
    check_solved(row)
    method, parts = METHODS[row.method], resolve(model)
    if method.pruning and way_of(row) == "restore":
        raise BadBudget(f'unmerge="restore" is for tokens that all layers run, and {row.method} is no such method.')
    try:
        _check_layers(row, parts, tokens)
    except ValueError as error:
        raise BadBudget(f"{row.method} does not fit this model: {error}") from error
    one_size = parts.tower_kind.arrangement == "batch" and not parts.cuts_images and parts.family.unit is None
    if not one_size and not method.of_images:
        others = ", ".join(name for name, other in METHODS.items() if other.of_images)
        raise UnsupportedModel(
            f"{row.method} sets one size for every picture, and this model cuts images into several, takes them as "
            f"large as they are, or makes one token of several patches; compare some of {others}."
        )
    check_budget(row, tokens)
    check_from(row, model)
    if row.method == "dtome":
        with running(row, model, None, thresholds, tokens):
            pass


def _check_layers(row: Row, parts: Parts, tokens: int) -> None:
    """Raises: ValueError, BadBudget or UnsupportedModel, where a row's method names layers that there are not, or
    cannot keep its budget."""
    method = METHODS[row.method]
    if method.reducer:
        method.make(row, row.budget / tokens, 0).check_fits(max(parts.feature_layers()), tokens)
    if method.pruning:
        refuse_to_prune(parts)
        method.make_pruning(row, row.budget / tokens, 0, len(parts.decoder_layers))


def check_from(row: Row, model: Any) -> None:
    """Raises: BadBudget, where a row unmerges from a layer on that there is not, or in no layer."""
    layer, layers = options_of(row.options).get(FROM, 0), len(resolve(model).decoder_layers)
    known = isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer <= layers
    if not known or (layer and way_of(row) in EACH_ONCE):
        raise BadBudget(
            f"{row.key} cannot run: {FROM} is a layer of the language model, from 0 to {layers}, with exact or "
            "representative."
        )


def check_budget(row: Row, tokens: int) -> None:
    """Raises: BadBudget, where it is more than the tokens of one image."""
    if row.budget > tokens:
        raise BadBudget(f"a budget of {row.budget} is more than the {tokens} image tokens that there are; take less.")


@contextmanager
def running(
    row: Row, model: Any, processor: Any, thresholds: Mapping[str, Thresholds], tokens: int, seed: int = 0
) -> Iterator[Handle | None]:
    """Change the model (and for a smaller image the processor) as the row says, while the context lasts.

    Args:
        thresholds: by their schedule.
        tokens: of one image, unmerged.
        seed: of all random numbers.

    Raises:
        BadBudget: there are no thresholds of the row's schedule.
        UnsupportedModel: this model cannot run the row.
    """
    method = METHODS[row.method]
    options: dict[str, Any] | None = None
    if row.method == "dtome":
        if row.schedule not in thresholds:
            raise BadBudget(
                f"there are no thresholds of the schedule {row.schedule!r}; calibrate them with "
                f"`dymu calibrate … --schedule {row.schedule}`."
            )
        options = {"thresholds": thresholds[row.schedule], "budget": row.budget, **attending(row)}
    elif method.reducer:
        options = {"merge": method.make(row, row.budget / tokens, seed), **attending(row)}
    elif method.pruning:
        layers = len(resolve(model).decoder_layers)
        prune = method.make_pruning(row, row.budget / tokens, seed, layers)
        options = {"prune": prune, **attending(row)}
    if row.method == "downscale":
        with _smaller(model, processor, math.isqrt(row.budget)):
            yield None
    else:
        with applied(model, options) as handle:
            yield handle


@torch.inference_mode()
def encoded(model: Any, inputs: dict[str, Any], memory: LayerMemory) -> dict[str, Any]:
    """What a model takes, with its images encoded as the model is now: for several calls, in any form of unmerging.

    A model whose `forward` takes no encoded images gets pixels.

    Args:
        memory: of what encoded images before with the same weights, and remembers.
    """
    if inputs.get("pixel_values") is None or not model._supports_mm_encoder_outputs():
        return inputs
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    handle = handle_of(model)
    with nullcontext() if handle is None else remembering(handle, memory):
        return {**rest, "mm_encoder_outputs": {"image": encoded_images(model, inputs)}}


@torch.inference_mode()
def encoded_images(model: Any, inputs: dict[str, Any]) -> Any:
    """The images of what a model takes, encoded as the model is now."""
    inner: Any = resolve(model).inner
    names = set(inspect.signature(type(inner).get_image_features).parameters)
    if handle_of(model) is not None:
        names |= {"input_ids", "attention_mask"}  # for reducers that read the question
    taken = {name: value for name, value in inputs.items() if name in names}
    return inner.get_image_features(**taken, return_dict=True)


@contextmanager
def _smaller(model: Any, processor: Any, side: int) -> Iterator[None]:
    """Show the stock model images of `side` x `side` patches, with interpolated position embeddings."""
    parts = resolve(model)
    images = processor.image_processor
    crop, patch = getattr(images, "crop_size", None), find(parts.tower, parts.tower_kind.patch_size)
    size = images.size
    if size is None or not {"shortest_edge", "height"} & set(dict(size)):
        raise UnsupportedModel("this image processor has no fixed size that could be made smaller.")
    if not isinstance(patch, int):
        raise UnsupportedModel("this vision encoder's patches are not square, so there is no smaller square of them.")
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
