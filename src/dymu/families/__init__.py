"""The model families that dymu knows, found by the `model_type` of a model's config."""

from dymu.families.family import Decoder, Family, Tower
from dymu.families.llava import LLAVA
from dymu.families.resolve import Parts, resolve

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAVA,)}

__all__ = ["FAMILIES", "Decoder", "Family", "Parts", "Tower", "resolve"]
