"""What a model family is: where it keeps the parts that merging and unmerging need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tower:
    """A vision encoder: paths from the tower to its layers, and from a layer to its parts.

    A path may hold alternatives, `a.b|c.d`, for names that changed between versions of transformers. A layer is

        x = x + after_attention(out(attention(norm1(x))))
        x = x + after_mlp(mlp(norm2(x)))
    """

    model_types: tuple[str, ...]
    layers: str
    norm1: str
    query: str
    key: str
    value: str
    out: str
    norm2: str
    mlp: str
    after_attention: tuple[str, ...] = ()
    after_mlp: tuple[str, ...] = ()
    class_token: bool = True
    registers: str | None = None
    """Name of the config's number of register tokens, which follow the class token."""


@dataclass(frozen=True)
class Decoder:
    """A language model whose attention asks `AttentionInterface` and rotates the two halves of each head (RoPE)."""

    model_types: tuple[str, ...]
    layers: str = "layers"
    attention: str = "self_attn"
    rotary: str = "rotary_emb"


@dataclass(frozen=True)
class Family:
    """A vision-language model: paths from the model to its parts, and the kinds of towers and decoders it may hold.

    What follows `inner` starts from there; `tower`, `projector` and `learned` are plain names in it.
    """

    model_type: str
    inner: str = "model"
    """The module that places image features among the text embeddings and calls the language model."""
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    pooler: str | None = None
    """The module that pools the frames of a video ahead of the projector."""
    language_model: str = "language_model"
    image_token: str = "image_token_id"
    video_token: str | None = None
    """Where the family takes videos."""
    feature_layer: str = "vision_feature_layer"
    select_strategy: str = "vision_feature_select_strategy"
    """Where the config has none, the encoder's first token is dropped."""
    learned: tuple[str, ...] = ()
    """Parameters that stand among image features, such as the newline after a row of tiles."""
    cuts_images: bool = False
    """Whether images are cut into tiles."""
    towers: tuple[Tower, ...] = ()
    decoders: tuple[Decoder, ...] = ()
