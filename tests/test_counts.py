"""What a number of tokens says: the mean, what no image goes beyond, or what every one keeps; for all or for each."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dymu
import tiny
from dymu.counts import Count
from dymu.errors import BadBudget, BadPrompt
from dymu.families.resolve import resolve
from dymu.prompting import inputs_for, items_by_prompt
from dymu.thresholds import Calibrated, Thresholds
from tiny_processors import PROCESSORS, processor_for

TWO = Thresholds((Calibrated(14, (0.7,) * tiny.LAYERS), Calibrated(17, (0.9,) * tiny.LAYERS)))
"""Of which the lower merges more."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava()


def kept(handle: Any) -> list[int]:
    return [item.budgeted for item in handle.last.items]


def three(model: Any) -> dict[str, Any]:
    """A prompt that shows three pictures."""
    return tiny.inputs(model, tiny.prompt(model, 4, "image", 2, "image", 3, "image", 5), tiny.pictures(3))


def test_the_cap_alone_is_the_mean_too(model):
    with dymu.apply(model, TWO, budget=17) as mean:
        model(**three(model))
        usual = kept(mean)
    cap = sorted(usual)[1]
    with dymu.apply(model, TWO, budget=17, at_most=cap) as handle:
        assert (handle.budget, handle.at_most, handle.exactly) == (17, cap, None)
        assert repr(handle).endswith(f"budget 17, at most {cap}>")
        model(**three(model))
        assert kept(handle) == [min(count, cap) for count in usual]
        assert max(usual) > cap
    with dymu.apply(model, TWO, at_most=15) as handle:
        assert (handle.budget, handle.at_most) == (15, 15)
        model(**three(model))
        assert max(kept(handle)) <= 15
        handle.budget = 16
        assert (handle.budget, handle.at_most) == (16, 16)


def test_a_fraction_is_of_the_picture_itself(model):
    with dymu.apply(model, TWO, budget=17, at_most=0.2) as handle:
        model(**three(model))
        assert max(kept(handle)) == int(0.2 * 49)
        handle.set_budget(exactly=0.2)
        model(**three(model))
        assert kept(handle) == [10] * 3


def test_every_image_keeps_exactly_as_many(model):
    with dymu.apply(model, TWO, exactly=13) as handle:
        assert (handle.budget, handle.exactly) == (13, 13)
        assert repr(handle).endswith("exactly 13>")
        model(**three(model))
        assert kept(handle) == [13] * 3
        handle.budget = 9
        model(**three(model))
        assert kept(handle) == [9] * 3
        handle.set_budget(17)
        assert handle.exactly is None


def test_for_a_moment(model):
    with dymu.apply(model, TWO, budget=17) as handle:
        model(**three(model))
        usual = kept(handle)
        with handle.at(14):
            model(**three(model))
            lower = kept(handle)
            with handle.at(exactly=5):
                model(**three(model))
                assert kept(handle) == [5] * 3
            model(**three(model))
            assert kept(handle) == lower
        assert sum(lower) < sum(usual)
        with handle.at(at_most=min(usual)):
            model(**three(model))
            assert kept(handle) == [min(usual)] * 3
        with handle.at([14, None, "untouched"]):
            model(**three(model))
            assert kept(handle) == [lower[0], usual[1], 49]
        assert handle.budget == 17
        model(**three(model))
        assert kept(handle) == usual


def test_a_budget_for_each_image_of_a_call(model):
    """By the argument of `generate`, in the order of the images; what the model says is what it says of them alone."""
    pictures = tiny.pictures(3)
    prompts = [tiny.prompt(model, 3, "image", 4, "image", 2), tiny.prompt(model, 5, "image", 6)]
    with dymu.apply(model, TWO, budget=17) as handle:
        batch = tiny.inputs(model, prompts, pictures)
        answered = tiny.answer(model, **batch, dymu_budget=[14, 15, None])
        counts = kept(handle)
        expected = []
        for budget, picture in zip((14, 15, 17), pictures, strict=True):
            handle.budget = budget
            model(**tiny.inputs(model, tiny.prompt(model, "image"), picture[None]))
            expected += kept(handle)
        assert counts == expected
        alone = tiny.inputs(model, prompts[1], pictures[2:])
        assert answered[1, -6:].tolist() == tiny.answer(model, **alone)[0, -6:].tolist()
        logits = model(**batch, dymu_budget=[14, 15, None]).logits
        assert kept(handle) == expected
        assert tiny.answer(model, **batch, dymu_budget=14).shape == answered.shape
        assert sum(kept(handle)) < sum(expected)
        assert torch.isfinite(logits).all()


def test_numbers_are_meant_as_the_handles(model):
    with dymu.apply(model, TWO, exactly=20) as handle:
        tiny.answer(model, **three(model), dymu_budget=[7, None, "untouched"])
        assert kept(handle) == [7, 20, 49]


def test_one_token_is_not_all_of_them(model):
    with dymu.apply(model, TWO, exactly=9) as handle:
        for budgets, counts in (([1, 1.0, 9], [1, 49, 9]), ([1.0, 1, 9], [49, 1, 9])):
            model(**three(model), dymu_budget=budgets)
            assert kept(handle) == counts


def test_a_cap_for_a_moment(model):
    """With the budget that is given, or the handle's."""
    with dymu.apply(model, TWO, budget=17, at_most=40) as handle:
        model(**three(model))
        both = kept(handle)
        handle.set_budget(at_most=15)
        with handle.at(17, at_most=40):
            model(**three(model))
            assert kept(handle) == both
        handle.set_budget(17)
        with handle.at(at_most=40):
            model(**three(model))
            assert kept(handle) == both
        for number in (torch.tensor(14), np.array(14), np.int64(14)):
            with handle.at(number):
                model(**three(model))


def test_images_come_ahead_of_videos():
    model = tiny.llava("siglip", "qwen2", "llava_onevision")
    thresholds = Thresholds(
        (Calibrated(14, (0.7,) * tiny.LAYERS, images=(0.5,) * 6, frames=(0.5,) * 6),
         Calibrated(17, (0.9,) * tiny.LAYERS, images=(0.9,) * 6, frames=(0.9,) * 6)), image_tokens=147
    )  # fmt: skip
    from test_layouts import Photo, Video, scene

    inputs = scene(model, [(3, Photo(60, 90, 1), 2, Video(3, 1), 4)])
    with dymu.apply(model, thresholds, exactly=40) as handle:
        with pytest.raises(BadBudget, match="0 budgets were given for 1 videos"):
            model(**inputs, dymu_budget=[30])
        model(**inputs, dymu_budget=[30, 8])
        image, video = handle.last.items
        assert (image.budgeted, video.fresh) == (30, [8] * 3)
        with pytest.raises(BadBudget, match="2 budgets were given for 1 videos"):
            model(**inputs, dymu_budget=[30, 8, 8])


def test_threads_have_their_own(model):
    inputs, begin = three(model), threading.Barrier(4)
    with dymu.apply(model, TWO, budget=17) as handle:

        def ask(count: int) -> list[list[int]]:
            begin.wait()
            found = []
            for _ in range(6):
                with handle.at(exactly=count):
                    tiny.answer(model, **inputs)
                    found.append(kept(handle))
            return found

        with ThreadPoolExecutor(4) as threads:
            counts = list(threads.map(ask, (6, 9, 12, 15)))
        assert counts == [[[count] * 3] * 6 for count in (6, 9, 12, 15)]


def test_an_encoder_alone():
    encoder = tiny.llava().model.vision_tower
    with dymu.apply(encoder, TWO, budget=17, at_most=20) as handle:
        encoder(tiny.pictures(3))
        assert max(handle.last.kept) <= 20
        with handle.at([14, None, "untouched"]), handle.at(exactly=11):
            encoder(tiny.pictures(3))
            assert handle.last.kept == [11] * 3
        handle.set_budget(exactly=9)
        encoder(tiny.pictures(3))
        assert handle.last.kept == [9] * 3
        with handle.at([8, None, "untouched"]):
            encoder(tiny.pictures(3))
            assert handle.last.kept == [8, 9, 49]


SIZES = ((150, 100), (90, 200), (77, 50))


def odd(count: int, seed: int) -> list[Image.Image]:
    """Pictures of odd sizes, some plain, some noise."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        width, height = torch.randint(20, 330, (2,), generator=generator).tolist()
        coarse = torch.rand(3, 1 + number % 9, 1 + number % 7, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse[None], size=(height, width), mode="nearest")[0]
        noise = torch.rand(pixels.shape, generator=generator) * (number % 4) / 4
        found.append(Image.fromarray((pixels * 150 + noise * 100).byte().permute(1, 2, 0).numpy()))
    return found


@pytest.fixture(scope="module", params=[name for name in PROCESSORS if name != "granite_docling"])
def whole(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model of every family with a processor of its own; Granite Docling's is SmolVLM's, with more tiles."""
    processor = processor_for(request.param)
    if request.param == "smolvlm":
        processor.image_processor.do_image_splitting = True
        processor.image_processor.size = {"longest_edge": 160}
    return tiny.build(request.param), processor


def test_numbers_hold_for_images_of_any_size(whole):
    """Of one image, and of several in a prompt, however their processors cut and size them."""
    model, processor = whole
    thresholds = Thresholds((Calibrated(20, (0.9,) * tiny.LAYERS),))
    photos = odd(6, 1)
    prompts = [[photos[0]], photos[1:3], photos[3:]]
    if tiny.name_of(model) in ("glm4v", "glm46v", "paddleocr_vl"):  # which take no image right behind another
        prompts = [[photo] for photo in photos]
    with dymu.apply(model, thresholds, at_most=20) as handle:
        asked = inputs_for(model, processor, [(images, "what ?") for images in prompts])
        with handle.at("untouched"):
            model(**asked)
            of_prompts = items_by_prompt(model, asked, handle.last.items)
            pictures = max(sum(item.pictures for item in items) for items in of_prompts)
        most = max(20, pictures)
        with handle.at(at_most=most):
            model(**asked)
            for images, items in zip(prompts, items_by_prompt(model, asked, handle.last.items), strict=True):
                assert sum(item.budgeted for item in items) <= most * len(images)
        with handle.at(exactly=0.5):
            model(**asked)
        few = max(pictures, 3)
        with handle.at(exactly=few):
            model(**asked)
            for images, items in zip(prompts, items_by_prompt(model, asked, handle.last.items), strict=True):
                assert sum(item.budgeted for item in items) == few * len(images)
        handle.set_budget(exactly=few)
        with handle.at([few, few + 1, few, few + 1, few, "untouched"]):
            model(**asked)
            counts = [
                sum(item.budgeted for item in items) for items in items_by_prompt(model, asked, handle.last.items)
            ]
            ends = [sum(map(len, prompts[:number])) for number in range(len(prompts) + 1)]
            own = [few, few + 1, few, few + 1, few, 0]
            expected = [sum(own[start:end]) for start, end in pairwise(ends)]
            assert counts[:-1] == expected[:-1]
            assert counts[-1] > expected[-1] + 1


def test_a_share_and_a_cap_hold_together(whole):
    """Pictures of writing, or with something in focus, keep their share however they are cut; a cap goes ahead."""
    model, processor = whole
    thresholds = Thresholds(
        (Calibrated(20, (0.8,) * tiny.LAYERS, images=(0.8,) * 6, frames=(0.8,) * 6),), image_tokens=40
    )
    prompts = [[photo] for photo in odd(5, 1)]

    def all_of(image: Image.Image) -> np.ndarray:
        return np.ones((image.height, image.width))

    with dymu.apply(model, thresholds, budget=20, focus=all_of) as handle:
        asked = inputs_for(model, processor, [(images, "what ?") for images in prompts])
        model(**asked)
        items = items_by_prompt(model, asked, handle.last.items)
        untouched = [sum(int(item.patch.sum()) for item in of_prompt) for of_prompt in items]
        kept = [sum(item.budgeted for item in of_prompt) for of_prompt in items]
        pictures = [sum(item.pictures for item in of_prompt) for of_prompt in items]
        shares = [max(round(0.5 * count), 1) for count in untouched]
        assert kept == shares
        most = max(*pictures, 3)
        with handle.at(at_most=most):
            model(**asked)
        items = items_by_prompt(model, asked, handle.last.items)
        assert max(sum(item.budgeted for item in of_prompt) for of_prompt in items) <= most


def test_images_of_another_kind_are_told(caplog):
    """Once, when enough were shown; what is asked otherwise does not count."""
    model = tiny.llava("clip", layer=-1)
    samples = tiny.photos(12)
    thresholds = dymu.calibrate(model, tiny.processor(), samples, [15], progress=False)
    same = tiny.processor()(images=samples, return_tensors="pt")["pixel_values"]
    noise = torch.randn(12, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(0))
    with dymu.apply(model, thresholds) as handle:
        for _ in range(6):
            model.get_image_features(same)
            assert handle.last.drift == pytest.approx(1)
        assert not caplog.records
        handle.budget = 15
        for _ in range(6):
            model.get_image_features(noise)
        assert handle.last.drift == pytest.approx(sum(handle.last.kept) / 12 / 15)
        assert handle.last.drift > 1.3
        assert [record.message for record in caplog.records] == [
            f"the 60 pictures since the budget was set keep {handle.last.drift:.2f} times what those of calibration "
            "kept: they are of another kind; calibrate on pictures like these."
        ]
        with handle.at("untouched"):
            model.get_image_features(noise)
            assert handle.last.drift is None
        with handle.at(focus=(0, 0, 0.5, 0.5)):
            model.get_image_features(noise)
            assert handle.last.drift is None


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("number", [0, -3, float("nan"), "9", True])
@pytest.mark.parametrize("name", ["at_most", "exactly"])
def test_numbers_that_are_none(model, name, number):
    with pytest.raises(BadBudget, match=r"cannot keep|is a number of tokens"):
        dymu.apply(model, TWO, budget=None if name == "exactly" else 17, **{name: number})


def test_what_cannot_be_is_refused_and_changes_nothing(model):
    with pytest.raises(BadBudget, match=r"exactly=9 says how much every image keeps: leave budget and at_most out"):
        dymu.apply(model, TWO, budget=17, at_most=20, exactly=9)
    with pytest.raises(BadBudget, match="with merge="):
        dymu.apply(model, merge=dymu.FixedMerge(9), exactly=9)
    inputs = three(model)
    with dymu.apply(model, TWO, budget=17) as handle:
        model(**inputs)
        usual = kept(handle)
        with handle.at(exactly=50), pytest.raises(BadBudget, match="cannot keep 50 tokens of an image that has 49"):
            model(**inputs)
        with pytest.raises(BadBudget, match="4 budgets were given for 3 images"):
            model(**inputs, dymu_budget=[14, 14, 14, 14])
        with pytest.raises(BadBudget, match="2 budgets were given for 3 images"):
            tiny.answer(model, **inputs, dymu_budget=[14, 14])
        for wrong in ("all", [14, "some", None]):
            with pytest.raises(BadBudget, match=r"or 'untouched', not '(all|some)'"):
                model(**inputs, dymu_budget=wrong)
        with pytest.raises(BadBudget, match="outside 14 to 17"):
            model(**inputs, dymu_budget=40)
        with handle.disabled(), pytest.raises(BadBudget, match="disabled or removed"):
            model(**inputs, dymu_budget=14)
        with pytest.raises(BadBudget, match="either exactly=, or a budget"), handle.at(14, exactly=9):
            pass
        with (
            pytest.raises(BadBudget, match="either a cap, or a budget of 'untouched'"),
            handle.at("untouched", at_most=9),
        ):
            pass
        for half in (13.5, np.float32(13.5), torch.tensor(13.5)):
            with pytest.raises(BadBudget, match="neither a whole number of tokens"), handle.at(exactly=half):
                pass
        with pytest.raises(BadBudget, match="a budget of 'untouched'"), handle.at(["untouched", None], at_most=9):
            pass
        with handle.at(np.array([14, 15, 16]), at_most=16):
            model(**inputs)
            assert max(kept(handle)) <= 16
        with pytest.raises(BadBudget, match="no pictures come with this call"):
            tiny.answer(model, **tiny.inputs(model, tiny.prompt(model, 5)), dymu_budget=[14, 15])
        model(**inputs)
        assert kept(handle) == usual
    with dymu.apply(model, merge=dymu.FixedMerge(9)), pytest.raises(BadBudget, match="fixed rule"):
        model(**inputs, dymu_budget=14)
    with pytest.raises(BadBudget, match="was removed from this model"), handle.at(14):
        pass


def test_tiles_of_an_unknown_image(whole):
    """A number of an image cannot be kept where nothing says which tiles are one."""
    model, processor = whole
    if resolve(model).family.tells_images == "items":
        pytest.skip("every item is an image")
    asked = inputs_for(model, processor, [(odd(2, 1), "what ?")])
    pixels = {name: asked[name] for name in ("pixel_values", "pixel_attention_mask") if name in asked}
    thresholds = Thresholds((Calibrated(20, (0.9,) * tiny.LAYERS),))
    with dymu.apply(model, thresholds, exactly=20) as handle:
        with pytest.raises(BadPrompt, match="give input_ids along"):
            tiny.features_of(model, **pixels)
        with handle.at(exactly=0.4):
            tiny.features_of(model, **pixels)
        shares = [item.budgeted / len(item.leaders) for item in handle.last.items]
        assert shares == pytest.approx([0.4] * len(shares), abs=0.05)


def test_a_count_is_given_in_one_sense():
    assert Count.of("mean", 9) == Count(9)
    assert Count.of("at-most", 9).at(4) == Count(at_most=4)
    assert Count.of("exactly", 9).at(4) == Count(exactly=4)
    assert Count(9, at_most=12).at(4) == Count(4, at_most=12)
