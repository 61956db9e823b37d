"""Calibration, captions and evaluation over the workers of a Ray cluster that is started here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import dymu
from dymu.captioning.file import read
from dymu.integrations.on_ray import started

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models" / "demo"
PHOTOS = sorted((ROOT / "src" / "dymu" / "bench" / "photos").glob("*.webp"))
DYMU = str(Path(sys.executable).with_name("dymu"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for photo in PHOTOS[:28]:
        shutil.copy(photo, folder)
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def run(*words: Any) -> str:
    done = subprocess.run([DYMU, *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_workers_find_the_same_thresholds(photos: Path, tmp_path: Path) -> None:
    (photos / "broken.jpg").rename(photos / "zzz.jpg")  # last, so that the batches before it are alike
    for name, more in (("one", ()), ("two", ("--ray", "local", "--workers", 2))):
        said = run("calibrate", DEMO, photos, "-b", 48, "-b", 96, "-o", tmp_path / f"{name}.json", *more)
        assert "skipped 1 of 29" in said
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two


def _until(path: Path, lines: int, process: subprocess.Popen[bytes]) -> None:
    """Wait for a file of so many lines, which the process writes."""
    ends = time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, f"the command ended with {process.returncode}"
        assert time.monotonic() < ends, f"{path} has not as many lines"
        time.sleep(0.1)


def test_captions_survive_a_killed_run_and_killed_workers(photos: Path, tmp_path: Path) -> None:
    words = ["caption", photos, "--max-new-tokens", 8, "--batch-size", 2]
    run(*words, "-o", tmp_path / "one.jsonl")
    several = [*words, "-o", tmp_path / "two.jsonl", "--ray", "local"]
    started = subprocess.Popen([DYMU, *map(str, several)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _until(tmp_path / "two.jsonl", 5, started)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    started = subprocess.Popen([DYMU, *map(str, several)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _until(tmp_path / "two.jsonl", 11, started)
    for process in psutil.Process(started.pid).children(recursive=True):
        if "MapWorker" in " ".join(process.cmdline()):
            process.kill()
    assert started.wait(300) == 0
    one, two = (read(tmp_path / f"{name}.jsonl")[1] for name in ("one", "two"))
    assert len(two) == 29
    assert one == two


def test_evaluation_gives_the_same_answers(photos: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in photos.glob("*.webp"))[:12]
    rows = [{"image": name, "question": "What is this?", "answers": ["tower"]} for name in names]
    (photos / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", DEMO, "--task", photos, "-b", 0.3, "-m", "dtome", "-u", "exact", "-u", "none"]
    words += ["--batch-size", 3, "--timed", 0]
    run(*words, "-o", tmp_path / "one.jsonl")
    run(*words, "-o", tmp_path / "two.jsonl", "--ray", "local")
    one, two = (sorted((tmp_path / f"{name}.jsonl").read_text().splitlines()[1:]) for name in ("one", "two"))
    assert [_rounded(json.loads(line)) for line in one] == [_rounded(json.loads(line)) for line in two]


def _rounded(line: dict[str, Any]) -> dict[str, Any]:
    """Without the last digits of a divergence, which depend on the threads that add up."""
    for answers in filter(None, [line.get("answers")]):
        answers["kl"] = [round(value, 5) for value in answers["kl"]]
    return line


def test_nobody_at_the_address_is_said_at_once() -> None:
    """Ray would wait for minutes."""
    began = time.monotonic()
    with pytest.raises(dymu.DymuError, match="no Ray cluster answers at 127"), started("127.0.0.1:1"):
        pass
    assert time.monotonic() - began < 20
