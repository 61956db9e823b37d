"""Files that are written whole or not at all, and JSON of which every field is checked."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from dymu.errors import BadOutput, DymuError

Kind = TypeVar("Kind")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e30)]
"""No measurement comes near the upper end, and a mean of such numbers is finite."""


def expanded(path: str | os.PathLike[str]) -> Path:
    """`~/` as the home folder; `~draft.png` is a name like any other."""
    path = Path(path)
    return Path(os.path.expanduser(path)) if path.parts[:1] == ("~",) else path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to, moved there at the end: nobody ever sees half a file.

    It ends like `path`, since writers of pictures go by that. After an error `path` is as it was. A link stays one: the
    file it points to is written.

    Raises:
        BadOutput: the system refuses, such as for want of room.
    """
    target = Path(os.path.realpath(expanded(path)))
    partial = target.with_name(f".dymu-{secrets.token_hex(4)}{target.suffix[:16]}")
    try:
        yield partial
        partial.replace(target)
    except OSError as error:
        raise BadOutput(
            f"{path} could not be written ({first_line(error)}) and is as it was: make room, or name another place."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, without number and path where the system raised it; else its type."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip()
    return (message or type(error).__name__).splitlines()[0]


def decoded(text: bytes, kind: type[Kind], error: type[DymuError], what: str, then: str) -> Kind:
    """JSON as a typed structure, every field of the right kind.

    Args:
        error: raised where it is not: a sentence of `what`, which field and why, and `then`.
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as problem:
        raise error(f"{what} ({first_line(problem)}); {then}") from problem
    except RecursionError as problem:
        raise error(f"{what} (it is nested too deeply); {then}") from problem
