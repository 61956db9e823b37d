"""One square picture per image, of which the language model gets every patch: DeepSeek-VL and Janus."""

from dataclasses import replace

from dymu.families.decoders import DECODERS
from dymu.families.family import Family
from dymu.families.towers import JANUS as JANUS_TOWER
from dymu.families.towers import SIGLIP

DEEPSEEK_VL = Family(
    model_type="deepseek_vl",
    tower="vision_model",
    projector="aligner",
    feature_layer=-1,
    select_strategy=None,
    towers=(SIGLIP,),
    decoders=DECODERS,
)

JANUS = replace(
    DEEPSEEK_VL,
    model_type="janus",
    towers=(JANUS_TOWER,),
    limits=("making images is refused, since its cache is static",),
)
