"""How long a method takes to choose, or to join, the tokens of one image: `python -m benchmarks.methods`.

576 tokens of 4,096 channels, as LLaVA-1.5-7B has, on one thread or, with `--device cuda`, on a GPU; what the encoder
tells of them is there already. The whole answer of the reducer is timed, with its map and its features.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Annotated

import torch
import typer

from benchmarks import record
from dymu.evaluation.methods import METHODS, Row
from dymu.reducers import Shown, Tokens
from dymu.token_map import TokenMap

SIDE, CHANNELS, ENCODED, WORDS = 24, 4096, 1024, 20
PART = 0.15


def tokens(device: torch.device) -> Tokens:
    """One picture of random tokens."""
    count, generator = SIDE**2, torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    cell = torch.arange(count, device=device).view(SIDE, SIDE)
    shown = Shown(drawn(1, 3, 336, 336), ((SIDE, SIDE),), single=True, video=False)
    made = Tokens(
        features=drawn(1, count, CHANNELS),
        map=TokenMap.identity(1, count, device),
        counts=[count],
        picture=torch.zeros(1, count, dtype=torch.long, device=device),
        first=(0, 1),
        shown=shown,
        find_grids=lambda: [[cell]],
        find_location=lambda: torch.rand(1, count, 4, generator=generator).to(device),
        find_places=lambda grids: torch.stack([grid.flatten(0, 1) for grid in grids]),
    )
    made.__dict__["keys"], made.__dict__["encoded"] = drawn(1, count, 64), drawn(1, count, ENCODED)
    shown.__dict__["text"] = [torch.arange(WORDS, device=device)]
    words = drawn(WORDS, CHANNELS)
    object.__setattr__(shown, "embed", lambda ids: words[ids])
    for layer in (-1, 5):
        made._attention[layer, True] = drawn(1, count).softmax(-1)
    return made


def main(
    repeats: int = 20, device: str = "cpu", name: Annotated[str, typer.Option(help="Of the result file.")] = "methods"
) -> None:
    """Time every method and write the result file."""
    torch.set_num_threads(1)
    made, rows = tokens(torch.device(device)), []
    torch.ones(2**22).sum()  # once as much was freed, as by any layer of a model, the allocator keeps memory for reuse
    for method in METHODS.values():
        if not method.reducer or method.solves is not None or method.name == "tome":
            continue
        way = "none" if method.leaves == "filled" else "exact"
        row = Row(method.name, round(PART * SIDE**2), method.unmerges(way), (method.schedules or ("",))[0])
        reducer = method.make(row, PART, 0)
        stage = (
            "in_prompt"
            if method.name in ("random", "stride") or not reducer.reduces("after_encoder", made.shown)
            else "after_encoder"
        )
        times = []
        for _ in range(repeats + 1):
            began = perf_counter()
            reduced = getattr(reducer, stage)(made)
            made.features_of(reduced)
            if device != "cpu":
                torch.accelerator.synchronize()
            times.append(1000 * (perf_counter() - began))
        rows.append(
            {
                "method": method.name,
                "label": method.label,
                "ms": round(median(times[1:]), 2),
                "least_ms": round(min(times[1:]), 2),
            }
        )
        print(rows[-1])
    print(record.write(name, {"tokens": SIDE**2, "kept": round(PART * SIDE**2), "repeats": repeats, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
