"""Every question a scene can answer exactly, in several phrasings."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from training.scenes import Facts, Item
from training.vocabulary import COLOURS, PLACES, names, plural

KINDS = ("naming", "counting", "colour", "where", "yesno", "photo", "list")

PHRASINGS: dict[str, tuple[str, ...]] = {
    "what": ("what is this", "what's this", "what is it", "what is in the picture",
             "what is in this image", "what is shown here", "what can you see", "name this",
             "what object is this", "what does the picture show", "what do you see here",
             "which object is this"),
    "list": ("what do you see", "what is in the picture", "what is in the image",
             "describe the image", "describe this picture", "what things are here",
             "what objects are in the picture", "list the objects", "what can you see",
             "what is this"),
    "what at": ("what is {at}", "what's {at}", "what is there {at}", "what do you see {at}",
                "which object is {at}", "name the object {at}", "what object is {at}",
                "what is shown {at}", "what can you see {at}"),
    "all": ("how many objects are there", "how many things are there",
            "how many objects do you see", "how many things can you see", "count the objects",
            "how many objects are in the picture", "how many items are there",
            "how many things are in the image"),
    "count": ("how many {many} are there", "how many {many} do you see", "count the {many}",
              "how many {many} can you see", "how many {many} are in the picture",
              "what is the number of {many}", "how many {many} are in this image",
              "number of {many}"),
    "colour of": ("what colour is the {one}", "what color is the {one}",
                  "which colour is the {one}", "which color is the {one}",
                  "what is the colour of the {one}", "what is the color of the {one}",
                  "what colour does the {one} have", "the {one} is which colour",
                  "tell me the colour of the {one}"),
    "background": ("what colour is the background", "what color is the background",
                   "which colour is the background", "what is the background colour",
                   "what is the colour of the background", "which colour does the background have",
                   "what is the background color"),
    "where": ("where is the {one}", "where's the {one}", "where is the {one} in the picture",
              "in which part of the picture is the {one}", "where do you see the {one}",
              "where can you see the {one}", "what is the position of the {one}",
              "at which place is the {one}"),
    "is there": ("is there a {one}", "is there a {one} in the picture", "do you see a {one}",
                 "can you see a {one}", "does the picture show a {one}",
                 "is a {one} in the image", "is there any {one}", "does this contain a {one}"),
}  # fmt: skip
"""Phrasings to train on. Question marks, politeness and noise are added on top."""

UNSEEN: dict[str, tuple[str, ...]] = {
    "what": ("what kind of thing is this", "so what is that"),
    "list": ("what does this image contain", "tell me what is here"),
    "what at": ("which thing is {at}", "tell me what is {at}"),
    "all": ("how many objects are shown here", "what is the number of things"),
    "count": ("how many {many} are shown", "how many {many} does the picture show"),
    "colour of": ("the {one} has which colour", "tell me what colour the {one} is"),
    "background": ("tell me the colour of the background", "which color does the background have"),
    "where": ("in the picture, where is the {one}", "tell me where the {one} is"),
    "is there": ("does the image contain a {one}", "is a {one} there"),
}
"""Phrasings that training never shows."""

LEADS = ("", "", "", "", "", "", "", "", "please, ", "hey, ", "tell me: ", "can you say ", "now, ",
         "look: ")  # fmt: skip

PLACED_AT: dict[str, tuple[str, ...]] = {
    place: (f"in the {place}", f"at the {place}", f"on the {place}", f"{place}") for place in PLACES
}
PLACED_AT["centre"] = ("in the centre", "in the middle", "in the center", "at the centre")
for _side in ("left", "right"):
    PLACED_AT[_side] = (f"on the {_side}", f"to the {_side}", f"at the {_side}")
    PLACED_AT[_side] += (f"on the {_side} side",)
for _corner in ("top left", "top right", "bottom left", "bottom right"):
    PLACED_AT[_corner] += (f"in the {_corner} corner", f"on the {_corner}")


@dataclass(frozen=True)
class Question:
    """A question of a kind, its phrasing (a key of PHRASINGS) with what fills it, its answer."""

    kind: str
    phrasing: str
    fill: dict[str, str]
    answer: str

    def text(self, rng: np.random.Generator, unseen: bool = False) -> str:
        """One way to ask it."""
        options = (UNSEEN if unseen else PHRASINGS)[self.phrasing]
        fill = dict(self.fill)
        if "place" in fill:
            at = PLACED_AT[fill["place"]]
            fill["at"] = at[rng.integers(len(at))]
        text = options[rng.integers(len(options))]
        if fill.get("one", "")[:1] in tuple("aeiou"):
            text = text.replace("a {one}", "an {one}")
        return text.format(**fill)


def questions(facts: Facts, rng: np.random.Generator) -> list[Question]:
    """All questions about a scene; those about absent things are drawn with ``rng``."""
    asked = list(_about_photo(facts)) if facts.photo else list(_about_items(facts, rng))
    return asked + list(_presence(facts, rng))


def _about_photo(facts: Facts) -> Iterator[Question]:
    assert facts.photo is not None
    yield Question("photo", "what", {}, facts.photo)


def _about_items(facts: Facts, rng: np.random.Generator) -> Iterator[Question]:
    items = facts.items
    count = Counter(item.name for item in items)
    if len(items) == 1:
        yield Question("naming", "what", {}, items[0].name)
    elif len(items) <= 3 and max(count.values()) == 1:
        yield Question("list", "list", {}, _enumerate(items))
    for place in PLACES:
        here = [item for item in items if _is_at(item, place)]
        if len(here) == 1 and len(items) > 1:
            yield Question("naming", "what at", {"place": place}, here[0].name)
    yield Question("counting", "all", {}, str(len(items)))
    for name, times in count.items():
        yield Question("counting", "count", {"many": plural(name)}, str(times))
    if rng.random() < 0.3:
        yield Question("counting", "count", {"many": plural(_absent(facts, rng))}, "0")
    for item in items:
        if count[item.name] > 1:
            continue
        if item.colour:
            yield Question("colour", "colour of", {"one": item.name}, item.colour)
        place = PLACES[3 * item.row + item.column]
        yield Question("where", "where", {"one": item.name}, place)
    if len(items) == 1 and items[0].colour:
        yield Question("colour", "colour of", {"one": "object"}, items[0].colour)
    if facts.background:
        yield Question("colour", "background", {}, facts.background)


def _presence(facts: Facts, rng: np.random.Generator) -> Iterator[Question]:
    """As many yes as no, with and without a colour."""
    present = facts.photo or (facts.items[rng.integers(len(facts.items))].name if facts.items else None)
    if present:
        yield Question("yesno", "is there", {"one": present}, "yes")
        yield Question("yesno", "is there", {"one": _absent(facts, rng)}, "no")
    coloured = [item for item in facts.items if item.colour]
    if coloured:
        item = coloured[rng.integers(len(coloured))]
        yield Question("yesno", "is there", {"one": f"{item.colour} {item.name}"}, "yes")
        taken = {other.colour for other in coloured if other.name == item.name}
        free = [colour for colour in COLOURS if colour not in taken]
        other = free[rng.integers(len(free))]
        yield Question("yesno", "is there", {"one": f"{other} {item.name}"}, "no")


def _absent(facts: Facts, rng: np.random.Generator) -> str:
    known = names()
    taken = {item.name for item in facts.items} | {facts.photo}
    while (name := known[rng.integers(len(known))]) in taken:
        pass
    return name


def _is_at(item: Item, place: str) -> bool:
    words = place.split()
    if words == ["centre"]:
        return item.row == 1 and item.column == 1
    rows, columns = {"top": 0, "bottom": 2}, {"left": 0, "right": 2}
    return all(rows.get(w, item.row) == item.row and columns.get(w, item.column) == item.column
               for w in words)  # fmt: skip


def _enumerate(items: tuple[Item, ...]) -> str:
    ordered = [item.name for item in sorted(items, key=lambda item: (item.row, item.column))]
    return " and ".join([", ".join(ordered[:-1]), ordered[-1]])
