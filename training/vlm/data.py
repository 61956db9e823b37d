"""What the model is trained on: images with many questions each, composed when they are needed.

An example depends on the seed and its number alone, whichever worker makes it, so a resumed run goes on with the very
examples it would have seen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from scenes import KINDS, Materials, Question, Scene, compose, questions
from scenes.drawing import COLOURS, SHAPES
from scenes.photos import NAMING, PRESENCE
from scenes.questions import WORDS, article, choose
from training.vlm.base import CHAT_TEMPLATE, GRID, IMAGE, PATCH, SIDE

TRAINED_KINDS = (*(kind for kind in KINDS if kind != "naming_unseen"), "caption", "photo", "talk")
"""What losses and accuracies are told apart by. ``photo`` is all about photos, ``talk`` is text without an image."""

ROOM = 248
"""Tokens of questions and answers behind an image. With the 600 ahead of them a multiple of 16, as kernels like it."""

PHOTO_SHARE = 0.1
CAPTION_SHARE = 0.3
TALK_LENGTH = 192
BACKGROUND = "background"

PHOTO_NAMINGS = (NAMING, f"What does this photo show? {WORDS}", f"What is the main object in this image? {WORDS}")
PHOTO_DESCRIPTIONS = ("Describe this photo in one sentence.", "Describe the photo.", "Write a caption for this photo.")


@dataclass(frozen=True)
class Asked:
    """A question and how it is to be answered."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Example:
    """An image with its questions, and what is known of each place of its grid (-100: nothing).

    Attributes:
        pixels: uint8 [side, side, 3].
        names: [grid * grid], the first token of the name of what is there, or of the word that is written there.
        colours: [grid * grid], the token of its colour.
    """

    pixels: np.ndarray
    asked: tuple[Asked, ...]
    names: np.ndarray
    colours: np.ndarray


class Chat:
    """Questions and answers as tokens, in exactly the words that the chat template puts around them.

    Attributes:
        prefix: what stands ahead of every question about one image, with all placeholders of the image.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_tokens: int = GRID * GRID) -> None:
        self.tokenizer = tokenizer
        asked, answered = "\x01", "\x02"
        content = [{"type": "image"}, {"type": "text", "text": asked}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}, {"role": "assistant", "content": answered}],
            chat_template=CHAT_TEMPLATE,
            tokenize=False,
        )
        before, rest = text.split(asked)
        self._between, after = rest.split(answered)
        self._end = after.rstrip("\n")  # what follows the end of an answer is nothing to learn
        self.prefix = self.tokens(before.replace(IMAGE, IMAGE * image_tokens))

    def tokens(self, text: str) -> list[int]:
        """Ids of a text, special tokens in it included."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def turn(self, question: str, answer: str) -> tuple[list[int], int]:
        """What follows the prefix, and how many tokens of it are the question: the others are to be learned."""
        question_ids = self.tokens(question + self._between)
        return question_ids + self.tokens(answer + self._end), len(question_ids)

    def talk(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """A turn without an image, whole."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], chat_template=CHAT_TEMPLATE, tokenize=False,
            add_generation_prompt=True,
        )  # fmt: skip
        ids = self.tokens(text)
        return ids + self.tokens(answer + self._end), len(ids)


class Examples:
    """Composed scenes and photos by number."""

    def __init__(self, materials: Materials, chat: Chat, seed: int = 0) -> None:
        self.materials, self.chat, self.seed = materials, chat, seed
        self._first: dict[str, int] = {}

    def __getitem__(self, number: int) -> Example:
        rng = np.random.default_rng((self.seed, number, 7))
        if self.materials.photos and rng.random() < PHOTO_SHARE:
            return self._photo(rng)
        focus = TRAINED_KINDS[rng.integers(len(TRAINED_KINDS) - 3)] if rng.random() < 0.9 else None
        scene = compose(self.materials, self.seed, number, float(rng.random()), use="training", focus=focus, side=SIDE)
        names, colours = self.places(scene)
        return Example(np.asarray(scene.image), tuple(self._asked(scene, focus, rng)), names, colours)

    def _asked(self, scene: Scene, focus: str | None, rng: np.random.Generator) -> list[Asked]:
        """One question of each kind in turn, until the room is full; what the scene is made for comes first."""
        options = {}
        for kind in TRAINED_KINDS[:-2]:
            asks = kind != "caption" or rng.random() < CAPTION_SHARE
            if asks and (possible := questions(scene, self.materials, kind, rng)):
                options[kind] = possible
        order = [str(kind) for kind in rng.permutation(sorted(options))]
        order.sort(key=lambda kind: kind != focus)
        asked, room = [], ROOM
        while options:
            for kind in [kind for kind in order if kind in options]:
                chosen: Question = choose(options[kind], rng)
                options[kind] = [other for other in options[kind] if other.query != chosen.query]
                if not options[kind]:
                    del options[kind]
                turn = Asked(kind, chosen.text, chosen.answers[0])
                length = len(self.chat.turn(turn.question, turn.answer)[0])
                if length > room:
                    return asked
                asked.append(turn)
                room -= length
        return asked

    def _photo(self, rng: np.random.Generator) -> Example:
        photo = self.materials.photos[rng.integers(len(self.materials.photos))]
        image = _varied(self.materials.picture(photo.file).convert("RGB"), rng)
        asked = [Asked("photo", PHOTO_NAMINGS[rng.integers(len(PHOTO_NAMINGS))], photo.name)]
        presence = [(photo.name, "yes")]
        if photo.unlike:
            presence.append((photo.unlike[rng.integers(len(photo.unlike))], "no"))
        for name, answer in presence:
            thing = self.materials.things.get(name)
            asked.append(Asked("photo", PRESENCE.format(article(name, thing is None or bool(thing.plural))), answer))
        if photo.description:
            asked.append(Asked("photo", PHOTO_DESCRIPTIONS[rng.integers(len(PHOTO_DESCRIPTIONS))], photo.description))
        unknown = np.full(GRID * GRID, -100)
        return Example(np.asarray(image), tuple(asked), unknown, unknown)

    def first_token(self, name: str) -> int:
        """The first token of a name within a sentence."""
        if name not in self._first:
            space, ids = self.chat.tokens(" "), self.chat.tokens(f" {name}")
            self._first[name] = ids[ids[:1] == space]  # the space before a digit is a token by itself
        return self._first[name]

    def known_tokens(self) -> list[int]:
        """First tokens of all names, which a place is told apart from whether or not they are in the batch."""
        return sorted({self.first_token(name) for name in (*self.materials.things, *SHAPES, BACKGROUND)})

    def colour_tokens(self) -> list[int]:
        """Tokens of all colours, in the order of ``COLOURS``."""
        return [self.first_token(colour) for colour in COLOURS]

    def places(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """What lies at each place: background, then frames left open, things, and the words of signs."""
        names = np.full((GRID, GRID), self.first_token(BACKGROUND))
        colours = np.full((GRID, GRID), -100)
        if scene.background_colour:
            colours[:] = self.first_token(scene.background_colour)
        for frame in scene.frames:
            names[_cells(frame.box)] = colours[_cells(frame.box)] = -100
        for item in scene.items:
            # Only the middle of a box is surely covered by what it holds.
            names[_cells(item.box)] = colours[_cells(item.box)] = -100
            names[_cells(item.box, 0.2)] = self.first_token(item.name)
            if item.colour:
                colours[_cells(item.box, 0.2)] = self.first_token(item.colour)
        for sign in scene.signs:
            names[_cells(sign.box)] = -100
            colours[_cells(sign.box)] = self.first_token(sign.colour)
            left, top, right, bottom = sign.box
            longest, height = max(len(" ".join(line)) for line in sign.lines), (bottom - top) / len(sign.lines)
            for number, line in enumerate(sign.lines):
                at = 0
                for word in line:  # letters are taken to be equally wide
                    ends = (left + (right - left) * part / longest for part in (at, at + len(word)))
                    begin, end = (round(part) for part in ends)
                    box = (begin, round(top + number * height), end, round(top + (number + 1) * height))
                    names[_cells(box)] = self.first_token(word)
                    at += len(word) + 1
        return names.ravel(), colours.ravel()


def _cells(box: tuple[int, int, int, int], margin: float = 0.0) -> tuple[slice, slice]:
    """The places whose centres lie in a box, less a part of it at each side, and at least the one in its middle."""
    spans = []
    for low, high in ((box[1], box[3]), (box[0], box[2])):
        inner = margin * (high - low)
        begin = int(np.ceil((low + inner) / PATCH - 0.5))
        end = int(np.ceil((high - inner) / PATCH - 0.5))
        middle = min(GRID - 1, int((low + high) / 2 / PATCH))
        spans.append(slice(begin, end) if end > begin else slice(middle, middle + 1))
    return spans[0], spans[1]


def _varied(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A large part of a photo, mirrored half of the time, a little lighter or darker, squashed to the side."""
    width, height = (round(length * rng.uniform(0.7, 1)) for length in photo.size)
    left, top = (int(rng.integers(whole - part + 1)) for whole, part in zip(photo.size, (width, height), strict=True))
    box = (left, top, left + width, top + height)
    image = photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageEnhance.Brightness(image).enhance(rng.uniform(0.8, 1.2))


@dataclass(frozen=True)
class Batch:
    """One step's examples. Letters: B images, S room behind each, T tokens to be learned, R rows of talk.

    Attributes:
        pixels: uint8 [B, side, side, 3].
        ids: [B, S], questions and answers one after the other.
        places: [B, S], how far each token stands behind the prefix when its question is asked alone.
        turns: [B, S], which question it belongs to; 0 is padding.
        where: [T], places of ``ids.ravel()`` from which the next token is to be foretold.
        targets: [T], that token.
        weights: [T]; a question's sum is the root of its answer's length, so that captions do not drown words.
        kinds: [T], numbers in ``TRAINED_KINDS``.
        candidates: [C], tokens that places are told apart by.
        names: [B, places], numbers in ``candidates`` or -100.
        colours: [B, places], numbers in ``COLOURS`` or -100.
        talk_ids, talk_where, talk_targets: the same for text without images, [R, length] and [T'].
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    places: torch.Tensor
    turns: torch.Tensor
    where: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    kinds: torch.Tensor
    candidates: torch.Tensor
    names: torch.Tensor
    colours: torch.Tensor
    talk_ids: torch.Tensor
    talk_where: torch.Tensor
    talk_targets: torch.Tensor

    def __reduce__(self) -> tuple:
        """Travel from a worker as plain arrays, through a pipe: shared memory may be small in a container."""
        return _unpacked, ({name: value.numpy() for name, value in vars(self).items()},)

    def pin_memory(self) -> Batch:
        """Called by the loader's own thread: the copy to the accelerator then overlaps with computing."""
        return Batch(**{name: value.pin_memory() for name, value in vars(self).items()})

    def to(self, device: torch.device) -> Batch:
        """All of it on a device."""
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def _unpacked(arrays: dict[str, np.ndarray]) -> Batch:
    return Batch(**{name: torch.from_numpy(value) for name, value in arrays.items()})


def pack(
    examples: Sequence[Example], talks: Sequence[tuple[str, str]], chat: Chat, known: Sequence[int],
    colour_tokens: Sequence[int], room: int = ROOM,
) -> Batch:  # fmt: skip
    """Put every image's questions behind it, each blind to the others, and pad to equal lengths."""
    end = chat.tokenizer.pad_token_id
    ids = np.full((len(examples), room), end)
    places, turns = np.zeros_like(ids), np.zeros_like(ids)
    where: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    kinds: list[int] = []
    for row, example in enumerate(examples):
        at = 0
        for number, asked in enumerate(example.asked, 1):
            tokens, known_part = chat.turn(asked.question, asked.answer)
            learned = len(tokens) - known_part
            if at + len(tokens) > room:
                break
            ids[row, at : at + len(tokens)] = tokens
            places[row, at : at + len(tokens)] = range(len(tokens))
            turns[row, at : at + len(tokens)] = number
            where += range(row * room + at + known_part - 1, row * room + at + len(tokens) - 1)
            targets += tokens[known_part:]
            weights += [learned**-0.5] * learned
            kinds += [TRAINED_KINDS.index(asked.kind)] * learned
            at += len(tokens)
    names = np.stack([example.names for example in examples])
    candidates = np.unique(np.concatenate([names[names >= 0], np.asarray(known)]))
    index = np.where(names >= 0, np.searchsorted(candidates, names), -100)
    shades = np.stack([example.colours for example in examples])
    numbers = {token: number for number, token in enumerate(colour_tokens)} | {-100: -100}
    talk_ids = np.full((len(talks), TALK_LENGTH), end)
    talk_where: list[int] = []
    talk_targets: list[int] = []
    for row, (prompt, answer) in enumerate(talks):
        tokens, known_part = chat.talk(prompt, answer)
        tokens = tokens[:TALK_LENGTH]
        talk_ids[row, : len(tokens)] = tokens
        talk_where += range(row * TALK_LENGTH + known_part - 1, row * TALK_LENGTH + len(tokens) - 1)
        talk_targets += tokens[known_part:]
    return Batch(
        pixels=torch.from_numpy(np.stack([example.pixels for example in examples])),
        ids=torch.from_numpy(ids),
        places=torch.from_numpy(places),
        turns=torch.from_numpy(turns),
        where=torch.tensor(where, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        weights=torch.tensor(weights),
        kinds=torch.tensor(kinds, dtype=torch.long),
        candidates=torch.from_numpy(candidates),
        names=torch.from_numpy(index),
        colours=torch.from_numpy(np.vectorize(numbers.__getitem__)(shades)),
        talk_ids=torch.from_numpy(talk_ids),
        talk_where=torch.tensor(talk_where, dtype=torch.long),
        talk_targets=torch.tensor(talk_targets, dtype=torch.long),
    )


class Batches(Dataset):
    """Batches by the number of the step; what a loader's workers make.

    Args:
        first: the step that a run begins with.
        steps: how many there may be; a loader needs to know, a run stops when its time is over.
    """

    def __init__(
        self, examples: Examples, talks: Sequence[tuple[str, str]], batch: int, first: int = 0, steps: int = 10**6
    ) -> None:
        self.examples, self.talks, self.batch, self.first, self.steps = examples, talks, batch, first, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, number: int) -> Batch:
        step = self.first + number
        rng = np.random.default_rng((self.examples.seed, step, 8))
        rows = max(1, self.batch // 8) if self.talks else 0
        return pack(
            [self.examples[step * self.batch + row] for row in range(self.batch)],
            [self.talks[k] for k in rng.integers(len(self.talks), size=rows)] if rows else [],
            self.examples.chat,
            self.examples.known_tokens(),
            self.examples.colour_tokens(),
        )


def read_talks(path: Path) -> list[tuple[str, str]]:
    """Prompts and the language model's own answers, as ``talk.py`` wrote them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(row["prompt"], row["answer"]) for row in map(json.loads, lines)]
