"""Tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell is escaped, and a line break in it is a space."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def cells(line: str) -> list[str]:
    """The cells of a line of `markdown`, as they were before."""
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")
