"""Images cut into tiles, of which a pixel shuffle makes one token of several patches: InternVL, Idefics3, Ovis2 ..."""

from dataclasses import replace

from dymu.families.decoders import DECODERS
from dymu.families.decoders import GRANITE_DOCLING as GRANITE_TEXT
from dymu.families.family import Family
from dymu.families.limits import FRAMES_ARE_IMAGES, PADDED, TILES_APART, TILES_JOINED
from dymu.families.towers import AIMV2, INTERNVIT, QIANFAN, SIGLIP
from dymu.families.towers import GRANITE_DOCLING as GRANITE_TOWER

INTERNVL = Family(
    model_type="internvl",
    unit="config.downsample_ratio",
    cuts_images=True,
    tells_images="runs",
    towers=(INTERNVIT,),
    decoders=DECODERS,
    limits=(TILES_APART, FRAMES_ARE_IMAGES),
)

QIANFAN_OCR = replace(INTERNVL, model_type="qianfan_ocr", towers=(QIANFAN,), limits=(TILES_APART,))

IDEFICS3 = Family(
    model_type="idefics3",
    tower="vision_model",
    projector="connector.modality_projection",
    language_model="text_model",
    feature_layer=-1,
    select_strategy=None,
    unit="config.scale_factor",
    cuts_images=True,
    tells_images="last",
    towers=(SIGLIP.of("idefics3_vision"),),
    decoders=DECODERS,
    limits=(TILES_JOINED, PADDED),
)

SMOLVLM = replace(
    IDEFICS3,
    model_type="smolvlm",
    towers=(SIGLIP.of("smolvlm_vision"),),
    limits=(*IDEFICS3.limits, FRAMES_ARE_IMAGES),
)

OVIS2 = replace(
    IDEFICS3,
    model_type="ovis2",
    tower="vision_tower.transformer",
    projector="visual_embeddings_table",
    language_model="language_model",
    unit="config.vision_config.hidden_stride",
    regroups="tower",
    tells_images="first",
    towers=(AIMV2,),
    since="5.20",
    limits=(TILES_APART,),
)

GRANITE_DOCLING = replace(
    IDEFICS3,
    model_type="granite_docling",
    projector=None,
    unit="config.vision_config.scale_factor",
    refuses=("tile_fine_mask",),
    towers=(GRANITE_TOWER,),
    decoders=(GRANITE_TEXT,),
    since="5.23",
    limits=(TILES_JOINED,),
)
