"""Read a GGUF file: its metadata, and its tensors as float32.

Only the three tensor types of the pinned language model are known. That is fewer lines than the `gguf` and
`accelerate` packages ask of a set-up, it needs nothing but numpy, and a test holds it against `gguf` bit by bit. A file
with any other type is refused.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_BLOCK = 32
"""Weights that share a scale."""


@dataclass(frozen=True)
class Gguf:
    """An open file: metadata by key, and where each tensor lies."""

    metadata: dict[str, Any]
    _buffer: mmap.mmap
    _places: dict[str, tuple[tuple[int, ...], int, int]]

    @classmethod
    def open(cls, path: Path) -> Gguf:
        """Read the head of a file; tensors are read when they are asked for."""
        with path.open("rb") as stream:
            buffer = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(buffer)
        magic, version, tensors, keys = cursor.unpack("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path} is no GGUF file of version 2 or 3")
        metadata = {cursor.text(): cursor.value(cursor.unpack("I")[0]) for _ in range(keys)}
        heads = []
        for _ in range(tensors):
            name = cursor.text()
            (rank,) = cursor.unpack("I")
            shape = cursor.unpack(f"{rank}Q")[::-1]  # stored innermost first
            heads.append((name, shape, *cursor.unpack("IQ")))
        align = metadata.get("general.alignment", 32)
        begin = -(-cursor.at // align) * align
        return cls(metadata, buffer, {name: (shape, kind, begin + at) for name, shape, kind, at in heads})

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor by its name in the file, as float32."""
        for name, (shape, kind, begin) in self._places.items():
            if kind not in DEQUANTISE:
                raise ValueError(f"{name} is of the type {kind}; known are {', '.join(map(str, DEQUANTISE))}")
            block_bytes, dequantise = DEQUANTISE[kind]
            size = int(np.prod(shape)) // _BLOCK * block_bytes
            raw = np.frombuffer(self._buffer, np.uint8, size, begin).reshape(-1, block_bytes)
            yield name, dequantise(raw).reshape(shape)


@dataclass
class _Cursor:
    buffer: mmap.mmap
    at: int = 0

    def unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.buffer, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def text(self) -> str:
        (length,) = self.unpack("Q")
        self.at += length
        return self.buffer[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            of, count = self.unpack("IQ")
            return (
                [self.value(of) for _ in range(count)] if of == _STRING else list(self.unpack(f"{count}{_SCALARS[of]}"))
            )
        return self.unpack(_SCALARS[kind])[0]


def _half(raw: np.ndarray) -> np.ndarray:
    """Two bytes of each block as one float32."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _f32(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float32).copy()


def _q4_1(raw: np.ndarray) -> np.ndarray:
    """Scale, least value, then 16 bytes: the low halves are the first 16 weights, the high halves the others."""
    codes = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1).astype(np.float32)
    return codes * _half(raw[:, :2]) + _half(raw[:, 2:4])


def _q8_0(raw: np.ndarray) -> np.ndarray:
    """Scale, then one signed byte for each weight."""
    return np.ascontiguousarray(raw[:, 2:]).view(np.int8).astype(np.float32) * _half(raw[:, :2])


DEQUANTISE: dict[int, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    0: (4 * _BLOCK, _f32),
    3: (4 + _BLOCK // 2, _q4_1),
    8: (2 + _BLOCK, _q8_0),
}
"""By type: bytes of a block of 32 weights, and how to widen blocks to float32."""
