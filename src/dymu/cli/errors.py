"""The errors of the command line alone, and what a user sees of any exception: one sentence."""

from dymu.errors import DymuError


class BadModel(DymuError):
    """A model folder or name that cannot be loaded."""


class BadOutput(DymuError):
    """A file that cannot be written."""


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
        return f"the system refused: {one_line(error)}."
    return (
        f"an error that dymu did not foresee: {type(error).__name__}: {one_line(error)}. "
        "Run it again with --debug for the traceback, and please report it."
    )


def one_line(error: BaseException) -> str:
    """An exception's message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
