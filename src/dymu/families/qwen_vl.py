"""Images and videos of sizes of their own, whose patches the encoder takes all in one row: the Qwen-VL models."""

from dataclasses import replace

from dymu.families.decoders import M_ROPE
from dymu.families.family import Family
from dymu.families.towers import QWEN, QWEN2

QWEN2_VL = Family(
    model_type="qwen2_vl",
    tower="visual",
    projector="visual.merger",
    video_token="video_token_id",
    feature_layer=-1,
    select_strategy=None,
    unit="vision_config.spatial_merge_size",
    regroups="tower",
    grid="image_grid_thw",
    video_grid="video_grid_thw",
    towers=(QWEN2,),
    decoders=(M_ROPE,),
)

QWEN2_5_VL = replace(QWEN2_VL, model_type="qwen2_5_vl", towers=(QWEN,))
