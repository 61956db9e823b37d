"""One square picture per image: LLaVA-1.5, and ViP-LLaVA, which reads several encoder layers at once."""

from dataclasses import replace

from dymu.families.decoders import DECODERS
from dymu.families.family import Family
from dymu.families.towers import PIXTRAL, TOWERS

LLAVA = Family(model_type="llava", grid="image_sizes", towers=(*TOWERS, PIXTRAL), decoders=DECODERS)

VIPLLAVA = replace(
    LLAVA, model_type="vipllava", grid=None, towers=TOWERS, feature_layer="vision_feature_layer|vision_feature_layers"
)
