"""A conversation in which each turn adds a picture, and the pictures of earlier turns get smaller budgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from dymu.demo.asked import MAX_NEW_TOKENS, Side, Subject, answered, check_asked
from dymu.errors import BadPrompt
from dymu.prompting import check_length, items_by_prompt, placeholder_of, processed

MOST_TURNS = 8


@dataclass(frozen=True)
class Turn:
    """One turn: where its picture lies, what was asked about it, and the answer with merged tokens."""

    path: str
    name: str
    question: str
    answer: str = ""


@dataclass(frozen=True)
class Conversation:
    """What is known of a conversation after its newest turn.

    Attributes:
        turns: oldest first.
        budgets: of the picture of each.
        kept, original: image tokens of each, merged and not.
        merged, untouched: the newest answer both ways; the second is None until then.
    """

    turns: tuple[Turn, ...]
    budgets: tuple[float, ...]
    kept: tuple[int, ...]
    original: tuple[int, ...]
    merged: Side
    untouched: Side | None = None


def budgets(newest: float, share: float, turns: int, least: float) -> list[float]:
    """One for each turn, oldest first: each is a share of the next one's, but not below what is calibrated."""
    return [max(newest * share**age, least) for age in reversed(range(turns))]


def prompt(processor: Any, turns: Sequence[Turn]) -> str:
    """All turns in the words that the model was trained on; the newest has no answer yet.

    Raises:
        BadPrompt: the model has no chat template, or one that does not give every picture its place.
    """
    if processor.chat_template is None:
        raise BadPrompt(
            "this model has no chat template, by which several turns become one prompt: ask single questions."
        )
    messages: list[dict[str, Any]] = []
    for turn in turns:
        content = [{"type": "image"}, {"type": "text", "text": turn.question}]
        messages.append({"role": "user", "content": content})
        if turn is not turns[-1]:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    text: str = processor.apply_chat_template(messages, add_generation_prompt=True)
    if text.count(placeholder_of(processor)) != len(turns):
        raise BadPrompt(
            f"this model's chat template does not give each of {len(turns)} pictures its place: take another model."
        )
    return text


def say(
    subject: Subject,
    before: Sequence[Turn],
    images: Sequence[Image.Image],
    turn: Turn,
    newest: float,
    share: float,
) -> Iterator[Conversation]:
    """Add a turn, and ask it both ways: what is known, as it becomes more.

    Args:
        images: of the turns before and of this one.
        newest: budget of this turn's picture.
        share: budget of each earlier picture, as a part of the next one's.

    Raises:
        DymuError: it cannot be asked so.
    """
    if len(before) >= MOST_TURNS:
        raise BadPrompt(f"{MOST_TURNS} turns are the most that this page keeps: begin anew.")
    turn = replace(turn, question=check_asked(subject, turn.question))
    turns = (*before, turn)
    each = budgets(newest, share, len(turns), subject.span[0])
    model, processor, handle = subject.model, subject.processor, subject.handle
    inputs = processed(model, processor, [prompt(processor, turns)], images=list(images))
    check_length(model, inputs, f"{len(turns)} pictures")
    answer, stored = answered(model, processor, {**inputs, "dymu_budget": each})
    report = handle.last
    (items,) = items_by_prompt(model, inputs, report.items)
    kept, original = _by_turn(items, len(turns))
    turns = (*before, replace(turn, answer=answer))
    merged = Side(answer, sum(kept), stored)
    now = Conversation(turns, tuple(each), tuple(kept), tuple(original), merged)
    yield now
    with handle.disabled():
        answer, stored = answered(model, processor, inputs)
    yield replace(now, untouched=Side(answer, sum(original), stored))


def _by_turn(items: Sequence[Any], turns: int) -> tuple[list[int], list[int]]:
    """Merged and original tokens of each turn's picture, which may be several items (its tiles)."""
    each = len(items) // turns
    if each * turns != len(items):  # tiles of pictures of different sizes: only the sum is known
        each = len(items)
    parts = [items[start : start + each] for start in range(0, len(items), each)]
    kept = [sum(item.kept for item in part) for part in parts]
    return kept, [sum(len(item.leaders) for item in part) for part in parts]


def as_python(subject: Subject, now: Conversation) -> str:
    """The call that does the same with the library."""
    listed = ", ".join(f"{budget:g}" for budget in now.budgets)
    images = ", ".join(f"Image.open({turn.name!r})" for turn in now.turns)
    return (
        f"images = [{images}]\n"
        f"prompt = {prompt(subject.processor, now.turns)!r}\n"
        "inputs = processor(images=images, text=prompt, return_tensors='pt')\n"
        f"model.generate(**inputs, dymu_budget=[{listed}], max_new_tokens={MAX_NEW_TOKENS})"
    )


def as_json(subject: Subject, now: Conversation) -> dict[str, Any]:
    """What the table shows."""
    return {
        "model": subject.title,
        "answer": now.merged.answer,
        "cache_bytes": now.merged.cache_bytes,
        "untouched": None
        if now.untouched is None
        else {"answer": now.untouched.answer, "cache_bytes": now.untouched.cache_bytes},
        "turns": [
            {
                "image": turn.name,
                "question": turn.question,
                "budget": budget,
                "kept_tokens": kept,
                "original_tokens": full,
            }
            for turn, budget, kept, full in zip(now.turns, now.budgets, now.kept, now.original, strict=False)
        ],
    }
