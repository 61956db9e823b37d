"""Attention over virtual tokens on a GPU: how long it takes and how much memory, by each way to compute it.

`python -m benchmarks.gpu_attention` first compares the Triton kernels with the formula in float64, on the GPU, and
times nothing if they differ. Then it measures one layer's attention, prefill and decoding, in bfloat16:

- `untouched`: rotate and attend to all N tokens, as the untouched model does;
- `authors`: expand queries, keys and values, rotate, attend, average (decoding, its cache is the untouched model's);
- `triton` and `sdpa`: dymu's backends on merged tokens, which the model has rotated (not in these numbers); in prefill
  also with one query of each group (`representative`);
- `floor`: the untouched model's attention on M tokens.

The backends' tables, which the first layer of a forward makes for all, are made before and not in these numbers.

`--sweep` instead times the prefill kernel with many tiles, which is what `prefill_tiles` is chosen from.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from statistics import median
from time import monotonic
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import record
from benchmarks.prompts import LLAMA, QWEN, SIZES, TEXT, Shape, plan, prompts, rotate, tensors, turn
from dymu.choices import Unmerge
from dymu.token_map import TokenMap
from dymu.unmerging import BACKENDS, History, Step
from dymu.unmerging.backends.triton import Tiles, prefill

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ALLOWED = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-5}
"""Largest relative error (Frobenius norm) against float64."""
SECONDS, REPEATS = 2.0, 20
"""A cell is measured so many times, or for so long, but three times at least."""


@dataclass(frozen=True)
class Case:
    """What is compared with the formula: `images` of `side` x `side` tokens, of which `kept` stay, and how it is
    computed."""

    shape: Shape
    dtype: str
    window: int | None = None
    unmerge: Unmerge = "exact"
    images: int = 1
    side: int = 24
    kept: int = 89
    batch: int = 2
    new: int = 1


@dataclass(frozen=True)
class Cell:
    """What is measured: prompts of `images` of `side` x `side` tokens, of which `kept` stay in all."""

    shape: Shape
    images: int
    side: int
    kept: int
    batch: int


CASES = [
    *(Case(shape, "bfloat16") for shape in (QWEN, LLAMA, Shape(14, 2, 64), Shape(32, 32, 64), Shape(16, 16, 80))),
    *(Case(shape, "bfloat16") for shape in (Shape(8, 4, 256), Shape(4, 2, 32), Shape(4, 2, 8))),
    *(Case(shape, dtype) for shape in (QWEN, Shape(8, 4, 256)) for dtype in ("float16", "float32")),
    Case(QWEN, "bfloat16", window=200),
    *(Case(QWEN, "bfloat16", unmerge=unmerge) for unmerge in ("representative", "compact")),
    Case(QWEN, "bfloat16", unmerge="representative", window=200),
    Case(QWEN, "bfloat16", images=4, kept=340, new=5),
    Case(QWEN, "bfloat16", new=16),
]
CELLS = [
    Cell(shape, images, side, kept, batch)
    for images, side, kept in SIZES
    for shape in (QWEN, LLAMA)
    for batch in (1, 8, 32)
]
TOO_MUCH_BYTES, TOO_MANY_LOGITS = 50e9, 3e11
"""Cells beyond are left out."""


def formula(query: Tensor, key: Tensor, value: Tensor, step: Step, scaling: float, window: int | None) -> Tensor:
    """Unmerged attention in float64, [B, Mq, H, D], with every tensor written out."""
    query, key, value = query.double(), key.double(), value.double()
    shared, batch = query.shape[1] // key.shape[1], len(query)
    rows = torch.arange(batch, device=query.device)[:, None]
    slot, group = step.keys.clamp(min=0), step.queries.group.clamp(min=0)
    query, key, value = (
        x.transpose(1, 2)[rows, at].transpose(1, 2) for x, at in ((query, group), (key, slot), (value, slot))
    )
    turn = torch.ones(batch, slot.shape[1], key.shape[-1] // 2, dtype=torch.complex128, device=key.device)
    if step.turn is not None:
        turn[:, : step.turned] = step.turn
    at = step.query_at.expand(batch, -1)
    cos, sin = (torch.cat((part, part), -1) for part in (turn.real, turn.imag))
    if step.expands:
        query = rotate(query, cos[rows, at], sin[rows, at])
    logits = query @ rotate(key, cos, sin).repeat_interleave(shared, 1).mT * scaling
    if step.bias is not None:
        logits = logits + step.bias[:, None, None]
    place = torch.arange(slot.shape[1], device=query.device)
    sees = (place <= at[..., None]) & (step.keys >= 0)[:, None]
    if window is not None:
        sees &= step.place[rows, at][..., None] - step.place[:, None] < window
    weights = logits.masked_fill(~sees[:, None], -torch.inf).softmax(-1).nan_to_num()
    return step.queries.average((weights @ value.repeat_interleave(shared, 1)).transpose(1, 2))


def errors(case: Case, device: str = "cuda") -> tuple[float, float]:
    """How far the Triton kernels are from the formula: in prefill, and decoding `new` tokens after it."""
    torch.manual_seed(0)
    dtype, history, differences = DTYPES[case.dtype], History(), []
    queries = prompts(case.images, case.side, case.kept, case.batch, ragged=True)
    new = TokenMap.identity(case.batch, case.new, device)
    for tokens in (TokenMap(queries.group.to(device), queries.kept.to(device), queries.width, queries.padded), new):
        step = plan(tokens, history, case.shape, dtype, case.unmerge)
        query, key, value = tensors(
            case.shape, case.batch, step.queries.width, history.entries, dtype, torch.device(device)
        )
        scaling = case.shape.size**-0.5
        expected = formula(query, key, value, step, scaling, case.window)
        output = BACKENDS["triton"](query, key, value, step, scaling, case.window)
        differences.append(float((output.double() - expected).norm() / expected.norm()))
    return differences[0], differences[1]


def _refuse_if_wrong() -> list[dict[str, Any]]:
    """Every case in a process of its own, so that kernels compile side by side; they stay in Triton's cache.

    Raises:
        SystemExit: a case is further from the formula than its type allows.
    """
    checked = []
    with ProcessPoolExecutor(8, multiprocessing.get_context("spawn")) as pool:
        for case, (first, after) in zip(CASES, pool.map(errors, CASES), strict=True):
            checked.append(asdict(case) | {"prefill_error": first, "decode_error": after})
            print(f"{case.shape} {case.dtype} window={case.window} {case.unmerge}: {first:.1e} {after:.1e}", flush=True)
    wrong = [case for case in checked if not max(case["prefill_error"], case["decode_error"]) < ALLOWED[case["dtype"]]]
    if wrong:
        raise SystemExit(f"nothing is timed: {len(wrong)} of {len(checked)} cases differ from the formula: {wrong}")
    return checked


def _ways(cell: Cell, device: torch.device, *, decoding: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each way with a function that computes one layer's attention."""
    dtype, shape, scaling = torch.bfloat16, cell.shape, cell.shape.size**-0.5
    merged, history = prompts(cell.images, cell.side, cell.kept, cell.batch), History()
    merged = TokenMap(merged.group.to(device), merged.kept.to(device), merged.width)
    step = plan(merged, history, shape, dtype)
    if decoding:
        step = plan(TokenMap.identity(cell.batch, 1, device), history, shape, dtype)
    seen, new, stored = step.keys.shape[1], step.queries.width, history.entries
    grouped = shape.heads != shape.key_heads

    def plain(count: int, asked: int) -> Callable[[], Tensor]:
        query, key, value = tensors(shape, cell.batch, asked, count, dtype, device)
        cos, sin = (
            x.to(dtype).expand(cell.batch, -1, -1) for x in turn(torch.arange(count, device=device)[None], shape.size)
        )

        def attend() -> Tensor:
            q = rotate(query, cos[:, -asked:], sin[:, -asked:])
            k = key if decoding else rotate(key, cos, sin)
            out = scaled_dot_product_attention(q, k, value, is_causal=not decoding, scale=scaling, enable_gqa=grouped)
            return out.transpose(1, 2)

        return attend

    yield "untouched", plain(seen, step.queries.tokens)
    yield "floor", plain(stored, new)
    query, key, value = tensors(shape, cell.batch, new, stored, dtype, device)
    for backend in ("triton", "sdpa"):
        yield backend, lambda backend=backend: BACKENDS[backend](query, key, value, step, scaling)
    if not decoding:
        one = plan(merged, History(), shape, dtype, "representative")
        for backend in ("triton", "sdpa"):
            name = f"{backend}, representative"
            yield name, lambda backend=backend: BACKENDS[backend](query, key, value, one, scaling)
        group = step.queries.group[:, None, :, None]
        cos, sin = (
            x.to(dtype).expand(cell.batch, -1, -1) for x in turn(torch.arange(seen, device=device)[None], shape.size)
        )

        def authors() -> Tensor:
            q, k, v = (x.gather(2, group.expand(-1, x.shape[1], -1, shape.size)) for x in (query, key, value))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
            return step.queries.average(out.transpose(1, 2))

        yield "authors", authors


def _graphed(attend: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """The GPU's work alone, without the time to launch it; warmed up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            attend()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    return graph


def _timed_ms(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _measure(cell: Cell, device: torch.device, *, decoding: bool) -> dict[str, Any]:
    """Medians of interleaved runs: `gpu_ms` of the GPU's work alone, `ms` with its launches; `bytes` that one run takes
    at its peak, beside the queries, keys and values that it is given."""
    ways = dict(_ways(cell, device, decoding=decoding))
    times: dict[str, dict[str, list[float]]] = {}
    peaks, graphs = {}, {}
    for name, attend in ways.items():
        attend()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        attend()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - before
        graphs[name] = _graphed(attend)
        times[name] = {"gpu_ms": [], "ms": []}
    stop = monotonic() + SECONDS
    for repeat in range(REPEATS):
        if repeat > 2 and monotonic() > stop:
            break
        for name, attend in ways.items():
            times[name]["gpu_ms"].append(_timed_ms(graphs[name].replay))
            times[name]["ms"].append(_timed_ms(attend))
    return {
        name: {kind: median(values) for kind, values in kinds.items()}
        | {"bytes": peaks[name], "repeats": len(kinds["ms"])}
        for name, kinds in times.items()
    }


def _too_large(cell: Cell) -> bool:
    tokens = cell.images * cell.side**2 + 2 * TEXT
    written = 10 * cell.batch * tokens * _bytes_per_token(cell.shape)
    return written > TOO_MUCH_BYTES or cell.batch * tokens**2 * cell.shape.heads > TOO_MANY_LOGITS


def _bytes_per_token(shape: Shape) -> int:
    """Of queries, keys and values in bfloat16."""
    return (shape.heads + 2 * shape.key_heads) * shape.size * 2


def _sweep(device: torch.device) -> Iterator[dict[str, Any]]:
    """Prefill of 7.3k tokens with every tiling that fits."""
    chosen = [
        Tiles(rows, width, sizes, warps, stages)
        for rows, width, sizes, warps, stages in itertools.product(
            (64, 128), (32, 64, 128), (1, 3, 4), (4, 8), (1, 2, 3)
        )
        if width >> (sizes - 1) >= 16 and not (rows == 128 and warps == 4)
    ]
    for shape in (QWEN, LLAMA):
        cell = Cell(shape, 10, 27, 1021, 1)
        with ProcessPoolExecutor(12, multiprocessing.get_context("spawn")) as pool:
            fits = list(pool.map(_runs, itertools.repeat(cell), chosen))
        for tiles, why in zip(chosen, fits, strict=True):
            row = asdict(shape) | asdict(tiles)
            if why:
                yield row | {"why": why}
            else:
                attend = _tiled(cell, tiles, device)  # holds the tensors that the graph replays on
                graph = _graphed(attend)
                yield row | {"gpu_ms": median(_timed_ms(graph.replay) for _ in range(10))}


def _tiled(cell: Cell, tiles: Tiles, device: torch.device) -> Callable[[], None]:
    merged = prompts(cell.images, cell.side, cell.kept, cell.batch)
    merged = TokenMap(merged.group.to(device), merged.kept.to(device), merged.width)
    history = History()
    step = plan(merged, history, cell.shape, torch.bfloat16)
    query, key, value = tensors(cell.shape, cell.batch, merged.width, history.entries, torch.bfloat16, device)
    return prefill(query, key, value, step, cell.shape.size**-0.5, None, tiles)[1].run


def _runs(cell: Cell, tiles: Tiles) -> str:
    """Compile and run it once; why it cannot, or nothing."""
    try:
        _tiled(cell, tiles, torch.device("cuda"))()
        torch.cuda.synchronize()
    except Exception as error:  # of the compiler or the driver: which tiles fit is what is asked
        return f"{type(error).__name__}: {error}"[:200]
    return ""


@torch.inference_mode()
def main(sweep: Annotated[bool, typer.Option(help="Time the prefill kernel with many tiles instead.")] = False) -> None:
    """Check, measure, and write the result file after every cell."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "this measures a GPU and finds none; python -m benchmarks.kernel_resources shows what the kernels take."
        )
    device = torch.device("cuda")
    checked = _refuse_if_wrong()
    rows: list[dict[str, Any]] = []
    if sweep:
        for row in _sweep(device):
            rows.append(row)
            print(row, flush=True)
            record.write("gpu_attention_tiles", {"checked": checked, "rows": rows})
        return
    record.write("gpu_attention", {"checked": checked, "rows": rows})
    for cell in CELLS:
        if _too_large(cell):
            continue
        for part in ("prefill", "decode"):
            row = asdict(cell) | {"tokens": cell.images * cell.side**2 + 2 * TEXT, "part": part}
            row["given_bytes"] = cell.batch * (cell.kept + 2 * TEXT) * _bytes_per_token(cell.shape)
            row |= {"ways": _measure(cell, device, decoding=part == "decode")}
            rows.append(row)
            times = ", ".join(f"{name} {measured['gpu_ms']:.3f}" for name, measured in row["ways"].items())
            print(f"{cell.shape} {row['tokens']} tokens x {cell.batch}, {part}: {times} ms", flush=True)
            record.write("gpu_attention", {"checked": checked, "rows": rows})
        torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)
