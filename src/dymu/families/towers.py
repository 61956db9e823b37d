"""The vision encoders that are described."""

from dataclasses import replace

from dymu.families.family import Tower

CLIP = Tower(
    model_types=("clip_vision_model",),
    layers="encoder.layers",
    norm1="layer_norm1",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.out_proj",
    norm2="layer_norm2",
    mlp="mlp",
)

SIGLIP = replace(CLIP, model_types=("siglip_vision_model",), class_token=False)

DINOV2 = Tower(
    model_types=("dinov2", "dinov2_with_registers"),
    layers="encoder.layer",
    norm1="norm1",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    out="attention.o_proj",
    after_attention=("layer_scale1", "drop_path"),
    norm2="norm2",
    mlp="mlp",
    after_mlp=("layer_scale2", "drop_path"),
    registers="num_register_tokens",
)

TOWERS = (CLIP, SIGLIP, DINOV2)
