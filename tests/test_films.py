"""What the contract asks, of the videos of families whose encoder takes patches of any number of frames."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import dymu
import tiny
import tiny_families
from by_hand import unmerged_prompt_by_hand
from dymu.families import FAMILIES
from dymu.reducers import ThresholdMerge
from test_layouts import Video, frames_of
from tiny_families import BEGIN, END, IMAGE_TOKEN, VIDEO_TOKEN, family_of, name_of, patches

pytestmark = pytest.mark.one_of_each

NOTHING = ThresholdMerge((2.0,) * tiny.LAYERS)
BY_FRAME = ThresholdMerge((0.9,) * tiny.LAYERS)
OVER_TIME = ThresholdMerge((0.95,) * tiny.LAYERS, over_time=0.7)
RULES = pytest.mark.parametrize("rule", [BY_FRAME, OVER_TIME], ids=["by-frame", "over-time"])

NAMES = [
    name
    for name, family in tiny_families.FAMILIES.items()
    if name in FAMILIES and FAMILIES[name].video_token is not None and not name.startswith("llava") and family.exists
]
GLM = [name for name in NAMES if FAMILIES[name].video_token == "image_token_id"]
"""They write the frames of videos with the placeholder of images."""
BY_TIME = ["qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "cosmos3_omni", "video_llama_3", "gemma4", *GLM]
"""They write the time ahead of each frame."""

Part = int | Tensor | Video
"""A piece of a prompt: that many words, a picture [3, height, width], a video."""


@pytest.fixture(params=NAMES, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.build(request.param)


def cell(model: Any) -> int:
    """Pixels on a side of a frame of which one token is made; VideoLLaMA 3 takes larger ones than of images."""
    return (2 if name_of(model) == "video_llama_3" else 1) * family_of(model).cell


def film(model: Any, video: Video) -> Tensor:
    """[frames, 3, height, width] as the family sees it; some of another size."""
    height, width = (side * cell(model) for side in ((5, 7) if video.look % 2 else (4, 3)))
    return torch.nn.functional.interpolate(frames_of(video), size=(height, width), mode="bilinear")


def videos_are_stacked(model: Any) -> bool:
    """Whether all videos of a call have as many frames, as in older versions of transformers."""
    takes = inspect.signature(type(model.model).get_video_features).parameters
    return name_of(model) == "gemma4" and "num_frames_per_video" not in takes


def seen(model: Any, videos: Sequence[Tensor]) -> dict[str, Any]:
    """What the model takes to see videos of an even number of frames."""
    family = family_of(model)
    if name_of(model) == "gemma4":
        shown = family.show([frame for video in videos for frame in video], [])
        pixels, places = shown["pixel_values"], shown["image_position_ids"]
        if videos_are_stacked(model):
            pixels, places = (x.unflatten(0, (len(videos), -1)) for x in (pixels, places))
            return {"pixel_values_videos": pixels, "video_position_ids": places}
        counts = torch.tensor([len(video) for video in videos])
        return {"pixel_values_videos": pixels, "video_position_ids": places, "num_frames_per_video": counts}
    pixels, grids = [], []
    together, show = (1, patches(2, 1)) if name_of(model) == "video_llama_3" else (2, family.show)
    for video in videos:
        frames = [show([frame], [1]) for frame in video]
        each = [frame["pixel_values"] for frame in frames]
        if together == 2:  # of each patch, channel by channel, the one frame and then the other
            split = [frame.unflatten(-1, (3, 2, -1)) for frame in each]
            each = [
                torch.stack((one[:, :, 0], two[:, :, 0]), 2).flatten(1)
                for one, two in zip(split[::2], split[1::2], strict=True)
            ]
        pixels += each
        grids.append((len(video) // together, *frames[0]["image_grid_thw"][0, 1:].tolist()))
    shown = {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.tensor(grids)}
    if name_of(model) == "video_llama_3":
        shown["video_merge_sizes"] = torch.full((len(videos),), 2)
    return shown


def tokens(model: Any, video: Tensor) -> tuple[int, int]:
    """Frames that the encoder sees, and tokens of each."""
    frames = len(video) if name_of(model) in ("video_llama_3", "gemma4") else len(video) // 2
    return frames, (video.shape[2] // cell(model)) * (video.shape[3] // cell(model))


def written(model: Any, video: Tensor) -> list[int]:
    """Ids of one video."""
    frames, each = tokens(model, video)
    token = IMAGE_TOKEN if name_of(model) in GLM else VIDEO_TOKEN
    if name_of(model) not in BY_TIME:
        return [BEGIN, *[token] * frames * each, END]
    return [i for frame in range(frames) for i in (5 + frame, BEGIN, *[token] * each, END)]


def scene(model: Any, rows: Sequence[Sequence[Part]], side: str = "left") -> dict[str, Any]:
    """What the model takes for these prompts."""
    prompts, kinds = [], []
    for row in rows:
        ids, kind = list[int](), list[int]()
        for part in row:
            if isinstance(part, int):
                ids += [3 + (len(ids) + part + i) % 20 for i in range(part)]
            elif isinstance(part, Tensor):
                ids += tiny.image(model, part).tolist()
            else:
                ids += written(model, film(model, part))
            own = 2 if isinstance(part, Video) else 1
            kind += [own if i in (IMAGE_TOKEN, VIDEO_TOKEN) else 0 for i in ids[len(kind) :]]
        prompts.append(torch.tensor(ids))
        kinds.append(torch.tensor(kind))
    given = tiny.pad(prompts, side)
    if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:
        given["mm_token_type_ids"] = tiny.pad(kinds, side)["input_ids"] * given["attention_mask"]
    pictures = [part for row in rows for part in row if isinstance(part, Tensor)]
    if pictures:
        counts = [sum(isinstance(part, Tensor) for part in row) for row in rows]
        given |= family_of(model).show(pictures, counts)
    videos = [film(model, part) for row in rows for part in row if isinstance(part, Video)]
    return {**given, **(seen(model, videos) if videos else {})}


def rows_of(model: Any) -> list[list[Part]]:
    """Prompts of one video, of two, and of an image and a video where a call may have both."""
    long, short = (4, 4) if videos_are_stacked(model) else (6, 2)
    rows: list[list[Part]] = [[4, Video(long, 1), 5], [2, Video(4, 2), 3, Video(short, 3), 6]]
    if name_of(model) not in GLM:
        rows.append([1, tiny.uneven(model, 2)[1], 2, Video(4, 4), 3])
    return rows


def test_nothing_merged_equals_the_untouched_model(model):
    for row in rows_of(model):
        inputs = scene(model, [row])
        logits, text = model(**inputs).logits, tiny.answer(model, max_new_tokens=4, **inputs)
        with dymu.apply(model, merge=NOTHING) as handle:
            tiny.close(model(**inputs).logits, logits, part=2e-5)
            assert torch.equal(tiny.answer(model, max_new_tokens=4, **inputs), text)
            assert handle.last.kept == handle.last.original
            assert sum(handle.last.kept) == int(
                sum((inputs["input_ids"] == i).sum() for i in (IMAGE_TOKEN, VIDEO_TOKEN))
            )


@RULES
def test_a_row_of_a_batch_gets_what_it_gets_alone(model, rule):
    rows = rows_of(model)
    batch = scene(model, rows)
    with dymu.apply(model, merge=rule) as handle:
        together = model(**batch).logits
        kept = sorted(handle.last.kept)
        apart = list[int]()
        for row, logits, present in zip(rows, together, batch["attention_mask"].bool(), strict=True):
            tiny.close(logits[present], model(**scene(model, [row])).logits[0], part=1e-4)
            apart += handle.last.kept
        assert sorted(apart) == kept
        assert sum(kept) < int(sum((batch["input_ids"] == i).sum() for i in (IMAGE_TOKEN, VIDEO_TOKEN)))


@RULES
def test_merged_logits_equal_an_independent_implementation(model, rule):
    inputs = scene(model, [[4, Video(6, 1), 5]])
    token = IMAGE_TOKEN if name_of(model) in GLM else VIDEO_TOKEN
    with dymu.apply(model, merge=rule) as handle:
        logits = model(**inputs).logits[0]
        of_video = model if hasattr(model, "get_video_features") else model.model
        encoded = of_video.get_video_features(**seen(model, [film(model, Video(6, 1))]), return_dict=True)
        (item,), group = handle.last.items, handle.last.group(0)
    assert len(set(group.tolist())) < 0.8 * len(group)
    assert item.video
    assert item.pictures == tokens(model, film(model, Video(6, 1)))[0]
    by_hand = unmerged_prompt_by_hand(model, inputs, encoded, group, token, "get_video_features")
    tiny.close(logits, by_hand, part=2e-5)


def test_over_time_a_still_scene_costs_one_frame(model):
    picture = film(model, Video(2, 1))[0]
    video = picture.expand(8, -1, -1, -1)
    frames, each = tokens(model, video)
    of_video = model if hasattr(model, "get_video_features") else model.model
    with dymu.apply(model, merge=OVER_TIME) as handle:
        of_video.get_video_features(**seen(model, [video]))
        (item,) = handle.last.items
        group = item.group.view(frames, each)
        assert (group == group[:1]).all()
        photo = ((picture - picture.min()) / (picture.max() - picture.min()) * 255).byte().permute(1, 2, 0)
        still = Image.fromarray(photo.numpy())
        assert len(handle.last.draw_frames([still] * frames)) == frames
