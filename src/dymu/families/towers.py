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

SIGLIP = replace(
    CLIP,
    model_types=("siglip_vision_model",),
    class_token=False,
)

JANUS = replace(SIGLIP, model_types=("janus_vision_model",), out="self_attn.projection_layer")

DINOV2 = Tower(
    model_types=("dinov2",),
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
)

DINOV2_WITH_REGISTERS = replace(DINOV2, model_types=("dinov2_with_registers",), registers="config.num_register_tokens")

TOWERS = (CLIP, SIGLIP, DINOV2)
"""Those that all LLaVA models hold."""

INTERNVIT = Tower(
    model_types=("internvl_vision",),
    layers="encoder.layer",
    norm1="layernorm_before",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    query_norm="attention.q_norm",
    key_norm="attention.k_norm",
    out="attention.projection_layer",
    after_attention=("lambda_1",),
    norm2="layernorm_after",
    mlp="mlp",
    after_mlp=("dropout", "lambda_2"),
)

QIANFAN = replace(
    INTERNVIT,
    model_types=("qianfan_ocr_vision",),
    layers="layers",
    after_attention=("lambda_1", "drop_path1"),
    after_mlp=("dropout", "lambda_2", "drop_path2"),
)

AIMV2 = Tower(
    model_types=("ovis2_vision",),
    layers="encoder.layers",
    norm1="rms_norm1",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    out="attention.out_proj",
    norm2="rms_norm2",
    mlp="ffn",
    class_token=False,
)

QWEN2 = Tower(
    model_types=("qwen2_vl_vision",),
    layers="blocks",
    norm1="norm1",
    qkv="attn.qkv",
    out="attn.proj",
    norm2="norm2",
    mlp="mlp",
    heads="config.num_heads",
    width="config.embed_dim",
    class_token=False,
    arrangement="packed",
    angles="position_embeddings",
    segments="cu_seqlens",
    merger="merger",
    embedder="patch_embed",
)

QWEN = replace(
    QWEN2,
    model_types=("qwen2_5_vl_vision",),
    width="config.hidden_size",
)

GLM_OCR = replace(
    QWEN, model_types=("glm_ocr_vision",), query_norm="attn.q_norm", key_norm="attn.k_norm", norms_heads=True
)

QWEN3 = replace(QWEN, model_types=("qwen3_vl_vision",), side_mergers="deepstack_merger_list")

PIXTRAL = Tower(
    model_types=("pixtral",),
    layers="transformer.layers",
    norm1="attention_norm",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    out="attention.o_proj",
    norm2="ffn_norm",
    mlp="feed_forward",
    class_token=False,
    arrangement="raster",
    angles="position_embeddings",
)

PADDLE = replace(
    SIGLIP,
    model_types=("paddleocr_vl_vision",),
    layers="vision_model.encoder.layers",
    arrangement="raster",
    angles="position_embeddings",
    segments="cu_seqlens",
)

VIDEO_LLAMA = replace(PADDLE, model_types=("video_llama_3_vision",), layers="encoder.layers", arrangement="packed")

SIGLIP2 = replace(
    SIGLIP, model_types=("siglip2_vision_model",), shapes="spatial_shapes", present="pixel_attention_mask"
)
"""Of several resolutions (NaFlex); the models of one are `siglip_vision_model`."""

DINOV3 = replace(DINOV2_WITH_REGISTERS, model_types=("dinov3_vit",), layers="model.layer", angles="position_embeddings")

TIMM = Tower(
    model_types=("timm.VisionTransformer", "timm.VisionTransformerDistilled"),
    layers="blocks",
    norm1="norm1",
    qkv="attn.qkv",
    query_norm="attn.q_norm",
    key_norm="attn.k_norm",
    norms_heads=True,
    out="attn.proj",
    after_attention=("attn.proj_drop", "ls1", "drop_path1"),
    norm2="norm2",
    mlp="mlp",
    after_mlp=("ls2", "drop_path2"),
    heads="blocks.0.attn.num_heads",
    width="embed_dim",
    patch_size="patch_embed.patch_size",
    class_token=False,
    registers="num_prefix_tokens",
)

OPEN_CLIP = Tower(
    model_types=("open_clip.VisionTransformer",),
    layers="transformer.resblocks",
    norm1="ln_1",
    qkv="attn",
    out="attn.out_proj",
    after_attention=("ls_1",),
    norm2="ln_2",
    mlp="mlp",
    after_mlp=("ls_2",),
    heads="transformer.resblocks.0.attn.num_heads",
    width="transformer.width",
    patch_size="patch_size",
)

ENCODERS = (
    CLIP, SIGLIP, SIGLIP.of("idefics3_vision", "smolvlm_vision"), SIGLIP2, DINOV2, DINOV2_WITH_REGISTERS, DINOV3, TIMM,
    OPEN_CLIP,
)  # fmt: skip
"""Those that `dymu.apply` takes by themselves. What has no config of transformers goes by its library and class."""

GEMMA4 = Tower(
    model_types=("gemma4_vision",),
    layers="encoder.layers",
    norm1="input_layernorm",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    value_norm="self_attn.v_norm",
    norms_heads=True,
    out="self_attn.o_proj",
    after_attention=("post_attention_layernorm",),
    norm2="pre_feedforward_layernorm",
    mlp="mlp",
    after_mlp=("post_feedforward_layernorm",),
    scaling=1.0,
    turning=2,
    class_token=False,
    arrangement="padded",
    angles="position_embeddings",
    positions="position_ids",
)

GRANITE_DOCLING = replace(
    SIGLIP,
    model_types=("granite_docling_vision",),
    merger="connector",
    taps="config.deepstack_visual_indexes",
    places="connector.coarse.pos_embed",
)
