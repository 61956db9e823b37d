"""The command line on a tiny model, and what every wrong input gets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dymu
import tiny
from dymu import prompting
from dymu.cli import main, models
from dymu.families import FAMILIES
from dymu.families.resolve import resolve
from dymu.handle import encoder_of
from dymu.measure import timing
from dymu.thresholds import Calibrated, Thresholds

FIELDS = {
    "answer",
    "original_tokens",
    "kept_tokens",
    "encoder_ms",
    "prefill_ms",
    "decode_ms_per_token",
    "cache_bytes",
}
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
    assert data.keys() >= FIELDS
    assert data["untouched"].keys() == FIELDS
    assert data["original_tokens"] == TOKENS
    assert 0 < data["kept_tokens"] < TOKENS
    assert data["untouched"]["kept_tokens"] == TOKENS
    assert 0 < data["cache_bytes"] < data["untouched"]["cache_bytes"]
    assert min(data["encoder_ms"], data["prefill_ms"], data["decode_ms_per_token"]) > 0
    both = data["encoder_ms"] + data["prefill_ms"]
    full = data["untouched"]["encoder_ms"] + data["untouched"]["prefill_ms"]
    assert data["speedup_encoder_prefill"] == pytest.approx(full / both, rel=1e-2)
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
    assert "a.jpg of" in refused("run", tmp_path, "what ?", "--model", folder), "a folder holds the frames of a video"


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
    (tmp_path / "bert" / "config.json").write_text('{"model_ty')
    assert "could not be loaded" in refused(*ask, tmp_path / "bert")
    assert "config.json" in refused("run", photo, "what ?", "--model", tmp_path)
    assert "ships no thresholds.json" in refused("run", photo, "what ?", "--model", tmp_path / "bert")
    monkeypatch.setenv("DYMU_DEMO_MODEL", str(tmp_path / "nothing"))
    for command in (("run", photo, "what ?"), ("evaluate", "-t", asked, "-o", tmp_path / "r.jsonl")):
        assert "dymu run with --model, other commands as their first argument" in refused(*command)


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
    loaded = models.load(str(folder))
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
    def lost(report, image):
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
    ],
)
def test_wrong_usage_is_2(dymu_command, arguments):
    code, out, _ = dymu_command(*arguments)
    assert (code, out) == (2, "")


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


def test_the_installed_command_from_a_shell(tmp_path):
    command = [sys.executable, "-c", "from dymu.cli.main import main; main()"]
    done = subprocess.run([*command, "inspect", "nothing.json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
