"""Virtual token unmerging in Triton: keys and values are read merged, expanded and rotated in registers, and weights of
keys that share a value are added before they meet it. Expanded queries, keys or values never reach memory.

`attend` has the contract of every backend. It computes on a GPU, or on the CPU where Triton interprets (set
TRITON_INTERPRET=1 before Triton is imported); it has no backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dymu.unmerging.backends import LARGEST, sdpa
from dymu.unmerging.backends.triton import kernels
from dymu.unmerging.backends.triton.tables import key_tiles, query_tiles, sorted_keys
from dymu.unmerging.history import pad_turns
from dymu.unmerging.step import Step

LOG2E = 1.4426950408889634
FEW_QUERIES = 16
"""Up to so many virtual queries are a decoding step, whose work is split over the keys, if `decode_rows` holds them."""
INTERPRETED = not isinstance(kernels.prefill, triton.runtime.JITFunction)
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
"""What it computes in. Sums are float32 in all of them, but where prefill averages, each row is rounded to the tensors'
type before its group is summed. Triton's interpreter cannot multiply bfloat16 matrices."""


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work: rows of queries and columns of keys at a time, and chunks of how many sizes (1, 2, 4,
    ...) the virtual keys of an entry are cut into."""

    rows: int
    width: int
    sizes: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it is called with."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Step,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """See `dymu.unmerging.backends.reference.attend`. Where logits are capped, tokens see later ones, distances
    count or turned keys are kept, torch does it.

    Raises:
        ValueError: the tensors are on a device or of a type that it does not compute on, or need gradients.
    """
    _refuse(query, key, value)
    if not (kept is None and step.block is None and step.distances is None and softcap is None):
        return sdpa.attend(query, key, value, step, scaling, window, softcap, kept)
    if window is not None and window >= step.length:
        window = None
    if step.channels is not None:
        query, key = query[..., step.channels], key[..., step.channels]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    with torch.cuda.device_of(query):
        if not decodes(query, key, step):
            out, launch = prefill(query, key, value, step, scaling, window)
            launch.run()
            return out.to(query.dtype)
        out, split, combine = decode(query, key, value, step, scaling, window)
        split.run()
        combine.run()
    return step.average(out)


def _refuse(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dtype not in DTYPES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"the triton backend computes in {kinds}, not in {str(query.dtype).removeprefix('torch.')}; "
            "choose backend='sdpa'."
        )
    if query.shape[-1] > LARGEST:
        raise ValueError(
            f"the triton backend was tried on heads of up to {LARGEST} channels, not on {query.shape[-1]}; choose "
            "backend='sdpa'."
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ValueError(
            "the triton backend has no backward pass; choose backend='sdpa' to train, or run under torch.no_grad()."
        )
    if query.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "the triton backend computes on a GPU, but this model is on the CPU; choose backend='sdpa', or to check "
            "results slowly set TRITON_INTERPRET=1 before Triton is imported."
        )


def decodes(query: Tensor, key: Tensor, step: Step) -> bool:
    """Whether the queries are few enough to split the work over the keys; more are prefilled."""
    new, shared = step.queries.tokens, query.shape[1] // key.shape[1]
    return new <= FEW_QUERIES and new * shared <= decode_rows(query.shape[-1], query.dtype)


def prefill_tiles(size: int, dtype: torch.dtype) -> Tiles:
    """Tiles for many queries, by head size and type, which are what fills registers and shared memory."""
    if dtype == torch.float32:
        return Tiles(rows=32 if size <= 128 else 16, width=32, sizes=2, warps=8 if size <= 128 else 4, stages=1)
    if size <= 64:
        return Tiles(rows=128, width=64, sizes=3, warps=8, stages=3)
    if size <= 128:
        return Tiles(rows=128, width=64, sizes=3, warps=8, stages=2)
    return Tiles(rows=64, width=32, sizes=2, warps=8, stages=1)


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Step,
    scaling: float,
    window: int | None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Launch]:
    """What many queries fill, [B, Mq, H, D], float32 where they are averaged, and what is launched for it.

    Args:
        tiles: None takes `prefill_tiles`.
    """
    batch, heads, merged, size = query.shape
    tiles = tiles or prefill_tiles(size, query.dtype)
    sizes = tuple(1 << i for i in reversed(range(tiles.sizes)))
    group, keys = step.queries.group, step.keys
    rows = step.once(("triton", "query_tiles", tiles.rows), lambda: query_tiles(group, step.query_at, tiles.rows))
    columns = step.once(("triton", "key_tiles", tiles.width, sizes), lambda: key_tiles(keys, tiles.width, sizes))
    visits = step.once(("triton", "visits", tiles, window), lambda: columns.visits(rows, step.place, window))
    share = step.once(("triton", "share"), lambda: 1 / step.queries.size().clamp(min=1))
    averages = step.expands or step.queries.padded
    if averages:
        out = query.new_zeros(batch, merged, heads, size, dtype=torch.float32)
    else:
        out = query.new_empty(batch, merged, heads, size)
    arguments = {
        "out": out,
        "row_index": rows.index,
        "row_group": rows.group,
        "share": share,
        "key_index": columns.index,
        "key_slot": columns.slot,
        "visits": visits,
        "merged": merged,
        "query_tiles": rows.first.shape[1],
        "key_tiles": columns.index.shape[2],
    }
    constants = {"ROWS": tiles.rows, "WIDTH": tiles.width, "SIZES": tiles.sizes, "AVERAGE": averages}
    common, flags = _common(query, key, value, step, scaling, window)
    grid = (heads, rows.first.shape[1], batch)
    return out, Launch(kernels.prefill, grid, common | arguments, flags | constants, tiles.warps, tiles.stages)


def decode(
    query: Tensor, key: Tensor, value: Tensor, step: Step, scaling: float, window: int | None
) -> tuple[Tensor, Launch, Launch]:
    """What a few queries fill, [B, Nq, H, D], not averaged yet, and what is launched for it, in this order."""
    batch, heads, _, size = query.shape
    shared, new = heads // key.shape[1], step.queries.tokens
    rows = max(16, triton.next_power_of_2(new * shared))
    tiles = decode_tiles(rows, size, query.dtype)
    keys = step.keys
    columns = step.once(("triton", "sorted_keys", tiles.width), lambda: sorted_keys(keys, tiles.width))
    total = columns.index.shape[2]
    splits = _splits(batch * key.shape[1], total, query.device)
    common, flags = _common(query, key, value, step, scaling, window)
    tops, totals = query.new_empty(2, batch, key.shape[1], splits, rows, dtype=torch.float32)
    parts = query.new_empty(batch, key.shape[1], splits, rows, 2 * flags["HALF"], dtype=torch.float32)
    out = query.new_empty(batch, new, heads, size)
    partial = {"tops": tops, "totals": totals, "parts": parts}
    arguments = {
        "row_group": step.queries.group.contiguous(),
        "row_at": step.once(("triton", "at"), lambda: step.query_at.expand(batch, -1).int().contiguous()),
        "key_index": columns.index,
        "key_slot": columns.slot,
        "new": new,
        "key_tiles": total,
        "tiles": triton.cdiv(total, splits),
    }
    split = Launch(
        kernels.decode,
        (splits, key.shape[1], batch),
        common | partial | arguments,
        flags | {"ROWS": rows, "WIDTH": tiles.width},
        tiles.warps,
        tiles.stages,
    )
    shape = {"SHARED": shared, "SIZE": size, "HALF": flags["HALF"], "ROWS": rows, "SPLITS": splits}
    return out, split, Launch(kernels.combine, (heads, new, batch), partial | {"out": out}, shape)


def _turns(step: Step, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, Nk, D / 2] of the turns of all virtual tokens."""
    batch, seen = step.keys.shape
    turn = step.turn
    if turn is None:
        turn = torch.ones(batch, 0, size // 2, dtype=torch.complex64, device=step.keys.device)
    turn = pad_turns(turn, seen)
    return turn.real.to(dtype).contiguous(), turn.imag.to(dtype).contiguous()


def decode_rows(size: int, dtype: torch.dtype) -> int:
    """How many rows, virtual queries times the query heads of a key head, decoding takes at most: as many as an H100's
    registers hold, by what the compiler says."""
    return min(128, 8192 // (2 * _half(size))) if dtype == torch.float32 else 128


def decode_tiles(rows: int, size: int, dtype: torch.dtype) -> Tiles:
    """Tiles for few queries, which have so many rows in all; what spills least of the tried ones."""
    if dtype == torch.float32:
        held = rows * 2 * _half(size)
        narrow = size > 128 or held > 4096
        return Tiles(rows, width=16 if narrow else 32, sizes=1, warps=8 if held > 2048 else 4, stages=2)
    return Tiles(rows, width=64 if size <= 128 else 32, sizes=1, warps=4 if rows <= 32 else 8, stages=2)


def _half(size: int) -> int:
    """Half a head, as wide as a tile of it is."""
    half: int = max(16, triton.next_power_of_2(size // 2))
    return half


def _splits(programs: int, tiles: int, device: torch.device) -> int:
    """Into how many parts decoding cuts the keys: a power of two, to compile few variants, of at least two tiles each,
    until every multiprocessor has two programs."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    parts: int = min(triton.cdiv(2 * processors, programs), triton.cdiv(tiles, 2), 64)
    return 1 << max(parts - 1, 0).bit_length()


def _common(
    query: Tensor, key: Tensor, value: Tensor, step: Step, scaling: float, window: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants that both kernels have."""
    size = query.shape[-1]
    cos, sin = step.once(("triton", "angles", size, query.dtype), lambda: _turns(step, size, query.dtype))
    position = step.once(("triton", "position"), lambda: step.place.int().contiguous())
    arguments: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "cos": cos,
        "sin": sin,
        "position": position,
        "bias": cos if step.bias is None else step.bias.contiguous(),  # not read where there is none
        "turn_row": cos.stride(0),
        "turn_stride": cos.stride(1),
        "tokens": step.keys.shape[1],
        "scale": scaling * LOG2E,
        "window": window or 0,
    }
    for name, x in (("query", query), ("key", key), ("value", value)):
        for along, stride in zip(("row", "head", "stride"), x.stride(), strict=False):
            arguments[f"{name}_{along}"] = stride
    constants = {
        "SHARED": query.shape[1] // key.shape[1],
        "SIZE": size,
        "HALF": _half(size),
        "WINDOWED": window is not None,
        "BIASED": step.bias is not None,
        "PRECISION": "ieee",
    }
    return arguments, constants
