"""One square picture per image: LLaVA-1.5, and ViP-LLaVA, which reads several encoder layers at once."""

from dataclasses import replace

from dymu.families.decoders import DECODERS
from dymu.families.family import Family
from dymu.families.towers import DINOV2_WITH_REGISTERS, PIXTRAL, TOWERS

LLAVA = Family(
    model_type="llava",
    grid="image_sizes",
    towers=(*TOWERS, DINOV2_WITH_REGISTERS, PIXTRAL),
    decoders=DECODERS,
    limits=("several encoder layers read at once are refused with pixtral",),
)

VIPLLAVA = replace(
    LLAVA,
    model_type="vipllava",
    grid=None,
    towers=(*TOWERS, DINOV2_WITH_REGISTERS),
    feature_layer="vision_feature_layer|vision_feature_layers",
    limits=(),
)
