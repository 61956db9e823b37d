"""The field's own rules for when an answer is right. Each takes an answer and its references and returns 0 to 1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

ARTICLES = {"a", "an", "the"}
NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
RELAXED = 0.05
ANLS_FLOOR = 0.5
VQA_PEOPLE = 4


def normalised(answer: str) -> str:
    """An answer as the VQA evaluation compares it: lower case, without articles and punctuation, numbers as digits.

    `:`, `%`, `$` and a full stop ahead of a digit stay, 1,000 becomes 1000, and an answer of articles alone stays as it
    is: "A" may be a choice.
    """
    text = answer.strip().lower()
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<=\w)['’](?=\w)", "", text)
    text = re.sub(r"[^\w\s:%$.]|_|\.(?!\d)", " ", text)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join([word for word in words if word not in ARTICLES] or words)


def exact(answer: str, references: Sequence[str]) -> float:
    """Whether the normalised answer equals any normalised reference."""
    return float(normalised(answer) in {normalised(reference) for reference in references})


def vqa(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy (arXiv 1505.00468): right when three of ten people said so, averaged over leaving each one out.

    Of fewer than `VQA_PEOPLE` references no answer can reach 1.
    """
    counts = Counter(normalised(reference) for reference in references)
    mine = counts[normalised(answer)]
    others, total = len(references) - mine, len(references)
    return (mine * min(1.0, (mine - 1) / 3) + others * min(1.0, mine / 3)) / total


def relaxed(answer: str, references: Sequence[str]) -> float:
    """Numbers within 5 % are right, anything else must be equal but for case (ChartQA, arXiv 2203.10244)."""
    return max(_relaxed(answer, reference) for reference in references)


def _relaxed(answer: str, reference: str) -> float:
    given, wanted = _number(answer), _number(reference)
    if given is None or wanted is None:
        return float(_plain(answer) == _plain(reference))
    return float(given == wanted if wanted == 0 else abs(given - wanted) <= RELAXED * abs(wanted))


def _number(text: str) -> float | None:
    text = _plain(text).replace(",", "")
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity (arXiv 1905.13648): 1 - edits / length, 0 up to 0.5."""
    return max(_similarity(" ".join(answer.lower().split()), " ".join(r.lower().split())) for r in references)


def _similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    similarity = 1.0 if longest == 0 else 1 - edits(a, b) / longest
    return similarity if similarity > ANLS_FLOOR else 0.0


def edits(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements from a to b."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (letter != other))
    return row[-1]


def yes_or_no(answer: str) -> str | None:
    """`yes` or `no`, whichever the answer begins with; None for neither."""
    words = normalised(answer).split()
    return words[0] if words and words[0] in ("yes", "no") else None


def yes_no(answer: str, references: Sequence[str]) -> float:
    """Whether the answer begins with the right one of yes and no."""
    said = yes_or_no(answer)
    return float(said is not None and said in {normalised(reference) for reference in references})


def f1(said: Sequence[str | None], wanted: Sequence[str | None], of: str = "yes") -> float:
    """Harmonic mean of precision and recall of one answer; 0 where it was neither said nor wanted."""
    hits = sum(a == of == b for a, b in zip(said, wanted, strict=True))
    total = sum(a == of for a in said) + sum(b == of for b in wanted)
    return 2 * hits / total if total else 0.0
