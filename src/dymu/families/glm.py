"""The GLM and EXAONE models, built like Qwen-VL. GLM writes videos with the placeholder of images."""

from dataclasses import replace

from dymu.families.decoders import DECODERS, M_ROPE
from dymu.families.qwen_vl import QWEN2_5_VL
from dymu.families.towers import EXAONE, GLM
from dymu.families.towers import GLM_OCR as GLM_OCR_TOWER

GLM4V = replace(QWEN2_5_VL, model_type="glm4v", video_token="image_token_id", towers=(GLM,), decoders=(M_ROPE,))

GLM46V = replace(GLM4V, model_type="glm46v")

GLM4V_MOE = replace(GLM4V, model_type="glm4v_moe")

GLM_OCR = replace(GLM4V, model_type="glm_ocr", towers=(GLM_OCR_TOWER,))

EXAONE4_5 = replace(QWEN2_5_VL, model_type="exaone4_5", towers=(EXAONE,), decoders=DECODERS)
