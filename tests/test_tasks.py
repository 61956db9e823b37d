"""Tasks score as the field does, and say what they asked."""

import csv
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dymu.evaluation.tasks import Example, Task, scoring
from scenes import evaluation_pack
from scenes.composed import Composed, number_said
from scenes.photos import Photos
from training.vocabulary import EMOJI

ROOT = Path(__file__).parents[1]

texts = st.text("abcd ", max_size=8)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("1,000 cats", "1000 cats"),
        ("2.5", "2.5"),
        ("it's", "its"),
        ("none", "0"),
        (" an\napple ", "apple"),
        ("red_fox", "red fox"),
        ("A.", "a"),
        (".5", ".5"),
        ("10:30", "10:30"),
        ("$5, 3%", "$5 3%"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_by_the_vqa_evaluation(answer, normal):
    assert scoring.normalised(answer) == normal


def test_exact_takes_any_reference():
    assert scoring.exact("A sofa.", ["couch", "sofa"]) == 1
    assert scoring.exact("red sofa", ["couch", "sofa"]) == 0
    assert scoring.exact("", ["A"]) == 0
    assert scoring.exact("0.5", ["5"]) == 0


@given(st.sampled_from("abc"), st.lists(st.sampled_from("abc"), min_size=1, max_size=10))
def test_vqa_is_the_mean_over_leaving_one_reference_out(answer, references):
    # "a" is an article and would vanish: every letter becomes a word of its own.
    answer, references = f"w{answer}", [f"w{r}" for r in references]
    left_out = [references[:k] + references[k + 1 :] for k in range(len(references))]
    expected = sum(min(1, rest.count(answer) / 3) for rest in left_out) / len(left_out)
    assert scoring.vqa(answer, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("104", "100", 1),
        ("106", "100", 0),
        ("5%", "0.05", 1),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("Paris.", "paris", 1),
        ("-5", "5", 0),
        ("$5", "-5", 0),
    ],
)
def test_numbers_may_be_five_percent_off_in_charts(answer, reference, score):
    assert scoring.relaxed(answer, [reference]) == score


@given(texts, texts)
def test_anls_is_symmetric_and_either_zero_or_above_a_half(a, b):
    score = scoring.anls(a, [b])
    assert score == scoring.anls(b, [a])
    assert score == 0 or 0.5 < score <= 1
    assert scoring.anls(a, [a]) == 1


def test_anls_of_a_known_line():
    assert scoring.anls("hallo world", ["hello world", "x"]) == pytest.approx(1 - 1 / 11)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [("Yes, it is.", "yes", 1), ("no", "yes", 0), ("The answer is yes", "yes", 0), ("", "no", 0), ("NO!", "no", 1)],
)
def test_yes_and_no_are_taken_from_the_first_word(answer, reference, score):
    assert scoring.yes_no(answer, [reference]) == score


def test_f1_counts_hits_among_answers_and_references():
    assert scoring.f1(["yes", "yes", None, "no"], ["yes", "no", "yes", "no"]) == pytest.approx(0.5)
    assert scoring.f1(["no"], ["no"]) == 0


@pytest.mark.parametrize(
    ("answer", "score"),
    [("There are four.", 1), ("4", 1), ("four stars, not 5", 1), ("14", 0), ("many", 0), ("4.5", 0)],
)
def test_counts_are_the_first_number_said(answer, score):
    assert number_said(answer, ("4",)) == score


@pytest.mark.parametrize("task", [Composed(per_kind=2), Photos()], ids=lambda task: task.name)
def test_a_task_keeps_its_protocol(task: Task):
    assert task.max_new_tokens <= 24
    assert task.describe()["pack"] == evaluation_pack().digest
    for index in {0, len(task) // 2, len(task) - 1}:
        example = task[index]
        assert example.images[0].mode == "RGB"
        assert example.question == task[index].question
        assert example.measures["jpeg_bytes"] > 1000
        assert task.score(example, example.references[0]) == 1
        assert task.score(example, "something else entirely") == 0
    with pytest.raises(IndexError):
        task[len(task)]


def test_composed_scores_each_kind_by_its_rule():
    task = Composed(per_kind=1)

    def score(kind: str, references: tuple[str, ...], answer: str) -> float:
        return task.score(Example((), "", references, kind), answer)

    assert score("colour", ("grey", "gray"), "Gray.") == 1
    assert score("counting", ("12",), "twelve") == 1
    assert score("comparison", ("left", "left half"), "the left half") == 1
    assert score("comparison", ("no",), "No, fewer.") == 1
    assert score("reading", ("apple",), "apples") == 0
    assert score("reading", ("apple pie",), "apples pie") == pytest.approx(0.9)
    assert score("reading", ("Apple",), "APPLE") == 1


def test_composed_refuses_kinds_that_it_does_not_have():
    with pytest.raises(ValueError, match="poetry"):
        Composed(kinds=("naming", "poetry"))


def test_photos_ask_as_much_yes_as_no_and_name_every_photo_once():
    task = Photos()
    asked = [task._asked[index] for index in range(len(task))]
    assert len({photo.file for photo, kind, _ in asked if kind != "yesno"}) == len(evaluation_pack().photos) >= 80
    answers = [name == photo.name for photo, kind, name in asked if kind == "yesno"]
    assert sum(answers) * 2 == len(answers)
    for photo, kind, name in asked:
        assert (kind == "naming_unseen") <= (not photo.known)
        assert name != "building" or photo.name == "building", "whatever stands somewhere may be one"
        assert name in ("", photo.name) or name not in photo.also
    kinds = [kind for _, kind, _ in asked]
    beginning = kinds[: len(kinds) // 4]
    for kind in set(kinds):
        assert beginning.count(kind) / len(beginning) == pytest.approx(kinds.count(kind) / len(kinds), abs=0.03)


def test_pages_say_what_of_the_tasks_the_demo_was_trained_on():
    def rows(name: str) -> list[dict[str, str]]:
        with (ROOT / "training" / name).open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))

    split = {row["path"]: row["split"] for row in rows("photos.csv")}
    photos = [row["path"] for row in rows("lists/photos.csv") if row["use"] in ("heldout", "heldout-known")]
    backgrounds = [row["path"] for row in rows("lists/photos.csv") if row["use"] == "background-heldout"]
    objects = [thing.name for thing in evaluation_pack().things.values() if not thing.known]
    assert len(photos) == len(evaluation_pack().photos)
    shown = {
        "photo": (sum(split.get(path) == "train" for path in photos), len(photos)),
        "background": (sum(split.get(path) == "background-train" for path in backgrounds), len(backgrounds)),
        "object": (sum(name in EMOJI for name in objects), len(objects)),
    }
    pages = {
        "training/README.md": shown,
        "docs/evaluation.md": {kind: shown[kind] for kind in ("photo", "background")},
        "scenes/photos.py": {"": shown["photo"]},
        "scenes/composed.py": {"background": shown["background"]},
    }
    for page, said in pages.items():
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        for kind, (some, every) in said.items():
            assert re.search(rf"\b{some} of (the |its )?{every}\b.{{,40}}{kind}", text), (page, kind, some, every)
