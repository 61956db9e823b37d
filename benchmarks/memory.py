"""How much memory attention over virtual tokens takes at its peak, and how that grows with the prompt.

`python -m benchmarks.memory` measures one layer's attention on the CPU in prefill, by the backend `sdpa`, from 1k to 8k
tokens of photos whose recorded merges leave about a seventh; among the lengths are those of 32 frames of 196 tokens and
of 10 tiles of 729, with 64 of text. In a result file stand the bytes by which the memory that is resident at once grew
during the call, beside the queries, keys and values given, and per way the exponent b of the best fit bytes = a N^b:

- `exact`: unmerging; `exact, padded`: of two rows, the second a quarter shorter and padded on the left;
  `exact, window`: with a sliding window, which needs masks; `exact, chunk`: the prompt's second half to all of it;
- `untouched`: rotate and attend to all N tokens, as the untouched model does, with torch's own attention;
- `all pairs`: the same with the logits of all pairs written out, to show that such a matrix would be seen.

Every number is of a process of its own. The C library there returns all that is freed, so that nothing hides in memory
that it kept.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import record
from benchmarks.prompts import TEXT, Shape, plan, rotate, tensors, turn
from dymu.bench.replay import recorded
from dymu.token_map import TokenMap
from dymu.unmerging import BACKENDS, History

SHAPES = {"Qwen2-0.5B": Shape(14, 2, 64), "Llama-7B": Shape(32, 32, 128)}
LENGTHS = (1024, 2048, 4096, 32 * 196 + 2 * TEXT, 10 * 729 + 2 * TEXT, 8192)
"""Tokens of a prompt, text included."""
BUDGET, SHARE, WINDOW = 89, 0.14, 700
"""Recorded budget, of 576 tokens; photos come first of which about that share is kept; tokens of the sliding window."""
MERGING = ("exact", "exact, padded", "exact, window", "exact, chunk")
WAYS = (*MERGING, "untouched", "all pairs")
TOO_MUCH_BYTES = 3e9
"""Logits of all pairs beyond are left out."""
WARM = 256
"""Tokens of a first call, in which libraries make what they keep."""


@dataclass(frozen=True)
class Case:
    """A layer of one model, a way to attend and the tokens of a prompt."""

    model: str
    way: str
    tokens: int
    dtype: str = "float32"


def photos(tokens: int) -> Tensor:
    """int64 [tokens], the leader of each token of recorded photos side by side; the last one is cut."""
    merges = recorded()
    kept = merges.kept(BUDGET)
    nearest = sorted(range(len(kept)), key=lambda photo: abs(kept[photo] - SHARE * merges.tokens))
    leaders, start = [], 0
    for merged in (merges.merged(BUDGET, photo) for photo in nearest):
        leaders.append(start + merged.first().gather(1, merged.group)[0])
        start += merges.tokens
        if start >= tokens:
            break
    return torch.cat(leaders)[:tokens]


def prompt(tokens: int, *, padded: bool = False) -> TokenMap:
    """Photos between text. Padded: two rows of them, the second without its first quarter."""
    index = torch.arange(tokens)
    leaders = index.clone()
    leaders[TEXT:-TEXT] = TEXT + photos(tokens - 2 * TEXT)
    if not padded:
        return TokenMap.from_leaders(leaders[None])
    gone = tokens // 4
    short = index.clone()
    short[gone + TEXT : -TEXT] = gone + TEXT + photos(tokens - gone - 2 * TEXT)
    return TokenMap.from_leaders(torch.stack((leaders, short)), torch.stack((index >= 0, index >= gone)))


def _call(case: Case) -> tuple[Callable[[], Tensor], int, int]:
    """What is measured, bytes of the queries, keys and values that it is given, and merged tokens of the first row."""
    shape, dtype = SHAPES[case.model], getattr(torch, case.dtype)
    scaling, cpu = shape.size**-0.5, torch.device("cpu")
    if case.way in MERGING:
        history = History()
        if case.way == "exact, chunk":
            first = prompt(case.tokens // 2)
            plan(first, history, shape, dtype)
            merged = prompt(case.tokens - case.tokens // 2)
        else:
            merged = prompt(case.tokens, padded=case.way == "exact, padded")
        step = plan(merged, history, shape, dtype)
        inputs = tensors(shape, merged.batch, merged.width, history.entries, dtype, cpu)
        window = WINDOW if case.way == "exact, window" else None
        kept = int(merged.kept[0]) + (history.entries - merged.width)
        return lambda: BACKENDS["sdpa"](*inputs, step, scaling, window), _bytes(inputs), kept
    inputs = tensors(shape, 1, case.tokens, case.tokens, dtype, cpu)
    cos, sin = (x.to(dtype) for x in turn(torch.arange(case.tokens)[None], shape.size))

    def attend() -> Tensor:
        query, key, value = rotate(inputs[0], cos, sin), rotate(inputs[1], cos, sin), inputs[2]
        grouped = shape.heads != shape.key_heads
        if case.way == "untouched":
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
        logits = query.unflatten(1, (shape.key_heads, -1)) @ key[:, :, None].mT * scaling
        hidden = torch.ones(case.tokens, case.tokens, dtype=torch.bool).triu(1)
        return logits.masked_fill_(hidden, -torch.inf).softmax(-1) @ value[:, :, None]

    return attend, _bytes(inputs), case.tokens


def _bytes(inputs: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in inputs)


def _status(name: str) -> int:
    """Bytes that Linux says of this process: VmRSS, resident now, or VmHWM, the most that was at once."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measured(case: Case) -> dict[str, int]:
    """Peak bytes of one call, beside what was there before; of a process that has done nothing else."""
    with torch.inference_mode():
        _call(Case(case.model, case.way, WARM, case.dtype))[0]()
        call, input_bytes, kept = _call(case)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = _status("VmRSS")
        call()
        return {"peak_bytes": _status("VmHWM") - before, "given_bytes": input_bytes, "kept": kept}


def exponent(tokens: list[int], peaks: list[int]) -> float:
    """b of the least-squares fit of log(peak) = log(a) + b log(N)."""
    x, y = ([math.log(value) for value in values] for values in (tokens, peaks))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - middle_x) ** 2 for a in x)


def main(
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    name: Annotated[str, typer.Option(help="Of the result file.")] = "memory",
) -> None:
    """Measure every case, print how memory grows, and write the result file."""
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("this reads the peak of resident memory from Linux's /proc and finds none; run it on Linux.")
    # Read when the processes start: what is larger than a page's worth is mapped by itself, and unmapped when freed.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_MAX_": "1000000"}
    fits, rows = [], []
    cases = [
        Case(model, way, tokens, dtype)
        for model, shape in SHAPES.items()
        for way in WAYS
        for tokens in LENGTHS
        if way != "all pairs" or 4 * shape.heads * tokens**2 < TOO_MUCH_BYTES
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for case, measurement in track(zip(cases, pool.map(measured, cases), strict=True), total=len(cases)):
            rows.append(asdict(case) | measurement)
    for model in SHAPES:
        for way in WAYS:
            chosen = [row for row in rows if (row["model"], row["way"]) == (model, way)]
            tokens, peaks = [row["tokens"] for row in chosen], [row["peak_bytes"] for row in chosen]
            fits.append({"model": model, "way": way, "exponent": exponent(tokens, peaks)})
            print(
                f"{model:10}  {way:14} N^{fits[-1]['exponent']:.2f} ", *(f"{peak / 1e6:8.1f}" for peak in peaks), "MB"
            )
    print(record.write(name, {"window": WINDOW, "fits": fits, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
