"""The GLM and EXAONE models, built like Qwen-VL. GLM writes videos with the placeholder of images."""

from dataclasses import replace

from dymu.families.decoders import DECODERS, M_ROPE
from dymu.families.qwen_vl import QWEN2_5_VL
from dymu.families.towers import GLM_OCR as GLM_OCR_TOWER
from dymu.families.towers import QWEN

GLM4V = replace(
    QWEN2_5_VL,
    model_type="glm4v",
    video_token="image_token_id",
    towers=(QWEN.of("glm4v_vision"),),
    decoders=(M_ROPE.of("glm4v_text"),),
    limits=("images and videos in one call are refused, as by the model itself",),
)

GLM46V = replace(GLM4V, model_type="glm46v")

GLMGA = replace(GLM4V, model_type="glmga")

GLM4V_MOE = replace(
    GLM4V,
    model_type="glm4v_moe",
    towers=(QWEN.of("glm4v_moe_vision"),),
    decoders=(M_ROPE.of("glm4v_moe_text"),),
)

GLM_OCR = replace(GLM4V, model_type="glm_ocr", towers=(GLM_OCR_TOWER,), decoders=(M_ROPE.of("glm_ocr_text"),))

EXAONE4_5 = replace(
    QWEN2_5_VL, model_type="exaone4_5", remembers=(), towers=(QWEN.of("exaone4_5_vision"),), decoders=DECODERS
)
