"""From photos to thresholds, answers and drawings, with the families' own processors."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

import dymu
import tiny
from dymu.cli import main, models
from dymu.evaluation.methods import rows_for
from dymu.evaluation.run import evaluate, full_tokens
from dymu.evaluation.tasks import Example
from dymu.measure.check import check
from dymu.prompting import answers, image_tokens, inputs_for, items_by_prompt, logits_of, video_inputs_for
from tiny_processors import OF_EACH_KIND, PROCESSORS, processor_for

EXAMPLES = Path(__file__).parents[1] / "examples"
WIDE_AS_TILES = ("internvl", "smolvlm")
"""Families that cut `photos` into tiles."""


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    named = (Image.open(EXAMPLES / name).convert("RGB") for name in ("photo.jpg", "pyramid.jpg", "scene.png"))
    return [photo.resize(size) for photo, size in zip(named, ((150, 100), (100, 75), (90, 90)), strict=True)]


@pytest.fixture(scope="module", params=OF_EACH_KIND)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    model = tiny.build(name)
    model.generation_config.suppress_tokens = tiny.specials(model)
    return model


@pytest.fixture(scope="module")
def processor(name: str) -> Any:
    processor = processor_for(name)
    if name == "smolvlm":
        processor.image_processor.do_image_splitting = True
        processor.image_processor.size = {"longest_edge": 160}
    return processor


@pytest.fixture(scope="module")
def thresholds(model: Any, processor: Any, photos: list[Image.Image], tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("thresholds") / "thresholds.json"
    dymu.calibrate(model, processor, [*photos, *tiny.photos(3)], [0.3, 0.6], progress=False).save(path)
    return path


def test_the_budget_is_what_prompts_keep(model, processor, thresholds, photos) -> None:
    """However the whole processor cuts and sizes its images."""
    for budget in (0.3, 0.6):
        kept = full = 0
        with dymu.apply(model, thresholds, budget=budget) as handle:
            for photo in [*photos, *tiny.photos(3)]:
                model(**inputs_for(model, processor, [([photo], "what ?")]))
                kept, full = kept + sum(handle.last.kept), full + sum(handle.last.original)
        assert kept / full == pytest.approx(budget, abs=0.025)


def test_answers_in_a_batch_and_alone(model, processor, thresholds, photos) -> None:
    asked = [([photos[0]], "what is ?"), ([photos[1], photos[2]], "what is this ?")]
    batch = inputs_for(model, processor, asked)
    with dymu.apply(model, thresholds, budget=0.4) as handle:
        together = answers(model, processor, batch, 5)
        of_prompts = items_by_prompt(model, batch, handle.last.items)
        counts = [sum(len(item.leaders) for item in items) for items in of_prompts]
        assert counts == image_tokens(model, batch)
        for row, (one, answer) in enumerate(zip(asked, together, strict=True)):
            alone = inputs_for(model, processor, [one])
            (expected,) = answers(model, processor, alone, 5)
            assert [item.kept for item in handle.last.items] == [item.kept for item in of_prompts[row]]
            assert answer.tokens.tolist() == expected.tokens.tolist()
            tiny.close(answer.logits, expected.logits, part=1e-4)
            (again,) = logits_of(model, alone, [expected.tokens])
            tiny.close(again, expected.logits, part=1e-4)


def test_what_merged_is_drawn(name, model, processor, thresholds, photos) -> None:
    with dymu.apply(model, thresholds, budget=0.3) as handle:
        for photo in photos:
            model(**inputs_for(model, processor, [([photo], "what ?")]))
            drawn = np.asarray(handle.last.draw(photo, slice(None)), dtype=np.float32)
            plain = np.asarray(photo.resize(drawn.shape[1::-1]), dtype=np.float32)
            # Neither another picture nor the picture itself: mean colours, within lines, where they belong.
            assert 2 < np.abs(drawn - plain).mean() < 60
            assert np.abs(drawn - plain).mean() < 0.8 * np.abs(drawn - plain[::-1, ::-1]).mean()
            items = handle.last.items
            parts = sum(item.pictures for item in items)
            assert (parts > 1) == (name in WIDE_AS_TILES)
            if parts > 1:
                whole = np.asarray(handle.last.draw(photo, slice(None), view=0), dtype=np.float32)
                assert np.abs(whole - drawn).mean() > 2
            with pytest.raises(ValueError, match="not the image that the model saw"):
                handle.last.draw(photo.rotate(90, expand=True), slice(None))
            assert handle.last._repr_png_()
    with pytest.raises(IndexError):
        handle.last.draw(photos[0], slice(50, None))


@pytest.mark.parametrize("family", PROCESSORS)
def test_keeps_the_contract(family, photos) -> None:
    result = check(tiny.build(family), processor_for(family), photos[0])
    assert result.passed, result.findings


class Colours:
    """Questions about photos."""

    name, max_new_tokens, yes_no = "colours", 3, ()

    def __init__(self, photos: list[Image.Image]) -> None:
        self._photos = photos

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, index: int) -> Example:
        return Example(images=(self._photos[index],), question="what is ?", references=("red",), kind="colour")

    def score(self, example: Example, answer: str) -> float:
        return float(answer == example.references[0])

    def describe(self) -> dict[str, object]:
        return {"count": len(self)}


def test_is_evaluated(name, model, processor, thresholds, photos, tmp_path) -> None:
    task, loaded = Colours(photos), dymu.Thresholds.load(thresholds)
    budget = round(loaded.budgets[1])
    full = [image_tokens(model, inputs_for(model, processor, [([photo], "?")]))[0] for photo in photos]
    assert full_tokens(model, processor, (), [task]) == round(np.mean(full))
    results = evaluate(
        model, processor, [task], rows_for([budget], ["dtome", "tome"]), tmp_path / "r.jsonl", thresholds=[loaded],
        batch_size=3, timed=1, progress=False,
    )  # fmt: skip
    kept = {row.method: results.answers[row.key]["colours", 0].kept for row in results.header.rows}
    assert kept["untouched"] == full
    part = budget / (loaded.image_tokens or loaded.encoder.tokens)
    for count, of in zip(kept["tome"], full, strict=True):
        assert count == pytest.approx(part * of, abs=7 if name == "internvl" else 1)  # whose tiles round each
    assert kept["dtome"] != kept["tome"]
    if name in WIDE_AS_TILES or len(set(full)) > 1:
        with pytest.raises(dymu.UnsupportedModel, match="downscale sets one size for every picture"):
            evaluate(model, processor, [task], rows_for([36], ["downscale"]), tmp_path / "d.jsonl", progress=False)


@pytest.fixture
def call(monkeypatch, capsys, name, model, processor) -> Callable[..., dict[str, Any]]:
    """The JSON of a command, as a shell gets it."""
    monkeypatch.setattr(models, "load", lambda *_: models.Loaded(model, processor))
    monkeypatch.setattr(models, "named", lambda one, _: models.Named(one, one, None, {"model_type": name}))

    def run(*arguments: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["dymu", *map(str, arguments), "--json"])
        try:
            main.main()
            code: Any = 0
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        assert not code, printed.err
        answer: dict[str, Any] = json.loads(printed.out.splitlines()[-1])
        return answer

    return run


def test_on_the_command_line(call, model, thresholds, photos, tmp_path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, photo in zip(files, photos, strict=True):
        photo.save(file)
    made = tmp_path / "thresholds.json"
    data = call("calibrate", "a/b", *files, "-b", "0.4", "-o", made)
    assert data["budgets"][0]["achieved"] == pytest.approx(data["budgets"][0]["budget"], abs=0.2)
    picture = tmp_path / "merged.png"
    data = call("run", files[0], "what is ?", "--model", "a/b", "--thresholds", made, "-b", "0.4", "--draw", picture)
    assert 0 < data["kept_tokens"] < data["original_tokens"]
    assert Image.open(picture).width > 600
    assert call("check", "a/b", files[0])["passed"]


@pytest.mark.parametrize(
    ("size", "grid", "stock"),
    [
        ((448, 448), (1, 1), (1, 1)),
        ((900, 448), (2, 1), (2, 1)),
        ((640, 480), (1, 1), (4, 3)),
        ((1300, 300), (3, 1), (4, 1)),
        ((1000, 1000), (3, 3), (3, 3)),
    ],
)
def test_tiles_by_need(size: tuple[int, int], grid: tuple[int, int], stock: tuple[int, int]) -> None:
    assert dymu.tiles_for(*size) == grid
    assert get_optimal_tiled_canvas(size[::-1], (448, 448), 1, 12) == stock


def test_a_stock_processor_cuts_the_tiles_that_are_needed() -> None:
    generator = np.random.default_rng(0)
    for width, height in generator.integers(1, 3000, (300, 2)).tolist():
        grid = dymu.tiles_for(width, height, limit=9)
        assert get_optimal_tiled_canvas((height, width), (448, 448), 1, math.prod(grid)) == grid
    model, processor = tiny.build("internvl"), processor_for("internvl")
    side, counts = processor.image_processor.size["height"], []
    photo = tiny.photos(1)[0].resize((side * 4 // 3, side))
    for more in ({}, {"max_patches": math.prod(dymu.tiles_for(*photo.size, side=side))}):
        inputs = processor(images=photo, text="<image> what is ?", return_tensors="pt", **more)
        counts.append(len(inputs["pixel_values"]))
        assert image_tokens(model, dict(inputs)) == [36 * counts[-1]]
        with dymu.apply(model, merge=dymu.FixedMerge(0.5)):
            assert torch.isfinite(model(**inputs).logits).all()
    assert counts == [13, 1], "the whole and 4 × 3 tiles, or the whole alone"
    for wrong in ((0, 5), (5, -1), (5.5, 5), (5, 5, 0), (5, 5, 448, 0)):
        with pytest.raises(ValueError, match="whole numbers from 1 on"):
            dymu.tiles_for(*wrong)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_videos(family: str, photos: list[Image.Image]) -> None:
    """What the encoder sees at once are two frames."""
    model, processor = tiny.build(family), processor_for(family)
    frames = [photo.resize((96, 72)) for photo in photos[:2] for _ in range(3)][:5]
    thresholds = dymu.calibrate(model, processor, photos, [0.5], progress=False)
    thresholds = dymu.calibrate_videos(model, processor, [frames], thresholds, [20], fps=2, progress=False)
    inputs = video_inputs_for(model, processor, frames, "what is ?", fps=2)
    if family == "qwen2_5_vl":
        assert inputs["second_per_grid_ts"].tolist() == [1.0]
    with dymu.apply(model, thresholds, per_second=20) as handle:
        (answer,) = answers(model, processor, inputs, 4)
        (item,) = handle.last.items
        assert (item.video, item.pictures) == (True, 3)
        assert len(handle.last.draw_frames(frames)) == 3
        assert handle.last.draw(frames).width > 300
        with pytest.raises(ValueError, match="the model saw 3 frames of this video, and not 2"):
            handle.last.draw_frames(frames[:2])
    assert torch.isfinite(answer.logits).all()
