"""The method itself once more, from its formula, without any of the library's code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tiny


def unmerged_by_hand(model: Any, ids: Tensor, features: Tensor, group: Tensor) -> Tensor:
    """Logits [N, vocab] of one prompt, from the model's own weights and the formula, without the library's code.

    Args:
        ids: [N], the prompt with one image.
        features: [image tokens, C], as `get_image_features` gives them.
        group: [image tokens].
    """
    text = model.model.language_model
    places = (ids == tiny.IMAGE_TOKEN).nonzero()[:, 0].tolist()
    label = [("text", n) for n in range(len(ids))]
    for place, member in zip(places, group.tolist(), strict=True):
        label[place] = ("image", member)
    names = list(dict.fromkeys(label))
    of = torch.tensor([names.index(name) for name in label])
    embeds = model.get_input_embeddings()(ids).clone()
    embeds[places] = features
    x = torch.stack([embeds[label.index(name)] for name in names])

    size = text.config.head_dim
    angle = torch.arange(len(ids))[:, None] / text.config.rope_parameters["rope_theta"] ** (
        torch.arange(0, size, 2) / size
    )
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def rotated(heads: Tensor) -> Tensor:
        pairs = torch.complex(*heads.unflatten(-1, (2, -1)).unbind(-2)) * turn
        return torch.cat((pairs.real, pairs.imag), -1)

    place = torch.arange(len(ids))
    for layer in text.layers:
        window = getattr(layer.self_attn, "sliding_window", getattr(text.config, "sliding_window", None)) or len(ids)
        hidden = (place[None] > place[:, None]) | (place[:, None] - place[None] >= window)
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        query, key, value = (
            part(normed).unflatten(-1, (-1, size)) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key, value = rotated(query[of]), rotated(key[of]), value[of]
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
        logits = torch.einsum("nhd,mhd->hnm", query, key) * size**-0.5
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        virtual = torch.einsum("hnm,mhd->nhd", weights, value).flatten(1)
        mean = torch.stack([virtual[of == m].mean(0) for m in range(len(names))])
        x = x + attention.o_proj(mean)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(text.norm(x))[of]
