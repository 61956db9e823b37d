"""Every question that a scene answers exactly, in several phrasings; what could be ambiguous is never asked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from scenes.assets import Materials
from scenes.compose import Item, Scene, Sign, alike
from scenes.drawing import COLOURS, PATTERNS, SHAPES

KINDS = (
    "naming", "naming_unseen", "counting", "colour", "size", "relation", "yesno", "reading", "comparison",
)  # fmt: skip
"""What evaluation asks. ``naming_unseen`` asks for identities that training never shows."""

MOST_COUNTED = 12
CLEAR_GAP = 10 / 336
"""Part of the side that must lie between two things for one to be left of, or above, the other."""
CLEARLY_LARGER = 1.4
"""Least ratio of longer sides; that of the areas must be its square, nearly."""
CLEARLY_NEARER = 0.7
CLEARLY_OBLONG = 1.5
"""Least ratio of the sides of a sign that nobody takes for a square."""

WORD, WORDS, NUMBER, YESNO = (
    "Answer with one word.", "Answer with one or two words.", "Answer with a number.", "Answer with yes or no.",
)  # fmt: skip

ALSO_COLOURS = {"grey": ("gray",), "purple": ("violet",), "orange": (), "pink": ("magenta",)}
CORNERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")

PHRASINGS: dict[str, tuple[str, ...]] = {
    "only": ("What is shown in the image?", "What object is this?", "Name the object in the image."),
    "framed": (
        "What is inside the {box} box?",
        "Which object is in the {box} box?",
        "Name the object in the {box} box.",
    ),
    "nearest": (
        "Which object is closest to the {corner} corner of the image?",
        "What object is nearest the {corner} corner?",
    ),
    "count": ("How many {many} are there?", "How many {many} are in the image?", "Count the {many}."),
    "count all": (
        "How many objects are there in the image, not counting text?",
        "Count all objects in the image. Do not count text.",
    ),
    "colour": ("What colour is the {one}?", "What color is the {one}?", "Which colour does the {one} have?"),
    "colour framed": ("What colour is the {one} inside the {box} box?", "What color is the {one} in the {box} box?"),
    "colour largest": ("What colour is the largest {one}?", "What color is the biggest {one}?"),
    "colour background": ("What colour is the background?", "What is the background color?"),
    "colour sign": ("What colour is the sign that says '{text}'?", "On what color of sign is '{text}' written?"),
    "larger": (
        "Which is drawn larger, the {one} or the {other}?",
        "What is bigger in the image, the {one} or the {other}?",
    ),
    "smaller": ("Which is drawn smaller, the {one} or the {other}?",),
    "largest": ("Which object is the largest in the image?", "What is the biggest object in the image?"),
    "left or right": (
        "Is the {one} to the left or to the right of the {other}?",
        "On which side of the {other} is the {one}, left or right?",
    ),
    "above or below": (
        "Is the {one} above or below the {other}?",
        "Is the {one} placed above the {other} or below it?",
    ),
    "in or out": ("Is the {one} inside or outside the {box} box?",),
    "is there": ("Is there {a one} in the image?", "Does the image show {a one}?", "Can you see {a one} in the image?"),
    "exactly": ("Are there exactly {count} {many} in the image?", "Does the image show exactly {count} {many}?"),
    "is related": ("Is the {one} {relation} the {other}?",),
    "is framed": ("Is the {one} inside the {box} box?", "Does the {box} box contain the {one}?"),
    "is written": ("Is the word '{text}' written in the image?", "Does the word '{text}' appear in the image?"),
    "read": ("What does the {sign} sign say?", "What is written on the {sign} sign?", "Read the {sign} sign."),
    "read only": ("What does the sign say?", "What text is in the image?", "What is written in the image?"),
    "read word": ("What is the {which} word on the {sign} sign?",),
    "read line": ("What does the {which} line of the {sign} sign say?", "Read the {which} line on the {sign} sign."),
    "more": (
        "Which half of the image has {more} {many}, the {first} or the {second}?",
        "Are there {more} {many} in the {first} half or in the {second} half?",
    ),
    "as many": ("Are there as many {many} in the {first} half as in the {second} half?",),
    "same colour": ("Is the {one} in the {first} half the same colour as the {one} in the {second} half?",),
    "caption": ("Describe the image briefly.", "What does the image show?", "Write a short caption for this image."),
}  # fmt: skip

Query = tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question, the answers that are right (the first is how it would be said), and what exactly it asks.

    ``query`` is the phrasing's key followed by its arguments, so that the answer can be derived again from the facts.
    """

    kind: str
    text: str
    answers: tuple[str, ...]
    query: Query


def questions(scene: Scene, materials: Materials, kind: str, rng: np.random.Generator) -> list[Question]:
    """All questions of one of ``KINDS``, or the ``caption``; absent things and wordings are drawn with ``rng``."""
    return list(_Asker(scene, materials, rng).ask(kind))


def choose(options: list[Question], rng: np.random.Generator) -> Question:
    """One of them: first what is asked is drawn, so that no way of asking crowds out another, then about what.

    High counts are drawn more often than low ones, of which every scene has more.
    """
    ways = sorted({option.query[0] for option in options})
    way = ways[rng.integers(len(ways))]
    mine = [option for option in options if option.query[0] == way]
    weights = np.array([float(option.answers[0]) if option.kind == "counting" else 1.0 for option in mine])
    return mine[int(rng.choice(len(mine), p=weights / weights.sum()))]


def article(name: str, countable: bool) -> str:
    """The name as one says it of one: a dog, an apple, jeans."""
    if not countable:
        return name
    return f"an {name}" if name[0] in "aeio" or name.startswith("umb") else f"a {name}"


class _Asker:
    def __init__(self, scene: Scene, materials: Materials, rng: np.random.Generator) -> None:
        self.scene, self.materials, self.rng = scene, materials, rng
        self.side = scene.image.width
        self.names = Counter(item.name for item in scene.items)
        self.coloured = Counter((item.colour, item.name) for item in scene.items if item.colour)
        self.on_photo = scene.background == "photo"
        self.plates = {sign.colour for sign in scene.signs} | {frame.colour for frame in scene.frames}
        self.vague = self._vague()
        self.boxes = self._boxes()

    def _vague(self) -> frozenset[str]:
        """Shapes that other things in the scene show as well, so that "the square" or "no square" means little."""
        shown = PATTERNS[self.scene.pattern] if self.scene.pattern else frozenset()
        square = any(longer < CLEARLY_OBLONG * shorter for shorter, longer in map(sides, self.scene.signs))
        return shown | {"square"} if square or self.scene.frames else shown

    def _boxes(self) -> tuple[str, ...]:
        """Colours of the frames that alone can be meant by "the red box"."""
        if any("box" in name.split() for item in self.scene.items for name in self._called(item)):
            return ()
        squares = {item.colour for item in self.scene.items if item.name == "square"}
        return tuple(frame.colour for frame in self.scene.frames if frame.colour not in squares)

    def ask(self, kind: str) -> Iterator[Question]:
        if kind in ("naming", "naming_unseen"):
            return self._naming(kind)
        if kind == "caption":
            return iter((self._caption(),))
        ways = {
            "counting": self._counting,
            "colour": self._colour,
            "size": self._size,
            "relation": self._relation,
            "yesno": self._yesno,
            "reading": self._reading,
            "comparison": self._comparison,
        }
        if kind not in ways:
            raise ValueError(f"no kind of question is called {kind!r}: there are {', '.join(KINDS)}")
        return ways[kind]()

    def _question(self, kind: str, query: Query, answers: tuple[str, ...], form: str, **fill: str) -> Question:
        """Word a question; ``{a one}`` stands for the thing with its article."""
        options = PHRASINGS[query[0]]
        text = options[self.rng.integers(len(options))]
        text = text.replace("{a one}", fill.pop("a_one", "")).format(**fill)
        return Question(kind, f"{text} {form}".strip(), answers, query)

    def _naming(self, kind: str) -> Iterator[Question]:
        items = self.scene.items

        def asked(item: Item, query: Query, **fill: str) -> Iterator[Question]:
            if item.known == (kind == "naming"):
                yield self._question(kind, query, self._called(item), WORDS, **fill)

        if len(items) == 1 and not self.on_photo and not self.scene.signs and not self.scene.frames:
            yield from asked(items[0], ("only",))
        for item in items:
            if item.frame in self.boxes:
                yield from asked(item, ("framed", item.frame), box=item.frame)
        if self.on_photo or len(items) < 3:
            return
        for corner, (x, y) in CORNERS.items():
            at = (x * self.side, y * self.side)
            near = sorted(items, key=lambda item: math.dist(item.centre, at))
            first, second = (math.dist(item.centre, at) for item in near[:2])
            if first < CLEARLY_NEARER * second and first < 0.35 * self.side and self._nothing_nearer(at, first):
                yield from asked(near[0], ("nearest", corner), corner=corner)

    def _nothing_nearer(self, at: tuple[float, float], distance: float) -> bool:
        """Whether no sign lies about as near."""
        return all(
            math.dist(at, (min(max(at[0], s.box[0]), s.box[2]), min(max(at[1], s.box[1]), s.box[3]))) > distance
            for s in self.scene.signs
        )

    def _counting(self) -> Iterator[Question]:
        for query, many, count in self._groups():
            if 0 < count <= MOST_COUNTED:
                yield self._question("counting", query, (str(count),), NUMBER, many=many)
        countable = all(self._plural(name) for name in self.names)
        if not self.on_photo and not self.scene.frames and countable and 0 < len(self.scene.items) <= MOST_COUNTED:
            yield self._question("counting", ("count all",), (str(len(self.scene.items)),), NUMBER)

    def _groups(self) -> Iterator[tuple[Query, str, int]]:
        """What can be counted: by name, by colour and by both."""
        for name, count in self.names.items():
            if (plural := self._plural(name)) and name not in self.vague:
                yield ("count", name, ""), plural, count
        colours = Counter(item.colour for item in self.scene.items if item.colour)
        for colour, count in colours.items():
            if colour not in self.plates:
                yield ("count", "", colour), f"{colour} shapes", count
        for (shade, name), count in self.coloured.items():
            if count < self.names[name] and shade and name not in self.vague:
                yield ("count", name, shade), f"{shade} {self._plural(name)}", count

    def _colour(self) -> Iterator[Question]:
        def asked(colour: str, query: Query, **fill: str) -> Question:
            return self._question("colour", query, (colour, *ALSO_COLOURS.get(colour, ())), WORD, **fill)

        for item in self.scene.items:
            if item.colour and self.names[item.name] == 1 and item.name not in self.vague:
                yield asked(item.colour, ("colour", item.name), one=item.name)
            if item.colour and item.frame in self.boxes:
                yield asked(item.colour, ("colour framed", item.frame), one="shape", box=item.frame)
        for name in self._clear_shapes():
            mine = sorted((i for i in self.scene.items if i.name == name and i.colour), key=lambda i: -i.longest)
            if len(mine) > 1 and larger(mine[0], mine[1]) and mine[0].colour:
                yield asked(mine[0].colour, ("colour largest", name), one=name)
        if self.scene.background_colour and not self.scene.panels:
            yield asked(self.scene.background_colour, ("colour background",))
        for sign in self.scene.signs:
            if len(sign.words) == 1 and self._unique(sign.words[0]):
                yield asked(sign.colour, ("colour sign", sign.words[0]), text=sign.words[0])

    def _unique(self, word: str) -> bool:
        return sum(word.lower() == other.lower() for sign in self.scene.signs for other in sign.words) == 1

    def _size(self) -> Iterator[Question]:
        handles = self._handles()
        for phrase, item, other_phrase, other in self._pairs(handles):
            if larger(item, other) and item.name != other.name:
                way, answer = ("larger", item) if self.rng.random() < 0.5 else ("smaller", other)
                said = (phrase, other_phrase) if self.rng.random() < 0.5 else (other_phrase, phrase)
                yield self._question("size", (way, *said), self._called(answer), WORDS, one=said[0], other=said[1])
        ranked = sorted(self.scene.items, key=lambda item: -item.longest)
        plain = not (self.on_photo or self.scene.signs or self.scene.frames)
        if plain and len(ranked) > 2 and all(larger(ranked[0], other) for other in ranked[1:]):
            yield self._question("size", ("largest",), self._called(ranked[0]), WORDS)

    def _relation(self) -> Iterator[Question]:
        handles = self._handles()
        for phrase, item, other_phrase, other in self._pairs(handles):
            for axis, way, sides in (
                (0, "left or right", ("left", "right")),
                (1, "above or below", ("above", "below")),
            ):
                if apart(item, other, axis, self.side):
                    side = sides[item.centre[axis] > other.centre[axis]]
                    query = (way, phrase, other_phrase)
                    yield self._question("relation", query, (side,), WORD, one=phrase, other=other_phrase)
        for phrase, item in handles:
            for box in self.boxes:
                inside = item.frame == box
                if inside or self.rng.random() < 0.3:
                    answers = ("inside", "in") if inside else ("outside", "out")
                    yield self._question("relation", ("in or out", phrase, box), answers, WORD, one=phrase, box=box)

    def _yesno(self) -> Iterator[Question]:
        """About as many yes as no in each way of asking; the wrong ones are nearly right."""
        yield from self._is_there()
        yield from self._is_related()
        yield from self._is_exactly()
        written = [word for sign in self.scene.signs for word in sign.words if word.isalpha()]
        if written:
            word = written[self.rng.integers(len(written))].lower()
            yield self._said(True, ("is written", word), text=word)
            taken = {word.lower() for word in written}
            lengths = {len(word) for word in taken}
            free = [w for w in self._sample(self.materials.words, 40) if w not in taken and len(w) in lengths]
            if free:
                yield self._said(False, ("is written", free[0]), text=free[0])

    def _said(self, yes: bool, query: Query, **fill: str) -> Question:
        return self._question("yesno", query, ("yes" if yes else "no",), YESNO, **fill)

    def _is_there(self) -> Iterator[Question]:
        """Never of a shape where the background may show it: as the answer is never no, yes would be no question."""
        present = [name for name in self.names if self._known(name) and self._plain(name)]
        if present:
            name = present[self.rng.integers(len(present))]
            yield self._said(True, ("is there", name, ""), a_one=article(name, bool(self._plural(name))))
            absent = self._absent()
            yield self._said(False, ("is there", absent, ""), a_one=article(absent, bool(self._plural(absent))))
        pairs = [(colour, name) for colour, name in self.coloured if self._plain(name)]
        if pairs:
            colour, name = pairs[self.rng.integers(len(pairs))]
            yield self._said(True, ("is there", name, str(colour)), a_one=article(f"{colour} {name}", True))
            elsewhere = {c for c, n in pairs if n != name} - {c for c, n in pairs if n == name}
            free = sorted(str(c) for c in elsewhere or set(COLOURS) - {c for c, n in pairs if n == name})
            wrong = free[self.rng.integers(len(free))]
            yield self._said(False, ("is there", name, wrong), a_one=article(f"{wrong} {name}", True))

    def _is_related(self) -> Iterator[Question]:
        handles = self._handles()
        for phrase, item, other_phrase, other in self._pairs(handles)[:4]:
            for axis, relations in ((0, ("to the left of", "to the right of")), (1, ("above", "below"))):
                if apart(item, other, axis, self.side):
                    true = bool(self.rng.random() < 0.5)
                    relation = relations[(item.centre[axis] > other.centre[axis]) == true]
                    query = ("is related", phrase, relation, other_phrase)
                    yield self._said(true, query, one=phrase, other=other_phrase, relation=relation)
        for phrase, item in handles:
            if item.frame in self.boxes:
                yield self._said(True, ("is framed", phrase, item.frame), one=phrase, box=item.frame)
                others = [box for box in self.boxes if box != item.frame]
                if others:
                    yield self._said(False, ("is framed", phrase, others[0]), one=phrase, box=others[0])

    def _is_exactly(self) -> Iterator[Question]:
        for query, many, count in self._groups():
            if 2 <= count <= MOST_COUNTED:
                yes = bool(self.rng.random() < 0.5)
                said = str(count if yes else count + (1 if self.rng.random() < 0.5 else -1))
                if said != "1":
                    yield self._said(yes, ("exactly", said, *query[1:]), count=said, many=many)

    def _reading(self) -> Iterator[Question]:
        signs = self.scene.signs
        for sign in signs:
            if len(sign.lines) == 1:
                form = NUMBER if sign.words[0].isdigit() else WORD if len(sign.words) == 1 else ""
                text = " ".join(sign.words)
                yield self._question("reading", ("read", sign.colour), (text,), form, sign=sign.colour)
                if len(signs) == 1:
                    yield self._question("reading", ("read only",), (text,), form)
            else:
                yield from self._read_parts(sign)

    def _read_parts(self, sign: Sign) -> Iterator[Question]:
        for which, word in (("first", sign.words[0]), ("last", sign.words[-1])):
            query = ("read word", which, sign.colour)
            yield self._question("reading", query, (word,), WORD, which=which, sign=sign.colour)
        number = int(self.rng.integers(len(sign.lines)))
        query = ("read line", ORDINALS[number], sign.colour)
        text = " ".join(sign.lines[number])
        yield self._question("reading", query, (text,), "", which=ORDINALS[number], sign=sign.colour)

    def _comparison(self) -> Iterator[Question]:
        if not self.scene.panels:
            return
        first, second = (panel.name for panel in self.scene.panels)
        halves = {"first": first, "second": second}
        plurals = [(name, self._plural(name)) for name in self.names]
        groups = [(name, many) for name, many in plurals if many and name not in self.vague]
        if not self.on_photo and not self.scene.signs and all(many for _, many in plurals):
            groups.append(("", "objects"))
        for name, many in groups:
            counts = [
                sum(item.panel == half and name in ("", item.name) for item in self.scene.items)
                for half in (first, second)
            ]
            same = counts[0] == counts[1]
            query: Query = ("as many", name)
            yield self._question("comparison", query, ("yes" if same else "no",), YESNO, many=many, **halves)
            if not same:
                more = ("more", "fewer")[int(self.rng.integers(2))]
                half = first if (counts[0] > counts[1]) == (more == "more") else second
                answers = (half, f"{half} half", f"{half} one")
                query = ("more", more, name)
                yield self._question("comparison", query, answers, WORD, more=more, many=many, **halves)
        for name in self._clear_shapes():
            mine = {
                half: [i for i in self.scene.items if i.name == name and i.panel == half] for half in (first, second)
            }
            if all(len(items) == 1 for items in mine.values()):
                same = mine[first][0].colour == mine[second][0].colour
                query = ("same colour", name)
                yield self._question("comparison", query, ("yes" if same else "no",), YESNO, one=name, **halves)

    def _caption(self) -> Question:
        counted: Counter[tuple[str, str | None]] = Counter((item.name, item.colour) for item in self.scene.items)
        parts = [self._several(name, colour, count) for (name, colour), count in counted.most_common(4)]
        parts += ["other objects"] if len(counted) > 4 else []
        parts += [f"a {s.colour} sign that says '{s.words[0]}'" for s in self.scene.signs if len(s.words) == 1][:2]
        behind = {"photo": "a photo", "texture": "a pattern", "gradient": "a colour gradient"}
        ground = behind.get(self.scene.background, f"a {self.scene.background_colour} background")
        said = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] if parts else "nothing"
        return self._question("caption", ("caption",), (f"{said[0].upper()}{said[1:]} on {ground}.",), "")

    def _several(self, name: str, colour: str | None, count: int) -> str:
        plural = self._plural(name)
        shade = f"{colour} " if colour else ""
        if count == 1 or not plural:
            return article(f"{shade}{name}", bool(plural))
        return f"{count} {shade}{plural}"

    def _handles(self) -> list[tuple[str, Item]]:
        """Known objects that can be spoken of, each with the phrase that fits no other: dog, star, red star."""
        handles = []
        for item in self.scene.items:
            if not item.known or item.name in self.vague:
                continue
            if self.names[item.name] == 1:
                handles.append((item.name, item))
            elif item.colour and self.coloured[item.colour, item.name] == 1:
                handles.append((f"{item.colour} {item.name}", item))
        return handles

    def _pairs(self, handles: list[tuple[str, Item]]) -> list[tuple[str, Item, str, Item]]:
        """Up to eight ordered pairs of different objects."""
        pairs = [(a, b) for a in range(len(handles)) for b in range(len(handles)) if a != b]
        order = self.rng.permutation(len(pairs))[:8]
        return [(*handles[pairs[k][0]], *handles[pairs[k][1]]) for k in order]

    def _called(self, item: Item) -> tuple[str, ...]:
        """The names that are right for an object."""
        if item.colour:
            return item.name, f"{item.colour} {item.name}"
        return item.name, *self.materials.things[item.name].also

    def _plural(self, name: str) -> str:
        return f"{name}es" if name == "cross" else f"{name}s" if name in SHAPES else self.materials.things[name].plural

    def _known(self, name: str) -> bool:
        return name in SHAPES or self.materials.things[name].known

    def _clear_shapes(self) -> list[str]:
        return [name for name in SHAPES if name not in self.vague]

    def _plain(self, name: str) -> bool:
        """Whether anybody sees that it is there, or is not: a photo may show any shape."""
        return name not in self.vague and not (self.on_photo and name in SHAPES)

    def _absent(self) -> str:
        """A known thing or shape that is not there, nor anything like it."""
        present = set(self.names)
        while True:
            if self.rng.random() < 0.3:
                name = SHAPES[self.rng.integers(len(SHAPES))]
                if name not in present and self._plain(name) and not alike(self.materials, name, present):
                    return name
                continue
            (name,) = self._sample(tuple(self.materials.things), 1)
            thing = self.materials.things[name]
            seen = self.on_photo and thing.outdoor
            if thing.known and name not in present and not seen and not alike(self.materials, name, present):
                return name

    def _sample(self, options: tuple[str, ...], count: int) -> list[str]:
        return [options[k] for k in self.rng.integers(len(options), size=count)]


def sides(sign: Sign) -> tuple[int, int]:
    """The shorter and the longer side of a sign in pixels."""
    left, top, right, bottom = sign.box
    width, height = right - left, bottom - top
    return min(width, height), max(width, height)


def larger(item: Item, other: Item) -> bool:
    """Whether a person sees at once that the first is the larger one."""
    return item.longest >= CLEARLY_LARGER * other.longest and item.area >= 0.9 * CLEARLY_LARGER**2 * other.area


def apart(item: Item, other: Item, axis: int, side: int) -> bool:
    """Whether a clear gap lies between them along an axis (0: left to right, 1: top to bottom)."""
    first, second = sorted((item.box, other.box), key=lambda box: box[axis])
    return second[axis] - first[axis + 2] >= CLEAR_GAP * side
