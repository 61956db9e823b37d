"""The command line on a tiny model, and what every wrong input gets."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

import dymu
import tiny
from dymu import prompting
from dymu.bench.run import _LeftOut
from dymu.bench.variants import timed_backends
from dymu.cli import main, models
from dymu.cli.output import Output
from dymu.families import FAMILIES
from dymu.families.resolve import resolve
from dymu.handle import encoder_of
from dymu.measure import timing
from dymu.measure.markdown import cells, markdown
from dymu.thresholds import Calibrated, Thresholds
from dymu.unmerging import BACKENDS

FIELDS = {"answer", "original_tokens", "kept_tokens", "cache_bytes"}
TIMES = {"encoder_ms", "prefill_ms", "decode_ms_per_token"}
TOKENS, FEWEST = tiny.PATCHES, 10
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny random LLaVA as a model folder, with the thresholds that it ships."""
    processor = tiny.llava_processor()
    model = tiny.llava("clip", "llama")
    path = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    every, none = (0.0,) * (tiny.LAYERS - 1), (2.0,) * (tiny.LAYERS - 1)
    Thresholds(
        (Calibrated(FEWEST, every), Calibrated(TOKENS, none)),
        encoder=encoder_of(resolve(model), tokens=TOKENS),
    ).save(path / "thresholds.json")
    return path


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    coarse = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((80, 60)).save(path)
    return path


@pytest.fixture
def dymu_command(monkeypatch, capsys):
    """Call the command as a shell does: (exit code, stdout, stderr)."""
    monkeypatch.setattr(timing, "DECODE_STEPS", 2)
    monkeypatch.delenv("DYMU_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dymu", *map(str, arguments)])
        try:
            main.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def refused(dymu_command, tmp_path):
    """Call the command, see it fail as a user's mistake should, and get its sentence."""

    def call(*arguments) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = dymu_command(*arguments)
        assert code == 1, err
        assert out == ""
        sentence = err.strip().splitlines()[-1]
        assert sentence.startswith("dymu: ")
        assert sentence.endswith((".", ".)"))
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        return sentence

    return call


def last_object(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


# run


def test_run_compares_both_models(dymu_command, folder, photo, tmp_path):
    picture = tmp_path / "merged.png"
    code, out, err = dymu_command(
        "run", photo, "what is this ?", "--model", folder, "--budget", FEWEST, "--compare",
        "--draw", picture, "--json",
    )  # fmt: skip
    assert code == 0, err
    data = last_object(out)
    assert data.keys() >= FIELDS | TIMES
    assert data["untouched"].keys() == FIELDS | TIMES
    assert data["original_tokens"] == TOKENS
    assert 0 < data["kept_tokens"] < TOKENS
    assert data["untouched"]["kept_tokens"] == TOKENS
    assert 0 < data["cache_bytes"] < data["untouched"]["cache_bytes"]
    assert min(data["encoder_ms"], data["prefill_ms"], data["decode_ms_per_token"]) > 0
    both = data["encoder_ms"] + data["prefill_ms"]
    full = data["untouched"]["encoder_ms"] + data["untouched"]["prefill_ms"]
    assert data["time_to_first_token_ratio"] == pytest.approx(both / full, rel=1e-2)
    assert data["repeats"] >= 1
    assert list(tmp_path.iterdir()) == [picture]
    assert Image.open(picture).size > (0, 0)


def test_run_for_people(dymu_command, folder, photo):
    code, out, _ = dymu_command("run", photo, "what is this ?", "--model", folder, "-b", "0.5")
    assert code == 0
    assert "image tokens" in out
    assert f"of {TOKENS}" in out


def test_an_answer_is_shown_as_it_is(dymu_command, folder, photo, monkeypatch):
    real = models.answer
    monkeypatch.setattr(models, "answer", lambda *arguments: ("a [/b] [red]cat", real(*arguments)[1]))
    code, out, _ = dymu_command("run", photo, "what ?", "--model", folder, "-b", FEWEST)
    assert code == 0
    assert "a [/b] [red]cat" in out


def test_run_on_the_demo_models_default(dymu_command, folder, photo, monkeypatch):
    monkeypatch.setenv("DYMU_DEMO_MODEL", str(folder))
    code, out, _ = dymu_command("run", photo, "what is this ?", "--json")
    assert code == 0
    assert last_object(out)["budget"] == models.DEMO_BUDGET
    assert last_object(out)["model"] == str(folder)


@pytest.mark.parametrize(("count", "also"), [("at-most", ("--focus", "edges")), ("exactly", ("--guard", "text"))])
def test_a_budget_may_be_a_cap_or_exact(dymu_command, folder, photo, count, also):
    code, out, err = dymu_command(
        "run", photo, "what is this ?", "--model", folder, "--count", count, "-b", FEWEST + 3, *also, "--json"
    )
    assert code == 0, err
    told = last_object(out)
    assert (told["kept_tokens"] == FEWEST + 3) if count == "exactly" else (told["kept_tokens"] <= FEWEST + 3)
    assert (told["count"], told[also[0][2:]]) == (count, also[1])


def test_run_takes_the_only_budget_of_a_thresholds_file(dymu_command, refused, folder, photo, monkeypatch, tmp_path):
    calibrated = Thresholds.load(folder)
    one = msgspec.structs.replace(calibrated, calibrated=calibrated.calibrated[:1])
    one.save(tmp_path / "one.json")
    monkeypatch.setenv("DYMU_DEMO_MODEL", str(folder))
    words = ["run", photo, "what is this ?", "--thresholds", tmp_path / "one.json"]
    code, out, err = dymu_command(*words, "--json")
    assert code == 0, err
    assert last_object(out)["kept_tokens"] < TOKENS
    assert f"is not {FEWEST}, the only one of" in refused(*words, "-b", 20)


def test_run_unmerges_and_caches_as_asked(dymu_command, folder, photo):
    words = ["run", photo, "what is this ?", "--model", folder, "-b", FEWEST, "--json"]
    sizes = {}
    for cache in ("merged", "fast"):
        code, out, err = dymu_command(*words, "--unmerge", "representative", "--cache", cache)
        assert code == 0, err
        assert (last_object(out)["unmerge"], last_object(out)["cache"]) == ("representative", cache)
        sizes[cache] = last_object(out)["cache_bytes"]
    assert sizes["merged"] < sizes["fast"]
    code, _, err = dymu_command(*words, "--unmerge", "compact", "--cache", "fast")
    assert code == 2
    assert "--unmerge compact has one of each" in err


@pytest.mark.parametrize("name", ["models/nope", "./here/nope"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(refused, photo, monkeypatch, tmp_path, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert "does not exist" in refused("run", photo, "what ?", "--model", name)


def test_with_nothing_merged_the_answers_are_the_same(dymu_command, folder, photo):
    code, out, _ = dymu_command(
        "run", photo, "what is this ?", "--model", folder, "--budget", TOKENS, "--compare", "--json"
    )
    data = last_object(out)
    assert code == 0
    assert data["kept_tokens"] == TOKENS
    assert data["answer"] == data["untouched"]["answer"]
    assert data["cache_bytes"] == data["untouched"]["cache_bytes"]


def test_what_was_done_to_the_image_is_said_on_stderr(dymu_command, folder, tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    code, out, err = dymu_command("run", tmp_path / "a.gif", "what ?", "--model", folder, "-b", "50%", "--json")
    assert code == 0
    assert "using the first of 2 frames" in err
    assert last_object(out)["notes"] == ["animated GIF: using the first of 2 frames"]


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10)])
def test_run_refuses_odd_sizes(refused, folder, tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    sentence = refused("run", tmp_path / "a.png", "what ?", "--model", folder, "-b", FEWEST)
    assert "pixels" in sentence


def test_run_refuses_what_is_no_image(refused, folder, tmp_path):
    (tmp_path / "a.jpg").write_text("text")
    assert "does not exist" in refused("run", tmp_path / "b.jpg", "what ?", "--model", folder)
    assert "is not an image" in refused("run", tmp_path / "a.jpg", "what ?", "--model", folder)
    assert "takes no videos" in refused("run", tmp_path, "what ?", "--model", folder), "a folder holds a video's frames"


@pytest.mark.parametrize("budget", ["9", "50", "0", "-4", "0.1", "1.5"])
def test_run_refuses_a_budget_outside_the_range(refused, folder, photo, budget):
    sentence = refused("run", photo, "what ?", "--model", folder, f"--budget={budget}")
    assert f"{FEWEST} to {TOKENS}" in sentence


@pytest.mark.parametrize("budget", ["many", "nan", "inf", "", "%", "1e", "²"])
def test_a_budget_that_is_no_number_is_wrong_usage(dymu_command, folder, photo, budget):
    code, out, err = dymu_command("run", photo, "what ?", "--model", folder, f"--budget={budget}")
    assert (code, out) == (2, "")
    assert "neither a number" in err


def test_run_refuses_thresholds_that_do_not_fit(refused, folder, photo, tmp_path):
    fitting = json.loads((folder / "thresholds.json").read_text())

    def refusal(text: str) -> str:
        path = tmp_path / "t.json"
        path.write_text(text)
        sentence = refused("run", photo, "what ?", "--model", folder, "--thresholds", path, "-b", FEWEST)
        assert "t.json" in sentence
        return sentence

    other = {**fitting, "encoder": {**fitting["encoder"], "hidden_size": 1024}}
    assert "another" in refusal(json.dumps(other))
    assert "version" in refusal(json.dumps({**fitting, "version": 99}))
    assert "cut short" in refusal(json.dumps(fitting)[:100])
    assert "no dymu thresholds file" in refusal("{}")


def test_run_refuses_models_it_cannot_use(refused, folder, photo, asked, tmp_path, monkeypatch):
    ask = ("run", photo, "what ?", "--thresholds", folder / "thresholds.json", "-b", FEWEST, "--model")
    assert "does not exist" in refused(*ask, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(*ask, tmp_path / "empty")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    assert "llava" in refused(*ask, tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "llava"}')
    assert "ships no thresholds.json" in refused("run", photo, "what ?", "--model", tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text('{"model_ty')
    assert "could not be loaded" in refused(*ask, tmp_path / "bert")
    assert "config.json" in refused("run", photo, "what ?", "--model", tmp_path)
    monkeypatch.setenv("DYMU_DEMO_MODEL", str(tmp_path / "nothing"))
    for command in (("run", photo, "what ?"), ("evaluate", "-t", asked, "-o", tmp_path / "r.jsonl")):
        assert "with --model (dymu run, dymu demo) or as the first argument" in refused(*command)


def test_run_refuses_a_damaged_model(refused, folder, photo, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in folder.iterdir():
        whole = file.read_bytes()
        kept = len(whole) // 2 if file.suffix == ".safetensors" else len(whole)
        (damaged / file.name).write_bytes(whole[:kept])
    sentence = refused("run", photo, "what ?", "--model", damaged, "-b", FEWEST)
    assert "could not be loaded" in sentence


def test_run_refuses_a_placeholder_in_the_question(refused, folder, photo):
    sentence = refused("run", photo, "what is <image> ?", "--model", folder, "-b", FEWEST)
    assert "<image>" in sentence


def test_run_refuses_a_chat_template_without_a_place_for_the_image(refused, folder, photo, tmp_path):
    blind = tmp_path / "blind"
    blind.mkdir()
    for file in folder.iterdir():
        (blind / file.name).write_bytes(file.read_bytes())
    (blind / "chat_template.jinja").write_text("USER: {{ messages[0]['content'][1]['text'] }}")
    assert "0 image placeholders" in refused("run", photo, "what ?", "--model", blind, "-b", FEWEST)


def test_a_chat_template_is_used(folder):
    loaded = models.load(models.named(str(folder)))
    assert prompting.prompt(loaded.processor, "what ?") == "USER: <image>\nwhat ? ASSISTANT:"
    loaded.processor.chat_template = (
        "{% for part in messages[0]['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
        "{% endfor %}!"
    )
    assert prompting.prompt(loaded.processor, "what ?") == "<image>what ?!"


def test_drawings_are_whole_or_not_there(refused, folder, photo, tmp_path, monkeypatch):
    ask = ("run", photo, "what ?", "--model", folder, "-b", FEWEST, "--draw")
    assert ".png" in refused(*ask, tmp_path / "a.doc")
    assert "is not a folder" in refused(*ask, tmp_path / "no" / "a.png")
    (tmp_path / "folder.png").mkdir()
    assert "is a folder" in refused(*ask, tmp_path / "folder.png")
    assert "image itself" in refused(*ask, photo)

    def full_disk(image, path, *_, **__):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    assert "No space left" in refused(*ask, tmp_path / "a.png")


def test_an_image_that_cannot_be_drawn_on_is_refused(refused, folder, photo, tmp_path, monkeypatch):
    def lost(report, image, i):
        raise ValueError("this is not the image that the model saw")

    monkeypatch.setattr(dymu.Report, "draw", lost)
    sentence = refused("run", photo, "what ?", "--model", folder, "-b", FEWEST, "--draw", tmp_path / "a.png")
    assert "cannot be drawn" in sentence


# calibrate, inspect


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    path = tmp_path_factory.mktemp("samples")
    random = np.random.default_rng(1)
    for index in range(6):
        coarse = random.integers(0, 255, (2 + index, 3, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 64)).save(path / f"{index}.png")
    (path / "not-an-image.jpg").write_text("text")
    (path / "notes.txt").write_text("no image by its name")
    return path


def test_calibrate_then_inspect(dymu_command, folder, photos, tmp_path):
    file = tmp_path / "t.json"
    code, out, err = dymu_command("calibrate", folder, photos, "-b", 20, "-b", "0.75", "-o", file, "--json")
    assert code == 0, err
    data = last_object(out)
    assert "not-an-image.jpg" in err
    assert data["images"] == 6
    assert len(data["skipped"]) == 1
    assert [entry["budget"] for entry in data["budgets"]] == [20, round(0.75 * TOKENS)]
    assert all(len(entry["thresholds"]) == 3 for entry in data["budgets"])

    code, out, _ = dymu_command("inspect", file, "--json")
    assert code == 0
    assert last_object(out).items() <= data.items()
    code, out, _ = dymu_command("inspect", file)
    assert code == 0
    assert "clip_vision_model" in out


def test_calibrating_on_few_images_says_so(dymu_command, folder, photos, monkeypatch, tmp_path):
    words = ["calibrate", folder, photos, "-b", 20, "-o", tmp_path / "t.json", "--json"]
    _, out, err = dymu_command(*words)
    assert "fewer than 32 images (6)" in err
    assert any("fewer than 32 images" in note for note in last_object(out)["notes"])
    monkeypatch.setattr("dymu.cli.calibrate.FEW", last_object(out)["images"])
    _, out, err = dymu_command(*words)
    assert "fewer than" not in err


def test_calibrate_in_some_layers(dymu_command, folder, photos, tmp_path):
    file = tmp_path / "t.json"
    code, out, err = dymu_command("calibrate", folder, photos, "-b", 30, "-o", file, "--merge-layers", "0,2", "--json")
    assert code == 0, err
    data = last_object(out)
    assert data["merge_layers"] == [0, 2]
    assert [layer for layer, threshold in enumerate(data["budgets"][0]["thresholds"]) if threshold <= 1] == [0, 2]
    assert "0, 2" in dymu_command("inspect", file)[1]


def test_calibrate_refuses(refused, folder, photos, tmp_path):
    end = ("-b", 20, "-o", tmp_path / "t.json")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused("calibrate", folder, tmp_path / "empty", *end)
    refused("calibrate", folder, photos / "not-an-image.jpg", *end)
    assert "50" in refused("calibrate", folder, photos, "-b", 50, "-o", tmp_path / "t.json")
    assert "layers 0 to 2" in refused("calibrate", folder, photos, *end, "--merge-layers", "1,7")
    refused("calibrate", folder, photos, "-b", 20, "-o", tmp_path / "no" / "t.json")


def test_inspect_refuses(refused, folder, tmp_path):
    assert "nothing.json" in refused("inspect", tmp_path / "nothing.json")
    cut = tmp_path / "cut.json"
    cut.write_text((folder / "thresholds.json").read_text()[:50])
    assert "cut short" in refused("inspect", cut)


# evaluate, report


@pytest.fixture
def asked(tmp_path, photo):
    """A folder of four questions about one photo."""
    questions = tmp_path / "questions"
    questions.mkdir()
    (questions / "a.png").write_bytes(photo.read_bytes())
    lines = [{"image": "a.png", "question": "what is this ?", "answer": "cat", "kind": kind} for kind in "xyxy"]
    (questions / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return questions


def test_evaluate_and_report(dymu_command, refused, folder, asked, tmp_path):
    results = tmp_path / "r.jsonl"
    run = ["evaluate", folder, "-t", asked, "-b", FEWEST, "-m", "dtome", "-m", "random", "-o", results, "--timed", 1]
    code, out, err = dymu_command(*run, "--json")
    assert code == 0, err
    (told,) = last_object(out)["results"]
    untouched, merged, random = told["rows"]
    assert (untouched["tokens_mean"], random["tokens_mean"]) == (TOKENS, FEWEST)
    assert merged["tokens_mean"] < TOKENS
    assert set(merged["accuracy"]) == {"all", "x", "y"}
    assert merged["costs"]["n"] == 1

    size = results.stat().st_size
    page, chart = tmp_path / "r.md", tmp_path / "r.png"
    code, out, err = dymu_command("report", results, "-o", page, "--chart", chart)
    assert (code, out) == (0, ""), err
    assert "| random keep in place | 10 ± 0 |" in page.read_text()
    with Image.open(chart) as picture:
        assert picture.width > 300
    assert dymu_command("report", results)[1].strip() == page.read_text().strip()
    assert results.stat().st_size == size

    code, out, _ = dymu_command("report", results, "--by", "bytes", "--against", "dtome", "--json")
    told = last_object(out)
    (by,) = told["results"]
    assert (code, told["against"]) == (0, "dtome")
    counted = [part["rows"][0]["accuracy"]["all"]["n"] for part in by["by"]["bytes"]]
    assert sum(counted) == by["rows"][0]["accuracy"]["all"]["n"]
    untouched, merged, random = by["by"]["bytes"][0]["rows"]
    assert not untouched["difference"]
    assert not merged["difference"]
    assert random["difference"]
    assert random["against"]["method"] == "dtome"
    assert "no rows of pool" in refused("report", results, "--against", "pool")
    assert "r.jsonl: no question has the measure 'words'; take one of: bytes, pixels" in refused(
        "report", results, "--by", "words"
    )


def test_evaluate_solves_a_number_and_goes_on_with_it(dymu_command, folder, asked, tmp_path):
    results = tmp_path / "r.jsonl"
    run = ["evaluate", folder, "-t", asked, "-b", FEWEST, "-m", "density-threshold", "-o", results, "--timed", 0]
    code, out, err = dymu_command(*run, "--json")
    assert code == 0, err
    assert "an image keeps 10.0 tokens on average." in err
    _, solved = last_object(out)["results"][0]["rows"]
    assert solved["tokens_mean"] == FEWEST
    code, out, err = dymu_command(*run, "--json")
    assert code == 0, err
    assert "on average" not in err, "the file says the number"
    assert last_object(out)["results"][0]["rows"][1] == solved


def test_a_report_of_some_ways_to_unmerge(dymu_command, refused, folder, asked, tmp_path):
    results = tmp_path / "r.jsonl"
    run = ["evaluate", folder, "-t", asked, "-b", FEWEST, "-m", "dtome", "-u", "exact", "-u", "none", "-o", results]
    assert dymu_command(*run, "--timed", 0)[0] == 0
    _, out, _ = dymu_command("report", results, "-u", "none", "--json")
    (told,) = last_object(out)["results"]
    assert [row["row"]["unmerge"] for row in told["rows"]] == ["none", "none"]
    assert [row["row"]["method"] for row in told["rows"]] == ["untouched", "dtome"]
    assert "no rows that unmerge by restore; take some of: exact, none" in refused("report", results, "-u", "restore")


def test_a_row_unmerges_from_a_layer_on(dymu_command, refused, folder, asked, tmp_path):
    run = ["evaluate", folder, "-t", asked, "-b", FEWEST, "-u", "exact", "-u", "none", "--timed", 0]
    code, out, err = dymu_command(*run, "-m", "dtome:unmerge_from=1", "-o", tmp_path / "r.jsonl", "--json")
    assert code == 0, err
    assert "only dtome merges" not in err
    (told,) = last_object(out)["results"]
    assert [row["row"]["options"] for row in told["rows"]] == ["", "unmerge_from=1"]
    for method in ("dtome", "density-threshold"):
        said = refused(*run, "-m", f"{method}:unmerge_from=99", "-o", tmp_path / "s.jsonl")
        assert "unmerge_from is a layer of the language model" in said
    code, _, err = dymu_command(*run, "-m", "downscale:unmerge_from=1", "-o", tmp_path / "s.jsonl")
    assert code == 2
    assert "takes no further arguments" in " ".join(err.split())


def test_evaluate_refuses(refused, folder, asked, tmp_path):
    end = ("-o", tmp_path / "r.jsonl")
    assert "does not exist" in refused("evaluate", folder, "-t", "nothing", *end)
    assert "without questions.jsonl" in refused("evaluate", folder, "-t", folder, *end)
    assert "neither a folder nor a Python file" in refused("evaluate", folder, "-t", folder / "config.json", *end)
    assert ".jsonl" in refused("evaluate", folder, "-t", asked, "-o", tmp_path / "r.json")
    refused("report", tmp_path / "nothing.jsonl")
    (tmp_path / "bad.jsonl").write_text("{}\n")
    refused("report", tmp_path / "bad.jsonl")


TASK = """
from words import QUESTION
from dymu.evaluation.tasks.folder import Folder

def task():
    assert QUESTION
    return Folder(r"{folder}")
"""


def test_a_task_may_be_a_python_file(dymu_command, folder, asked, tmp_path):
    """It may import what lies beside it."""
    (tmp_path / "words.py").write_text("QUESTION = 'what is this ?'")
    (tmp_path / "mine.py").write_text(TASK.format(folder=asked))
    run = ["evaluate", folder, "-t", tmp_path / "mine.py", "-b", FEWEST, "-m", "stride", "-o", tmp_path / "r.jsonl"]
    code, out, err = dymu_command(*run, "--timed", 0, "--json")
    assert code == 0, err
    assert [row["name"] for row in last_object(out)["results"][0]["rows"]] == ["untouched", "stride in place"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1", "has no function task()"),
        ("task = 3", "gives a int, which is no task"),
        ("def task(): return 3", "gives a int, which is no task"),
        ("def task(:", "cannot be read as Python"),
        ("import nothing_like_it as task", "mine.py cannot be run (ModuleNotFoundError"),
        ("import sys; sys.exit()", "mine.py cannot be run (SystemExit"),
        ("import sys\ndef task(): sys.exit(0)", "task() of {path} cannot be run (SystemExit: 0): mend it."),
        (
            "def task(): raise ValueError('no\\nluck.')",
            "task() of {path} cannot be run (ValueError: no luck): mend it.",
        ),
        ("def task(name): pass", "task() of {path} cannot be run (TypeError: task() missing"),
        ("def task(): return task()", "task() of {path} cannot be run (RecursionError: maximum"),
        ("class task: pass", "task() of {path} gives a task, which is no task"),
        ("from scenes.photos import Photos\ndef task(): return Photos", "gives a "),
        ("async def task(): pass", "task() of {path} gives a coroutine, which is no task"),
    ],
)
def test_a_python_file_that_is_no_task_is_refused(refused, folder, tmp_path, recwarn, text, says):
    path = tmp_path / "mine.py"
    path.write_text(text)
    sentence = refused("evaluate", folder, "-t", path, "-m", "stride", "-o", tmp_path / "r.jsonl")
    assert says.replace("{path}", str(path)) in sentence
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_ctrl_c_in_a_python_file_is_no_mistake_of_it(dymu_command, folder, tmp_path):
    (tmp_path / "mine.py").write_text("def task(): raise KeyboardInterrupt")
    code, _, err = dymu_command("evaluate", folder, "-t", tmp_path / "mine.py", "-o", tmp_path / "r.jsonl")
    assert code != 0
    assert "mend it" not in err


def test_a_smoke_evaluation_of_the_demo_model(dymu_command, tmp_path):
    """The shipped model on one composed question of each kind, all methods: the whole machine in seconds."""
    run = [
        "evaluate",
        "-t",
        ROOT / "scenes" / "composed.py",
        "-o",
        tmp_path / "r.jsonl",
        "--limit",
        9,
        "--timed",
        0,
        "-b",
        "0.3",
        "--json",
    ]
    for method in ("dtome", "tome", "pool", "random", "stride", "downscale"):
        run += ["-m", method]
    code, out, err = dymu_command(*run, "-u", "exact", "-u", "none")
    assert code == 0, err
    rows = last_object(out)["results"][0]["rows"]
    assert len(rows) == 12
    assert {row["accuracy"]["all"]["n"] for row in rows} == {9}
    assert all(20 < row["tokens_mean"] < 150 for row in rows[1:])


# families, env, and the command itself


def test_families(dymu_command):
    code, out, _ = dymu_command("families", "--json")
    assert code == 0
    assert [f["model_type"] for f in last_object(out)["families"]] == sorted(FAMILIES)
    assert "llava" in dymu_command("families")[1]


def test_env(dymu_command):
    data = last_object(dymu_command("env", "--json")[1])
    assert data["dymu"] == dymu.__version__
    assert data["torch"].startswith(torch.__version__.split("+")[0])
    assert "transformers" in dymu_command("env")[1]


def test_env_never_fails(dymu_command, monkeypatch):
    """A build of torch for CUDA names that device, and then says that there is no driver."""

    def no_driver(*_):
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check that you have one.")

    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: cuda)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", no_driver)
    code, out, _ = dymu_command("env", "--json")
    assert code == 0
    assert last_object(out)["accelerator"] == "cuda, which torch is built for and cannot use here"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert last_object(dymu_command("env", "--json")[1])["accelerator"] == (
        "unknown (Found no NVIDIA driver on your system.)"
    )
    monkeypatch.setattr(torch.accelerator, "current_accelerator", no_driver)
    assert "Found no NVIDIA driver" in dymu_command("env")[1]
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "unknown" in last_object(dymu_command("env", "--json")[1])["accelerator"]


def test_version(dymu_command):
    assert dymu_command("--version")[:2] == (0, dymu.__version__ + "\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["nonsense"],
        ["run", "a.png", "b", "--nonsense"],
        ["calibrate", "m", "i.png"],
        ["calibrate", "m", "i.png", "-b", "8", "-o", "t.json", "--merge-layers", "every second"],
        ["calibrate", "m", "i.png", "-b", "8", "-o", "t.json", "--schedule", "square"],
        ["run", "", "what ?"],
        ["run", "a.png", "what ?", "--model", ""],
        ["run", "a.png", "what ?", "--thresholds="],
        ["run", "a.png", "what ?", "--max-new-tokens", "9" * 30],
        ["bench", ""],
    ],
)
def test_wrong_usage_is_2(dymu_command, arguments):
    code, out, err = dymu_command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("dymu: ")
    assert err.endswith(".\n")
    assert len(err.splitlines()) == 1


def test_what_is_empty_is_named(dymu_command):
    assert "an argument is empty" in dymu_command("run", "", "what ?")[2]
    assert "the value of --model is empty" in dymu_command("run", "a.png", "what ?", "--model", "")[2]
    assert "the value of --thresholds is empty" in dymu_command("run", "a.png", "what ?", "--thresholds=")[2]


def test_a_wrong_call_is_pointed_to_the_help_of_its_command(dymu_command):
    assert "see `dymu evaluate --help`" in dymu_command("evaluate", "model", "-o")[2]
    assert "see `dymu evaluate --help`" in dymu_command("evaluate", "-o", "r.jsonl", "-t", "x", "--seed", "9" * 30)[2]


def test_a_report_of_bench_takes_no_options_of_a_run(dymu_command):
    for options in (["-o", "x.json"], ["--repeats", 2], ["-b", 20], ["--device", "cpu"], ["--batch", 2]):
        code, _, err = dymu_command("bench", "--report", "f.json", *options)
        assert (code, "--report measures nothing" in err) == (2, True)
    assert "leave the model out" in dymu_command("bench", "tiny", "--report", "f.json")[2]


def test_results_are_found_by_their_names(dymu_command, refused, tmp_path, monkeypatch):
    shutil.copy(ROOT / "training" / "results" / "heldout.jsonl", tmp_path / "r.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, err = dymu_command("report", "~/r.jsonl")
    assert code == 0, err
    assert "untouched" in out
    os.mkfifo(tmp_path / "pipe")
    assert "a folder, a device or a pipe" in refused("report", tmp_path / "pipe")
    assert "is an ending without a name" in refused("report", tmp_path / "r.jsonl", "-o", tmp_path / ".md")
    too_long = refused("report", tmp_path / "r.jsonl", "-o", tmp_path / f"{'n' * 300}.md")
    assert "long" in too_long
    assert len(too_long) < 400


@pytest.mark.parametrize("ask", ["--debug", "DYMU_DEBUG"])
def test_a_traceback_for_who_asks(dymu_command, monkeypatch, tmp_path, ask):
    arguments = ["inspect", tmp_path / "nothing.json"]
    if ask == "--debug":
        arguments.append(ask)
    else:
        real = os.environ.copy()
        monkeypatch.setattr(os, "environ", {**real, ask: "1"})
    with pytest.raises(dymu.BadThresholds):
        dymu_command(*arguments)


def test_an_unforeseen_error_asks_for_a_report(refused, monkeypatch, folder):
    monkeypatch.setattr(Thresholds, "load", lambda path: 1 / 0)
    sentence = refused("inspect", folder / "thresholds.json")
    assert "ZeroDivisionError" in sentence
    assert "--debug" in sentence


def test_ctrl_c(dymu_command, monkeypatch, folder):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(Thresholds, "load", interrupt)
    code, _, err = dymu_command("inspect", folder / "thresholds.json")
    assert code == 130  # what shells expect of a program that was interrupted
    assert "Traceback" not in err


COMMAND = [sys.executable, "-c", "from dymu.cli.main import main; main()"]


def test_the_installed_command_from_a_shell(tmp_path):
    done = subprocess.run([*COMMAND, "inspect", "nothing.json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


HEAVY = ("torch", "transformers", "scipy", "matplotlib")
WITHOUT_HEAVY = f"""
import resource, sys
from dymu.cli.main import main
try:
    main()
finally:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    print([name for name in {HEAVY} if name in sys.modules], spent.ru_utime + spent.ru_stime, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("--help", 0),
        ("run --help", 0),
        ("families", 0),
        ("inspect {model}/thresholds.json", 0),
        ("forecast {photo} --thresholds {model} -b 20", 1),
        ("report {root}/training/results/heldout.jsonl", 0),
        ("run nope.jpg x", 1),
        ("run {photo} x --model nope", 1),
        ("run {photo} x --model {model} -b 500", 1),
        ("run {photo} x --model {model} -b 20 --device tpu9x9", 2),
        ("run {photo} x --model {model} -b 20 --dtype int8", 2),
        ("calibrate {model} nosuch -b 20 -o t.json", 1),
        ("calibrate nosuch {photo} -b 20 -o t.json", 1),
        ("calibrate {model} {photo} -b 500 -o t.json", 1),
        ("calibrate {model} {photo} -b 20 -o t.json --merge-layers 3", 1),
        ("calibrate-videos {model} nosuch.mp4 --thresholds {model} --per-second 9 -o t.json", 1),
        ("evaluate {model} --task nosuch -b 0.3 -o r.jsonl", 1),
        ("evaluate {model} --task {task} -b 500 -o r.jsonl", 1),
        ("bench nosuch", 2),
        ("bench tiny --prompt nosuch", 2),
        ("bench tiny --backend nosuch", 2),
        ("bench {model} -b 500", 1),
        ("bench llava-1.5-shape-0.5b -b 99999", 1),
        ("bench llava-1.5-shape-0.5b -b 0", 1),
        ("bench {model} -b 20 --images /dev/null", 1),
        ("bench {model} -b 20 -o {model}/config.json", 1),
        ("calibrate {model} /dev/null -b 20 -o t.json", 1),
        ("run {task} x --model {model} -b 20", 1),
        ("run {photo} x --model {model} -b 20 --frames 4", 1),
        ("run {photo} \udcff --model {model} -b 20", 1),
        ("run {photo} x --model {model} -b 20 --device cpu:1", 1),
        ("run {photo} x --model {model} -b 20 --device meta", 2),
        ("calibrate-videos {model} {task} --thresholds {model} --per-second 9 -o t.json", 1),
        ("evaluate {model} --task {task} -b 20 -o {photo}.jsonl", 1),
        ("evaluate {model} --task {task} --task {task} -b 20 -o r.jsonl", 1),
        ("evaluate {model} --task {task} -b 20 -o r.jsonl --seed 9999999999999999999999999", 2),
        ("evaluate {model} --task {task} -b 20 -o r.jsonl --timed 1152921504606846976", 2),
        ("evaluate {model} --task {task} -b 20 -o r.jsonl --batch-size 1152921504606846976", 2),
        ("check nosuch", 1),
        ("draw {photo} nosuch.png -o sheet.png --model {model}", 1),
        ("draw {photo} -o sheet.png --model {model} -b 500", 1),
        ("draw {photo} -o sheet.txt --model {model}", 1),
        ("stats nosuch -o s.html --model {model}", 1),
        ("stats {photo} -o s.html --model {model} -b 500", 1),
        ("stats {photo} -o s.pdf --model {model}", 1),
    ],
)
def test_quick_checks_come_first(folder, photo, asked, tmp_path, arguments, code):
    """What needs no model is done, or refused, before anything heavy is imported."""
    photo.with_name(f"{photo.name}.jsonl").write_text("no results\n")
    names = {"model": folder, "photo": photo, "root": ROOT, "task": asked}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HEAVY, *(word.format(**names) for word in arguments.split())],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    *said, heavy = done.stderr.splitlines()
    assert done.returncode == code, done.stderr
    assert heavy.startswith("[] "), heavy
    assert float(heavy.removeprefix("[] ")) < 1.2
    assert len(said) == bool(code)
    assert all(line.startswith("dymu: ") for line in said)


def test_names_of_backends_are_those_that_there_are():
    assert sorted(timed_backends()) == sorted(name for name in BACKENDS if name != "reference")


def test_help_names_what_to_give_and_an_example(dymu_command):
    code, out, _ = dymu_command("--help")
    assert code == 0
    commands = (
        "run",
        "check",
        "calibrate",
        "calibrate-videos",
        "inspect",
        "forecast",
        "draw",
        "stats",
        "evaluate",
        "report",
        "bench",
        "families",
    )
    assert all(group in out for group in ("Run and see", "Find thresholds", "Measure", "About"))
    for name in (*commands, "env"):
        assert name in out
        code, page, _ = dymu_command(name, "--help")
        assert code == 0
        assert "<" not in page, "a type is shown instead of what to give"
        assert f"Example: dymu {name}" in page


def test_shells_complete_the_command(dymu_command, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    monkeypatch.setenv("_DYMU_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "dymu cal")
    monkeypatch.setenv("COMP_CWORD", "1")
    code, out, _ = dymu_command()
    assert (code, out.split()) == (0, ["calibrate", "calibrate-videos"])


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932"])
def test_a_terminal_that_is_not_utf_8_gets_what_it_can_show(folder, encoding):
    done = subprocess.run(
        [*COMMAND, "inspect", folder / "thresholds.json"],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"clip_vision_model" in done.stdout


def test_a_name_that_begins_with_a_tilde(refused, dymu_command, folder, photo, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "~draft.png does not exist" in refused("run", "~draft.png", "what ?", "--model", folder, "-b", FEWEST)
    (tmp_path / "~draft.png").write_bytes(photo.read_bytes())
    code, _, err = dymu_command("run", "~draft.png", "what ?", "--model", folder, "-b", FEWEST)
    assert code == 0, err


# what commands that load a model share


def test_dtype_and_the_length_of_the_answer(dymu_command, folder, photo):
    ask = ("run", photo, "what is this ?", "--model", folder, "-b", FEWEST, "--json")
    stored, half = (last_object(dymu_command(*ask, *more)[1]) for more in ([], ["--dtype", "bfloat16"]))
    assert half["cache_bytes"] < stored["cache_bytes"] * 0.6
    assert not TIMES & stored.keys()
    assert last_object(dymu_command(*ask, "--time")[1]).keys() >= TIMES
    one = last_object(dymu_command(*ask, "--max-new-tokens", 1)[1])
    assert len(one["answer"].split()) <= 1


def test_a_checkpoint_keeps_its_dtype_on_a_cpu(folder, tmp_path):
    half = tmp_path / "half"
    models.load(models.named(str(folder)), dtype="bfloat16").model.save_pretrained(half)
    tiny.llava_processor().save_pretrained(half)
    named = models.named(str(half))
    assert models.load(named).model.dtype == torch.bfloat16
    assert models.load(named, dtype="float32").model.dtype == torch.float32


def test_a_device_that_is_not_there_is_refused(refused, folder, photo, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
    ask = ("run", photo, "what ?", "--model", folder, "-b", FEWEST)
    assert "cannot use the device cuda:3 here" in refused(*ask, "--device", "cuda:3")
    assert "cannot use the device cpu:1 here" in refused(*ask, "--device", "cpu:1")


def test_a_revision_is_of_the_hub(dymu_command, folder, photo, monkeypatch, tmp_path):
    code, _, err = dymu_command("run", photo, "what ?", "--model", folder, "--revision", "v1")
    assert (code, "leave it out" in err) == (2, True)
    fetched = []

    def hub(repository, name, revision=None):
        fetched.append((repository, name, revision))
        return folder / name

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    named = models.named("someone/model", "v1")
    assert named.tokens == TOKENS
    assert named.thresholds().budgets == [FEWEST, TOKENS]
    assert {(repository, revision) for repository, _, revision in fetched} == {("someone/model", "v1")}


def test_thresholds_are_a_file_or_a_folder(dymu_command, folder, photo, tmp_path):
    ask = ("run", photo, "what is this ?", "--model", folder, "-b", FEWEST, "--json", "--thresholds")
    answers = {last_object(dymu_command(*ask, path)[1])["answer"] for path in (folder, folder / "thresholds.json")}
    assert len(answers) == 1


def test_a_model_saved_without_a_cache(dymu_command, folder, photo, tmp_path):
    slow = tmp_path / "slow"
    shutil.copytree(folder, slow)
    settings = slow / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "use_cache": False}))
    ask = ("run", photo, "what is this ?", "-b", FEWEST, "--compare", "--max-new-tokens", 2, "--model")
    cached, told = (last_object(dymu_command(*ask, model, "--json")[1]) for model in (folder, slow))
    assert told["answer"] == cached["answer"]
    assert told["untouched"]["answer"] == cached["untouched"]["answer"]
    assert told["cache_bytes"] is told["untouched"]["cache_bytes"] is None
    assert "none" in dymu_command(*ask, slow)[1].split("KV cache")[1].splitlines()[0]


def test_the_demo_model_says_that_it_is_a_toy(dymu_command, folder, photo, monkeypatch):
    ask = ("what ?", "-b", FEWEST)
    assert "toy" not in dymu_command("run", photo, *ask, "--model", folder)[2]
    monkeypatch.setenv("DYMU_DEMO_MODEL", str(folder))
    assert dymu_command("run", photo, *ask)[2].count("toy") == 1
    assert "toy" not in dymu_command("run", ROOT / "examples" / "photo.jpg", *ask)[2]


def test_torchvision_is_named_with_the_command_that_brings_it(refused, folder, photo, monkeypatch):
    def missing(*_, **__):
        raise ImportError("LlavaOnevisionVideoProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", missing)
    sentence = refused("run", photo, "what ?", "--model", folder, "-b", FEWEST)
    assert "`pip install 'torch==" in sentence
    assert ".*' torchvision`" in sentence


# results and progress


def test_what_an_unfinished_run_says(dymu_command, folder, asked, tmp_path):
    results = tmp_path / "r.jsonl"
    run = ("evaluate", folder, "-t", asked, "-b", FEWEST, "-m", "stride", "-o", results, "--timed", 0)
    code, _, err = dymu_command(*run, "--batch-size", 2, "--json")
    assert code == 0, err
    assert "questions · untouched: all 4 questions" in err
    assert "questions · stride-10-exact: all 4 questions" in err
    assert f"wrote {results}" in err
    assert "unfinished" not in dymu_command("report", results)[2]
    results.write_text("".join(results.read_text().splitlines(keepends=True)[:4]))
    assert "2 of 4 questions are answered in every way" in dymu_command("report", results)[2]


def test_thresholds_that_no_row_uses_are_said(dymu_command, folder, asked, tmp_path):
    run = ("evaluate", folder, "-t", asked, "-b", FEWEST, "-m", "stride", "-o", tmp_path / "r.jsonl", "--timed", 0)
    code, _, err = dymu_command(*run, "--thresholds", folder)
    assert code == 0, err
    assert "add -m dtome" in err
    assert "add -m dtome" not in dymu_command(*run)[2]


def test_cells_with_bars_and_line_breaks(monkeypatch, capsys):
    rows = ["a|b", "c\n\nd", "\\|", ""]
    page = markdown(rows, [rows])
    assert page.splitlines()[0] == r"| a\|b | c d | \\| |  |"
    assert cells(page.splitlines()[0]) == ["a|b", "c d", "\\|", ""]
    monkeypatch.setenv("FORCE_COLOR", "1")
    for columns in ("0", "1", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        out = Output(as_json=False)
        out.result({}, lambda out=out: out.markdown([page]))
        assert capsys.readouterr().out.count("a|b") >= 2


def test_a_terminal_gets_tables(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    lines = ["| | tokens | all |", "| --- | --- | --- |", "| untouched with a name | 256 ± 0 | 74.4 [71.6, 77.0] |"]
    page = "\n".join([*lines, "", "<sub>demo</sub>"])
    out = Output(as_json=False)
    out.result({}, lambda: out.markdown([page]))
    printed = capsys.readouterr().out
    assert "|" not in printed
    assert printed.count("untouched with a name") == 2, "too wide for 40 columns, so it is cut into two"
    assert "74.4 [71.6, 77.0]" in printed
    assert "<sub>" not in printed


def test_a_shape_that_memory_has_no_room_for(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("dymu.bench.shapes._available_bytes", lambda: 22 * 10**9)
    ask = ["bench", "llava-1.5-7b", "-b", 89, "--device", "cpu", "-o", tmp_path / "b.json"]
    sentence = refused(*ask)
    assert "28.3 GB in float32, and 22.0 GB" in sentence
    assert "bfloat16" in sentence
    monkeypatch.setattr("dymu.bench.shapes._available_bytes", lambda: 9 * 10**9)
    assert "14.1 GB in bfloat16, and 9.0 GB of memory are available: take a smaller shape or a GPU" in refused(
        *ask, "--dtype", "bfloat16"
    )


def test_a_bench_that_timed_nothing_fails(dymu_command, tmp_path, monkeypatch):
    monkeypatch.setattr("dymu.bench.run._Prompts.run", lambda *_: (_ for _ in ()).throw(_LeftOut("out of memory")))
    file = tmp_path / "b.json"
    code, _, err = dymu_command("bench", "tiny", "-b", 89, "--backend", "sdpa", "-o", file)
    assert code == 1
    assert "nothing was timed (out of memory)" in err.splitlines()[-1]
    assert f"wrote {file}" in err


# check


def test_check_passes_on_a_model_that_keeps_the_contract(dymu_command, folder, photo):
    code, out, _ = dymu_command("check", folder, photo, "--json")
    told = last_object(out)
    assert code == 0, told
    assert told["passed"]
    assert len(told["findings"]) == 6
    assert "FAIL" not in dymu_command("check", folder)[1]
    assert dymu_command("check", folder, "--dtype", "bfloat16")[0] == 0


@pytest.mark.parametrize(
    ("where", "wrong", "part"),
    [
        (
            lambda parts: parts.attentions[0],
            lambda output: (output[0] * 1.001, *output[1:]),
            "nothing merged: the same logits",
        ),
        (
            lambda parts: parts.projector,
            lambda output: output.roll(1, 0),
            "a batch of two gives each what it gets alone",
        ),
    ],
    ids=["attention", "batch"],
)
def test_check_fails_on_a_model_that_does_not(folder, where, wrong, part):
    """Something that acts only while DyMU is applied, or only in batches."""
    loaded = models.load(models.named(str(folder)))

    def tamper(module, args, output):
        return wrong(output) if dymu.handle_of(loaded.model) is not None else output

    hook = where(resolve(loaded.model)).register_forward_hook(tamper)
    told = dymu.check(loaded.model, loaded.processor)
    hook.remove()
    assert not told.passed
    assert part in {finding.part for finding in told.findings if not finding.passed}
    assert dymu.check(loaded.model, loaded.processor).passed


def test_check_says_what_it_does_not_know(dymu_command, folder, tmp_path):
    loaded = models.load(models.named(str(folder)))
    with dymu.apply(loaded.model, merge=dymu.FixedMerge(keep=0.5)), pytest.raises(dymu.AlreadyApplied):
        dymu.check(loaded.model, loaded.processor)
    with pytest.raises(dymu.DymuError, match="eval"):
        dymu.check(loaded.model.train(), loaded.processor)
    loaded.model.eval().model.language_model.config.model_type = "nobody"
    (finding,) = dymu.check(loaded.model, loaded.processor).findings
    assert not finding.passed
    assert "nobody" in finding.seen
