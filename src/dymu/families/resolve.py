"""Find the parts of a loaded model that merging and unmerging change, by name, or raise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from torch import nn
from transformers import PreTrainedModel

from dymu.errors import UnsupportedModel
from dymu.families.family import Decoder, Family, Tower
from dymu.families.known import FAMILIES
from dymu.merging import EncoderLayer

Kind = TypeVar("Kind", Tower, Decoder)

Modality = Literal["image", "video"]

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Kinds of rotary angles that depend on how long the prompt is."""

ENCODER_PARTS, ENCODER_LISTS = (
    ("norm1", "query", "key", "value", "out", "norm2", "mlp"),
    ("after_attention", "after_mlp"),
)
"""Fields of `Tower` that hold a path, or several, and of `EncoderLayer` that hold the module there, or several."""

HOW_TO_ADD = "docs/add-a-family.md says how to describe another"


@dataclass(frozen=True)
class Parts:
    """The parts of one model."""

    family: Family
    config: Any
    model: PreTrainedModel
    inner: PreTrainedModel
    tower: PreTrainedModel
    projector: nn.Module
    pooler: nn.Module | None
    language_model: PreTrainedModel
    encoder_modules: tuple[nn.Module, ...]
    encoder_layers: tuple[EncoderLayer, ...]
    attentions: tuple[nn.Module, ...]
    rotary: nn.Module
    prefix: int
    """Class and register tokens ahead of the image's."""

    @property
    def placeholders(self) -> dict[Modality, int]:
        """In `input_ids`, the id that stands for one token of an image, or of a video."""
        names: dict[Modality, str | None] = {"image": self.family.image_token, "video": self.family.video_token}
        return {modality: int(getattr(self.config, name)) for modality, name in names.items() if name is not None}

    @property
    def pools_with_weights(self) -> bool:
        """Whether the frames of a video are pooled by learned weights."""
        return self.pooler is not None and any(True for _ in self.pooler.parameters())

    def feature_layers(self, arguments: Mapping[str, Any] = MappingProxyType({})) -> list[int]:
        """How many encoder layers each used feature went through, by the arguments of a call or else by the config."""
        names = self.family.feature_layer.split("|")
        named = [arguments[name] for name in names if arguments.get(name) is not None]
        requested = named[0] if named else find(self.config, self.family.feature_layer)
        layers = [requested] if isinstance(requested, int) else list(requested)
        return [layer % (len(self.encoder_layers) + 1) for layer in layers]

    def dropped(self, strategy: str | None = None) -> int:
        """Leading encoder tokens that the language model does not get: 1 for the strategy `default`, 0 for `full`."""
        return int((strategy or getattr(self.config, self.family.select_strategy, "default")) == "default")


def find(root: nn.Module, path: str) -> Any:
    """The part of `root` at a dotted path; of alternatives `a.b|c.d`, the first that exists.

    Raises:
        UnsupportedModel: no alternative exists.
    """
    for alternative in path.split("|"):
        try:
            return attrgetter(alternative)(root)
        except AttributeError:
            continue
    raise UnsupportedModel(
        f"{type(root).__name__} has no part named {path.replace('|', ' or ')}, where its family description "
        "expects one; it may be a version of transformers that dymu does not know (dymu supports >=5.18,<6)."
    )


def _kind(kinds: tuple[Kind, ...], what: str, model_type: str) -> Kind:
    for kind in kinds:
        if model_type in kind.model_types:
            return kind
    known = ", ".join(name for kind in kinds for name in kind.model_types)
    raise UnsupportedModel(f"the {what} {model_type!r} is not described; described are {known}; {HOW_TO_ADD}.")


def _encoder_layer(module: nn.Module, tower: Tower, heads: int) -> EncoderLayer:
    parts: dict[str, Any] = {name: find(module, getattr(tower, name)) for name in ENCODER_PARTS}
    parts |= {name: tuple(find(module, path) for path in getattr(tower, name)) for name in ENCODER_LISTS}
    return EncoderLayer(heads=heads, **parts)


def resolve(model: PreTrainedModel) -> Parts:
    """Find the parts of `model`.

    Raises:
        UnsupportedModel: its family, vision encoder or language model is not described.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModel(
            f"the model type {model_type!r} is not described; described are {', '.join(FAMILIES)}; {HOW_TO_ADD}."
        )
    if not hasattr(model, family.inner.split(".")[0]):
        raise UnsupportedModel(
            f"{type(model).__name__} is only a part of a {model_type} model; give the whole one, "
            "as AutoModelForImageTextToText loads it."
        )
    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:
        raise UnsupportedModel(
            f"the model is spread over several devices ({', '.join(map(str, devices))}), which dymu does not know yet; "
            "load it onto one."
        )
    inner = find(model, family.inner)
    tower = find(inner, family.tower)
    language_model = find(inner, family.language_model)
    tower_kind = _kind(family.towers, "vision encoder", tower.config.model_type)
    decoder_kind = _kind(family.decoders, "language model", language_model.config.model_type)
    rotary = find(language_model, decoder_kind.rotary)
    if getattr(rotary, "rope_type", "default") in LENGTH_DEPENDENT_ROPE:
        raise UnsupportedModel(
            f"the language model's rotary angles ({rotary.rope_type}) depend on how long the prompt is, which dymu "
            "does not follow yet; use a model with another kind."
        )
    modules = tuple(find(tower, tower_kind.layers))
    registers = getattr(tower.config, tower_kind.registers, 0) if tower_kind.registers else 0
    return Parts(
        family=family,
        config=config,
        model=model,
        inner=inner,
        tower=tower,
        projector=find(inner, family.projector),
        pooler=None if family.pooler is None else find(inner, family.pooler),
        language_model=language_model,
        encoder_modules=modules,
        encoder_layers=tuple(
            _encoder_layer(module, tower_kind, tower.config.num_attention_heads) for module in modules
        ),
        attentions=tuple(find(layer, decoder_kind.attention) for layer in find(language_model, decoder_kind.layers)),
        rotary=rotary,
        prefix=int(tower_kind.class_token) + registers,
    )
