"""Compose a scene. Everything in it is known exactly, nothing overlaps, and nothing is too small to be seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from scenes import drawing
from scenes.assets import Materials
from scenes.drawing import BACKGROUNDS, COLOURS, SHAPES, Box

SIDE = 336
"""Pixels; sizes below are for this side and scale with it."""

MOST_OBJECTS, MOST_WORDS = 30, 40
LEAST_SHAPE, LEAST_PICTURE, LEAST_NAMED, LEAST_UNSEEN = 24, 34, 42, 56
LARGEST_PICTURE = 150
GAP = 5
"""Pixels between any two things."""

_CELL = 4


@dataclass(frozen=True)
class Item:
    """One object: a shape with a colour, or a picture of a thing (``colour`` is None).

    Attributes:
        box: what its visible pixels fill.
        panel: name of the panel it lies in, if the scene has panels.
        frame: colour of the box it lies in, if any.
        known: whether training shows this identity.
    """

    name: str
    colour: str | None
    box: Box
    panel: str | None = None
    frame: str | None = None
    known: bool = True

    @property
    def centre(self) -> tuple[float, float]:
        """x and y in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def longest(self) -> int:
        """The longer side of its box in pixels."""
        left, top, right, bottom = self.box
        return max(right - left, bottom - top)

    @property
    def area(self) -> int:
        """Of its box, in square pixels."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


@dataclass(frozen=True)
class Sign:
    """A plate of one colour with lines of words as they are written on it; no two plates share a colour."""

    colour: str
    lines: tuple[tuple[str, ...], ...]
    box: Box

    @property
    def words(self) -> tuple[str, ...]:
        """All words in reading order."""
        return tuple(word for line in self.lines for word in line)


@dataclass(frozen=True)
class Frame:
    """A coloured box around one object; no two share a colour."""

    colour: str
    box: Box


@dataclass(frozen=True)
class Panel:
    """One half of a divided scene: left, right, top or bottom."""

    name: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """A picture with all its facts. ``background_colour`` is known where it is flat, ``pattern`` where a texture."""

    image: Image.Image
    items: tuple[Item, ...]
    signs: tuple[Sign, ...]
    frames: tuple[Frame, ...]
    panels: tuple[Panel, ...]
    background: str
    background_colour: str | None
    complexity: float
    pattern: str | None = None

    @property
    def words(self) -> int:
        """How many words are written in it."""
        return sum(len(sign.words) for sign in self.signs)


def compose(
    materials: Materials,
    seed: int,
    index: int,
    complexity: float,
    *,
    use: str = "heldout",
    focus: str | None = None,
    side: int = SIDE,
) -> Scene:
    """The scene of a seed and an index; the same arguments give the same pixels.

    Args:
        complexity: 0 (one to three large objects, plain) to 1 (up to 30 objects and 40 words on a photo).
        use: which backgrounds and fonts of the pack it may show.
        focus: a kind of question that it should be able to answer; without one, anything goes.
        side: width and height in pixels.
    """
    return _Composer(materials, np.random.default_rng((seed, index)), complexity, use, focus, side).scene()


class _Room:
    """Which parts of the scene are still free, in cells of a few pixels."""

    def __init__(self, side: int) -> None:
        self.cells = side // _CELL
        self.taken = np.zeros((self.cells, self.cells), np.int32)

    def find(self, rng: np.random.Generator, width: int, height: int, within: Box) -> Box | None:
        """A free place of this size inside a box, or None."""
        w, h = -(-width // _CELL), -(-height // _CELL)
        left, top = -(-within[0] // _CELL), -(-within[1] // _CELL)
        part = self.taken[top : within[3] // _CELL, left : within[2] // _CELL]
        if w > part.shape[1] or h > part.shape[0]:
            return None
        total = np.zeros((part.shape[0] + 1, part.shape[1] + 1), np.int32)
        total[1:, 1:] = part.cumsum(0).cumsum(1)
        filled = total[h:, w:] - total[:-h, w:] - total[h:, :-w] + total[:-h, :-w]
        free = np.flatnonzero(filled == 0)
        if not len(free):
            return None
        y, x = divmod(int(free[rng.integers(len(free))]), filled.shape[1])
        x, y = (x + left) * _CELL, (y + top) * _CELL
        return x, y, x + width, y + height

    def take(self, box: Box) -> None:
        self.taken[box[1] // _CELL : -(-box[3] // _CELL), box[0] // _CELL : -(-box[2] // _CELL)] = 1


class _Composer:
    def __init__(
        self,
        materials: Materials,
        rng: np.random.Generator,
        complexity: float,
        use: str,
        focus: str | None,
        side: int,
    ) -> None:
        if not 0 <= complexity <= 1:
            raise ValueError(f"complexity is a number from 0 to 1, not {complexity}")
        self.materials, self.rng, self.complexity, self.use, self.focus = materials, rng, complexity, use, focus
        self.side, self.scale = side, side / SIDE
        self.room = _Room(side)
        self.image, self.background, self.colours, self.pattern = self._background()
        self.things = [t for t in materials.things.values() if not (self.background == "photo" and t.outdoor)]
        self.panels = self._panels()
        self.signs: list[Sign] = []
        self.frames: list[Frame] = []
        self.items: list[Item] = []

    def scene(self) -> Scene:
        self._draw_signs()
        groups = self._groups()
        if not self.panels and self.rng.random() < (0.75 if self.focus in ("naming", "naming_unseen") else 0.35):
            self._draw_framed(groups)
        self._draw_groups(groups)
        return Scene(
            self.image,
            tuple(self.items),
            tuple(self.signs),
            tuple(self.frames),
            tuple(self.panels),
            self.background,
            self.colours[0] if self.background == "flat" else None,
            self.complexity,
            self.pattern,
        )

    def _px(self, length: float) -> int:
        return max(1, round(length * self.scale))

    def _between(self, easy: float, hard: float) -> float:
        return easy + (hard - easy) * self.complexity

    def _pick(self, options: Iterable[str]) -> str:
        listed = list(options)
        return listed[self.rng.integers(len(listed))]

    def _background(self) -> tuple[Image.Image, str, list[str], str | None]:
        """The empty image, its kind, the named colours in it (all unknown for a photo), and a texture's pattern."""
        c = self.complexity
        odds = np.array([max(0.0, 1 - 2.2 * c), 0.5 * (1 - c), 0.35 + 0.3 * c, max(0.0, 1.6 * c - 0.5)])
        kind = str(self.rng.choice(BACKGROUNDS, p=odds / odds.sum()))
        if kind == "photo":
            files = [b.file for b in self.materials.backgrounds if b.use == self.use]
            photo = self.materials.picture(self._pick(files))
            return drawing.photo_background(self.rng, photo, self.side), kind, [], None
        colours = [str(colour) for colour in self.rng.choice(list(COLOURS), 2, replace=False)]
        colours = colours[:1] if kind == "flat" else colours
        image, pattern = drawing.background(self.rng, kind, colours, self.side)
        return image, kind, colours, pattern

    def _panels(self) -> list[Panel]:
        if self.focus != "comparison" and (self.focus is not None or self.rng.random() > 0.2):
            return []
        middle, half = self.side // 2, self._px(4)
        upright = self.rng.random() < 0.6
        line = (middle - half // 2, 0, middle + half - half // 2, self.side)
        low, high = (0, 0, middle - half, self.side), (middle + half, 0, self.side, self.side)
        if not upright:
            line, low, high = ((b[1], b[0], b[3], b[2]) for b in (line, low, high))
        self.image.paste(drawing.INK if self.rng.random() < 0.5 else drawing.PAPER, line)
        names = ("left", "right") if upright else ("top", "bottom")
        return [Panel(names[0], low), Panel(names[1], high)]

    def _everywhere(self) -> Box:
        edge = self._px(3)
        return edge, edge, self.side - edge, self.side - edge

    def _draw_signs(self) -> None:
        reads = self.focus == "reading"
        if not reads and self.rng.random() > self._between(0.3, 0.7):
            return
        most = round(self._between(2, MOST_WORDS))
        left = int(self.rng.integers(max(1, most // 4), most + 1))
        if not reads:
            left = min(left, int(self._between(2, 22)))
        colours = [c for c in drawing.contrasting(self.colours[:1]) if c != "grey"]
        order = [str(c) for c in self.rng.permutation(colours)]
        while left > 0 and order and len(self.signs) < 4:
            lines = self._text(left)
            if self._draw_sign(order[-1], lines):
                order.pop()
            left -= sum(len(line) for line in lines)

    def _text(self, most: int) -> tuple[tuple[str, ...], ...]:
        """The words of one sign, by line: a word, a number, a line or a note."""
        draw = self.rng.random()
        if draw < 0.15:
            return ((str(self.rng.integers(10, 10 ** int(self.rng.integers(2, 5)))),),)
        if most == 1 or draw < 0.4:
            shape = [1]
        elif most < 6 or draw < 0.6:
            shape = [int(self.rng.integers(2, min(4, most) + 1))]
        else:
            shape = [int(self.rng.integers(2, 5)) for _ in range(int(self.rng.integers(2, min(6, most // 3) + 1)))]
        words = self.rng.choice(self.materials.words, sum(shape), replace=False).tolist()
        style = self._pick(("lower", "capitalize", "upper"))
        styled = iter([getattr(word, style)() for word in words])
        return tuple(tuple(next(styled) for _ in range(length)) for length in shape)

    def _draw_sign(self, colour: str, lines: tuple[tuple[str, ...], ...]) -> bool:
        size = self._px(self.rng.uniform(self._between(26, 17), self._between(44, 24)))
        file = self._pick(f.file for f in self.materials.fonts if f.use == self.use)
        texts = [" ".join(line) for line in lines]
        padding, gap = self._px(5), self._px(GAP)
        for pixels in (size, self._px(17)):
            font = self.materials.font(file, pixels)
            width, height = drawing.sign_size(texts, font, padding)
            panel = self.panels[self.rng.integers(2)].box if self.panels else self._everywhere()
            place = self.room.find(self.rng, width + 2 * gap, height + 2 * gap, panel)
            if place:
                box = (place[0] + gap, place[1] + gap, place[2] - gap, place[3] - gap)
                drawing.sign(self.image, box, drawing.jitter(self.rng, colour), texts, font, padding)
                self.room.take(place)
                self.signs.append(Sign(colour, lines, box))
                return True
        return False

    def _groups(self) -> list[tuple[str, str | None]]:
        """Name and colour of every object to draw; equal ones make groups that can be counted."""
        low, high = round(self._between(1, 14)), round(self._between(3, MOST_OBJECTS))
        count = int(self.rng.integers(low, high + 1))
        if self.focus in ("size", "relation", "colour", "counting") and count < 2:
            count = 2
        chosen: list[tuple[str, str | None]] = []
        if self.focus == "naming_unseen":
            unseen = [thing.name for thing in self.things if not thing.known]
            chosen.append((self._pick(unseen), None))
        elif self.focus == "naming":
            chosen.append((self._new_thing(chosen), None))
        elif self.focus == "counting":
            kind = self._new(chosen)
            chosen += [kind] * int(self.rng.integers(1, min(12, count) + 1))
        elif self.focus == "colour":
            chosen.append((self._pick(SHAPES), self._shade()))
        elif self.focus == "comparison":
            name, colour = self._new(chosen, 0.7)
            chosen += [
                (name, colour and self._shade()) for _ in range(int(self.rng.integers(2, max(3, count * 2 // 3 + 1))))
            ]
        while len(chosen) < count:
            name, colour = self._new(chosen)
            repeats = int(self.rng.integers(1, 6)) if self.rng.random() < 0.35 and self.focus != "naming_unseen" else 1
            for _ in range(min(repeats, count - len(chosen))):
                chosen.append((name, colour))
                if colour and self.rng.random() < 0.4:
                    colour = self._shade()
        return chosen

    def _new(self, chosen: list[tuple[str, str | None]], shapes: float = 0.45) -> tuple[str, str | None]:
        if self.rng.random() < shapes:
            names = {name for name, _ in chosen}
            free = [s for s in SHAPES if not alike(self.materials, s, names)]
            if free:
                return self._pick(free), self._shade()
        return self._new_thing(chosen), None

    def _new_thing(self, chosen: list[tuple[str, str | None]]) -> str:
        names = {name for name, _ in chosen}
        while True:
            thing = self.things[self.rng.integers(len(self.things))]
            if thing.known and thing.name not in names and not alike(self.materials, thing.name, names):
                return thing.name

    def _shade(self) -> str:
        return self._pick(drawing.contrasting(self.colours))

    def _draw_framed(self, groups: list[tuple[str, str | None]]) -> None:
        """Put one to three of the objects into coloured boxes."""
        taken = {sign.colour for sign in self.signs}
        free = [c for c in drawing.contrasting(self.colours[:1]) if c not in taken and c not in ("white", "grey")]
        width = self._px(4)
        for colour in self.rng.permutation(free)[: int(self.rng.integers(1, 4))]:
            if not groups:
                return
            name, shade = groups[0 if not self.frames else int(self.rng.integers(len(groups)))]
            size = max(self._least(name), self._px(self.rng.uniform(self._between(60, 42), self._between(100, 60))))
            edge = size + 2 * self._px(7) + 2 * width
            place = self.room.find(self.rng, edge + 2 * self._px(GAP), edge + 2 * self._px(GAP), self._everywhere())
            if place is None:
                return
            gap = self._px(GAP)
            box = (place[0] + gap, place[1] + gap, place[2] - gap, place[3] - gap)
            drawing.frame(self.image, box, drawing.jitter(self.rng, str(colour)), width)
            self.frames.append(Frame(str(colour), box))
            self._draw(name, shade, size, box, frame=str(colour))
            self.room.take(place)
            groups.remove((name, shade))

    def _draw_groups(self, groups: list[tuple[str, str | None]]) -> None:
        middle = self._between(95, 36)
        for name, colour in groups:
            least, gap = self._least(name), self._px(GAP)
            size = self._px(middle * self.rng.uniform(0.65, 1.7))
            size = max(least, size if colour else min(size, self._px(LARGEST_PICTURE)))
            panel = self.panels[self.rng.integers(2)] if self.panels else None
            for pixels in dict.fromkeys((size, (size + least) // 2, least)):
                within = panel.box if panel else self._everywhere()
                place = self.room.find(self.rng, pixels + 2 * gap, pixels + 2 * gap, within)
                if place:
                    self._draw(name, colour, pixels, place, panel=panel.name if panel else None)
                    self.room.take(place)
                    break

    def _least(self, name: str) -> int:
        """The least longer side in pixels at which a person tells what it is."""
        thing = self.materials.things.get(name)
        if thing is None:
            return self._px(LEAST_SHAPE)
        if not thing.known:
            return self._px(LEAST_UNSEEN)
        first = self.focus in ("naming", "size") and not self.items
        return self._px(LEAST_NAMED if first else LEAST_PICTURE)

    def _draw(
        self, name: str, colour: str | None, size: int, within: Box, panel: str | None = None, frame: str | None = None
    ) -> None:
        thing = self.materials.things.get(name) if colour is None else None
        if colour is not None:
            picture = drawing.shape(self.rng, name, colour, size)
        else:
            assert thing is not None
            picture = drawing.posed(self.rng, self.materials.picture(self._pick(thing.files)), size)
        x = (within[0] + within[2] - picture.width) // 2
        y = (within[1] + within[3] - picture.height) // 2
        drawing.paste(self.image, picture, (x, y), self._px(2))
        box = (x, y, x + picture.width, y + picture.height)
        self.items.append(Item(name, colour, box, panel, frame, thing is None or thing.known))


def alike(materials: Materials, name: str, names: Iterable[str]) -> bool:
    """Whether a person might take a thing or shape for one of these, or call both the same.

    The same means that a name of one is a name of the other, or words of it: "cup" of a trophy and of a mug of coffee.
    """
    things = materials.things

    def listed(one: str, other: str) -> bool:
        return one in things and other in things[one].similar

    def called(one: str) -> list[set[str]]:
        return [set(said.split()) for said in (one, *(things[one].also if one in things else ()))]

    mine = called(name)
    return any(
        name != other
        and (listed(name, other) or listed(other, name) or any(a <= b or b <= a for a in mine for b in called(other)))
        for other in names
    )
