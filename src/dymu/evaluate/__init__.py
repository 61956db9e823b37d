"""Accuracy against image tokens and time, for every way of having fewer of them."""

from dymu.evaluate.results import BadResults, Results
from dymu.evaluate.rows import METHODS, UNTOUCHED, Method, Row, rows_for
from dymu.evaluate.run import evaluate
from dymu.evaluate.summary import Part, RowSummary, parts_by, summarise

__all__ = [
    "METHODS",
    "UNTOUCHED",
    "BadResults",
    "Method",
    "Part",
    "Results",
    "Row",
    "RowSummary",
    "evaluate",
    "parts_by",
    "rows_for",
    "summarise",
]
