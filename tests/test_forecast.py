"""Forecasts: what a picture will keep, told from its pixels; fitted rightly, paired rightly, refused in a sentence."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dymu
import tiny
from dymu.calibration.forecast import FEWEST, fit, ridge
from dymu.calibration.images import share
from dymu.errors import BadBudget, BadImage, BadThresholds, DymuError
from dymu.forecast import LEAST_SD, LOG_TOKENS, BudgetForecast, Forecast, Forecasts
from dymu.media.features import NAMES, features
from dymu.schedule import fewest, fewest_of_any
from dymu.thresholds import Calibrated, Encoder, Thresholds
from test_calibrate import Exchange, InThreads, counted, kept, of_many_sizes
from test_cli import dymu_command, folder, last_object, photo, photos, refused  # noqa: F401
from tiny_processors import processor_for

BUDGETS = (10, 20, 40)


def picture(detail: float, seed: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Of one colour in all but a part of it, which is noise."""
    rng = np.random.default_rng(seed)
    pixels = np.full((size[1], size[0], 3), rng.integers(60, 200, 3), np.uint8)
    rows = round(detail * size[1])
    pixels[:rows] = rng.integers(0, 256, (rows, size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """From plain to full of detail, in no order."""
    details = np.linspace(0.05, 1, count)
    np.random.default_rng(seed).shuffle(details)
    return [picture(float(detail), seed + number) for number, detail in enumerate(details)]


def drawn(count: int, seed: int, spread: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Features [count, F], and log parts that are linear in them but for normal noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, len(NAMES))) * np.arange(1, len(NAMES) + 1) + 3
    slopes = np.linspace(-0.05, 0.06, len(NAMES))
    return x, -2 + (x - 3) @ slopes + spread * rng.normal(size=count)


def fitted(count: int = 60, seed: int = 0) -> Forecasts:
    """For the budgets `BUDGETS` of 10^6 tokens, so that rounding is nothing."""
    x, logs = drawn(count, seed)
    tokens = 10**6
    of = {budget: np.exp(logs + shift) * tokens for budget, shift in zip(BUDGETS, (-1, 0, 1), strict=True)}
    made = fit(x.tolist(), [tokens] * count, of)  # type: ignore[arg-type]
    assert made is not None
    return made


def thresholds(**changes: Any) -> Thresholds:
    entries = tuple(Calibrated(budget, (0.5, 0.6, 0.7)) for budget in BUDGETS)
    encoder = Encoder("clip_vision_model", layers=4, depth=3, hidden_size=32, heads=4, tokens=49)
    return Thresholds(**{"calibrated": entries, "encoder": encoder, "forecasts": fitted(), "images": 60, **changes})


# features


@given(
    st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"]),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=60)
def test_features_of_any_picture_are_finite(mode: str, width: int, height: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels.astype(np.uint16) * 257)
    elif mode != "L":
        image = image.convert("RGB" if mode == "HSV" else mode if mode != "RGBX" else "RGB").convert(mode)
    before = image.tobytes()
    measured = features(image)
    assert len(measured) == len(NAMES)
    assert all(type(value) is float and math.isfinite(value) for value in measured)
    assert all(0 <= value <= 1 for name, value in zip(NAMES, measured, strict=True) if "steps" in name)
    assert image.tobytes() == before


@pytest.mark.parametrize("size", [(1, 1), (30_000, 20), (20, 30_000), (4_001, 3_001), (1, 9_000)], ids=str)
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 10, 90)])
def test_a_picture_of_one_colour_has_no_steps_whatever_its_size(size: tuple[int, int], colour: Any) -> None:
    measured = dict(zip(NAMES, features(Image.new("RGB", size, colour)), strict=True))
    assert [value for name, value in measured.items() if "steps" in name] == [0] * 5
    assert measured["log_contrast"] == measured["log_detail_across"] == 0
    assert measured["log_colourfulness"] == pytest.approx(math.log1p(max(colour) - min(colour)))


def test_what_sees_the_same_gets_the_same() -> None:
    image = picture(0.5, size=(300, 200))
    assert features(image) == features(image.convert("RGBA")) == features(image.copy())
    grey = image.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert features(deep) == pytest.approx(features(grey.convert("RGB")))
    mirrored = features(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert mirrored == pytest.approx(features(image), rel=0.05, abs=0.02)


def test_more_detail_is_more_of_everything_that_counts_it() -> None:
    plain, half, full = (features(picture(detail, size=(192, 192))) for detail in (0.1, 0.5, 1.0))
    assert plain[0] < half[0] < full[0]
    assert plain[1] < half[1] < full[1]


def test_detail_across_and_edges_are_those_of_the_pixels() -> None:
    """Of stripes, each three pixels wide, at the size at which pictures are looked at."""
    stripes = np.zeros((192, 192), np.uint8)
    stripes[:, np.arange(192) // 3 % 2 == 1] = 90
    upright, lying, faint = (
        dict(zip(NAMES, features(Image.fromarray(pixels)), strict=True))
        for pixels in (stripes, stripes.T.copy(), stripes // 3)
    )
    edges = 63 / 191
    assert upright["log_detail_across"] == pytest.approx(math.log1p(90 * edges))
    assert lying["log_detail_across"] == 0
    assert upright["grey_steps_32"] == lying["grey_steps_32"] == pytest.approx(edges / 2)
    assert faint["grey_steps_32"] == 0


# the fit


@given(st.integers(FEWEST, 60), st.integers(1, 8), st.integers(0, 2**32 - 1), st.floats(0.01, 10))
@settings(deadline=None, max_examples=30)
def test_residuals_left_out_are_those_of_as_many_fits(count: int, width: int, seed: int, strength: float) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(count, width)), rng.normal(size=count)
    x -= x.mean(0)
    _, _, left_out = ridge(x, y, strength)
    for row in range(count):
        others = np.arange(count) != row
        design = np.column_stack([np.ones(count - 1), x[others]])
        penalty = np.diag([0.0] + [strength] * width)
        solved = np.linalg.solve(design.T @ design + penalty, design.T @ y[others])
        assert y[row] - solved[0] - x[row] @ solved[1:] == pytest.approx(left_out[row], rel=1e-8, abs=1e-10)


def test_a_line_without_noise_is_found() -> None:
    x, logs = drawn(400, 1, spread=0)
    made = fit(x.tolist(), [10**6] * 400, {20: np.exp(logs) * 10**6})  # type: ignore[arg-type]
    assert made is not None
    for row, log in zip(x[:20], logs[:20], strict=True):
        mean, reserve = made.at((*row, math.log(10**6)), 20)
        assert math.log(mean) == pytest.approx(log, abs=0.02)
        assert math.log(reserve) == pytest.approx(log, abs=0.02)
    assert made.budgets[0].r2 == pytest.approx(1, abs=1e-3)
    assert made.sds[-1] < LEAST_SD


def test_the_reserve_covers_new_draws_and_the_mean_is_a_mean() -> None:
    """In 95 of 100, over many fits on few images, and no more than that costs."""
    enough, means = [], []
    for seed in range(200):
        x, logs = drawn(41, seed)
        made = fit(x[:40].tolist(), [10**6] * 40, {20: np.exp(logs[:40]) * 10**6})  # type: ignore[arg-type]
        assert made is not None
        mean, reserve = made.at((*x[40], math.log(10**6)), 20)
        enough.append(math.exp(logs[40]) <= reserve)
        means.append(math.exp(logs[40]) / mean)
    deviation = math.sqrt(0.95 * 0.05 / len(enough))
    assert abs(np.mean(enough) - 0.95) < 3 * deviation
    assert abs(np.mean(means) - 1) < 3 * np.std(means) / math.sqrt(len(means))


def test_what_was_expected_of_the_images_that_were_fitted_adds_up() -> None:
    x, logs = drawn(100, 3, spread=0.5)
    kept_of = np.exp(logs) * 10**6
    made = fit(x.tolist(), [10**6] * 100, {20: kept_of})  # type: ignore[arg-type]
    assert made is not None
    told = [10**6 * made.at((*row, math.log(10**6)), 20)[0] for row in x]
    assert sum(told) == pytest.approx(kept_of.sum())


def test_few_images_make_no_forecast() -> None:
    x, _ = drawn(FEWEST, 0)
    assert fit(x[1:].tolist(), [49] * (FEWEST - 1), {20: [20] * (FEWEST - 1)}) is None
    made = fit(x.tolist(), [49] * FEWEST, {20: [20] * FEWEST})
    assert made is not None
    assert made.budgets[0].r2 is None
    assert made.at((*x[0], math.log(49)), 20) == (pytest.approx(20 / 49), pytest.approx(20 / 49))


# calibration


@pytest.fixture(scope="module")
def calibrated() -> tuple[Any, Any, list[Image.Image], Thresholds]:
    model, processor, images = tiny.llava("clip", layer=-1), tiny.processor(), pictures(48)
    options = {"batch_size": 5, "progress": False}
    return model, processor, images, dymu.calibrate(model, processor, images, [12, 25, 49], **options)


def by_hand(images: Sequence[Image.Image], full: Sequence[int], left: Sequence[int], budget: float) -> Forecasts:
    made = fit([features(image) for image in images], full, {budget: left})
    assert made is not None
    return made


def test_each_picture_is_paired_with_what_it_keeps(calibrated) -> None:
    """Counts come from `dymu.apply`, one picture at a time."""
    model, processor, images, found = calibrated
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    for entry in found.forecasts.budgets:
        left = [kept(model, found, entry.budget, one[None])[0] for one in pixels]
        expected = by_hand(images, [49] * 48, left, entry.budget).budgets[0]
        assert entry.slopes == pytest.approx(expected.slopes, abs=1e-6)
        assert (entry.intercept, entry.to_reserve) == pytest.approx((expected.intercept, expected.to_reserve), abs=1e-6)
        if entry.budget == 49:
            continue
        assert entry.r2 == pytest.approx(expected.r2)
        assert entry.r2 > 0.5
        shuffled = random.Random(0).sample(left, len(left))
        assert by_hand(images, [49] * 48, shuffled, 9).budgets[0].r2 < 0.2


@pytest.mark.parametrize("name", ["smolvlm", "qwen2_5_vl", "llava_next", "gemma3"])
def test_pairs_hold_where_images_are_grouped_by_size_or_cut(name: str) -> None:
    """Batches of images of one size are then not in the order in which the images came."""
    model, processor = tiny.build(name), tiny.processor(name)
    images = of_many_sizes(pictures(24))
    found = dymu.calibrate(model, processor, images, [0.4], batch_size=3, progress=False)
    full, left = counted(model, processor, images, found, found.budgets[0])
    assert found.forecasts is not None
    (entry,) = found.forecasts.budgets
    (expected,) = by_hand(images, full, left, entry.budget).budgets
    assert entry.slopes == pytest.approx(expected.slopes, abs=1e-6)
    assert (entry.to_mean, entry.to_reserve) == pytest.approx((expected.to_mean, expected.to_reserve), abs=1e-6)


def test_workers_fit_what_one_fits() -> None:
    model, processor, images = tiny.build("qwen2_5_vl"), tiny.processor("qwen2_5_vl"), of_many_sizes(pictures(24))
    alone = dymu.calibrate(model, processor, images, [0.4], batch_size=2, progress=False)

    def work(own: list[Any], told: Exchange) -> Thresholds:
        return share(model, processor, own, [0.4], told, batch_size=2, progress=False)[0]

    found = InThreads.run([images[:10], images[10:20], images[20:]], work)
    assert alone.forecasts is not None
    for other in found:
        assert other.forecasts == found[0].forecasts
        assert other.forecasts is not None
        assert other.forecasts.budgets[0].slopes == pytest.approx(alone.forecasts.budgets[0].slopes, abs=1e-6)


def test_images_that_cannot_be_read_take_no_part(tmp_path: Path, calibrated) -> None:
    model, processor, images, found = calibrated
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    some: list[Any] = [broken, *images[:20], broken, *images[20:]]
    with pytest.warns(UserWarning, match="skipped 2"):
        again = dymu.calibrate(model, processor, some, [12, 25, 49], batch_size=5, progress=False)
    assert again.forecasts == found.forecasts
    few = dymu.calibrate(model, processor, images[: FEWEST - 1], [12], progress=False)
    assert few.forecasts is None


# the file and the answer


def test_a_forecast_is_saved_and_loaded(tmp_path: Path, calibrated) -> None:
    *_, images, found = calibrated
    found.save(tmp_path / "t.json")
    loaded = Thresholds.load(tmp_path / "t.json")
    assert loaded == found
    assert json.loads((tmp_path / "t.json").read_text())["version"] == 3
    assert [loaded.forecast(image, 20) for image in images] == [found.forecast(image, 20) for image in images]


def test_files_of_version_2_are_read_and_hold_none(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    thresholds(forecasts=None).save(path)
    body = json.loads(path.read_text())
    del body["forecasts"]
    path.write_text(json.dumps({**body, "version": 2}))
    old = Thresholds.load(path)
    assert (old.version, old.forecasts) == (2, None)
    with pytest.raises(BadThresholds, match=r"t\.json holds no forecasts.*at least 20 images") as caught:
        old.forecast(picture(0.5), 20)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"means": [1.0]}, "one mean, sd and slope"),
        ({"sds": [-1.0] * 10}, "sds"),
        ({"means": [1e300] * 10}, "means"),
        ({"features": []}, "features"),
        ({"budgets": []}, "budgets"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_damaged_forecasts_are_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "t.json"
    thresholds().save(path)
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "forecasts": {**body["forecasts"], **change}}))
    with pytest.raises(BadThresholds, match=says):
        Thresholds.load(path)


def test_forecasts_are_for_the_calibrated_budgets() -> None:
    made = fitted()
    with pytest.raises(ValueError, match="one entry for every budget"):
        thresholds(forecasts=msgspec.structs.replace(made, budgets=made.budgets[1:]))
    with pytest.raises(ValueError, match="must rise"):
        msgspec.structs.replace(made, budgets=made.budgets[::-1])


@pytest.mark.parametrize("features", [("sharpness", *NAMES[1:], LOG_TOKENS), (*NAMES[:7], LOG_TOKENS)], ids=len)
def test_forecasts_from_other_features_are_refused(tmp_path: Path, features: tuple[str, ...]) -> None:
    """Such as the first seven, which dymu measured before; a file that holds them is read, and merges."""
    count = len(features)
    entries = tuple(BudgetForecast(budget, -1.0, (0.1,) * count, 0.0, 0.3) for budget in BUDGETS)
    thresholds(forecasts=Forecasts(features, (0.0,) * count, (1.0,) * count, entries)).save(tmp_path / "t.json")
    old = Thresholds.load(tmp_path / "t.json")
    assert old.per_layer(20) == [0.5, 0.6, 0.7]
    with pytest.raises(BadThresholds, match=r"t\.json holds forecasts from features that .* calibrate again") as caught:
        old.forecast(picture(0.5), 20)
    assert "\n" not in str(caught.value)


def test_the_fit_is_answered(calibrated) -> None:
    """Of the pictures it was made of: near what they keep, and mostly within the reserve."""
    model, processor, images, found = calibrated
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    left = kept(model, found, 25, pixels)
    told = [found.forecast(image, 25) for image in images]
    assert np.mean([one.expected for one in told]) == pytest.approx(np.mean(left), rel=0.02)
    assert np.corrcoef(left, [one.expected for one in told])[0, 1] > 0.8
    assert np.mean([count <= one.reserve for count, one in zip(left, told, strict=True)]) >= 0.9
    assert all(one.least <= one.expected <= one.reserve <= one.most == 49 for one in told)
    assert found.forecast(images[0], 49) == Forecast(49.0, 49, 49, 49)


@given(st.floats(10, 40), st.sampled_from([(0.2, 1), (0.9, 2)]))
@settings(deadline=None, max_examples=40)
def test_between_budgets_logarithms_are_interpolated(budget: float, shown: tuple[float, int]) -> None:
    made = thresholds()
    image = picture(*shown)
    one = made.forecast(image, budget)
    lower, upper = ((10, 20), (20, 40))[budget > 20]
    low, high = made.forecast(image, lower), made.forecast(image, upper)
    part = math.log(budget / lower) / math.log(upper / lower)
    between = math.exp((1 - part) * math.log(low.expected) + part * math.log(high.expected))
    if high.expected < high.most and low.expected > low.least:
        assert one.expected == pytest.approx(between)
    assert low.reserve <= one.reserve <= high.reserve


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(0, 1e6), st.floats(0, 1e6))
@settings(deadline=None, max_examples=50)
def test_whatever_was_fitted_the_answer_stays_within_bounds(
    intercept: float, slope: float, more: float, sd: float
) -> None:
    names = (*NAMES, "log_tokens")
    entries = tuple(BudgetForecast(b, intercept, (slope,) * len(names), 0.0, more) for b in BUDGETS)
    made = Forecasts(names, (0.0,) * len(names), (sd,) * len(names), entries)
    told = thresholds(forecasts=made).forecast(picture(0.7), 15)
    assert told.least <= told.expected <= told.most
    assert told.least <= told.reserve <= told.most


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_no_picture_keeps_fewer_than_the_least(tower: str, layers: int) -> None:
    model, processor = tiny.llava(tower, layer=-1), tiny.processor()
    merging = (-1.0,) * layers + (2.0,) * (tiny.LAYERS - layers)
    forced = Thresholds((Calibrated(20, merging),), merge_layers=None)
    pixels = processor(images=pictures(4), return_tensors="pt")["pixel_values"]
    least = fewest_of_any(tiny.PATCHES, layers)
    left = min(kept(model, forced, 20, pixels))
    assert least <= left <= least + 2


@given(st.integers(1, 5000), st.integers(0, 30))
def test_the_fewest_of_any_are_no_more_than_the_fewest_on_average(tokens: int, layers: int) -> None:
    assert 1 <= fewest_of_any(tokens, layers) <= max(fewest(tokens, layers), 1)


def test_tokens_are_given_where_images_differ() -> None:
    made = thresholds(image_tokens=60.5)
    image = picture(0.5, size=(80, 60))
    with pytest.raises(DymuError, match=r"images differ in how many tokens they have: give tokens=") as caught:
        made.forecast(image, 20)
    assert "\n" not in str(caught.value)

    class Processor:
        def _get_num_multimodal_tokens(self, image_sizes: list[tuple[int, int]]) -> dict[str, list[int]]:
            assert image_sizes == [(60, 80)]
            return {"num_image_tokens": [75]}

    assert made.forecast(image, 20, tokens=Processor()) == made.forecast(image, 20, tokens=75)
    assert made.forecast(image, 20, tokens=np.int64(75)).most == 75
    assert made.forecast(image, 20, tokens=75).least == 1
    for wrong in (0, -3, 7.5, "75", True, object()):
        with pytest.raises(DymuError, match="tokens are a whole number of at least 1, or a processor"):
            made.forecast(image, 20, tokens=wrong)


def test_a_processor_counts_what_the_model_gets() -> None:
    model, processor = tiny.build("qwen2_5_vl"), processor_for("qwen2_5_vl")
    images = of_many_sizes(pictures(20))
    found = dymu.calibrate(model, processor, images, [0.5], progress=False)
    full, _ = counted(model, processor.image_processor, images[:5], found, found.budgets[0])
    assert [found.forecast(image, 0.5, tokens=processor).most for image in images[:5]] == full
    assert len(set(full)) > 1


def test_pictures_come_in_every_form_and_bad_ones_are_refused(tmp_path: Path) -> None:
    made, image = thresholds(), picture(0.5)
    image.save(tmp_path / "a.png")
    plain = made.forecast(image, 20)
    forms: list[Any] = [tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()]
    for form in (*forms, np.asarray(image), {"image": image}, torch.from_numpy(np.array(image)).permute(2, 0, 1)):
        assert made.forecast(form, 20) == plain
    for size in ((1, 1), (30_000, 20)):
        with pytest.raises(BadImage, match="pixels"):
            made.forecast(Image.new("RGB", size), 20)
    with pytest.raises(BadImage, match="does not exist"):
        made.forecast(tmp_path / "nosuch.png", 20)
    with pytest.raises(BadBudget, match="no budget"):
        made.forecast(image)
    with pytest.raises(BadBudget, match="outside 10 to 40"):
        made.forecast(image, 99)


def test_the_demos_thresholds_hold_forecasts() -> None:
    """Of features that are measured today."""
    root = Path(__file__).parents[1]
    demo = Thresholds.load(root / "models/demo")
    simple, complex_ = (
        demo.forecast(image, 0.3) for image in (Image.new("RGB", (224, 224)), root / "examples/photo.jpg")
    )
    assert 1 <= simple.expected < complex_.expected < complex_.reserve < 256


# the command


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "forecasts.json"
    thresholds().save(path)
    return path


def test_the_command_tells_what_the_library_tells(dymu_command, photos, file) -> None:  # noqa: F811
    code, out, err = dymu_command("forecast", photos, "--thresholds", file, "-b", 20, "--json")
    assert code == 0, err
    data = last_object(out)
    assert "skipped: " in err
    assert "not-an-image.jpg" in err
    assert [Path(each["image"]).name for each in data["skipped"]] == ["not-an-image.jpg"]
    assert data["budget"] == 20
    loaded = Thresholds.load(file)
    for row in data["images"]:
        told = loaded.forecast(row["file"], 20)
        assert {name: row[name] for name in ("expected", "reserve", "least", "most")} == msgspec.to_builtins(told)
    assert len(data["images"]) == 6
    assert data["total"]["reserve"] == sum(row["reserve"] for row in data["images"])

    code, out, _ = dymu_command("forecast", photos, "--thresholds", file, "-b", 20)
    assert code == 0
    assert "total" in out
    assert f"{data['total']['expected']:,.1f}" in out
    code, out, _ = dymu_command("forecast", photos / "0.png", "--thresholds", file, "-b", 20)
    assert code == 0
    assert "total" not in out


def test_the_command_refuses(refused, dymu_command, folder, photos, file, tmp_path) -> None:  # noqa: F811
    words = ("forecast", photos, "--thresholds")
    assert "holds no forecasts" in refused(*words, folder, "-b", 20)
    assert "outside 10 to 40" in refused(*words, file, "-b", 99)
    assert "nosuch" in refused("forecast", tmp_path / "nosuch", "--thresholds", file, "-b", 20)
    bad = photos / "not-an-image.jpg"
    assert "none of the 1 images could be read" in refused("forecast", bad, "--thresholds", file, "-b", 20)
    many = tmp_path / "many.json"
    thresholds(image_tokens=60.5).save(many)
    assert "give --tokens, or the --model" in refused(*words, many, "-b", 20)
    code, out, _ = dymu_command(*words, many, "-b", 20, "--tokens", 75, "--json")
    assert (code, last_object(out)["images"][0]["most"]) == (0, 75)
    for wrong in (("forecast", photos, "-b", 20), (*words, file, "-b", 20, "--tokens", 9, "--model", folder)):
        assert dymu_command(*wrong)[0] == 2


def test_the_command_lets_the_models_processor_count(dymu_command, folder, photos, tmp_path) -> None:  # noqa: F811
    many = tmp_path / "many.json"
    thresholds(image_tokens=60.5).save(many)
    code, out, err = dymu_command("forecast", photos, "--thresholds", many, "--model", folder, "-b", 20, "--json")
    assert code == 0, err
    assert {row["most"] for row in last_object(out)["images"]} == {tiny.PATCHES}


def test_inspect_says_how_well_it_was_told(dymu_command, file, folder) -> None:  # noqa: F811
    assert "on images left out" in dymu_command("inspect", file)[1]
    assert last_object(dymu_command("inspect", file, "--json")[1])["forecasts"]["features"][0] == NAMES[0]
    assert dymu_command("inspect", folder)[0] == 0


def test_no_torch_is_imported(photo, file) -> None:  # noqa: F811
    code = (
        "import sys; from dymu.cli.main import main\n"
        "try: main()\n"
        "finally: print([name for name in ('torch', 'transformers', 'scipy') if name in sys.modules], file=sys.stderr)"
    )
    words = [sys.executable, "-c", code, "forecast", str(photo), "--thresholds", str(file), "-b", "20"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
