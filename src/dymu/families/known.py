"""The model families that dymu knows, by the `model_type` of a model's config."""

from dymu.families.family import Family
from dymu.families.llava import LLAVA, VIPLLAVA
from dymu.families.llava_next import LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAVA, VIPLLAVA, LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION)
}
