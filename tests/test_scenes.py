"""Composed scenes: reproducible, honest about what they show, and asked about without ambiguity."""

import csv
import hashlib
import json
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scenes import KINDS, Item, Panel, Question, Scene, Sign, compose, evaluation_pack, questions
from scenes.assets import Materials
from scenes.compose import Frame, alike
from scenes.composed import LEVELS, Composed, calibration_images
from scenes.drawing import COLOURS, PATTERNS, SHAPES
from scenes.photos import Photos
from scenes.questions import ORDINALS

ROOT = Path(__file__).parents[1]
LISTS = ROOT / "training" / "lists"
PACK = ROOT / "scenes" / "pack"
SAMPLE = 4 * len(KINDS)
CORNERS = {"top left": (0, 0), "top right": (336, 0), "bottom left": (0, 336), "bottom right": (336, 336)}


@cache
def asked() -> list[tuple[Scene, Question]]:
    """The first scenes of the task, with all further questions of a kind."""
    task = Composed()
    found = []
    for index in range(SAMPLE):
        scene, question = task.scene(index)
        found.append((scene, question))
        rng = np.random.default_rng(index)
        for kind in KINDS:
            found += [(scene, other) for other in questions(scene, task.materials, kind, rng)]
    return found


def spoken_of(scene: Scene, phrase: str) -> Item:
    """The one object that a phrase fits; more or fewer would make a question ambiguous."""
    fitting = [i for i in scene.items if phrase in (i.name, f"{i.colour} {i.name}")]
    assert len(fitting) == 1, f"{phrase!r} fits {len(fitting)} objects"
    return fitting[0]


def derived(scene: Scene, query: tuple[str, ...]) -> str:
    """The answer to a query from the facts alone, by brute force."""
    items, signs = scene.items, {sign.colour: sign for sign in scene.signs}
    first, second = (panel.name for panel in scene.panels) if scene.panels else ("", "")

    def count(name: str, colour: str = "", panel: str = "") -> int:
        return sum(name in ("", i.name) and colour in ("", i.colour) and panel in ("", i.panel) for i in items)

    match query:
        case ("only",):
            (item,) = items
            return item.name
        case ("framed", box):
            (item,) = [i for i in items if i.frame == box]
            return item.name
        case ("nearest", corner):
            x, y = CORNERS[corner]
            return min(items, key=lambda i: (i.centre[0] - x) ** 2 + (i.centre[1] - y) ** 2).name
        case ("count", name, colour):
            return str(count(name, colour))
        case ("count all",):
            return str(len(items))
        case ("colour", name):
            return str(spoken_of(scene, name).colour)
        case ("colour framed", box):
            (item,) = [i for i in items if i.frame == box]
            return str(item.colour)
        case ("colour largest", name):
            return str(max((i for i in items if i.name == name), key=lambda i: i.longest).colour)
        case ("colour background",):
            return str(scene.background_colour)
        case ("colour sign", text):
            (sign,) = [s for s in scene.signs if s.words == (text,)]
            return sign.colour
        case ("larger", one, other):
            return max(spoken_of(scene, one), spoken_of(scene, other), key=lambda i: i.area).name
        case ("smaller", one, other):
            return min(spoken_of(scene, one), spoken_of(scene, other), key=lambda i: i.area).name
        case ("largest",):
            return max(items, key=lambda i: i.area).name
        case ("left or right", one, other):
            return "left" if spoken_of(scene, one).box[2] < spoken_of(scene, other).box[0] else "right"
        case ("above or below", one, other):
            return "above" if spoken_of(scene, one).box[3] < spoken_of(scene, other).box[1] else "below"
        case ("in or out", one, box):
            return "inside" if encloses(scene, box, spoken_of(scene, one)) else "outside"
        case ("is there", name, colour):
            return "yes" if count(name, colour) else "no"
        case ("exactly", number, name, colour):
            return "yes" if count(name, colour) == int(number) else "no"
        case ("is related", one, relation, other):
            a, b = spoken_of(scene, one).box, spoken_of(scene, other).box
            true = {
                "to the left of": a[2] < b[0],
                "to the right of": a[0] > b[2],
                "above": a[3] < b[1],
                "below": a[1] > b[3],
            }
            return "yes" if true[relation] else "no"
        case ("is framed", one, box):
            return "yes" if encloses(scene, box, spoken_of(scene, one)) else "no"
        case ("is written", word):
            return "yes" if word in {w.lower() for s in scene.signs for w in s.words} else "no"
        case ("read", colour):
            return " ".join(signs[colour].words)
        case ("read only",):
            (sign,) = scene.signs
            return " ".join(sign.words)
        case ("read word", which, colour):
            return signs[colour].words[0 if which == "first" else -1]
        case ("read line", which, colour):
            return " ".join(signs[colour].lines[ORDINALS.index(which)])
        case ("as many", name):
            return "yes" if count(name, panel=first) == count(name, panel=second) else "no"
        case ("more", more, name):
            ranked = sorted((first, second), key=lambda half: count(name, panel=half))
            return ranked[more == "more"]
        case ("same colour", name):
            shades = [i.colour for i in items if i.name == name]
            assert len(shades) == 2
            return "yes" if shades[0] == shades[1] else "no"
    raise AssertionError(f"nobody checks {query}")


def encloses(scene: Scene, colour: str, item: Item) -> bool:
    (frame,) = [f for f in scene.frames if f.colour == colour]
    (l, t, r, b), (left, top, right, bottom) = frame.box, item.box
    return l <= left and t <= top and right <= r and bottom <= b


def test_every_answer_follows_from_the_facts():
    for scene, question in asked():
        assert question.answers[0] == derived(scene, question.query), question


def test_the_wording_does_not_give_the_answer_away():
    def first_named(question: Question) -> bool:
        return question.query[1].endswith(question.answers[0])

    sizes = [first_named(question) for _, question in asked() if question.query[0] in ("larger", "smaller")]
    assert 0.3 < sum(sizes) / len(sizes) < 0.7
    for way, answer in (("left or right", "left"), ("above or below", "above"), ("is related", "yes")):
        answers = [question.answers[0] for _, question in asked() if question.query[0] == way]
        assert 0.25 < answers.count(answer) / len(answers) < 0.75


def test_every_kind_and_way_of_asking_occurs():
    assert {question.kind for _, question in asked()} == set(KINDS)
    assert len({question.query[0] for _, question in asked()}) >= 24


WHOLE = (0, 0, 336, 336)
HALVES = (Panel("left", (0, 0, 164, 336)), Panel("right", (172, 0, 336, 336)))
SHAPES_AND_DOG = (
    Item("square", "green", (10, 10, 60, 60), panel="left"),
    Item("square", "red", (10, 100, 100, 190), panel="left"),
    Item("square", "blue", (180, 10, 220, 50), panel="right"),
    Item("circle", "red", (180, 100, 220, 140), panel="right"),
    Item("triangle", "blue", (240, 100, 300, 160), panel="right"),
    Item("dog", None, (10, 220, 90, 300), panel="left"),
)


def put_together(
    items: tuple[Item, ...] = SHAPES_AND_DOG,
    *,
    signs: tuple[Sign, ...] = (),
    frames: tuple[Frame, ...] = (),
    panels: tuple[Panel, ...] = (),
    background: str = "flat",
    pattern: str | None = None,
) -> list[Question]:
    """Whatever is asked about a scene of these facts, in many draws; its pixels play no part."""
    colour = "white" if background == "flat" else None
    image = Image.new("RGB", WHOLE[2:])
    scene = Scene(image, items, signs, frames, panels, background, colour, 0.5, pattern)
    draws = [np.random.default_rng(draw) for draw in range(40)]
    return [q for rng in draws for kind in KINDS for q in questions(scene, evaluation_pack(), kind, rng)]


def about(name: str, found: list[Question]) -> set[str]:
    return {question.text for question in found if name in question.text}


def test_objects_are_compared_only_where_no_sign_could_count_as_one():
    sign = Sign("yellow", (("hello",),), (240, 200, 330, 230))
    for signs in ((), (sign,)):
        found = [question for question in put_together(panels=HALVES, signs=signs) if question.kind == "comparison"]
        assert about("circles", found)
        assert bool(about("objects", found)) == (not signs)


@pytest.mark.parametrize(
    ("others", "asked_about"),
    [
        ({}, True),
        ({"signs": (Sign("yellow", (("hello",),), (240, 200, 330, 230)),)}, True),
        ({"signs": (Sign("yellow", (("a", "b"),) * 3, (240, 200, 310, 270)),)}, False),
        ({"frames": (Frame("pink", (230, 90, 310, 170)),)}, False),
        ({"background": "texture", "pattern": "stripes"}, True),
        ({"background": "texture", "pattern": "checks"}, False),
    ],
    ids=["alone", "oblong sign", "square sign", "frame", "stripes", "checks"],
)
def test_squares_are_spoken_of_only_where_nothing_else_is_one(others, asked_about):
    for panels in ((), HALVES):
        found = put_together(panels=panels, **others)
        assert bool(about("square", found)) == asked_about
        assert about("circle", found)


def test_whether_a_shape_is_there_is_not_asked_where_the_background_may_show_it():
    def sought(background: str, pattern: str | None = None) -> set[str]:
        found = put_together(background=background, pattern=pattern)
        return {question.query[1] for question in found if question.query[0] == "is there"}

    assert {"square", "triangle", "hexagon"} <= sought("flat")
    assert not set(SHAPES) & sought("photo")
    assert "dog" in sought("photo")
    assert {"triangle", "hexagon"} <= sought("texture", "checks")
    assert not {"triangle", "cross", "diamond"} & sought("texture", "scribble")


def test_a_scene_knows_the_pattern_of_a_texture():
    scenes = [compose(evaluation_pack(), 3, index, 0.6) for index in range(40)]
    assert {scene.background for scene in scenes if scene.pattern} == {"texture"}
    assert {scene.pattern for scene in scenes if scene.background == "texture"} == set(PATTERNS)


def test_a_box_is_spoken_of_only_where_nothing_else_could_be_that_box():
    frames = (Frame("yellow", (0, 210, 100, 310)), Frame("pink", (230, 90, 310, 170)))
    framed = (
        Item("dog", None, (10, 220, 90, 300), frame="yellow"),
        Item("triangle", "blue", (240, 100, 300, 160), frame="pink"),
    )
    square, parcel = Item("square", "yellow", (10, 10, 60, 60)), Item("cardboard box", None, (10, 10, 60, 60))
    assert about("yellow box", put_together(framed, frames=frames))
    with_square = put_together((*framed, square), frames=frames)
    assert about("pink box", with_square)
    assert not about("yellow box", with_square)
    assert not {
        text for text in about(" box", put_together((*framed, parcel), frames=frames)) if "cardboard" not in text
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cup", "trophy"),
        ("phone", "telephone"),
        ("phone", "telephone receiver"),
        ("chicken", "chicken leg"),
        ("sewing needle", "syringe"),
        ("glass", "magnifying glass"),
        ("square", "set square"),
    ],
)
def test_what_goes_by_the_same_name_is_alike(one, other):
    assert alike(evaluation_pack(), one, ["apple", other])
    assert alike(evaluation_pack(), other, [one])
    assert not alike(evaluation_pack(), one, ["apple", "star"])


def test_nothing_is_called_absent_whose_name_fits_what_is_there():
    items = (Item("telephone", None, (10, 10, 90, 90)), Item("trophy", None, (110, 10, 190, 90)))
    pack = evaluation_pack()
    scene = Scene(Image.new("RGB", WHOLE[2:]), items, (), (), (), "flat", "white", 0.5)
    rng = np.random.default_rng(0)
    found = [question for _ in range(2000) for question in questions(scene, pack, "yesno", rng)]
    absent = {
        question.query[1] for question in found if question.query[0] == "is there" and question.answers[0] == "no"
    }
    assert len(absent) > 250
    assert not absent & {"phone", "telephone receiver", "cup"}


def test_every_example_tells_its_photo():
    task = Photos()
    pictures: dict[float, set[bytes]] = {}
    for index in range(0, len(task), 7):
        example = task[index]
        pictures.setdefault(example.measures["photo"], set()).add(example.images[0].tobytes())
    assert all(len(same) == 1 for same in pictures.values())
    assert len(set().union(*pictures.values())) == len(pictures) > 1


def test_names_that_could_be_mistaken_for_each_other_never_meet():
    things = evaluation_pack().things
    for scene, question in asked():
        names = {item.name for item in scene.items}
        if question.query[0] == "is there":
            names |= {question.query[1]}
        for name in names - set(SHAPES):
            assert not things[name].similar & names


def test_nothing_overlaps_or_leaves_the_picture():
    for scene in {id(scene): scene for scene, _ in asked()}.values():
        things = [item.box for item in scene.items] + [sign.box for sign in scene.signs]
        assert all(0 <= l < r <= 336 and 0 <= t < b <= 336 for l, t, r, b in things)
        for k, a in enumerate(things):
            for b in things[:k]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_nothing_is_too_small_to_see():
    for scene, _ in asked():
        assert all(item.longest >= (24 if item.colour else 33) for item in scene.items)
        assert all(item.longest >= 55 for item in scene.items if not item.known)


def test_unseen_identities_are_asked_for_under_their_own_kind_only():
    for _, question in asked():
        asked_for = question.answers[0]
        if question.kind == "naming_unseen":
            assert not evaluation_pack().things[asked_for].known
        elif question.kind == "naming":
            assert asked_for in SHAPES or evaluation_pack().things[asked_for].known
    assert any(not item.known for scene, _ in asked() for item in scene.items)


def test_every_beginning_is_balanced():
    task = Composed()
    seen = [task.scene(index)[1] for index in range(2 * len(KINDS))]
    assert Counter(question.kind for question in seen) == Counter(dict.fromkeys(KINDS, 2))
    assert {q.answers[0] for q in seen if q.kind == "yesno"} == {"yes", "no"}


def test_complexity_raises_objects_and_words():
    pack = evaluation_pack()

    def mean(level: float) -> tuple[float, float]:
        scenes = [compose(pack, 7, index, level) for index in range(16)]
        return float(np.mean([len(s.items) for s in scenes])), float(np.mean([s.words for s in scenes]))

    measured = [mean(level) for level in (0.0, 0.5, 1.0)]
    for column in zip(*measured, strict=True):
        assert all(low < high for low, high in pairwise(column))


def test_images_are_rgb_and_of_the_side_asked_for():
    for side in (224, 336):
        image = compose(evaluation_pack(), 1, 1, 0.6, side=side).image
        assert (image.mode, image.size) == ("RGB", (side, side))


def test_another_process_composes_the_same_pixels():
    code = (
        "import hashlib; from scenes.composed import Composed; t = Composed();"
        "print(hashlib.sha256(b''.join(t[i].images[0].tobytes() + t[i].question.encode() for i in (3, 7))).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    other = done.stdout.strip()
    task = Composed()
    mine = b"".join(task[i].images[0].tobytes() + task[i].question.encode() for i in (3, 7))
    assert hashlib.sha256(mine).hexdigest() == other


def test_calibration_shares_no_background_and_no_font_with_the_held_out_set():
    pack = evaluation_pack()
    for sourced in (pack.backgrounds, pack.fonts):
        files = {use: {s.file for s in sourced if s.use == use} for use in ("heldout", "calibration")}
        assert all(files.values())
        assert not files["heldout"] & files["calibration"]
    pictures = [image.tobytes() for image in calibration_images(4)]
    assert len(set(pictures)) == 4
    assert not set(pictures) & {Composed().scene(index)[0].image.tobytes() for index in range(4)}


def test_held_out_identities_are_never_in_the_training_split():
    def rows(name: str) -> list[dict[str, str]]:
        with (LISTS / f"{name}.csv").open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))

    objects = {row["name"]: row["split"] for row in rows("objects")}
    pack = evaluation_pack()
    assert {name for name, thing in pack.things.items() if not thing.known} == {
        name for name, split in objects.items() if split == "heldout"
    }
    share = sum(split == "heldout" for split in objects.values()) / len(objects)
    assert 0.14 < share < 0.16
    uses = {
        use: {row["subject"].lower() for row in rows("photos") if row["use"] == use} for use in ("train", "heldout")
    }
    assert not uses["train"] & uses["heldout"]
    assert sum(row["use"] == "heldout" for row in rows("photos")) >= 80
    families = {use: {r["family"] for r in rows("fonts") if r["use"] == use} for use in ("training", "heldout")}
    assert not families["training"] & families["heldout"]
    pictures = Counter(code for row in rows("objects") for code in (row["emoji"] + " " + row["clipart"]).split())
    assert max(pictures.values()) == 1, "one picture stands for two names"


def test_the_pack_is_small_whole_and_credited():
    files = [file for file in PACK.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 6_000_000
    index = json.loads((PACK / "pack.json").read_text(encoding="utf-8"))
    for name, digest in index["sha256"].items():
        assert hashlib.sha256((PACK / name).read_bytes()).hexdigest() == digest
    credits = (PACK / "CREDITS.md").read_text(encoding="utf-8")
    free = {line.split(" | ")[0]: line.split(" | ")[1] for line in credits.splitlines() if ".webp | " in line}
    for row in index["photos"] + index["backgrounds"]:
        assert free[f"| {row['file']}"] in ("Public Domain", "CC0-1.0")
    assert {"OFL.txt", "fluent-emoji.txt", "scowl.txt"} <= {file.name for file in (PACK / "LICENSES").iterdir()}


def test_a_pack_of_another_format_is_refused(tmp_path):
    (tmp_path / "pack.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="format 0"):
        Materials(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"pack\.json"):
        Materials(tmp_path / "nothing")


def test_colours_can_be_told_apart():
    rgb = np.array(list(COLOURS.values()), float)
    distances = np.linalg.norm(rgb[:, None] - rgb[None], axis=-1) + 1e3 * np.eye(len(rgb))
    assert distances.min() > 60
    assert len(LEVELS) % 2, "levels and yes/no would move in step"
