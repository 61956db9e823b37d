"""Room for more tensors than memory holds: beyond a limit they lie in a temporary file without a name."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import IO

import torch
from torch import Tensor

from dymu.errors import DymuError


class Place:
    """Room for one tensor at a time, on the CPU; a later one must not be larger than the first could be."""

    def __init__(self, room: Tensor) -> None:
        self._room = room
        self._tensor = room[:0]

    @property
    def capacity_bytes(self) -> int:
        return self._room.numel()

    def put(self, tensor: Tensor) -> None:
        """Keep a copy of `tensor` instead of what was here."""
        self._tensor = self._room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._tensor.copy_(tensor)

    def get(self) -> Tensor:
        """What was put here last, not copied: it changes with the next `put`."""
        return self._tensor


class Shelf:
    """Gives out places: in memory for the first `memory_limit_bytes`, then in a file.

    The file is one of `tempfile.TemporaryFile` (TMPDIR says where), which on POSIX systems has no name from the start,
    so that not even a killed process leaves it behind. Use as a context manager.
    """

    def __init__(self, memory_limit_bytes: int) -> None:
        self._left_bytes = memory_limit_bytes
        self._file: IO[bytes] | None = None
        self._file_bytes = 0

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def place(self, size_bytes: int) -> Place:
        """A new place.

        Raises:
            DymuError: the disk has no room for it.
        """
        if size_bytes <= self._left_bytes:
            self._left_bytes -= size_bytes
            return Place(torch.empty(size_bytes, dtype=torch.uint8))
        start = self._file_bytes
        pages = -(-size_bytes // mmap.ALLOCATIONGRANULARITY)
        self._file_bytes += pages * mmap.ALLOCATIONGRANULARITY
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="dymu-")  # noqa: SIM115, closed in __exit__
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here; in mapped memory it kills the process
                os.posix_fallocate(self._file.fileno(), start, self._file_bytes - start)
            else:
                self._file.truncate(self._file_bytes)
            mapped = mmap.mmap(self._file.fileno(), size_bytes, offset=start)
        except OSError as error:
            raise DymuError(
                f"the temporary folder {tempfile.gettempdir()} has no room for {self._file_bytes / 1e9:.1f} GB "
                f"({error.strerror}); set TMPDIR to a folder that has, or use fewer images."
            ) from error
        return Place(torch.frombuffer(mapped, dtype=torch.uint8))
