"""Focus: what matters merges last, or never; and pictures of writing are guarded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import dymu
import tiny
from dymu.errors import BadBudget, BadFocus
from dymu.hooks.focus import Regions, spec_of
from dymu.media import masks
from dymu.merging import focus_last, in_focus
from dymu.reducers import AveragePool, FixedMerge, ThresholdMerge
from dymu.thresholds import Calibrated, Encoder, Thresholds
from test_contract import MODELS, SOME, four_prompts

HALF = (0.0, 0.0, 0.5, 1.0)
"""The left half of a picture."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava()


@pytest.fixture(params=MODELS)
def every(request: pytest.FixtureRequest) -> Any:
    """One model of every family, and LLaVA with every tower."""
    return tiny.build(request.param) if isinstance(request.param, str) else tiny.llava(*request.param)


def stands(item: Any, inside: torch.Tensor) -> list[int]:
    """Of the tokens that are so, how many share theirs with how many."""
    return item.leaders[item.patch & inside].bincount().tolist()


def alone(item: Any, inside: torch.Tensor) -> bool:
    """Whether every such token stands for itself alone."""
    index = torch.arange(len(item.leaders))
    sizes = item.leaders.clamp(min=0).bincount(minlength=len(index))
    return bool(((item.leaders == index) & (sizes == 1))[item.patch & inside].all())


def test_what_is_in_focus_does_not_merge(every):
    """Where focus adds, in every family, for pictures of any size; the rest merges."""
    images = tiny.uneven(every, 4)
    batch = tiny.inputs(every, four_prompts(every, images), images)
    with dymu.apply(every, merge=SOME, focus=HALF, focus_adds=True) as handle:
        every(**batch)
        items = handle.last.items
        for item in items:
            inside = item.location[:, 2] <= 0.5 + 1e-6
            assert alone(item, inside)
        assert any(item.kept < len(item.leaders) for item in items)
        with handle.at(focus=[HALF, None, (0.9, 0.9), None]):
            every(**batch)
            own = [item.leaders for item in handle.last.items]
    with dymu.apply(every, merge=SOME) as handle:
        every(**batch)
        for number in (1, 3):
            assert torch.equal(handle.last.items[number].leaders, own[number])


def test_a_function_sees_the_picture_as_it_is(every):
    """However its patches travel: what it marks is where a box would be."""
    picture = tiny.pictures(1)[0] * 0.2 - 1
    picture[:, : tiny.SIDE // 2, : tiny.SIDE // 2] += 2.5
    inputs = tiny.inputs(every, tiny.prompt(every, 3, "image", 4), picture[None])
    seen = list[Image.Image]()

    def bright(image: Image.Image) -> np.ndarray:
        seen.append(image)
        return np.asarray(image.convert("L"), np.float32) > 128

    found = []
    for focus in (bright, (0.0, 0.0, 0.5, 0.5)):
        with dymu.apply(every, merge=SOME, focus=focus, focus_adds=True) as handle:
            every(**inputs)
            found.append(handle.last.items)
    for by_function, by_box in zip(*found, strict=True):
        inside = (by_box.location[:, 2] <= 0.5 - 0.1) & (by_box.location[:, 3] <= 0.5 - 0.1)
        assert alone(by_function, inside)
        assert alone(by_box, inside)
        if by_box.pictures == 1:
            assert torch.equal(by_function.leaders, by_box.leaders)
    assert seen[0].mode == "RGB"
    assert np.asarray(seen[0])[:4, :4].mean() > 180 > 90 > np.asarray(seen[0])[-4:, -4:].mean()


@pytest.mark.parametrize("rule", [SOME, FixedMerge(20), ThresholdMerge(SOME.thresholds, at_most=12)], ids=str)
def test_as_many_are_left_as_without(model, rule):
    """In every layer so many merge as the rule has it of what is there, of the others first."""
    inputs = tiny.inputs(model, tiny.prompt(model, 4, "image", 2, "image", 5), tiny.pictures(2))
    shares = []
    for focus in (None, HALF):
        with dymu.apply(model, merge=rule, focus=focus) as handle:
            model(**inputs)
            items = handle.last.items
            inside = [item.patch & (item.location[:, 2] <= 0.5) for item in items]
            shares.append([len(item.leaders[own].unique()) for item, own in zip(items, inside, strict=True)])
            if isinstance(rule, FixedMerge):
                assert handle.last.kept == [20, 20]
            if getattr(rule, "at_most", None):
                assert max(handle.last.kept) <= 12
    assert all(focused >= plain for plain, focused in zip(*shares, strict=True))
    assert sum(shares[1]) > sum(shares[0])


def test_everything_in_focus_is_nothing_in_focus(model):
    inputs = tiny.inputs(model, tiny.prompt(model, 4, "image", 5), tiny.pictures(1))
    maps = []
    for focus in (None, (0.0, 0.0, 1.0, 1.0), [None], np.zeros((3, 3))):
        with dymu.apply(model, merge=SOME, focus=focus) as handle:
            model(**inputs)
            maps.append(handle.last.group(0))
    assert all(torch.equal(maps[0], other) for other in maps)


def test_a_rows_focus_is_its_own(model):
    pictures = tiny.pictures(3)
    prompts = [tiny.prompt(model, 3, "image", number) for number in (4, 6, 9)]
    own = [HALF, np.eye(7), [(0.2, 0.8), (0.9, 0.1)]]
    with dymu.apply(model, merge=SOME) as handle:
        answers = model(**tiny.inputs(model, prompts, pictures), dymu_focus=own).logits
        items = handle.last.items
        for row, focus in enumerate(own):
            inputs = tiny.inputs(model, prompts[row], pictures[row : row + 1])
            logits = model(**inputs, dymu_focus=[focus]).logits[0]
            assert torch.equal(handle.last.items[0].leaders, items[row].leaders)
            tiny.close(answers[row, -len(logits) :], logits, part=1e-4)
        tiny.answer(model, **tiny.inputs(model, prompts, pictures), dymu_focus=own)
        assert [item.kept for item in handle.last.items] == [item.kept for item in items]


def test_images_and_frames_that_mix_tokens():
    """Behind the layers, too, what is in focus merges last: where an image is shrunk, and frames are pooled."""
    from test_layouts import Photo, Video, scene

    onevision = tiny.llava("siglip", "qwen2", "llava_onevision")
    rule = ThresholdMerge((2.0,) * tiny.LAYERS, images=(0.99,), frames=(0.99,), at_most=60)
    inputs = scene(onevision, [(3, Photo(200, 77, 1), 2, Video(3, 1), 4)])
    shares = []
    for focus in (None, HALF):
        with dymu.apply(onevision, merge=rule, focus=focus) as handle:
            onevision(**inputs)
            items = handle.last.items
            shares.append([len(item.leaders[item.patch & (item.location[:, 2] <= 0.5)].unique()) for item in items])
    assert all(focused >= plain for plain, focused in zip(*shares, strict=True))
    assert sum(shares[1]) > sum(shares[0])


def test_an_encoder_alone():
    encoder = tiny.llava().model.vision_tower
    with dymu.apply(encoder, merge=SOME, focus=HALF, focus_adds=True) as handle:
        encoder(tiny.pictures(2))
        for item in handle.last.items:
            assert alone(item, item.location[:, 2] <= 0.5)


edges = st.integers(0, 3).flatmap(
    lambda rows: st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**31), st.just(rows))
)


@settings(max_examples=60)
@given(edges)
def test_focus_last_equals_its_words(drawn):
    batch, count, seed, prefix = drawn
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + 2 * count
    in_a = len(range(prefix + prefix % 2, tokens, 2))
    in_b = len(range(prefix + 1 - prefix % 2, tokens, 2))
    similarity = torch.rand(batch, in_a, generator=generator)
    partner = torch.randint(max(in_b, 1), (batch, in_a), generator=generator)
    focus = torch.rand(batch, tokens, generator=generator) < 0.4
    into = torch.where(similarity > 0.5, partner, -1)
    item = torch.arange(batch)
    focused = in_focus(focus, partner, prefix)
    found = focus_last(into, similarity, partner, item, focused)
    for row in range(batch):
        a = list(range(prefix + prefix % 2, tokens, 2))
        b = list(range(prefix + 1 - prefix % 2, tokens, 2))
        expected = [
            bool(focus[row, x]) or (bool(b) and bool(focus[row, b[int(partner[row, k])]])) for k, x in enumerate(a)
        ]
        assert focused[row].tolist() == expected
        due = int((into[row] >= 0).sum())
        order = sorted(range(in_a), key=lambda k: (expected[k], -float(similarity[row, k])))
        merged = {k for k in range(in_a) if found[row, k] >= 0}
        assert merged == set(order[:due])
        assert all(int(found[row, k]) == int(partner[row, k]) for k in merged)


# ------------------------------------------------------------------------------------------------------------- guard


def page(letters: int = 60) -> Image.Image:
    image = Image.new("RGB", (56, 56), "white")
    draw = ImageDraw.Draw(image)
    for number in range(letters):
        x, y = number % 10 * 5 + 1, number // 10 * 8 + 2
        draw.line((x, y, x, y + 5), fill="black")
    return image


def test_writing_keeps_the_budgets_share_and_other_pictures_are_as_they_were():
    model = tiny.llava(layer=-1)
    thresholds = Thresholds((Calibrated(14, (0.2,) * tiny.LAYERS), Calibrated(20, (0.3,) * tiny.LAYERS)))
    with pytest.raises(BadFocus, match="does not say how many tokens"):
        dymu.apply(model, thresholds, budget=20, guard="text")
    assert model.__dict__.get("_dymu_handle") is None
    config = model.config.vision_config
    encoder = Encoder(
        config.model_type, tiny.LAYERS, tiny.LAYERS, config.hidden_size, config.num_attention_heads, tiny.PATCHES
    )
    thresholds = Thresholds(thresholds.calibrated, encoder=encoder)
    written = torch.from_numpy(np.array(page(12).crop((0, 0, 28, 28)))).permute(2, 0, 1).float()[None] / 64 - 2
    plain = torch.linspace(-1, 1, tiny.SIDE).expand(1, 3, tiny.SIDE, -1)
    both = torch.cat((written, plain))
    with dymu.apply(model, thresholds, budget=20, guard="text") as handle:
        model.get_image_features(both)
        guarded = handle.last.kept
        handle.budget = 14
        model.get_image_features(both)
        lower = handle.last.kept
        handle.set_focus()
        model.get_image_features(both)
        usual = handle.last.kept
        handle.budget = 20
        model.get_image_features(both)
        assert usual[0] < 14
        assert handle.last.kept[0] < 20
        assert guarded == [20, handle.last.kept[1]]
        assert lower == [14, usual[1]]
        handle.set_focus(guard="text")
        with handle.at(exactly=9):
            model.get_image_features(both)
            assert handle.last.kept == [9, 9]
        adds = handle.at(exactly=9, focus=HALF, focus_adds=True)
        with pytest.raises(BadFocus, match="leave focus_adds out"), adds:
            pass
        with handle.at(exactly=9, focus=HALF):
            model.get_image_features(both)
            assert handle.last.kept == [9, 9]
        with handle.at(14):
            model.get_image_features(both)
            assert handle.last.kept == lower
        with handle.at([14, 20]):
            model.get_image_features(both)
            assert handle.last.kept == [14, guarded[1]]
        handle.set_focus(focus=(0.0, 0.0, 1.0, 0.5))
        model.get_image_features(both)
        assert handle.last.kept == [20, 20]
        with handle.at([14, None]):
            model.get_image_features(both)
            assert handle.last.kept == [14, 20]
        handle.set_focus(HALF, adds=True)
        with pytest.raises(BadBudget, match="a focus adds tokens here"):
            handle.set_budget(exactly=9)
        with pytest.raises(BadBudget, match="a focus adds tokens here"), handle.at(exactly=9):
            pass


def test_strokes():
    assert masks.strokes(Image.new("RGB", (60, 40), "white")) is None
    assert masks.strokes(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))) is None
    found = masks.strokes(page())
    assert found is not None
    assert found.shape == (56, 56)
    assert found[2:8, 1:45].mean() > 0.3 > 0.01 > found[52:].mean()
    for size in ((1, 1), (1, 50), (50, 1), (3, 2)):
        assert masks.strokes(Image.new("L", size)) is None


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_edges_are_those_of_the_picture(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    found = masks.edges(Image.fromarray(pixels))
    assert found.shape == (height, width)
    assert set(np.unique(found)) <= {0.0, 1.0}
    step = Image.new("L", (40, 40))
    step.paste(255, (20, 0, 40, 40))
    assert np.flatnonzero(masks.edges(step).any(0)).tolist() == [20]


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("focus", "says"),
    [
        ((0.5, 0.5, 1.2, 1.0), "lies outside the picture"),
        ((0.5, 0.5, 0.2, 0.2), "lies outside the picture"),
        ([[(0.1, 0.1, 0.2, 0.2), (0, 0, 0, 7)]], "lies outside the picture"),
        ((0.1, 0.2, 0.3), "a focus is a box"),
        (7, "a focus is a box"),
        ((), "a focus is a box"),
        (np.array([[0.1, 0.2, 0.5, 0.6], [0.6, 0.6, 0.9, 0.9]]), "may be boxes, points or a very small mask"),
        (torch.tensor([[0.1, 0.2]]), "may be boxes, points or a very small mask"),
        ("faces", "unknown focus 'faces'; choose text or edges"),
        (np.full((4, 5), np.nan), "a mask is of numbers"),
        (np.zeros((0, 5)), "a mask is of numbers"),
        (np.zeros((2, 3, 4)), "a focus is a box"),
    ],
)
def test_what_is_no_part_of_a_picture(model, focus, says):
    with pytest.raises(BadFocus, match=says) as caught:
        dymu.apply(model, merge=SOME, focus=focus)
    assert "\n" not in str(caught.value)
    assert dymu.handle_of(model) is None


def test_what_cannot_be_in_focus_is_refused_in_the_call(model):
    inputs = tiny.inputs(model, tiny.prompt(model, 4, "image", 5), tiny.pictures(1))
    with pytest.raises(BadFocus, match="AveragePool knows no focus"):
        dymu.apply(model, merge=AveragePool(0.3), focus=HALF)
    with dymu.apply(model, merge=SOME) as handle:
        model(**inputs)
        usual = handle.last.kept

        def fails(image: Image.Image) -> np.ndarray:
            raise KeyError("colour")

        for focus, says in (
            (fails, "the focus function failed"),
            (lambda image: np.zeros((3, 3)), r"answered a mask of \[3, 3\] for a picture of 28 rows"),
            (lambda image: np.full((28, 28), np.nan), "one finite number for each pixel"),
            ([HALF, HALF], "2 focuses were given for 1 images"),
        ):
            with pytest.raises(BadFocus, match=says), handle.at(focus=focus):
                model(**inputs)
        with pytest.raises(BadFocus, match="says nothing without a focus"):
            handle.set_focus(adds=True)
        with pytest.raises(BadFocus, match="alone, without focus"):
            handle.set_focus(HALF, guard="text")
        with pytest.raises(BadFocus, match="merges by a fixed rule"):
            handle.set_focus(guard="text")
        model(**inputs)
        assert handle.last.kept == usual


def test_the_detector_is_asked_for_in_one_sentence(model, monkeypatch):
    monkeypatch.setattr(masks, "find_spec", lambda name: None)
    masks._detector.cache_clear()
    with pytest.raises(BadFocus, match=r"to find text takes a detector: `pip install 'dymu\[text\]'`"):
        dymu.apply(model, merge=SOME, focus="text")


def test_a_mask_lies_over_the_whole_picture():
    region = spec_of(np.array([[False, True], [False, False]]))
    assert isinstance(region, Regions)
    boxes = np.array([[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0.4, 0.4, 0.6, 0.6], [np.nan] * 4, [0, 0.6, 1, 1]])
    assert region.within(boxes).tolist() == [False, True, True, False, False]
    assert spec_of((0.75, 0.1)) is not None
    points = spec_of([(0.75, 0.1)])
    assert isinstance(points, Regions)
    assert points.within(boxes).tolist() == [False, True, False, False, False]
