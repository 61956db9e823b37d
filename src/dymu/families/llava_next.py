"""Images cut into tiles (AnyRes): LLaVA-NeXT, its form for videos, and LLaVA-OneVision."""

from dataclasses import replace

from dymu.families.llava import LLAVA
from dymu.families.towers import TOWERS

LLAVA_NEXT = replace(
    LLAVA, model_type="llava_next", learned=("image_newline",), cuts_images=True, grid=None, towers=TOWERS
)

LLAVA_NEXT_VIDEO = replace(
    LLAVA_NEXT, model_type="llava_next_video", pooler="vision_resampler", video_token="video_token_id"
)

LLAVA_ONEVISION = replace(LLAVA_NEXT, model_type="llava_onevision", video_token="video_token_id")
