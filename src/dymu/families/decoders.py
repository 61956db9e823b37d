"""The language models that are described."""

from dataclasses import replace

from dymu.families.family import Decoder

PLAIN = Decoder(
    model_types=(
        "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "olmo", "olmo2", "granite", "phi3",
        "hyperclovax", "cohere2", "smollm3", "exaone4",
    )
)  # fmt: skip

DECODERS = (PLAIN,)
"""Those that families hold which take any language model."""

M_ROPE = Decoder(model_types=("qwen2_vl_text",), axes=3)

DEEP_STACK = replace(
    M_ROPE,
    model_types=("qwen3_vl_text",),
    added_rows="deepstack_visual_embeds",
    added_where="visual_pos_masks",
)

GRANITE_DOCLING = replace(DEEP_STACK, model_types=("granite_docling_text",), axes=1)

HYBRID = replace(M_ROPE, model_types=("qwen3_5_text",), mixer="linear_attn")

GEMMA3 = Decoder(model_types=("gemma3_text",), layer_type="layer_type")

GEMMA4 = replace(GEMMA3, model_types=("gemma4_text",), shared="shared_kv_states", per_token="per_layer_inputs")
