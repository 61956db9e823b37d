"""Images cut into tiles, of which a pixel shuffle makes one token of several patches: InternVL, Idefics3, Ovis2."""

from dataclasses import replace

from dymu.families.decoders import DECODERS
from dymu.families.family import Family
from dymu.families.towers import AIMV2, INTERNVIT, QIANFAN, SIGLIP

INTERNVL = Family(
    model_type="internvl", unit="config.downsample_ratio", cuts_images=True, towers=(INTERNVIT,), decoders=DECODERS
)

QIANFAN_OCR = replace(INTERNVL, model_type="qianfan_ocr", towers=(QIANFAN,))

IDEFICS3 = Family(
    model_type="idefics3",
    tower="vision_model",
    projector="connector.modality_projection",
    language_model="text_model",
    feature_layer=-1,
    select_strategy=None,
    unit="config.scale_factor",
    cuts_images=True,
    towers=(SIGLIP,),
    decoders=DECODERS,
)

SMOLVLM = replace(IDEFICS3, model_type="smolvlm")

OVIS2 = replace(
    IDEFICS3,
    model_type="ovis2",
    tower="vision_tower.transformer",
    projector="visual_embeddings_table",
    language_model="language_model",
    unit="config.vision_config.hidden_stride",
    regroups="tower",
    towers=(AIMV2,),
)
