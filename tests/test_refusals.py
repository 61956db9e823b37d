"""What DyMU cannot do is refused in one sentence, or said once; nothing that is asked for is left out in silence."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dymu
import tiny
import tiny_families
from dymu.errors import BadPrompt, UnsupportedModel
from dymu.families.resolve import resolve
from dymu.hooks.versions import going_on
from dymu.reducers import RandomKeep, ThresholdMerge
from tiny import answer, asked

NOTHING = ThresholdMerge((2.0,) * tiny.LAYERS)
SOME = ThresholdMerge((0.9,) * tiny.LAYERS)


@pytest.fixture(
    params=[("clip", "llama"), ("dinov2_with_registers", "mistral"), ("siglip", "qwen2", "llava_onevision")],
    ids="-".join,
)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.llava(*request.param)


# ------------------------------------------------------------------------------------------------------ packed prompts


def test_packed_prompts_are_refused(model):
    first, second = (tiny.prompt(model, 3, "image", length, seed=length) for length in (4, 6))
    ids = torch.cat((first, second))[None]
    positions = torch.cat((torch.arange(len(first)), torch.arange(len(second))))[None]
    packed = {"input_ids": ids, "position_ids": positions, **tiny.shown(model, tiny.pictures(2)), "use_cache": False}
    with dymu.apply(model, merge=SOME) as handle:
        for unmerge in ({}, {"attention_mask": None}):
            with pytest.raises(BadPrompt, match="start over within a row"):
                model(**packed, **unmerge)
        with handle.disabled():
            model(**packed)
        # Positions that begin elsewhere, and rows that are padded, are no packing.
        model(**{**packed, "position_ids": torch.arange(5, 5 + ids.shape[1])[None]})
        rows = tiny.pad([first, second], "left")
        model(**rows, **tiny.shown(model, tiny.pictures(2)), use_cache=False)


@pytest.mark.parametrize("unit", [2, 0.5])
def test_a_window_slides_over_tokens_whatever_their_positions(unit):
    model = tiny.llava("clip", "mistral", text={"sliding_window": 8})
    inputs = asked(model)
    positions = (unit * torch.arange(inputs["input_ids"].shape[1])).long()[None]
    logits = model(**inputs, position_ids=positions).logits
    with dymu.apply(model, merge=ThresholdMerge((1.0,) * tiny.LAYERS)):
        tiny.close(model(**inputs, position_ids=positions).logits, logits)


@pytest.mark.parametrize("width", [-3, -1, 1, 5])
def test_masks_of_another_length_are_refused(model, width):
    inputs = asked(model)
    tokens = inputs["input_ids"].shape[1]
    with dymu.apply(model, merge=SOME):
        with pytest.raises(ValueError, match="give a mask over all of them"):
            model(**inputs, attention_mask=torch.ones(1, tokens + width))
        cache = going_on(model, model(**inputs, use_cache=True))
        with pytest.raises(ValueError, match="give a mask over all of them"):
            model(input_ids=inputs["input_ids"][:, :1], attention_mask=torch.ones(1, 1 + width + tokens), **cache)


# ------------------------------------------------------------------------------------------- what a call may ask for


def test_attention_weights_are_refused(model):
    inputs = asked(model)
    model.set_attn_implementation("eager")
    with dymu.apply(model, merge=SOME) as handle:
        refused = pytest.raises(UnsupportedModel, match=r"output_attentions .* handle\.disabled\(\)|never formed")
        with refused:
            model(**inputs, output_attentions=True)
        with refused:
            answer(model, **inputs, output_attentions=True, return_dict_in_generate=True)
        with refused:
            model.model.language_model(input_ids=inputs["input_ids"][:, :4], output_attentions=True)
        with refused:
            model.get_image_features(**tiny.shown(model, tiny.pictures(1)), output_attentions=True)
        model.config.text_config.output_attentions = True
        with refused:
            model(**inputs)
        with handle.disabled():
            assert len(model(**inputs).attentions) == model.config.text_config.num_hidden_layers
        model.config.text_config.output_attentions = False
        assert model(**inputs, output_attentions=False).attentions is None


@pytest.mark.parametrize(
    "unknown",
    [{"s_aux": torch.zeros(4)}, {"cu_seq_lens_q": torch.tensor([0, 3])}, {"anything_new": 1},
     {"is_causal": False}],
    ids=lambda unknown: next(iter(unknown)),
)  # fmt: skip
def test_what_changes_attention_and_is_not_known_is_refused(model, unknown):
    inputs = asked(model)
    with dymu.apply(model, merge=SOME) as handle:
        expected = model(**inputs).logits
        with pytest.raises(UnsupportedModel, match=f"asks for attention with .*{next(iter(unknown))}"):
            model(**inputs, **unknown)
        known = {"is_causal": True, "num_items_in_batch": torch.tensor(3), "anything_new": None}
        assert torch.equal(model(**inputs, **known).logits, expected)
        assert handle.last.kept


class Sinking(nn.Module):
    """An attention layer that asks for attention sinks."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, s_aux=torch.zeros(4), **kwargs)


def test_attention_sinks_are_refused_as_dymu_is_applied(model):
    layer = model.model.language_model.layers[1]
    layer.self_attn = Sinking(layer.self_attn)
    with pytest.raises(UnsupportedModel, match="s_aux"):
        dymu.apply(model, merge=SOME)
    assert dymu.handle_of(model) is None


def test_attention_that_asks_no_attention_function_is_refused(model):
    class Alone(nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.q_proj, self.o_proj = base.q_proj, base.o_proj

        def forward(self, hidden_states: Tensor, **_: Any) -> Any:
            return self.o_proj(self.q_proj(hidden_states)), None

    layer = model.model.language_model.layers[1]
    layer.self_attn = Alone(layer.self_attn)
    with pytest.raises(UnsupportedModel, match="does not call the attention function"):
        dymu.apply(model, merge=SOME)


# ------------------------------------------------------------------------------------------------------------- rotation


@pytest.mark.parametrize("part", [0.5, 2.0])
def test_angles_that_do_not_fit_the_heads_are_refused(part):
    model = tiny.llava()
    rotary = model.model.language_model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.repeat(2)[: int(len(rotary.inv_freq) * part)]
    with pytest.raises(UnsupportedModel, match="does not rotate pairs of channels"):
        dymu.apply(model, merge=NOTHING)


def test_rotation_by_something_of_its_own_is_refused(monkeypatch):
    import transformers.models.llama.modeling_llama as llama

    model, stock = tiny.llava(), llama.apply_rotary_pos_emb
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, *rest: stock(q, k, cos, -sin, *rest))
    with pytest.raises(UnsupportedModel, match="rotated otherwise"):
        dymu.apply(model, merge=NOTHING)


def test_an_encoder_layer_with_something_more_in_it_is_refused(model):
    layers = resolve(model).encoder_modules
    stock = type(layers[0]).forward
    layers[2].forward = lambda x, *args, **kwargs: stock(layers[2], x, *args, **kwargs) * 1.1
    for train in (False, True):
        model.train(train)
        with pytest.raises(UnsupportedModel, match="layer 2 of the vision encoder does not compute"):
            dymu.apply(model, merge=NOTHING)


def test_weights_that_are_not_loaded_are_named():
    with torch.device("meta"):
        model = type(tiny.llava())(tiny.llava().config)
    with pytest.raises(UnsupportedModel, match="not loaded, or offloaded"):
        dymu.apply(model, merge=NOTHING)


# -------------------------------------------------------------------------------------------- features encoded ahead


def test_an_image_is_encoded_once_and_asked_about_often(model):
    shown, questions = tiny.shown(model, tiny.pictures(2)), (3, 5, 8)
    prompts = [tiny.prompt(model, 2, "image", 3, "image", words, seed=words)[None] for words in questions]
    with dymu.apply(model, merge=SOME) as handle:
        expected = []
        for ids in prompts:
            out, text = model(input_ids=ids, **shown), answer(model, input_ids=ids, **shown)
            expected.append((out.logits, text, handle.last.kept, handle.last.cache_bytes))
        encoded = {"image": model.get_image_features(**shown)}
        for ids, (logits, text, kept, stored) in zip(prompts, expected, strict=True):
            tiny.close(model(input_ids=ids, mm_encoder_outputs=encoded).logits, logits)
            assert handle.last.kept == kept
            assert torch.equal(answer(model, input_ids=ids, mm_encoder_outputs=encoded), text)
            assert (handle.last.kept, handle.last.cache_bytes) == (kept, stored)
            beams = answer(model, input_ids=ids, mm_encoder_outputs=encoded, num_beams=2)
            assert torch.equal(beams, answer(model, input_ids=ids, **shown, num_beams=2))
            assert handle.last.kept == kept
        again = copy.deepcopy(encoded)
        tiny.close(model(input_ids=prompts[0], mm_encoder_outputs=again).logits, expected[0][0])


def _lost(features: Any) -> dict[str, Any]:
    rows = list(features)
    return {
        "cloned": [row.clone() for row in rows],
        "one cloned": [rows[0], rows[1].clone()],
        "cast": [row.double().float() for row in rows],
        "cut": [row[:] for row in rows],
        "detached": [row.detach() for row in rows],
    }


@pytest.mark.parametrize("rule", [SOME, NOTHING, RandomKeep(20)], ids=["some", "nothing", "random"])
def test_features_that_lost_their_token_map_are_refused(model, rule):
    shown, ids = tiny.shown(model, tiny.pictures(2)), tiny.prompt(model, 2, "image", 3, "image", 5)[None]
    with dymu.apply(model, merge=rule) as handle:
        encoded = model.get_image_features(**shown)
        for lost in _lost(encoded.pooler_output).values():
            other = copy.copy(encoded)
            other.pooler_output = lost
            for ask in (model, lambda **kwargs: answer(model, **kwargs)):
                with pytest.raises(BadPrompt, match="carry no token map"):
                    ask(input_ids=ids, mm_encoder_outputs={"image": other})
        with handle.disabled():
            stock = model.get_image_features(**shown)
            expected = model(input_ids=ids, **shown).logits
            tiny.close(model(input_ids=ids, mm_encoder_outputs={"image": stock}).logits, expected)
        with pytest.raises(BadPrompt, match="made without DyMU"):
            model(input_ids=ids, mm_encoder_outputs={"image": stock})


def test_features_of_dymu_are_refused_while_it_is_disabled(model):
    shown, ids = tiny.shown(model, tiny.pictures(1)), tiny.prompt(model, 2, "image", 5)[None]
    with dymu.apply(model, merge=SOME) as handle:
        encoded = {"image": model.get_image_features(**shown)}
        with handle.disabled(), pytest.raises(BadPrompt, match="encoded with DyMU"):
            model(input_ids=ids, mm_encoder_outputs=encoded)


def _embedded(model: Any, ids: Tensor, encoded: Any) -> Tensor:
    embeds = model.get_input_embeddings()(ids).clone()
    embeds[ids == tiny.IMAGE_TOKEN] = torch.cat([row.flatten(0, -2) for row in encoded.pooler_output]).to(embeds)
    return embeds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_features_among_embeddings_are_refused(model, dtype):
    model = model.to(dtype)
    shown = tiny.shown(model, tiny.pictures(3)[1:].to(dtype))
    ids = tiny.prompt(model, 2, "image", 3, "image", 5)[None]
    with dymu.apply(model, merge=SOME) as handle:
        embeds = _embedded(model, ids, model.get_image_features(**shown))
        refused = pytest.raises(BadPrompt, match="repeat embeddings that are no words")
        with refused:
            model(inputs_embeds=embeds)
        with refused:
            model.model.language_model(inputs_embeds=embeds)
        with refused:
            answer(model, inputs_embeds=embeds)
        with refused:
            model(inputs_embeds=embeds, attention_mask=torch.ones_like(ids))
        hidden = (ids != tiny.IMAGE_TOKEN).long()
        model(inputs_embeds=embeds, attention_mask=hidden)
        with handle.disabled():
            model(inputs_embeds=embeds)


def test_embeddings_of_words_that_repeat_are_words(model):
    ids = torch.tensor([[5, 7, 5, 5, 9, 7]])
    stock = model(input_ids=ids).logits
    with dymu.apply(model, merge=SOME):
        tiny.close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, stock)
        soft = torch.randn(1, 6, model.config.text_config.hidden_size)
        model(inputs_embeds=soft)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_embeddings_that_repeat_and_are_no_words_of_the_table_may_still_be_right(model):
    """Words as an adapter gives them, nothing at all, and the newlines among features of the untouched model."""
    peft = pytest.importorskip("peft")
    ids = torch.tensor([[5, 7, 5, 5, 9, 7]])
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False))
    wrapped.eval()
    embeds = model.get_input_embeddings()(ids).clone()
    stock = model(input_ids=ids).logits
    with dymu.apply(model, merge=SOME) as handle:
        tiny.close(model(inputs_embeds=embeds).logits, stock, 1e-4)
        embeds[:, 1:4] = 0
        model(inputs_embeds=embeds)
        if model.model.config.model_type == "llava_onevision":
            with handle.disabled():
                features = model.get_image_features(**tiny.shown(model, tiny.pictures(2)))
            model(inputs_embeds=torch.cat(list(features.pooler_output))[None])


def test_odd_ways_to_call_a_part(model):
    inputs, rows = asked(model), tiny.pad([tiny.prompt(model, 5), tiny.prompt(model, 9)], "left")
    with dymu.apply(model, merge=NOTHING) as handle:
        decoder = model.model.language_model
        as_tuple = decoder(**rows, return_dict=False)
        assert torch.equal(as_tuple[0], decoder(**rows).last_hidden_state)
        logits = model(**inputs, interpolate_pos_encoding=True).logits
        with handle.disabled():
            tiny.close(logits, model(**inputs, interpolate_pos_encoding=True).logits)


# --------------------------------------------------------------------------------------------------------- the report


def test_the_report_after_guidance_is_of_the_image(model):
    inputs = asked(model, 3)
    with dymu.apply(model, merge=SOME) as handle:
        answer(model, **inputs)
        plain = handle.last
        answer(model, **inputs, guidance_scale=1.5)
        assert (handle.last.kept, handle.last.cache_bytes) == (plain.kept, plain.cache_bytes)
        negative = inputs["input_ids"][:, -3:]
        answer(model, **inputs, guidance_scale=1.5, negative_prompt_ids=negative)
        assert (handle.last.kept, handle.last.cache_bytes) == (plain.kept, plain.cache_bytes)


def test_the_report_goes_with_the_cache(model):
    first, second = asked(model, 3), asked(model, 4, images=2)
    more = tiny.prompt(model, 2, seed=9)[None]
    with dymu.apply(model, merge=SOME) as handle:
        cache = going_on(model, model(**first, use_cache=True))
        kept, stored = handle.last.kept, handle.last.cache_bytes
        model(**second)
        assert len(handle.last.kept) == 2
        model(input_ids=more, **cache)
        assert handle.last.kept == kept
        assert handle.last.cache_bytes > stored
        model(input_ids=more)
        assert handle.last.kept == []


# ------------------------------------------------------------------------------------------------------- said only once


def test_dropout_that_is_left_out_is_said_once(caplog):
    model = tiny.llava(text={"attention_dropout": 0.1})
    inputs = asked(model)
    with caplog.at_level(logging.WARNING, "dymu"), dymu.apply(model, merge=SOME):
        model(**inputs)
        assert not caplog.records
        for attention in resolve(model).attentions:
            attention.attention_dropout = 0.1
        model.train()
        for _ in range(3):
            model(**inputs)
    assert [record.message for record in caplog.records if "dropout" in record.message] == [
        "the model is in training mode, and DyMU leaves dropout in attention out; call model.eval()."
    ]


@pytest.mark.parametrize("config", ["vision_config", "text_config"])
def test_dropout_is_noticed_in_either_half(config, caplog):
    model = tiny.llava()
    getattr(model.config, config).attention_dropout = 0.1
    with caplog.at_level(logging.WARNING, "dymu"), dymu.apply(model, merge=SOME):
        model.train()
        model(**asked(model))
    assert any("dropout" in record.message for record in caplog.records)


def test_hooks_that_will_not_fire_are_named_at_apply(model, caplog):
    model(**asked(model))  # transformers' own hooks are there from the first call on
    with caplog.at_level(logging.WARNING, "dymu"), dymu.apply(model, merge=SOME):
        assert not caplog.records
    resolve(model).encoder_attentions[1].register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, "dymu"), dymu.apply(model, merge=SOME):
        model(**asked(model))
    assert [record.message for record in caplog.records if "do not fire" in record.message]
    assert len(caplog.records) == 1


def test_hooks_added_later_are_named_too(model, caplog):
    with caplog.at_level(logging.WARNING, "dymu"), dymu.apply(model, merge=SOME):
        resolve(model).encoder_attentions[0].register_forward_pre_hook(lambda *_: None)
        for _ in range(2):
            model(**asked(model))
    assert len([record for record in caplog.records if "do not fire" in record.message]) == 1


def test_checkpointing_of_the_encoder_is_refused_in_training(model):
    inputs = asked(model)
    model.gradient_checkpointing_enable()
    model.train()
    with dymu.apply(model, merge=SOME), torch.inference_mode(False), torch.enable_grad():
        with pytest.raises(UnsupportedModel, match="gradient checkpointing"):
            model(**inputs)
        for layer in resolve(model).encoder_modules:
            layer.gradient_checkpointing = False
        again = {name: x.clone() for name, x in inputs.items()}
        model(**again).logits.sum().backward()
        checkpointed = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        for layer in model.model.language_model.layers:
            layer.gradient_checkpointing = False
        model(**again).logits.sum().backward()
        for grad, expected in zip(
            checkpointed, (p.grad for p in model.parameters() if p.grad is not None), strict=True
        ):
            tiny.close(grad, expected, 1e-4)


def test_kept_counts_are_logged(model, caplog):
    with caplog.at_level(logging.DEBUG, "dymu"), dymu.apply(model, merge=SOME) as handle:
        model(**asked(model))
    (record,) = [record for record in caplog.records if record.levelno == logging.DEBUG]
    assert str(handle.last.kept[0]) in record.message
    assert str(handle.last.original[0]) in record.message


# ------------------------------------------------------------------------------------------------------ parts exchanged


class Mixes(nn.Module):
    """Adds something of each token to the next."""

    def __init__(self, within: nn.Module) -> None:
        super().__init__()
        self.within = within

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = self.within(*args, **kwargs)
        tokens, *others = made if isinstance(made, tuple) else (made,)
        tokens = tokens + 0.5 * tokens.roll(1, -2)
        return (tokens, *others) if isinstance(made, tuple) else tokens

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "within" else getattr(self.within, name)


@pytest.mark.parametrize("name", [name for name, family in tiny_families.FAMILIES.items() if family.exists])
def test_what_makes_a_token_of_several_units(name):
    """Where it takes made-up tokens, `apply` says so; else the first call in which anything merges."""
    model = tiny.build(name)
    parts = resolve(model)
    projectors = [] if parts.projector is None else [(parts.inner, parts.family.projector)]
    mergers = [] if parts.merger is None else [(parts.tower, parts.tower_kind.merger)]
    for module, path in [*projectors, *mergers]:
        owner, _, leaf = str(path).rpartition(".")
        within = module.get_submodule(owner) if owner else module
        stock = getattr(within, leaf)
        setattr(within, leaf, Mixes(stock).eval())
        refused = pytest.raises(UnsupportedModel, match="a Mixes, mixes those of different units")
        with refused, dymu.apply(model, merge=SOME):
            model(**asked(model, 2))
        setattr(within, leaf, stock)
    with dymu.apply(model, merge=SOME):
        model(**asked(model, 2))


class Turns(nn.Module):
    """Attention that gives the angles to other pairs."""

    def __init__(self, within: Any) -> None:
        super().__init__()
        self.within, self.qkv, self.proj, self.config = within, within.qkv, within.proj, within.config

    def forward(self, x: Tensor, *args: Any, position_embeddings: Any, **kwargs: Any) -> Any:
        angles = tuple(part.flip(-1) for part in position_embeddings)
        return self.within(x, *args, position_embeddings=angles, **kwargs)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_an_encoder_that_rotates_otherwise(name):
    model = tiny.build(name)
    for block in model.model.visual.blocks:
        block.attn = Turns(block.attn)
    with pytest.raises(UnsupportedModel, match="layer 0 of the vision encoder does not compute what"):
        dymu.apply(model, merge=SOME)


@pytest.mark.parametrize("heads", [(12, 64), (3, 16), (2, 8)])
def test_heads_of_any_size_are_tried_rightly(heads):
    count, size = heads
    vision = {
        **tiny_families.FAMILIES["gemma4"].vision, "num_attention_heads": count, "num_key_value_heads": count,
        "head_dim": size, "hidden_size": count * size,
    }  # fmt: skip
    model = tiny.build("gemma4", vision=vision)
    expected = model(**asked(model)).logits
    with dymu.apply(model, merge=NOTHING):
        tiny.close(model(**asked(model)).logits, expected)


@pytest.mark.parametrize("name", ["aya_vision", "cohere2_vision", "gemma4", "qwen2_5_vl"])
def test_parts_are_tried_in_their_own_type_within_autocast(name):
    model = tiny.build(name)
    with torch.autocast("cpu", torch.bfloat16), dymu.apply(model, merge=NOTHING):
        model(**asked(model))


def test_a_decoder_that_sees_all_is_named_so():
    model = tiny.build("gemma3")
    model.model.language_model.layers[1].self_attn.is_causal = False
    with pytest.raises(UnsupportedModel, match="lets every token attend to later ones"):
        dymu.apply(model, merge=SOME)


# --------------------------------------------------------------------------------------------------- what does not fit


def test_videos_where_a_family_takes_none(model):
    if "video" in resolve(model).placeholders:
        return
    inputs = asked(model)
    with dymu.apply(model, merge=SOME), pytest.raises(BadPrompt, match="takes no videos"):
        model(**inputs, pixel_values_videos=inputs["pixel_values"])


@pytest.mark.parametrize(
    ("name", "without"),
    [("qwen2_5_vl", "image_grid_thw"), ("gemma4", "image_position_ids"), ("video_llama_3", "image_merge_sizes")],
)
def test_pictures_of_unknown_sizes(name, without):
    model = tiny.build(name)
    shown = tiny.shown(model, tiny.pictures(1))
    shown[without] = None
    with dymu.apply(model, merge=SOME), pytest.raises(BadPrompt, match=f"the images come without {without}"):
        model.model.get_image_features(**shown)


def test_sizes_of_other_pictures():
    model = tiny.build("mistral3")
    shown = tiny.shown(model, tiny.uneven(model, 2))
    shown["image_sizes"] = shown["image_sizes"].flip(1)
    with dymu.apply(model, merge=SOME), pytest.raises(BadPrompt, match=r"the encoder has .* patches, and the pictures"):
        model.model.get_image_features(**shown)


def test_kinds_of_tokens_that_are_not_said():
    model = tiny.build("paligemma")
    inputs = asked(model)
    del inputs["token_type_ids"]
    with dymu.apply(model, merge=NOTHING), pytest.raises(BadPrompt, match="give it token_type_ids"):
        model(**inputs)
