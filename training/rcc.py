"""Unpack Qt resource files (``.rcc``, formats 1 to 3) without Qt."""

import struct
import subprocess
import zlib
from pathlib import Path

DIRECTORY, ZLIB, ZSTD = 2, 1, 4


def unpack_rcc(source: Path, target: Path) -> int:
    """Write every file inside ``source`` below ``target``; return how many there were."""
    blob = source.read_bytes()
    if blob[:4] != b"qres":
        raise ValueError(f"{source} is no Qt resource file: it starts with {blob[:4]!r}")
    version, tree, data, names = struct.unpack(">IIII", blob[4:20])
    entry_bytes = 14 if version == 1 else 22

    def name_at(offset: int) -> str:
        offset += names
        (length,) = struct.unpack(">H", blob[offset : offset + 2])
        return blob[offset + 6 : offset + 6 + 2 * length].decode("utf-16-be")

    def walk(index: int, parent: Path) -> int:
        offset = tree + index * entry_bytes
        name_offset, flags = struct.unpack(">IH", blob[offset : offset + 6])
        here = parent / name_at(name_offset) if index else parent
        if flags & DIRECTORY:
            count, first = struct.unpack(">II", blob[offset + 6 : offset + 14])
            return sum(walk(first + k, here) for k in range(count))
        (at,) = struct.unpack(">I", blob[offset + 10 : offset + 14])
        (length,) = struct.unpack(">I", blob[data + at : data + at + 4])
        content = blob[data + at + 4 : data + at + 4 + length]
        here.parent.mkdir(parents=True, exist_ok=True)
        here.write_bytes(_inflate(content, flags))
        return 1

    return walk(0, target)


def _inflate(content: bytes, flags: int) -> bytes:
    if flags & ZLIB:
        return zlib.decompress(content[4:])
    if flags & ZSTD:
        command = ["zstd", "-dc"]
        return subprocess.run(command, input=content, capture_output=True, check=True).stdout
    return content
