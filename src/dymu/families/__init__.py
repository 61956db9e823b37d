"""The model families that dymu knows, found by the `model_type` of a model's config."""

from dymu.families.family import Decoder, Family, Tower
from dymu.families.llava import LLAVA, VIPLLAVA
from dymu.families.llava_next import LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION
from dymu.families.resolve import Modality, Parts, resolve

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAVA, VIPLLAVA, LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION)
}

__all__ = ["FAMILIES", "Decoder", "Family", "Modality", "Parts", "Tower", "resolve"]
