"""Several questions behind one image, in one sequence, none seeing another.

    <user> image*256 | question <assistant> answer </s> | question <assistant> answer </s> | ...

Each question's positions begin right after the image and its mask hides the other questions, so
every one trains exactly as it will be asked: alone.
"""

from dataclasses import dataclass

import numpy as np
import torch

from training.features import TOKENS, Example
from training.questions import LEADS, Question, questions
from training.scenes import GRID
from training.tokenizer import ASSISTANT, END, USER, build_tokenizer
from training.vocabulary import BACKGROUND, COLOURS, names

PREFIX = 1 + TOKENS
IGNORE = -100
KIND_ODDS = {
    "naming": 0.8, "counting": 1.3, "colour": 1.8, "where": 1.6, "yesno": 1.5, "photo": 1.5,
    "list": 0.8,
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """What one step needs; T is the packed length behind the prefix.

    features [B, tokens, channels] · ids [B, T] · positions [B, T] · mask [B, 1, PREFIX + T,
    PREFIX + T], true where attention is allowed · targets [B, T], the token that comes next or
    IGNORE · dense: four [B, tokens] index tensors, see ``DenseWords``.
    """

    features: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    dense: dict[str, torch.Tensor]


class DenseWords:
    """The words that each image token is taught to predict at its own place.

    Four independent choices: what is here, in which colour, in which column and row.
    """

    def __init__(self) -> None:
        tokenizer = build_tokenizer()

        def first(word: str) -> int:
            return int(tokenizer(word, add_special_tokens=False).input_ids[0])

        choices = {
            "name": [*names(), BACKGROUND],
            "colour": list(COLOURS),
            "column": ["left", "centre", "right"],
            "row": ["top", "middle", "bottom"],
        }
        ids = {key: [first(word) for word in choice] for key, choice in choices.items()}
        self.unique = {key: torch.tensor(sorted(set(value))) for key, value in ids.items()}
        """For each choice, the token ids to choose from (names may share their first word)."""
        self._index = {
            key: {word: sorted(set(ids[key])).index(token) for word, token in zip(choice, ids[key], strict=True)}
            for key, choice in choices.items()
        }
        thirds = np.array([0] * 6 + [1] * 4 + [2] * 6)
        columns = [choices["column"][k] for k in np.tile(thirds, GRID)]
        rows = [choices["row"][k] for k in np.repeat(thirds, GRID)]
        self._column, self._row = self._look_up("column", columns), self._look_up("row", rows)

    def targets(self, example: Example) -> dict[str, torch.Tensor]:
        """For each choice, [tokens] indices into ``unique``."""
        return {
            "name": self._look_up("name", example.names),
            "colour": self._look_up("colour", example.colours),
            "column": self._column,
            "row": self._row,
        }

    def _look_up(self, key: str, words: list[str]) -> torch.Tensor:
        index = self._index[key]
        return torch.tensor([index.get(word, IGNORE) for word in words])


def ask(question: Question, rng: np.random.Generator) -> str:
    """A question as a person might type it: maybe polite, maybe noisy, maybe without its mark."""
    text = question.text(rng)
    if rng.random() < 0.3:
        text = LEADS[rng.integers(len(LEADS))] + text
    if rng.random() < 0.08:  # words it has never seen must not throw it off
        letters = "abcdefghijklmnopqrstuvwxyz"
        noise = "".join(letters[k] for k in rng.integers(0, 26, rng.integers(2, 6)))
        parts = text.split(" ")
        parts.insert(int(rng.integers(len(parts) + 1)), noise)
        text = " ".join(parts)
    return text + ("?" if rng.random() < 0.7 else "." if rng.random() < 0.1 else "")


def choose(possible: list[Question], count: int, rng: np.random.Generator) -> list[Question]:
    """Draw questions, some maybe twice: kinds as KIND_ODDS says, the answer "1" not too often.

    Most scenes have many names to ask for and one colour: without the balance, colours and places
    would hardly be practised.
    """
    common = np.array([0.35 if question.answer in ("0", "1") else 1.0 for question in possible])
    kinds = np.array([question.kind for question in possible])
    odds = np.zeros(len(possible))
    for kind in set(kinds):
        share = np.where(kinds == kind, common, 0.0)
        odds += KIND_ODDS[kind] * share / share.sum()
    return [possible[k] for k in rng.choice(len(possible), count, p=odds / odds.sum())]


def pack(examples: list[Example], dense: DenseWords, count: int, rng: np.random.Generator) -> Batch:
    """``count`` fresh questions behind each example."""
    rows = [_row(choose(questions(e.facts, rng), count, rng), rng) for e in examples]
    length = max(len(row[0]) for row in rows)
    shape = (len(rows), length)
    ids, owner = np.zeros(shape, np.int64), np.full(shape, -1)
    positions, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE)
    for k, row in enumerate(rows):
        n = len(row[0])
        ids[k, :n], owner[k, :n], positions[k, :n], targets[k, :n] = row
    features = torch.from_numpy(np.stack([e.features for e in examples])).float()
    stacks = [dense.targets(e) for e in examples]
    return Batch(
        features,
        torch.from_numpy(ids),
        torch.from_numpy(positions + PREFIX),
        _mask(torch.from_numpy(owner)),
        torch.from_numpy(targets),
        {key: torch.stack([s[key] for s in stacks]) for key in stacks[0]},
    )


def _row(chosen: list[Question], rng: np.random.Generator) -> tuple[list[int], ...]:
    """Ids, owning question, position behind the image and target of every token."""
    tokenizer = build_tokenizer()
    ids: list[int] = []
    owner: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for number, question in enumerate(chosen):
        asked = tokenizer(ask(question, rng) + ASSISTANT, add_special_tokens=False).input_ids
        answer = tokenizer(question.answer + END, add_special_tokens=False).input_ids
        ids += asked + answer[:-1]
        length = len(asked) + len(answer) - 1
        owner += [number] * length
        positions += range(length)
        targets += [IGNORE] * (len(asked) - 1) + answer
    return ids, owner, positions, targets


def _mask(owner: torch.Tensor) -> torch.Tensor:
    """Causal, and blind to other questions; padding (owner -1) sees what padding may see."""
    batch, length = owner.shape
    total = PREFIX + length
    mask = torch.ones(total, total, dtype=torch.bool).tril().repeat(batch, 1, 1)
    mask[:, PREFIX:, PREFIX:] &= owner[:, :, None] == owner[:, None, :]
    return mask[:, None]


def prefix_id() -> int:
    """The token in front of the image."""
    return int(build_tokenizer().convert_tokens_to_ids(USER))
