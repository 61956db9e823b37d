"""Images cut into tiles (AnyRes): LLaVA-NeXT, its form for videos, and LLaVA-OneVision."""

from dataclasses import replace

from dymu.families.llava import LLAVA
from dymu.families.towers import TOWERS

LLAVA_NEXT = replace(
    LLAVA,
    model_type="llava_next",
    learned=("image_newline",),
    cuts_images=True,
    grid=None,
    towers=TOWERS,
    limits=(),
)

LLAVA_NEXT_VIDEO = replace(
    LLAVA_NEXT,
    model_type="llava_next_video",
    pooler="vision_resampler",
    video_token="video_token_id",
    limits=("frames pooled by learned weights (spatial_pool_mode conv) are refused",),
)

LLAVA_ONEVISION = replace(LLAVA_NEXT, model_type="llava_onevision", video_token="video_token_id")
