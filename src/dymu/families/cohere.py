"""Images cut into tiles, whose projector makes one token of several patches: Aya Vision and Command A Vision."""

from dataclasses import replace

from dymu.families.decoders import DECODERS
from dymu.families.family import Family
from dymu.families.limits import TILES_APART
from dymu.families.towers import SIGLIP

AYA_VISION = Family(
    model_type="aya_vision",
    unit="config.downsample_factor",
    regroups="projector",
    cuts_images=True,
    tells_images="last",
    towers=(SIGLIP,),
    decoders=DECODERS,
    limits=(TILES_APART,),
)

COHERE2_VISION = replace(AYA_VISION, model_type="cohere2_vision", feature_layer=-1, select_strategy=None)
