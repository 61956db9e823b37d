"""Pruning within the language model equals masking: of the stock model, layer by layer, under masks."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import dymu
import tiny
from dymu.errors import BadBudget, BadFocus, BadPrompt, UnsupportedCache, UnsupportedModel
from dymu.hooks.pruned import PrunedLayers
from dymu.prompting import video_inputs_for
from dymu.pruning import DART, FastV, Joined, LayerSkip, Pruning, PyramidDrop, Reroute, SkipFFN, SparseVLM
from dymu.pruning.pruning import Ahead
from dymu.pruning.sparse_vlm import HEADS, raters_of

LAYERS = 6
NEW = 4


def deeper(name: str) -> Any:
    """A tiny model whose language model has `LAYERS` layers."""
    config = tiny.configured(name)
    text = config.text_config.to_dict()
    text["num_hidden_layers"] = LAYERS
    if text.get("layer_types"):
        text["layer_types"] = (text["layer_types"] * LAYERS)[:LAYERS]
    return tiny.build(name, text=text).eval()


NAMES = ["llava", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "gemma3", "internvl"]


@pytest.fixture(scope="module", params=NAMES)
def built(request: pytest.FixtureRequest) -> Any:
    return deeper(request.param)


@pytest.fixture
def model(built: Any) -> Any:
    return copy.deepcopy(built)


Runs = list[Tensor]
"""Of each layer bool [B, N], the tokens that it runs."""


def masked(model: Any, inputs: dict[str, Any], runs: Runs) -> Any:
    """The stock model's outputs, with attentions, where each layer sees some tokens and changes no others."""
    model.set_attn_implementation("eager")
    hooks = []
    for index, layer in enumerate(model.model.language_model.layers):

        def hide(module: Any, args: Any, kwargs: Any, index: int = index) -> Any:
            mask = kwargs["attention_mask"]
            shown = runs[index]
            if mask.shape[-1] > shown.shape[1]:  # tokens that follow
                shown = torch.nn.functional.pad(shown, (0, mask.shape[-1] - shown.shape[1]), value=True)
            return args, kwargs | {"attention_mask": mask.masked_fill(~shown[:, None, None], -1e30)}

        def keep(module: Any, args: Any, kwargs: Any, out: Any, index: int = index) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            if before.shape[1] != runs[index].shape[1]:
                return out
            new = out[0] if isinstance(out, tuple) else out
            new = torch.where(runs[index][..., None], new, before)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        hooks.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
        hooks.append(layer.register_forward_hook(keep, with_kwargs=True))
    try:
        return model(**inputs, output_attentions=True)
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation("sdpa")


def generated(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Greedy ids [B, NEW], the logits [B, NEW, V] that they come from, and the cache."""
    out = model.generate(
        **inputs, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, suppress_tokens=tiny.specials(model),
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences[:, -NEW:], torch.stack(out.logits, 1), out.past_key_values


def followed(inputs: dict[str, Any], said: Tensor) -> dict[str, Any]:
    """The inputs with words behind the prompts."""
    more = {"input_ids": torch.cat((inputs["input_ids"], said), 1)}
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            rest = torch.full_like(said, int(name == "attention_mask"))
            more[name] = torch.cat((inputs[name], rest), 1)
    return {**inputs, **more}


def images_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    return inputs["input_ids"] == model.config.image_token_id


def chosen_by(model: Any, inputs: dict[str, Any], pruning: Pruning) -> Runs:
    """What a pruning lets run, found with the stock model and naive loops."""
    shown, there = images_of(model, inputs), inputs["attention_mask"].bool()
    runs = [there.clone() for _ in range(LAYERS)]
    for start in pruning.starts(LAYERS):
        out = masked(model, inputs, runs)
        wanted = runs[start].clone()
        for row in range(len(shown)):
            of_image = shown[row].nonzero()[:, 0]
            competes = there[row] if pruning.comes_back else runs[start - 1][row]
            keep = naive(model, pruning, start, row, of_image, competes[of_image], inputs, out, runs)
            if keep is not None:
                wanted[row, of_image] = False
                wanted[row, of_image[keep]] = True
            else:
                wanted[row] = there[row]
        for layer in range(start, LAYERS):
            runs[layer] = wanted.clone()
    return runs


def naive(
    model: Any, pruning: Pruning, start: int, row: int, of_image: Tensor, competes: Tensor, inputs: Any, out: Any,
    runs: Runs,
) -> list[int] | None:  # fmt: skip
    last = int(inputs["attention_mask"][row].nonzero()[-1])
    count = len(of_image)
    if isinstance(pruning, FastV):
        score = out.attentions[start - 1][row, :, last, of_image].mean(0)
        return best(score, competes, round(pruning.keep * count))
    assert isinstance(pruning, PyramidDrop)
    if pruning.comes_back:  # the layer as it would run on all
        everything = [run if layer != start else inputs["attention_mask"].bool() for layer, run in enumerate(runs)]
        out = masked(model, inputs, everything)
    score = out.attentions[start][row, :, last, of_image].mean(0)
    rate = pruning.rates[pruning.starts(LAYERS).index(start)]
    return best(score, competes, round(rate * count))


def best(score: Tensor, competes: Tensor, keep: int) -> list[int]:
    order = sorted((i for i in range(len(score)) if competes[i]), key=lambda i: (-float(score[i]), i))
    return sorted(order[: max(keep, 1)])


def two_prompts(model: Any) -> dict[str, Any]:
    ids = [tiny.prompt(model, 3, "image", n, seed=n) for n in (5, 9)]
    return tiny.inputs(model, ids, tiny.pictures(2))


EQUAL_TO_MASKING = [
    FastV(0.5, 2),
    FastV(0.25, 3),
    PyramidDrop(),
    PyramidDrop((0.6, 0.3), (1, 4)),
    Reroute((0.3, 0.5, 0.2), (2, 3, 5)),
]


@pytest.mark.parametrize(
    "pruning", EQUAL_TO_MASKING, ids=lambda pruning: f"{type(pruning).__name__}{pruning.starts(6)}"
)
@pytest.mark.parametrize("unmerge", ["exact", "original"])
def test_equals_masking(model: Any, pruning: Pruning, unmerge: Any) -> None:
    inputs = two_prompts(model)
    if unmerge == "original" and getattr(model.config.get_text_config(), "sliding_window", None):
        pytest.skip("there windows count the tokens that are left")
    with torch.no_grad():
        runs = chosen_by(model, inputs, pruning)
        expected = masked(model, inputs, runs).logits
        with dymu.apply(model, prune=pruning, unmerge=unmerge) as handle:
            logits = model(**inputs).logits
            counts = [[int((run & images_of(model, inputs))[row].sum()) for run in runs] for row in range(2)]
            assert handle.last.ran == counts
    texts = inputs["attention_mask"].bool() & ~images_of(model, inputs)
    tiny.close(logits[texts], expected[texts])


@pytest.mark.parametrize("pruning", [FastV(0.5, 2), PyramidDrop(), Reroute((0.3, 0.5, 0.2), (2, 3, 5))], ids=repr)
@torch.no_grad()
def test_what_is_said_equals_masking_and_layers_cache_what_they_ran(model: Any, pruning: Pruning) -> None:
    inputs = two_prompts(model)
    runs = chosen_by(model, inputs, pruning)
    with dymu.apply(model, prune=pruning) as handle:
        said, logits, cache = generated(model, inputs)
        bytes_now = handle.last.cache_bytes
    runs = [torch.cat((run, torch.ones_like(said, dtype=torch.bool)), 1) for run in runs]
    expected = masked(model, followed(inputs, said), runs).logits[:, -NEW - 1 : -1]
    tiny.close(logits, expected)
    stored = [layer.keys.shape[2] for layer in cache.layers]
    assert stored == [int(run[:, :-1].sum(1).max()) for run in runs]  # of the last token nothing is stored
    assert bytes_now == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + NEW - 1


ALL_RUN = [
    FastV(1.0, 1), PyramidDrop((1.0, 1.0)), Reroute((1.0,)), SparseVLM((1.0, 1.0), (0, 3)), DART(1.0, 2),
    LayerSkip(1.0, "all"), LayerSkip(1.0, "alternate", "random"), SkipFFN(1.0, 1), SkipFFN(1.0, 2, until=4),
]  # fmt: skip
SOME_RUN = [
    FastV(0.4, 1), PyramidDrop((0.7, 0.3)), Reroute((0.3, 0.6)), SparseVLM((0.6, 0.3), (0, 3)), DART(0.3, 2),
    SparseVLM((0.6, 0.4), (0, 3), recycle=True),
    LayerSkip(0.3, "all", "last-row"), LayerSkip(0.3, "alternate", "random"), LayerSkip(0.2, score="size"),
    FastV(0.4, 1, fill="nearest"), PyramidDrop((0.7, 0.3), fill="nearest"), DART(0.3, 2, fill="nearest"),
    SparseVLM((0.6, 0.4), (0, 3), recycle=True, fill="nearest"),
]  # fmt: skip


@pytest.mark.parametrize("pruning", ALL_RUN, ids=repr)
@torch.no_grad()
def test_where_all_run_nothing_changes(model: Any, pruning: Pruning) -> None:
    inputs = two_prompts(model)
    stock = generated(model, inputs)[1]
    with dymu.apply(model, prune=pruning):
        tiny.close(generated(model, inputs)[1], stock)
    assert torch.equal(generated(model, inputs)[1], stock)


HOW = [{}, {"unmerge": "none"}, {"unmerge": "compact"}, {"unmerge": "representative"}, {"cache": "fast"}]


@pytest.mark.parametrize(("pruning", "how"), zip(SOME_RUN, HOW * 3, strict=False), ids=str)
@torch.no_grad()
def test_a_prompt_gets_what_it_gets_alone(model: Any, pruning: Pruning, how: dict[str, Any]) -> None:
    ids = [tiny.prompt(model, 3, "image", n, seed=n) for n in (5, 9, 2)]
    pictures = tiny.pictures(3)
    with dymu.apply(model, merge=dymu.FixedMerge(0.6), prune=pruning, **how) as handle:
        _, logits, _ = generated(model, tiny.inputs(model, ids, pictures))
        ran = handle.last.ran
        for row, of_prompt in enumerate(ids):
            alone = generated(model, tiny.inputs(model, of_prompt, pictures[row : row + 1]))[1]
            assert handle.last.ran == [ran[row]]
            tiny.close(logits[row], alone[0], 1e-4)


@pytest.mark.parametrize("pruning", SOME_RUN, ids=repr)
@torch.no_grad()
def test_a_second_picture_in_a_later_turn_equals_the_same_in_masks(pruning: Pruning) -> None:
    """What a turn drops stays dropped; a later turn drops of its own pictures."""
    model = deeper("llava")
    first = tiny.inputs(model, tiny.prompt(model, 3, "image", 4, seed=1), tiny.pictures(1))
    with dymu.apply(model, prune=pruning) as handle:
        said, _, cache = generated(model, first)
        if isinstance(pruning, SparseVLM):
            with pytest.raises(BadPrompt, match="of tokens in a KV cache"):
                second_turn(model, first, said, cache)
            return
        ids, logits, cache = second_turn(model, first, said, cache)
        assert torch.isfinite(logits).all()
        ran = handle.last.ran[0]
        assert cache.get_seq_length() == ids.shape[1] + NEW - 1
        stored = [layer.keys.shape[2] for layer in cache.layers]
        words = int((ids != model.config.image_token_id).sum()) + NEW - 1
        of_first = [stored_here - words - now for stored_here, now in zip(stored, ran, strict=True)]
        assert of_first == first_ran(model, first, pruning)


def second_turn(model: Any, first: dict[str, Any], said: Tensor, cache: Any) -> tuple[Tensor, Tensor, Any]:
    """The ids of a conversation of two turns, and the logits and cache of the second."""
    more = tiny.prompt(model, 2, "image", 3, seed=2)[None]
    ids = torch.cat((first["input_ids"], said, more), 1)
    inputs = {**first, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = tiny.inputs(model, more[0], tiny.pictures(1, 5))["pixel_values"]
    return ids, *generated(model, inputs, past_key_values=cache)[1:]


def first_ran(model: Any, inputs: dict[str, Any], pruning: Pruning) -> list[int]:
    handle = dymu.handle_of(model)
    assert handle is not None
    model(**inputs)
    return handle.last.ran[0]


@torch.no_grad()
def test_beams_copies_and_files_of_caches(model: Any) -> None:
    inputs = two_prompts(model)
    with dymu.apply(model, prune=PyramidDrop((0.6, 0.3))):
        beams = model.generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=5, min_new_tokens=5)
        ids = tiny.prompt(model, 3, "image", 9, seed=9)
        alone = tiny.inputs(model, ids, tiny.pictures(2)[1:])
        of_one = model.generate(**alone, num_beams=3, do_sample=False, max_new_tokens=5, min_new_tokens=5)
        assert torch.equal(beams[1, -5:], of_one[0, -5:])
        _, _, cache = generated(model, inputs)
        other = copy.deepcopy(cache)
        buffer = io.BytesIO()
        torch.save(cache, buffer)
        buffer.seek(0)
        third = torch.load(buffer, weights_only=False)
        ids = torch.full((2, 1), 5)
        mask = torch.cat((inputs["attention_mask"], torch.ones(2, NEW, dtype=torch.long)), 1)
        going = tiny.going_on(model, ids, mask)
        logits = [model(**going, past_key_values=of).logits for of in (cache, other, third)]
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[0], logits[2])


@torch.no_grad()
def test_positions_of_a_pyramid_are_numbered_anew_with_none() -> None:
    """As in the authors' program: a shorter prompt at each stage, and a token said is moved up by what was dropped."""
    model = deeper("llava")
    inputs = tiny.inputs(model, tiny.prompt(model, 3, "image", 4, seed=1), tiny.pictures(1))
    seen = dict[int, list[Tensor]]()
    for index, layer in enumerate(model.model.language_model.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: (
                seen.setdefault(index, []).append(kwargs["position_embeddings"][0]) or None
            ),
            with_kwargs=True,
        )
    tokens, shown = inputs["input_ids"].shape[1], int(images_of(model, inputs).sum())
    lengths = [tokens] * 3 + [tokens - shown + round(0.5 * shown)] * 3
    rotary = model.model.language_model.rotary_emb
    with dymu.apply(model, prune=PyramidDrop((0.5,), (3,)), unmerge="none"):
        cache = model(**inputs).past_key_values
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    for index, length in enumerate(lengths):
        expected = rotary(torch.zeros(1, 1, 32), torch.arange(length + 1)[None])[0]
        prompt, said = (angles for angles in seen[index] if angles.shape[1] in (length, 1))
        tiny.close(prompt, expected[:, :length])
        tiny.close(said, expected[:, length:])
    assert [layer.keys.shape[2] for layer in cache.layers] == [length + 1 for length in lengths]


class Chooses(Pruning):
    """Whatever a test says."""

    def parts(self, layers: int) -> tuple[float, ...]:
        return (1.0,)

    def scaled(self, factor: float) -> Chooses:
        return self

    def __init__(self, at: int, choose: Callable[[Ahead], Tensor | Joined | None]) -> None:
        object.__setattr__(self, "at", at)
        object.__setattr__(self, "_choose", choose)
        object.__setattr__(self, "fill", "none")

    def starts(self, layers: int) -> tuple[int, ...]:
        return (self.at,)  # type: ignore[attr-defined]

    def choose(self, ahead: Ahead) -> Tensor | Joined | None:
        return self._choose(ahead)  # type: ignore[attr-defined]


@torch.no_grad()
def test_what_a_rule_reads_is_what_the_stock_model_has(model: Any) -> None:
    """Attention of both layers, keys and hidden states."""
    inputs = two_prompts(model)
    there = inputs["attention_mask"].bool()
    out = masked(model, inputs, [there] * LAYERS)
    stock = model(**inputs, output_hidden_states=True)
    found = []

    def look(ahead: Ahead) -> None:
        rows = torch.tensor([ahead.last, int(ahead.shown[3])])
        alike = ahead.alike(2, rows)
        found.append((ahead, [ahead.attend(layer, rows) for layer in (2, 3)], ahead.keys(2), alike))

    with dymu.apply(model, prune=Chooses(3, look)):
        model(**inputs)
    assert len(found) == 2
    for row, (ahead, attention, keys, alike) in enumerate(found):
        at = there[row].nonzero()[:, 0]
        for layer, weights in zip((2, 3), attention, strict=True):
            expected = out.attentions[layer][row][:, at][:, :, at]
            tiny.close(weights[:, 0], expected[:, ahead.last])
            tiny.close(weights[:, 1], expected[:, int(ahead.shown[3])])
        tiny.close(ahead.hidden, stock.hidden_states[3][row, at])
        tiny.close(ahead.embeds, stock.hidden_states[0][row, at])
        ids = inputs["input_ids"][row, at]
        alone = model(**tiny.inputs(model, ids, tiny.pictures(2)[row : row + 1])).past_key_values.layers[2].keys[0]
        if alone.shape[1] == len(at):  # a layer with a window has forgotten some
            tiny.close(keys.transpose(0, 1), alone)
        tiny.close(alike.sum(1), torch.ones(2))
        assert torch.equal(alike > 0, attention[0].sum(0) > 0)
        assert torch.equal(at[ahead.shown], images_of(model, inputs)[row].nonzero()[:, 0])


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "glm4v", "paligemma+gemma2"])
@pytest.mark.parametrize("how", [
    {}, *({"merge": dymu.FixedMerge(0.5), "unmerge": form} for form in ("exact", "compact", "none", "original")),
], ids=str)  # fmt: skip
@torch.no_grad()
def test_equal_queries_and_keys_are_those_of_a_model_that_makes_no_others(name: str, how: dict[str, Any]) -> None:
    """Behind merging, and behind layers that joined some tokens and let the nearest one stand for others."""
    model = deeper(name)
    for module in model.modules():
        for part in (getattr(module, of, None) for of in ("q_proj", "k_proj")):
            if part is not None and hasattr(module, "layer_idx"):
                part.weight.zero_()
                part.bias = nn.Parameter(torch.ones(len(part.weight)))
        if hasattr(module, "layer_idx"):  # which norms would take the sum over a head from
            for norm in (of for of in ("q_norm", "k_norm") if hasattr(module, of)):
                setattr(module, norm, nn.Identity())
    inputs, looked = two_prompts(model), []

    def choose(ahead: Ahead) -> Joined | None:
        if ahead.layer == 1:
            into = torch.full_like(ahead.shown, -1)
            into[[2, 3, 4]] = 3
            return Joined(torch.tensor([1, 3, 5, 6]), into)
        rows = ahead.texts[1:]
        for layer in (2, 3):
            for weights in ahead.attend(layer, rows):
                tiny.close(ahead.alike(layer, rows), weights)
        looked.append(ahead.attend(3, rows)[0, :, ahead.shown[3]].mean() / ahead.attend(3, rows).mean())
        return None

    class Twice(Chooses):
        def starts(self, layers: int) -> tuple[int, ...]:
            return (1, 3)

    pruning = Twice(1, choose)
    object.__setattr__(pruning, "fill", "nearest")
    with dymu.apply(model, prune=pruning, **how):
        model(**inputs)
    assert len(looked) == 2


@torch.no_grad()
def test_a_mean_in_place_of_some_equals_masking(model: Any) -> None:
    """Three tokens of which the middle one runs on as their mean, the others being masked."""
    if getattr(model.config.get_text_config(), "sliding_window", None):
        pytest.skip("there windows count the tokens that are left")
    inputs, at = two_prompts(model), 2
    shown = images_of(model, inputs)
    runs = [inputs["attention_mask"].bool()] * at + [inputs["attention_mask"].bool().clone() for _ in range(at, LAYERS)]
    places = [row.nonzero()[:, 0] for row in shown]
    for layer in range(at, LAYERS):
        for row, of_image in enumerate(places):
            runs[layer][row, of_image[[0, 3, 5, *range(8, len(of_image))]]] = False

    def choose(ahead: Ahead) -> Joined:
        into = torch.full_like(ahead.shown, -1)
        into[3:6] = 4
        return Joined(torch.tensor([1, 2, 4, 6, 7]), into)

    def mean(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        for row, of_image in enumerate(places):
            hidden[row, of_image[4]] = hidden[row, of_image[3:6]].mean(0)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    hook = model.model.language_model.layers[at].register_forward_pre_hook(mean, with_kwargs=True)
    expected = masked(model, inputs, runs).logits
    hook.remove()
    with dymu.apply(model, prune=Chooses(at, choose), unmerge="original"):
        logits = model(**inputs).logits
    texts = inputs["attention_mask"].bool() & ~shown
    tiny.close(logits[texts], expected[texts])


@torch.no_grad()
def test_what_stands_for_the_dropped_is_most_like_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of joined tokens is their mean."""
    model, seen, filled = deeper("llava"), list[Tensor](), list[Tensor]()
    inputs = tiny.inputs(model, tiny.prompt(model, 3, "image", 4, seed=1), tiny.pictures(1))
    at, fill = images_of(model, inputs)[0].nonzero()[:, 0], PrunedLayers._filled

    def choose(ahead: Ahead) -> Joined:
        seen.append(ahead.hidden[at])
        into = torch.full_like(ahead.shown, -1)
        into[2:5] = 3
        return Joined(torch.tensor([0, 3]), into)

    monkeypatch.setattr(PrunedLayers, "_filled", lambda *given: [filled.append(fill(*given)), filled[-1]][1])
    pruning = Chooses(3, choose)
    object.__setattr__(pruning, "fill", "nearest")
    with dymu.apply(model, prune=pruning):
        model(**inputs)
    runs = torch.stack((seen[-1][0], seen[-1][2:5].mean(0)))
    nearest = torch.nn.functional.cosine_similarity(seen[-1][:, None], runs[None], dim=-1).argmax(1)
    nearest[[0, 2, 3, 4]] = torch.tensor([0, 1, 1, 1])
    assert torch.equal(filled[-1][0, at], at[[0, 3]][nearest])
    assert 0 < int(nearest[5:].sum()) < len(at) - 5


@torch.enable_grad()
def test_gradients_reach_what_is_joined() -> None:
    model, joined = deeper("llava"), list[Tensor]()
    inputs = tiny.inputs(model, tiny.prompt(model, 3, "image", 4, seed=1), tiny.pictures(1))

    def choose(ahead: Ahead) -> Joined:
        into = torch.full_like(ahead.shown, -1)
        into[2:5] = 3
        return Joined(torch.tensor([0, 3]), into)

    layer = model.model.language_model.layers[2]
    before = layer.register_forward_hook(
        lambda module, args, out: joined.append(out[0] if isinstance(out, tuple) else out)
    )
    with dymu.apply(model, prune=Chooses(3, choose)):
        logits = model(**inputs).logits
        joined[-1].retain_grad()  # those before are of layers that were tried when DyMU was applied
        logits[0, -1].square().sum().backward()
    before.remove()
    at = images_of(model, inputs)[0].nonzero()[:, 0]
    gradient = joined[-1].grad
    assert gradient is not None
    reached = gradient[0, at].abs().sum(-1) > 0
    assert reached.nonzero()[:, 0].tolist() == [0, 2, 3, 4]
    tiny.close(gradient[0, at[2]], gradient[0, at[4]])


@pytest.mark.parametrize("pruning", [*SOME_RUN[:9], SkipFFN(0.4, forget=False)], ids=repr)
@torch.no_grad()
def test_what_is_tried_for_an_answer_is_no_part_of_the_prompt(pruning: Pruning) -> None:
    """With a draft model, candidates from the prompt, and no cache, as in plain greedy decoding."""
    model, draft = deeper("llava"), tiny.build("llava").eval()
    words = tiny.prompt(model, 3, "image", 7, seed=4)
    inputs = tiny.inputs(model, torch.cat((words, words[-4:])), tiny.pictures(1))
    hows: list[dict[str, Any]] = [{"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}]
    with dymu.apply(model, prune=pruning) as handle:
        said, logits, _ = generated(model, inputs)
        ran = handle.last.ran
        for how in hows:
            again, others, _ = generated(model, inputs, **how)
            assert torch.equal(again, said), how
            assert handle.last.ran == ran
            tiny.close(others, logits, 1e-4)


@pytest.mark.parametrize("pruning", [FastV(0.4, 1), PyramidDrop((0.7, 0.3)), DART(0.3, 2), SkipFFN(0.4)], ids=repr)
@torch.no_grad()
def test_words_ahead_may_be_in_the_cache(pruning: Pruning) -> None:
    model = deeper("llava").double()
    for seed in range(4):
        inputs = tiny.inputs(model, tiny.prompt(model, 12, "image", 5, seed=seed), tiny.pictures(1, seed).double())
        ids = inputs["input_ids"]
        with dymu.apply(model, prune=pruning) as handle:
            whole, ran = model(**inputs).logits[:, -1], handle.last.ran
            cache = model(input_ids=ids[:, :9], use_cache=True).past_key_values
            rest = {**inputs, "input_ids": ids[:, 9:], "attention_mask": torch.ones_like(ids)}
            logits = model(**rest, past_key_values=cache).logits[:, -1]
            assert handle.last.ran == ran
        tiny.close(logits, whole, 1e-6)


@torch.no_grad()
def test_what_has_gone_for_good_stays_away() -> None:
    """A rule that answers None later on means all that are left."""

    class Twice(Chooses):
        def starts(self, layers: int) -> tuple[int, ...]:
            return (1, 3)

    model = deeper("llava")
    inputs = tiny.inputs(model, tiny.prompt(model, 3, "image", 4, seed=1), tiny.pictures(1))
    with dymu.apply(model, prune=Twice(1, lambda ahead: torch.arange(5) if ahead.layer == 1 else None)) as handle:
        model(**inputs)
        assert handle.last.ran == [[49, 5, 5, 5, 5, 5]]


def test_forms_that_pruning_does_not_have() -> None:
    with pytest.raises(UnsupportedModel, match="leave prune out"):
        dymu.apply(deeper("llava"), prune=FastV(0.4, 1), unmerge="restore")
    with pytest.raises(BadFocus, match="nothing merges"):
        dymu.apply(deeper("llava"), prune=FastV(0.4, 1), focus="text")
    with pytest.raises(ValueError, match="behind layers 0 to 4"):
        SparseVLM((0.5,), (5,)).starts(6)


def test_answers_come_behind_what_forgets() -> None:
    model = deeper("llava")
    inputs = tiny.inputs(model, tiny.prompt(model, 3, "image", 7, seed=4), tiny.pictures(1))
    with dymu.apply(model, prune=SkipFFN(0.4)), pytest.raises(BadPrompt, match="forget=False"):
        generated(model, inputs, use_cache=False)


@torch.no_grad()
def test_padding_changes_no_choice() -> None:
    """Without positions, too, which the stock model then counts from the padding on."""
    model = deeper("llava")
    ids = [tiny.prompt(model, 3, "image", n, seed=n) for n in (2, 15)]
    for pruning in SOME_RUN:
        with dymu.apply(model, prune=pruning):
            logits = model(**tiny.inputs(model, ids, tiny.pictures(2))).logits
            for row, prompt in enumerate(ids):
                alone = model(**tiny.inputs(model, prompt, tiny.pictures(2)[row : row + 1])).logits
                tiny.close(logits[row, -1], alone[0, -1], 1e-4)


WRONG: list[tuple[Any, type[Exception], str]] = [
    (torch.tensor([-1]), ValueError, "must answer int64"), (torch.tensor([9999]), ValueError, "must answer int64"),
    (torch.tensor([1.0]), ValueError, "must answer int64"), ([1, 2], ValueError, "must answer int64"),
    (torch.ones(49, dtype=torch.bool), ValueError, "must answer int64"), (torch.tensor([1, 1]), ValueError, "twice"),
    (torch.tensor([], dtype=torch.long), BadBudget, "leaves no image token"),
    (Joined(torch.tensor([0]), torch.tensor([0])), ValueError, "must answer int64"),
    (Joined(torch.tensor([0]), torch.full((49,), 5)), ValueError, "does not run"),
    (Joined(torch.tensor([0, 1]), torch.arange(49).sub(1).clamp(min=0)), ValueError, "does not run"),
    (Joined(torch.tensor([0, 1]), torch.zeros(49, dtype=torch.long)), ValueError, "lets it run by itself, too"),
    (Joined(torch.tensor([0]), None), ValueError, "must answer int64"),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize(("answer", "error", "sentence"), WRONG, ids=range(len(WRONG)))
@torch.no_grad()
def test_what_a_rule_may_not_answer(answer: Any, error: type[Exception], sentence: str) -> None:
    model = deeper("llava")
    inputs = tiny.inputs(model, tiny.prompt(model, 3, "image", 4, seed=1), tiny.pictures(1))
    with dymu.apply(model, prune=Chooses(2, lambda ahead: answer)), pytest.raises(error, match=sentence):
        model(**inputs)


@torch.no_grad()
def test_what_was_dropped_is_not_joined_later() -> None:
    class Twice(Chooses):
        def starts(self, layers: int) -> tuple[int, ...]:
            return 1, 2

    def choose(ahead: Ahead) -> Tensor | Joined:
        rows, into = torch.tensor([0, 5]), torch.full((49,), -1)
        into[[0, 3]] = 0
        return rows if ahead.layer == 1 else Joined(rows, into)

    model = deeper("llava")
    inputs = tiny.inputs(model, tiny.prompt(model, 3, "image", 4, seed=1), tiny.pictures(1))
    with (
        dymu.apply(model, prune=Twice(1, choose)),
        pytest.raises(ValueError, match="joins tokens that it had dropped before"),
    ):
        model(**inputs)


@pytest.mark.parametrize("rows", [torch.tensor(rows) for rows in ([-1], [9999], [1.0], [[3]], [4])])
@torch.no_grad()
def test_attention_of_what_did_not_run_is_refused(rows: Tensor) -> None:
    """The last are of an image token that the stage before dropped."""

    class Twice(Chooses):
        def starts(self, layers: int) -> tuple[int, ...]:
            return 1, 3

    def choose(ahead: Ahead) -> Tensor:
        if ahead.layer == 3:
            assert int(ahead.shown[1]) == 4
            ahead.attend(2, rows)
        return torch.tensor([0])

    model = deeper("llava")
    inputs = tiny.inputs(model, tiny.prompt(model, 3, "image", 4, seed=1), tiny.pictures(1))
    with dymu.apply(model, prune=Twice(1, choose)), pytest.raises(ValueError, match="rows that there are not, or that"):
        model(**inputs)


def test_parts_are_as_many_as_stages() -> None:
    class Uneven(Chooses):
        def parts(self, layers: int) -> tuple[float, ...]:
            return 0.5, 0.2

    with pytest.raises(ValueError, match="Uneven has 1 starts and 2 parts"):
        Uneven(1, lambda ahead: None).mean(4)


@pytest.mark.parametrize("name", ["comes_back", "attends"])
@torch.no_grad()
def test_nothing_is_joined_that_runs_again_or_attends(name: str) -> None:
    model = deeper("llava")
    inputs = tiny.inputs(model, tiny.prompt(model, 3, "image", 4, seed=1), tiny.pictures(1))
    into = torch.full((49,), -1)
    into[[0, 1]] = 0
    kind = type("Joins", (Chooses,), {name: True})
    refused = pytest.raises(ValueError, match=r"Joins\.choose joins tokens that run again or attend: answer rows alone")
    with dymu.apply(model, prune=kind(2, lambda ahead: Joined(torch.tensor([0, 5]), into))), refused:
        model(**inputs)
    with dymu.apply(model, prune=Chooses(2, lambda ahead: Joined(torch.tensor([0, 5]), into))) as handle:
        model(**inputs)
        assert handle.last.ran == [[49, 49, 2, 2, 2, 2]]
    with dymu.apply(model, prune=kind(2, lambda ahead: torch.tensor([0, 5]))) as handle:
        model(**inputs)
        assert handle.last.ran == [[49, 49, 2, 2, 2, 2]]


@pytest.mark.parametrize("at", [0, 6, 99, -1, 2.5, "2"])
def test_stages_that_there_are_not(at: Any) -> None:
    with pytest.raises(ValueError, match="image tokens can be dropped ahead of layers 1 to 5"):
        dymu.apply(deeper("llava"), prune=Chooses(at, lambda ahead: None))


@pytest.mark.parametrize("merge", [None, dymu.FixedMerge(0.6)])
@torch.no_grad()
def test_a_rule_knows_which_picture_a_token_is_of(merge: Any) -> None:
    """Of images of one prompt, and of frames of a video behind an image."""
    model, found = deeper("llava"), list[list[int]]()

    def look(ahead: Ahead) -> None:
        found.append(ahead.picture.unique(return_counts=True)[1].tolist())

    with dymu.apply(model, merge=merge, prune=Chooses(2, look)) as handle:
        rows = [tiny.prompt(model, 3, "image", 2, "image", n, seed=n) for n in (4, 6)]
        model(**tiny.inputs(model, rows, tiny.pictures(4)))
        kept = handle.last.kept
        assert found == [kept[:2], kept[2:]]
    model, processor = deeper("llava_onevision"), tiny.full_processor("llava_onevision")
    frames = [photo.resize((60, 60)) for photo in tiny.photos(4)]
    found.clear()
    with dymu.apply(model, merge=merge, prune=Chooses(2, look)) as handle:
        model(**video_inputs_for(model, processor, frames, "what ?"))
        (item,) = handle.last.items
        assert len(found[0]) == item.pictures == 4
        assert sum(found[0]) == item.kept


def toy(**more: Any) -> Ahead:
    """Six image tokens of peers in the field's toy example, one word ahead and two behind."""
    degrees = torch.tensor([0.0, 8, 20, 90, 103, 180]).deg2rad()
    x = torch.stack((degrees.cos(), degrees.sin()), 1)
    words = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    hidden = torch.cat((words[:1], x, words[1:]))
    weights = torch.tensor([0.05, 0.10, 0.30, 0.20, 0.25, 0.12])

    def attend(layer: int, rows: Tensor) -> Tensor:
        full = torch.zeros(2, len(rows), 9)
        full[..., 1:7] = weights
        return full

    return Ahead(
        **{
            "layer": 2, "layers": 8, "hidden": hidden, "embeds": hidden, "shown": torch.arange(1, 7),
            "picture": torch.zeros(6, dtype=torch.long), "running": torch.ones(6, dtype=torch.bool),
            "size": torch.tensor([1.0, 4, 1, 2, 1, 3]), "last": 8,
            "attend": attend, "alike": lambda layer, rows: torch.full((len(rows), 9), 1 / 9),
            "keys": lambda layer: hidden[:, None] * torch.arange(1.0, 10)[:, None, None], "norm": lambda x: x, **more,
        }
    )  # fmt: skip


def test_toy_of_each_method() -> None:
    assert FastV(0.5).choose(toy()).tolist() == [2, 3, 4]
    assert PyramidDrop((0.5,), (2,)).choose(toy()).tolist() == [2, 3, 4]
    assert SparseVLM((0.5,), (1,)).choose(toy()).tolist() == [2, 3, 4]
    assert LayerSkip(0.5, score="size").choose(toy()).tolist() == [1, 3, 5]
    assert LayerSkip(0.5).choose(toy()).tolist() == [0, 2, 4]
    assert LayerSkip(0.5, "alternate").choose(toy()) is None
    two = toy(picture=torch.tensor([0, 0, 0, 0, 1, 1]))
    assert LayerSkip(0.5).choose(two).tolist() == [0, 2, 4], "half of each picture"
    assert LayerSkip(0.5, score="size").choose(two).tolist() == [1, 3, 5]
    assert LayerSkip(0.5, score="last-row").choose(two).tolist() == [2, 3, 4]
    many = torch.randn(20, 2)
    ten = toy(
        hidden=many, embeds=many, shown=torch.arange(3, 13), picture=torch.zeros(10), running=torch.ones(10).bool(),
        size=torch.arange(10.0),
    )  # fmt: skip
    assert LayerSkip(0.2).choose(ten).tolist() == [0, 5]
    assert LayerSkip(0.2, score="size").choose(ten).tolist() == [8, 9]
    # keys grow with the place: pivots are 4 and 5; the first keeps 0, which is least like it, the second 1
    assert DART(4 / 6, pivots=2).choose(toy()).tolist() == [0, 1, 4, 5]


def test_recycling_keeps_what_the_authors_keep() -> None:
    """Of 576 tokens they keep 300, 200 and 110, and add 9, 4 and 3 means, which makes their 192 a mean of 206.5."""
    many = torch.randn(640, 8, generator=torch.Generator().manual_seed(0))
    counts, centres, running = (309, 204, 113), (9, 4, 3), torch.ones(576, dtype=torch.bool)
    rule = SparseVLM(tuple(count / 576 for count in counts), (2, 6, 15), recycle=True)
    assert round(576 * rule.mean(32), 1) == 206.5
    for layer, count, means in zip(rule.starts(32), counts, centres, strict=True):
        ahead = toy(
            layer=layer, layers=32, hidden=many, embeds=many, shown=torch.arange(4, 580), running=running, last=639,
            size=torch.ones(576), alike=lambda layer, rows: torch.ones(len(rows), 640),
            attend=lambda layer, rows: many[None, :, 0].expand(2, len(rows), -1).exp(),
        )  # fmt: skip
        joined = rule.choose(ahead)
        assert isinstance(joined, Joined)
        assert (len(joined.rows), len(joined.into[joined.into >= 0].unique())) == (count, means)
        assert int((joined.into >= 0).sum()) == int(0.3 * (int(running.sum()) - count + means)) + 1
        score, x = many[4:580, 0].masked_fill(~running, -torch.inf), many[4:580]
        kept = [row for row in joined.rows.tolist() if joined.into[row] < 0]
        others = (joined.into >= 0).nonzero()[:, 0]
        assert score[kept].min() >= score[others].max()
        assert (
            score[others].min() >= score[running & ~torch.isin(torch.arange(576), torch.tensor([*kept, *others]))].max()
        )
        for other in others:  # each to the nearest centre
            near = torch.cdist(x[other][None], x[joined.into[others].unique()])[0]
            assert joined.into[other] == joined.into[others].unique()[near.argmin()]
        running = torch.zeros_like(running).index_fill(0, joined.rows, True)


def test_counts_of_the_papers() -> None:
    """Of 576 tokens and 32 layers."""

    def mean(pruning: Pruning) -> float:
        return round(576 * pruning.mean(32), 1)

    assert (mean(FastV()), mean(FastV(0.25, 3))) == (306, 184.5)
    assert mean(PyramidDrop()) == 270
    named = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
    found = {name: mean(SparseVLM(tuple(count / 576 for count in counts))) for name, counts in named.items()}
    assert found == {192: 206.8, 128: 144.1, 96: 113.9, 64: 81.8}
    assert round(mean(DART(124 / 576))) == 152
    assert LayerSkip(0.2).starts(4) == (2, 3)
    assert SparseVLM().starts(32) == (3, 7, 16)
    assert SparseVLM().starts(4) == (1, 2, 3)
    assert VSCAN.starts(32) == (16,)


VSCAN = PyramidDrop((1 / 3,))


@pytest.mark.parametrize("pruning", [FastV(), DART(), PyramidDrop(), Reroute(), SparseVLM(), LayerSkip(pattern="all")])
@pytest.mark.parametrize("part", [0.15, 0.3, 0.5, 0.8, 1.0])
def test_fractions_are_solved_for_a_mean_over_layers(pruning: Pruning, part: float) -> None:
    if part > pruning.starts(30)[0] / 30:
        assert abs(pruning.for_mean(part, 30).mean(30) - part) < 1e-9
    with pytest.raises(BadBudget, match="drop in more layers"):
        pruning.for_mean(0.01, 30)


@pytest.mark.parametrize(
    ("pruning", "least"),
    [(LayerSkip(pattern="alternate"), 15 / 30), (LayerSkip(pattern="alternate-after-second"), 16 / 30),
     (SkipFFN(until=20), 11 / 30)],
)  # fmt: skip
def test_layers_that_drop_nothing_bound_the_mean(pruning: Pruning, least: float) -> None:
    assert abs(pruning.for_mean(least + 0.01, 30).mean(30) - least - 0.01) < 1e-9
    with pytest.raises(BadBudget, match=f"more than {least:.0%} of the image tokens run"):
        pruning.for_mean(least - 0.01, 30)


def test_fractions_of_other_libraries_become_pythons() -> None:
    assert type(FastV(np.float16(0.5)).keep) is type(LayerSkip(np.float32(0.5)).keep) is float
    assert type(LayerSkip(seed=np.int64(5)).seed) is int
    assert len(LayerSkip(1e-300).choose(toy(picture=torch.zeros(4).long(), shown=torch.arange(4)))) == 1  # type: ignore[arg-type]


def test_dart_keeps_as_many_as_asked() -> None:
    many = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    ahead = toy(
        hidden=many, embeds=many, shown=torch.arange(4, 580), running=torch.ones(576, dtype=torch.bool),
        size=torch.ones(576), last=599, keys=lambda layer: many[:, None],
    )  # fmt: skip
    assert len(DART(0.222).choose(ahead)) == round(0.222 * 576)
    assert len(set(DART(0.222).choose(ahead).tolist())) == round(0.222 * 576)
    assert len(DART().choose(ahead)) == 4 + 8 * 15


def test_raters_speak_of_the_picture() -> None:
    image = torch.tensor([[1.0, 0.0]])
    assert raters_of(image, torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]])).tolist() == [0]
    assert raters_of(image, torch.ones(3, 2)).tolist() == [0, 1, 2]
    assert round(HEADS * 32) == 14


BAD = [
    (lambda: FastV(0), BadBudget), (lambda: FastV(1.5), BadBudget), (lambda: FastV("a"), BadBudget),
    (lambda: FastV(float("nan")), BadBudget), (lambda: PyramidDrop((0.3, 0.5)), ValueError),
    (lambda: PyramidDrop((0.5,), (1, 2)), ValueError), (lambda: PyramidDrop(()), ValueError),
    (lambda: SparseVLM((0.5,)), ValueError), (lambda: DART(pivots=0), ValueError),
    (lambda: FastV(fill="neerest"), ValueError), (lambda: FastV(fill="runs"), ValueError),
    (lambda: FastV(layer=2.5), ValueError), (lambda: LayerSkip(seed="1"), ValueError),
    (lambda: SparseVLM(recycle="no"), ValueError), (lambda: SkipFFN(forget=0), ValueError),
    (lambda: SkipFFN(fill="nearest"), ValueError), (lambda: PyramidDrop(None), BadBudget),
    (lambda: PyramidDrop((0.5,), (2.5,)), ValueError), (lambda: PyramidDrop((0.5,), None), ValueError),
    (lambda: FastV(10**400), BadBudget), (lambda: DART(pivots=True), ValueError),
    (lambda: LayerSkip(seed=-1), ValueError), (lambda: LayerSkip(seed=2**64), ValueError),
    (lambda: LayerSkip(score="best"), ValueError), (lambda: LayerSkip(pattern="some"), ValueError),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error"), BAD)
def test_wrong_numbers_are_refused(make: Callable[[], Pruning], error: type[Exception]) -> None:
    with pytest.raises(error):
        make()


def test_what_cannot_be_pruned_is_refused_before_anything_runs() -> None:
    model = deeper("llava")
    for pruning in (FastV(layer=6), FastV(layer=0), PyramidDrop((0.5, 0.4), (4, 2))):
        with pytest.raises(ValueError, match="layer"):
            dymu.apply(model, prune=pruning)
    with pytest.raises(TypeError, match="Pruning"):
        dymu.apply(model, prune="fast-v")
    assert dymu.handle_of(model) is None
    inputs = tiny.inputs(model, tiny.prompt(model, 3, "image", 4), tiny.pictures(1))
    with dymu.apply(model, prune=FastV(0.5, 2)):
        cache = model(**inputs).past_key_values
    with dymu.apply(model, prune=FastV(0.5, 3)), pytest.raises(UnsupportedCache, match="other layers"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    with dymu.apply(model, merge=dymu.FixedMerge(0.5)), pytest.raises(UnsupportedCache, match="other layers"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    with dymu.apply(model, prune=Chooses(2, lambda ahead: torch.arange(3))):
        model(**inputs)
    model.gradient_checkpointing_enable()
    model.train()
    wrong = pytest.raises(UnsupportedModel, match="checkpointing")
    with torch.enable_grad(), dymu.apply(model, prune=FastV(0.5, 2)), wrong:
        model.model.language_model(inputs_embeds=torch.randn(1, 4, 32))


@torch.no_grad()
def test_a_rule_that_brings_dropped_tokens_back_is_an_error() -> None:
    model = deeper("llava")
    inputs = tiny.inputs(model, tiny.prompt(model, 3, "image", 4), tiny.pictures(1))

    class Back(Chooses):
        def starts(self, layers: int) -> tuple[int, ...]:
            return (1, 2)

    back = Back(1, lambda ahead: torch.arange(3) + ahead.layer)

    with dymu.apply(model, prune=back), pytest.raises(ValueError, match="dropped before"):
        model(**inputs)


def test_gradients_pass_and_text_alone_is_untouched() -> None:
    model = deeper("llava")
    inputs = tiny.inputs(model, tiny.prompt(model, 3, "image", 4), tiny.pictures(1))
    words = {"input_ids": tiny.prompt(model, 9)[None]}
    stock = model(**words).logits
    with dymu.apply(model, prune=PyramidDrop((0.5, 0.2))) as handle:
        tiny.close(model(**words).logits, stock)
        model(**inputs)
        assert handle.last.ran[0][-1] < handle.last.ran[0][0]
    with torch.enable_grad(), dymu.apply(model, prune=PyramidDrop((0.5, 0.2))):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradient = model.model.multi_modal_projector.linear_1.weight.grad
    assert gradient is not None
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.abs().max()) > 0


@torch.no_grad()
def test_unmerging_from_a_layer_on(model: Any) -> None:
    """From the first one it is unmerging throughout, from none it is compact, and in between layers ahead are as in
    compact."""
    inputs = two_prompts(model)

    def seen(**how: Any) -> tuple[Tensor, tuple[Tensor, ...], list[int]]:
        with dymu.apply(model, merge=dymu.FixedMerge(0.4), **how):
            _, logits, cache = generated(model, inputs)
            hidden = model(**inputs, output_hidden_states=True).hidden_states
        return logits, hidden, [layer.keys.shape[2] for layer in cache.layers]

    exact, compact, half = seen(), seen(unmerge="compact"), seen(unmerge_from=3)
    assert exact[2] == compact[2] == half[2]
    tiny.close(seen(unmerge_from=LAYERS)[0], compact[0])
    tiny.close(seen(unmerge_from=0, prune=FastV(1.0, 3))[0], exact[0])  # layer by layer
    words = inputs["attention_mask"].bool() & ~images_of(model, inputs)
    for layer in range(4):
        tiny.close(half[1][layer][words], compact[1][layer][words])
    assert float((half[0] - compact[0]).abs().max()) > 1e-3
    assert float((half[0] - exact[0]).abs().max()) > 1e-3
    alone = seen(unmerge="representative", unmerge_from=3, prune=FastV(0.5, 4))[0]
    assert torch.isfinite(alone).all()
    for wrong in ({"unmerge_from": LAYERS + 1}, {"unmerge_from": -1}, {"unmerge_from": 2, "unmerge": "compact"}):
        with pytest.raises(ValueError, match="unmerge_from"):
            dymu.apply(model, merge=dymu.FixedMerge(0.4), **wrong)


@pytest.mark.parametrize("forget", [False, True])
@torch.no_grad()
def test_skipping_mlps_equals_zeros_in_their_place(model: Any, forget: bool) -> None:
    """Everything attends to everything; tokens that are forgotten are masked for what follows the prompt."""
    inputs = two_prompts(model)
    pruning = SkipFFN(0.4, 2, until=5, forget=forget)
    tokens, shown = inputs["input_ids"].shape[1], images_of(model, inputs)
    there = inputs["attention_mask"].bool()
    everything = [there] * LAYERS
    fed = there.clone()
    attentions = masked(model, inputs, everything).attentions
    for row in range(2):
        of_image = shown[row].nonzero()[:, 0]
        last = int(there[row].nonzero()[-1])
        score = attentions[2][row, :, last, of_image].mean(0)
        fed[row, of_image] = False
        fed[row, of_image[best(score, torch.ones(len(of_image), dtype=torch.bool), round(0.4 * len(of_image)))]] = True
    with dymu.apply(model, prune=pruning) as handle:
        said, logits, cache = generated(model, inputs)
        of_image = [(int(row.sum()), int((row & fed_here).sum())) for row, fed_here in zip(shown, fed, strict=True)]
        assert handle.last.ran == [[every, every, some, some, some, every] for every, some in of_image]
    model.set_attn_implementation("eager")
    whole = followed(inputs, said)
    for layer in model.model.language_model.layers[2:5]:
        layer.mlp.register_forward_hook(
            lambda module, args, out: (
                out * torch.nn.functional.pad(fed, (0, out.shape[1] - tokens), value=True)[..., None]
            )
        )
        if forget:

            def hide(module: Any, args: Any, kwargs: Any) -> Any:
                mask = kwargs["attention_mask"].clone()
                mask[:, :, tokens:, :tokens] = mask[:, :, tokens:, :tokens].masked_fill(~fed[:, None, None], -1e30)
                return args, kwargs | {"attention_mask": mask}

            layer.register_forward_pre_hook(hide, with_kwargs=True)
    expected = model(**whole).logits[:, -NEW - 1 : -1]
    tiny.close(logits, expected)
    left = [int((fed if forget and 2 <= layer < 5 else there).sum(1).max()) + NEW - 1 for layer in range(LAYERS)]
    assert [layer.keys.shape[2] for layer in cache.layers] == left


@pytest.mark.parametrize("score", ["uniform", "random", "last-row"])
@torch.no_grad()
def test_a_skipped_token_passes_to_the_bit(model: Any, score: Any) -> None:
    inputs = tiny.inputs(model, tiny.prompt(model, 3, "image", 5, seed=1), tiny.pictures(1))
    at = images_of(model, inputs)[0].nonzero()[:, 0]
    with dymu.apply(model, prune=LayerSkip(0.2, "all", score)) as handle:
        hidden = model(**inputs, output_hidden_states=True).hidden_states
        of_pictures = torch.bincount(handle.last.items[0].picture).tolist()
        keep = sum(math.ceil(round(0.2 * count, 6)) for count in of_pictures)
        assert handle.last.ran == [[len(at)] + [keep] * (LAYERS - 1)]
    same = [(before == after)[0].all(-1) for before, after in itertools.pairwise(hidden[:LAYERS])]
    assert not same[0].any()
    added = getattr(model.config.vision_config, "deepstack_visual_indexes", [])  # to what comes out of the first ones
    for of_layer in same[1 + len(added) :]:  # behind the last one comes a norm
        assert int(of_layer[at].sum()) == len(at) - keep
        assert int(of_layer.sum()) == len(at) - keep, "text runs"


SEVERAL = [
    FastV(0.4, 1, fill="nearest"), PyramidDrop((0.7, 0.3)), Reroute((0.3, 0.6)), SparseVLM((0.6, 0.3), (0, 3)),
    DART(0.3, 2), LayerSkip(0.3, "alternate", "random"), SkipFFN(0.4, 2),
]  # fmt: skip


@pytest.mark.parametrize("pruning", SEVERAL, ids=str)
@torch.no_grad()
def test_what_else_a_language_model_is_asked(pruning: Pruning) -> None:
    """Assisted decoding says the same; a neighbour of NaN changes nothing, nor does a fast cache; half precision runs;
    threads get their own answers."""
    model = deeper("llava")
    ids = [tiny.prompt(model, 3, "image", n, seed=n) for n in (5, 9)]
    pictures = tiny.pictures(2)
    one = tiny.inputs(model, ids[0], pictures[:1])
    merge = dymu.FixedMerge(0.6)
    with dymu.apply(model, merge=merge, prune=pruning) as handle:
        said, logits, _ = generated(model, one)
        ran = handle.last.ran
        looked_up = model.generate(
            **one, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, prompt_lookup_num_tokens=2,
            suppress_tokens=tiny.specials(model),
        )  # fmt: skip
        assert torch.equal(looked_up[:, -NEW:], said)
        pictures[1] = torch.nan
        beside = generated(model, tiny.inputs(model, ids, pictures))[1]
        tiny.close(beside[0], logits[0], 1e-4)
        assert handle.last.ran[0] == ran[0]
        with ThreadPoolExecutor(3) as pool:
            for _, of_thread, _ in pool.map(lambda _: generated(model, one), range(6)):
                tiny.close(of_thread, logits, 1e-4)
    with dymu.apply(model, merge=merge, prune=pruning, cache="fast"):
        tiny.close(generated(model, one)[1], logits, 1e-4)
    model.to(torch.bfloat16)
    with dymu.apply(model, merge=merge, prune=pruning):
        half = generated(model, {**one, "pixel_values": one["pixel_values"].to(torch.bfloat16)})[1]
        assert torch.isfinite(half).all()


def test_a_handle_says_what_it_prunes_by() -> None:
    with dymu.apply(deeper("llava"), prune=FastV(0.5, 2)) as handle:
        assert "FastV" in repr(handle)


@pytest.mark.parametrize("how", [*({"prune": pruning} for pruning in SEVERAL), {"unmerge_from": 3}], ids=str)
@torch.no_grad()
def test_orders_of_calls(how: dict[str, Any]) -> None:
    """Adapters ahead and behind, a compiled model, exchanged parts, and removal give what they should."""
    model = deeper("llava")
    inputs = two_prompts(model)
    how = {"merge": dymu.FixedMerge(0.6), **how}
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)

    def adapted(stock: Any) -> Any:
        torch.manual_seed(0)
        return get_peft_model(stock, adapter)

    ahead = adapted(copy.deepcopy(model))
    plain = ahead(**inputs).logits
    with dymu.apply(ahead, **how):
        expected = ahead(**inputs).logits
    stock = copy.deepcopy(model)
    handle = dymu.apply(stock, **how)
    behind = adapted(stock)
    tiny.close(behind(**inputs).logits, expected)
    handle.remove()
    assert torch.equal(behind(**inputs).logits, plain)

    with dymu.apply(model, **how):
        eager = model(**inputs).logits
        tiny.close(torch.compile(model, backend="eager")(**inputs).logits, eager)
        layer = model.model.language_model.layers[3]
        layer.mlp = nn.Sequential(nn.Linear(32, 32))
        model.model.language_model.layers[4] = deeper_layer(model)
        exchanged = model(**inputs).logits
    assert float((exchanged - eager).abs().max()) > 1e-2
    with dymu.apply(model, **how):
        tiny.close(model(**inputs).logits, exchanged)


def deeper_layer(model: Any) -> nn.Module:
    """Layer 4 of another model of this kind."""
    other: nn.Module = tiny.build("llava", seed=5, text=model.config.text_config.to_dict()).model.language_model.layers[
        4
    ]
    return other.eval()
