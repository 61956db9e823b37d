"""A task of the user: a folder of images and `questions.jsonl` beside them.

One JSON object per line::

    {"image": "street.jpg", "question": "How many cars are there?", "answer": "3", "kind": "counting"}
    {"images": ["a.png", "b.png"], "question": "Which is newer?", "answers": ["b", "the second"], "kind": "two"}

`kind` (accuracy is computed for each; by default the folder's name) and `score` (the rule, see `RULES`; by default
`exact`) may be left out. Questions of one kind are scored by one rule. `measures` of the images' complexity, numbers by
name (`{"objects": 5}`), are added to `bytes` and `pixels`, which are counted here.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dymu.errors import BadPrompt
from dymu.evaluation.tasks import scoring
from dymu.evaluation.tasks.task import Example
from dymu.files import expanded, first_line
from dymu.media.images import load

QUESTIONS = "questions.jsonl"

RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": scoring.exact,
    "vqa": scoring.vqa,
    "relaxed": scoring.relaxed,
    "anls": scoring.anls,
    "yes_no": scoring.yes_no,
}


@dataclass(frozen=True)
class _Asked:
    """One line of the file."""

    images: tuple[str, ...]
    question: str
    references: tuple[str, ...]
    kind: str
    score: str
    measures: dict[str, float]


class Folder:
    """The questions of a folder, in turn one of each kind.

    Args:
        folder: holds `questions.jsonl` and the images that it names.
        max_new_tokens: of an answer, at most.

    Raises:
        BadPrompt: the file is missing, or which line of it cannot be used and why.
    """

    def __init__(self, folder: str | Path, max_new_tokens: int = 32) -> None:
        self.folder, self.max_new_tokens = (folder := expanded(folder)), max_new_tokens
        self.name = folder.resolve().name
        path = folder / QUESTIONS
        if not _is_file(path):
            raise BadPrompt(
                f"{folder} holds no {QUESTIONS}, which has a question and its answer on each line: write one."
            )
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise BadPrompt(f"{path} is not text in UTF-8: save it so.") from error
        except OSError as error:
            raise BadPrompt(f"{path} cannot be read ({first_line(error)}): check it.") from error
        asked = [
            _read(line, f"{path}, line {number}", self.name) for number, line in enumerate(lines, 1) if line.strip()
        ]
        if not asked:
            raise BadPrompt(f"{path} is empty: write a question and its answer on each line.")
        for question in asked:
            for image in question.images:
                if not _is_file(folder / image):
                    raise BadPrompt(f"{path} names {image!r}, which is not in {folder}: put it there.")
        self._rules: dict[str, str] = {}
        for question in asked:
            if self._rules.setdefault(question.kind, question.score) != question.score:
                raise BadPrompt(
                    f"{path} scores the kind {question.kind!r} by {self._rules[question.kind]} and by "
                    f"{question.score}: give questions of another score another kind."
                )
        self._asked = list(_by_turns(asked))
        self.yes_no = tuple(kind for kind, rule in self._rules.items() if rule == "yes_no")

    def __len__(self) -> int:
        return len(self._asked)

    def __getitem__(self, index: int) -> Example:
        asked = self._asked[index]
        paths = [self.folder / image for image in asked.images]
        images = tuple(load(path).image for path in paths)
        measures = {
            **asked.measures,
            "bytes": float(sum(path.stat().st_size for path in paths)),
            "pixels": float(sum(image.width * image.height for image in images)),
        }
        return Example(images, asked.question, asked.references, asked.kind, measures)

    def score(self, example: Example, answer: str) -> float:
        return RULES[self._rules[example.kind]](answer, example.references)

    def describe(self) -> dict[str, object]:
        digest = hashlib.sha256((self.folder / QUESTIONS).read_bytes())
        for image in dict.fromkeys(image for asked in self._asked for image in asked.images):
            digest.update((self.folder / image).read_bytes())
        return {"questions and images": digest.hexdigest()[:16]}


def _read(line: str, where: str, folder: str) -> _Asked:
    try:
        data: dict[str, Any] = json.loads(line)
        images = data["images"] if "images" in data else [data["image"]]
        answers = data["answers"] if "answers" in data else [data["answer"]]
        question, kind, rule = data["question"], data.get("kind", folder), data.get("score", "exact")
        measures = data.get("measures", {})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadPrompt(f'{where} is no object with "image", "question" and "answer" ({error}): mend it.') from error
    if not isinstance(images, list) or not isinstance(answers, list):
        raise BadPrompt(f'{where} has "images" or "answers" that are no [list]; one alone is an "image" or "answer".')
    if not answers or not all(isinstance(text, str) for text in (*images, *answers, question, kind, rule)):
        raise BadPrompt(f"{where} holds something other than text, or no answer: mend it.")
    if not isinstance(measures, dict) or not all(map(_is_number, measures.values())):
        raise BadPrompt(f'{where} has "measures" that are no object of numbers, like {{"objects": 5}}: mend them.')
    if rule not in RULES:
        raise BadPrompt(f"{where} asks for the unknown score {rule!r}: take one of {', '.join(RULES)}.")
    if rule == "vqa" and len(answers) < scoring.VQA_PEOPLE:
        raise BadPrompt(
            f"{where} scores {len(answers)} answers by vqa, which weighs those of ten people and needs at least "
            f"{scoring.VQA_PEOPLE}: score it by exact, which takes any of them."
        )
    if kind in ("", "all"):
        why = "which stands for all kinds together" if kind else "which is no name"
        raise BadPrompt(f'{where} is of the kind "{kind}", {why}: name it otherwise.')
    measures = {name: float(value) for name, value in measures.items()}
    return _Asked(tuple(images), question, tuple(answers), kind, rule, measures)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, a zero byte, half of a character
        return False


def _is_number(value: object) -> bool:
    # An integer in JSON may be larger than any float.
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max  # type: ignore[operator]


def _by_turns(asked: Sequence[_Asked]) -> Iterator[_Asked]:
    """One of each kind, then the next of each."""
    kinds = defaultdict(list)
    for question in asked:
        kinds[question.kind].append(question)
    for turn in zip_longest(*kinds.values()):
        yield from (question for question in turn if question is not None)
