"""The picture of what merged: right colours, right places, and only for the right image."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, LlavaForConditionalGeneration

import dymu
import tiny
from dymu.families.resolve import resolve
from dymu.item import Item
from dymu.media.drawing import LONGEST, SHORTEST, fits, likeness
from dymu.media.images import load
from dymu.reducers import AveragePool, FixedMerge, Stride
from dymu.report import Report

GRID = 8
MEAN, STD = np.array([0.48, 0.46, 0.41]), np.array([0.27, 0.26, 0.28])


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something with structure at every scale, of its own in each colour."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells in (2, 5, 11, 40):
        noise = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=float) / 4
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def as_seen(image: Image.Image, side: int = 112) -> torch.Tensor:
    """[1, 3, GRID, GRID] of a square picture, as `dymu.apply` reports it."""
    pixels = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)) / 255
    normal = torch.tensor((pixels - MEAN) / STD).permute(2, 0, 1).float()
    return torch.nn.functional.adaptive_avg_pool2d(normal[None], GRID)


def report(seen: torch.Tensor, group: torch.Tensor | None = None, prefix: int = 0, dropped: int = 0) -> Report:
    """A report in which the left half of the patches is one group, and each patch on the right is its own.

    Args:
        prefix: tokens ahead of the patches.
        dropped: patches that the language model does not get.
    """
    if group is None:
        group = torch.arange(GRID * GRID).view(GRID, GRID)
        group[:, : GRID // 2] = 0
    group = group.flatten()
    first = torch.stack([(group == number).nonzero()[0, 0] for number in group])
    patch = torch.arange(prefix + len(group)) >= prefix
    at = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).double()
    placed = Item(
        leaders=torch.cat((torch.arange(prefix), first + prefix)),
        patch=patch,
        picture=torch.zeros(len(patch)),
        at=torch.cat((torch.zeros(prefix, 2), at[dropped:])),
        seen=torch.cat((torch.zeros(prefix, 3), seen[0].flatten(1).T[dropped:])),
        shown=seen,
        video=False,
    )
    return Report([placed])


def crop(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def pad(image: Image.Image, colour: tuple[int, int, int] = (122, 116, 104)) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@pytest.mark.parametrize("side", [336, 1000])
def test_a_group_has_its_mean_colour_and_an_outline(side: int) -> None:
    image = photo(side, side)
    picture = report(as_seen(image)).draw(image)
    assert picture.mode == "RGB"
    assert picture.size == (max(side, SHORTEST),) * 2
    drawn = np.asarray(picture).astype(int)
    original = np.asarray(image.resize(picture.size, Image.Resampling.LANCZOS)).astype(int)
    half, patch = picture.width // 2, picture.width // GRID

    inner = drawn[:, : half - 4].reshape(-1, 3)
    assert (inner == inner[0]).all()
    assert np.abs(inner[0] - original[:, :half].reshape(-1, 3).mean(0)).max() <= 0.51

    line = drawn[:, half - 4 : half + 4]
    assert (line.min(2).max(1) > 180).all()  # light
    assert (line.max(2).min(1) < 140).all()  # beside dark

    for row in range(GRID):  # single patches keep their pixels, but for the lines around them
        for column in range(GRID // 2, GRID):
            place = np.s_[row * patch + 5 : (row + 1) * patch - 5, column * patch + 5 : (column + 1) * patch - 5]
            assert (drawn[place] == original[place]).all()


@pytest.mark.parametrize("colour", ["white", "black", "grey"])
def test_lines_are_seen_on_any_colour(colour: str) -> None:
    image = Image.new("RGB", (700, 700), colour)
    drawn = np.asarray(report(as_seen(image)).draw(image).convert("L")).astype(int)
    across = drawn[40, 340:360]
    assert across.max() - across.min() > 90


def test_groups_apart_share_a_colour_and_equal_neighbours_no_line() -> None:
    image = photo(800, 800)
    group = torch.arange(GRID).remainder(2).expand(GRID, GRID).flatten()  # two groups in stripes
    drawn = np.asarray(report(as_seen(image), group).draw(image))
    columns = drawn[400, 50::100]
    assert (columns[0::2] == columns[0]).all()
    assert (columns[1::2] == columns[1]).all()
    assert (columns[0] != columns[1]).any()
    assert (drawn[:, 50] == drawn[0, 50]).all()


@pytest.mark.parametrize("size", [(900, 600), (500, 1000), (701, 699), (400, 300), (1000, 200)])
@pytest.mark.parametrize("way", ["squash", "crop", "pad"])
def test_recognises_how_the_image_was_fitted(way: str, size: tuple[int, int]) -> None:
    image = photo(*size)
    square = {"squash": image, "crop": crop(image), "pad": pad(image)}[way]
    seen = as_seen(square)[0].permute(1, 2, 0).numpy()
    alike = {fit: likeness(image, fit, seen) for fit in fits(*size, 1)}
    best = max(alike, key=lambda fit: alike[fit])
    assert alike[best] > 0.99
    assert best.name == way or size == (701, 699)


def test_recognises_a_narrower_crop() -> None:
    image = photo(800, 600)
    side = 600 * 224 // 256
    square = image.crop((400 - side // 2, 300 - side // 2, 400 + side // 2, 300 + side // 2))
    drawn = np.asarray(report(as_seen(square)).draw(image)).astype(int)
    original = np.asarray(image).astype(int)
    left, right = 400 - side // 2, 400 + side // 2
    assert (drawn[300, : left - 4].sum(1) < original[300, : left - 4].sum(1)).mean() > 0.95
    assert (drawn[300, left + 4 : 396] == drawn[300, left + 4]).all()
    assert (drawn[300, right + 4 :].sum(1) < original[300, right + 4 :].sum(1)).mean() > 0.95


def test_dims_what_a_crop_left_out() -> None:
    image = photo(1000, 700)
    drawn = np.asarray(report(as_seen(crop(image))).draw(image)).astype(float)
    original = np.asarray(image).astype(float)
    for outside in (np.s_[:, :146], np.s_[:, 854:]):
        assert drawn[outside].mean() < 0.6 * original[outside].mean()
        assert np.corrcoef(drawn[outside].ravel(), original[outside].ravel())[0, 1] > 0.99  # and still to be seen
    assert np.allclose(drawn[10:690, 155:490], original[:, 150:500].mean((0, 1)), atol=0.51)


def test_groups_in_the_padding_are_left_out() -> None:
    image = photo(800, 400)
    group = torch.zeros(GRID, GRID, dtype=torch.long)
    group[:2], group[-2:], group[2:-2, 4:] = 1, 2, 3
    drawn = np.asarray(report(as_seen(pad(image)), group.flatten()).draw(image))
    assert drawn.shape == (400, 800, 3)
    original = np.asarray(image).astype(float)
    for half in (np.s_[:, :400], np.s_[:, 400:]):
        inner = drawn[half][:, 5:-5]
        assert (inner == inner[0, 0]).all()
        assert np.allclose(inner[0, 0], original[half].mean((0, 1)), atol=0.51)


def test_refuses_another_image() -> None:
    image, other = photo(600, 500), photo(600, 500, seed=1)
    for square in (image, crop(image), pad(image)):
        assert report(as_seen(square)).draw(image)
        for wrong in (other, Image.new("RGB", (600, 500), "white")):
            with pytest.raises(ValueError, match="not the image that the model saw"):
                report(as_seen(square)).draw(wrong)
    with pytest.raises(ValueError, match="not the image that the model saw"):
        report(as_seen(Image.new("RGB", (600, 500), "white"))).draw(image)


def test_a_blank_image_is_drawn() -> None:
    image = Image.new("RGB", (500, 400), "orange")
    picture = report(as_seen(image)).draw(image)
    assert picture.size == (672, 538)
    assert picture.getpixel((20, 20)) == (255, 165, 0)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "I;16", "1"])
def test_any_mode(mode: str) -> None:
    image = photo(400, 300)
    if mode == "I;16":
        grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
        original = Image.fromarray(grey)
        assert original.mode == mode
    elif mode == "RGBA":
        original = image.convert(mode)
        original.paste((0, 0, 0, 0), (0, 0, 200, 150))
    else:
        original = image.convert(mode)
    assert report(as_seen(load(original).image)).draw(original).mode == "RGB"


def test_an_image_that_was_seen_lying_on_its_side_is_drawn_so() -> None:
    image, file = photo(500, 300), BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file, "jpeg", exif=exif, quality=95)
    turned = Image.open(file)
    upright = load(turned).image
    assert upright.size == (300, 500)
    assert report(as_seen(upright)).draw(turned).size == (403, 672)
    assert report(as_seen(turned)).draw(turned).size == (672, 403)


def test_a_large_image_is_drawn_smaller() -> None:
    image = photo(3000, 1500)
    assert report(as_seen(image)).draw(image).size == (LONGEST, LONGEST // 2)


def test_tokens_that_are_no_patches() -> None:
    image = photo(672, 672)
    plain = report(as_seen(image))
    group = plain.group()
    assert np.array_equal(report(as_seen(image), group, prefix=2).draw(image), plain.draw(image))
    first_dropped = np.asarray(report(as_seen(image), group[1:], dropped=1).draw(image)).astype(int)
    assert first_dropped[:80, :80].mean() < np.asarray(image)[:80, :80].mean() * 0.7  # the encoder's first patch
    shuffled = report(as_seen(image))
    shuffled.items[0].at[5] = 0
    with pytest.raises(ValueError, match=r"no grid of 8 × 8 patches"):
        shuffled.draw(image)
    with pytest.raises(IndexError, match="no image 1"):
        plain.draw(image, 1)
    with pytest.raises(IndexError, match="0 images"):
        Report().draw(image)


@pytest.mark.parametrize("tower", tiny.TOWERS)
@pytest.mark.parametrize("way", ["squash", "crop"])
def test_draws_what_a_model_saw(tower: str, way: str) -> None:
    model = tiny.llava(tower)
    side = {"height": tiny.SIDE, "width": tiny.SIDE}
    size = side if way == "squash" else {"shortest_edge": tiny.SIDE}
    kind = CLIPImageProcessorPil if way == "squash" else BitImageProcessorPil
    images = [photo(300, 200, seed) for seed in range(2)]
    pixels = kind(size=size, crop_size=side)(images=images, return_tensors="pt")["pixel_values"]
    parts = resolve(model)
    with dymu.apply(model, merge=FixedMerge(keep=20)) as handle:
        parts.inner.get_image_features(
            pixels,
            vision_feature_layer=-2,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            output_hidden_states=True,
        )
        for i, image in enumerate(images):
            drawn = np.asarray(handle.last.draw(image, i)).astype(int)
            original = np.asarray(image.resize((672, 448), Image.Resampling.LANCZOS)).astype(int)
            dimmed = (drawn[:, :100].mean() < 0.7 * original[:, :100].mean()).item()
            assert dimmed == (way == "crop")
            with pytest.raises(ValueError, match="not the image"):
                handle.last.draw(image, 1 - i)


def test_a_report_says_itself_in_one_line_and_shows_itself_in_a_notebook():
    model = tiny.llava()
    with dymu.apply(model, merge=dymu.FixedMerge(20)) as handle:
        assert handle.last._repr_png_() is None
        model.get_image_features(tiny.pictures(2))
        assert repr(handle).startswith("<dymu.Handle of LlavaForConditionalGeneration: FixedMerge(keep=20")
        assert repr(handle.last) == "<dymu report: kept 20 of 49, 20 of 49 tokens; KV cache 0 of 0 bytes>"
        assert repr(handle.last.items[0]) == "<dymu image: kept 20 of 49 tokens>"
        shown = Image.open(BytesIO(handle.last._repr_png_()))
    assert shown.format == "PNG"
    assert len(shown.convert("RGB").getcolors(2**24)) > 20


@pytest.mark.parametrize(("width", "height"), [(31, 99), (99, 31), (17, 41), (13, 55), (30, 30)])
def test_sides_that_are_no_multiple_of_the_patch(width: int, height: int) -> None:
    """The grid is what fits into the picture from its upper left corner on; the rest is dimmed."""
    model, image = tiny.llava("dinov2"), photo(width, height)
    pixels = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)(images=[image], return_tensors="pt")
    rows, columns = height // tiny.PATCH, width // tiny.PATCH
    for rule in (FixedMerge(0.5), AveragePool(0.3), Stride(0.3, fill="nearest")):
        with dymu.apply(model, merge=rule) as handle:
            model.get_image_features(**pixels)
            assert handle.last.items[0].shown.shape == (1, 3, rows, columns)
            drawn = handle.last.draw(image)
    scale = drawn.height / height
    plain = np.asarray(image.resize(drawn.size, Image.Resampling.LANCZOS)).astype(int)
    below, right = (round(side * tiny.PATCH * scale) + 4 for side in (rows, columns))
    for edge in (np.s_[below:], np.s_[:, right:]):
        if plain[edge].size:
            assert np.abs(np.asarray(drawn)[edge] - (plain[edge] * 0.35 + 20)).max() <= 1


def test_patches_that_are_no_squares() -> None:
    config = tiny.llava("dinov2").config
    config.vision_config.patch_size = [4, 7]
    model = LlavaForConditionalGeneration(config).eval()
    with dymu.apply(model, merge=FixedMerge(10)) as handle:
        model.get_image_features(tiny.pictures(1))
        assert handle.last.items[0].shown.shape == (1, 3, 7, 4)
        assert handle.last.kept == [10]
