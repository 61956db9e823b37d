"""How long a vision encoder takes for the tiles of images, with DyMU and without.

`python -m benchmarks.tiles` builds SigLIP's so400m tower with random weights (27 × 27 tokens of a 384 px picture, as
LLaVA-OneVision sees every tile) and merges as real photos were merged, one photo per picture. A round encodes one batch
untouched and at every budget, in turn. The result file holds, per batch and budget, medians per picture and `merge_ms`,
what matching and merging take of them, clocked in the same runs; for `count_ratio` see `benchmarks.encoder`.
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

import dymu
from benchmarks import record
from benchmarks.encoder import clocked, counted, encode, load, processed, seconds
from dymu.bench.replay import recorded
from dymu.bench.workload import spread
from dymu.families.resolve import resolve

TOWER, SIDE, TOKENS = "so400m", 384, 729


@torch.inference_mode()
def main(
    pictures: Annotated[str, typer.Option(help="At a time.")] = "1,5,10",
    budgets: Annotated[str, typer.Option(help="Parts of the tokens to keep.")] = "0.14,0.25,0.46",
    repeats: int = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    name: Annotated[str, typer.Option(help="Of the result file.")] = "tiles",
) -> None:
    """Time every batch at every budget, and write the result file."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = load(TOWER, SIDE)
    model = model.to(device, getattr(torch, dtype)).eval()
    merges = recorded(TOKENS)
    recorded_budgets = [merges.budget_near(float(budget)) for budget in budgets.split(",")]
    rows = []
    for size in [int(size) for size in pictures.split(",")]:
        pixels = torch.randn(size, 3, SIDE, SIDE, device=device, dtype=getattr(torch, dtype))
        rules = {budget: merges.rule(budget, spread(merges.kept(budget), size)) for budget in recorded_budgets}
        encode(model, pixels[:1])  # the first of a size, or of all, is slower
        runs: dict[int, list[dict[str, Any]]] = {budget: [] for budget in recorded_budgets}
        untouched = []
        for _ in track(range(repeats), description=f"{size} at a time"):
            untouched.append(1e3 * seconds(lambda pixels=pixels: encode(model, pixels)) / size)
            for budget, rule in rules.items():
                runs[budget].append(_merged(model, rule, pixels))
        rows += [_row(size, budget, untouched, runs[budget]) for budget in recorded_budgets]
    layers = len(resolve(model).encoder_layers)
    data = {"tower": TOWER, "layers": layers, "full_tokens": TOKENS, "dtype": dtype, "repeats": repeats, "rows": rows}
    print(record.write(name, data))


def _merged(model: Any, rule: Any, pixels: torch.Tensor) -> dict[str, Any]:
    """Milliseconds per picture of one run with DyMU, and the tokens that it left."""
    with dymu.apply(model, merge=rule) as handle, clocked() as spent:
        whole = seconds(lambda: encode(model, pixels))
        ratio = counted(model, processed(model, handle))
        kept = statistics.fmean(handle.last.kept)
    return {
        "dymu_ms": 1e3 * whole / len(pixels),
        "merge_ms": 1e3 * sum(spent) / len(pixels),
        "kept": kept,
        "count_ratio": ratio,
    }


def _row(size: int, budget: int, untouched: list[float], runs: list[dict[str, Any]]) -> dict[str, Any]:
    times, merges = ([run[name] for run in runs] for name in ("dymu_ms", "merge_ms"))
    ratios = [full / merged for full, merged in zip(untouched, times, strict=True)]
    return {
        "pictures": size,
        "budget": budget,
        "kept": runs[0]["kept"],
        "untouched_ms": statistics.median(untouched),
        "dymu_ms": statistics.median(times),
        "merge_ms": statistics.median(merges),
        "ratio": statistics.median(untouched) / statistics.median(times),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "count_ratio": runs[0]["count_ratio"],
    }


if __name__ == "__main__":
    typer.run(main)
