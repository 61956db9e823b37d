"""A file of JSON lines that results are appended to as they come, so that a killed run loses what it was at and no
more."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self, TypeVar

import msgspec

from dymu.errors import BadOutput
from dymu.files import escaped, first_line
from dymu.measure.results import BadResults, read_bytes

if sys.platform != "win32":
    import fcntl

Record = TypeVar("Record", bound=msgspec.Struct)


class LineFile:
    """Appends records to a file; a context, in which no other process may write it.

    Args:
        path: created if it does not exist.
        program: what writes such files, for messages.

    Raises:
        BadResults: another process is writing it.
        BadOutput: it cannot be written.
    """

    def __init__(self, path: Path, program: str) -> None:
        self._path = path
        with _named(path):
            self._stream = path.open("ab")
        try:
            _lock(self._stream, path, program)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of a line that could not be written, which `write` has said
            self._stream.close()

    @property
    def empty(self) -> bool:
        return os.fstat(self._stream.fileno()).st_size == 0

    def cut(self) -> None:
        """Cut off half a last line, which a killed run leaves.

        Raises:
            BadResults, BadOutput: the file cannot be read, or not be written.
        """
        with _named(self._path):
            self._stream.truncate(read_bytes(self._path).rfind(b"\n") + 1)

    def write(self, record: msgspec.Struct) -> None:
        """Append a record, and make sure that it is on the disk.

        Raises:
            BadOutput: it cannot be written.
        """
        with _named(self._path):
            if os.fstat(self._stream.fileno()).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, "it was deleted meanwhile")
            self._stream.write(msgspec.json.encode(record) + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())


def lines_of(path: Path) -> list[bytes]:
    """The whole lines of a file.

    Raises:
        BadResults: it cannot be read.
    """
    return read_bytes(path).split(b"\n")[:-1]


def as_written(record: Record) -> Record:
    """A record as a file gives it back: half of a surrogate pair, which UTF-8 cannot hold, is its escape."""
    return msgspec.json.decode(msgspec.json.encode(escaped(msgspec.to_builtins(record))), type=type(record))


def _lock(stream: BinaryIO, path: Path, program: str) -> None:
    """Keep other processes from the file until it is closed, where the system can."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BadResults(
            f"another {program} is writing {path}: wait until it is done, or name another file with -o."
        ) from error
    except OSError:  # some network file systems have no locks
        return


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadOutput(
            f"{path} could not be written ({first_line(error)}): make room, or name another file."
        ) from error
