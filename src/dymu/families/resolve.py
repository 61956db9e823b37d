"""Find the parts of a loaded model that merging and unmerging change, by name, or raise."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from dymu.errors import UnsupportedModel
from dymu.families.family import Decoder, Family, Tower
from dymu.families.known import FAMILIES
from dymu.merging import EncoderLayer

Kind = TypeVar("Kind", Tower, Decoder)

Modality = Literal["image", "video"]

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Kinds of rotary angles that depend on how long the prompt is."""

ENCODER_PARTS, ENCODER_LISTS = ("norm1", "out", "norm2", "mlp"), ("after_attention", "after_mlp")
"""Fields of `Tower` that hold a path, or several, and of `EncoderLayer` that hold the module there, or several."""

HOW_TO_ADD = "docs/add-a-family.md says how to describe another"


@dataclass(frozen=True)
class EncoderParts:
    """The parts of one vision encoder."""

    tower: nn.Module
    tower_kind: Tower
    encoder_modules: tuple[nn.Module, ...]
    prefix: int
    """Class and register tokens ahead of the image's."""

    def encoder_layer(self, index: int) -> EncoderLayer:
        """Encoder layer `index`, its parts as they are now: adapters and quantisation exchange them at any time."""
        module, kind = self.encoder_modules[index], self.tower_kind
        parts: dict[str, Any] = {name: find(module, getattr(kind, name)) for name in ENCODER_PARTS}
        parts |= {name: tuple(find(module, path) for path in getattr(kind, name)) for name in ENCODER_LISTS}
        norms = (kind.query_norm, kind.key_norm, kind.value_norm)
        return EncoderLayer(
            projections=tuple(find(module, path) for path in self._projections),
            norms=tuple(None if path is None else find(module, path) for path in norms),  # type: ignore[arg-type]
            norms_heads=kind.norms_heads,
            turning=kind.turning,
            scaling=kind.scaling,
            heads=self.heads,
            **parts,
        )

    @property
    def encoder_layers(self) -> tuple[EncoderLayer, ...]:
        """All of them, see `encoder_layer`."""
        return tuple(map(self.encoder_layer, range(len(self.encoder_modules))))

    @property
    def encoder_attentions(self) -> tuple[nn.Module, ...]:
        """The modules that hold the query of each encoder layer, whose own forward does not run."""
        path = self._projections[0].rpartition(".")[0] or self._projections[0]
        return tuple(find(module, path) for module in self.encoder_modules)

    @property
    def merger(self) -> nn.Module | None:
        """See `Tower.merger`."""
        path = self.tower_kind.merger
        return None if path is None else find(self.tower, path)

    @property
    def places(self) -> nn.Module | None:
        """See `Tower.places`."""
        path = self.tower_kind.places
        return None if path is None else find(self.tower, path)

    @property
    def side_mergers(self) -> tuple[nn.Module, ...]:
        """See `Tower.side_mergers`."""
        path = self.tower_kind.side_mergers
        return () if path is None else tuple(map(_plain, find(self.tower, path)))

    @property
    def heads(self) -> int:
        return int(find(self.tower, self.tower_kind.heads))

    @property
    def width(self) -> int:
        """C, channels of a patch."""
        return int(find(self.tower, self.tower_kind.width))

    @property
    def patch_sides(self) -> tuple[int, int]:
        """Pixels of a patch, high and wide."""
        sides = find(self.tower, self.tower_kind.patch_size)
        height, width = (sides, sides) if isinstance(sides, int) else sides
        return height, width

    @property
    def _projections(self) -> tuple[str, ...]:
        kind = self.tower_kind
        paths = (kind.query, kind.key, kind.value) if kind.qkv is None else (kind.qkv,)
        return tuple(path for path in paths if path is not None)


@dataclass(frozen=True)
class Parts(EncoderParts):
    """The parts of one model."""

    family: Family
    config: Any
    model: PreTrainedModel
    inner: PreTrainedModel
    projector: nn.Module | None
    pooler: nn.Module | None
    language_model: PreTrainedModel
    decoder_kind: Decoder
    attentions: tuple[nn.Module, ...]
    rotary: nn.Module

    @property
    def angle_kinds(self) -> tuple[str, ...]:
        """The kinds of rotary angles that the attention layers ask for; one without a name where all have the same."""
        return tuple(dict.fromkeys(map(self.angle_kind, self.attentions)))

    def angle_kind(self, attention: nn.Module) -> str:
        """That of one attention layer."""
        name = self.decoder_kind.layer_type
        return "" if name is None else str(find(attention, name))

    @property
    def mixers(self) -> tuple[nn.Module, ...]:
        """See `Decoder.mixer`."""
        path = self.decoder_kind.mixer
        return () if path is None else tuple(find(layer, path) for layer in self.decoder_layers if hasattr(layer, path))

    @property
    def decoder_layers(self) -> tuple[nn.Module, ...]:
        return tuple(map(_plain, find(self.language_model, self.decoder_kind.layers)))

    @property
    def decoder_mlps(self) -> tuple[nn.Module, ...]:
        """Those of all layers of the language model."""
        path = "|".join(path for path in self.decoder_kind.by_token if not path.startswith("self_attn"))
        return tuple(find(layer, path) for layer in self.decoder_layers)

    @property
    def last_by_token(self) -> tuple[nn.Module, ...]:
        """See `Decoder.by_token`: those of the last layer, if it attends."""
        last, found = self.decoder_layers[-1], list[nn.Module]()
        for path in self.decoder_kind.by_token if not self.mixers else ():
            with suppress(AttributeError):
                found.append(_plain(attrgetter(path)(last)))
        return tuple(found)

    @property
    def choosing_attention(self) -> tuple[Any, ...]:
        """The modules whose config says which function attends: the language model's attention layers, or what is
        within them where somebody wrapped them."""
        return tuple(
            module for attention in self.attentions for module in attention.modules() if "config" in module.__dict__
        )

    @property
    def relied_on(self) -> tuple[nn.Module | None, ...]:
        """Every module that `dymu.apply` changes, or computes itself."""
        return (
            self.model, self.inner, self.language_model, self.rotary,
            *self.attentions, *self.mixers, *self.choosing_attention, *self.last_by_token, *self.vision,
        )  # fmt: skip

    @property
    def vision(self) -> tuple[nn.Module | None, ...]:
        """Of these, what only pictures pass through."""
        return (
            self.tower, self.merger, self.places, self.projector, self.pooler,
            *self.encoder_modules, *self.encoder_attentions, *self.side_mergers,
        )  # fmt: skip

    @property
    def placeholders(self) -> dict[Modality, int]:
        """In `input_ids`, the id that stands for one token of an image, or of a video."""
        names: dict[Modality, str | None] = {"image": self.family.image_token, "video": self.family.video_token}
        return {modality: int(getattr(self.config, name)) for modality, name in names.items() if name is not None}

    @property
    def learned(self) -> Tensor:
        """[learned, C], the learned tokens that the family puts among image features."""
        tokens = [getattr(self.inner, name).detach().view(1, -1) for name in self.family.learned]
        return torch.cat(tokens) if tokens else torch.empty(0, self.language_model.config.hidden_size)

    @property
    def cuts_images(self) -> bool:
        """See `Family.cuts_images`."""
        return self.family.cuts_images

    @property
    def pools_with_weights(self) -> bool:
        """Whether the frames of a video are pooled by learned weights."""
        return self.pooler is not None and any(True for _ in self.pooler.parameters())

    def side(self, modality: Modality = "image", arguments: Mapping[str, Any] = MappingProxyType({})) -> int:
        """Rows, and columns, of the patches of a unit, which the family makes one token of, by the arguments of a call
        or by the config.

        Raises:
            UnsupportedModel: it differs among the items of a call.
        """
        unit = self.family.unit
        if unit is None:
            return 1
        if "{modality}" not in unit:
            side: float = find(self.inner, unit)
            return round(1 / side) if side < 1 else int(side)
        sides = set(map(int, arguments.get(unit.format(modality=modality), (1,))))
        if len(sides) > 1:
            raise UnsupportedModel(
                f"the {modality}s of one call are merged by different sizes ({', '.join(map(str, sorted(sides)))}), "
                "which dymu does not know yet; give them in calls of their own."
            )
        return sides.pop()

    def feature_layers(self, arguments: Mapping[str, Any] = MappingProxyType({})) -> list[int]:
        """How many encoder layers each used feature went through, by the arguments of a call or else by the config."""
        described = self.family.feature_layer
        if isinstance(described, int):
            return [described % (len(self.encoder_modules) + 1)]
        named = [arguments[name] for name in described.split("|") if arguments.get(name) is not None]
        requested = named[0] if named else find(self.config, described)
        layers = [requested] if isinstance(requested, int) else list(requested)
        return [layer % (len(self.encoder_modules) + 1) for layer in layers]

    def dropped(self, strategy: str | None = None) -> int:
        """Leading encoder tokens that the language model does not get: 1 for the strategy `default`, 0 for `full`, or
        where the family has no strategies."""
        name = self.family.select_strategy
        return 0 if name is None else int((strategy or getattr(self.config, name, "default")) == "default")


def find(root: Any, path: str) -> Any:
    """The part of `root` at a dotted path; of alternatives `a.b|c.d`, the first that exists.

    Raises:
        UnsupportedModel: no alternative exists.
    """
    for alternative in path.split("|"):
        try:
            return _plain(attrgetter(alternative)(root))
        except AttributeError:
            continue
    major, minor = map(int, transformers.__version__.split(".")[:2])
    why = "somebody exchanged that part of the model, or the description is wrong"
    if not (5, 18) <= (major, minor) < (6, 0):
        why = f"dymu supports transformers >=5.18,<6, and this is {transformers.__version__}"
    raise UnsupportedModel(
        f"{type(root).__name__} has no part named {path.replace('|', ' or ')}, where its family description "
        f"expects one: {why}."
    )


def _plain(part: Any) -> Any:
    """The module that torch.compile made a part of."""
    return part._modules.get("_orig_mod", part) if isinstance(part, nn.Module) else part


def unwrapped(model: Any) -> Any:
    """The transformers model within wrappers of PEFT, torch.compile and DistributedDataParallel.

    Raises:
        UnsupportedModel: DataParallel, which copies the model for every call.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise UnsupportedModel(
                "DataParallel copies the model for every call, which dymu cannot follow: apply it to the model itself "
                "(wrapper.module) on one device, or use DistributedDataParallel."
            )
        modules = getattr(model, "_modules", {})
        if "_orig_mod" in modules:  # torch.compile
            model = modules["_orig_mod"]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif callable(getattr(type(model), "get_base_model", None)):  # PEFT
            model = model.get_base_model()
        elif type(model).__name__ == "PeftMixedModel":
            model = model.base_model.model
        else:
            return model


def _kind(kinds: tuple[Kind, ...], what: str, model_type: str) -> Kind:
    for kind in kinds:
        if model_type in kind.model_types:
            return kind
    known = ", ".join(name for kind in kinds for name in kind.model_types)
    raise UnsupportedModel(f"the {what} {model_type!r} is not described; described are {known}; {HOW_TO_ADD}.")


def refuse_spread(model: Any) -> None:
    """Raises UnsupportedModel where the parts of a model are on several devices."""
    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:
        raise UnsupportedModel(
            f"the model is spread over several devices ({', '.join(map(str, devices))}), which dymu does not know yet; "
            "load it onto one."
        )


def encoder_parts(tower: nn.Module, kind: Tower) -> dict[str, Any]:
    """The fields of `EncoderParts`.

    Raises:
        UnsupportedModel: a layer stands in several places.
    """
    modules = tuple(map(_plain, find(tower, kind.layers)))
    if len(set(modules)) < len(modules):
        raise UnsupportedModel(
            "the vision encoder has the same layer in several places, which dymu cannot tell apart; give each place a "
            "layer of its own."
        )
    registers = int(find(tower, kind.registers)) if kind.registers else 0
    prefix = int(kind.class_token) + registers
    return {"tower": tower, "tower_kind": kind, "encoder_modules": modules, "prefix": prefix}


def resolve(model: PreTrainedModel) -> Parts:
    """Find the parts of `model`, or of the one that it wraps, see `unwrapped`.

    Raises:
        UnsupportedModel: its family, vision encoder or language model is not described.
    """
    model = unwrapped(model)
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModel(
            f"the model type {model_type!r} is not described; described are {', '.join(FAMILIES)}; {HOW_TO_ADD}."
        )
    if not family.works_with(transformers.__version__):
        raise UnsupportedModel(
            f"{model_type} works with dymu from transformers {family.since} on, and this is "
            f"{transformers.__version__}; take a newer one."
        )
    if not hasattr(model, family.inner.split(".")[0]):
        raise UnsupportedModel(
            f"{type(model).__name__} is only a part of a {model_type} model; give the whole one, "
            "as AutoModelForImageTextToText loads it."
        )
    refuse_spread(model)
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
    return Parts(
        **encoder_parts(tower, tower_kind),
        family=family,
        config=config,
        model=model,
        inner=inner,
        projector=None if family.projector is None else find(inner, family.projector),
        pooler=None if family.pooler is None else find(inner, family.pooler),
        language_model=language_model,
        decoder_kind=decoder_kind,
        attentions=tuple(
            find(layer, decoder_kind.attention)
            for layer in find(language_model, decoder_kind.layers)
            if decoder_kind.mixer is None or not hasattr(layer, decoder_kind.mixer)
        ),
        rotary=rotary,
    )
