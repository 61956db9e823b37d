"""The errors of the command line alone, and what a user sees of any exception: one sentence."""

from typing import Any

from dymu.errors import BadOutput as BadOutput
from dymu.errors import DymuError
from dymu.files import first_line, shortened


class BadModel(DymuError):
    """A model folder or name that cannot be loaded."""


class BadInput(DymuError):
    """Something named that is not there, or not what is needed."""


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
        named = f": {shortened(error.filename)}" if isinstance(error.filename, str) else ""
        return f"the system refused ({first_line(error)}{named}): check the names and paths of this call."
    return (
        f"an error that dymu did not foresee: {type(error).__name__}: {one_line(error)}. "
        "Run it again with --debug for the traceback, and please report it."
    )


def usage_sentence(error: Any) -> str:
    """The same of a call that typer, or a command, refused: a `typer.BadParameter` or another `UsageError`."""
    if getattr(error, "param", error) is None:  # a command's own sentence
        return " ".join(str(error.message).split())
    message = " ".join(error.format_message().split()).replace("Value error, ", "").rstrip(".")
    command = error.ctx.command_path if error.ctx else "dymu"
    return f"{message[:1].lower()}{message[1:]}; see `{command} --help`."


def one_line(error: BaseException) -> str:
    """An exception's message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
