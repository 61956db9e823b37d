"""Composed scenes: pictures whose every fact is known, and the questions that these facts answer."""

from scenes.assets import Materials, evaluation_pack
from scenes.compose import Item, Panel, Scene, Sign, compose
from scenes.questions import KINDS, Question, questions

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
