"""The kernels. Everything that says who attends to whom is read from `tables.py`'s tables, so nothing but shapes of the
model and of the tiles is compiled in.

Letters: H query heads on Hkv key heads, D head size. Each head is handled as two halves of D / 2, as rotary angles turn
the i-th of the first with the i-th of the second: a rotated product is the sum of the products of the halves. `HALF` is
D / 2 rounded up to a power of two, from 16 on, as tiles must be.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1.0e30)
"""What a largest logit starts from: finite, so that rows that see nothing stay 0 instead of becoming NaN."""
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _half(pointer, row, stride, column, SIZE: tl.constexpr, HALF: tl.constexpr):
    """Rows of half a head: [rows, HALF], 0 past SIZE / 2."""
    at = pointer + row[:, None] * stride + column[None, :]
    if SIZE == 2 * HALF:
        return tl.load(at)
    return tl.load(at, mask=(column < SIZE // 2)[None, :], other=0.0)


@triton.jit
def _rotated(pointer, row, stride, cos, sin, index, turn_stride, SIZE: tl.constexpr, HALF: tl.constexpr):
    """Both halves of rows of `pointer`, turned by the angles of their tokens in float32, in the type of the rows."""
    column = tl.arange(0, HALF)
    first = _half(pointer, row, stride, column, SIZE, HALF)
    second = _half(pointer + SIZE // 2, row, stride, column, SIZE, HALF)
    c = _half(cos, index, turn_stride, column, SIZE, HALF).to(tl.float32)
    s = _half(sin, index, turn_stride, column, SIZE, HALF).to(tl.float32)
    x, y = first.to(tl.float32), second.to(tl.float32)
    return (x * c - y * s).to(first.dtype), (y * c + x * s).to(first.dtype)


@triton.jit
def _visit(
    start, end, index, slot, key, value, cos, sin, position, bias,
    query_first, query_second, query_place, query_count, top, total, mixed,
    key_stride, value_stride, turn_stride, tokens, scale, window,
    SIZE: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr,
    WINDOWED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the key tiles from `start` to `end`, whose chunks have CHUNK tokens, with a running softmax.

    The tokens of a chunk share a value, so their weights are added before they meet it.

    Returns: each row's largest logit, sum of weights and weighted sum of values so far.
    """
    column = tl.arange(0, WIDTH)
    part = tl.arange(0, WIDTH // CHUNK)
    across = tl.arange(0, 2 * HALF)
    for tile in range(start, end):
        at = tl.load(index + tile * WIDTH + column)
        here = tl.minimum(at, tokens - 1) if MASKED else at
        entry = tl.load(slot + tile * WIDTH + column)
        first, second = _rotated(key, entry, key_stride, cos, sin, here, turn_stride, SIZE, HALF)
        logit = tl.dot(query_first, tl.trans(first), input_precision=PRECISION)
        logit = tl.dot(query_second, tl.trans(second), logit, input_precision=PRECISION) * scale
        if BIASED:
            logit += tl.load(bias + here)[None, :] * LOG2E
        if MASKED:
            seen = at[None, :] <= query_place[:, None]
            if WINDOWED:
                seen = seen & (query_count[:, None] - tl.load(position + here)[None, :] < window)
            logit = tl.where(seen, logit, float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, 1))
        fade = tl.exp2(top - new_top)
        weight = tl.exp2(logit - new_top[:, None])
        total = total * fade + tl.sum(weight, 1)
        if CHUNK > 1:
            weight = tl.sum(tl.reshape(weight, (weight.shape[0], CHUNK, WIDTH // CHUNK)), 1)
        shared = tl.load(slot + tile * WIDTH + part)
        read = value + shared[:, None] * value_stride + across[None, :]
        if SIZE == 2 * HALF:
            values = tl.load(read)
        else:
            values = tl.load(read, mask=(across < SIZE)[None, :], other=0.0)
        mixed = tl.dot(weight.to(values.dtype), values, mixed * fade[:, None], input_precision=PRECISION)
        top = new_top
    return top, total, mixed


@triton.jit(do_not_specialize=["merged", "tokens", "query_tiles", "key_tiles", "window"])
def prefill(
    query, key, value, cos, sin, out, row_index, row_group, share, key_index, key_slot, visits, position, bias,
    query_row, query_head, query_stride, key_row, key_head, key_stride, value_row, value_head, value_stride,
    turn_row, turn_stride, merged, tokens, query_tiles, key_tiles, scale, window,
    SHARED: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    SIZES: tl.constexpr, AVERAGE: tl.constexpr, WINDOWED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of virtual queries of one head against all the keys that it may see. Grid: (H, query tiles, B).

    Writes `out` [B, merged, H, D]: with AVERAGE it adds each row's share of its group's mean to float32 zeros, once per
    group and tile; else rows and merged queries are one to one. The tiles that see the most keys start first.
    """
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    row = tl.arange(0, ROWS)
    tables = (batch * query_tiles + tile) * ROWS
    at, group = tl.load(row_index + tables + row), tl.load(row_group + tables + row)
    here = tl.maximum(at, 0)
    cos += batch * turn_row
    sin += batch * turn_row
    position += batch * tokens
    bias += batch * tokens
    query += batch * query_row + head.to(tl.int64) * query_head
    key += batch * key_row + (head // SHARED).to(tl.int64) * key_head
    value += batch * value_row + (head // SHARED).to(tl.int64) * value_head
    first, second = _rotated(query, tl.maximum(group, 0), query_stride, cos, sin, here, turn_stride, SIZE, HALF)
    count = tl.load(position + here) if WINDOWED else here
    top = tl.full((ROWS,), FLOOR, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, 2 * HALF), tl.float32)
    for size in tl.static_range(SIZES):
        visit = visits + ((batch * query_tiles + tile) * SIZES + size) * 3
        start, whole, end = tl.load(visit), tl.load(visit + 1), tl.load(visit + 2)
        index = key_index + (batch * SIZES + size) * key_tiles * WIDTH
        slot = key_slot + (batch * SIZES + size) * key_tiles * WIDTH
        if not WINDOWED:
            top, total, mixed = _visit(
                start, whole, index, slot, key, value, cos, sin, position, bias,
                first, second, at, count, top, total, mixed,
                key_stride, value_stride, turn_stride, tokens, scale, window,
                SIZE, HALF, WIDTH, 2 ** (SIZES - 1 - size), False, WINDOWED, BIASED, PRECISION,
            )  # fmt: skip
        top, total, mixed = _visit(
            whole, end, index, slot, key, value, cos, sin, position, bias,
            first, second, at, count, top, total, mixed,
            key_stride, value_stride, turn_stride, tokens, scale, window,
            SIZE, HALF, WIDTH, 2 ** (SIZES - 1 - size), True, WINDOWED, BIASED, PRECISION,
        )  # fmt: skip
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    across = tl.arange(0, 2 * HALF)
    there = group >= 0
    if AVERAGE:
        before = tl.load(row_group + tables + row - 1, mask=row > 0, other=-1)
        there = there & (group != before)
        same = (group[:, None] == group[None, :]).to(first.dtype)
        mixed = tl.dot(same, mixed.to(first.dtype), input_precision=PRECISION)
        mixed *= tl.load(share + batch * merged + group, mask=there, other=0.0)[:, None]
    write = out + ((batch * merged + group)[:, None] * tl.num_programs(0) + head) * SIZE + across[None, :]
    inside = there[:, None] & (across < SIZE)[None, :]
    if AVERAGE:
        tl.atomic_add(write, mixed, mask=inside, sem="relaxed")
    else:
        tl.store(write, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["merged", "tokens", "new", "key_tiles", "tiles", "window"])
def decode(
    query, key, value, cos, sin, row_group, row_at, key_index, key_slot, position, bias, tops, totals, parts,
    query_row, query_head, query_stride, key_row, key_head, key_stride, value_row, value_head, value_stride,
    turn_row, turn_stride, tokens, new, key_tiles, tiles, scale, window,
    SHARED: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    WINDOWED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All `new` virtual queries of the heads that share one key head against `tiles` tiles of keys. Grid: (splits,
    Hkv, B). Row n * SHARED + h is the n-th query of the h-th of these heads.

    Writes the largest logit and the sum of weights, float32 [B, Hkv, splits, ROWS], and the weighted sum of values,
    [B, Hkv, splits, ROWS, 2 HALF].
    """
    split, shared, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.arange(0, ROWS)
    turn = row // SHARED
    there = turn < new
    group = tl.load(row_group + batch * new + turn, mask=there, other=0).to(tl.int32)
    at = tl.load(row_at + batch * new + turn, mask=there & (group >= 0), other=-1)
    here = tl.maximum(at, 0)
    cos += batch * turn_row
    sin += batch * turn_row
    position += batch * tokens
    bias += batch * tokens
    head = (shared * SHARED + row % SHARED).to(tl.int64)
    first, second = _rotated(
        query + batch * query_row, head * query_head + tl.maximum(group, 0) * query_stride, 1,
        cos, sin, here, turn_stride, SIZE, HALF,
    )  # fmt: skip
    count = tl.load(position + here) if WINDOWED else here
    start = split * tiles
    top, total, mixed = _visit(
        start, tl.minimum(start + tiles, key_tiles),
        key_index + batch * key_tiles * WIDTH, key_slot + batch * key_tiles * WIDTH,
        key + batch * key_row + shared.to(tl.int64) * key_head,
        value + batch * value_row + shared.to(tl.int64) * value_head,
        cos, sin, position, bias, first, second, at, count,
        tl.full((ROWS,), FLOOR, tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, 2 * HALF), tl.float32),
        key_stride, value_stride, turn_stride, tokens, scale, window,
        SIZE, HALF, WIDTH, 1, True, WINDOWED, BIASED, PRECISION,
    )  # fmt: skip
    into = ((batch * tl.num_programs(1) + shared) * tl.num_programs(0) + split) * ROWS + row
    tl.store(tops + into, top)
    tl.store(totals + into, total)
    tl.store(parts + into[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :], mixed)


@triton.jit
def combine(
    tops, totals, parts, out,
    SHARED: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Put the splits of `decode` together: `out` [B, new, H, D]; 0 for a query that sees nothing. Grid: (H, new, B)."""
    head, new, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(0)
    row = new * SHARED + head % SHARED
    split = tl.arange(0, SPLITS)
    across = tl.arange(0, 2 * HALF)
    at = ((batch * (heads // SHARED) + head // SHARED) * SPLITS + split) * ROWS + row
    top = tl.load(tops + at)
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(totals + at), 0)
    mixed = tl.sum(weight[:, None] * tl.load(parts + at[:, None] * (2 * HALF) + across[None, :]), 0)
    mixed = mixed / tl.where(total > 0, total, 1.0)
    write = out + ((batch * tl.num_programs(1) + new) * heads + head) * SIZE + across
    tl.store(write, mixed.to(out.dtype.element_ty), mask=across < SIZE)
