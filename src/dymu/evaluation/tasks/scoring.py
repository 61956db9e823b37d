"""Scoring rules of the usual benchmarks. Each takes an answer and its references and returns 0 to 1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

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
    said, right = _number(answer), _number(reference)
    if said is None or right is None:
        return float(_plain(answer) == _plain(reference))
    return float(said == right if right == 0 else abs(said - right) <= RELAXED * abs(right))


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
    similarity = 1.0 if longest == 0 else 1 - Levenshtein.distance(a, b) / longest
    return similarity if similarity > ANLS_FLOOR else 0.0


def yes_or_no(answer: str) -> str | None:
    """`yes` or `no`, whichever the answer begins with; None for neither."""
    words = normalised(answer).split()
    return words[0] if words and words[0] in ("yes", "no") else None


def yes_no(answer: str, references: Sequence[str]) -> float:
    """Whether the answer begins with the right one of yes and no."""
    said = yes_or_no(answer)
    return float(said is not None and said in {normalised(reference) for reference in references})


def f1(answers: Sequence[str | None], references: Sequence[str | None], of: str = "yes") -> float:
    """Harmonic mean of precision and recall of the answer `of`; 0 where it is neither answer nor reference."""
    hits = sum(a == of == b for a, b in zip(answers, references, strict=True))
    total = answers.count(of) + references.count(of)
    return 2 * hits / total if total else 0.0
