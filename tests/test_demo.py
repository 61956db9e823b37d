"""What the page of `dymu demo` shows, computed without Gradio; tests/page has it in a browser."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu
import tiny
from dymu.cli import main
from dymu.demo import asked as asking
from dymu.demo import html, plots, results, turns, videos
from dymu.demo.asked import Asked, Subject
from dymu.demo.groups import BEHIND, Group, Groups, Watching, groups_of
from dymu.errors import BadImage, BadPrompt, BadVideo
from dymu.media.frames import LoadedVideo
from dymu.media.images import load
from dymu.prompting import generate, inputs_for
from dymu.reducers import ThresholdMerge
from dymu.thresholds import Thresholds
from tiny_processors import OF_EACH_KIND, processor_for

ROOT = Path(__file__).parents[1]
DEMO, PHOTO, SCENE = ROOT / "models" / "demo", ROOT / "examples" / "photo.jpg", ROOT / "examples" / "scene.png"
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def subject() -> Subject:
    model = AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(DEMO)
    thresholds = Thresholds.load(DEMO)
    return Subject("demo", model, processor, thresholds, dymu.apply(model, thresholds, budget=77), 77.0, toy=True)


@pytest.fixture(scope="module")
def answered(subject: Subject) -> list[Asked]:
    """One photo, as it becomes known."""
    return list(asking.ask(subject, asking.load(PHOTO, "my photo.jpg"), "my photo.jpg", QUESTION, 38))


def test_each_answer_says_more(subject: Subject, answered: list[Asked]) -> None:
    first, second, last = answered
    assert first.untouched is None
    assert second.untouched is not None
    assert second.untouched.times is None
    assert last.repeats == asking.REPEATS
    inputs = inputs_for(subject.model, subject.processor, [([Image.open(PHOTO)], QUESTION)])
    with subject.handle.at(38):
        (merged,), _ = generate(subject.model, subject.processor, inputs, 64)
        kept = subject.handle.last.kept
    assert last.merged is not None
    assert last.untouched is not None
    assert (last.merged.answer, [last.merged.tokens]) == (merged, kept)
    assert (last.untouched.tokens, last.original) == (256, 256)
    assert last.merged.cache_bytes is not None
    assert last.untouched.cache_bytes is not None
    assert last.merged.cache_bytes < last.untouched.cache_bytes
    assert subject.handle.budget == 77


def test_the_forecast_is_that_of_the_whole_picture(subject: Subject) -> None:
    loaded = asking.load(PHOTO, "photo.jpg")
    picture = asking.look(subject, loaded, "photo.jpg")
    for budget in (20, 77, 192):
        told = asking.forecast(subject, picture, budget)
        assert told == subject.thresholds.forecast(loaded.image, budget)


def test_groups_cover_the_picture_once(answered: list[Asked]) -> None:
    groups, merged = answered[0].groups, answered[0].merged
    assert groups is not None
    assert merged is not None
    assert len(groups.groups) == merged.tokens
    cells = np.concatenate([group.cells for group in groups.groups])
    assert len(np.unique(cells, axis=0)) == len(cells) == 16 * 16
    sizes = [group.size for group in groups.groups]
    assert sizes == sorted(sizes, reverse=True)
    assert all((group.layer == 0) == (group.size == 1) for group in groups.groups)
    assert {group.layer for group in groups.groups} <= set(range(11))


def test_layers_are_those_in_which_tokens_merge(subject: Subject) -> None:
    """With all merging in one layer, that is the layer of every group."""
    model, _ = subject.model, subject.handle.remove()
    try:
        for layer in (1, 6, 10):
            thresholds = [2.0] * 10
            thresholds[layer - 1] = 0.5
            rule = ThresholdMerge(tuple(thresholds))
            inputs = inputs_for(model, subject.processor, [([Image.open(SCENE)], QUESTION)])
            watching = Watching(rule)
            with dymu.apply(model, merge=watching) as handle:
                generate(model, subject.processor, inputs, 1)
                report = handle.last
            groups = groups_of(report, watching, Image.open(SCENE), 400)
            assert groups is not None
            assert {group.layer for group in groups.groups if group.size > 1} == {layer}
    finally:
        handle = dymu.apply(model, subject.thresholds, budget=77)
        object.__setattr__(subject, "handle", handle)


@pytest.mark.parametrize("family", OF_EACH_KIND)
def test_any_family_is_asked(family: str) -> None:
    """Also one that cuts images into tiles, or makes one token of several patches."""
    model, processor = tiny.build(family), processor_for(family)
    model.generation_config.suppress_tokens = tiny.specials(model)
    photo = Image.open(PHOTO).convert("RGB").resize((150, 100))
    thresholds = dymu.calibrate(model, processor, [photo, *tiny.photos(5)], [0.4, 0.8], progress=False)
    budget = thresholds.budgets[0]
    with dymu.apply(model, thresholds, budget=budget) as handle:
        subject = Subject(family, model, processor, thresholds, handle, budget)
        loaded = load(photo, "photo.png")
        *_, last = asking.ask(subject, loaded, "photo.png", "what ?", budget)
    assert last.merged is not None
    assert last.merged.tokens < last.original
    assert last.promise is not None
    assert 0 < last.promise.encoder <= 1
    assert 0 < last.promise.prefill <= 1
    assert last.groups is not None
    layers = {group.layer for group in last.groups.groups if group.size > 1}
    assert layers
    assert None not in layers
    assert 0 not in layers
    json.dumps(asking.as_json(subject, last))
    assert "tokens" in html.asked(subject, last)


# --- words and pictures that cannot be used ---


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "photo.png is not an image"),
        (b"words", "photo.png is not an image"),
        (PHOTO.read_bytes()[:3000], "photo.png is damaged"),
    ],
)
def test_files_that_are_no_pictures(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "cached-under-another-name"
    path.write_bytes(content)
    with pytest.raises(BadImage, match=said) as raised:
        asking.load(path, "photo.png")
    assert "cached" not in str(raised.value)


def test_pictures_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "wide.png"
    Image.new("1", (20_000, 3_000)).save(path)
    with pytest.raises(BadImage, match="60 million pixels"):
        asking.load(path, "wide.png")
    monkeypatch.setattr(asking, "MAX_BYTES", 100)
    with pytest.raises(BadImage, match="MiB"):
        asking.load(path, "wide.png")
    path.unlink()
    with pytest.raises(BadImage, match="not here any more"):
        asking.load(path, "wide.png")


@pytest.mark.parametrize("question", ["", "  \n", "x" * 3000, "what is <image>?"])
def test_questions_that_cannot_be_asked(subject: Subject, question: str) -> None:
    with pytest.raises(BadPrompt):
        asking.check_asked(subject, question)


def test_boxes() -> None:
    assert asking.boxes_of("0, 0.25 0.5,1\n\n 0.1, 0.1, 0.2, 0.2 ") == [(0, 0.25, 0.5, 1), (0.1, 0.1, 0.2, 0.2)]
    assert asking.boxes_of("") == []
    for words in ("1, 2", "0 0 0 0", "0 0 nan 1", "0 0 2 1", "a b c d", "0 0 1 1\n" * 17):
        with pytest.raises(BadPrompt):
            asking.boxes_of(words)


def test_tokens_in_boxes_merge_last(subject: Subject, answered: list[Asked]) -> None:
    box = (0.5, 0.0, 1.0, 0.5)
    other = (0.0, 0.75, 0.25, 1.0)
    *_, last = asking.ask(subject, asking.load(PHOTO, "photo.jpg"), "photo.jpg", QUESTION, 38, [box, other])

    def inside(groups: Groups | None) -> int:
        assert groups is not None
        return sum(bool(((group.cells[:, 0] < 8) & (group.cells[:, 1] >= 8)).any()) for group in groups.groups)

    assert inside(last.groups) > inside(answered[0].groups)
    assert last.merged is not None
    assert last.forecast is not None
    assert last.merged.tokens == last.forecast.expected == last.forecast.reserve == 38
    assert last.forecast.most == 256
    told = html.forecast(last.forecast, True)
    assert "keeps the budget's share" in told
    assert "Told from the pixels" not in told
    assert asking.as_json(subject, last)["focus"] == [list(box), list(other)]
    page = html.asked(subject, last)
    assert "focus=((0.5, 0.0, 1.0, 0.5), (0.0, 0.75, 0.25, 1.0))" in page
    assert page.count("dymu-box") == 2


# --- the command and the JSON ---


@pytest.mark.parametrize("name", ["photo.jpg", "my photo's.jpg", "-x.png", "ünï$(rm).png"])
def test_the_command_says_what_was_asked(subject: Subject, name: str) -> None:
    call = asking.command(subject, name, "what's 'this'; $HOME?", 77, "--compare")
    words = shlex.split(call)
    assert words[:2] == ["dymu", "run"]
    assert [word for word in words if word in (name, "what's 'this'; $HOME?")] == [name, "what's 'this'; $HOME?"]


def test_the_command_gives_the_same(
    subject: Subject, answered: list[Asked], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dymu run` with the words on the page has the answers, counts and bytes that stand there."""
    shown = asking.as_json(subject, answered[-1])
    call = shlex.split(asking.command(subject, str(PHOTO), QUESTION, 38, "--compare"))
    monkeypatch.setattr(sys, "argv", call)
    with pytest.raises(SystemExit):
        main.main()
    data = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    same = ("answer", "original_tokens", "kept_tokens", "cache_bytes")
    assert [shown[name] for name in same] == [data[name] for name in same]
    assert [shown["untouched"][name] for name in same] == [data["untouched"][name] for name in same]
    assert data.keys() - shown.keys() == set()


# --- HTML ---


def test_what_differs_is_marked() -> None:
    before, after, differing = html.marked_words("a red cat sits", "a blue cat sits down")
    assert before == "a <del>red</del> cat sits"
    assert after == "a <ins>blue</ins> cat sits <ins>down</ins>"
    assert differing == 2
    assert html.marked_words("same  words", "same words") == ("same words", "same words", 0)
    assert html.marked_words("", "new") == ("", "<ins>new</ins>", 1)


HOSTILE = "<script>alert(1)</script>\"'&${1+1}{{x}}`y`"


def test_no_text_becomes_markup(subject: Subject, answered: list[Asked]) -> None:
    last = answered[-1]
    assert last.merged is not None
    assert last.untouched is not None
    hostile = replace(
        last, question=HOSTILE, picture=replace(last.picture, name=HOSTILE, notes=(HOSTILE,)),
        merged=replace(last.merged, answer=HOSTILE), untouched=replace(last.untouched, answer=HOSTILE + " more"),
    )  # fmt: skip
    dots = [plots.Dot(1, 2, HOSTILE), plots.Dot(2, 3, HOSTILE)]
    pages = [
        html.asked(subject, hostile),
        html.error(HOSTILE),
        html.status(HOSTILE),
        html.forecast(last.forecast, False, [HOSTILE]),
        html.table(HOSTILE, [HOSTILE, HOSTILE], [[HOSTILE, HOSTILE]]),
        plots.plot(HOSTILE, HOSTILE, HOSTILE, [plots.Series(HOSTILE, dots, line=True)]),
        plots.bars_over_time([1, 2], [3, 3], HOSTILE),
    ]
    for page in pages:
        assert "<script" not in page
        assert not re.search(r"\$\{|\{\{|`", page)


def test_pages_are_whole(subject: Subject, answered: list[Asked]) -> None:
    """Every element that is opened is closed."""
    for number, now in enumerate(answered):
        running = "" if number == 2 else "…"
        page = html.asked(subject, now, running).replace("<br>", "")
        ElementTree.fromstring(page)


@pytest.mark.parametrize("layer", [None, 0, BEHIND, 3])
def test_groups_in_words(layer: int | None) -> None:
    cells = np.array([[0, 0], [0, 1]])
    assert html.about(Group(2, layer, cells, (0, 0, 0))).startswith("2 patches are one token")
    assert html.about(Group(1, 0, cells[:1], (0, 0, 0))) == "a patch that stands for itself"


def test_charts_take_any_numbers() -> None:
    for values in ([0.0], [5.0, 5.0], [1e-9, 1e9], [-3.0, 2.0]):
        drawn = plots.plot("t", "x", "y", [plots.Series("s", [plots.Dot(v, v, "a", v, v) for v in values], line=True)])
        assert "nan" not in drawn
        assert drawn.count("<circle") == len(values)
    assert plots.plot("t", "x", "y", [plots.Series("s", [])]) == ""


# --- turns, videos, results ---


def test_earlier_turns_get_smaller_budgets(subject: Subject) -> None:
    assert turns.budgets(80, 0.5, 4, 20) == [20, 20, 40, 80]
    first = turns.Turn("", "photo.jpg", QUESTION)
    photo, scene = (asking.load(path, path.name).image for path in (PHOTO, SCENE))
    *_, alone = turns.say(subject, (), [photo], first, 77, 0.5)
    *_, both = turns.say(subject, alone.turns, [photo, scene], turns.Turn("", "scene.png", QUESTION), 77, 0.5)
    assert both.budgets == (38.5, 77)
    assert both.original == (256, 256)
    assert both.kept[0] < alone.kept[0]
    assert both.merged.tokens == sum(both.kept)
    assert both.turns[0].answer == alone.merged.answer
    assert both.untouched is not None
    assert "dymu_budget=[38.5, 77]" in turns.as_python(subject, both)
    json.dumps(turns.as_json(subject, both))


def test_too_many_turns(subject: Subject) -> None:
    turn = turns.Turn("", "photo.jpg", QUESTION, "a photo")
    with pytest.raises(BadPrompt, match="begin anew"):
        next(turns.say(subject, [turn] * turns.MOST_TURNS, [], turn, 77, 0.5))


def test_a_model_without_videos(subject: Subject) -> None:
    frames = [Image.new("RGB", (64, 64))] * 2
    with pytest.raises(BadVideo, match="takes no videos"):
        next(videos.ask_video(subject, LoadedVideo(frames, None, None, (), 2), "clip.mp4", QUESTION, 77))


def test_a_video_is_asked() -> None:
    model = tiny.llava("siglip", "qwen2", "llava_onevision")
    thresholds = dymu.calibrate(model, tiny.processor("llava_onevision"), tiny.photos(6), [0.4, 1.0], progress=False)
    scenes = [photo.resize((120, 90)) for photo in tiny.photos(3)[1:]]
    frames = [scenes[number // 2] for number in range(4)]
    budget = thresholds.budgets[0]
    with dymu.apply(model, thresholds, budget=budget) as handle:
        processor: Any = tiny.full_processor("llava_onevision")
        subject = Subject("m", model, processor, thresholds, handle, budget)
        *_, last = videos.ask_video(subject, LoadedVideo(frames, 2.0, 2.0, (), 4), "clip.mp4", "what", budget)
    assert len(last.fresh) == len(last.each) == 4
    assert all(fresh <= full for fresh, full in zip(last.fresh, last.each, strict=True))
    assert last.merged.tokens < last.original
    json.dumps(videos.as_json(subject, last))


def test_results_files(tmp_path: Path) -> None:
    page = results.page([(str(ROOT / "training" / "results" / "heldout.jsonl"), "mine.jsonl")])
    assert "mine.jsonl" in page
    assert "73.7 [70.9, 76.3]" in page
    assert page.count("<circle") == 6
    bad = tmp_path / "cached"
    bad.write_text("{}\n")
    page = results.page([(str(bad), "bad.jsonl"), (str(tmp_path / "gone"), "gone.jsonl")])
    assert "bad.jsonl is no result file" in page
    assert "gone.jsonl is not here any more" in page
    assert str(tmp_path) not in page
    assert "more than the" in results.page([("", "")] * 9)


# --- the command ---


def test_without_gradio_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dymu.cli import demo

    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "gradio" else True)
    monkeypatch.setattr(sys, "argv", ["dymu", "demo"])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 1
    assert "needs gradio, not installed: `pip install 'dymu[demo]'`" in capsys.readouterr().err
