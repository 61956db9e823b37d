"""The demo model: a stock LLaVA of a DINOv2 tower, an MLP projector and a small Llama."""

from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from training.scenes import GRID
from training.tokenizer import build_tokenizer
from training.tower import FEATURE_LAYER, load_tower, tower_config


def demo_config() -> LlavaConfig:
    """About 3 M parameters of language model behind 22 M of tower."""
    tokenizer = build_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=640, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
        rope_theta=10000.0, tie_word_embeddings=True, rms_norm_eps=1e-6, initializer_range=0.04,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=tower_config(), text_config=text, image_seq_length=GRID * GRID,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=FEATURE_LAYER, vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )  # fmt: skip


def build_model() -> LlavaForConditionalGeneration:
    """Random language model and projector, real tower."""
    model = LlavaForConditionalGeneration(demo_config())
    model.model.vision_tower.load_state_dict(load_tower().state_dict())
    return model
