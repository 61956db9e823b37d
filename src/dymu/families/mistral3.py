"""Images of sizes of their own, row after row of patches, which the projector regroups: Mistral 3 and LightOnOCR."""

from dataclasses import replace

from dymu.families.decoders import DECODERS
from dymu.families.family import Family
from dymu.families.towers import PIXTRAL

MISTRAL3 = Family(
    model_type="mistral3",
    select_strategy=None,
    unit="config.spatial_merge_size",
    regroups="projector",
    grid="image_sizes",
    towers=(PIXTRAL,),
    decoders=DECODERS,
)

LIGHTON_OCR = replace(
    MISTRAL3, model_type="lighton_ocr", tower="vision_encoder", projector="vision_projection", feature_layer=-1
)
