"""Merging where tokens stand in the prompt, within a picture and over time, against the formulas written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import dymu
import tiny
from dymu.errors import BadBudget, BadPrompt, BadThresholds, BadVideo, DymuError
from dymu.item import Item
from dymu.reducers import FixedMerge, Shown, ThresholdMerge, picture_tokens, reduce_in_prompt

CHANNELS = 6


def items(counts: list[list[int]], video: bool, seed: int) -> tuple[list[Item], list[Tensor]]:
    """Items of pictures of so many places each, some alike, with a learned token at the end of every item."""
    generator = torch.Generator().manual_seed(seed)
    placed, features = [], []
    for pictures in counts:
        picture = torch.tensor([number for number, count in enumerate(pictures) for _ in range(count)] + [0])
        tokens = len(picture)
        leaders = torch.arange(tokens)
        for n in range(1, tokens - 1):
            if picture[n] == picture[n - 1] and torch.rand((), generator=generator) < 0.3:
                leaders[n] = leaders[n - 1]
        feature = torch.randn(tokens, CHANNELS, generator=generator, dtype=torch.float64)
        feature += torch.randn(CHANNELS, generator=generator, dtype=torch.float64) * 1.5
        patch = torch.arange(tokens) < tokens - 1
        at = torch.zeros(tokens, 2)
        placed.append(Item(leaders, patch, picture, at, at, torch.zeros(len(pictures), 3, 1, 1), video))
        features.append(feature[leaders])
    return placed, features


def slowly(
    item: Item, feature: Tensor, rounds: list[float], over_time: float | None
) -> tuple[list[int], dict[int, Tensor]]:
    """For every place the places that it shares a token with (by the first of them), and that token's features."""
    groups: list[list[tuple[list[int], Tensor]]] = []
    for number in range(item.pictures):
        here: dict[int, list[int]] = {}
        for n in range(len(item.leaders)):
            if item.patch[n] and item.picture[n] == number:
                here.setdefault(int(item.leaders[n]), []).append(n)
        tokens = [(places, feature[first]) for first, places in here.items()]
        for threshold in rounds:
            if threshold > 1:
                continue
            a, b = tokens[0::2], tokens[1::2]
            goals: dict[int, list[int]] = {}
            for i, (_, x) in enumerate(a):
                if b:
                    cosines = [torch.cosine_similarity(x, y, dim=0).item() for _, y in b]
                    best = max(range(len(b)), key=lambda j: cosines[j])
                    if cosines[best] > threshold:
                        goals.setdefault(best, []).append(i)
            gone = {i for chosen in goals.values() for i in chosen}
            left = [token for i, token in enumerate(a) if i not in gone]
            for j, (places, y) in enumerate(b):
                members = [(places, y), *(a[i] for i in goals.get(j, []))]
                size = sum(len(own) for own, _ in members)
                mean = sum(len(own) * x for own, x in members) / size
                left.append(([n for own, _ in members for n in own], mean))
            tokens = left
        groups.append(tokens)
    joined: list[tuple[list[int], Tensor, list[tuple[list[int], Tensor]]]] = []
    before: list[int] = []
    for tokens in groups:
        now = []
        for places, x in tokens:
            cosines = [torch.cosine_similarity(x, joined[k][1], dim=0).item() for k in before]
            if over_time is not None and cosines and max(cosines) > over_time:
                k = before[max(range(len(cosines)), key=lambda i: cosines[i])]
                joined[k][2].append((places, x))
            else:
                k = len(joined)
                joined.append((places, x, [(places, x)]))
            now.append(k)
        before = now if over_time is not None else []
    leader, features = list(range(len(item.leaders))), {}
    for _, _, members in joined:
        places = [n for own, _ in members for n in own]
        mean = sum(len(own) * x for own, x in members) / len(places)
        for n in places:
            leader[n] = min(places)
            features[n] = mean
    return leader, features


def reduced(items: list[Item], features: Any, rounds: Any, over_time: float | None) -> tuple[list[Item], Any]:
    """As a call of the model merges them."""
    rule = ThresholdMerge((), images=tuple(rounds), frames=tuple(rounds), over_time=over_time)
    shown = Shown(torch.empty(0), ((1, 1),) * len(items), single=False, video=items[0].video)
    return reduce_in_prompt(rule, items, features, shown)


counts = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)
thresholds = st.lists(st.sampled_from([2.0, 0.9, 0.6, 0.3, -1.0]), max_size=3)


@settings(max_examples=60, deadline=None)
@given(counts=counts, rounds=thresholds, over_time=st.sampled_from([None, 0.8, 0.5, -1.0]), seed=st.integers(0, 99))
def test_settling_equals_the_formulas(counts, rounds, over_time, seed):
    placed, features = items(counts, True, seed)
    found, settled = reduced(placed, features, rounds, over_time)
    for item, feature, now, changed in zip(placed, features, found, settled, strict=True):
        leaders, expected = slowly(item, feature, rounds, over_time)
        assert now.leaders.tolist() == leaders
        for n in range(len(leaders)):
            torch.testing.assert_close(changed[n], expected.get(n, feature[n]))


def counts_of(item: Item, video: bool) -> list[int]:
    """Places of the image, or of each frame."""
    counts = torch.bincount(item.picture[item.patch], minlength=item.pictures).tolist()
    return counts if video else [sum(counts)]


def counts_of_tokens(item: Item, video: bool) -> list[int]:
    return (
        [int(item.leaders[item.patch & (item.picture == number)].unique().numel()) for number in range(item.pictures)]
        if video
        else [item.budgeted]
    )


def showing(placed: list[Item], video: bool) -> Shown:
    of_items = [counts_of(item, True) for item in placed]
    return Shown(torch.empty(0), ((3, 3),) * 99, single=False, video=video, find_items=lambda: of_items)


def slowly_to(item: Item, feature: Tensor, goals: list[int]) -> list[int]:
    """For every place the first one that it shares a token with, once the most similar tokens of the image, or of each
    frame, have merged to a goal: in six rounds of the same part, and on where a round could not merge enough."""
    leader = list(range(len(item.leaders)))
    for number, goal in enumerate(goals):
        for places in _slowly_to(item, feature, goal, [number] if item.video else list(range(item.pictures))):
            for n in places:
                leader[n] = min(places)
    return leader


def _slowly_to(item: Item, feature: Tensor, goal: int, together: list[int]) -> list[list[int]]:
    pictures: list[list[tuple[list[int], Tensor]]] = []
    for number in together:
        here: dict[int, list[int]] = {}
        for n in range(len(item.leaders)):
            if item.patch[n] and item.picture[n] == number:
                here.setdefault(int(item.leaders[n]), []).append(n)
        pictures.append([(places, feature[first]) for first, places in here.items()])
    first = sum(map(len, pictures))
    for number in range(1, 20):
        due = sum(map(len, pictures)) - max(goal, round(first * (goal / first) ** min(number / 6, 1)))
        edges = []
        for k, tokens in enumerate(pictures):
            for i in range(0, len(tokens), 2):
                cosines = [torch.cosine_similarity(tokens[i][1], y, dim=0).item() for _, y in tokens[1::2]]
                if cosines:
                    edges.append((max(cosines), k, i, 2 * cosines.index(max(cosines)) + 1))
        chosen = {(k, i): j for _, k, i, j in sorted(edges, reverse=True)[: max(due, 0)]}
        for k, tokens in enumerate(pictures):
            left = [token for i, token in enumerate(tokens) if i % 2 == 0 and (k, i) not in chosen]
            for j in range(1, len(tokens), 2):
                members = [tokens[j], *(tokens[i] for (of, i), goes in chosen.items() if (of, goes) == (k, j))]
                size = sum(len(places) for places, _ in members)
                mean = sum(len(places) * x for places, x in members) / size
                left.append(([n for places, _ in members for n in places], mean))
            pictures[k] = left
    return [places for tokens in pictures for places, _ in tokens]


@settings(max_examples=40)
@given(counts=counts, keep=st.sampled_from([0.83, 0.52, 0.31, 0.11]), video=st.booleans(), seed=st.integers(0, 99))
def test_tome_in_the_prompt_equals_the_formulas(counts, keep, video, seed):
    placed, features = items(counts, video, seed)
    found, merged = reduce_in_prompt(FixedMerge(keep), placed, features, showing(placed, video))
    for item, feature, now, after in zip(placed, features, found, merged, strict=True):
        goals = [max(round(keep * count), 1) for count in counts_of(item, video)]
        pictures = 1 if video else item.pictures
        if all(had >= goal for had, goal in zip(counts_of_tokens(item, video), goals, strict=True)):
            assert now.leaders.tolist() == slowly_to(item, feature, goals)
        assert counts_of_tokens(now, video) == [max(goal, pictures) for goal in goals]
        for places in (now.leaders == leader for leader in now.leaders[now.patch].unique()):
            torch.testing.assert_close(after[places], feature[places].mean(0).expand(int(places.sum()), -1))


def test_a_tile_of_nan_keeps_its_tokens_and_the_others_merge():
    (item,), (feature,) = items([[9, 9, 9]], False, 4)
    feature[9:18] = torch.nan
    (now,), _ = reduce_in_prompt(FixedMerge(0.4), [item], [feature], showing([item], video=False))
    assert torch.equal(now.leaders[9:18], item.leaders[9:18])
    kept = now.leaders[(now.leaders == torch.arange(28)) & item.patch]
    assert len(kept) == max(round(0.4 * 27), len(item.leaders[9:18].unique()) + 2)


def test_images_do_not_go_on_from_tile_to_tile():
    placed, features = items([[5, 5]], False, 0)
    same = reduced(placed, features, (), -1.0)
    assert same == (placed, features)


def test_features_keep_the_form_that_they_had():
    placed, features = items([[3, 4], [4, 3]], True, 1)
    _, settled = reduced(placed, torch.stack(features).float(), (0.2,), 0.5)
    assert isinstance(settled, Tensor)
    assert settled.dtype == torch.float32
    _, listed = reduced(placed, features, (0.2,), 0.5)
    assert isinstance(listed, list)


def test_pictures_whose_tokens_are_all_gone_take_no_part():
    (item,), features = items([[4, 3, 4]], True, 2)
    item.leaders[4:7] = -1
    (now,), _ = reduced([item], features, (0.3,), None)
    assert (now.leaders[4:7] == -1).all()
    assert picture_tokens([item], features).state.layout.batch == 2


def still(frames: int) -> Tensor:
    """[1, frames, 3, SIDE, SIDE] of a scene in which nothing moves."""
    return tiny.pictures(1)[None].expand(-1, frames, -1, -1, -1)


@pytest.fixture(params=["llava_onevision", "llava_next_video"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.llava("siglip" if request.param == "llava_onevision" else "clip", "qwen2", request.param)


def test_a_still_scene_costs_one_frame(model):
    """And its features, maps and logits are those of a video in which every frame keeps its own."""
    rule = ThresholdMerge((0.9,) * tiny.LAYERS, frames=(0.95,))
    with dymu.apply(model, merge=rule) as handle:
        model.get_video_features(still(1))
        alone = handle.last.items[0].budgeted
        apart = torch.stack(list(model.get_video_features(still(32)).pooler_output))
        assert handle.last.items[0].budgeted == 32 * alone
    with dymu.apply(model, merge=ThresholdMerge(rule.thresholds, frames=rule.frames, over_time=0.99)) as handle:
        together = torch.stack(list(model.get_video_features(still(32)).pooler_output))
        assert handle.last.items[0].budgeted == alone
        torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


def test_what_changes_is_kept_and_what_stays_is_not(model):
    video = still(4).clone()
    video[:, 2:, :, :, tiny.SIDE // 2 :] = tiny.pictures(2, seed=5)[1][:, :, tiny.SIDE // 2 :]
    rule = ThresholdMerge((2.0,) * tiny.LAYERS, over_time=0.999)
    with dymu.apply(model, merge=rule) as handle:
        model.get_video_features(video)
        item = handle.last.items[0]
        frames = [item.group[(item.picture == number) & item.patch] for number in range(4)]
        assert torch.equal(frames[0], frames[1])
        assert torch.equal(frames[2], frames[3])
        fresh = len(set(frames[2].tolist()) - set(frames[0].tolist()))
        assert 0 < fresh <= len(frames[0])


def test_the_cache_of_a_still_scene_holds_one_frame(model):
    video = still(3)
    newlines = int(model.config.model_type == "llava_onevision")
    tokens = 3 * 16 + 1 if newlines else 3 * 9
    ids = torch.cat((torch.tensor([5, 6]), torch.full((tokens,), tiny.VIDEO_TOKEN), torch.tensor([7, 8])))[None]
    with dymu.apply(model, merge=ThresholdMerge((2.0,) * tiny.LAYERS, over_time=0.9999)) as handle:
        out = model(input_ids=ids, pixel_values_videos=video)
        stored = out.past_key_values.layers[0].keys.shape[2]
        assert stored == handle.last.items[0].budgeted + newlines + 4 < tokens


def clips(count: int, seed: int = 0) -> list[list[Image.Image]]:
    """Videos of 6 frames, in which a smaller and smaller part changes from frame to frame."""
    made = []
    for number in range(count):
        first, *others = tiny.photos(4, seed + 10 * number)
        frames = []
        for n in range(6):
            frame = first.copy()
            frame.paste(others[n % 3].crop((0, 0, 7 * (n % 4), 28)), (0, 0))
            frames.append(frame)
        made.append(frames)
    return made


@pytest.fixture
def thresholds(model) -> dymu.Thresholds:
    processor = tiny.processor(model.config.model_type)
    return dymu.calibrate(model, processor, tiny.photos(8, seed=3), [0.4, 1.0], progress=False)


def test_tokens_per_second_are_met_and_inference_repeats_them(model, thresholds, tmp_path):
    processor, videos = tiny.VideoProcessor(), clips(5)
    found = dymu.calibrate_videos(model, processor, videos, thresholds, [10, 15], budget=0.4, fps=3, progress=False)
    assert [(entry.per_second, entry.videos, entry.seconds) for entry in found.over_time] == [(10, 5, 10), (15, 5, 10)]
    found.save(tmp_path / "t.json")
    found = dymu.Thresholds.load(tmp_path / "t.json")
    for entry in found.over_time:
        assert entry.achieved == pytest.approx(entry.per_second, rel=0.1)
        with dymu.apply(model, found, budget=0.4, per_second=entry.per_second) as handle:
            kept = 0
            for video in videos:
                model.get_video_features(processor(videos=[video])["pixel_values_videos"])
                kept += handle.last.items[0].budgeted
            assert kept / entry.seconds == entry.achieved
            handle.per_second = None
            model.get_video_features(processor(videos=videos)["pixel_values_videos"])
            assert sum(item.budgeted for item in handle.last.items) / entry.seconds > entry.achieved


def test_what_videos_cannot_keep_is_refused(model, thresholds):
    processor = tiny.VideoProcessor()
    with pytest.raises(BadBudget, match="tokens per second at a budget"):
        dymu.calibrate_videos(model, processor, clips(2), thresholds, [1000], budget=0.4, fps=3, progress=False)
    with pytest.raises(BadVideo, match="does not say how long"):
        dymu.calibrate_videos(model, processor, clips(2), thresholds, [10], budget=0.4, progress=False)
    with pytest.raises(DymuError, match="no video was given"):
        dymu.calibrate_videos(model, processor, [], thresholds, [10], budget=0.4, fps=3, progress=False)
    with pytest.raises(DymuError, match="takes no videos"):
        dymu.calibrate_videos(tiny.llava(), processor, clips(2), thresholds, [10], budget=0.4, fps=3, progress=False)
    found = dymu.calibrate_videos(model, processor, clips(2), thresholds, [10, 15], budget=0.4, fps=3, progress=False)
    with pytest.raises(BadBudget, match="10 to 15"):
        dymu.apply(model, found, budget=0.4, per_second=30)
    with dymu.apply(model, found, budget=0.4, per_second=12) as handle:
        assert handle.per_second == 12
        with pytest.raises(BadBudget, match="and not at"):
            handle.budget = 1.0
        assert handle.budget == found.budgets[0]


def test_frames_keep_the_budget_of_images(model, thresholds):
    photos = tiny.photos(8, seed=3)
    pixels = tiny.VideoProcessor()(videos=[photos])["pixel_values_videos"]
    with dymu.apply(model, thresholds, budget=0.4) as handle:
        model.get_video_features(pixels)
        item = handle.last.items[0]
        assert item.budgeted == pytest.approx(0.4 * int(item.patch.sum()), rel=0.25)
        assert sum(item.fresh) == item.budgeted


def test_a_video_is_drawn_frame_by_frame(model):
    photos = [photo.resize((200, 200)) for photo in tiny.photos(3, seed=1)]
    frames = [photos[0], photos[0], photos[1], photos[2]]
    pixels = tiny.VideoProcessor()(videos=[frames])["pixel_values_videos"]
    with dymu.apply(model, merge=ThresholdMerge((2.0,) * tiny.LAYERS, over_time=0.99999)) as handle:
        model.get_video_features(pixels)
        report = handle.last
    drawn = report.draw_frames(frames)
    brightness = [np.asarray(frame.convert("L"), dtype=float).mean() for frame in drawn]
    assert len(drawn) == 4
    assert report.items[0].fresh[1] == 0
    assert brightness[1] < 0.6 * brightness[0]
    sheet = report.draw(frames)
    assert sheet.width > sheet.height * 0.6
    with pytest.raises(ValueError, match="the model saw 4 frames"):
        report.draw(frames[:3])
    with pytest.raises(ValueError, match="not the image"):
        report.draw(frames[::-1])


def test_frames_are_compared_in_float32_under_autocast(model):
    rule = ThresholdMerge((2.0,) * tiny.LAYERS, over_time=0.9999)
    with dymu.apply(model, merge=rule) as handle, torch.autocast("cpu", dtype=torch.bfloat16):
        model.get_video_features(still(6))
        assert handle.last.items[0].fresh[1:] == [0] * 5


def test_all_frames_count_for_the_length_of_a_folder(model, thresholds, tmp_path):
    """Also where fewer are looked at."""
    paths = []
    for number, video in enumerate(clips(3)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for n in range(12):
            video[n // 2].resize((56, 56)).save(folder / f"{n}.png")
        paths.append(folder)
    found = dymu.calibrate_videos(
        model, tiny.VideoProcessor(), paths, thresholds, [12], budget=0.4, frames=6, fps=6, progress=False
    )
    assert found.over_time[0].seconds == 3 * 12 / 6


def test_thresholds_of_single_pictures_do_not_fit_tiles(model, thresholds):
    tower = model.config.vision_config.model_type.split("_")[0]
    other = tiny.llava(tower, "qwen2", layer=model.config.vision_feature_layer)
    plain = dymu.calibrate(other, tiny.processor(), tiny.photos(4), [20], progress=False)
    with pytest.raises(BadThresholds, match=r"^this set of thresholds was .* cut into tiles, so that its budgets mean"):
        dymu.apply(model, plain)
    with pytest.raises(BadThresholds, match="of one picture each"):
        dymu.apply(other, thresholds, budget=0.4)


def test_a_failed_call_leaves_nothing_in_the_report_of_the_next(model):
    video = still(2)
    newlines = int(model.config.model_type == "llava_onevision")
    tokens = 2 * 16 + 1 if newlines else 2 * 9
    ids = torch.cat((torch.tensor([5, 6]), torch.full((tokens,), tiny.VIDEO_TOKEN), torch.tensor([7])))[None]
    wrong = {"input_ids": tiny.prompt(model, 4)[None], **tiny.shown(model, tiny.pictures(1))}
    with dymu.apply(model, merge=ThresholdMerge((2.0,) * tiny.LAYERS)) as handle:
        for ask in (model, lambda **inputs: model.generate(**inputs, max_new_tokens=1, do_sample=False)):
            with pytest.raises(BadPrompt):
                ask(**wrong)
            ask(input_ids=ids, pixel_values_videos=video)
            assert [item.video for item in handle.last.items] == [True]
            model.get_image_features(**tiny.shown(model, tiny.pictures(1)))
            ask(input_ids=ids, pixel_values_videos=video)
            assert [item.video for item in handle.last.items] == [True]


def test_placeholders_must_fit_row_by_row(model):
    prompts = [tiny.prompt(model, 3, "image", 4), tiny.prompt(model, 3, "image", 4, seed=1)]
    batch = tiny.pad(prompts)
    batch["input_ids"][0, 3], batch["input_ids"][1, 2] = 5, tiny.IMAGE_TOKEN
    with dymu.apply(model, merge=ThresholdMerge((0.9,) * tiny.LAYERS)), pytest.raises(BadPrompt, match="of prompt 0"):
        model(**batch, **tiny.shown(model, tiny.pictures(2)))


@pytest.mark.parametrize("keep", [0.3, 0.6])
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_fixed_merge_of_tiles_does_not_depend_on_batch_mates(family, keep):
    """Small pictures have rounds in which nothing is due; they order tokens all the same."""
    model = tiny.llava("clip", "llama", family)
    images = tiny.full_processor(family).image_processor
    generator = np.random.default_rng(0)
    sizes = [(35, 160), (23, 43), (43, 40), (101, 150), (145, 47)]
    photos = [Image.fromarray(generator.integers(0, 255, (high, wide, 3), dtype=np.uint8)) for wide, high in sizes]
    with dymu.apply(model, merge=FixedMerge(keep)) as handle:
        model.get_image_features(**images(photos, return_tensors="pt"))
        together = handle.last.items
        for photo, item in zip(photos, together, strict=True):
            model.get_image_features(**images([photo], return_tensors="pt"))
            assert torch.equal(handle.last.items[0].leaders, item.leaders)
