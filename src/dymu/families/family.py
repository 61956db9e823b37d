"""What a model family is: where it keeps the parts that merging and unmerging need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from dymu.choices import Arrangement

Regroups = Literal["model", "projector", "tower"]
"""Where a family makes one token of the patches of a unit: in its own code between encoder and projector, in the
projector, or at the encoder's end, which then needs all patches."""


@dataclass(frozen=True)
class Kind:
    """A kind of vision encoder, or of language model.

    Attributes:
        model_types: of the configs that have it.
    """

    model_types: tuple[str, ...]

    def of(self, *model_types: str) -> Self:
        """The same kind under other names."""
        return replace(self, model_types=model_types)


@dataclass(frozen=True)
class Tower(Kind):
    """A vision encoder: paths from the tower to its layers, and from a layer to its parts.

    A path may hold alternatives, `a.b|c.d`, for names that changed between versions of transformers. A layer is

        x = x + after_attention(out(attention(norm1(x))))
        x = x + after_mlp(mlp(norm2(x)))
    """

    layers: str
    norm1: str
    out: str
    norm2: str
    mlp: str
    query: str | None = None
    key: str | None = None
    value: str | None = None
    qkv: str | None = None
    """One projection to queries, keys and values, in place of the three."""
    query_norm: str | None = None
    key_norm: str | None = None
    value_norm: str | None = None
    norms_heads: bool = False
    """Whether these norms go over each head, and not over all channels."""
    after_attention: tuple[str, ...] = ()
    after_mlp: tuple[str, ...] = ()
    """A path may lead to a parameter, which is a factor."""
    turning: int = 1
    """Parts of each head, each of which rotates its own two halves."""
    scaling: float | None = None
    """Factor on the logits; None: one over the root of the head's size."""
    heads: str = "config.num_attention_heads"
    width: str = "config.hidden_size"
    patch_size: str = "config.patch_size"
    class_token: bool = True
    registers: str | None = None
    """The number of further tokens ahead of the patches, which never merge."""
    arrangement: Arrangement = "batch"
    angles: str | None = None
    """Keyword of a layer's forward: cosines and sines of each patch, by which it rotates the halves of each head."""
    positions: str | None = None
    """Keyword of a layer's forward: column and row of each patch."""
    segments: str | None = None
    """Keyword of a layer's forward: where the tokens that attend to each other begin, among all. Layers that get other
    numbers than those of whole pictures attend within windows."""
    merger: str | None = None
    """What makes one token of the patches of each unit, at the end of an encoder of packed patches."""
    taps: str | None = None
    """Where the config names layers, counted from 0: what these gave is the second argument of the merger of an encoder
    whose pictures come in a batch. The merger then gives the tokens, and those of each of these layers."""
    places: str | None = None
    """What adds something of its place to each token, within the merger."""
    embedder: str | None = None
    """What embeds the patches ahead of the layers, where there is a merger."""
    side_mergers: str | None = None
    """The same for what some layers give, which is added within the language model."""
    shapes: str | None = None
    """Argument of the encoder's forward: rows and columns of the patches of each picture, which the encoder gets ahead
    of padding. None: pictures are as large as the pixels."""
    present: str | None = None
    """Argument of the encoder's forward: which of these are patches, and no padding."""


@dataclass(frozen=True)
class Decoder(Kind):
    """A language model whose attention asks `AttentionInterface`. How each layer rotates its heads (which channels, and
    whether at all) is found by trying, see `dymu.hooks.probe`."""

    layers: str = "layers"
    attention: str = "self_attn"
    rotary: str = "rotary_emb"
    axes: int = 1
    """Of its positions: 3 for time, height and width."""
    layer_type: str | None = None
    """Attribute of an attention layer: the kind of angles that the rotary module is asked for."""
    mixer: str | None = None
    """What mixes tokens in layers without attention (linear attention, a short convolution)."""
    added_rows: str | None = None
    """Argument of its forward: for each of the first layers the rows [image tokens, C] that are added behind it."""
    added_where: str | None = None
    """Argument of its forward: bool [B, N], the tokens to which these rows are added."""
    shared: str | None = None
    """Argument of an attention layer: keys and values of an earlier layer, which later ones take."""
    per_token: str | None = None
    """Argument of its forward: one row [B, N, ...] for each token, alike for all of an image."""
    by_token: tuple[str, ...] = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
    """In its layers, if they have them: what makes of a token [B, N, C] something that no other changes, and that only
    the layer's own output for it needs."""


@dataclass(frozen=True)
class Family:
    """A vision-language model: paths from the model to its parts, and the kinds of towers and decoders it may hold.

    What follows `inner` starts from there; `learned` are plain names in it.
    """

    model_type: str
    inner: str = "model"
    """The module that places image features among the text embeddings and calls the language model."""
    tower: str = "vision_tower"
    projector: str | None = "multi_modal_projector"
    """What makes a token for the language model of each of the encoder's, or of each unit; None: the tower's merger."""
    pooler: str | None = None
    """The module that pools the frames of a video ahead of the projector."""
    language_model: str = "language_model"
    image_token: str = "image_token_id"
    video_token: str | None = None
    """Where the family takes videos."""
    feature_layer: str | int = "vision_feature_layer"
    """A name in the config, or the layer itself."""
    select_strategy: str | None = "vision_feature_select_strategy"
    """Where the config has none, the encoder's first token is dropped; None: the family drops none."""
    learned: tuple[str, ...] = ()
    """Parameters that stand among image features, such as the newline after a row of tiles."""
    cuts_images: bool = False
    """Whether images are cut into tiles."""
    tells_images: Literal["items", "runs", "first", "last"] = "items"
    """How a prompt tells its images apart where tiles are items of their own, or all images of a prompt are one item:
    the placeholders of each are a run; or those of its tiles are, and the whole image comes first or last among them,
    behind a token that no other tile has. `items`: each is an image."""
    unit: str | None = None
    """Where it stands how many rows and columns of patches become one token, or the part of a side that is left; with
    `{modality}` in it, an argument of `get_image_features` that says so. None: every patch is one."""
    regroups: Regroups = "model"
    """Where, if the tower has no merger."""
    grid: str | None = None
    """Argument of `get_image_features` and `get_video_features` with the frames, rows and columns of patches of each
    item, or with its height and width in pixels; `{modality}` stands for image or video. None: pictures are as large as
    the pixels."""
    both_ways: Literal["images", "prefix", "windows"] | None = None
    """Which tokens also attend to later ones. By the argument `token_type_ids` of `inner`: `images`, those of an image
    (1) to each other, or `prefix`, the prompt that is not to be continued (0). `windows`: by `mm_token_type_ids`, those
    of an image or video (1, 2) in layers with a sliding window, where the text config's `use_bidirectional_attention`
    is `vision`."""
    refuses: tuple[str, ...] = ()
    """Arguments of `get_image_features` that dymu does not know what to do with."""
    compresses: str | None = None
    """Argument of `inner`, bool [tokens of all videos]: those that reach the prompt. All must."""
    remembers: tuple[str, ...] = ()
    """Attributes in which `inner` keeps something of the last call, of which every thread gets its own."""
    towers: tuple[Tower, ...] = ()
    """Those that it may hold: described, and transformers can build the two together."""
    decoders: tuple[Decoder, ...] = ()
    since: str = "5.18"
    """The first version of transformers with which it works, of those that dymu supports."""
    limits: tuple[str, ...] = ()
    """What is not supported, or may surprise, each in a few words that `dymu families` prints."""

    def takes_any_size(self, vision: Mapping[str, Any]) -> bool:
        """Whether pictures have sizes of their own with a vision encoder of this config."""
        name = vision.get("model_type")
        return any(tower.arrangement != "batch" for tower in self.towers if name in tower.model_types)

    def works_with(self, version: str) -> bool:
        """Whether it works with this version of transformers."""
        return _numbers(version) >= _numbers(self.since)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))
