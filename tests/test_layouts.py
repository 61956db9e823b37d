"""What the contract asks, for every way in which a family lays images and videos out in the prompt."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

import dymu
import tiny
from by_hand import unmerged_by_hand
from dymu.errors import BadBudget, BadPrompt, UnsupportedModel
from dymu.hooks.versions import cuts_encoded_images
from dymu.item import Item
from dymu.reducers import AveragePool, FixedMerge, RandomKeep, Reducer, Shown, Stage, Stride, ThresholdMerge

pytestmark = pytest.mark.one_of_each


class InLayers(FixedMerge):
    """Merges in the encoder alone."""

    def reduces(self, stage: Stage, shown: Shown) -> bool:
        return stage == "in_layer"


NOTHING = ThresholdMerge((2.0,) * tiny.LAYERS)
NOTHING_ALIKE = ThresholdMerge((1.0,) * tiny.LAYERS)
SOME = ThresholdMerge((0.9,) * tiny.LAYERS)
SETTLED = ThresholdMerge((0.95,) * tiny.LAYERS, images=(0.9, 0.8), frames=(0.9,), over_time=0.7)
"""Merges once more where tokens stand in the prompt, and from frame to frame."""

MODELS = [
    ("clip", "llama", "llava_next"),
    ("siglip", "qwen2", "llava_onevision"),
    ("dinov2", "llama", "llava_next_video"),
]
VIDEO_MODELS = MODELS[1:]
GRID = tiny.SIDE // tiny.PATCH


@functools.cache
def made(name: tuple[str, str, str]) -> Any:
    """The tests only apply and remove DyMU, so they may share the models."""
    return tiny.llava(*name)


@pytest.fixture(params=MODELS, ids="-".join, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


@pytest.fixture(params=VIDEO_MODELS, ids="-".join, scope="module")
def video_model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


@dataclass(frozen=True)
class Photo:
    """An image in a prompt; `look` says what it shows."""

    height: int
    width: int
    look: int = 0


@dataclass(frozen=True)
class Video:
    """A video in a prompt. A call takes its videos in one tensor, so all have as many frames."""

    frames: int
    look: int = 0


Part = int | Photo | Video
"""A piece of a prompt; a number is that many words."""
Row = Sequence[Part]


@functools.cache
def picture(photo: Photo) -> Image.Image:
    """Fields of colour that flow into each other, one in some looks."""
    generator = torch.Generator().manual_seed(photo.look)
    cells = 1 + photo.look % 6
    coarse = torch.rand(1, 3, cells, cells, generator=generator) * 255
    fine = torch.nn.functional.interpolate(coarse, size=(photo.height, photo.width), mode="bicubic")
    return Image.fromarray(fine[0].clamp(0, 255).byte().permute(1, 2, 0).numpy())


@functools.cache
def frames_of(video: Video) -> Tensor:
    """[frames, 3, SIDE, SIDE]; each frame differs a little from the one before, and some are smoother than others."""
    generator = torch.Generator().manual_seed(video.look)
    frames = []
    for index in range(video.frames):
        cells = 2 + (video.look + index) % 3
        coarse = torch.randn(1, 3, cells, cells, generator=generator)
        frames.append(torch.nn.functional.interpolate(coarse, size=(tiny.SIDE, tiny.SIDE), mode="bilinear")[0])
    return torch.stack(frames)


def video_tokens(model: Any, video: Video) -> int:
    """Placeholders of a video: LLaVA-OneVision halves the sides of frames rounding up and ends a video with a newline,
    LLaVA-NeXT-Video rounds down."""
    if model.config.model_type == "llava_onevision":
        return video.frames * ceil(GRID / 2) ** 2 + 1
    return video.frames * (GRID // 2) ** 2


@functools.cache
def whole_processor(family: str) -> Any:
    return tiny.full_processor(family)


def scene(model: Any, rows: Sequence[Row], side: str = "left") -> dict[str, Any]:
    """What the model takes to see these prompts."""
    family = model.config.model_type
    inputs: dict[str, Any] = {}
    image_counts: Iterator[int] = iter(())
    photos = [[picture(part) for part in row if isinstance(part, Photo)] for row in rows]
    if any(photos):
        processor = whole_processor(family)
        given: Any = [row for row in photos if row]
        if family != "llava_onevision":
            given = [photo for row in photos for photo in row]
        seen = processor.image_processor(given, return_tensors="pt")
        total = sum(len(row) for row in photos)
        image_counts = iter([processor.replace_image_token(seen, image_idx=i).count("<image>") for i in range(total)])
        inputs.update(seen)
    videos = [frames_of(part) for row in rows for part in row if isinstance(part, Video)]
    if videos:
        inputs["pixel_values_videos"] = torch.stack(videos)
    prompts = []
    for row in rows:
        ids = []
        for index, part in enumerate(row):
            if isinstance(part, Photo):
                ids.append(torch.full((next(image_counts),), tiny.IMAGE_TOKEN))
            elif isinstance(part, Video):
                ids.append(torch.full((video_tokens(model, part),), tiny.VIDEO_TOKEN))
            else:
                ids.append(tiny.prompt(model, part, seed=part + 10 * index))
        prompts.append(torch.cat(ids))
    return {**tiny.pad(prompts, side), **inputs}


def items_of(rows: Sequence[Row]) -> list[list[int]]:
    """Which items of the report are each row's: the images of all rows come first, then the videos."""
    of: list[list[int]] = [[] for _ in rows]
    number = 0
    for kind in (Photo, Video):
        for index, row in enumerate(rows):
            for part in row:
                if isinstance(part, kind):
                    of[index].append(number)
                    number += 1
    return of


def answer(model: Any, new_tokens: int = 4, **inputs: Any) -> Any:
    never = [tiny.IMAGE_TOKEN, tiny.VIDEO_TOKEN]
    return model.generate(**{"do_sample": False, "max_new_tokens": new_tokens, "suppress_tokens": never, **inputs})


def stored(out: Any) -> int:
    """Tokens that the cache of an output really holds."""
    return int(out.past_key_values.layers[0].keys.shape[2])


def is_word(ids: Tensor) -> Tensor:
    return (ids != tiny.IMAGE_TOKEN) & (ids != tiny.VIDEO_TOKEN)


def merged_length(rows: Sequence[Row], inputs: dict[str, Any], kept: Sequence[int]) -> int:
    """Tokens of the longest merged prompt."""
    words = (is_word(inputs["input_ids"]) & inputs["attention_mask"].bool()).sum(1).tolist()
    return max(text + sum(kept[i] for i in own) for text, own in zip(words, items_of(rows), strict=True))


# ------------------------------------------------------------------------------------------------ prompts of all kinds

TILES, VIDEO = Photo(50, 90, 2), Video(5, 1)
TALL, WIDE, HUGE = Photo(130, 23, 3), Photo(31, 170, 2), Photo(300, 260, 4)
"""HUGE fills 30 to 36 tiles, which LLaVA-OneVision shrinks to about 9."""

IMAGE_ROWS: dict[str, list[Row]] = {
    "tall": [(3, TALL, 5)],
    "wide": [(3, WIDE, 5)],
    "huge": [(2, HUGE, 4)],
    "image-text-image": [(3, Photo(60, 28, 1), 4, Photo(29, 57, 2), 5)],
    "four-images": [(2, Photo(28, 28, 1), Photo(90, 30, 2), 3, Photo(20, 75, 3), Photo(56, 57, 4), 6)],
    "batch": [
        (3, Photo(40, 80, 1), 4),
        (9, Photo(84, 84, 2), Photo(30, 30, 3), 2),
        (2, Photo(28, 29, 7), 6, Photo(10, 60, 5), 1, Photo(60, 10, 6), 3),
        (8,),
    ],
}
VIDEO_ROWS: dict[str, list[Row]] = {
    "one-frame": [(3, Video(1, 2), 5)],
    "many-frames": [(3, Video(32, 1), 5)],
    "two-videos": [(3, Video(5, 1), 2, Video(5, 2), 5)],
    "image-and-video": [(3, Photo(30, 60, 1), 2, Video(4, 2), 5)],
    "video-and-image": [(3, Video(4, 2), 2, Photo(30, 60, 1), 5)],
    "batch": [
        (3, Video(3, 1), 4),
        (2, Photo(50, 30, 2), 7),
        (6, Photo(56, 28, 3), 1, Video(3, 4), Photo(20, 80, 5), 2),
        (1, Video(3, 6), Video(3, 7), 9),
        (5,),
    ],
}
CASES = [(name, case) for name in MODELS for case in IMAGE_ROWS] + [
    (name, f"video-{case}") for name in VIDEO_MODELS for case in VIDEO_ROWS
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0][2]}-{case[1]}")
def shown(request: pytest.FixtureRequest) -> tuple[Any, list[Row]]:
    name, case = request.param
    rows = VIDEO_ROWS[case.removeprefix("video-")] if case.startswith("video-") else IMAGE_ROWS[case]
    return made(name), rows


def sizes(largest: int = 120) -> st.SearchStrategy[tuple[int, int]]:
    """Height and width, from 1:6 to 6:1, many of them next to where another tile begins."""
    near = st.builds(lambda tiles, more: tiles * tiny.SIDE + more, st.integers(1, 6), st.integers(-1, 1))
    side = st.one_of(near, st.integers(12, 200)).filter(lambda length: length <= largest)
    return st.tuples(side, side).filter(lambda size: max(size) <= 6 * min(size))


def photos(largest: int = 120) -> st.SearchStrategy[Photo]:
    return st.builds(lambda size, look: Photo(*size, look), sizes(largest), st.integers(0, 30))


@st.composite
def batches(draw: st.DrawFn, videos: bool) -> list[Row]:
    """One to three prompts of up to four items, of which some follow each other without a word between them."""
    frames = draw(st.integers(1, 6))
    item = photos(90) | st.builds(Video, st.just(frames), st.integers(0, 30)) if videos else photos(90)
    rows: list[Row] = []
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.lists(st.one_of(item, st.integers(1, 5)), min_size=1, max_size=4))
        rows.append((draw(st.integers(1, 4)), *parts, draw(st.integers(1, 6))))
    return rows


def check_nothing_merged(model: Any, rows: Sequence[Row], side: str) -> None:
    inputs = scene(model, rows, side)
    there = inputs["attention_mask"].bool()
    stock = model(**inputs)
    for rule in (NOTHING, NOTHING_ALIKE):
        with dymu.apply(model, merge=rule) as handle:
            out = model(**inputs)
            tiny.close(out.logits[there], stock.logits[there])
            assert handle.last.kept == handle.last.original
            assert sum(handle.last.original) == int((~is_word(inputs["input_ids"])).sum())
            assert stored(out) == int(there.sum(1).max())
    assert torch.equal(model(**inputs).logits, stock.logits)


def check_rows_alone(model: Any, rows: Sequence[Row], side: str, rule: Reducer) -> None:
    inputs = scene(model, rows, side)
    there = inputs["attention_mask"].bool()
    with dymu.apply(model, merge=rule) as handle:
        out = model(**inputs)
        together = handle.last
        assert stored(out) == merged_length(rows, inputs, together.kept)
        for index, own in enumerate(items_of(rows)):
            alone = model(**scene(model, [rows[index]]))
            assert handle.last.kept == [together.kept[i] for i in own]
            for here, i in enumerate(own):
                assert torch.equal(handle.last.group(here), together.group(i))
            tiny.close(out.logits[index][there[index]], alone.logits[0], part=1e-4)


def test_nothing_merged_equals_the_untouched_model(shown):
    check_nothing_merged(*shown, "left")


def test_nothing_merged_gives_the_same_text(shown):
    model, rows = shown
    inputs = scene(model, rows)
    text = answer(model, **inputs)
    for rule in (NOTHING, NOTHING_ALIKE):
        with dymu.apply(model, merge=rule):
            assert torch.equal(answer(model, **inputs), text)
    assert torch.equal(answer(model, **inputs), text)


@pytest.mark.parametrize(("side", "rule"), [("left", SOME), ("right", SOME), ("left", SETTLED)])
def test_a_row_of_a_batch_gets_what_it_gets_alone(shown, side, rule):
    model, rows = shown
    if len(rows) == 1:
        rows = [*rows, (7, *rows[0][1:-1], 2), (4, Photo(28, 50, 9), 5)]
    check_rows_alone(model, rows, side, rule)


@given(data=st.data())
@settings(max_examples=6)
def test_any_batch_without_merging(model, data):
    videos = model.config.model_type != "llava_next"
    check_nothing_merged(model, data.draw(batches(videos)), data.draw(st.sampled_from(["left", "right"])))


@given(data=st.data())
@settings(max_examples=6)
def test_any_batch_with_merging(model, data):
    videos = model.config.model_type != "llava_next"
    side, rule = data.draw(st.sampled_from(["left", "right"])), data.draw(st.sampled_from([SOME, SETTLED]))
    check_rows_alone(model, data.draw(batches(videos)), side, rule)


def test_shapes_are_the_untouched_models(shown):
    model, rows = shown
    inputs = scene(model, rows)
    labels = torch.where(is_word(inputs["input_ids"]) & inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    stock, text = model(**inputs, labels=labels, output_hidden_states=True), answer(model, **inputs)
    with dymu.apply(model, merge=SETTLED) as handle:
        out = model(**inputs, labels=labels, output_hidden_states=True)
        assert set(out) == set(stock)
        assert out.logits.shape == stock.logits.shape
        assert torch.isfinite(out.loss)
        assert [hidden.shape for hidden in out.hidden_states] == [hidden.shape for hidden in stock.hidden_states]
        for modality in ("image", "video"):
            if tiny.features_in(stock, modality) is not None:
                assert tiny.features_in(out, modality).shape == tiny.features_in(stock, modality).shape
        assert out.past_key_values.get_seq_length() == stock.past_key_values.get_seq_length()
        generated = answer(model, **inputs)
        assert generated.shape == text.shape
        assert torch.equal(generated[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
        assert all(kept < original for kept, original in zip(handle.last.kept, handle.last.original, strict=True))
        for i, original in enumerate(handle.last.original):
            assert handle.last.group(i).shape == (original,)


def test_tokens_of_one_group_share_their_logits(shown):
    model, rows = shown
    inputs = scene(model, rows)
    with dymu.apply(model, merge=SOME) as handle:
        logits = model(**inputs).logits
        number = 0
        for token in (tiny.IMAGE_TOKEN, tiny.VIDEO_TOKEN):
            given = logits[inputs["input_ids"] == token]
            for item in handle.last.items:
                if item.video == (token == tiny.VIDEO_TOKEN):
                    mine, given = given[: len(item.leaders)], given[len(item.leaders) :]
                    assert torch.equal(mine, mine[item.leaders])
                    number += 1
            assert len(given) == 0
        assert number == len(handle.last.items)


# ------------------------------------------------------------------------------------- placement, done another way


@contextmanager
def what_is_laid_out(model: Any) -> Iterator[list[Tensor]]:
    """Collects, with DyMU applied, the tokens [pictures, N, C] that the family's own code then lays out."""
    inner, found = model.model, []
    hooks = [inner.multi_modal_projector.register_forward_hook(lambda _module, _args, out: found.append(out))]
    if hasattr(inner, "vision_resampler"):
        pool = inner.vision_resampler.pool
        hooks.append(pool.register_forward_pre_hook(lambda _module, args: found.append(args[0].flatten(2).mT)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def numbered(rows: Tensor) -> Tensor:
    """int64 [N]: equal rows have equal numbers, counted by first appearance."""
    _, same = rows.unique(dim=0, return_inverse=True)
    first = torch.full((int(same.max()) + 1,), len(same)).scatter_reduce(0, same, torch.arange(len(same)), "amin")
    return first.argsort().argsort()[same]


def one_hot(pictures: Tensor) -> Tensor:
    """float64 [pictures, N, merged tokens + 1] for laid-out tokens [pictures, N, C]: one column for every merged token,
    the last one for the newline; tokens that are gone are 0."""
    labels, count = [], 0
    for tokens in pictures:
        labels.append(numbered(tokens) + count)
        count += int(labels[-1].max()) - count + 1
    rows = torch.nn.functional.one_hot(torch.stack(labels), count + 1).double()
    return rows * (pictures != 0).any(-1)[..., None]


def merged_behind(mixtures: Tensor) -> Tensor:
    """int64 [N], the groups that mixtures [N, merged tokens + 1] of merged tokens make; -1: nothing is left."""
    own = torch.where(mixtures[:, -1] == 1, torch.arange(len(mixtures)), -1)  # every newline is itself alone
    gone = (mixtures == 0).all(1)
    found = numbered(torch.cat(((mixtures * 1e9).round(), own[:, None]), 1)[~gone])
    return torch.full((len(mixtures),), -1).masked_scatter(~gone, found)


def tiles(model: Any, photo: Photo, of_its_row: int) -> int:
    """Pictures that the encoder gets for one of so many photos of a prompt."""
    if model.config.model_type == "llava_onevision" and of_its_row > 1:
        return 1
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return int(image_size_to_num_patches([photo.height, photo.width], tiny.PINPOINTS, tiny.SIDE))


def expected_images(model: Any, laid_out: Tensor, photos: Sequence[Photo], of_its_row: Sequence[int]) -> list[Tensor]:
    """The groups of images, by the family's own packing of what stands for which merged token."""
    counts = [tiles(model, photo, of) for photo, of in zip(photos, of_its_row, strict=True)]
    assert len(laid_out) == sum(counts)
    groups = []
    for photo, pictures in zip(photos, laid_out.split(counts), strict=True):
        rows = one_hot(pictures)
        newline = torch.zeros(rows.shape[-1], dtype=torch.float64)
        newline[-1] = 1
        more: dict[str, Any] = {"vision_feature_select_strategy": model.config.vision_feature_select_strategy}
        if model.config.model_type == "llava_onevision":
            more = {"vision_aspect_ratio": model.config.vision_aspect_ratio}
        size = torch.tensor([[photo.height, photo.width]])
        (mixtures,), _ = model.model.pack_image_features([rows], size, image_newline=newline, **more)
        groups.append(merged_behind(mixtures))
    return groups


def expected_video(model: Any, laid_out: Tensor) -> Tensor:
    """The groups of a video, by the family's own pooling of its frames."""
    rows = one_hot(laid_out)
    if model.config.model_type == "llava_next_video":
        return merged_behind(model.model.vision_resampler(rows).flatten(0, 1))
    mixtures = model.model.apply_pooling(rows).flatten(0, 1)
    newline = torch.zeros(1, mixtures.shape[1], dtype=torch.float64)
    newline[0, -1] = 1
    return merged_behind(torch.cat((mixtures, newline)))


def check_groups(model: Any, found: Sequence[Tensor], expected: Sequence[Tensor], features: Sequence[Tensor]) -> None:
    assert len(found) == len(expected) == len(features)
    newline = model.model.image_newline
    for group, other, rows in zip(found, expected, features, strict=True):
        assert torch.equal(group, other)
        there = group >= 0
        first = torch.full((int(group.max()) + 1,), len(group))
        first = first.scatter_reduce(0, group[there], there.nonzero()[:, 0], "amin")
        torch.testing.assert_close(rows[there], rows[first[group[there]]], atol=1e-5, rtol=0)
        learned = (rows == newline).all(1)
        assert (group[there].bincount()[group[learned]] == 1).all()


def check_images(model: Any, shots: Sequence[Photo], rule: Reducer, together: bool = False) -> None:
    """Images of one prompt (`together`) or of a prompt each lie as the family's own code lays their tokens out."""
    inputs = scene(model, [(1, *shots)] if together else [(1, shot) for shot in shots])
    del inputs["input_ids"], inputs["attention_mask"]
    with dymu.apply(model, merge=rule) as handle, what_is_laid_out(model) as laid_out:
        features = model.get_image_features(**inputs).pooler_output
        found = [handle.last.group(i) for i in range(len(shots))]
        kept, items = handle.last.kept, handle.last.items
    expected = expected_images(model, laid_out[-1], shots, [len(shots) if together else 1] * len(shots))
    check_groups(model, found, expected, features)
    assert kept == [int(group.max()) + 1 for group in expected]
    for item, shot in zip(items, shots, strict=True):
        check_views(item)
        whole = item.views[0].token
        assert whole.shape == (GRID, GRID)
        assert torch.equal(whole.flatten(), torch.arange(GRID**2))
        if item.pictures > 1:
            rows, columns = item.views[1].token.shape
            assert rows == pytest.approx(columns * shot.height / shot.width, rel=0.2, abs=2)


def check_views(item: Item) -> None:
    """The views show every patch, and nothing else."""
    places = torch.cat([view.token[view.token >= 0] for view in item.views])
    assert torch.equal(places.unique(), item.patch.nonzero()[:, 0])


@given(shot=photos(200))
@settings(max_examples=10)
@example(Photo(28, 168, 1))
@example(Photo(168, 28, 2))
@example(Photo(27, 162, 3))
@example(Photo(29, 29, 0))
@example(HUGE)
def test_an_image_lies_as_the_familys_own_code_lays_it(model, shot):
    check_images(model, [shot], SOME)


@pytest.mark.parametrize("together", [True, False])
def test_images_lie_as_the_familys_own_code_lays_them(model, together):
    shots = [Photo(28 * rows + more, 28 * columns - more, rows + columns) for rows, columns, more in
             [(1, 1, 1), (1, 4, -1), (3, 2, 0), (2, 2, 1), (4, 1, 3)]]  # fmt: skip
    check_images(model, shots, SOME, together)


@pytest.mark.parametrize("rule", [NOTHING_ALIKE, InLayers(0.4)])
def test_other_rules_lie_so_too(model, rule):
    check_images(model, [Photo(30, 80, 2), HUGE], rule)


@given(frames=st.integers(1, 12), look=st.integers(0, 30), count=st.integers(1, 2))
@settings(max_examples=6)
@example(frames=32, look=2, count=1)
def test_a_video_lies_as_the_familys_own_code_pools_it(video_model, frames, look, count):
    check_videos(video_model, [Video(frames, look + i) for i in range(count)], SOME)


@pytest.mark.parametrize("rule", [NOTHING_ALIKE, InLayers(0.4)])
def test_other_rules_pool_so_too(video_model, rule):
    check_videos(video_model, [Video(4, 1), Video(4, 2)], rule)


def check_videos(model: Any, videos: Sequence[Video], rule: Reducer) -> None:
    pixels = torch.stack([frames_of(video) for video in videos])
    with dymu.apply(model, merge=rule) as handle, what_is_laid_out(model) as laid_out:
        features = model.get_video_features(pixel_values_videos=pixels).pooler_output
        found = [handle.last.group(i) for i in range(len(videos))]
        kept, items = handle.last.kept, handle.last.items
    # Where frames are pooled ahead of the projector, they are laid out there.
    given = laid_out[0].split(videos[0].frames)
    expected = [expected_video(model, own) for own in given]
    check_groups(model, found, expected, [rows.flatten(0, -2) for rows in features])
    assert kept == [int(group.max()) + 1 for group in expected]
    for item in items:
        check_views(item)
        assert len(item.views) == item.pictures == videos[0].frames


@pytest.mark.parametrize("layer", [[-2, 1], [1, -1, 2]], ids=str)
def test_features_of_several_layers(model, layer):
    tower, decoder, family = next(name for name in MODELS if name[2] == model.config.model_type)
    several = tiny.llava(tower, decoder, family, layer=layer)
    check_images(several, [TILES, HUGE], SOME)
    rows: list[Row] = [(3, TILES, 5), (4, Photo(28, 50, 9), 2)]
    check_nothing_merged(several, rows, "left")
    check_rows_alone(several, rows, "left", SOME)
    if family != "llava_next":
        check_videos(several, [VIDEO], SOME)
        check_rows_alone(several, [(3, VIDEO, 5), (2, TILES, 1, Video(5, 2), 4)], "left", SOME)


@pytest.mark.parametrize("stride", [2, 3])
def test_frames_pooled_by_their_largest_values(stride):
    model = tiny.llava("clip", "llama", "llava_next_video")
    model.model.vision_resampler.pool = torch.nn.MaxPool2d(stride, stride)
    for rule in (NOTHING_ALIKE, SOME, InLayers(0.4)):
        check_videos(model, [VIDEO, Video(5, 2)], rule)


def test_frames_pooled_with_weights_are_refused():
    model = tiny.llava("clip", "llama", "llava_next_video")
    model.model.vision_resampler.pool = torch.nn.Conv2d(32, 32, 2, 2)
    stock = model(**scene(model, [(3, TILES, 4)])).logits
    with dymu.apply(model, merge=NOTHING):
        with pytest.raises(UnsupportedModel, match="learned weights"):
            model(**scene(model, [(3, VIDEO, 4)]))
        tiny.close(model(**scene(model, [(3, TILES, 4)])).logits, stock)


def test_tiles_in_one_list(model):
    """Families also take the tiles of all images one after the other, without padding."""
    shots = [TILES, Photo(28, 28, 1), Photo(90, 30, 2)]
    inputs = scene(model, [(1, shot) for shot in shots])
    del inputs["input_ids"], inputs["attention_mask"]
    with dymu.apply(model, merge=SOME) as handle:
        padded = model.get_image_features(**inputs).pooler_output
        groups = [handle.last.group(i) for i in range(len(shots))]
        of = [tiles(model, shot, 1) for shot in shots]
        inputs["pixel_values"] = torch.cat([own[:count] for own, count in zip(inputs["pixel_values"], of, strict=True)])
        features = model.get_image_features(**inputs).pooler_output
        for i, group in enumerate(groups):
            assert torch.equal(handle.last.group(i), group)
            torch.testing.assert_close(features[i], padded[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("aspect", ["anyres_max_2", "anyres_max_4", "anyres_max_36"])
def test_images_shrunk_to_other_sizes(aspect):
    model = tiny.llava("siglip", "qwen2", "llava_onevision")
    model.config.vision_aspect_ratio = model.model.config.vision_aspect_ratio = aspect
    for shot in (TILES, HUGE, Photo(84, 100, 3)):
        check_images(model, [shot], SOME)


@pytest.mark.parametrize("row", [(3, TILES, 2, Photo(28, 60, 1), 4), (3, VIDEO, 4), (3, TILES, 2, VIDEO, 4)])
def test_embeddings_instead_of_ids_and_features_ahead(video_model, row):
    inputs = scene(video_model, [row])
    with dymu.apply(video_model, merge=SOME) as handle:
        out = video_model(**inputs)
        groups = [handle.last.group(i) for i in range(len(handle.last.items))]
        given = {name: value for name, value in inputs.items() if name != "input_ids"}
        embeds = video_model.get_input_embeddings()(inputs["input_ids"])
        by_embeds = video_model(inputs_embeds=embeds, **given)
        assert torch.equal(by_embeds.logits, out.logits)
        ahead = {}
        if "pixel_values" in given:
            of_images = {name: given[name] for name in given if name not in ("attention_mask", "pixel_values_videos")}
            ahead["image"] = video_model.get_image_features(**of_images)
        if "pixel_values_videos" in given:
            ahead["video"] = video_model.get_video_features(pixel_values_videos=given["pixel_values_videos"])
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        by_features = video_model(**ids, mm_encoder_outputs=ahead)
        assert torch.equal(by_features.logits, out.logits)
        assert stored(by_features) == stored(by_embeds) == stored(out)
        assert len(handle.last.items) == len(groups), "encoded by two calls, they are shown by one"
        for i, group in enumerate(groups):
            assert torch.equal(handle.last.group(i), group)


# ----------------------------------------------------------------------------------------------- the language model


@pytest.mark.parametrize("rule", [SOME, SETTLED], ids=["some", "settled"])
@pytest.mark.parametrize("item", [Photo(50, 90, 2), Photo(170, 165, 1)], ids=["tiles", "many-tiles"])
def test_merged_logits_of_tiles_equal_an_independent_implementation(model, item, rule):
    check_by_hand(model, (4, item, 7), rule)


@pytest.mark.parametrize("rule", [SOME, SETTLED], ids=["some", "settled"])
@pytest.mark.parametrize(
    "row", [(4, VIDEO, 7), (4, TILES, 3, VIDEO, 7), (4, VIDEO, 3, TILES, 7)], ids=["video", "both", "video-first"]
)
def test_merged_logits_of_a_video_equal_an_independent_implementation(video_model, row, rule):
    check_by_hand(video_model, row, rule)


def check_by_hand(model: Any, row: Row, rule: Reducer) -> None:
    inputs = scene(model, [row])
    ids = inputs["input_ids"][0]
    with dymu.apply(model, merge=rule) as handle:
        out = model(**inputs)
        groups = [handle.last.group(i) for i in range(len(handle.last.items))]
        assert sum(handle.last.kept) < sum(handle.last.original)
    features = {tiny.IMAGE_TOKEN: tiny.features_in(out), tiny.VIDEO_TOKEN: tiny.features_in(out, "video")}
    channels = model.config.text_config.hidden_size
    joined = torch.zeros(len(ids), channels)
    group, count = torch.full((len(ids),), -1), 0
    for token, own in zip([token for token in features if bool((ids == token).any())], groups, strict=True):
        joined[ids == token] = features[token]
        group[ids == token] = own + count
        count += int(own.max()) + 1
    shown = ~is_word(ids)
    expected = unmerged_by_hand(model, torch.where(shown, tiny.IMAGE_TOKEN, ids), joined[shown], group[shown])
    tiny.close(out.logits[0], expected, part=2e-5)


def test_beams(shown):
    model, rows = shown
    inputs = scene(model, rows)
    if tiny.REPEATS_RIGHT:
        stock = answer(model, num_beams=3, **inputs)
        with dymu.apply(model, merge=NOTHING):
            assert torch.equal(answer(model, num_beams=3, **inputs), stock)
    with dymu.apply(model, merge=SOME) as handle:
        together = answer(model, num_beams=3, return_dict_in_generate=True, **inputs)
        model(**inputs)
        assert stored(together) == merged_length(rows, inputs, handle.last.kept) + 3
        for index, row in enumerate(rows):
            alone = answer(model, num_beams=3, **scene(model, [row]))[0, -4:]
            assert torch.equal(together.sequences[index, -4:], alone)


def test_sampling(video_model):
    inputs = scene(video_model, [(3, Video(4, 1), 2), (5, Video(4, 2), 4)])

    def sampled() -> Tensor:
        torch.manual_seed(3)
        found: Tensor = answer(video_model, do_sample=True, num_return_sequences=2, **inputs)
        return found

    if tiny.REPEATS_RIGHT:
        stock = sampled()
        with dymu.apply(video_model, merge=NOTHING):
            assert torch.equal(sampled(), stock)
    with dymu.apply(video_model, merge=SOME):
        assert torch.equal(sampled(), sampled())
        assert sampled().shape == (4, inputs["input_ids"].shape[1] + 4)


CUT = pytest.mark.skipif(not cuts_encoded_images(), reason="this transformers does not chunk prompts with images")
CHUNKED: dict[str, Row] = {
    "tiles": (3, TILES, 5),
    "images": (3, TILES, 2, Photo(28, 60, 1), 5),
    "video": (3, VIDEO, 5),
    "videos": (3, VIDEO, 2, Video(5, 2), 5),
    "both": (3, TILES, 2, VIDEO, 5),
}
ROWS = [(name, row) for name in MODELS for row in list(CHUNKED)[: 2 if name[2] == "llava_next" else None]]


@pytest.fixture(params=ROWS, ids=lambda case: f"{case[0][2]}-{case[1]}")
def one_row(request: pytest.FixtureRequest) -> tuple[Any, Row]:
    name, row = request.param
    return made(name), CHUNKED[row]


@CUT
@pytest.mark.parametrize(("size", "rule"), [(11, SOME), (40, SOME), (24, SETTLED)])
def test_generate_in_chunks_reads_the_whole_prompt(one_row, size, rule):
    """Chunks cut through images and videos; tokens of one group that fall into two chunks are stored in each."""
    model, row = one_row
    inputs = scene(model, [row])
    text = answer(model, prefill_chunk_size=size, **inputs)
    with dymu.apply(model, merge=NOTHING):
        assert torch.equal(answer(model, prefill_chunk_size=size, **inputs), text)
    with dymu.apply(model, merge=rule) as handle:
        out = answer(model, prefill_chunk_size=size, return_dict_in_generate=True, **inputs)
        ids = inputs["input_ids"][0]
        label = torch.arange(len(ids)) + 10**6
        for token, video in ((tiny.IMAGE_TOKEN, False), (tiny.VIDEO_TOKEN, True)):
            own = [i for i, item in enumerate(handle.last.items) if item.video == video]
            if own:
                label[ids == token] = torch.cat([handle.last.group(i) + 10**4 * (i + 1) for i in own])
        assert stored(out) == sum(len(set(chunk.tolist())) for chunk in label.split(size)) + 3


@pytest.mark.parametrize("rule", [NOTHING, SOME, SETTLED], ids=["nothing", "some", "settled"])
def test_a_second_turn_on_the_same_cache(one_row, rule):
    model, row = one_row
    inputs = scene(model, [row])
    seen = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}

    def turns() -> tuple[Tensor, Tensor]:
        cache = DynamicCache(config=model.config)
        out = answer(model, **inputs, past_key_values=cache, return_dict_in_generate=True)
        more = torch.cat((out.sequences, tiny.prompt(model, 5, seed=3)[None]), 1)
        return answer(model, input_ids=more, **seen), answer(model, input_ids=more, past_key_values=cache)

    stock, _ = turns()
    with dymu.apply(model, merge=rule) as handle:
        fresh, continued = turns()
        assert torch.equal(continued, fresh)
        assert handle.last.items, "the report is of the turn that showed something"
        if rule is NOTHING:
            assert torch.equal(fresh, stock)


def test_a_second_turn_brings_tiles_or_a_video(video_model):
    first: Row = (3, Photo(30, 60, 1), 4)
    for item in (Photo(56, 28, 2), Video(3, 2)):
        more: Row = (2, item, 5)
        start, later = scene(video_model, [first]), scene(video_model, [more])
        del later["attention_mask"]
        with dymu.apply(video_model, merge=SOME) as handle:
            cache = video_model(**start).past_key_values
            kept = list(handle.last.kept)
            out = video_model(**later, past_key_values=cache)
            kept += handle.last.kept
            assert stored(out) == 3 + 4 + 2 + 5 + sum(kept)
            if isinstance(item, Photo):
                # In turns of their own, each image of LLaVA-OneVision is the only one, and so cut into tiles.
                whole = {"input_ids": torch.cat((start["input_ids"], later["input_ids"]), 1)}
                both = scene(video_model, [first, more])
                whole |= {name: both[name] for name in ("pixel_values", "image_sizes")}
            else:
                whole = {**start, **later}
                whole["input_ids"] = torch.cat((start["input_ids"], later["input_ids"]), 1)
                del whole["attention_mask"]
            expected = video_model(**whole).logits[:, start["input_ids"].shape[1] :]
            tiny.close(out.logits, expected, part=1e-4)


RULES = [RandomKeep(0.3), RandomKeep(7), Stride(0.3), Stride(7, fill="nearest"), RandomKeep(0.3, fill="nearest")]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_with_a_number_keep_it_of_every_image_and_video(shown, rule):
    """Of what the language model gets, however many pictures the family makes of it."""
    model, rows = shown
    inputs = scene(model, rows)
    with dymu.apply(model, merge=rule) as handle:
        out = model(**inputs)
        there = inputs["attention_mask"].bool()
        assert torch.isfinite(out.logits[there]).all()
        for item in handle.last.items:
            patches = int(item.patch.sum())
            assert item.budgeted == (round(rule.keep * patches) if rule.keep < 1 else rule.keep)
            assert bool((item.leaders[item.patch] < 0).any()) == (getattr(rule, "fill", "none") == "none")
        assert torch.isfinite(answer(model, **inputs)).all()


def counted(item: Item) -> tuple[list[int], list[int]]:
    """Tokens kept, and tokens that there are, of the image, or of every frame."""
    if not item.video:
        return [item.budgeted], [int(item.patch.sum())]
    return item.fresh, torch.bincount(item.picture[item.patch], minlength=item.pictures).tolist()


@pytest.mark.parametrize("keep", [0.5, 0.3, 0.15, 9])
def test_tome_keeps_its_number_of_what_the_language_model_gets(model, keep):
    """Whatever the family does to pictures: it takes padding off, shrinks, pools."""
    shots = [Photo(28, 28, 1), Photo(50, 90, 2), Photo(90, 40, 3), Photo(200, 77, 4), Photo(77, 500, 5)]
    videos = [] if model.config.model_type == "llava_next" else [Video(1, 1), Video(6, 2)]
    with dymu.apply(model, merge=FixedMerge(keep)) as handle:
        if keep == 9:
            del shots[3:]  # which have more tiles
        for row in [*([shot] for shot in [*shots, *videos]), shots[1:3]]:
            model(**scene(model, [(2, *row, 3)]))
            for item in handle.last.items:
                for fresh, there in zip(*counted(item), strict=True):
                    assert fresh == (keep if keep > 1 else max(round(keep * there), 1))


def test_fewer_tokens_than_tiles_are_refused(model):
    with (
        dymu.apply(model, merge=FixedMerge(1)),
        pytest.raises(BadBudget, match=r"cut into [0-9]+ pictures, each of which keeps at least one"),
    ):
        model(**scene(model, [(2, Photo(77, 500, 5), 3)]))


@pytest.mark.parametrize("part", [0.1, 0.3, 1.0])
def test_pooling_averages_fields_of_every_view(shown, part):
    model, rows = shown
    inputs = scene(model, rows)
    untouched = model(**inputs)
    with dymu.apply(model, merge=AveragePool(part)) as handle:
        out = model(**inputs)
        for item in handle.last.items:
            fields = 0
            for view in item.grids:
                group = item.group[view].unique(return_inverse=True)[1]
                down, across = len(group[:, 0].unique()), len(group[0].unique())
                row, column = torch.meshgrid(*(torch.arange(side) for side in view.shape), indexing="ij")
                assert torch.equal(group, row * down // view.shape[0] * across + column * across // view.shape[1])
                assert abs(down * across - part * view.numel()) <= max(min(down, across) / 2, 1)
                fields += down * across
            assert item.budgeted == fields
        features, before = (tiny.features_in(o, "image") for o in (out, untouched))
        if features is not None:
            images = [item for item in handle.last.items if not item.video]
            lengths = [len(item.leaders) for item in images]
            for item, mine, theirs in zip(images, features.split(lengths), before.split(lengths), strict=True):
                same = torch.nn.functional.one_hot(item.group).float()
                mean = same @ ((same.T @ theirs) / same.sum(0)[:, None])
                torch.testing.assert_close(mine, mean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", [*RULES, AveragePool(0.2), FixedMerge(0.3)], ids=str)
def test_what_a_rule_leaves_of_an_image_does_not_depend_on_its_neighbours(model, rule, side):
    rows: list[Row] = [(3, TILES, 5), (4, Photo(28, 50, 9), 2, Photo(90, 40, 3), 6)]
    check_rows_alone(model, rows, side, rule)


@pytest.mark.parametrize("row", [(1, TILES, 1), (1, HUGE, 1), (1, VIDEO, 1)], ids=["tiles", "huge", "video"])
def test_what_merges_where_it_stands_is_the_mean_of_its_places(model, row):
    """Groups of the encoder's merging join whole, and learned tokens never."""
    if model.config.model_type == "llava_next" and row[1] is VIDEO:
        pytest.skip("this family takes no videos")
    inputs, found = scene(model, [row]), []
    encoder_alone = ThresholdMerge(SETTLED.thresholds)
    for rule in (encoder_alone, SETTLED):
        with dymu.apply(model, merge=rule) as handle:
            out = model(**inputs)
            features = tiny.features_in(out, "video" if row[1] is VIDEO else "image")
            found.append((handle.last.group(0), features, handle.last.items[0]))
    (before, ahead, item), (after, features, _) = found
    assert int(after.max()) < int(before.max())
    assert len(torch.stack((before, after)).unique(dim=1).T) == int(before.max()) + 1
    assert (after.bincount()[after[~item.patch]] == 1).all()
    assert torch.equal(features[~item.patch], ahead[~item.patch])
    own = torch.nn.functional.one_hot(after).float()
    torch.testing.assert_close(features, own @ ((own.T @ ahead) / own.sum(0)[:, None]), atol=1e-5, rtol=0)
    if not item.video:
        shared = own.T @ torch.nn.functional.one_hot(item.picture.round().long().clamp(min=0)).float()
        assert ((shared > 0).sum(1) == 1).all()


def test_a_pool_larger_than_the_grid_is_refused(model):
    with dymu.apply(model, merge=AveragePool(100_000)), pytest.raises(BadBudget, match="take fewer"):
        model(**scene(model, [(3, Photo(30, 60, 1), 4)]))


# ------------------------------------------------------------------------------------------------------- bad prompts


def bad_calls(model: Any) -> list[tuple[dict[str, Any], str]]:
    """Prompts that do not fit what is shown, and what the error names."""
    image = scene(model, [(3, Photo(30, 60, 1), 4)])
    calls = []
    for ids in (image["input_ids"][:, :-6], torch.cat((image["input_ids"], torch.tensor([[tiny.IMAGE_TOKEN]])), 1)):
        calls.append(({**image, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, "image"))
    words = tiny.prompt(model, 9)[None]
    calls.append(({**image, "input_ids": words, "attention_mask": torch.ones_like(words)}, "image"))
    if model.config.model_type == "llava_next":
        return calls
    video = scene(model, [(3, Video(4, 1), 4)])
    for ids in (
        video["input_ids"][:, :-6],
        torch.cat((video["input_ids"], torch.tensor([[tiny.VIDEO_TOKEN] * 2])), 1),
        torch.cat((video["input_ids"], torch.tensor([[tiny.VIDEO_TOKEN]])), 1),
        words,
    ):
        calls.append(({**video, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, "video"))
    swapped = image["input_ids"].masked_fill(image["input_ids"] == tiny.IMAGE_TOKEN, tiny.VIDEO_TOKEN)
    calls.append(({**image, "input_ids": swapped}, "image"))
    both = scene(model, [(3, Photo(30, 60, 1), 2, Video(4, 1), 4)])
    ids = both["input_ids"].clone()
    ids[0, (ids[0] == tiny.VIDEO_TOKEN).nonzero()[0]] = 5
    calls.append(({**both, "input_ids": ids}, "video"))
    return calls


@pytest.mark.parametrize("how", ["forward", "generate", pytest.param("chunks", marks=CUT), "beams"])
def test_prompts_that_do_not_fit_are_named_and_leave_nothing_open(model, how):
    options = {"generate": {}, "chunks": {"prefill_chunk_size": 16}, "beams": {"num_beams": 2}}
    right = scene(model, [(3, Photo(30, 60, 1), 4)])
    for inputs, what in bad_calls(model):
        with dymu.apply(model, merge=SOME) as handle:
            expected, kept = model(**right).logits, handle.last.kept
            with pytest.raises(BadPrompt, match=f"have [0-9]+ {what} placeholders.* {what}s given need") as caught:
                model(**inputs) if how == "forward" else answer(model, **inputs, **options[how])
            assert str(caught.value).count("\n") == 0
            assert torch.equal(model(**right).logits, expected)
            assert handle.last.kept == kept
            assert stored(answer(model, **right, return_dict_in_generate=True)) == 7 + sum(kept) + 3
