"""The language models that are described."""

from dymu.families.family import Decoder

HALF_SPLIT = Decoder(
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "olmo2", "granite", "phi3", "hyperclovax")
)

DECODERS = (HALF_SPLIT,)
"""Those that families hold which take any language model."""

M_ROPE = Decoder(model_types=("qwen2_vl_text", "qwen2_5_vl_text", "paddleocr_vl_text"), axes=3)
