"""From an exception to what the user sees of it: one sentence and an exit code.

A user's mistake never shows a traceback, unless it is asked for by `--debug` or `DYMU_DEBUG=1`.
"""

import os
import sys

from dymu.errors import DymuError

FAILED = 1


class BadModel(DymuError):
    """A model folder or name that cannot be loaded."""


class BadOutput(DymuError):
    """A file that cannot be written."""


class BadInput(DymuError):
    """Something named that is not there, or not what is needed."""


class Traceback:
    """Whether full tracebacks are wanted."""

    wanted = False

    @classmethod
    def reset(cls) -> None:
        cls.wanted = os.environ.get("DYMU_DEBUG", "") not in ("", "0")

    @classmethod
    def ask(cls, asked: bool) -> None:
        cls.wanted = cls.wanted or asked


def report(error: BaseException) -> int:
    """Say what happened on stderr; the exit code."""
    if isinstance(error, BrokenPipeError):  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    print(f"dymu: {sentence(error)}", file=sys.stderr)
    return FAILED


def sentence(error: BaseException) -> str:
    """One line: what, why, what next."""
    if isinstance(error, DymuError):
        return one_line(error)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return (
            "this machine has too little memory for that: take a smaller model, or close other "
            f"programs ({one_line(error)})."
        )
    if isinstance(error, OSError):
        return f"the system refused: {one_line(error)}."
    return (
        f"an error that dymu did not foresee: {type(error).__name__}: {one_line(error)}. "
        "Run it again with --debug for the traceback, and please report it."
    )


def one_line(error: BaseException) -> str:
    """An exception's own words without their line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
