"""Calibration: budgets met exactly, by the arithmetic of inference, equal to a slow float64 reference."""

from __future__ import annotations

import copy
import inspect
import io
import os
import re
import resource
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil

import dymu
import tiny
import tiny_families
from dymu.calibration.images import share
from dymu.calibration.quantile import NEVER, Alone, threshold_for
from dymu.calibration.samples import _without_memory
from dymu.calibration.spill import Spill
from dymu.choices import SCHEDULES
from dymu.families.resolve import resolve
from dymu.reducers import FixedMerge
from dymu.schedule import removals
from dymu.thresholds import Thresholds
from encoded_by_hand import encoded_by_hand
from tiny_processors import processor_for

COUNT = 10
BUDGETS = [20, 0.3, 30, 49]


@pytest.fixture(scope="module")
def processor() -> CLIPImageProcessorPil:
    return tiny.processor()


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return tiny.photos(COUNT)


def kept(model: nn.Module, thresholds: dymu.Thresholds, budget: float, pixels: Tensor) -> list[int]:
    """Image tokens that `dymu.apply` keeps of each picture."""
    parts = resolve(model)
    with dymu.apply(model, thresholds, budget=budget) as handle, torch.inference_mode():
        parts.inner.get_image_features(
            pixels,
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            output_hidden_states=True,
        )
        never_merging = max(parts.prefix - parts.dropped(), 0)
        return [count - never_merging for count in handle.last.kept]


def slowly(model: nn.Module, pictures: Tensor, target: float, schedule: str) -> tuple[list[float], list[int]]:
    """Thresholds and kept tokens by the formulas, in float64, one image at a time.

    A and B are the tokens at even and odd places of the whole sequence, class token and registers counted.
    """
    model = copy.deepcopy(model).double()
    parts = resolve(model)
    prefix, depth = max(parts.prefix, parts.dropped()), max(parts.feature_layers())
    with torch.no_grad():
        embedded = [parts.tower(p[None].double(), output_hidden_states=True).hidden_states[0][0] for p in pictures]
        tokens = [list(x) for x in embedded]
        sizes = [[1.0] * len(x) for x in embedded]
        count = len(embedded[0]) - prefix
        thresholds, wanted, done = [], 0.0, 0
        for layer, removed in zip(parts.encoder_layers[:depth], removals(count, target, depth, schedule), strict=True):
            edges = []
            for image, rows in enumerate(tokens):
                x, size = torch.stack(rows), torch.tensor(sizes[image]).double()
                normed = layer.norm1(x)
                q, k, v = (part(normed).unflatten(-1, (layer.heads, -1)) for part in layer.projections)
                logits = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5 + size.log()
                update = layer.out(torch.einsum("hnm,mhd->nhd", logits.softmax(-1), v).flatten(1))
                for module in layer.after_attention:
                    update = module(update)
                tokens[image] = list(x + update)
                metric = k.mean(1)
                metric = metric / metric.norm(dim=1, keepdim=True)
                evens, odds = ([n for n in range(prefix, len(metric)) if n % 2 == parity] for parity in (0, 1))
                if evens and odds:
                    best = (metric[evens] @ metric[odds].T).max(1)
                    edges += [(s.item(), image, a, odds[b]) for a, s, b in zip(evens, *best, strict=True)]
            wanted += removed * len(tokens)
            edges.sort(reverse=True)
            merging = edges[: round(wanted) - done]
            done += len(merging)
            values = [1.0, *(edge[0] for edge in edges), -1.0]
            thresholds.append((values[len(merging)] + values[len(merging) + 1]) / 2)
            for image, rows in enumerate(tokens):
                into = {a: b for _, i, a, b in merging if i == image}
                for b in set(into.values()):
                    group = [b, *(a for a, goal in into.items() if goal == b)]
                    size = sum(sizes[image][n] for n in group)
                    rows[b] = sum(sizes[image][n] * rows[n] for n in group) / size
                    sizes[image][b] = size
                first = [n for n in range(len(rows)) if n < prefix or (n % 2 == 0 and n not in into)]
                order = first + [n for n in range(prefix, len(rows)) if n % 2 == 1]
                sizes[image] = [sizes[image][n] for n in order]
                x = torch.stack([rows[n] for n in order])
                update = layer.mlp(layer.norm2(x))
                for module in layer.after_mlp:
                    update = module(update)
                tokens[image] = list(x + update)
    return thresholds, [len(rows) - prefix for rows in tokens]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_budgets_are_met_and_inference_repeats_them(
    tower: str, schedule: str, processor: CLIPImageProcessorPil, images: list[Image.Image]
) -> None:
    model = tiny.llava(tower, layer=-1)
    thresholds = dymu.calibrate(model, processor, images, BUDGETS, schedule=schedule, batch_size=4, progress=False)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    assert thresholds.budgets == [round(0.3 * tiny.PATCHES), 20, 30, tiny.PATCHES]
    for entry in thresholds.calibrated:
        assert entry.achieved == pytest.approx(entry.budget, rel=0.005)
        counts = [count for batch in pixels.split(4) for count in kept(model, thresholds, entry.budget, batch)]
        assert [sum(counts) / COUNT, min(counts), max(counts)] == [entry.achieved, entry.min, entry.max]
        assert entry.sd == pytest.approx(np.std(counts))
    assert any(entry.max > entry.min for entry in thresholds.calibrated)
    assert thresholds.calibrated[-1].thresholds == (NEVER,) * tiny.LAYERS


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_any_budget_between_is_met(tower: str, processor: CLIPImageProcessorPil, images: list[Image.Image]) -> None:
    """On the calibration images; and a lower one on the same dial never has an image keep more, seen or unseen."""
    model = tiny.llava(tower, layer=-1)
    thresholds = dymu.calibrate(model, processor, images, progress=False)
    lowest, highest = thresholds.budgets[0], thresholds.budgets[-1]
    assert (lowest, highest) == (min(n for n in (4, 5, 6) if n in thresholds.budgets), tiny.PATCHES)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    unseen = processor(images=tiny.photos(12, seed=9), return_tensors="pt")["pixel_values"]
    before = None
    for budget in np.geomspace(highest, lowest, 40):
        counts = kept(model, thresholds, float(budget), pixels)
        upper = next(entry for entry in thresholds.calibrated if entry.budget >= budget - 1e-9)
        on_dial = upper.dial and budget >= upper.dial[-1].budget
        mean = sum(counts) / COUNT
        if on_dial:
            marks = [upper.budget, *(dial.budget for dial in upper.dial)]
            assert max(mark for mark in marks if mark <= budget + 1e-9) - 1e-9 <= mean
            assert mean <= min(mark for mark in marks if mark >= budget - 1e-9) + 1e-9
        else:
            assert mean == pytest.approx(budget, rel=0.1, abs=1.2)
        new = kept(model, thresholds, float(budget), unseen)
        if before is not None and before[0] == upper.budget and on_dial:
            assert all(lower <= higher for lower, higher in zip(counts + new, before[1], strict=True))
        before = upper.budget, counts + new


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_budget_is_the_mean_over_images_that_were_not_seen(tower: str, processor: CLIPImageProcessorPil) -> None:
    """Each of two draws keeps what was calibrated on the other; on average, as one may be a little simpler."""
    model, budgets = tiny.llava(tower, layer=-1), [10, 15, 20, 28, 36]
    draws = [[photo for seed in range(start, start + 8) for photo in tiny.photos(6, seed)] for start in (0, 100)]
    means = []
    for seen, unseen in (draws, draws[::-1]):
        thresholds = dymu.calibrate(model, processor, seen, budgets, progress=False)
        pixels = processor(images=unseen, return_tensors="pt")["pixel_values"]
        means.append([sum(kept(model, thresholds, budget, pixels)) / len(unseen) for budget in budgets])
        assert means[-1] == sorted(means[-1])
        assert means[-1] == pytest.approx(budgets, rel=0.1)
    assert np.mean(means, 0) == pytest.approx(budgets, rel=0.03)


def test_the_grid_is_what_can_be_left(processor, images) -> None:
    """Also where few layers merge; and where padding leaves other counts than budgets, dials fall from these."""
    few = dymu.calibrate(tiny.llava("clip", layer=-1), processor, images, merge_layers=[2], progress=False)
    assert few.budgets[0] >= tiny.PATCHES / 2
    padded = [
        Image.fromarray(np.random.default_rng(side).integers(0, 256, (20 + side, 300 - side, 3), np.uint8))
        for side in range(8)
    ]
    tiled = tiny.llava("clip", "llama", "llava_next")
    found = dymu.calibrate(tiled, tiny.full_processor("llava_next"), padded, [0.9, 0.92], progress=False)
    assert len(found.budgets) == 2


def test_images_of_one_native_size_say_how_many_tokens_they_have(images) -> None:
    model = tiny.build("qwen2_vl")
    found = dymu.calibrate(model, processor_for("qwen2_vl"), [image.resize((100, 80)) for image in images], [0.5])
    assert found.image_tokens is not None


def test_no_dial_where_something_merges_behind_the_last_layer(processor, images) -> None:
    early = dymu.calibrate(tiny.llava("clip", layer=-1), processor, images, [16, 20], merge_layers=[0, 1, 2])
    assert not any(entry.dial for entry in early.calibrated)
    one = dymu.calibrate(tiny.llava("clip", layer=-1), processor, images, [20], progress=False)
    assert one.calibrated[0].dial == ()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_equals_a_slow_reference(
    tower: str, schedule: str, processor: CLIPImageProcessorPil, images: list[Image.Image]
) -> None:
    model = tiny.llava(tower, layer=-1)
    entry = dymu.calibrate(model, processor, images, [12], schedule=schedule, progress=False).calibrated[0]
    thresholds, counts = slowly(model, processor(images=images, return_tensors="pt")["pixel_values"], 12, schedule)
    assert entry.thresholds == pytest.approx(thresholds, abs=1e-5)
    assert [entry.achieved, entry.min, entry.max] == [np.mean(counts), min(counts), max(counts)]


@pytest.mark.parametrize("layers", [(0, 2), (3,), (1, 2, 3)], ids=str)
def test_only_the_chosen_layers_merge(layers, tmp_path, processor, images) -> None:
    model = tiny.llava("clip", layer=-1)
    found = dymu.calibrate(model, processor, images, [30], merge_layers=reversed(layers), progress=False)
    entry = found.calibrated[0]
    assert {layer for layer, threshold in enumerate(entry.thresholds) if threshold <= 1} == set(layers)
    assert entry.achieved == pytest.approx(30, rel=0.005)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    assert sum(kept(model, found, 30, pixels)) / COUNT == entry.achieved
    assert found.merge_layers == layers
    found.save(tmp_path / "thresholds.json")
    assert dymu.Thresholds.load(tmp_path / "thresholds.json") == found


def test_numbers_of_numpy_are_as_good_as_others(tmp_path, processor, images) -> None:
    model = tiny.llava("clip", layer=-1)
    options = {"merge_layers": np.arange(1, 4), "progress": False}
    found = dymu.calibrate(model, processor, images, np.array([20]), **options)
    found.save(tmp_path / "thresholds.json")
    assert dymu.Thresholds.load(tmp_path / "thresholds.json") == found
    assert (found.merge_layers, found.budgets) == ((1, 2, 3), [20])
    assert dymu.calibrate(model, processor, images, np.array([0.5], np.float32), **options).budgets == [24]


def test_does_not_depend_on_the_batch(processor: CLIPImageProcessorPil, images: list[Image.Image]) -> None:
    model = tiny.llava("clip", layer=-1)
    one, *others = (
        dymu.calibrate(model, processor, images, [10, 25], batch_size=size, progress=False) for size in (1, 3, 8, 100)
    )
    for other in others:
        for mine, its in zip(one.calibrated, other.calibrated, strict=True):
            assert mine.thresholds == pytest.approx(its.thresholds, abs=1e-6)
            assert (mine.achieved, mine.sd, mine.min, mine.max) == (its.achieved, its.sd, its.min, its.max)


def test_budgets_do_not_disturb_one_another(processor: CLIPImageProcessorPil, images: list[Image.Image]) -> None:
    model = tiny.llava("dinov2", layer=-1)
    together = dymu.calibrate(model, processor, images, [8, 16, 32], progress=False).calibrated
    alone = [dymu.calibrate(model, processor, images, [n], progress=False).calibrated[0] for n in (8, 16, 32)]
    assert [replace(entry, dial=()) for entry in together] == alone


def test_runs_only_the_layers_whose_features_are_read(
    processor: CLIPImageProcessorPil, images: list[Image.Image]
) -> None:
    model = tiny.llava("clip", layer=[1, 2])
    broken = resolve(model).encoder_modules[2:]
    for parameter in (p for module in broken for p in module.parameters()):
        parameter.data.fill_(torch.nan)
    entry = dymu.calibrate(model, processor, images, [22], progress=False).calibrated[0]
    assert entry.achieved == 22
    assert len(entry.thresholds) == 2


def test_leaves_the_model_as_it_was_and_works_with_dymu_applied(
    processor: CLIPImageProcessorPil, images: list[Image.Image]
) -> None:
    model = tiny.llava("siglip")
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    plain = dymu.calibrate(model, processor, images, [20], progress=False)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    with dymu.apply(model, merge=FixedMerge(keep=10)):
        assert dymu.calibrate(model, processor, images, [20], progress=False) == plain


def test_works_with_dymu_applied_or_compiled_where_windows_are(images) -> None:
    processor, photos = tiny.processor("qwen2_5_vl"), of_many_sizes(images[:4])
    plain = dymu.calibrate(tiny.build("qwen2_5_vl"), processor, photos, [0.5], progress=False)
    model = tiny.build("qwen2_5_vl")
    with dymu.apply(model, merge=FixedMerge(keep=10)):
        assert dymu.calibrate(model, processor, photos, [0.5], progress=False) == plain
    model.model.visual = torch.compile(model.model.visual)
    assert dymu.calibrate(model, processor, photos, [0.5], progress=False).calibrated == plain.calibrated


def test_half_precision_decides_in_float32(processor: CLIPImageProcessorPil, images: list[Image.Image]) -> None:
    model = tiny.llava("clip", layer=-1).bfloat16()
    thresholds = dymu.calibrate(model, processor, images, [15], batch_size=4, memory_limit_bytes=0, progress=False)
    entry = thresholds.calibrated[0]
    assert entry.achieved == pytest.approx(15, rel=0.005)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"].bfloat16()
    counts = [count for batch in pixels.split(4) for count in kept(model, thresholds, 15, batch)]
    assert [sum(counts) / COUNT, min(counts), max(counts)] == [entry.achieved, entry.min, entry.max]


@pytest.fixture
def temporary_files(tmp_path, monkeypatch) -> Iterator[list]:
    """The temporary files that are made, in a folder of their own; afterwards they must be gone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made, make = [], tempfile.TemporaryFile

    def remember(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", remember)
    yield made
    assert all(file.closed for file in made)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("limit", [0, 30_000])
def test_a_file_gives_what_memory_gives(temporary_files, limit: int, processor, images) -> None:
    model = tiny.llava("clip")
    in_memory = dymu.calibrate(model, processor, images, [10, 20, 30], batch_size=3, progress=False)
    assert temporary_files == []
    spilt = dymu.calibrate(
        model, processor, images, [10, 20, 30], batch_size=3, memory_limit_bytes=limit, progress=False
    )
    assert spilt == in_memory
    assert len(temporary_files) == 1


def test_the_file_is_gone_after_ctrl_c(temporary_files, processor, images) -> None:
    def interrupted() -> Iterator[Image.Image]:
        yield from images
        raise KeyboardInterrupt

    model = tiny.llava("clip")
    with pytest.raises(KeyboardInterrupt):
        dymu.calibrate(model, processor, interrupted(), [10], batch_size=3, memory_limit_bytes=0, progress=False)
    assert len(temporary_files) == 1


def test_a_full_disk_is_one_sentence(temporary_files, processor, images) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(dymu.BadOutput, match=r"cannot grow beyond .* \(File too large\); set TMPDIR"):
            dymu.calibrate(tiny.llava("clip"), processor, images * 3, [10], memory_limit_bytes=0, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(temporary_files) == 1


def test_a_temporary_folder_that_takes_no_file_is_one_sentence(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nosuch"))
    with Spill(10) as spill:
        spill.slot(10)
        with pytest.raises(dymu.BadOutput, match=r"no temporary file can be opened \(No such file.*set TMPDIR"):
            spill.slot(1)


def test_few_files_are_open_however_many_batches(temporary_files, processor, images) -> None:
    model = tiny.llava("clip")
    opened = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 10, hard))
        options = {"batch_size": 1, "memory_limit_bytes": 0, "progress": False}
        found = dymu.calibrate(model, processor, images * 5, [10, 20], **options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.images == 5 * COUNT
    assert len(temporary_files) == 1


def test_slots_keep_what_is_put(tmp_path) -> None:
    with Spill(2_000) as spill:
        slots = [spill.slot(1_000) for _ in range(5)]
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            tensors = [torch.full((3, 2, 20), n, dtype=dtype) for n in range(5)]
            for slot, tensor in zip(slots, tensors, strict=True):
                slot.put(tensor)
            for slot, tensor in zip(slots, tensors, strict=True):
                assert torch.equal(slot.get(), tensor)


def test_images_of_all_sorts(tmp_path, processor, images) -> None:
    model = tiny.llava("clip")
    plain = dymu.calibrate(model, processor, images[:3], [20], progress=False)
    images[1].save(tmp_path / "second.png")
    (tmp_path / "text.jpg").write_text("no picture")
    mixed = iter(
        [
            images[0],
            tmp_path / "missing.png",
            str(tmp_path / "second.png"),
            str(tmp_path / "text.jpg"),
            Image.new("RGB", (1, 1)),
            images[2],
        ]
    )
    with pytest.warns(UserWarning, match=r"skipped 3 of 6 images: .*missing\.png does not exist.*text\.jpg") as warned:
        found = dymu.calibrate(model, processor, mixed, [20], progress=False)
    assert warned[0].filename == __file__
    assert found.calibrated == plain.calibrated
    assert found.images == 3
    assert [skipped["image"] for skipped in found.skipped] == [
        str(tmp_path / "missing.png"),
        str(tmp_path / "text.jpg"),
        "image 5",
    ]


def shapes(image: Image.Image) -> dict[str, object]:
    """The same image in every form in which people have it."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    return {
        "array": array,
        "array not in a row": np.asfortranarray(array),
        "floats": array.astype(np.float32) / 255,
        "with an alpha channel": np.dstack([array, np.full(array.shape[:2], 255, np.uint8)]),
        "tensor": tensor,
        "tensor of floats": tensor.double() / 255,
        "tensor with a graph": (tensor.float() / 255).requires_grad_(),
        "bytes": encoded.getvalue(),
        "bytearray": bytearray(encoded.getvalue()),
        "row": {"image": image, "label": 3},
        "row of an array": {"image": array},
        "row that is not decoded": {"image": {"bytes": encoded.getvalue(), "path": "gone.png"}},
    }


def test_images_in_every_form(tmp_path, processor, images, recwarn) -> None:
    model = tiny.llava("clip")
    options = {"budgets": 20, "progress": False}
    plain = dymu.calibrate(model, processor, images[:3], **options).calibrated
    forms = [shapes(image) for image in images[:3]]
    for name in forms[0]:
        assert dymu.calibrate(model, processor, [form[name] for form in forms], **options).calibrated == plain, name
    for index, image in enumerate(images[:3]):
        image.save(tmp_path / f"{index}.png")
    for whole in (
        tmp_path,
        str(tmp_path),
        [tmp_path],
        [{"image": str(path)} for path in sorted(tmp_path.iterdir())],
        [{"image": {"bytes": None, "path": str(path)}} for path in sorted(tmp_path.iterdir())],
        np.stack([form["array"] for form in forms]),
        torch.stack([form["tensor"] for form in forms]),
        (image for image in images[:3]),
        map(str, sorted(tmp_path.iterdir())),
    ):
        assert dymu.calibrate(model, processor, whole, **options).calibrated == plain, whole
    one = dymu.calibrate(model, processor, images[:1], **options).calibrated
    for single in (images[0], *(forms[0][name] for name in ("array", "tensor", "bytes", "row")), tmp_path / "0.png"):
        assert dymu.calibrate(model, processor, single, **options).calibrated == one
    grey = np.asarray(images[0].convert("L"))
    of_grey = [grey, grey[..., None], torch.from_numpy(grey.copy()), torch.from_numpy(grey.copy())[None]]
    assert len({dymu.calibrate(model, processor, [x], **options).calibrated for x in of_grey}) == 1
    assert not recwarn.list


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.full((8, 8, 3), 200.0), "floats from 200 to 200"),
        (np.full((8, 8), np.nan), "floats, of which some are NaN"),
        (torch.randn(3, 8, 8), "floats from -"),
        (np.zeros((8, 8, 3), np.int64), "an array of int64: give uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.bool), "a tensor of bool"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\]: give \[rows, columns"),
        (torch.zeros(8, 8, 3), r"shape \[8, 8, 3\]: give \[\(1, 3 or 4 colours,\) rows"),
        (np.zeros((2, 2, 3), np.uint8), "too small"),
        (np.zeros((0, 0, 3), np.uint8), "too small"),
        (np.array([["a", "b"], ["c", "d"]]), "an array of <U1"),
        (b"abc", "not an image"),
        (b"", "not an image"),
        ({"picture": 1, "label": 2}, "no field `image` but 'picture', 'label'"),
        ({}, "no field `image` but none"),
        ({"image": None}, "nothing in its field `image`"),
        ({"image": {"bytes": None, "path": None}}, "nothing in its field `image`"),
        ({"image": [1]}, "is a list: give a path"),
        (5, "is a int: give a path"),
        (None, "is a NoneType"),
        ("~nosuch.png", "~nosuch.png does not exist"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_image_is_skipped_and_named(image, says: str, processor, images) -> None:
    model = tiny.llava("clip")
    with pytest.warns(UserWarning, match=r"skipped 1 of 2 images") as warned:
        found = dymu.calibrate(model, processor, [image, images[0]], [20], progress=False)
    assert re.search(says, f"{found.skipped[0]['image']} {found.skipped[0]['why']}")
    assert found.images == 1
    assert "\n" not in str(warned[0].message)
    with pytest.raises(dymu.DymuError, match=r"all 1 were skipped, the first because"):
        dymu.calibrate(model, processor, [image], [20], progress=False)


def test_a_folder_says_what_is_left_out(tmp_path, processor, images, monkeypatch) -> None:
    model = tiny.llava("clip")
    for name, image in zip(("a.JPG", "b.jfif", "~c.png"), images, strict=False):
        image.save(tmp_path / name, "PNG")
    for name in ("x.heic", "y.HEIC", "z.svg", "noname", ".trash.jpg"):
        (tmp_path / name).write_bytes(b"other")
    for name in ("raw", "more.png"):
        (tmp_path / name).mkdir()
    with pytest.warns(UserWarning, match="left out of") as warned:
        found = dymu.calibrate(model, processor, tmp_path, [20], progress=False)
    assert warned[0].filename == __file__
    assert str(warned[0].message) == (
        f"left out of {tmp_path}, as not read here: 2 .heic, 1 without a suffix, 1 .svg, the folders more.png, raw"
    )
    assert (found.images, found.skipped) == (3, ())
    monkeypatch.chdir(tmp_path)
    assert dymu.calibrate(model, processor, ["~c.png"], [20], progress=False).images == 1
    with pytest.raises(dymu.DymuError, match=r"the first because raw holds no images: name a folder that does"):
        dymu.calibrate(model, processor, "raw", [20], progress=False)
    with pytest.warns(UserWarning, match=r"skipped 1 of 2 images: raw holds no images"):
        assert dymu.calibrate(model, processor, ["raw", "a.JPG"], [20], progress=False).images == 1


def test_budgets_may_be_one_number(processor, images) -> None:
    model = tiny.llava("clip")
    for budgets in (20, 20.0, np.int64(20), np.array(20), torch.tensor(20), (20,), iter([20])):
        assert dymu.calibrate(model, processor, images, budgets, progress=False).budgets == [20]
    assert dymu.calibrate(model, processor, images, 0.5, progress=False).budgets == [24]
    for budgets in ("20", [None], float("nan"), float("inf")):
        with pytest.raises(dymu.BadBudget):
            dymu.calibrate(model, processor, images, budgets, progress=False)


def test_what_is_no_processor_is_one_sentence(images) -> None:
    model = tiny.llava("clip")
    for processor in (None, "llava", tiny.llava_processor().tokenizer, CLIPImageProcessorPil):
        with pytest.raises(dymu.DymuError, match=r"makes no pixels of images: give the model's processor"):
            dymu.calibrate(model, processor, images, [20], progress=False)


def test_videos_of_arrays_and_tensors(images) -> None:
    model = tiny.llava(family="llava_onevision", tower="siglip")
    processor = tiny.VideoProcessor()
    thresholds = dymu.calibrate(model, tiny.processor("llava_onevision"), images, [0.4], progress=False)
    frames = images[:4]
    arrays = np.stack([np.asarray(image) for image in frames])
    options = {"thresholds": thresholds, "per_second": 15, "fps": 2, "progress": False}
    found = dymu.calibrate_videos(model, processor, [frames], **options)
    for videos in ([arrays], arrays, [list(arrays)], [torch.from_numpy(arrays).permute(0, 3, 1, 2)]):
        assert dymu.calibrate_videos(model, processor, videos, **options) == found
    for videos in (5, [5]):
        with pytest.raises(dymu.BadVideo, match=r"a int (holds no videos|is not a video)"):
            dymu.calibrate_videos(model, processor, videos, **options)
    with pytest.raises(dymu.BadBudget, match="tokens per second are a number, not 'a'"):
        dymu.calibrate_videos(model, processor, [frames], **{**options, "per_second": ["a"]})
    with pytest.raises(dymu.DymuError, match="makes no pixels of videos"):
        dymu.calibrate_videos(model, tiny.llava_processor().tokenizer, [frames], **options)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_videos_whose_patches_show_two_frames(name: str, images) -> None:
    model, processor = tiny.build(name), processor_for("qwen2_5_vl")
    thresholds = dymu.calibrate(model, processor, images, [0.6], progress=False)
    clips = [[photo] * 4 for photo in images[:2]] + [[images[2]] * 3 + [images[3]] * 4]
    found = dymu.calibrate_videos(model, processor, clips, thresholds, [10, 12], fps=2, progress=False)
    made = processor.video_processor([clips[2]])
    with dymu.apply(model, found, per_second=12) as handle:
        features = model.model.get_video_features(
            made["pixel_values_videos"], video_grid_thw=made["video_grid_thw"]
        ).pooler_output
        (item,) = handle.last.items
    assert (item.video, item.pictures, len(item.leaders)) == (True, 4, len(features[0]))
    entry = found.over_time[1]
    assert (entry.per_second, entry.videos, entry.seconds) == (12, 3, 7.5)
    assert entry.achieved == pytest.approx(12, abs=1)
    with dymu.apply(model, found, per_second=12) as handle:
        kept = 0
        for clip in clips:
            made = processor.video_processor([clip])
            model.model.get_video_features(made["pixel_values_videos"], video_grid_thw=made["video_grid_thw"])
            kept += handle.last.kept[0]
    assert kept / 7.5 == entry.achieved


def test_says_where_thresholds_come_from(tmp_path, capsys, processor, images) -> None:
    model = tiny.llava("dinov2_with_registers", layer=-1)
    model.config._name_or_path = str(tmp_path)
    found = dymu.calibrate(model, processor, images, (0.5,), schedule="linear")
    assert capsys.readouterr() == ("", "")  # no bar where stderr is no terminal
    assert (found.model, found.images, found.schedule) == (tmp_path.name, COUNT, "linear")
    assert found.dymu == dymu.__version__
    assert abs((date.fromisoformat(found.created) - date.today()).days) <= 1
    assert found.encoder is not None
    assert (found.encoder.model_type, found.encoder.depth, found.encoder.tokens) == (
        "dinov2_with_registers",
        tiny.LAYERS,
        tiny.PATCHES,
    )
    found.save(tmp_path / "thresholds.json")
    assert dymu.Thresholds.load(tmp_path / "thresholds.json") == found


def test_refuses_what_cannot_work(processor, images) -> None:
    model = tiny.llava("clip")
    with pytest.raises(dymu.BadBudget, match=r"cannot keep 50 of 49 tokens"):
        dymu.calibrate(model, processor, images, [50], progress=False)
    with pytest.raises(dymu.BadBudget, match=r"cannot keep 5 of 49 tokens in 3 layers"):
        dymu.calibrate(model, processor, images, [0.1], progress=False)
    with pytest.raises(dymu.DymuError, match=r"none was given"):
        dymu.calibrate(model, processor, [], [10], progress=False)
    with pytest.raises(dymu.DymuError, match=r"all 2 were skipped, the first because a\.png does not exist"):
        dymu.calibrate(model, processor, ["a.png", "b.png"], [10], progress=False)
    with pytest.raises(dymu.UnsupportedModel):
        dymu.calibrate(nn.Linear(1, 1), processor, images, [10], progress=False)
    with pytest.raises(ValueError, match="unknown schedule"):
        dymu.calibrate(model, processor, images, [10], schedule="other", progress=False)
    for layers in ([], [3], [-1], [0, 7], [1.5], ["1"]):
        with pytest.raises(dymu.DymuError, match=r"not some of the layers 0 to 2"):
            dymu.calibrate(model, processor, images, [30], merge_layers=layers, progress=False)
    with pytest.raises(dymu.BadBudget, match="in 1 layers"):
        dymu.calibrate(model, processor, images, [20], merge_layers=[1], progress=False)
    for budget in ("20", None, True):
        with pytest.raises(dymu.BadBudget, match="a budget is a number"):
            dymu.calibrate(model, processor, images, [budget], progress=False)
    with pytest.raises(ValueError, match="at least one budget"):
        dymu.calibrate(model, processor, images, [], progress=False)
    with pytest.raises(dymu.DymuError, match=r"ahead of the first encoder layer"):
        dymu.calibrate(tiny.llava("clip", layer=0), processor, images, [10], progress=False)
    whole = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    sizes = [image.resize((28, side)) for image, side in zip(images, (28, 32), strict=False)]
    with pytest.raises(dymu.DymuError, match=r"does not take what a CLIPImageProcessorPil makes of image 2 \(Input im"):
        dymu.calibrate(model, whole, sizes, [10], progress=False)
    qwen = tiny.build("qwen2_5_vl")
    with pytest.raises(dymu.DymuError, match="a CLIPImageProcessorPil makes no image_grid_thw, which this model needs"):
        dymu.calibrate(qwen, processor, images, [10], progress=False)
    late = tiny.build(
        "qwen2_5_vl", vision={**tiny_families.FAMILIES["qwen2_5_vl"].vision, "fullatt_block_indexes": [0]}
    )
    with pytest.raises(dymu.UnsupportedModel, match="first layer attends over whole pictures and a later one within"):
        dymu.calibrate(late, tiny.processor("qwen2_5_vl"), of_many_sizes(images[:2]), [20], progress=False)
    with (
        dymu.apply(late, merge=FixedMerge(keep=10)),
        pytest.raises(dymu.UnsupportedModel, match="first layer attends over whole pictures and a later one within"),
    ):
        tiny.features_of(late, **tiny.seen(late, of_many_sizes(images[:2])))
    with pytest.raises(dymu.BadBudget, match=r"cannot keep 60 tokens of images that have 38\.0 on average"):
        dymu.calibrate(qwen, tiny.processor("qwen2_5_vl"), of_many_sizes(images[:2]), [60], progress=False)


def test_says_when_equal_images_cannot_meet_a_budget(processor) -> None:
    model = tiny.llava("clip")
    with torch.no_grad():
        resolve(model).tower.get_parameter("embeddings.position_embedding.weight").zero_()
    with pytest.warns(UserWarning, match=r"for a budget of 20 tokens the images keep .* exactly alike"):
        found = dymu.calibrate(model, processor, [Image.new("RGB", (28, 28))] * 3, [20], progress=False)
    assert found.calibrated[0].achieved != 20


OF_MANY_SIZES = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "exaone4_5", "paddleocr_vl", "video_llama_3", "mistral3",
    "llava+pixtral", "gemma4", "internvl", "smolvlm", "aya_vision", "ovis2", "granite_docling",
)  # fmt: skip
"""Families whose images have different numbers of tokens, as they are or cut into tiles."""
IN_TILES: dict[str, dict[str, Any]] = {
    **{name: {"crop_to_patches": True} for name in ("internvl", "aya_vision", "ovis2")},
    "smolvlm": {"do_image_splitting": True, "size": {"longest_edge": 160}},
}
"""Settings of their processors."""


def of_many_sizes(images: list[Image.Image]) -> list[Image.Image]:
    sizes = [(48, 48), (64, 40), (40, 96), (120, 56), (56, 56)]
    return [image.resize(sizes[number % len(sizes)]) for number, image in enumerate(images)]


def processor_of(name: str) -> Any:
    """One that makes pictures of different sizes, or different numbers of tiles."""
    processor = tiny.processor(name)
    return type(processor)(**{**processor.to_dict(), **IN_TILES[name]}) if name in IN_TILES else processor


def counted(model: Any, processor: Any, photos: list[Image.Image], thresholds: dymu.Thresholds, budget: float) -> Any:
    """How many tokens of each image there are, and how many `dymu.apply` keeps."""
    takes = inspect.signature(type(model.model).get_image_features).parameters
    full, left = [], []
    with dymu.apply(model, thresholds, budget=budget) as handle, torch.inference_mode():
        for photo in photos:
            made = processor(images=[photo], return_tensors="pt")
            model.model.get_image_features(**{name: value for name, value in made.items() if name in takes})
            full.append(sum(int(item.patch.sum()) for item in handle.last.items))
            left.append(sum(item.budgeted for item in handle.last.items))
    return full, left


@pytest.mark.parametrize("name", [name for name in OF_MANY_SIZES if tiny_families.FAMILIES[name].exists])
def test_a_budget_is_the_mean_over_images_of_any_size(name: str, images: list[Image.Image], tmp_path) -> None:
    model, processor, photos = tiny.build(name), processor_of(name), of_many_sizes(images)
    options = {"budgets": [0.3, 0.6, 1.0], "progress": False}
    found = dymu.calibrate(model, processor, photos, batch_size=3, memory_limit_bytes=0, **options)
    found.save(tmp_path / "thresholds.json")
    found = dymu.Thresholds.load(tmp_path / "thresholds.json")
    for part, entry in zip((0.3, 0.6, 1.0), found.calibrated, strict=True):
        full, left = counted(model, processor, photos, found, part)
        assert len(set(full)) > 1
        assert found.image_tokens == np.mean(full)
        assert [np.mean(left), min(left), max(left)] == [entry.achieved, entry.min, entry.max]
        assert entry.achieved == pytest.approx(entry.budget, abs=0.5 / len(photos))
        assert entry.budget == (found.image_tokens if part == 1 else round(part * found.image_tokens))
    together = dymu.calibrate(model, processor, photos, batch_size=100, **options)
    for mine, its in zip(found.calibrated, together.calibrated, strict=True):
        assert mine.thresholds == pytest.approx(its.thresholds, abs=1e-6)


@pytest.mark.parametrize("name", ["internvl", "gemma3", "qwen2_5_vl", "mistral3"])
def test_as_many_merge_in_each_layer_as_a_slow_count_says(name: str, images: list[Image.Image]) -> None:
    """Of units of several patches, behind a class token and alone; in windows and out of them; in rows."""
    model, processor, photos = tiny.build(name), processor_of(name), of_many_sizes(images[:6])
    entry = dymu.calibrate(model, processor, photos, [0.4], progress=False).calibrated[0]
    left = np.zeros(tiny.LAYERS, dtype=int)
    first, pictures = 0, 0
    for photo in photos:
        made = processor(images=[photo], return_tensors="pt")
        by_hand = encoded_by_hand(model, entry.thresholds, **made)
        left += np.array([sum(of_layer) for of_layer in by_hand.counts])
        untouched = encoded_by_hand(model, [NEVER] * tiny.LAYERS, **made).counts[0]
        first, pictures = first + sum(untouched), pictures + len(untouched)
    keep = entry.budget * len(photos) / pictures
    removed = np.cumsum(removals(first / pictures, keep, tiny.LAYERS, "reverse_linear")) * pictures
    assert left.tolist() == [first - round(due) for due in removed]
    assert entry.achieved == left[-1] / len(photos)


def test_native_resolution() -> None:
    """Images of 200 to 1,500 pixels a side, in an encoder of Qwen2.5-VL's patches, units and windows."""
    sizes = [(200, 220), (640, 480), (333, 900), (1500, 1000), (420, 1400), (750, 750)]
    folder = Path(dymu.__file__).parent / "bench" / "photos"
    photos = [Image.open(path).resize(size) for path, size in zip(sorted(folder.iterdir())[1:], sizes, strict=False)]
    vision = {**tiny_families.FAMILIES["qwen2_5_vl"].vision, "patch_size": 14, "window_size": 112, "num_heads": 2}
    model = tiny.build("qwen2_5_vl", vision=vision)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 2 * 1500**2})
    found = dymu.calibrate(model, processor, photos, [0.15, 0.4], progress=False)
    for part in (0.15, 0.4):
        full, left = counted(model, processor, photos, found, part)
        assert (min(full), max(full)) == (56, 54 * 36)
        assert sum(left) / sum(full) == pytest.approx(part, rel=0.01)
        assert min(one / of for one, of in zip(left, full, strict=True)) < 0.9 * part  # simple images keep fewer


def test_pictures_of_several_sizes_in_a_batch(images) -> None:
    """An encoder that interpolates its positions takes them as the processor leaves them."""
    model = tiny.llava("dinov2", layer=-1)
    whole = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    photos = [image.resize((28, (28, 32, 40)[number % 3])) for number, image in enumerate(images)]
    found = dymu.calibrate(model, whole, photos, [0.5], batch_size=2, progress=False)
    full, left = counted(model, whole, photos, found, 0.5)
    assert sorted(set(full)) == [49, 56, 70]
    assert (found.image_tokens, found.calibrated[0].achieved) == (np.mean(full), np.mean(left))


def test_masks_take_no_memory_while_images_wait() -> None:
    mask = torch.ones(1, 4, 100, 100, dtype=torch.bool)
    assert _without_memory(mask).untyped_storage().nbytes() == 1
    assert torch.equal(_without_memory(mask), mask)
    mask[0, 0, 0, 0] = False
    assert _without_memory(mask) is mask


@given(
    st.lists(st.floats(-1, 1, width=32), max_size=30, unique=True) | st.lists(st.sampled_from([0.5, 0.25, 1.0, -1.0])),
    st.integers(-3, 40),
)
def test_a_threshold_has_as_many_edges_above_it_as_wanted(values: list[float], count: int) -> None:
    edges = torch.tensor(values, dtype=torch.float32)
    threshold, merged = threshold_for(edges, count, Alone())
    assert np.float32(threshold) == threshold
    assert int((edges > threshold).sum()) == merged
    possible = {int((edges > value).sum()) for value in [*values, -2.0]}
    assert abs(merged - count) == min(abs(n - count) for n in possible)
    if len(set(values)) == len(values):
        assert merged == min(max(count, 0), len(values))


class InThreads:
    """Workers that are threads, each with an `Exchange` of its own."""

    def __init__(self, workers: int) -> None:
        self.barrier, self.said = threading.Barrier(workers), [None] * workers

    def told(self, worker: int, value: Any) -> list[Any]:
        self.said[worker] = value
        self.barrier.wait(30)
        said = list(self.said)
        self.barrier.wait(30)
        return said

    @classmethod
    def run(cls, parts: list[Any], work: Callable[[Any, Exchange], Any]) -> list[Any]:
        """The work on every part, by a worker each."""
        all_of_them = cls(len(parts))
        with ThreadPoolExecutor(len(parts)) as pool:
            return list(pool.map(lambda one: work(one[1], Exchange(all_of_them, one[0])), enumerate(parts)))


@dataclass
class Exchange:
    """What one of them tells the others."""

    all_of_them: InThreads
    worker: int

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.all_of_them.told(self.worker, numbers)).sum(0)

    def gather(self, values: Any) -> list[Any]:
        return [value for said in self.all_of_them.told(self.worker, list(values)) for value in said]


@given(
    st.lists(st.floats(-1, 1.0000002384185791, width=32), max_size=20)
    | st.lists(st.sampled_from([0.5, 0.25, 1.0, -1.0, -0.0, 0.0]), max_size=20),
    st.integers(-3, 25),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_workers_find_the_threshold_of_one(values: list[float], count: int, workers: int, dtype: torch.dtype) -> None:
    edges = torch.tensor(values, dtype=dtype)
    threshold, merged = threshold_for(edges, count, Alone())
    found = InThreads.run(
        [edges[worker::workers] for worker in range(workers)], lambda own, told: threshold_for(own, count, told)
    )
    assert {each for each, _ in found} == {threshold}
    assert {each for _, each in found} == {merged}


@pytest.mark.parametrize("name", ["llava", "smolvlm", "qwen2_5_vl"])
def test_workers_with_whole_batches_find_the_thresholds_of_one(images, name: str) -> None:
    model, processor = tiny.build(name), tiny.processor(name)
    photos = [images[number % len(images)].rotate(number) for number in range(7)]
    alone = dymu.calibrate(model, processor, photos, [0.3, 0.6], batch_size=2, progress=False)

    def work(own: list[Any], told: Exchange) -> Thresholds:
        found, _ = share(model, processor, own, [0.3, 0.6], told, batch_size=2, progress=False)
        return found

    parts = [[*photos[:2], *photos[4:6]], [*photos[2:4], *photos[6:]], []]
    for found in InThreads.run(parts, work):
        assert found.calibrated == alone.calibrated
        assert (found.images, found.image_tokens) == (alone.images, alone.image_tokens)


def test_edges_that_rounding_put_above_1_merge() -> None:
    edges = torch.tensor([1.0000001, 1.0000002, 1.0, 0.5])
    threshold, count = threshold_for(edges, 3, Alone())
    assert (0.5 < threshold < 1, count) == (True, 3)
    assert threshold_for(edges, 2, Alone()) == (threshold, 3)  # nearer than none
    assert threshold_for(edges, 1, Alone())[0] > 1


def test_images_of_one_colour_meet_the_budget_with_others(images) -> None:
    """Their tokens have cosines of 1 but for rounding."""
    model, processor = tiny.build("qwen2_5_vl"), tiny.processor("qwen2_5_vl")
    photos = [Image.new("RGB", (80, 80), (30 * shade, 250 - 25 * shade, 90)) for shade in range(3)]
    photos += of_many_sizes(images)
    found = dymu.calibrate(model, processor, photos, [0.75], schedule="linear", progress=False)
    entry = found.calibrated[0]
    assert entry.achieved == pytest.approx(entry.budget, rel=0.02)
    assert np.mean(counted(model, processor, photos, found, 0.75)[1]) == pytest.approx(entry.achieved, abs=1)


class Lengths(list):
    def __init__(self, items: list, length: object) -> None:
        super().__init__(items)
        self._length = length

    def __len__(self) -> int:
        return self._length()  # type: ignore[operator]


def _raises() -> int:
    raise RuntimeError("not known yet")


@pytest.mark.parametrize("length", [_raises, lambda: -1])
def test_a_wrong_length_is_ignored(length, processor, images) -> None:
    thresholds = dymu.calibrate(tiny.llava("clip"), processor, Lengths(images[:2], length), [20], progress=False)
    assert thresholds.images == 2


def test_one_image_in_any_form_is_one(processor, images, tmp_path) -> None:
    file = io.BytesIO()
    images[0].save(file, "PNG")
    model = tiny.llava("clip")
    assert dymu.calibrate(model, processor, memoryview(file.getvalue()), [20], progress=False).images == 1
    (tmp_path / "a.png").write_bytes(file.getvalue())
    with (tmp_path / "a.png").open("rb") as opened:
        for source in (io.BytesIO(file.getvalue()), opened):
            with pytest.raises(dymu.BadImage, match=r"is an open file: give its path, or the bytes read from it"):
                dymu.calibrate(model, processor, source, [20], progress=False)
    for number in (np.array(0), torch.tensor(0), np.float32(1)):
        with pytest.raises(dymu.BadImage, match=r"holds no images: give a folder"):
            dymu.calibrate(model, processor, number, [20], progress=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"merge_layers": 5}, "the layers to merge in, 5, are not some of"),
        ({"batch_size": "8"}, "a whole number of at least 1 as batch_size"),
        ({"batch_size": None}, "a whole number of at least 1 as batch_size"),
        ({"budgets": b"48"}, "not b'48'"),
        ({"budgets": bytearray(b"48")}, "not bytearray"),
        ({"budgets": "48"}, "not '48'"),
    ],
)
def test_arguments_of_other_kinds_are_one_sentence(options, says, processor, images) -> None:
    with pytest.raises((dymu.DymuError, ValueError), match=says):
        dymu.calibrate(tiny.llava("clip"), processor, images, **{"budgets": [20], "progress": False} | options)
