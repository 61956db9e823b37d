"""Vision encoders by themselves: CLIP, SigLIP and DINO in transformers, and the towers of timm and open_clip."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from dymu.errors import UnsupportedModel
from dymu.families.family import Tower
from dymu.families.known import FAMILIES
from dymu.families.resolve import (
    HOW_TO_ADD,
    EncoderParts,
    Parts,
    encoder_parts,
    refuse_spread,
    resolve,
    unwrapped,
)
from dymu.families.towers import ENCODERS

WITHIN = {
    "clip": "vision_model",
    "clip_vision_model": "vision_model",
    "siglip": "vision_model",
    "siglip2": "vision_model",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2_with_registers",
    "open_clip.CLIP": "visual",
    "open_clip.CustomTextCLIP": "visual",
    "open_clip.TimmModel": "trunk",
}
"""By the type of a model: where its vision encoder is, if it is none itself."""

METHODS = ("forward", "forward_features", "forward_intermediates", "get_intermediate_layers")
"""What callers may call of an encoder, where it has such a method; each takes the pixels first."""


@dataclass(frozen=True)
class LoneEncoder(EncoderParts):
    """The parts of a vision encoder by itself, or of a model whose only half that merges it is.

    Attributes:
        model: what the user gave, without wrappers.
    """

    model: nn.Module

    @property
    def relied_on(self) -> tuple[nn.Module, ...]:
        """See `Parts.relied_on`."""
        return self.model, self.tower, *self.encoder_modules, *self.encoder_attentions

    def feature_layers(self) -> list[int]:
        """See `Parts.feature_layers`: all layers are read."""
        return [len(self.encoder_modules)]

    def dropped(self) -> int:
        """See `Parts.dropped`."""
        return 0

    @property
    def cuts_images(self) -> bool:
        """See `Family.cuts_images`."""
        return False

    @property
    def pixels(self) -> str:
        """The name of the argument with the pixels."""
        return list(inspect.signature(type(self.tower).forward).parameters)[1]


def parts_of(model: Any) -> Parts | LoneEncoder:
    """The parts of a vision-language model, or of a vision encoder by itself, within wrappers or not.

    Raises:
        UnsupportedModel: it is not described.
    """
    model = unwrapped(model)
    if type_of(model) in FAMILIES:
        return resolve(model)
    at = _tower_in(model)
    if at is None:
        known = (name for kind in ENCODERS for name in kind.model_types)
        raise UnsupportedModel(
            f"the model type {type_of(model)!r} is not described; described are {', '.join(FAMILIES)}, and the vision "
            f"encoders {', '.join(known)}; {HOW_TO_ADD}."
        )
    refuse_spread(model)
    tower, kind = at
    return LoneEncoder(**encoder_parts(tower, kind), model=model)


def type_of(model: Any) -> str:
    """transformers' name of an architecture; where there is none, library and class."""
    name = getattr(getattr(model, "config", None), "model_type", None)
    return str(name or f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}")


def _tower_in(model: Any) -> tuple[nn.Module, Tower] | None:
    """The vision encoder that a model is, or holds."""
    name = type_of(model)
    within = getattr(model, "_modules", {}).get(WITHIN.get(name, ""))
    if within is not None:
        return _tower_in(unwrapped(within))
    return next(((model, kind) for kind in ENCODERS if name in kind.model_types), None)
