"""Files that are written whole or not at all, and JSON of which every field is checked."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

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


def target_of(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """Where writing to `path` ends, behind any links, and the permissions of the file that is there; None for none.

    Raises:
        BadOutput: something else is there, such as a folder, a device or a pipe, or the system knows no such names.
    """
    target = Path(os.path.realpath(expanded(path)))
    try:
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # writing tells what is wrong
        return target, None
    except (OSError, ValueError) as error:
        raise BadOutput(f"{shortened(path)} cannot be written ({first_line(error)}): {next_step(error)}.") from error
    if stat.S_ISDIR(mode):
        raise BadOutput(f"{path} is a folder: name a file.")
    if not stat.S_ISREG(mode):
        raise BadOutput(f"{path} is no ordinary file but a device, a pipe or a socket: name a file.")
    return target, stat.S_IMODE(mode)


def next_step(error: Exception) -> str:
    """What to do about a path that cannot be looked up."""
    too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    return "give it a shorter name" if too_long else "check its name"


def shortened(path: str | os.PathLike[str]) -> str:
    """A path for a message, of a very long one both ends."""
    name = os.fspath(path)
    return name if len(name) <= 200 else f"{name[:80]}…{name[-80:]}"


def escaped(value: Any) -> Any:
    """A text whose lone surrogates (bytes of a file's name that are no UTF-8) are their escapes, or plain data with
    such texts in it."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {escaped(key): escaped(item) for key, item in value.items()}
    return [escaped(item) for item in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to, moved there at the end: nobody ever sees half a file.

    It ends like `path`, since writers of pictures go by that. After an error `path` is as it was. A link stays one: the
    file it points to is written, and keeps its permissions.

    Raises:
        BadOutput: `path` is there and no ordinary file, or the system refuses, such as for want of room.
    """
    target, mode = target_of(path)
    partial = target.with_name(f".dymu-{secrets.token_hex(4)}{target.suffix[:16]}")
    try:
        if mode is not None:
            partial.touch(0o600)  # before there is anything in it to read
        yield partial
        if mode is not None:
            partial.chmod(mode)
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
