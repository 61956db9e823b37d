"""Videos on the command line, with a tiny model that takes them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import dymu
import tiny
from dymu.cli import main, models
from dymu.measure import timing


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava("siglip", "qwen2", "llava_onevision")


@pytest.fixture(scope="module")
def thresholds(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("thresholds") / "thresholds.json"
    found = dymu.calibrate(model, tiny.processor("llava_onevision"), tiny.photos(6), [0.4, 1.0], progress=False)
    found.save(path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 8 frames: the same scene for four, then another."""
    folder = tmp_path_factory.mktemp("clip")
    scenes = [photo.resize((120, 90)) for photo in tiny.photos(3)[1:]]
    for number in range(8):
        scenes[number // 4].save(folder / f"frame{number}.png")
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Any) -> Any:
    """Call the command as a shell does: (exit code, stdout, stderr)."""
    processor = tiny.full_processor("llava_onevision")
    monkeypatch.setattr(models, "load", lambda *_: models.Loaded(model, processor))
    monkeypatch.setattr(
        models, "named", lambda name, _: models.Named(name, name, None, {"model_type": "llava_onevision"})
    )
    monkeypatch.setattr(timing, "DECODE_STEPS", 2)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dymu", *map(str, arguments)])
        try:
            main.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_a_video_is_asked_about_and_drawn(call, model, thresholds, clip, tmp_path):
    sheet, moving = tmp_path / "sheet.png", tmp_path / "moving.gif"
    common = ("run", clip, "what is this ?", "--model", "a/b", "--thresholds", thresholds, "-b", "0.4", "--json")
    code, out, err = call(*common, "--draw", sheet, "--compare")
    assert code == 0, err
    data = json.loads(out.splitlines()[-1])
    assert data["frames"] == 8
    assert data["original_tokens"] == 8 * 16 + 1  # its newline
    assert data["kept_tokens"] < 100
    assert data["untouched"]["cache_bytes"] > data["cache_bytes"]
    assert Image.open(sheet).width > 300
    code, out, err = call(*common, "--frames", 4, "--draw", moving)
    assert code == 0, err
    assert Image.open(moving).n_frames == 4


def test_tokens_per_second_are_calibrated_and_used(call, model, thresholds, clip, tmp_path):
    made = tmp_path / "videos.json"
    code, out, err = call(
        "calibrate-videos", "a/b", clip, "--thresholds", thresholds, "-b", "0.4", "--per-second", 12,
        "--per-second", 16, "--fps", 4, "-o", made, "--json",
    )  # fmt: skip
    assert code == 0, err
    entries = json.loads(out.splitlines()[-1])["over_time"]
    assert [entry["per_second"] for entry in entries] == [12, 16]
    assert "over time" in call("inspect", made)[1]
    code, out, err = call(
        "run", clip, "what is this ?", "--model", "a/b", "--thresholds", made, "-b", "0.4", "--per-second", 16, "--json"
    )
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["kept_tokens"] == entries[1]["achieved"] * 2 + 1  # its newline


def test_what_cannot_be_shown_is_said_in_a_sentence(call, thresholds, clip, tmp_path, monkeypatch):
    common = ("--model", "a/b", "--thresholds", thresholds, "-b", "0.4")
    (tmp_path / "none").mkdir()
    (tmp_path / "bad.mp4").write_bytes(b"not a film")
    photo = tmp_path / "photo.png"
    tiny.photos(1)[0].save(photo)
    sizes = tmp_path / "sizes"
    sizes.mkdir()
    for number, size in enumerate([(40, 40), (40, 30)]):
        tiny.photos(1)[0].resize(size).save(sizes / f"{number}.png")
    wrong = {
        (tmp_path / "none",): "without images",
        (tmp_path / "bad.mp4",): "no video in a format|PyAV",
        (sizes,): "differ in size",
        (clip, "--per-second", 9): "is for videos over time",
        (photo, "--per-second", 9): "is for videos",
    }
    for given, why in wrong.items():
        code, out, err = call("run", given[0], "what ?", *given[1:], *common)
        assert code in (1, 2), err
        assert out == ""
        assert "Traceback" not in err
        assert re.search(why, " ".join(err.split())), err
    monkeypatch.setattr(models, "load", lambda *_: models.Loaded(tiny.llava(), tiny.llava_processor()))
    plain = tmp_path / "plain.json"
    dymu.calibrate(tiny.llava(), tiny.processor(), tiny.photos(4), [20], progress=False).save(plain)
    code, _, err = call("run", clip, "what ?", "--model", "a/b", "--thresholds", plain)
    assert code == 1
    assert "takes no videos" in err


def test_more_frames_than_the_language_model_was_made_for(call, model, thresholds, clip, monkeypatch):
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", 60)
    code, _, err = call("run", clip, "what ?", "--model", "a/b", "--thresholds", thresholds, "-b", "0.4")
    assert code == 1
    assert "8 frames and the question make a prompt" in " ".join(err.split())
    assert "--frames" in err
