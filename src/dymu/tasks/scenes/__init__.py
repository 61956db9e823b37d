"""Composed scenes: pictures whose every fact is known, and the questions that these facts answer."""

from dymu.tasks.scenes.compose import Item, Panel, Scene, Sign, compose
from dymu.tasks.scenes.materials import Materials, evaluation_pack
from dymu.tasks.scenes.questions import KINDS, Question, questions

__all__ = [
    "KINDS",
    "Item",
    "Materials",
    "Panel",
    "Question",
    "Scene",
    "Sign",
    "compose",
    "evaluation_pack",
    "questions",
]
