"""`dymu caption`: every image once, whatever is killed or broken."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu
from dymu.captioning import Captioner, Row, caption, sources_in
from dymu.captioning.file import Header, read
from dymu.errors import BadImage, DymuError
from dymu.measure.results import BadResults
from dymu.thresholds import Thresholds

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "models" / "demo"
PHOTOS = sorted((ROOT / "src" / "dymu" / "bench" / "photos").glob("*.webp"))
DYMU = [sys.executable, "-c", "from dymu.cli.main import main; main()", "caption"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for photo in PHOTOS[:8]:
        shutil.copy(photo, folder)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    model = AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32).eval()
    handle = dymu.apply(model, DEMO, budget=0.3)
    return Captioner(model, AutoProcessor.from_pretrained(DEMO), handle, "What is this?", 4)


@pytest.fixture
def header(captioner: Captioner) -> Header:
    return captioner.header("photos", Thresholds.load(DEMO), "exact")


def test_every_image_has_a_line(captioner: Captioner, header: Header, photos: Path, tmp_path: Path) -> None:
    sources, left_out = sources_in(photos)
    assert "1 .txt" in left_out
    rows = caption(lambda batches: map(captioner, batches), header, sources, tmp_path / "c.jsonl", progress=False)
    assert len(rows) == 9
    assert read(tmp_path / "c.jsonl") == (header, rows)
    failed = rows.pop("broken.jpg")
    assert "not an image" in (failed.error or "")
    assert failed.caption is None
    for row in rows.values():
        assert row.caption
        assert row.original == 256
        assert 1 < (row.kept or 0) < 200


def test_what_is_there_is_not_asked_again(captioner: Captioner, header: Header, photos: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    def noting(batches):
        for batch in batches:
            asked.extend(source.name for source in batch)
            yield captioner(batch)

    sources, _ = sources_in(photos)
    caption(noting, header, sources[:3], tmp_path / "c.jsonl", progress=False)
    with (tmp_path / "c.jsonl").open("ab") as file:
        file.write(b'{"image": "half of a li')
    caption(noting, header, sources, tmp_path / "c.jsonl", batch_size=2, progress=False)
    names = [source.name for source in sources]
    assert asked == [*names[:3], *(name for name in names if name not in names[:3] or name == "broken.jpg")]
    assert len(read(tmp_path / "c.jsonl")[1]) == len(sources)
    assert (tmp_path / "c.jsonl").read_bytes().count(b"broken.jpg") == 2, "its name and why, in one line"


def test_a_file_of_another_run_or_a_damaged_one(header: Header, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    caption(lambda batches: iter(()), header, [], path, progress=False)
    other = Header(**{name: getattr(header, name) for name in header.__struct_fields__} | {"prompt": "Why?"})
    with pytest.raises(BadResults, match="differs in prompt"):
        caption(lambda batches: iter(()), other, [], path, progress=False)
    older = Header(**{name: getattr(header, name) for name in header.__struct_fields__} | {"versions": {"torch": "1"}})
    with pytest.raises(
        BadResults, match=r"differs in versions \(dymu .*, torch 2.*, now 1, transformers 5.*, now None\)"
    ):
        caption(lambda batches: iter(()), older, [], path, progress=False)
    row = b'{"image": "a.png", "caption": "a"}\n'
    path.write_bytes(path.read_bytes() + row * 2)
    with pytest.raises(BadResults, match=r"line 3 .* same image, a\.png"):
        read(path)
    path.write_bytes(path.read_bytes()[: -len(row)] + b'{"image": "b.png"}\n')
    with pytest.raises(BadResults, match=r"needs a `caption` or an `error`"):
        read(path)


def test_lists(photos: Path, tmp_path: Path) -> None:
    names = [PHOTOS[0].name, PHOTOS[1].name]
    good = photos / "list.jsonl"
    good.write_text("".join(json.dumps({"image": name, "more": 1}) + "\n" for name in names))
    assert [source.path for source in sources_in(good)[0]] == [photos / name for name in names]
    for text, said in (
        ("", "no rows"),
        ('{"picture": "a"}', "row 1 .* no path in a field `image`"),
        ('{"image": "a"}\n{"image": "a"}', "names a twice"),
        ("[", "cannot be read"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(BadImage, match=said):
            sources_in(tmp_path / "bad.jsonl")
    with pytest.raises(BadImage, match="neither a folder"):
        sources_in(tmp_path / "nothing.jsonl")


def test_a_row_is_a_caption_or_an_error() -> None:
    with pytest.raises(ValueError, match="`caption` or an `error`"):
        Row("a.png")
    with pytest.raises(ValueError, match="`caption` or an `error`"):
        Row("a.png", caption="a", error="b")


def test_ray_that_is_not_there() -> None:
    on_ray = pytest.importorskip("dymu.integrations.on_ray")
    with pytest.raises(DymuError, match=r"dymu\[ray\]"), on_ray.started("local"):
        pass


def test_a_killed_command_goes_on(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "c.jsonl"
    words = [*DYMU, str(photos), "-o", str(output), "--batch-size", "1", "--max-new-tokens", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    for _ in range(600):
        if output.exists() and output.read_bytes().count(b"\n") >= 4:
            break
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.wait()
    before = output.read_bytes().count(b"\n")
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == 1
    again = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert "8 of 9 images; 1 could not be read" in again.stdout
    otherwise = subprocess.run([*words, "--guard", "text"], capture_output=True, text=True, env=environment)
    assert "differs in guard" in otherwise.stderr
    otherwise = subprocess.run(
        [*words, "--count", "at-most", "-b", "77"], capture_output=True, text=True, env=environment
    )
    assert "differs in at_most" in otherwise.stderr
    assert before >= 4
    assert len(read(output)[1]) == 9
