"""Room for more tensors than memory holds: beyond a limit they lie in a temporary file without a name."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from typing import IO

import numpy as np
import torch
from torch import Tensor

from dymu.errors import DymuError

ALIGNMENT = 64
"""Bytes: tensors of every type begin at multiples of it."""


class Slot:
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


class Spill(ExitStack):
    """Gives out slots: in memory for the first `memory_limit_bytes`, then in a file. Use as a context manager.

    The file is one of `tempfile.TemporaryFile` (TMPDIR says where), which on POSIX systems has no name from the start,
    so that not even a killed process leaves it behind.
    """

    def __init__(self, memory_limit_bytes: int) -> None:
        super().__init__()
        self._left_bytes = memory_limit_bytes
        self._file: IO[bytes] | None = None
        self._file_bytes = 0

    def slot(self, size_bytes: int) -> Slot:
        """A new slot.

        Raises:
            DymuError: the disk has no room for it.
        """
        if size_bytes <= self._left_bytes:
            self._left_bytes -= size_bytes
            return Slot(torch.empty(size_bytes, dtype=torch.uint8))
        start = self._file_bytes
        self._file_bytes += -(-size_bytes // ALIGNMENT) * ALIGNMENT
        try:
            if self._file is None:
                self._file = self.enter_context(tempfile.TemporaryFile(prefix="dymu-"))  # noqa: SIM115
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here; in mapped memory it kills the process
                os.posix_fallocate(self._file.fileno(), start, self._file_bytes - start)
            else:
                self._file.truncate(self._file_bytes)
            mapped = np.memmap(self._file, np.uint8, "r+", start, (size_bytes,))
        except OSError as error:
            raise DymuError(
                f"the temporary folder {tempfile.gettempdir()} has no room for {self._file_bytes / 1e9:.1f} GB "
                f"({error.strerror}); set TMPDIR to a folder that has, or use fewer images."
            ) from error
        return Slot(torch.from_numpy(mapped))
