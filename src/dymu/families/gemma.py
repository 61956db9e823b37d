"""Images whose tokens attend to each other both ways: Gemma 3 and 4, ShieldGemma 2 and PaliGemma."""

from dataclasses import replace

from dymu.families.decoders import GEMMA3 as GEMMA3_TEXT
from dymu.families.decoders import GEMMA4 as GEMMA4_TEXT
from dymu.families.decoders import PLAIN
from dymu.families.family import Family
from dymu.families.limits import CACHE_FAST
from dymu.families.towers import GEMMA4 as GEMMA4_TOWER
from dymu.families.towers import SIGLIP

GEMMA3 = Family(
    model_type="gemma3",
    feature_layer=-1,
    select_strategy=None,
    unit="multi_modal_projector.kernel_size",
    regroups="projector",
    both_ways="images",
    towers=(SIGLIP,),
    decoders=(GEMMA3_TEXT,),
    limits=("the crops of pan and scan are reported as images of their own",),
)

SHIELDGEMMA2 = replace(GEMMA3, model_type="shieldgemma2")

PALIGEMMA = replace(
    GEMMA3,
    model_type="paligemma",
    unit=None,
    regroups="model",
    both_ways="prefix",
    decoders=(PLAIN.of("gemma", "gemma2"),),
    limits=("before transformers 5.21, Gemma 2 under SDPA has no soft-cap; with DyMU it has",),
)

GEMMA4 = replace(
    GEMMA3,
    model_type="gemma4",
    projector="embed_vision",
    video_token="video_token_id",
    unit="config.vision_config.pooling_kernel_size",
    regroups="tower",
    grid="{modality}_position_ids",
    both_ways="windows",
    towers=(GEMMA4_TOWER,),
    decoders=(GEMMA4_TEXT,),
    limits=(CACHE_FAST, "dymu bench does not time it"),
)
