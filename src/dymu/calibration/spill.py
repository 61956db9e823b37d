"""Room for more tensors than memory holds: beyond a limit they lie in a temporary file without a name."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from io import FileIO

import torch
from torch import Tensor

from dymu.errors import BadOutput
from dymu.files import first_line


class Slot:
    """Room for one tensor at a time, on the CPU; a later one must not be larger than the first could be."""

    def __init__(self, capacity_bytes: int, file: FileIO | None = None, start: int = 0) -> None:
        """In memory, or in an unbuffered file from the byte `start` on."""
        self.capacity_bytes = capacity_bytes
        self._file, self._start = file, start
        self._room = torch.empty(0 if file else capacity_bytes, dtype=torch.uint8, device="cpu")
        self._dtype, self._shape = torch.uint8, torch.Size([0])

    def put(self, tensor: Tensor) -> None:
        """Keep a copy of `tensor` instead of what was here.

        Raises:
            BadOutput: the disk has no room for it.
        """
        self._dtype, self._shape = tensor.dtype, tensor.shape
        if self._file is None:
            self.get().copy_(tensor)
            return
        left = _bytes_of(tensor.detach().cpu().contiguous())
        try:
            self._file.seek(self._start)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise BadOutput(
                f"the temporary file in {tempfile.gettempdir()} cannot grow beyond {self._start / 1e9:.1f} GB "
                f"({first_line(error)}); set TMPDIR to a folder with more room, or use fewer images."
            ) from error

    def get(self) -> Tensor:
        """What was put here last. In memory it is not copied: it changes with the next `put`."""
        size_bytes = self._shape.numel() * self._dtype.itemsize
        if self._file is None:
            return self._room[:size_bytes].view(self._dtype).view(self._shape)
        room = torch.empty(self._shape, dtype=self._dtype, device="cpu")
        left = _bytes_of(room)
        self._file.seek(self._start)
        while left:
            count = self._file.readinto(left)
            assert count, "the file is shorter than what was written"
            left = left[count:]
        return room


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


class Spill(ExitStack):
    """Gives out slots: in memory for the first `memory_limit_bytes`, then in one file. Use as a context manager.

    The file is one of `tempfile.TemporaryFile` (TMPDIR says where), which on POSIX systems has no name from the start,
    so that not even a killed process leaves it behind.
    """

    def __init__(self, memory_limit_bytes: int) -> None:
        super().__init__()
        self._left_bytes = memory_limit_bytes
        self._file: FileIO | None = None
        self._file_bytes = 0

    def slot(self, size_bytes: int) -> Slot:
        """A new slot.

        Raises:
            BadOutput: the temporary folder takes no file.
        """
        if size_bytes <= self._left_bytes:
            self._left_bytes -= size_bytes
            return Slot(size_bytes)
        if self._file is None:
            try:
                self._file = self.enter_context(tempfile.TemporaryFile(prefix="dymu-", buffering=0))  # noqa: SIM115
            except OSError as error:
                raise BadOutput(
                    f"no temporary file can be opened ({first_line(error)}); set TMPDIR to a folder that takes one."
                ) from error
        start, self._file_bytes = self._file_bytes, self._file_bytes + size_bytes
        return Slot(size_bytes, self._file, start)
