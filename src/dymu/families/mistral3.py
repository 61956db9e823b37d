"""Images of sizes of their own, row after row of patches, which the projector regroups: Mistral 3 and LightOnOCR."""

from dataclasses import replace

from dymu.families.decoders import PLAIN
from dymu.families.family import Family
from dymu.families.towers import PIXTRAL

NORMED = PLAIN.of(*(name for name in PLAIN.model_types if name not in ("olmo", "cohere2")))
"""The projector takes `rms_norm_eps` from the language model's config."""

MISTRAL3 = Family(
    model_type="mistral3",
    select_strategy=None,
    unit="config.spatial_merge_size",
    regroups="projector",
    grid="image_sizes",
    towers=(PIXTRAL,),
    decoders=(NORMED,),
    limits=("Ministral 3's language model, which scales queries by their positions, is refused",),
)

LIGHTON_OCR = replace(
    MISTRAL3,
    model_type="lighton_ocr",
    tower="vision_encoder",
    projector="vision_projection",
    feature_layer=-1,
    limits=(),
)
