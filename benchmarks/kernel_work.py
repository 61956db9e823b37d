"""How many products the Triton prefill kernel forms, counted from its tables; no GPU is needed.

`python -m benchmarks.kernel_work` counts, for the prompts of `benchmarks.prompts`, the tiles of keys that the
tiles of queries visit, over those that causal attention to expanded tokens visits in tiles of the same size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from benchmarks import record
from benchmarks.prompts import QWEN, SIZES, prompts
from dymu.unmerging.backends.triton import prefill_tiles, tables


@dataclass(frozen=True)
class Work:
    """Products over those of expanded tokens: of queries and keys, of weights and values, of both; and the share of
    visits that need a mask."""

    logits: float
    values: float
    both: float
    masked: float


def work(images: int, side: int, kept: int, sizes: int | None = None) -> Work:
    """Count for one prompt, with chunks of as many sizes, or of as many as the kernel takes for a head size of 128."""
    tiles = prefill_tiles(QWEN.size, torch.bfloat16)
    chunks = tuple(1 << i for i in reversed(range(tiles.sizes if sizes is None else sizes)))
    prompt = prompts(images, side, kept, batch=1)
    tokens = prompt.tokens
    queries = tables.query_tiles(prompt.group, torch.arange(tokens)[None], tiles.rows)
    keys = tables.key_tiles(prompt.group, tiles.width, chunks)
    visits = keys.visits(queries, torch.arange(tokens)[None], None)[0].double()
    expanded = float(((queries.last[0] + tiles.width) // tiles.width).sum())
    visited = (visits[..., 2] - visits[..., 0]).sum(0)
    logits = float(visited.sum()) / expanded
    values = float((visited / torch.tensor(chunks)).sum()) / expanded
    masked = float((visits[..., 2] - visits[..., 1]).sum() / visited.sum())
    return Work(logits, values, (logits + values) / 2, masked)


def main() -> None:
    """Print a table and write the result file."""
    rows = []
    print("| tokens | kept | queries x keys | weights x values | both | visits with a mask |")
    print("| --- | --- | --- | --- | --- | --- |")
    for images, side, kept in SIZES:
        counted = work(images, side, kept)
        tokens = prompts(images, side, kept, batch=1).tokens
        parts = (f"{counted.logits:.2f}", f"{counted.values:.2f}", f"{counted.both:.2f}", f"{counted.masked:.0%}")
        print("|", " | ".join((f"{tokens:,}", f"{kept:,}", *parts)), "|")
        rows.append({"tokens": tokens, "kept": kept, **asdict(counted)})
    print(record.write("kernel_work", {"rows": rows}))


if __name__ == "__main__":
    main()
