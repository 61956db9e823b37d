"""Every published method in models: batched, in images that are cut or of any size, beside pictures of NaN."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

import dymu
import tiny
from dymu.errors import BadBudget, BadPrompt, UnsupportedModel
from dymu.evaluation.rows import encoded_images
from dymu.families.resolve import resolve
from dymu.handle import remembering
from dymu.merging import EncoderLayer
from dymu.prompting import inputs_for, items_by_prompt, video_inputs_for
from dymu.pruning import SparseVLM
from dymu.reducers import (
    SAINT,
    Anchors,
    ApET,
    AveragePool,
    CDPruner,
    DARTEmbeddings,
    DensityPeaks,
    DivPrune,
    FasterVLM,
    FixedMerge,
    HierarchicalPool,
    HoloV,
    LayerMemory,
    MMTok,
    PixelPrune,
    PruMerge,
    RandomKeep,
    Reducer,
    SkipVision,
    Stride,
    TextAwareMerge,
    VidCom2,
    VisionZip,
    VisPruner,
    VScan,
)
from dymu.reducers.prompt import _placed
from dymu.reducers.pru_merge import outliers
from tiny_families import FAMILIES
from tiny_processors import processor_for


def vectors(ids: torch.Tensor) -> torch.Tensor:
    """Of each word of a prompt eight numbers."""
    return (ids[:, None] * torch.arange(1, 9) * 0.37).sin()


KEEP = [FasterVLM, VisPruner, HoloV, DivPrune, CDPruner, MMTok, DARTEmbeddings, SAINT, VidCom2]
"""Of which every image keeps as many tokens, and the others go or have the nearest stand for them."""
MERGE = [Anchors, ApET, HierarchicalPool, SkipVision]
OTHERS: list[Reducer] = [VScan(0.4, 3, 1), DensityPeaks(least=5, neighbours=5), VisionZip(0.2, 0.1), PruMerge()]


def named(rule: object) -> str:
    """Without the addresses of functions, which differ between processes."""
    return re.sub(r"<function (\w+) at 0x\w+>", r"\1", str(rule))


RULES: list[Reducer] = [
    *(kind(0.3) for kind in KEEP),
    *(kind(0.3, fill="nearest") for kind in KEEP),
    DivPrune(0.3, fill="runs"),
    *(kind(0.3) for kind in MERGE),
    *OTHERS,
    PruMerge(plus=True),
    PruMerge(outliers=0.5),
    PixelPrune(0.6),
    DensityPeaks(keep=0.3),
    TextAwareMerge(0.4, layers=(1, 2), text=vectors, project=lambda x: x[..., :8], weight=1.0),
]
MODELS = ["clip", "dinov2", "siglip", "llava_onevision", "internvl", "qwen2_5_vl", "qwen3_vl", "mistral3", "smolvlm"]


def shown(count: int) -> list[Image.Image]:
    """Photos of several sizes: of nothing in them two tokens are equal, so that no tie is broken by rounding."""
    sizes = ((150, 100), (90, 140), (120, 120), (77, 50))
    return [photo.resize(size) for photo, size in zip(tiny.photos(count), sizes, strict=False)]


@pytest.fixture(scope="module", params=MODELS)
def whole(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """LLaVA with three towers, tiles, pixel shuffle, and native resolution with windows and without."""
    if request.param in tiny.TOWERS:
        return tiny.llava(request.param), tiny.full_processor("llava")
    if request.param == "llava_onevision":
        return tiny.llava("siglip", "qwen2", "llava_onevision"), tiny.full_processor("llava_onevision")
    processor = processor_for(request.param)
    if request.param == "smolvlm":
        processor.image_processor.do_image_splitting = True
        processor.image_processor.size = {"longest_edge": 160}
    return tiny.build(request.param), processor


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_an_image_is_reduced_as_it_is_alone(whole, rule):
    model, processor = whole
    prompts = [([photo], question) for photo, question in zip(shown(3), ("what ?", "who is it ?", "why"), strict=True)]
    with dymu.apply(model, merge=rule) as handle:
        asked = inputs_for(model, processor, prompts)
        logits = model(**asked).logits
        together = items_by_prompt(model, asked, handle.last.items)
        for row, prompt in enumerate(prompts):
            one = inputs_for(model, processor, [prompt])
            alone = model(**one).logits[0]
            of_prompt = items_by_prompt(model, one, handle.last.items)[0]
            for mine, theirs in zip(of_prompt, together[row], strict=True):
                assert torch.equal(mine.leaders, theirs.leaders)
            assert torch.isfinite(alone).all()
            tiny.close(logits[row, -len(alone) :], alone, 1e-4)


def test_what_layers_gave_is_remembered_to_the_bit(whole, monkeypatch):
    """Whatever other methods asked before, of these pictures and of others; those that merge in layers ask anew."""
    model, processor = whole
    batches = [inputs_for(model, processor, [([photo], "what ?") for photo in shown(2)[::step]]) for step in (1, -1)]
    rules: list[Reducer] = [*{type(rule): rule for rule in RULES}.values(), FixedMerge(0.5), FixedMerge(0.3)]

    ran = Counter[str]()
    attend = EncoderLayer.attend

    def encoded(rule: Reducer, asked: dict[str, Any], memory: LayerMemory) -> list[torch.Tensor]:
        with dymu.apply(model, merge=rule) as handle, remembering(handle, memory), torch.inference_mode():
            ran.clear()  # of layers that are tried when DyMU is applied
            return [*encoded_images(model, asked).pooler_output, *(item.leaders for item in handle.last.items)]

    def counting(layer: EncoderLayer, *args: Any) -> Any:
        ran["layers"] += 1
        return attend(layer, *args)

    alone = [[encoded(rule, asked, LayerMemory()) for rule in rules] for asked in batches]
    monkeypatch.setattr(EncoderLayer, "attend", counting)
    memory, counts = LayerMemory(), list[int]()
    for asked, fresh in zip(batches, alone, strict=True):
        for rule, expected in zip(rules, fresh, strict=True):
            again = encoded(rule, asked, memory)
            counts.append(ran["layers"])
            assert len(again) == len(expected)
            assert all(map(torch.equal, again, expected)), rule
    depth = max(resolve(model).feature_layers())
    in_layers = [type(rule) in (FixedMerge, TextAwareMerge, PixelPrune) for rule in rules]
    first = [index in (0, len(rules)) for index in range(len(counts))]
    assert counts == [depth if new or here else 0 for new, here in zip(first, in_layers * 2, strict=True)]


@pytest.mark.parametrize("fill", ["none", "nearest"])
@pytest.mark.parametrize("kind", KEEP)
def test_every_image_keeps_as_many(whole, kind, fill):
    model, processor = whole
    prompts = [([photo], "what is it ?") for photo in shown(4)]
    asked = inputs_for(model, processor, prompts)
    with dymu.apply(model, merge=kind(0.3, fill=fill)) as handle:
        model(**asked)
        for items in items_by_prompt(model, asked, handle.last.items):
            for item in items:
                assert item.budgeted == max(round(0.3 * int(item.patch.sum())), 1)
                assert bool((item.leaders[item.patch] < 0).any()) == (fill == "none")


@pytest.mark.parametrize("kind", [FasterVLM, DivPrune, HierarchicalPool])
def test_a_number_is_of_the_whole_image(whole, kind):
    model, processor = whole
    asked = inputs_for(model, processor, [([photo], "what is it ?") for photo in shown(3)])
    with dymu.apply(model, merge=kind(0.3)) as handle:
        model(**asked)
        pictures = [sum(item.pictures for item in items) for items in items_by_prompt(model, asked, handle.last.items)]
    keep = max(pictures) + 2
    with dymu.apply(model, merge=kind(keep)) as handle:
        model(**asked)
        for items in items_by_prompt(model, asked, handle.last.items):
            assert sum(item.budgeted for item in items) == keep


@pytest.mark.parametrize("kind", [FasterVLM, DivPrune])
def test_runs_that_are_dropped_leave_a_token_each(whole, kind):
    model, processor = whole
    asked = inputs_for(model, processor, [([photo], "what is it ?") for photo in shown(2)])
    with dymu.apply(model, merge=kind(0.3)) as handle:
        model(**asked)
        dropped = [(item.leaders < 0) & item.patch for item in handle.last.items]
    with dymu.apply(model, merge=kind(0.3, fill="runs")) as handle:
        model(**asked)
        for item, gone in zip(handle.last.items, dropped, strict=True):
            assert not bool((item.leaders[item.patch] < 0).any())
            alone = ~gone & item.patch
            assert torch.equal(item.leaders[alone], alone.nonzero()[:, 0])
            groups = item.leaders[gone].unique()
            for leader in groups.tolist():
                where = (item.leaders == leader).nonzero()[:, 0]
                between = torch.arange(int(where[0]), int(where[-1]) + 1)
                assert torch.equal(where, between[item.patch[between]]), "learned tokens aside, one after the other"


ALL: list[Reducer] = [
    *(kind(1.0) for kind in (*KEEP, *MERGE)), VScan(1.0, 3, 1), DensityPeaks(keep=1.0), FixedMerge(1.0),
    FasterVLM(1.0, fill="nearest"), DivPrune(1.0, fill="runs"), VisionZip(0.6, 0.4), DensityPeaks(-1.0),
    AveragePool(1.0), RandomKeep(1.0), Stride(1.0),
    TextAwareMerge(1.0, layers=(1, 2), text=vectors, project=lambda x: x[..., :8]),
]  # fmt: skip


@pytest.mark.parametrize("rule", ALL, ids=named)
def test_keeping_all_is_the_untouched_model(whole, rule):
    model, processor = whole
    asked = inputs_for(model, processor, [([photo], "what is it ?") for photo in shown(2)])
    there, word = asked["attention_mask"], torch.full((2, 1), 5)

    def said() -> list[torch.Tensor]:
        """Logits of the prompts, and of a word behind them."""
        out = model(**asked, use_cache=True)
        behind = tiny.going_on(model, word, torch.cat((there, torch.ones_like(word)), 1))
        return [out.logits[there.bool()], model(**behind, past_key_values=out.past_key_values).logits]

    untouched = said()
    with dymu.apply(model, merge=rule) as handle:
        for logits, expected in zip(said(), untouched, strict=True):
            tiny.close(logits, expected, 1e-5)
        assert handle.last.kept == handle.last.original


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_a_picture_of_nan_spoils_no_neighbour(rule):
    model = tiny.llava()
    prompts = [tiny.prompt(model, 3, "image", 4, seed=number) for number in range(3)]
    images = tiny.pictures(3)
    with dymu.apply(model, merge=rule) as handle:
        model(input_ids=torch.stack(prompts), pixel_values=images)
        groups = [handle.last.group(number) for number in range(3)]
        images[1] = torch.nan
        model(input_ids=torch.stack(prompts), pixel_values=images)
        assert torch.equal(handle.last.group(0), groups[0])
        assert torch.equal(handle.last.group(2), groups[2])
        if type(rule) in (*KEEP, *MERGE) and getattr(rule, "fill", "") != "runs":
            assert handle.last.kept[1] == handle.last.kept[0]


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_a_video_is_reduced(rule):
    model, processor = tiny.llava("siglip", "qwen2", "llava_onevision"), tiny.full_processor("llava_onevision")
    frames = [photo.resize((60, 60)) for photo in shown(4)]
    with dymu.apply(model, merge=rule) as handle:
        answer = model(**video_inputs_for(model, processor, frames, "what ?"))
        assert torch.isfinite(answer.logits).all()
        (item,) = handle.last.items
        assert 1 <= item.budgeted < int(item.patch.sum())


@pytest.mark.parametrize("rule", [kind(0.3, fill="nearest") for kind in (FasterVLM, VisPruner, HoloV, SAINT, VidCom2)]
                         + [DARTEmbeddings(0.3, fill="nearest"), VScan(0.3, side=3, early=1)], ids=named)  # fmt: skip
def test_a_frame_is_represented_by_itself(rule):
    """And keeps a token, where as many as there are frames are kept."""
    model, processor = tiny.llava("siglip", "qwen2", "llava_onevision"), tiny.full_processor("llava_onevision")
    frames = [photo.resize((60, 60)) for photo in shown(4)]
    frames[2] = frames[0]  # of which every token has a twin elsewhere
    for one in (rule, replace(rule, keep=4)):
        with dymu.apply(model, merge=one) as handle:
            model(**video_inputs_for(model, processor, frames, "what ?"))
            (item,) = handle.last.items
            own = item.patch & (item.leaders >= 0)
            assert torch.equal(item.picture[item.leaders[own]], item.picture[own])
            assert min(item.fresh) >= 1 or type(one) is VScan


def test_scores_between_patches_are_read_as_features_are_pooled():
    model, processor = tiny.llava("siglip", "qwen2", "llava_onevision"), tiny.full_processor("llava_onevision")
    frames = [photo.resize((60, 60)) for photo in shown(3)]
    with dymu.apply(model, merge=RandomKeep(0.5)) as handle:
        model(**video_inputs_for(model, processor, frames, "what ?"))
        (item,) = handle.last.items
    assert item.mixes
    read = _placed(item, [picture.permute(1, 2, 0) for picture in item.shown])
    tiny.close(read[item.patch], item.seen[item.patch], 1e-5)


@pytest.mark.parametrize("kind", [CDPruner, MMTok, DARTEmbeddings])
def test_another_question_keeps_other_tokens(kind):
    model = tiny.llava()
    images, kept = tiny.pictures(1), []
    with dymu.apply(model, merge=kind(0.3)) as handle:
        for seed in range(6):
            model(input_ids=tiny.prompt(model, 3, "image", 6, seed=seed)[None], pixel_values=images)
            kept.append(tuple(handle.last.group(0).flatten().tolist()))
        assert len(set(kept)) > 1
        with pytest.raises(BadPrompt, match="question"):
            model.get_image_features(images)


@pytest.mark.parametrize("name", ["clip", "qwen2_5_vl", "internvl"])
def test_relevance_of_no_weight_is_plain_merging(name):
    model = tiny.llava(name) if name == "clip" else tiny.build(name)
    processor = tiny.full_processor("llava") if name == "clip" else processor_for(name)
    asked = inputs_for(model, processor, [([photo], "what is it ?") for photo in shown(2)])
    logits = []
    for rule in (
        FixedMerge(0.4, layers=(1, 2)),
        TextAwareMerge(0.4, layers=(1, 2), text=vectors, project=lambda x: x[..., :8], weight=0.0),
        TextAwareMerge(0.4, layers=(1, 2), text=vectors, project=lambda x: x[..., :8], weight=2.0),
    ):
        with dymu.apply(model, merge=rule):
            logits.append(model(**asked).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("inverted", [False, True])
def test_what_a_text_is_about_never_merges(inverted):
    model, features = tiny.llava(), []

    def project(x):
        features.append(x)
        return x

    for seed in range(4):
        text = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))
        rule = TextAwareMerge(25, layers=(1, 2), text=text, project=project, weight=2.5, inverted=inverted)
        with dymu.apply(model, merge=rule) as handle:
            model.get_image_features(tiny.pictures(2, seed=seed))
            (x,) = features
            features.clear()
            for number in range(2):
                cosine = torch.nn.functional.cosine_similarity(x[number, 1:, None], text, dim=-1).mean(-1)
                group = handle.last.group(number).flatten()
                most = cosine.argmin() if inverted else cosine.argmax()
                assert int((group == group[most]).sum()) == 1
                assert handle.last.kept[number] == 25


def test_text_aware_merging_refuses():
    with pytest.raises(ValueError, match="name the `layers`"):
        TextAwareMerge(25, text=torch.ones(1, 8), project=torch.nn.Identity())
    with pytest.raises(ValueError, match="from 0 on for weight"):
        TextAwareMerge(25, layers=(1,), text=torch.ones(1, 8), project=torch.nn.Identity(), weight=-1)
    model, options = tiny.llava(), {"layers": (1,), "project": torch.nn.Identity()}
    for text, error, said in (
        (torch.ones(1, 8), ValueError, r"the text is \[1, 8\], and patches are projected to 32 numbers"),
        (vectors, BadPrompt, "question"),
    ):
        with dymu.apply(model, merge=TextAwareMerge(25, text=text, **options)), pytest.raises(error, match=said):
            model.get_image_features(tiny.pictures(1))


def test_pru_merge_reads_the_keys_of_all_heads_side_by_side():
    """And queries likewise, of the layer behind the features; their means over heads would name other neighbours."""
    model, images = tiny.llava(), tiny.pictures(3)
    hidden = model.model.vision_tower(images, output_hidden_states=True).hidden_states[-2]
    layer = model.model.vision_tower.encoder.layers[-1]
    query, key = (part(layer.layer_norm1(hidden)) for part in (layer.self_attn.q_proj, layer.self_attn.k_proj))
    score = (query[:, :1] @ key.mT / query.shape[-1] ** 0.5).softmax(-1)[:, 0, 1:]
    others = 0
    with dymu.apply(model, merge=PruMerge()) as handle:
        features = model.get_image_features(images).pooler_output
        groups = [handle.last.group(number).flatten() for number in range(3)]
    for number, group in enumerate(groups):
        x, keys, attention = hidden[number, 1:], key[number, 1:], score[number]
        kept = outliers(attention, plus=False)
        assert len(group.unique()) == len(kept)
        heads = keys.unflatten(-1, (layer.self_attn.num_heads, -1))
        cosine, of_means = (
            torch.nn.functional.cosine_similarity(own[kept, None], own, dim=-1) for own in (keys, heads.mean(1))
        )
        assert torch.equal(group[kept[cosine.argmax(0)]], group)
        for row, one in enumerate(kept.tolist()):
            near, other = (
                [i for i in of[row].argsort(descending=True).tolist() if i != one][:32] for of in (cosine, of_means)
            )
            others += set(near) != set(other)
            y = x[one] + attention[near] @ x[near]
            tiny.close(features[number][one], model.model.multi_modal_projector(y), 1e-5)
    assert others


def test_an_encoder_by_itself():
    encoder = tiny.llava().model.vision_tower
    untouched = encoder(tiny.pictures(2)).last_hidden_state
    for rule in (VisionZip(0.2, 0.1), PruMerge()):
        with dymu.apply(encoder, merge=rule) as handle:
            features = encoder(tiny.pictures(2)).last_hidden_state
            assert features.shape == untouched.shape
            assert max(handle.last.kept) < 49
    with pytest.raises(UnsupportedModel, match="in the prompt"), dymu.apply(encoder, merge=DivPrune(0.3)):
        encoder(tiny.pictures(2))


def test_pixels_that_neighbours_predict_never_enter():
    model = tiny.llava()
    images = tiny.pictures(3)
    images[0, :, :, 12:] = images[0, :, :1, :1]
    with dymu.apply(model, merge=PixelPrune()) as handle:
        model.get_image_features(images)
        assert handle.last.kept[0] < handle.last.original[0]
        assert handle.last.kept[1] == handle.last.original[1]


def without_positions(name: str) -> Any:
    """A model whose vision encoder cannot tell patches apart by where they stand: the same pixels are one token."""
    model = tiny.build(name)
    for path, values in [*model.named_parameters(), *model.named_buffers()]:
        if re.search(r"vis.*(inv_freq|pos_embed\w*|position_embedding\w*)(\.weight)?$", path):
            values.data.zero_()
    for module in model.modules():
        if hasattr(module, "fullatt_block_indexes"):  # windows, too, tell
            module.fullatt_block_indexes = list(range(tiny.LAYERS))
    return model


def in_three_colours(model: Any) -> list[torch.Tensor]:
    """Pictures as the model sees them, every unit of one colour."""
    cell, generator, pictures = tiny.family_of(model).cell, torch.Generator().manual_seed(0), []
    for picture in tiny.uneven(model, 3):
        _, height, width = tiny.fitted(model, picture).shape
        colour = torch.randint(3, (-(-height // cell), -(-width // cell)), generator=generator)
        field = torch.randn(3, 3, generator=generator)[:, colour]
        pictures.append(field.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :height, :width].contiguous())
    return pictures


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_that_enter_once_weigh_as_all_of_their_kind(name):
    """In every family, units and windows among them: the features are those of the untouched model."""
    model = without_positions(name)
    seen = tiny.shown(model, in_three_colours(model))
    untouched = tiny.features_of(model, **seen).pooler_output
    with dymu.apply(model, merge=PixelPrune()) as handle:
        features = tiny.features_of(model, **seen).pooler_output
        assert all(kept < all_ for kept, all_ in zip(handle.last.kept, handle.last.original, strict=True))
    for item, expected in zip(features, untouched, strict=True):
        tiny.close(item, expected, 1e-5)
    model = tiny.build(name)  # with its positions
    seen = tiny.shown(model, [torch.randn(picture.shape) for picture in tiny.uneven(model, 3)])
    untouched = tiny.features_of(model, **seen).pooler_output
    with dymu.apply(model, merge=PixelPrune()) as handle:
        features = tiny.features_of(model, **seen).pooler_output
    for item, expected in zip(features, untouched, strict=True):
        tiny.close(item, expected, 1e-5)


def test_smaller_pictures_are_refused_where_units_count():
    class Shrunk(Reducer):
        def before_encoder(self, pixels):
            return pixels.pixels[..., ::2, ::2], None

    model = tiny.build("internvl")
    with dymu.apply(model, merge=Shrunk()), pytest.raises(UnsupportedModel, match="Shrunk shows the encoder smaller"):
        tiny.features_of(model, **tiny.shown(model, tiny.uneven(model, 1)))


@pytest.mark.parametrize("kind", [*KEEP, *MERGE])
def test_numbers_that_cannot_be_kept(kind):
    model = tiny.llava()
    for keep in (0, -1, float("nan")):
        with pytest.raises(BadBudget):
            kind(keep)
    asked = {"input_ids": tiny.prompt(model, 3, "image", 4)[None], "pixel_values": tiny.pictures(1)}
    with dymu.apply(model, merge=kind(50)), pytest.raises(BadBudget, match="of 49 tokens"):
        model(**asked)
    with pytest.raises(ValueError, match="from 0 to 1"):
        VisPruner(0.3, important=2)
    with pytest.raises(ValueError, match="only layers"):
        dymu.apply(model, merge=VScan(0.3, early=40))
    with dymu.apply(model, merge=VisionZip(40, 10)), pytest.raises(BadBudget, match="take fewer"):
        model(**asked)


ODD: list[Callable[[], Any]] = [
    lambda: ApET(4, basis=math.nan), lambda: ApET(4, basis=True), lambda: ApET(4, basis="3"),
    lambda: DensityPeaks(least=2.5), lambda: DensityPeaks(neighbours=None), lambda: DensityPeaks(threshold=10**400),
    lambda: HoloV(4, stretches=math.inf), lambda: VScan(4, side="6"), lambda: VScan(4, early=2.5),
    lambda: VisPruner(4, important=None), lambda: VisPruner(4, important=1.5), lambda: PruMerge(plus="no"),
    lambda: PruMerge(outliers=math.nan), lambda: HierarchicalPool(4, unit=1), lambda: RandomKeep(4, seed="1"),
    lambda: FixedMerge(4, layers="3"), lambda: FixedMerge(4, layers=2.5), lambda: FixedMerge(4, schedule=None),
    lambda: DivPrune(4, fill="neerest"), lambda: DivPrune(10**400), lambda: DivPrune(math.nan), lambda: DivPrune(0),
    lambda: TextAwareMerge(4, layers=(1,), text=3, project=len),
]  # fmt: skip


@pytest.mark.parametrize("make", ODD, ids=range(len(ODD)))
def test_arguments_that_are_none_are_named(make: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, BadBudget)) as error:
        make()
    assert re.fullmatch(r"[^\n]{20,200}", str(error.value))


@pytest.mark.parametrize("rule", [CDPruner(4), MMTok(4), DARTEmbeddings(4)], ids=str)
def test_a_prompt_without_words_is_refused_where_they_are_read(rule: Any) -> None:
    model = tiny.llava()
    ids = tiny.prompt(model, 3, "image")
    image = ids[ids == model.config.image_token_id][None]
    with dymu.apply(model, merge=rule), pytest.raises(BadPrompt, match="no word beside its image"):
        model(input_ids=image, pixel_values=tiny.pictures(1))


def test_a_prompt_that_ends_with_its_image_has_no_raters() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, tiny.prompt(model, 5, "image"), tiny.pictures(1))
    with dymu.apply(model, prune=SparseVLM((0.3,), (0,))), pytest.raises(BadPrompt, match="behind the image"):
        model(**inputs)


@pytest.mark.parametrize("rule", [CDPruner(4), MMTok(4), DARTEmbeddings(4), FasterVLM(4)], ids=str)
def test_tokens_are_for_the_question_that_chose_them(rule: Any) -> None:
    model, processor = tiny.llava(), tiny.full_processor("llava")
    one, two = shown(2)
    asked = inputs_for(model, processor, [([one], "what ?"), ([two], "why")])
    other = inputs_for(model, processor, [([one], "who ?"), ([two], "why")])
    mask = {"attention_mask": asked["attention_mask"]}
    reads = not isinstance(rule, FasterVLM)
    with dymu.apply(model, merge=rule):
        expected = model(**asked).logits
        ids, pixels = asked["input_ids"], asked["pixel_values"]
        output = model.get_image_features(pixels, input_ids=ids, **mask, return_dict=True)
        given = {"mm_encoder_outputs": {"image": output}}
        tiny.close(model(input_ids=ids, **mask, **given).logits, expected)
        more = torch.cat((ids, ids[:, -2:]), 1)  # what follows is no other question
        there = torch.cat((mask["attention_mask"], torch.ones_like(ids[:, -2:])), 1)
        model(input_ids=more, attention_mask=there, **given)
        model.generate(**asked, do_sample=False, max_new_tokens=2, num_beams=2)
        with pytest.raises(BadPrompt, match="another question") if reads else nullcontext():
            model(input_ids=other["input_ids"], attention_mask=other["attention_mask"], **given)
        for wrong in (mask["attention_mask"][:, :-1], mask["attention_mask"][:1], "x"):
            with pytest.raises(BadPrompt, match="give one as large"):
                model.get_image_features(pixels, input_ids=ids, attention_mask=wrong)
        with pytest.raises(BadPrompt, match="are the ids"):
            model.get_image_features(pixels, input_ids=[1, 2])
