"""The examples run as they stand, in a clone's root."""

import re
import runpy
import shutil
import sys
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

import dymu
import tiny

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PHOTOS = sorted((ROOT / "src" / "dymu" / "bench" / "photos").glob("*.webp"))


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run an example, and get its lines on stdout."""

    def run(name: str, *arguments: object) -> list[str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.strip().splitlines()

    return run


def test_caption_folder(example, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("photo.jpg", "scene.png"):
        shutil.copy(EXAMPLES / name, folder)
    lines = example("caption_folder.py", "models/demo", folder, tmp_path / "captions.jsonl")
    assert [line.split(":")[0] for line in lines] == ["photo.jpg", "scene.png"]
    assert re.fullmatch(r"photo\.jpg: building \(\d+ of 256 image tokens\)", lines[0])
    written = (tmp_path / "captions.jsonl").read_bytes()
    assert example("caption_folder.py", "models/demo", folder, tmp_path / "captions.jsonl") == lines
    assert (tmp_path / "captions.jsonl").read_bytes() == written


def test_batch_of_questions(example):
    lines = example("batch_of_questions.py")
    assert len(lines) == 6
    assert lines[2].endswith("What is this? pyramid")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_calibrate_on_own_images(example, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in PHOTOS[:20]:
        shutil.copy(photo, folder)
    *budgets, told, handle = example("calibrate_on_own_images.py", "models/demo", folder, tmp_path / "thresholds.json")
    assert [line.split(":")[0] for line in budgets] == ["budget 38", "budget 77", "budget 128"]
    assert "in reserve, of 256" in told
    assert "budget" in handle
    assert dymu.Thresholds.load(tmp_path / "thresholds.json").budgets == [38, 77, 128]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_video(example, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"video\.py MODEL VIDEO"):
        example("video.py")
    model, processor = tiny.llava("siglip", "qwen2", "llava_onevision"), tiny.full_processor("llava_onevision")
    photos = tiny.photos(6)
    dymu.calibrate(model, tiny.processor("llava_onevision"), photos, [0.3, 1.0], progress=False).save(
        tmp_path / "thresholds.json"
    )
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    clip = tmp_path / "clip"
    clip.mkdir()
    for number in range(4):
        photos[number // 2 + 1].resize((120, 90)).save(clip / f"frame{number}.png")
    *_, counts = example("video.py", tmp_path, clip, "what is this ?", tmp_path / "frames.png")
    kept, of = map(int, counts.split(" tokens")[0].split(" of "))
    assert 4 < kept < of
    assert Image.open(tmp_path / "frames.png").width > 300


def test_encoder_features(example):
    with torch.enable_grad():  # as scripts find it
        *lines, shape = example("encoder_features.py")
    assert len(lines) == 3
    assert all(float(line.split()[-1]) > 0.98 for line in lines)
    assert re.search(r"\[3, \d+, 384\]", shape)


def test_agent_screenshots(example):
    told = [line.split(": ")[1].split(" of ")[0] for line in example("agent_screenshots.py")]
    photo, pyramid, scene = zip_longest(*(map(int, counts.split(" + ")) for counts in told), fillvalue=0)
    assert photo[0] > photo[1] > photo[2]
    assert pyramid[1] > pyramid[2]
    assert scene[2] > pyramid[2]


def test_each_example_is_short_and_listed():
    listed = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        lines = path.read_text().splitlines()
        assert 15 <= len(lines) <= 50
        assert lines[0].startswith('"""')
        assert f"({path.name})" in listed
