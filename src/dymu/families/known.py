"""The model families that dymu knows, by the `model_type` of a model's config."""

from dymu.families.cohere import AYA_VISION, COHERE2_VISION
from dymu.families.deepseek_vl import DEEPSEEK_VL, JANUS
from dymu.families.family import Family
from dymu.families.gemma import GEMMA3, GEMMA4, PALIGEMMA, SHIELDGEMMA2
from dymu.families.glm import EXAONE4_5, GLM4V, GLM4V_MOE, GLM46V, GLM_OCR, GLMGA
from dymu.families.internvl import GRANITE_DOCLING, IDEFICS3, INTERNVL, OVIS2, QIANFAN_OCR, SMOLVLM
from dymu.families.llava import LLAVA, VIPLLAVA
from dymu.families.llava_next import LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION
from dymu.families.mistral3 import LIGHTON_OCR, MISTRAL3
from dymu.families.qwen_vl import (
    COSMOS3_OMNI,
    HYPERCLOVAX,
    PADDLEOCR_VL,
    QWEN2_5_VL,
    QWEN2_VL,
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_VL,
    QWEN3_VL_MOE,
    VIDEO_LLAMA_3,
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAVA, VIPLLAVA, LLAVA_NEXT, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION,
        DEEPSEEK_VL, JANUS,
        INTERNVL, QIANFAN_OCR, IDEFICS3, SMOLVLM, GRANITE_DOCLING, OVIS2,
        QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, COSMOS3_OMNI, QWEN3_5, QWEN3_5_MOE,
        PADDLEOCR_VL, VIDEO_LLAMA_3, HYPERCLOVAX,
        MISTRAL3, LIGHTON_OCR,
        GLM4V, GLM46V, GLM4V_MOE, GLM_OCR, GLMGA, EXAONE4_5,
        AYA_VISION, COHERE2_VISION,
        GEMMA3, GEMMA4, SHIELDGEMMA2, PALIGEMMA,
    )
}  # fmt: skip
