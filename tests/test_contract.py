"""The contract that every family keeps: LLaVA with every vision tower and decoder, the others as `tiny` builds them."""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LlavaForConditionalGeneration
from transformers.cache_utils import StaticCache

import dymu
import tiny
from by_hand import unmerged_prompt_by_hand
from dymu.choices import CACHE_FORMS, UNMERGE
from dymu.errors import AlreadyApplied, BadBudget, BadPrompt, DymuError, UnsupportedCache, UnsupportedModel
from dymu.families import FAMILIES
from dymu.families.resolve import resolve
from dymu.hooks.cache import ROOM, cache_bytes
from dymu.hooks.generation import GenerationHooks
from dymu.hooks.versions import cuts_encoded_images, going_on
from dymu.reducers import AveragePool, ByImage, FixedMerge, RandomKeep, ThresholdMerge
from dymu.unmerging.backends import sdpa

NOTHING = ThresholdMerge((2.0,) * tiny.LAYERS)
NOTHING_ALIKE = ThresholdMerge((1.0,) * tiny.LAYERS)
"""Goes through all the motions of merging and finds no two tokens alike enough."""
SOME = ThresholdMerge((0.9,) * tiny.LAYERS)
"""Merges to different counts for each of `tiny.pictures`."""

ONE_OF_EACH = [
    ("dinov2_with_registers", "qwen3", "llava"),
    ("clip", "llama", "vipllava"),
    ("clip", "mistral", "llava_next"),
    ("dinov2", "llama", "llava_next_video"),
    ("siglip", "qwen2", "llava_onevision"),
]
"""Of the families that may hold any tower and decoder one model each."""


def described(name: str) -> bool:
    """Whether the library describes the model of an entry of `tiny.FAMILIES`, its tower and its decoder."""
    config = tiny.configured(name)
    family = FAMILIES.get(config.model_type)
    if family is None:
        return False
    towers, decoders = (
        {kind for part in parts for kind in part.model_types} for parts in (family.towers, family.decoders)
    )
    return config.vision_config.model_type in towers and config.text_config.model_type in decoders


OTHERS = [
    name
    for name, family in tiny.FAMILIES.items()
    if family.exists and name not in {family for _, _, family in ONE_OF_EACH} and described(name)
]
LLAVAS = [(tower, decoder, "llava") for tower in tiny.TOWERS for decoder in tiny.AS_THEY_BEGIN]
LLAVAS += [
    (tower, decoder, "llava")
    for tower, decoder in zip(itertools.cycle(tiny.TOWERS), tiny.DECODERS)
    if decoder not in tiny.AS_THEY_BEGIN
]
"""Every tower with every decoder of the first four; each other decoder with one tower."""

MODELS = [
    *(pytest.param(names, marks=pytest.mark.one_of_each, id="-".join(names)) for names in ONE_OF_EACH),
    *(pytest.param(name, marks=pytest.mark.one_of_each, id=name) for name in OTHERS),
    *(pytest.param(names, id="-".join(names)) for names in LLAVAS if names not in ONE_OF_EACH),
]
"""With `-m one_of_each` the contract is tried on one model of each family."""


def test_every_described_family_and_decoder_is_tried():
    tried = {tiny.FAMILIES[name].model_type or name for name in OTHERS} | {family for _, _, family in ONE_OF_EACH}
    missing = {name for name in FAMILIES if name not in tiny.FAMILIES or tiny.FAMILIES[name].exists} - tried
    assert not missing, "give them an entry in tests/tiny_families.py that holds a tower and decoder they describe"
    decoders = {name for decoder in FAMILIES["llava"].decoders for name in decoder.model_types}
    assert decoders & set(tiny.UNDESCRIBED_DECODERS) == set(), "take them out of tiny.UNDESCRIBED"
    assert (
        set(tiny.DECODERS)
        <= decoders
        <= {*tiny.DECODERS, *(tiny.configured(name).text_config.model_type for name in OTHERS)}
    )


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.build(request.param) if isinstance(request.param, str) else tiny.llava(*request.param)


@pytest.fixture(
    params=[("clip", "llama"), ("dinov2_with_registers", "mistral"), ("siglip", "qwen2", "llava_onevision")],
    ids="-".join,
)
def some_model(request: pytest.FixtureRequest) -> LlavaForConditionalGeneration:
    return tiny.llava(*request.param)


def answer(model: Any, new_tokens: int = 6, **inputs: object) -> Any:
    return tiny.answer(model, **{"max_new_tokens": new_tokens, **inputs})


def unmergings(model: Any) -> list[str]:
    """The forms of unmerging that a model can have."""
    parts = resolve(model)
    refused = {"representative"} if parts.mixers else set()
    refused |= {"restore"} if parts.decoder_kind.axes > 1 or len(parts.angle_kinds) > 1 else set()
    return [form for form in UNMERGE if form not in refused]


def stored(output: Any) -> int:
    """Tokens that the cache of an output really holds, in each layer that stores keys."""
    (length,) = set(map(length_of, attention_layers(output.past_key_values)))
    return length


def attention_layers(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor)]


def length_of(layer: Any) -> int:
    return int(layer.keys.shape[2])


def features(output: Any) -> list[Tensor]:
    """Those that a call gives back, none from some families before transformers 5.24."""
    return [features for features in [tiny.features_in(output)] if features is not None]


def words_in(ids: Tensor) -> int:
    """Tokens of a prompt [N] or [1, N] that are not an image's."""
    return int((ids != tiny.IMAGE_TOKEN).sum())


def one_prompt(model: Any, index: int = 0, **options: Any) -> dict[str, Any]:
    """What the model takes for a prompt that shows the picture `index` of `tiny.pictures`."""
    return tiny.inputs(model, tiny.prompt(model, 4, "image", 7), tiny.pictures(index + 1)[index:], **options)


def four_prompts(model: Any, pictures: Sequence[Tensor]) -> list[Tensor]:
    lengths = (4, 9, 2, 6)
    return [tiny.prompt(model, 3, image, n, seed=n) for image, n in zip(pictures, lengths, strict=True)]


@pytest.mark.parametrize("rule", [NOTHING, NOTHING_ALIKE], ids=["never", "none-alike"])
def test_nothing_merged_equals_the_untouched_model(model, rule):
    inputs = one_prompt(model)
    logits, text = model(**inputs).logits, answer(model, **inputs)
    with dymu.apply(model, merge=rule) as handle:
        tiny.close(model(**inputs).logits, logits)
        assert torch.equal(answer(model, **inputs), text)
        assert handle.last.kept == handle.last.original == [tiny.tokens_per_image(model)]


def test_nothing_merged_equals_the_untouched_model_in_bfloat16(model):
    limit = rounding(model)
    model = model.to(torch.bfloat16)
    inputs = tiny.inputs(model, tiny.prompt(model, 4, "image", 7), tiny.pictures(1).to(torch.bfloat16))
    logits = model(**inputs).logits
    with dymu.apply(model, merge=NOTHING):
        error = (model(**inputs).logits - logits).float().norm() / logits.float().norm()
    assert error < limit


def rounding(model: Any) -> float:
    """How far logits may be off in bfloat16, in parts of their norm: 3 %, or half again the untouched model's rounding.

    Some tiny models round more than others: where little is divided by little, or experts are chosen, one of which may
    change (5 %).
    """
    images = tiny.uneven(model, 4)
    rounded, errors = copy.deepcopy(model).to(torch.bfloat16), []
    for ids, image in zip(four_prompts(model, images), images, strict=True):
        logits = model(**tiny.inputs(model, ids, [image])).logits
        error = rounded(**tiny.inputs(model, ids, [image.to(torch.bfloat16)])).logits - logits
        errors.append(float(error.norm() / logits.norm()))
    experts = getattr(model.config.get_text_config(), "num_experts", None)
    return max(0.05 if experts else 0.03, 1.5 * max(errors))


@pytest.mark.parametrize("rule", [NOTHING, SOME], ids=["nothing", "some"])
def test_shapes_are_the_untouched_models(model, rule):
    inputs = one_prompt(model, 3)
    labels = inputs["input_ids"].clone()
    labels[labels == tiny.IMAGE_TOKEN] = -100
    stock = model(**inputs, labels=labels, output_hidden_states=True)
    text = answer(model, **inputs)
    with dymu.apply(model, merge=rule) as handle:
        out = model(**inputs, labels=labels, output_hidden_states=True)
        assert out.logits.shape == stock.logits.shape
        assert torch.isfinite(out.loss)
        assert [hidden.shape for hidden in out.hidden_states] == [hidden.shape for hidden in stock.hidden_states]
        assert [f.shape for f in features(out)] == [f.shape for f in features(stock)]
        assert out.past_key_values.get_seq_length() == stock.past_key_values.get_seq_length()
        generated = answer(model, **inputs)
        assert generated.shape == text.shape
        assert torch.equal(generated[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
        group = handle.last.group(0)
        assert group.shape == (handle.last.original[0],)
        places = (inputs["input_ids"][0] == tiny.IMAGE_TOKEN).nonzero()[:, 0]
        for merged in range(handle.last.kept[0]):
            shared = out.logits[0, places[group == merged]]
            torch.testing.assert_close(shared, shared[:1].expand_as(shared), atol=0, rtol=0)


def test_a_lower_budget_keeps_no_more_tokens(model):
    """On average over the calibration images for every budget, of each unseen image for budgets well apart.

    Where an image has less than 40 tokens, one more is allowed there.
    """
    samples = tiny.photos(8, seed=1) + tiny.photos(8, seed=2)
    processor = tiny.processor(tiny.name_of(model))
    thresholds = dymu.calibrate(model, processor, samples, [0.16, 0.22, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    budgets = thresholds.budgets
    seen, unseen = tiny.seen(model, samples), tiny.seen(model, tiny.photos(8, seed=3))
    kept, totals = [], []
    with dymu.apply(model, thresholds, budget=budgets[0]) as handle:
        for budget in budgets:
            handle.budget = budget
            tiny.features_of(model, **seen)
            totals.append(sum(item.budgeted for item in handle.last.items))
            assert totals[-1] == pytest.approx(budget * len(samples), rel=0.01, abs=len(samples))
            tiny.features_of(model, **unseen)
            kept.append(handle.last.kept)
    assert totals == sorted(totals)
    more = handle.last.original[0] < 40
    for few, many in pairwise(kept[::2]):
        assert all(low <= high + more for low, high in zip(few, many, strict=True))


def test_no_image_goes_beyond_the_most(model):
    """What keeps fewer tokens is as it was."""
    images = tiny.uneven(model, 4)
    batch = tiny.inputs(model, four_prompts(model, images), images)
    found = []
    for at_most in (None, 6):
        with dymu.apply(model, merge=ThresholdMerge(SOME.thresholds, at_most=at_most)) as handle:
            model(**batch)
            found.append(handle.last.items)
    assert [item.budgeted for item in found[1]] == [min(item.budgeted, 6) for item in found[0]]
    assert any(item.budgeted > 6 for item in found[0])
    for before, after in zip(*found, strict=True):
        if before.budgeted <= 6:
            assert torch.equal(before.leaders, after.leaders)


@pytest.mark.parametrize("keep", [3, 0.4])
def test_every_image_keeps_exactly_the_number(model, keep):
    images = tiny.uneven(model, 4)
    batch = tiny.inputs(model, four_prompts(model, images), images)
    with dymu.apply(model, merge=FixedMerge(keep, "reverse_linear")) as handle:
        model(**batch)
        there = [int(item.patch.sum()) for item in handle.last.items]
        goal = [keep if keep > 1 else round(keep * count) for count in there]
        assert [item.budgeted for item in handle.last.items] == goal


def test_every_image_may_have_a_rule_of_its_own(model):
    """What it keeps, and what the model says of it, does not depend on the rules of the others."""
    few = min(tiny.tokens_per_image(model), 9)
    rules = (SOME, NOTHING, FixedMerge(few), ThresholdMerge(SOME.thresholds, at_most=5))
    images = tiny.uneven(model, 4)
    prompts = four_prompts(model, images)
    with dymu.apply(model, merge=ByImage(rules)) as handle:
        together = model(**tiny.inputs(model, prompts, images)).logits
        items = handle.last.items
        two = [4, images[0], 3, images[2], 5]
        with pytest.raises(BadBudget, match="4 budgets were given for 2 images"):
            model(**tiny.inputs(model, tiny.prompt(model, *two), [images[0], images[2]]))
    for row, rule in enumerate(rules):
        with dymu.apply(model, merge=rule) as handle:
            alone = model(**tiny.inputs(model, prompts[row], images[row : row + 1])).logits[0]
            assert torch.equal(handle.last.items[0].leaders, items[row].leaders)
            tiny.close(together[row, -len(alone) :], alone, part=1e-4)
    with dymu.apply(model, merge=ByImage((rules[0], rules[2]))) as handle:
        model(**tiny.inputs(model, tiny.prompt(model, *two), [images[0], images[2]]))
        kept = sum(item.budgeted for item in handle.last.items)
        assert kept == items[0].budgeted + items[2].budgeted


@pytest.mark.parametrize("unmerge", UNMERGE)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_batch_gets_what_it_gets_alone(model, side, unmerge):
    if unmerge not in unmergings(model):
        pytest.skip("refused")
    images = tiny.uneven(model, 4)
    prompts = four_prompts(model, images)
    batch = tiny.inputs(model, prompts, images, side)
    with dymu.apply(model, merge=SOME, unmerge=unmerge) as handle:
        together = model(**batch).logits
        maps = [handle.last.group(i) for i in range(4)]
        kept = handle.last.kept
        assert len({kept / of for kept, of in zip(kept, handle.last.original, strict=True)}) > 2, (
            "the pictures should merge differently, or this test shows little"
        )
        for i, ids in enumerate(prompts):
            alone = model(**tiny.inputs(model, ids, images[i : i + 1])).logits[0]
            assert torch.equal(handle.last.group(0), maps[i])
            assert handle.last.kept == [kept[i]]
            row = together[i][batch["attention_mask"][i].bool()]
            tiny.close(row, alone, part=1e-4)


def test_a_row_of_text_beside_rows_with_images(model):
    images = tiny.uneven(model, 3)
    prompts = [tiny.prompt(model, 3, *images[:2], 4), tiny.prompt(model, 6), tiny.prompt(model, 2, images[2], 1)]
    batch = tiny.inputs(model, prompts, images)
    stock = model(**batch).logits
    for rule in (NOTHING, SOME, FixedMerge(keep=0.5)):
        with dymu.apply(model, merge=rule) as handle:
            together = model(**batch).logits
            assert len(handle.last.kept) in (2, 3)
            for row, ids in enumerate(prompts):
                shown = {0: images[:2], 1: [], 2: images[2:]}[row]
                alone = model(**tiny.inputs(model, ids, shown)).logits[0]
                present = batch["attention_mask"][row].bool()
                tiny.close(together[row][present], alone, part=1e-4)
                if rule is NOTHING:
                    tiny.close(alone, stock[row][present], part=2e-5)


def test_a_row_of_a_batch_gets_what_it_gets_alone_in_bfloat16(model):
    """The same token maps; logits to the rounding of one forward of this model."""
    limit = rounding(model)
    model = model.to(torch.bfloat16)
    images = [image.to(torch.bfloat16) for image in tiny.uneven(model, 4)]
    prompts = four_prompts(model, images)
    batch = tiny.inputs(model, prompts, images)
    with dymu.apply(model, merge=SOME) as handle:
        together = model(**batch).logits.float()
        maps = [handle.last.group(i) for i in range(4)]
        for i, ids in enumerate(prompts):
            alone = model(**tiny.inputs(model, ids, images[i : i + 1])).logits[0].float()
            assert torch.equal(handle.last.group(0), maps[i])
            row = together[i][batch["attention_mask"][i].bool()]
            assert (row - alone).norm() < limit * alone.norm()


def test_a_row_of_a_generated_batch_gets_what_it_gets_alone(model):
    images = tiny.uneven(model, 4)
    prompts = four_prompts(model, images)
    with dymu.apply(model, merge=SOME):
        together = answer(model, **tiny.inputs(model, prompts, images))[:, -6:]
        for i, ids in enumerate(prompts):
            alone = answer(model, **tiny.inputs(model, ids, images[i : i + 1]))[0, -6:]
            assert torch.equal(together[i], alone)


@pytest.mark.parametrize("unmerge", UNMERGE)
def test_padding_is_no_distance_in_a_sliding_window(unmerge):
    """While a batch of prompts of different lengths is decoded, each row's window reaches as far as it does alone."""
    model = tiny.llava("clip", "mistral")
    model.config.text_config.sliding_window = 12
    prompts = [tiny.prompt(model, 4, "image", 7), tiny.prompt(model, 2, "image", 3, seed=1)]
    images = tiny.pictures(4)[1:3]
    more = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])

    def decoded(ids: Tensor, mask: Tensor, pixels: Tensor, more: Tensor) -> Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, **tiny.shown(model, pixels))
        logits = []
        for n in range(more.shape[1]):
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
            out = model(
                input_ids=more[:, n : n + 1], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=out.past_key_values,
            )  # fmt: skip
            logits.append(out.logits[:, -1])
        return torch.stack(logits, 1)

    batch = tiny.pad(prompts)
    with dymu.apply(model, merge=SOME, unmerge=unmerge):
        together = decoded(batch["input_ids"], batch["attention_mask"], images, more)
        for i, ids in enumerate(prompts):
            alone = decoded(ids[None], torch.ones_like(ids)[None], images[i : i + 1], more[i : i + 1])
            tiny.close(together[i], alone[0], part=1e-4)


@pytest.mark.parametrize("unmerge", ["exact", "none"])
def test_chunks_of_a_prompt_may_hold_gone_tokens_alone(some_model, unmerge):
    """Chunked prefill of an image of which next to nothing stays gives the logits of the whole prompt."""
    if not cuts_encoded_images():
        pytest.skip("this transformers does not chunk prompts with images")
    ids, image = tiny.prompt(some_model, 4, "image", 7)[None], tiny.pictures(4)[2:3]
    options = {"input_ids": ids, **tiny.shown(some_model, image), "max_new_tokens": 3, "do_sample": False}
    with dymu.apply(some_model, merge=RandomKeep(keep=2, seed=1), unmerge=unmerge):
        whole = some_model.generate(**options)
        assert torch.equal(some_model.generate(**options, prefill_chunk_size=4), whole)


def test_gone_tokens_are_drawn_dimmed(some_model):
    photo = tiny.photos(3)[2]
    seen = tiny.processor(some_model.config.model_type)(images=photo, return_tensors="pt")
    with dymu.apply(some_model, merge=RandomKeep(keep=9)) as handle:
        some_model.get_image_features(**seen)
        group = handle.last.group(0)
        assert set(group.tolist()) == {-1, *range(handle.last.kept[0])}
        drawn = np.asarray(handle.last.draw(photo).convert("L"), dtype=float)
    assert drawn.std() > 5


def test_every_token_knows_what_it_shows(model):
    """Whatever order the encoder's layers get patches in: windows, units, packed, padded."""
    picture = tiny.uneven(model, 2)[1]
    with dymu.apply(model, merge=NOTHING) as handle:
        model(**tiny.inputs(model, tiny.prompt(model, 2, picture, 3), [picture]))
        (item,) = handle.last.items
    if item.pictures > 1:
        return  # test_layouts.py has tiles
    (grid,) = item.grids
    rows, columns = grid.shape
    assert torch.equal(grid, torch.arange(rows * columns).view(rows, columns) + int((~item.patch).sum()))
    colours = torch.nn.functional.adaptive_avg_pool2d(tiny.fitted(model, picture), (rows, columns))
    tiny.close(item.seen[grid].permute(2, 0, 1), colours)
    column, row = torch.arange(columns).expand(rows, -1), torch.arange(rows)[:, None].expand(-1, columns)
    wanted = torch.stack((column / columns, row / rows, (column + 1) / columns, (row + 1) / rows), -1)
    torch.testing.assert_close(item.location[grid], wanted)


def test_the_cache_stores_merged_tokens(model):
    inputs = one_prompt(model, 3)
    tokens, words = inputs["input_ids"].shape[1], words_in(inputs["input_ids"])
    stock = attention_layers(model(**inputs).past_key_values)
    bytes_each = sum((layer.keys.nbytes + layer.values.nbytes) // length_of(layer) for layer in stock)
    with dymu.apply(model, merge=SOME) as handle:
        cache = model(**inputs).past_key_values
        layers, merged = attention_layers(cache), words + handle.last.kept[0]
        assert handle.last.kept[0] < tiny.tokens_per_image(model) // 2
        assert [length_of(layer) for layer in layers] == [merged] * len(stock)
        assert cache.get_seq_length() == tokens
        stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        assert handle.last.cache_bytes == stored == merged * bytes_each
        assert handle.last.cache_bytes_full == sum(layer.keys.nbytes + layer.values.nbytes for layer in stock)


def test_the_cache_of_a_batch_is_as_long_as_its_longest_merged_prompt(some_model):
    images = tiny.pictures(4)
    prompts = four_prompts(some_model, images)
    with dymu.apply(some_model, merge=SOME) as handle:
        cache = some_model(**tiny.inputs(some_model, prompts, images)).past_key_values
        full = tiny.tokens_per_image(some_model)
        merged = [len(ids) - full + kept for ids, kept in zip(prompts, handle.last.kept, strict=True)]
        assert cache.layers[0].keys.shape[2] == max(merged)


def cache_forms(model: Any) -> list[str]:
    """Those that the library has for a model; it may refuse all but the first for another rotation than Llama's."""
    forms = []
    for form in CACHE_FORMS:
        with contextlib.suppress(UnsupportedModel):
            dymu.apply(model, merge=SOME, cache=form).remove()
            forms.append(form)
    assert forms[0] == "merged"
    assert len(forms) == len(CACHE_FORMS) or model.config.text_config.model_type not in tiny.AS_THEY_BEGIN
    return forms


def test_a_fast_cache_made_in_inference_mode_goes_on_outside_and_counts_the_same():
    model = tiny.llava()
    images = tiny.pictures(4)
    inputs = tiny.inputs(model, four_prompts(model, images), images)
    more = torch.arange(3, 11).view(4, 2)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(more)), 1)
    with dymu.apply(model, merge=SOME, cache="fast"):
        with torch.inference_mode():
            cache = model(**inputs).past_key_values
            inside = cache_bytes(cache)
        assert cache_bytes(cache) == inside > sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        found = model(**tiny.going_on(model, more, mask), past_key_values=cache).logits
        again = model(**inputs).past_key_values
        tiny.close(found, model(**tiny.going_on(model, more, mask), past_key_values=again).logits)


@pytest.mark.parametrize("form", CACHE_FORMS)
def test_a_cache_made_in_inference_mode_goes_on_with_gradients(form):
    torch.set_grad_enabled(True)
    model = tiny.llava()
    inputs, one = tiny.inputs(model, tiny.prompt(model, 3, "image", 4), tiny.pictures(1)), torch.tensor([[5]])
    with dymu.apply(model, merge=SOME, cache=form):
        with torch.inference_mode():
            cache = model(**inputs).past_key_values
            model(input_ids=one, past_key_values=cache)
        found = model(input_ids=one, past_key_values=cache).logits
        with torch.no_grad():
            cache = model(**inputs).past_key_values
            model(input_ids=one, past_key_values=cache)
            tiny.close(found, model(input_ids=one, past_key_values=cache).logits)


def test_a_fast_cache_may_go_on_in_a_form_that_keeps_no_keys(monkeypatch):
    monkeypatch.setattr(sdpa, "_counts_calls", lambda _: True)
    model = tiny.llava()
    inputs, one = tiny.inputs(model, tiny.prompt(model, 3, "image", 4), tiny.pictures(4)[1:2]), torch.tensor([[5]])
    logits = []
    for form in CACHE_FORMS:
        with dymu.apply(model, merge=SOME, cache=form):
            cache = model(**inputs).past_key_values
        with dymu.apply(model, merge=SOME, unmerge="compact"):
            logits.append(model(input_ids=one, past_key_values=cache).logits)
    tiny.close(*logits)


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_fast_cache_says_the_same(model, side, as_on_a_gpu, monkeypatch):
    """`cache="fast"` also keeps the turned keys and changes no logits, whatever is done to the cache."""
    monkeypatch.setattr(sdpa, "_counts_calls", lambda _: as_on_a_gpu)
    images = tiny.pictures(4)
    inputs = tiny.inputs(model, four_prompts(model, images), images, side)
    tokens = inputs["input_ids"].shape[1]
    more = torch.arange(3, 11).view(4, 2)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(more)), 1)
    if (forms := cache_forms(model)) != list(CACHE_FORMS):
        with pytest.raises(UnsupportedModel, match=r'cache="fast" would keep'):
            dymu.apply(model, merge=SOME, cache="fast")
        return
    logits, bytes_, untouched = [], [], attention_layers(model(**inputs).past_key_values)
    full = sum(layer.keys.nbytes + layer.values.nbytes for layer in untouched)
    for form in forms:
        with dymu.apply(model, merge=SOME, cache=form) as handle:
            first = model(**inputs)
            cache = first.past_key_values
            assert stored(first) < tokens
            assert handle.last.cache_bytes_full == full
            bytes_.append(handle.last.cache_bytes)
            second = model(**tiny.going_on(model, more, mask), past_key_values=cache).logits
            present = inputs["attention_mask"].bool()
            logits.append(torch.cat((first.logits[present], second.flatten(0, 1))))
            if tiny.can(model, "steps back"):
                order = [1, 0, 3, 2]
                cache.crop(-1)
                cache.reorder_cache(torch.tensor(order))
                third = model(**tiny.going_on(model, more[order, 1:], mask[order]), past_key_values=cache).logits
                logits[-1] = torch.cat((logits[-1], third.flatten(0, 1)))
    tiny.close(*logits, part=1e-4)
    assert bytes_[0] < bytes_[1]
    with pytest.raises(ValueError, match=r"each merged token has one"):
        dymu.apply(model, merge=SOME, cache="fast", unmerge="none")
    with pytest.raises(ValueError, match="merged or fast"):
        dymu.apply(model, merge=SOME, cache="both")


@pytest.mark.parametrize("unmerge", UNMERGE)
def test_decoding_equals_forwarding_the_whole(model, unmerge):
    """A cache of merged tokens changes nothing: each step's logits are those of one forward without a cache."""
    if unmerge not in unmergings(model) or unmerge == "restore":
        pytest.skip("refused, or later tokens see other distances")
    inputs, image = one_prompt(model, 2), tiny.pictures(4)[2:3]
    ids = inputs["input_ids"]
    with dymu.apply(model, merge=SOME, unmerge=unmerge):
        whole = answer(model, new_tokens=5, **inputs)
        full = model(**tiny.inputs(model, whole, image, said=5), use_cache=False).logits
        out = model(**inputs)
        cache, steps = out.past_key_values, [out.logits[:, -1]]
        for place in range(ids.shape[1], whole.shape[1]):
            out = model(input_ids=whole[:, place : place + 1], past_key_values=cache)
            steps.append(out.logits[:, -1])
        tiny.close(torch.stack(steps, 1), full[:, ids.shape[1] - 1 :], part=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_logits_alone_are_those_of_all(model, side):
    """Also where rows of different lengths travel as one, and where the last tokens are an image's."""
    images = tiny.uneven(model, 4)
    batch = tiny.inputs(model, four_prompts(model, images), images, side)
    ends_in_image = tiny.inputs(model, tiny.prompt(model, 4, "image"), tiny.pictures(3)[2:])
    for unmerge in unmergings(model):
        with dymu.apply(model, merge=SOME, unmerge=unmerge):
            for asked in (batch, ends_in_image):
                whole = model(**asked).logits
                for last in (1, 3):
                    present = asked.get("attention_mask", torch.ones_like(asked["input_ids"]))[:, -last:].bool()
                    logits = model(**asked, logits_to_keep=last).logits[:, -last:]  # some models give all
                    tiny.close(logits[present], whole[:, -last:][present])


def test_what_no_asked_logit_needs_is_left_out(monkeypatch):
    model, rows = tiny.llava("clip", "llama"), []
    inputs, kind = one_prompt(model, 2), type(model.model.language_model.layers[-1].mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda mlp, x: [rows.append(x.shape[1]), forward(mlp, x)][1])
    with dymu.apply(model, merge=SOME) as handle:
        model(**inputs, logits_to_keep=1)
        merged = words_in(inputs["input_ids"]) + handle.last.kept[0]
        assert rows == [merged] * (len(rows) - 1) + [1]
        rows.clear()
        for asked in ({}, {"output_hidden_states": True, "logits_to_keep": 1}, {"logits_to_keep": torch.tensor([3])}):
            model(**inputs, **asked)
        assert set(rows) == {merged}
        model(**inputs, logits_to_keep=1)  # what transformers watched with is still there, and watches no more
        assert rows.pop() == 1
        model.model.language_model.norm.register_forward_hook(lambda *_: None)  # somebody looks
        model(**inputs, logits_to_keep=1)
        assert set(rows) == {merged}


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe"])
def test_routers_tell_of_all_tokens(name):
    model = tiny.build(name)
    inputs = one_prompt(model, 2)
    with dymu.apply(model, merge=SOME):
        for asked in ({"logits_to_keep": 1}, {}, {"logits_to_keep": 1}):
            routed = model(**inputs, output_router_logits=True, **asked).router_logits
            assert len({len(logits) for logits in routed}) == 1


def test_text_and_images_in_pieces_equal_the_whole(model):
    """Prefill in several forwards, as long as no image is cut in two."""
    if not tiny.can(model, "images on a cache"):
        pytest.skip("the stock model cannot either")
    ids = tiny.prompt(model, 4, "image", 7, "image", 5)
    images = tiny.pictures(4)[1:3]
    cuts = [0, 2, 4 + len(tiny.image(model)) + 3, len(ids) - 2, len(ids)]
    with dymu.apply(model, merge=SOME):
        whole = model(**tiny.inputs(model, ids, images)).logits
        cache, pieces, shown = DynamicCache(config=model.config), [], 0
        for start, end in pairwise(cuts):
            piece = ids[start:end]
            count = int((piece == tiny.IMAGE_TOKEN).sum()) // tiny.tokens_per_image(model)
            pixels = images[shown : shown + count]
            shown += count
            pieces.append(model(**tiny.inputs(model, piece, pixels), past_key_values=cache).logits)
        tiny.close(torch.cat(pieces, 1), whole, part=1e-4)


def test_generate_in_chunks_reads_the_whole_prompt(model):
    """Chunks cut through images; tokens of one group that fall into two chunks are stored once in each."""
    inputs = one_prompt(model, 3)
    if not cuts_encoded_images():
        with dymu.apply(model, merge=SOME), pytest.raises(BadPrompt, match=r"leave prefill_chunk_size out, or update"):
            answer(model, prefill_chunk_size=17, **inputs)
        return
    if not tiny.can(model, "chunks"):
        pytest.skip("the stock model cannot either")
    text = answer(model, prefill_chunk_size=17, **inputs)
    with dymu.apply(model, merge=NOTHING):
        assert torch.equal(answer(model, prefill_chunk_size=17, **inputs), text)
    with dymu.apply(model, merge=SOME) as handle:
        out = answer(model, prefill_chunk_size=17, return_dict_in_generate=True, **inputs)
        ids, group = inputs["input_ids"][0], handle.last.group(0)
        label = torch.arange(len(ids)) + 1000
        label[ids == tiny.IMAGE_TOKEN] = group
        assert stored(out) == sum(len(set(chunk.tolist())) for chunk in label.split(17)) + 5


def test_removing_gives_the_model_back(model, tmp_path):
    inputs = one_prompt(model)
    before, names, attributes = model(**inputs).logits, list(model.state_dict()), _attributes(model)
    handle = dymu.apply(model, merge=SOME)
    assert list(model.state_dict()) == names
    assert not torch.equal(model(**inputs).logits, before)
    model.save_pretrained(tmp_path)
    with handle.disabled():
        assert torch.equal(model(**inputs).logits, before)
    assert not torch.equal(model(**inputs).logits, before)
    handle.remove()
    assert torch.equal(model(**inputs).logits, before)
    assert _attributes(model) == attributes
    if tiny.can(model, "saves"):
        again = type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(again(**inputs).logits, before, atol=1e-6, rtol=0)
    handle.remove()


MAY_CHANGE = ("_parameters", "_buffers", "_modules", "_output_capturing_hooks_installed", "rope_deltas")
"""What transformers itself changes of a module: the last how far positions were ahead in the last call, in some."""


def _attributes(model: torch.nn.Module) -> dict[str, object]:
    """What hangs on the modules: attributes other than their parts, and how many hooks."""
    found = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key.startswith("_forward") and hasattr(value, "__len__"):
                # transformers itself adds hooks that capture hidden states when they are first asked for
                found[name, key] = len([hook for hook in value.values() if "dymu" in repr(hook)])
            elif key not in MAY_CHANGE:
                found[name, key] = id(value)
    return found


def test_two_models_do_not_meet():
    """Even two that share one config object."""
    merged = tiny.llava(seed=1)
    other = LlavaForConditionalGeneration(merged.config).eval()
    inputs = {"input_ids": tiny.prompt(merged, 4, "image", 7)[None], **tiny.shown(merged, tiny.pictures(1))}
    before = other(**inputs).logits
    with dymu.apply(merged, merge=SOME):
        assert torch.equal(other(**inputs).logits, before)
        alone = merged(**inputs).logits
        with dymu.apply(other, merge=NOTHING):
            tiny.close(other(**inputs).logits, before)
            assert torch.equal(merged(**inputs).logits, alone)
        assert torch.equal(other(**inputs).logits, before)


def test_applying_twice_says_how_to_change_the_budget():
    model = tiny.llava()
    with dymu.apply(model, merge=SOME):
        with pytest.raises(AlreadyApplied, match=r"handle\.budget"):
            dymu.apply(model, merge=SOME)
        with pytest.raises(AlreadyApplied):
            dymu.apply(model, merge=NOTHING)
    dymu.apply(model, merge=SOME).remove()


def test_sampling_is_reproducible_and_nothing_merged_samples_the_same(model):
    if not tiny.can(model, "repeats"):
        pytest.skip("the stock model cannot either")
    inputs = one_prompt(model)

    def sample() -> Tensor:
        torch.manual_seed(5)
        return answer(model, do_sample=True, num_return_sequences=3, **inputs)

    stock = sample()
    with dymu.apply(model, merge=NOTHING):
        assert torch.equal(sample(), stock)
    with dymu.apply(model, merge=SOME) as handle:
        assert torch.equal(sample(), sample())
        out = answer(model, do_sample=True, num_return_sequences=3, return_dict_in_generate=True, **inputs)
        assert stored(out) == words_in(inputs["input_ids"]) + handle.last.kept[0] + 5


def test_beams(model):
    if not tiny.can(model, "repeats"):
        pytest.skip("the stock model cannot either")
    prompts = [tiny.prompt(model, 3, "image", 4), tiny.prompt(model, 3, "image", 2, "image", 6, seed=1)]
    inputs = tiny.inputs(model, prompts, tiny.pictures(3))
    stock = answer(model, num_beams=3, **inputs)
    with dymu.apply(model, merge=NOTHING):
        same = torch.equal(answer(model, num_beams=3, **inputs), stock)
        assert same or not tiny.can(model, "repeats several")
    with dymu.apply(model, merge=SOME) as handle:
        one_each = torch.stack([tiny.prompt(model, 3, "image", 4, seed=seed) for seed in range(2)])
        both = tiny.inputs(model, one_each, tiny.pictures(4)[2:])
        out = answer(model, num_beams=3, return_dict_in_generate=True, **both)
        kept = handle.last.kept[:: len(handle.last.kept) // 2]
        assert stored(out) == words_in(one_each[0]) + max(kept) + 5
        together = answer(model, num_beams=3, **inputs)[:, -6:]
        alone = answer(model, num_beams=3, **tiny.inputs(model, prompts[1], tiny.pictures(3)[1:]))[0, -6:]
        assert torch.equal(together[1], alone)


def test_several_images_in_a_prompt(model):
    ids = tiny.prompt(model, 3, "image", "image", 2, "image", 6)
    inputs = tiny.inputs(model, ids, tiny.pictures(4)[[3, 0, 2]])
    stock = model(**inputs).logits
    with dymu.apply(model, merge=NOTHING):
        tiny.close(model(**inputs).logits, stock)
    with dymu.apply(model, merge=SOME) as handle:
        out = model(**inputs)
        assert stored(out) == words_in(ids) + sum(handle.last.kept)
        groups, of = [], 0
        for i in range(len(handle.last.items)):
            groups.append(handle.last.group(i) + of)
            of += handle.last.kept[i]
        same = torch.cat(groups)
        assert [len(own.unique()) for own in same.view(3, -1)] == kept_of_images(model, handle, 3)
        _, seen = out.logits[0, ids == tiny.IMAGE_TOKEN].unique(dim=0, return_inverse=True)
        assert torch.equal(same[:, None] == same, seen[:, None] == seen)


def kept_of_images(model: Any, handle: Any, images: int) -> list[int]:
    """Tokens kept of each image of a prompt, also where the family makes one item of them all."""
    if len(handle.last.items) == images or not tiny.family_of(model).joins_images:
        return list(handle.last.kept)
    assert handle.last.kept == [int(handle.last.group(0).max()) + 1]
    return [len(own.unique()) for own in handle.last.group(0).view(images, -1)]


def test_the_same_image_twice_is_two_images(model):
    ids = tiny.prompt(model, 3, "image", 2, "image", 6)
    inputs = tiny.inputs(model, ids, tiny.pictures(1).expand(2, -1, -1, -1))
    stock = model(**inputs).logits
    with dymu.apply(model, merge=NOTHING) as handle:
        out = model(**inputs)
        tiny.close(out.logits, stock)
        assert stored(out) == len(ids)
        assert kept_of_images(model, handle, 2) == [tiny.tokens_per_image(model)] * 2


def test_text_only_prompts(model):
    batch = tiny.inputs(model, [tiny.prompt(model, 9), tiny.prompt(model, 5, seed=1)])
    stock = answer(model, **batch)
    with dymu.apply(model, merge=SOME) as handle:
        model(**one_prompt(model))
        assert torch.equal(answer(model, **batch), stock)
        assert handle.last.kept == handle.last.original == []
        assert handle.last.cache_bytes > 0


@pytest.mark.parametrize("rule", [NOTHING, SOME], ids=["nothing", "some"])
def test_a_second_turn_on_the_same_cache(model, rule):
    first, image = tiny.prompt(model, 3, "image", 4), tiny.pictures(4)[2:3]

    def turns() -> tuple[Tensor, Tensor]:
        cache = DynamicCache(config=model.config)
        inputs = tiny.inputs(model, first, image)
        out = answer(model, **inputs, past_key_values=cache, return_dict_in_generate=True)
        more = torch.cat((out.sequences, tiny.prompt(model, 5, seed=3)[None]), 1)
        fresh = answer(model, **tiny.inputs(model, more, image, said=more.shape[1] - len(first)))
        continued = answer(model, input_ids=more, past_key_values=out.past_key_values)
        return fresh, continued

    stock, _ = turns()
    with dymu.apply(model, merge=rule):
        fresh, continued = turns()
        assert torch.equal(continued, fresh)
        if rule is NOTHING:
            assert torch.equal(fresh, stock)


def test_a_later_mask_hides_cached_tokens(model):
    """As `generate` hides the padding behind shorter answers, once a conversation goes on."""
    first, more = tiny.prompt(model, 10)[None], tiny.prompt(model, 3, seed=3)[None]
    mask = torch.ones(1, 13, dtype=torch.long)
    mask[:, 2:5] = 0

    def turns() -> list[Tensor]:
        output = model(**tiny.inputs(model, first), use_cache=True)
        outputs = []
        for tokens in (slice(0, 2), slice(2, 3)):
            seen = mask[:, : 10 + tokens.stop]
            output = model(input_ids=more[:, tokens], attention_mask=seen, use_cache=True, **going_on(model, output))
            outputs.append(output.logits)
        return outputs

    stock = turns()
    caches = [{"cache": form} for form in cache_forms(model)]
    for options in (*caches, {"backend": "reference"}, {"unmerge": "compact"}):
        with dymu.apply(model, merge=SOME, **options):
            for hidden, expected in zip(turns(), stock, strict=True):
                tiny.close(hidden, expected)
    with dymu.apply(model, merge=SOME, unmerge="none"), pytest.raises(ValueError, match="hides tokens"):
        turns()


def test_a_second_turn_brings_another_image(model):
    if not tiny.can(model, "images on a cache"):
        pytest.skip("the stock model cannot either")
    first, more = tiny.prompt(model, 3, "image", 4), tiny.prompt(model, 2, "image", 5, seed=3)
    images = tiny.pictures(4)[2:]
    with dymu.apply(model, merge=SOME):
        whole = model(**tiny.inputs(model, torch.cat((first, more)), images)).logits[:, len(first) :]
        cache = model(**tiny.inputs(model, first, images[:1])).past_key_values
        later = model(**tiny.inputs(model, more, images[1:]), past_key_values=cache)
        tiny.close(later.logits, whole, part=1e-4)


@pytest.mark.parametrize("rule", [NOTHING, SOME], ids=["nothing", "some"])
def test_assisted_decoding_gives_the_greedy_text(model, rule):
    if not tiny.can(model, "steps back"):
        pytest.skip("the stock model cannot either")
    inputs = one_prompt(model, 2)
    draft = copy.deepcopy(model)
    with torch.no_grad():
        draft.lm_head.weight += 0.05 * torch.randn_like(draft.lm_head.weight)
    with dymu.apply(model, merge=rule) as handle:
        greedy = answer(model, new_tokens=12, **inputs)
        assert torch.equal(answer(model, new_tokens=12, prompt_lookup_num_tokens=3, **inputs), greedy)
        out = answer(model, new_tokens=12, assistant_model=draft, return_dict_in_generate=True, **inputs)
        assert stored(out) == words_in(inputs["input_ids"]) + handle.last.kept[0] + 11
        assert torch.equal(answer(model, new_tokens=12, assistant_model=draft, **inputs), greedy)
        with dymu.apply(draft, merge=rule):
            assert torch.equal(answer(model, new_tokens=12, assistant_model=draft, **inputs), greedy)


def test_gradients_reach_the_encoder(some_model):
    torch.set_grad_enabled(True)
    inputs = {
        "input_ids": tiny.prompt(some_model, 4, "image", 7)[None],
        **tiny.shown(some_model, tiny.pictures(4)[2:3]),
    }
    with dymu.apply(some_model, merge=SOME):
        some_model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradient = some_model.model.vision_tower.get_parameter(
        next(name for name, _ in some_model.model.vision_tower.named_parameters() if "patch" in name)
    ).grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("layer", [-1, 2, [1, -1], [-2, 3, 2]], ids=str)
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_any_feature_layers_and_strategy(layer, strategy):
    for tower in tiny.TOWERS:
        model = tiny.llava(tower, layer=layer, strategy=strategy)
        prompts, images = [tiny.prompt(model, 3, "image", n, seed=n) for n in (4, 6)], tiny.pictures(3)[1:]
        batch = tiny.pad(prompts)
        stock = model(**batch, **tiny.shown(model, images)).logits[batch["attention_mask"].bool()]
        with dymu.apply(model, merge=NOTHING):
            out = model(**batch, **tiny.shown(model, images)).logits[batch["attention_mask"].bool()]
            tiny.close(out, stock)
        with dymu.apply(model, merge=SOME) as handle:
            out = model(**batch, **tiny.shown(model, images)).logits
            assert max(handle.last.kept) < tiny.tokens_per_image(model)
            for i, ids in enumerate(prompts):
                alone = model(input_ids=ids[None], **tiny.shown(model, images[i : i + 1])).logits[0]
                tiny.close(out[i, batch["attention_mask"][i].bool()], alone, part=1e-4)


def test_the_feature_layer_of_a_call_counts(some_model):
    ids, image = tiny.prompt(some_model, 4, "image", 7)[None], tiny.pictures(2)[1:]
    with dymu.apply(some_model, merge=SOME) as handle:
        some_model(input_ids=ids, **tiny.shown(some_model, image), vision_feature_layer=1)
        assert len(handle.last.layers) == 1
        some_model(input_ids=ids, **tiny.shown(some_model, image))
        assert len(handle.last.layers) == max(resolve(some_model).feature_layers())


def test_without_unmerging_the_prompt_is_as_short_as_it_is_merged(some_model):
    """`unmerge="none"` is what the untouched language model does with the merged features alone."""
    ids, image = tiny.prompt(some_model, 4, "image", 7)[None], tiny.pictures(4)[2:3]
    with dymu.apply(some_model, merge=SOME, unmerge="none") as handle:
        out = some_model(input_ids=ids, **tiny.shown(some_model, image))
        features = some_model.get_image_features(**tiny.shown(some_model, image)).pooler_output[0]
        group = handle.last.group(0)
        grown = answer(some_model, input_ids=ids, **tiny.shown(some_model, image))[:, ids.shape[1] :]
    first = [int((group == g).nonzero()[0]) for g in dict.fromkeys(group.tolist())]
    embed = some_model.get_input_embeddings()
    short = torch.cat((embed(ids[:, :4]), features[first][None], embed(ids[:, -7:])), 1)
    stock = some_model.model.language_model(inputs_embeds=short).last_hidden_state
    tiny.close(out.logits[:, -7:], some_model.lm_head(stock[:, -7:]))
    plain = some_model.generate(inputs_embeds=short, max_new_tokens=6, do_sample=False)
    assert torch.equal(grown, plain)


@pytest.mark.parametrize("unmerge", ["exact", "none"])
def test_random_keep_is_the_stock_model_on_the_tokens_that_stay(some_model, unmerge):
    """In their own places (`exact`), or moved together (`none`)."""
    ids, image = tiny.prompt(some_model, 4, "image", 7)[None], tiny.pictures(4)[2:3]
    tokens = tiny.tokens_per_image(some_model)
    with dymu.apply(some_model, merge=RandomKeep(keep=9, seed=5), unmerge=unmerge) as handle:
        logits = some_model(input_ids=ids, **tiny.shown(some_model, image)).logits[:, -7:]
        grown = answer(some_model, input_ids=ids, **tiny.shown(some_model, image))[:, ids.shape[1] :]
        kept, group = handle.last.kept[0], handle.last.group(0)
    stays = (group >= 0).nonzero()[:, 0]
    assert len(stays) == kept < tokens
    features = some_model.get_image_features(**tiny.shown(some_model, image)).pooler_output[0]
    embed = some_model.get_input_embeddings()
    short = torch.cat((embed(ids[:, :4]), features[stays][None], embed(ids[:, -7:])), 1)
    places = torch.cat((torch.arange(4), 4 + stays, torch.arange(4 + tokens, 11 + tokens)))
    positions = places if unmerge == "exact" else torch.arange(short.shape[1])
    window = getattr(some_model.config.text_config, "sliding_window", None) or len(ids[0])
    apart = positions[:, None] - positions[None]
    hidden = torch.zeros(apart.shape).masked_fill((apart < 0) | (apart >= window), -torch.inf)
    stock = some_model.model.language_model(
        inputs_embeds=short, position_ids=positions[None], attention_mask=hidden[None, None]
    ).last_hidden_state
    tiny.close(logits, some_model.lm_head(stock[:, -7:]))
    assert grown[0, 0] == logits[0, -1].argmax()


def test_average_pool_merges_the_fields_of_a_grid(some_model):
    ids, image = tiny.prompt(some_model, 4, "image", 7)[None], tiny.pictures(4)[2:3]
    tokens = tiny.tokens_per_picture(some_model)
    with dymu.apply(some_model, merge=AveragePool(keep=4 / tiny.PATCHES)) as handle:
        some_model(input_ids=ids, **tiny.shown(some_model, image))
        group, prefix = handle.last.group(0)[:tokens], int((~handle.last.items[0].patch[:tokens]).sum())
        hidden = some_model.get_image_features(**tiny.shown(some_model, image)).last_hidden_state
    side = round((tokens - prefix) ** 0.5)
    grid = group[prefix:].view(side, side) - prefix
    half = (torch.arange(side) >= (side + 1) // 2).long()
    assert torch.equal(grid, 2 * half[:, None] + half)
    assert hidden.shape[1] < side * side or tiny.cuts_tiles(some_model)


def test_a_pool_larger_than_the_grid_is_refused(some_model):
    inputs = {
        "input_ids": tiny.prompt(some_model, 4, "image", 7)[None],
        **tiny.shown(some_model, tiny.pictures(4)[2:3]),
    }
    with dymu.apply(some_model, merge=AveragePool(keep=1000)), pytest.raises(BadBudget, match="take fewer"):
        some_model(**inputs)


@pytest.mark.parametrize("unmerge", ["compact", "original", "restore"])
def test_compact_is_stock_attention_between_merged_tokens(some_model, unmerge):
    """What the untouched language model does with the merged features, given their positions and log sizes."""
    ids, image = tiny.prompt(some_model, 4, "image", 7)[None], tiny.pictures(4)[2:3]
    with dymu.apply(some_model, merge=SOME, unmerge=unmerge) as handle:
        logits = some_model(input_ids=ids, **tiny.shown(some_model, image)).logits[:, -7:]
        features = some_model.get_image_features(**tiny.shown(some_model, image)).pooler_output[0]
        group = handle.last.group(0)
    members = sorted(([int(n) for n in (group == g).nonzero()] for g in set(group.tolist())), key=median_low)
    positions = [0, 1, 2, 3, *(4 + median_low(own) for own in members), *range(4 + len(group), 4 + len(group) + 7)]
    size = torch.tensor([1.0] * 4 + [len(own) for own in members] + [1.0] * 7)
    embed = some_model.get_input_embeddings()
    short = torch.cat((embed(ids[:, :4]), features[[own[0] for own in members]][None], embed(ids[:, -7:])), 1)
    bias = torch.zeros(len(size), len(size)) if unmerge == "original" else size.log().expand(len(size), -1)
    first = bias
    if unmerge == "restore":
        apart = torch.tensor(positions)[:, None] - torch.tensor(positions)
        cos, _ = some_model.model.language_model.rotary_emb(short, torch.arange(len(group) + 11)[None])
        distance = (2 - cos[0].mean(-1)).log()[apart.abs()]
        alike = size.clone()
        alike[4:-7] = len(group) / len(members)
        first, bias = alike.log() + distance, bias + distance
    masks = [mask.masked_fill(torch.ones_like(bias).triu(1).bool(), -torch.inf)[None, None] for mask in (first, bias)]

    def in_first_layer(_module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": masks[0]}

    hook = some_model.model.language_model.layers[0].register_forward_pre_hook(in_first_layer, with_kwargs=True)
    stock = some_model.model.language_model(
        inputs_embeds=short, position_ids=torch.tensor(positions)[None], attention_mask=masks[1]
    ).last_hidden_state
    hook.remove()
    tiny.close(logits, some_model.lm_head(stock[:, -7:]))


def test_restore_adds_what_its_paper_says():
    """Of heads of 128 channels and the base 10,000."""
    model = tiny.llava(
        "clip", "llama", text={"head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    )
    with dymu.apply(model, merge=SOME, unmerge="restore") as handle:
        added = handle._language._distances(torch.zeros(1, 1, 32), 577)
    expected = torch.tensor([0, 0.0294, 0.2859, 0.4205, 0.5688])
    torch.testing.assert_close(added[[0, 1, 10, 100, 576]], expected, atol=1e-4, rtol=0)
    with pytest.raises(UnsupportedModel, match='take unmerge="compact"'):
        dymu.apply(tiny.build("qwen2_vl"), merge=SOME, unmerge="restore")


def test_embeddings_instead_of_ids(some_model):
    """Image places are found by the placeholder's embedding, as transformers does."""
    ids, image = tiny.prompt(some_model, 4, "image", 7)[None], tiny.pictures(4)[2:3]
    with dymu.apply(some_model, merge=SOME):
        by_ids = some_model(input_ids=ids, **tiny.shown(some_model, image))
        by_embeds = some_model(inputs_embeds=some_model.get_input_embeddings()(ids), **tiny.shown(some_model, image))
        assert torch.equal(by_ids.logits, by_embeds.logits)
        assert by_embeds.past_key_values.layers[0].keys.shape == by_ids.past_key_values.layers[0].keys.shape


@pytest.mark.parametrize("form", CACHE_FORMS)
def test_caches_do_not_cross_over(some_model, form):
    ids, image = tiny.prompt(some_model, 4, "image", 7)[None], tiny.pictures(4)[2:3]
    one = ids[:, -1:]
    stock = some_model(input_ids=ids, **tiny.shown(some_model, image)).past_key_values
    handle = dymu.apply(some_model, merge=SOME, cache=form)
    with pytest.raises(UnsupportedCache, match="filled without DyMU"):
        some_model(input_ids=one, past_key_values=stock)
    merged = some_model(input_ids=ids, **tiny.shown(some_model, image)).past_key_values
    static = StaticCache(config=some_model.config, max_cache_len=99)
    with pytest.raises(UnsupportedCache, match="StaticCache"):
        some_model(input_ids=ids, **tiny.shown(some_model, image), past_key_values=static)
    handle.remove()
    with pytest.raises(UnsupportedCache, match="apply DyMU again"):
        some_model(input_ids=one, past_key_values=merged)
    with dymu.apply(some_model, merge=SOME, cache=form):
        expected = some_model(input_ids=torch.cat((ids, one), 1), **tiny.shown(some_model, image)).logits[:, -1:]
        continued = some_model(input_ids=one, past_key_values=merged).logits
        tiny.close(continued, expected, part=1e-4)


@pytest.mark.parametrize("unmerge", ["representative", "compact"])
def test_a_cache_goes_on_with_other_forms_but_not_with_other_positions(some_model, unmerge):
    ids, image = tiny.prompt(some_model, 4, "image", 7)[None], tiny.pictures(4)[2:3]
    asked, one = {"input_ids": ids, **tiny.shown(some_model, image)}, ids[:, -1:]
    with dymu.apply(some_model, merge=SOME):
        expected = some_model(input_ids=one, past_key_values=some_model(**asked).past_key_values).logits
        cache = some_model(**asked).past_key_values
    with dymu.apply(some_model, merge=SOME, unmerge="none") as handle:
        with pytest.raises(UnsupportedCache, match="filled without"):
            some_model(input_ids=one, past_key_values=cache)
        consecutive = some_model(**asked).past_key_values
        assert handle.last.kept
    with dymu.apply(some_model, merge=SOME, unmerge=unmerge):
        some_model(input_ids=one, past_key_values=cache)
        cache.crop(-1)
        with pytest.raises(UnsupportedCache, match="filled with unmerge"):
            some_model(input_ids=one, past_key_values=consecutive)
    with dymu.apply(some_model, merge=SOME):
        tiny.close(some_model(input_ids=one, past_key_values=cache).logits, expected)


@pytest.mark.parametrize(("side", "length"), [("right", -2), ("left", 2)])
@pytest.mark.parametrize("form", CACHE_FORMS)
def test_a_cache_cropped_within_padding_goes_on(some_model, form, side, length):
    row = tiny.prompt(some_model, 4, "image", 7)
    inputs = tiny.pad([torch.cat((row, row[-4:])), row], side)
    inputs["attention_mask"][0] = inputs["attention_mask"][1]
    more, image = torch.tensor([[5, 6], [7, 8]]), tiny.pictures(4)[1:3]
    with dymu.apply(some_model, merge=SOME, cache=form):
        cache = some_model(**inputs, **tiny.shown(some_model, image)).past_key_values
        keep = length % inputs["input_ids"].shape[1]
        cache.crop(keep - cache.get_seq_length())
        assert cache.get_seq_length() == keep
        mask = torch.cat((inputs["attention_mask"][:, :keep], torch.ones_like(more)), 1)
        logits = some_model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
        assert torch.isfinite(logits).all()


def test_cropping_a_cache_forgets_the_end(some_model):
    ids, image = tiny.prompt(some_model, 4, "image", 7)[None], tiny.pictures(4)[2:3]
    with dymu.apply(some_model, merge=SOME):
        expected = some_model(input_ids=ids, **tiny.shown(some_model, image)).logits[:, -3:]
        cache = some_model(input_ids=ids, **tiny.shown(some_model, image)).past_key_values
        cache.crop(-3)
        assert cache.get_seq_length() == ids.shape[1] - 3
        out = some_model(input_ids=ids[:, -3:], past_key_values=cache).logits
        tiny.close(out, expected, part=1e-4)


@pytest.mark.parametrize("form", CACHE_FORMS)
def test_a_cache_grows_past_its_room(some_model, form):
    """Entries are written into room ahead, which two copies of a cache, or what was cropped, must not share."""
    rows = [tiny.prompt(some_model, 4, "image", 7), tiny.prompt(some_model, 9, "image", 2)]
    inputs = {**tiny.pad(rows, "left"), **tiny.shown(some_model, tiny.pictures(4)[1:3])}
    length, steps = inputs["input_ids"].shape[1], ROOM + 6
    more = torch.arange(2 * 2 * steps).view(2, 2, steps) % 40 + 3
    with dymu.apply(some_model, merge=SOME, cache=form):
        whole = [
            some_model(**{**inputs, **_going_on(inputs, said)}, use_cache=False).logits[:, length - 1 : -1]
            for said in more
        ]
        with torch.inference_mode():
            first = some_model(**inputs)
            caches = [first.past_key_values, copy.deepcopy(first.past_key_values)]
        for step in range(steps - 1):
            for cache, said, logits in zip(caches, more, whole, strict=True):
                with torch.inference_mode() if step % 7 < 5 else torch.no_grad():
                    ids, mask = said[:, step : step + 1], _going_on(inputs, said[:, : step + 1])["attention_mask"]
                    out = some_model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, 0]
                tiny.close(out, logits[:, step + 1], part=1e-4)
            if step == 3:
                shared = copy.copy(caches[0])
                shared.layers = [copy.copy(layer) for layer in shared.layers]
                for layer in shared.layers:
                    layer.history = copy.deepcopy(layer.history) if layer.leads else shared.layers[0].history
                with torch.inference_mode():
                    some_model(input_ids=ids + 1, attention_mask=F.pad(mask, (0, 1), value=1), past_key_values=shared)


@pytest.mark.parametrize("form", CACHE_FORMS)
def test_a_cache_goes_on_in_another_precision(some_model, form):
    """What a prefill under autocast left is read without it, as by the untouched model, and the other way round."""
    inputs = {
        "input_ids": tiny.prompt(some_model, 4, "image", 7)[None],
        **tiny.shown(some_model, tiny.pictures(4)[1:2]),
    }
    more = torch.tensor([[5], [6]])
    with dymu.apply(some_model, merge=SOME, cache=form), torch.no_grad():
        for first in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=first):
                cache = some_model(**inputs).past_key_values
            for token, cast in zip(more, (not first, first), strict=True):
                with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                    logits = some_model(input_ids=token[None], past_key_values=cache).logits
                assert torch.isfinite(logits).all()


def test_gradients_after_tokens_without(some_model):
    torch.set_grad_enabled(True)
    ids, image = tiny.prompt(some_model, 4, "image", 7)[None], tiny.shown(some_model, tiny.pictures(4)[1:2])
    with dymu.apply(some_model, merge=SOME, cache="fast"):
        with torch.no_grad():
            cache = some_model(input_ids=ids, **image).past_key_values
        with torch.inference_mode():
            some_model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        embeds = some_model.get_input_embeddings()(torch.tensor([[6]])).detach().requires_grad_()
        logits = some_model(inputs_embeds=embeds, past_key_values=cache).logits
        logits.square().sum().backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().sum() > 0


def _going_on(inputs: dict[str, Any], said: torch.Tensor) -> dict[str, torch.Tensor]:
    """The ids and the mask with what was said behind."""
    return {
        "input_ids": torch.cat((inputs["input_ids"], said), 1),
        "attention_mask": torch.cat((inputs["attention_mask"], torch.ones_like(said)), 1),
    }


def test_a_reset_cache_starts_over(some_model):
    ids, image = tiny.prompt(some_model, 4, "image", 7)[None], tiny.pictures(4)[2:3]
    with dymu.apply(some_model, merge=SOME):
        out = some_model(input_ids=ids, **tiny.shown(some_model, image))
        cache, expected = out.past_key_values, out.logits
        cache.reset()
        assert cache.get_seq_length() == 0
        out = some_model(input_ids=ids, **tiny.shown(some_model, image), past_key_values=cache).logits
        tiny.close(out, expected)


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match=r"'llama'.*llava.*add-a-family"):
        dymu.apply(tiny.llava().model.language_model, merge=SOME)
    model = tiny.llava()
    model.model.language_model.config.model_type = "gpt_neox"
    with pytest.raises(UnsupportedModel, match=r"language model 'gpt_neox'.*llama"):
        dymu.apply(model, merge=SOME)
    with pytest.raises(UnsupportedModel, match="only a part of a llava model"):
        dymu.apply(tiny.llava().model, merge=SOME)
    model = tiny.llava()
    model.model.language_model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(UnsupportedModel, match="depend on how long"):
        dymu.apply(model, merge=SOME)
    model = tiny.llava()
    model.model.vision_tower.config.model_type = "beit"
    with pytest.raises(UnsupportedModel, match=r"vision encoder 'beit'.*clip_vision_model"):
        dymu.apply(model, merge=SOME)


def test_an_error_half_way_leaves_nothing_open(some_model):
    ids, image = tiny.prompt(some_model, 4, "image", 7)[None], tiny.pictures(2)
    with dymu.apply(some_model, merge=SOME):
        expected = some_model(input_ids=ids, **tiny.shown(some_model, image[:1])).logits
        with pytest.raises(BadPrompt, match="the 2 images given need"):
            some_model(input_ids=ids, **tiny.shown(some_model, image))
        with pytest.raises(BadPrompt, match="have 0 image placeholders"):
            answer(some_model, input_ids=tiny.prompt(some_model, 4)[None], **tiny.shown(some_model, image))
        assert torch.equal(some_model(input_ids=ids, **tiny.shown(some_model, image[:1])).logits, expected)


def test_saving_while_applied_saves_the_stock_model(some_model):
    with tempfile.TemporaryDirectory() as folder, dymu.apply(some_model, merge=SOME):
        some_model.save_pretrained(folder)
        assert "dymu" not in (Path(folder) / "config.json").read_text()


def test_the_grid_is_that_of_the_patches():
    """Also where the strategy drops a patch, as LLaVA's default does with a tower without a class token."""
    for tower in tiny.TOWERS:
        for strategy in ("default", "full"):
            model = tiny.llava(tower, strategy=strategy)
            with dymu.apply(model, merge=SOME) as handle:
                model.get_image_features(tiny.pictures(2))
                for item in handle.last.items:
                    (view,) = item.views
                    assert view.token.shape == (7, 7)
                    assert view.seen.shape == (7, 7, 3)


@pytest.mark.parametrize("layer", [[1, -1], [-2, 3, 2]], ids=str)
def test_features_of_several_layers_stay_in_step_where_little_merges(layer):
    """Merging reorders tokens even where none merge, and a row that merges nothing holds the batch's width."""
    for tower in tiny.TOWERS:
        model = tiny.llava(tower, layer=layer)
        ids, images = tiny.prompt(model, 3, "image", 5)[None], torch.cat((tiny.pictures(1), tiny.pictures(4)[3:]))
        stock = model(input_ids=ids, **tiny.shown(model, images[:1])).logits
        with dymu.apply(model, merge=NOTHING_ALIKE):
            tiny.close(model(input_ids=ids, **tiny.shown(model, images[:1])).logits, stock)
        with dymu.apply(model, merge=ThresholdMerge((0.98,) * tiny.LAYERS)) as handle:
            together = model(input_ids=ids.expand(2, -1), **tiny.shown(model, images)).logits
            assert handle.last.kept[0] > handle.last.kept[1] + 10
            for i in range(2):
                alone = model(input_ids=ids, **tiny.shown(model, images[i : i + 1])).logits[0]
                tiny.close(together[i], alone, part=1e-4)


@pytest.mark.parametrize("unmerge", ["exact", "representative"])
def test_merged_logits_equal_an_independent_implementation(model, unmerge):
    """Virtual tokens at every place of the full prompt, each rotated by its own position: of each group the mean, or
    the one nearest to its middle."""
    if unmerge not in unmergings(model):
        pytest.skip("refused")
    ids, image = tiny.prompt(model, 4, "image", 7), tiny.pictures(4)[2:3]
    inputs = tiny.inputs(model, ids, image)
    with dymu.apply(model, merge=SOME, unmerge=unmerge) as handle:
        logits = model(**inputs).logits[0]
        encoded = tiny.features_of(model, **tiny.shown(model, image), return_dict=True)
        group = handle.last.group(0)
        assert handle.last.kept[0] < len(group) // 2
    tiny.close(logits, unmerged_prompt_by_hand(model, inputs, encoded, group, form=unmerge), part=2e-5)


def test_disabled_and_remove_in_any_order(some_model):
    inputs = {
        "input_ids": tiny.prompt(some_model, 4, "image", 7)[None],
        **tiny.shown(some_model, tiny.pictures(4)[2:3]),
    }
    stock, attributes = some_model(**inputs).logits, _attributes(some_model)
    handle = dymu.apply(some_model, merge=SOME)
    merged = some_model(**inputs).logits
    with handle.disabled():
        with handle.disabled():
            assert torch.equal(some_model(**inputs).logits, stock)
        assert torch.equal(some_model(**inputs).logits, stock)
        with pytest.raises(AlreadyApplied):
            dymu.apply(some_model, merge=SOME)
    assert torch.equal(some_model(**inputs).logits, merged)
    with handle.disabled():
        handle.remove()
    assert torch.equal(some_model(**inputs).logits, stock)
    with handle.disabled():
        pass
    assert torch.equal(some_model(**inputs).logits, stock)
    assert _attributes(some_model) == attributes
    with dymu.apply(some_model, merge=SOME):
        handle.remove()
        assert torch.equal(some_model(**inputs).logits, merged)


def test_a_model_is_not_copied_while_applied(some_model):
    """A copy's hooks would still run the original's layers."""
    with dymu.apply(some_model, merge=SOME), pytest.raises(DymuError, match=r"handle\.remove\(\) first"):
        copy.deepcopy(some_model)
    copy.deepcopy(some_model)


def test_image_features_as_a_tuple(some_model):
    with dymu.apply(some_model, merge=SOME):
        images = tiny.pictures(2)
        expected = some_model.get_image_features(**tiny.shown(some_model, images))
        found = some_model.get_image_features(**tiny.shown(some_model, images), return_dict=False)
        assert isinstance(found, tuple)
        assert len(found) == len(expected.to_tuple())


def test_masks_of_other_kinds_are_refused(some_model):
    ids = tiny.prompt(some_model, 4)[None]
    with dymu.apply(some_model, merge=SOME):
        for mask in (torch.ones(1, 1, 4, 4), {"full_attention": None}):
            with pytest.raises(ValueError, match=r"attention_mask \[B, N\]"):
                some_model(input_ids=ids, attention_mask=mask)


def test_an_error_while_applying_leaves_nothing(monkeypatch):
    model = tiny.llava()
    before = _attributes(model)
    monkeypatch.setattr(GenerationHooks, "names", {"no_such_method": lambda method: method})
    for _ in range(2):
        with pytest.raises(AttributeError, match="no_such_method"):
            dymu.apply(model, merge=SOME)
        assert _attributes(model) == before
    monkeypatch.undo()
    dymu.apply(model, merge=SOME).remove()


def test_image_features_that_no_layer_made_are_refused():
    model = tiny.llava()
    model.config.vision_feature_layer = 0
    with pytest.raises(UnsupportedModel, match="ahead of the first encoder layer"):
        dymu.apply(model, merge=SOME)


def test_rules_that_are_none_are_refused():
    with pytest.raises(TypeError, match="FixedMerge"):
        dymu.apply(tiny.llava(), merge=0.9)
    for keep in (0, -3):
        with pytest.raises(BadBudget, match="at least 1"):
            dymu.FixedMerge(keep)
    model = tiny.llava()
    with dymu.apply(model, merge=dymu.FixedMerge(60)), pytest.raises(BadBudget, match="has 49"):
        model.get_image_features(tiny.pictures(1))
