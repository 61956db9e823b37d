"""Whether what the contract compares the library with is itself right. Nothing here applies DyMU."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

import tiny
from by_hand import unmerged_by_hand
from dymu.families import FAMILIES
from dymu.families.family import Decoder

OTHERS = tuple(tiny.UNDESCRIBED_DECODERS)
IMAGE_TOKENS = 14
EXACT = 1e-12
"""For what differs by rounding in float64 alone."""


@pytest.fixture(params=[*tiny.DECODERS, *OTHERS])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """In float64; a decoder that the library does not know is described for the test."""
    if request.param in OTHERS:
        describe(monkeypatch, Decoder(model_types=OTHERS))
    model = tiny.llava("clip", request.param).double()
    model.set_experts_implementation("eager")  # the fast ones know no float64
    return model


def describe(monkeypatch: pytest.MonkeyPatch, decoder: Decoder) -> None:
    monkeypatch.setitem(FAMILIES, "llava", replace(FAMILIES["llava"], decoders=(decoder,)))


def merged_prompt(model: Any, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [N], features [image tokens, C] and groups of an image whose tokens merged at random, often far apart."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((IMAGE_TOKENS,), tiny.IMAGE_TOKEN)
    ids = torch.cat((tiny.prompt(model, 4, seed=seed), image, tiny.prompt(model, 7, seed=seed + 1)))
    group = torch.randint(0, 6, (IMAGE_TOKENS,), generator=generator)
    return ids, torch.randn(6, 32, generator=generator, dtype=torch.float64)[group], group


def embedded(model: Any, ids: Tensor, features: Tensor) -> Tensor:
    embeds = model.get_input_embeddings()(ids)
    embeds[ids == tiny.IMAGE_TOKEN] = features
    return embeds


def test_nothing_merged_is_the_stock_model(model):
    ids, image = tiny.prompt(model, 4, "image", 7), tiny.pictures(1).double()
    features = model.get_image_features(image).pooler_output[0]
    logits = unmerged_by_hand(model, ids, features, torch.arange(len(features)))
    tiny.close(logits, model(input_ids=ids[None], pixel_values=image).logits[0], part=EXACT)


def test_the_model_is_left_as_it_was(model):
    prompt = merged_prompt(model)
    unmerged_by_hand(model, *prompt)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.model.language_model.modules()
    )
    assert model.float().dtype == unmerged_by_hand(model, *prompt).dtype == torch.float32


def test_a_group_shares_its_logits_and_the_past_does_not_change(model):
    ids, features, group = merged_prompt(model)
    logits = unmerged_by_hand(model, ids, features, group)
    stock = model(inputs_embeds=embedded(model, ids, features)[None]).logits[0]
    places = (ids == tiny.IMAGE_TOKEN).nonzero()[:, 0]
    leaders = places[(group == group[:, None]).int().argmax(1)]
    tiny.close(logits[places], logits[leaders], part=EXACT)
    tiny.close(logits[: places[0]], stock[: places[0]], part=EXACT)
    assert (logits[places[-1] :] - stock[places[-1] :]).abs().max() > 1e-3 * stock.abs().max()


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_may_be_taken_ahead_of_the_output_projection(model, seed, monkeypatch):
    """There the formula takes it: inside of attention, of every head's output."""
    ids, features, group = merged_prompt(model, seed)
    label = torch.arange(len(ids)) + 100
    label[ids == tiny.IMAGE_TOKEN] = group
    interface = AttentionInterface.get_interface

    def get_interface(functions: Any, name: str, default: Any) -> Any:
        attend = interface(functions, name, default)

        def averaged(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            heads = attend(*args, **kwargs)[0]
            return torch.stack([heads[:, label == one].mean(1) for one in label], 1), None

        return averaged

    expected = unmerged_by_hand(model, ids, features, group)
    monkeypatch.setattr(AttentionInterface, "get_interface", get_interface)
    tiny.close(model(inputs_embeds=embedded(model, ids, features)[None]).logits[0], expected, part=EXACT)


@pytest.mark.parametrize("window", [40, 6])
@pytest.mark.parametrize("seed", range(3))
def test_a_loop_over_the_formula_says_the_same(window, seed):
    model = tiny.llava("clip", "mistral", text={"sliding_window": window}).double()
    prompt = merged_prompt(model, seed)
    tiny.close(unmerged_by_hand(model, *prompt), one_by_one(model, *prompt, window), part=1e-6)


def one_by_one(model: Any, ids: Tensor, features: Tensor, group: Tensor, window: int) -> Tensor:
    """Logits [N, vocab] of a Mistral, with M merged tokens and one virtual query after the other."""
    text = model.model.language_model
    size, theta = text.config.head_dim, text.config.rope_parameters["rope_theta"]
    shared = text.config.num_attention_heads // text.config.num_key_value_heads
    groups = iter(group.tolist())
    names = [("image", next(groups)) if one == tiny.IMAGE_TOKEN else ("text", n) for n, one in enumerate(ids.tolist())]
    merged = list(dict.fromkeys(names))
    of = [merged.index(name) for name in names]
    tokens = range(len(ids))

    def rotated(head: Tensor, place: int) -> Tensor:
        turned = head.clone()
        for i in range(size // 2):
            angle = place * theta ** (-2 * i / size)
            cos, sin, one, other = math.cos(angle), math.sin(angle), head[i], head[i + size // 2]
            turned[i], turned[i + size // 2] = one * cos - other * sin, other * cos + one * sin
        return turned

    def normed(x: Tensor, norm: Any) -> Tensor:
        return x * (x.square().mean() + norm.variance_epsilon).rsqrt() * norm.weight

    embeds = embedded(model, ids, features)
    x = [embeds[of.index(m)] for m in range(len(merged))]
    for layer in text.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        parts = [[(weight @ normed(one, layer.input_layernorm)).view(-1, size) for one in x] for weight in projections]
        query, key, value = ([part[m] for m in of] for part in parts)
        keys = [[rotated(head, n) for head in key[n]] for n in tokens]
        virtual = []
        for n in tokens:
            heads = []
            for h in range(text.config.num_attention_heads):
                turned, seen = rotated(query[n][h], n), range(max(0, n - window + 1), n + 1)
                weights = [math.exp(turned @ keys[m][h // shared] / size**0.5) for m in seen]
                mixed = sum(weight * value[m][h // shared] for weight, m in zip(weights, seen, strict=True))
                heads.append(mixed / sum(weights))
            virtual.append(torch.cat(heads))
        for m in range(len(merged)):
            members = [virtual[n] for n in tokens if of[n] == m]
            x[m] = x[m] + attention.o_proj.weight @ (sum(members) / len(members))
            inner = normed(x[m], layer.post_attention_layernorm)
            gate = mlp.gate_proj.weight @ inner
            x[m] = x[m] + mlp.down_proj.weight @ (gate * gate.sigmoid() * (mlp.up_proj.weight @ inner))
    return torch.stack([model.lm_head.weight @ normed(x[m], text.norm) for m in of])


@pytest.mark.parametrize("wrong", ["mlp", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"])
def test_a_description_that_misses_attention_is_noticed(wrong, monkeypatch):
    describe(monkeypatch, Decoder(model_types=("llama",), attention=wrong))
    model = tiny.llava("clip", "llama").double()
    with pytest.raises(AssertionError, match=r"tokens of one group differ where layers\.0\.self_attn\.o_proj"):
        unmerged_by_hand(model, *merged_prompt(model))


def test_features_differ_by_rounding_within_a_group_and_the_first_counts():
    model = tiny.llava().double()
    ids, features, group = merged_prompt(model)
    expected = unmerged_by_hand(model, ids, features, group)
    leaders = (group == group[:, None]).int().argmax(1)
    others = (leaders != torch.arange(len(group)))[:, None]
    assert torch.equal(unmerged_by_hand(model, ids, features + 1e-6 * others, group), expected)
    with pytest.raises(AssertionError, match="not close"):
        unmerged_by_hand(model, ids, features + 1e-3 * others, group)
