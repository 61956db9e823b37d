"""Images and videos of sizes of their own, whose patches the encoder takes all in one row: Qwen-VL and its kin."""

from dataclasses import replace

from dymu.families.decoders import DECODERS, DEEP_STACK, HYBRID, M_ROPE, PLAIN
from dymu.families.family import Family
from dymu.families.limits import NO_REPRESENTATIVE
from dymu.families.towers import PADDLE, QWEN, QWEN2, QWEN3, VIDEO_LLAMA

QWEN2_VL = Family(
    model_type="qwen2_vl",
    tower="visual",
    projector=None,
    video_token="video_token_id",
    feature_layer=-1,
    select_strategy=None,
    unit="config.vision_config.spatial_merge_size",
    grid="{modality}_grid_thw",
    remembers=("rope_deltas",),
    towers=(QWEN2,),
    decoders=(M_ROPE,),
)

QWEN2_5_VL = replace(QWEN2_VL, model_type="qwen2_5_vl", towers=(QWEN,), decoders=(M_ROPE.of("qwen2_5_vl_text"),))

QWEN3_VL = replace(QWEN2_5_VL, model_type="qwen3_vl", towers=(QWEN3,), decoders=(DEEP_STACK,))

COSMOS3_OMNI = replace(QWEN3_VL, model_type="cosmos3_omni")

QWEN3_VL_MOE = replace(
    QWEN3_VL,
    model_type="qwen3_vl_moe",
    towers=(QWEN3.of("qwen3_vl_moe_vision"),),
    decoders=(DEEP_STACK.of("qwen3_vl_moe_text"),),
)

QWEN3_5 = replace(
    QWEN2_5_VL,
    model_type="qwen3_5",
    towers=(QWEN.of("qwen3_5_vision"),),
    decoders=(HYBRID,),
    limits=("layers with linear attention run on all tokens", NO_REPRESENTATIVE),
)

QWEN3_5_MOE = replace(
    QWEN3_5,
    model_type="qwen3_5_moe",
    towers=(QWEN.of("qwen3_5_moe_vision"),),
    decoders=(HYBRID.of("qwen3_5_moe_text"),),
)

PADDLEOCR_VL = replace(
    QWEN2_VL,
    model_type="paddleocr_vl",
    projector="projector",
    video_token=None,
    regroups="projector",
    towers=(PADDLE,),
    decoders=(M_ROPE.of("paddleocr_vl_text"),),
)

VIDEO_LLAMA_3 = replace(
    QWEN2_VL,
    model_type="video_llama_3",
    tower="vision_model",
    projector="projector",
    unit="{modality}_merge_sizes",
    regroups="tower",
    compresses="video_compression_mask",
    remembers=(),
    towers=(VIDEO_LLAMA,),
    decoders=DECODERS,
    limits=(
        "images of one call that are to be merged by different sizes are refused",
        "videos need use_token_compression=False",
    ),
)

HYPERCLOVAX = replace(
    QWEN2_5_VL,
    model_type="hyperclovax_vision_v2",
    tower="vision_model",
    projector="projector",
    remembers=(),
    decoders=(PLAIN.of("hyperclovax", "granite"),),
)
