"""Whether the tiny models of every family are what other tests take them for. Nothing here applies DyMU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import tiny
from dymu.hooks.versions import cuts_encoded_images
from tiny_families import DECODERS, FAMILIES

NAMES = [
    pytest.param(name, marks=[] if family.exists else pytest.mark.skip(f"transformers has it since {family.since}"))
    for name, family in FAMILIES.items()
]


def test_every_family_that_the_table_lets_be_tried_exists():
    for name, family in FAMILIES.items():
        assert not family.exists or (family.model_type or name) in CONFIG_MAPPING_NAMES, name


@pytest.fixture(params=[*NAMES, *(f"llava with {decoder}" for decoder in DECODERS)])
def model(request: pytest.FixtureRequest) -> Any:
    name, _, decoder = request.param.partition(" with ")
    return tiny.llava(decoder=decoder) if decoder else tiny.build(name)


def rows_of(model: Any) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """Two prompts of different lengths, their three pictures one after the other, and by prompt."""
    first, second, third = tiny.uneven(model, 3)
    prompts = [tiny.prompt(model, 5, first, 4), tiny.prompt(model, 2, second, third, 9, seed=1)]
    return prompts, [first, second, third], [[first], [second, third]]


def test_rows_of_a_batch_are_what_they_are_alone(model):
    prompts, pictures, by_prompt = rows_of(model)
    for side in ("left", "right"):
        batch = tiny.inputs(model, prompts, pictures, side)
        together = model(**batch).logits
        for row, ids, own, there in zip(together, prompts, by_prompt, batch["attention_mask"], strict=True):
            tiny.close(row[there.bool()], model(**tiny.inputs(model, ids, own)).logits[0], part=1e-4)


def test_every_picture_changes_its_places(model):
    prompts, _, (_, (first, second)) = rows_of(model)
    ids = prompts[1]
    seen = model(**tiny.inputs(model, ids, [first, second])).logits[0]
    places = (ids == tiny.IMAGE_TOKEN).nonzero()[:, 0]
    count = int((tiny.image(model, first) == tiny.IMAGE_TOKEN).sum())
    for other, own in (([first.flip(2), second], places[:count]), ([first, second.flip(2)], places[count:])):
        changed = (model(**tiny.inputs(model, ids, other)).logits[0] - seen).abs().amax(1) / seen.abs().max()
        assert changed[own].min() > 1e-3
        assert (changed[: own[0]].max() < 1e-6) == tiny.can(model, "one way")
    assert changed[-1] > 0.02


def test_placeholders_are_as_many_as_features(model):
    assert int((tiny.prompt(model, 3, "image", 4) == tiny.IMAGE_TOKEN).sum()) == tiny.tokens_per_image(model)
    features = tiny.features_of(model, **tiny.shown(model, tiny.pictures(2))).pooler_output
    assert sum(item.flatten(0, -2).shape[0] for item in features) == 2 * tiny.tokens_per_image(model)


def test_answers_to_a_batch_are_those_to_each_prompt(model):
    prompts, pictures, by_prompt = rows_of(model)
    together = tiny.answer(model, **tiny.inputs(model, prompts, pictures))
    assert together.shape == (2, max(map(len, prompts)) + 6)
    for row, ids, own in zip(together, prompts, by_prompt, strict=True):
        assert torch.equal(tiny.answer(model, **tiny.inputs(model, ids, own))[0], torch.cat((ids, row[-6:])))


def test_text_alone(model):
    prompts = [tiny.prompt(model, 9), tiny.prompt(model, 5, seed=1)]
    together = tiny.answer(model, **tiny.inputs(model, prompts))
    for row, ids in zip(together, prompts, strict=True):
        assert torch.equal(tiny.answer(model, **tiny.inputs(model, ids))[0], torch.cat((ids, row[-6:])))


def test_images_on_a_cache(model):
    """In pieces that cut no image in two."""
    ids, pictures = tiny.prompt(model, 4, "image", 7, "image", 5), tiny.pictures(2)
    whole = model(**tiny.inputs(model, ids, pictures)).logits
    cache, logits = DynamicCache(config=model.config), []
    second = 4 + len(tiny.image(model)) + 3
    for piece, picture in ((ids[:second], pictures[:1]), (ids[second:], pictures[1:])):
        logits.append(model(**tiny.inputs(model, piece, picture), past_key_values=cache).logits)
    assert alike(torch.cat(logits, 1), whole) == tiny.can(model, "images on a cache")


@pytest.mark.skipif(not cuts_encoded_images(), reason="this transformers does not chunk prompts with images")
def test_chunks(model):
    inputs = {**tiny.asked(model), "output_logits": True, "return_dict_in_generate": True}
    whole = torch.stack(tiny.answer(model, **inputs).logits)
    try:
        chunks = torch.stack(tiny.answer(model, prefill_chunk_size=17, **inputs).logits)
    except TypeError:
        chunks = torch.zeros_like(whole)
    assert alike(chunks, whole) == tiny.can(model, "chunks")


def test_steps_back(model):
    inputs = tiny.asked(model)
    greedy = tiny.answer(model, **inputs)
    if tiny.can(model, "steps back"):
        assert torch.equal(tiny.answer(model, prompt_lookup_num_tokens=3, **inputs), greedy)
    else:
        with pytest.raises(ValueError, match="stateful"):
            tiny.answer(model, prompt_lookup_num_tokens=3, **inputs)


def test_repeats(model):
    inputs = tiny.asked(model)
    greedy = tiny.answer(model, **inputs)
    twice = tiny.answer(model, do_sample=True, top_k=1, num_return_sequences=2, **inputs)
    assert torch.equal(twice, greedy.expand(2, -1)) == tiny.can(model, "repeats")


def test_repeats_several(model):
    prompts = [tiny.prompt(model, 3, "image", 4), tiny.prompt(model, 3, "image", 2, "image", 6, seed=1)]
    inputs = tiny.inputs(model, prompts, tiny.pictures(3))
    greedy = tiny.answer(model, **inputs).repeat_interleave(2, 0)
    same = torch.equal(tiny.answer(model, do_sample=True, top_k=1, num_return_sequences=2, **inputs), greedy)
    if tiny.can(model, "repeats several"):
        assert same
    elif "repeats several" in tiny.family_of(model).lacks:
        assert not same


def test_saves(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    inputs = tiny.asked(model)
    assert alike(again(**inputs).logits, model(**inputs).logits) == tiny.can(model, "saves")


def alike(logits: Tensor, expected: Tensor) -> bool:
    return bool((logits - expected).abs().max() < 1e-4 * expected.abs().max())


def test_what_a_model_said_is_read_as_it_was_said(model):
    """Whether one forward over a prompt and its answer gives the logits that the answer was chosen by."""
    pictures = tiny.pictures(2)
    ids = tiny.prompt(model, 4, "image", 3, "image", 7)
    said = tiny.answer(model, **tiny.inputs(model, ids, pictures), output_logits=True, return_dict_in_generate=True)
    whole = model(**tiny.inputs(model, said.sequences, pictures, said=6)).logits
    assert alike(torch.stack(said.logits, 1), whole[:, -7:-1])


def test_the_image_processor_makes_what_the_model_takes(model):
    features = tiny.features_of(model, **tiny.seen(model, tiny.photos(2))).pooler_output
    assert len(features) == 2
    assert torch.isfinite(torch.cat([item.flatten(0, -2) for item in features])).all()
