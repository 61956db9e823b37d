"""Virtual token unmerging on torch's scaled_dot_product_attention.

Memory grows with the prompt, not with its square: torch's kernels form no logits of all pairs, and where a mask is
needed it is formed for a few queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dymu.token_map import at_least_float32
from dymu.unmerging import near_far
from dymu.unmerging.step import Step
from dymu.unmerging.virtual import as_pairs, interleaved, rows_behind, side_by_side, virtual_keys, virtual_values

Mask = Callable[[int, int], Tensor]
"""The mask of the queries from a start to an end, and the keys that any of them sees."""

FEW = 8
"""Up to so many virtual queries, weights are summed over each group instead of copying the group's value."""

MASK = 128
"""Queries whose mask is formed at once. A fixed number, so that masks grow with the keys as the keys themselves do, and
stay small beside the queries."""

PIECE, SHORT = 64, 1024
"""Queries at a time, and the longest prompts that gain by it: a fifth at 640 tokens, nothing from 1,536 on."""


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
    """See `dymu.unmerging.backends.reference.attend`."""
    if kept is not None and step.queries.tokens <= FEW and softcap is None and _counts_calls(query):
        return step.average(_attend_expanded(query, kept, value, step, scaling, window))
    if step.turned and step.queries.tokens <= FEW:
        return step.average(_attend_few(query, key, value, step, scaling, window, softcap, kept))
    if near_far.applies(step, window, softcap):
        return step.average(_attend_near_far(query, key, value, step, scaling))
    return step.average(_attend_many(query, key, value, step, scaling, window, softcap))


def _turned_keys(key: Tensor, step: Step) -> Tensor:
    """The keys [B, Hkv, T, D] that turn, from the entries [B, Hkv, M, D]; interleaved."""
    key = key[:, :, : step.reach]
    return virtual_keys(key, _rows_of_turned(step, key), step.turn, step.channels)


def _turned_values(value: Tensor, step: Step) -> Tensor:
    """The values [B, Hkv, T, D] of these."""
    value = value[:, :, : step.reach]
    return virtual_values(value, _rows_of_turned(step, value))


def _attend_many(
    query: Tensor, key: Tensor, value: Tensor, step: Step, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """Attention between virtual tokens, [B, Nq, H, D]."""
    query = _virtual_queries(query, step)
    if step.turned:
        rest, values = interleaved(as_pairs(key, step.channels), key.dtype), value
        key, value = _turned_keys(key, step), _turned_values(value, step)
        if step.turned < step.keys.shape[1]:
            key, value = torch.cat((key, rest), 2), torch.cat((value, values), 2)
    causal = step.causal(window) and softcap is None
    if softcap is not None or not _heads_may_differ(query, causal):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if softcap is None:
        attend = partial(scaled_dot_product_attention, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    else:
        attend = partial(_capped, scaling=scaling, softcap=softcap)
    if causal:
        return _attend_causal(attend, query, key, value)
    if torch.compiler.is_compiling() and step.queries.tokens > MASK:
        attended: Tensor = _attend_masked_uncompiled(attend, query, key, value, step, window)
        return attended
    return _attend_masked(attend, query, key, value, step, window)


def _attend_near_far(query: Tensor, key: Tensor, value: Tensor, step: Step, scaling: float) -> Tensor:
    """See `dymu.unmerging.near_far`; [B, Nq, H, D]."""
    merged, merged_values = as_pairs(key, step.channels), value
    query = _virtual_queries(query, step)
    key, value = _turned_keys(key, step), _turned_values(value, step)
    rows = []
    for row in range(len(query)):
        attended = []
        for piece in step.once(("pieces", row), partial(near_far.pieces, step, row)):
            far = merged[row : row + 1, :, piece.far]
            far = interleaved(far if piece.turn is None else far * piece.turn, key.dtype)
            near = slice(piece.near, piece.seen)
            part = scaled_dot_product_attention(
                query[row : row + 1, :, piece.start : piece.end],
                torch.cat((far, key[row : row + 1, :, near]), 2),
                torch.cat((merged_values[row : row + 1, :, piece.far], value[row : row + 1, :, near]), 2),
                attn_mask=piece.bias.to(query.dtype),
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            attended.append(part.transpose(1, 2))
        rows.append(torch.cat(attended, 1))
    return torch.cat(rows)


def _attend_masked(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, step: Step, window: int | None
) -> Tensor:
    """Attention that a mask must limit."""

    def mask(start: int, end: int | None) -> Tensor:
        mask = step.mask(window, start, end)
        return mask.to(query.dtype) if mask.is_floating_point() else mask

    if step.queries.tokens <= MASK:
        return attend(query, key, value, attn_mask=step.once((window, "mask"), lambda: mask(0, None))).transpose(1, 2)
    # Masks too large to keep for the other layers.
    return _attend_in_pieces(attend, query, key, value, MASK, mask, step.sees)


def _capped(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, scaling: float, softcap: float) -> Tensor:
    """Attention whose logits are at most `softcap` before the mask."""
    logits = softcap * torch.tanh(query @ key.mT * (scaling / softcap))
    return (at_least_float32(logits) + _added(attn_mask)).softmax(-1).to(query.dtype) @ value


# Compiled, its loop would be unrolled, and compiled again for other lengths.
_attend_masked_uncompiled = torch.compiler.disable(_attend_masked)


def _attend_causal(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention between equally many queries and keys, or of one query to all keys.

    torch's kernel for CPUs computes whole blocks of 512 keys and hides what comes after a query, so there short prompts
    go through it a few queries at a time.
    """
    tokens = query.shape[2]
    if tokens == 1:
        return attend(query, key, value).transpose(1, 2)
    if query.device.type != "cpu" or not PIECE < tokens <= SHORT or torch.compiler.is_compiling():
        return attend(query, key, value, is_causal=True).transpose(1, 2)
    # Slices of the mask's lower right corner hide the right keys from every piece.
    mask = query.new_zeros(PIECE, tokens)
    mask[:, -PIECE:].masked_fill_(mask.new_ones(PIECE, PIECE, dtype=torch.bool).triu(1), -torch.inf)
    return _attend_in_pieces(
        attend,
        query,
        key,
        value,
        PIECE,
        lambda start, end: mask[start - end :, tokens - end :],
        lambda _start, end: end,
    )


def _attend_in_pieces(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    piece: int,
    mask: Mask,
    sees: Callable[[int, int], int],
) -> Tensor:
    """Attention of `piece` queries at a time, with the keys that any of them sees."""
    tokens = query.shape[2]
    attended = []
    for start in range(0, tokens, piece):
        end = min(start + piece, tokens)
        last = sees(start, end)
        part = attend(query[:, :, start:end], key[:, :, :last], value[:, :, :last], attn_mask=mask(start, end))
        attended.append(part.transpose(1, 2))
    return torch.cat(attended, 1)


def _attend_few(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Step,
    scaling: float,
    window: int | None,
    softcap: float | None,
    kept: Tensor | None,
) -> Tensor:
    """The same of a few queries, where the weights on all copies of one value are summed before they meet it."""
    batch, shared, entries, size = key.shape
    tokens, turned, direct = step.queries.tokens, step.turned, step.keys.shape[1] - step.turned
    query = at_least_float32(query)
    none = query.new_empty(1, 1, 1)

    def logits_of(query: Tensor, key: Tensor) -> Tensor:
        query = query.reshape(batch * shared, -1, size)
        return torch.baddbmm(none, query, key.flatten(0, 1).mT, beta=0, alpha=scaling)

    if kept is not None:
        logits = logits_of(query, at_least_float32(kept))
    else:
        key = at_least_float32(key)
        logits = logits_of(_virtual_queries(query, step), _turned_keys(key, step))
        if direct:
            logits = torch.cat((logits, logits_of(query, key)), 2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if (mask := _mask_of_few(step, window)) is not None:
        logits = (logits.view(batch, -1, tokens, turned + direct) + mask).view_as(logits)
    weights = logits.softmax(-1)
    groups = weights.shape[1]

    def behind() -> Tensor:
        slot = step.keys[:, None, None, :turned].clamp(min=0)
        return slot.expand(batch, shared, groups, turned).flatten(0, 1)

    summed = weights[..., turned:] if direct else weights.new_zeros(*weights.shape[:2], entries)
    summed = summed.scatter_add(2, step.once_for_all(("behind", shared, groups), behind), weights[..., :turned])
    return torch.bmm(summed.to(value.dtype), value.flatten(0, 1)).view(batch, -1, tokens, size).transpose(1, 2)


def _counts_calls(query: Tensor) -> bool:
    """Whether a token costs by how many operations it takes: on a GPU in half precision, which waits for them."""
    return query.is_cuda and query.dtype.itemsize == 2


def _attend_expanded(
    query: Tensor, kept: Tensor, value: Tensor, step: Step, scaling: float, window: int | None
) -> Tensor:
    """The same where all keys are kept, in few operations: values are copied to every token, and torch attends."""
    shared, size = value.shape[1], value.shape[-1]

    def behind() -> Tensor:
        return step.keys.clamp(min=0)[:, None].expand(-1, shared, -1).flatten(0, 1)[..., None]

    rows = step.once(("values", shared), behind).expand(-1, -1, size)
    mask = _mask_of_few(step, window)
    attended = scaled_dot_product_attention(
        query,
        kept,
        value.flatten(0, 1).gather(1, rows).view_as(kept),
        attn_mask=None if mask is None else step.once((window, "mask", query.dtype), lambda: mask.to(query.dtype)),
        scale=scaling,
        enable_gqa=query.shape[1] != shared,
    )
    return attended.transpose(1, 2)


def _mask_of_few(step: Step, window: int | None) -> Tensor | None:
    """float32 [B or 1, 1, Nq or 1, Nk], to be added to logits; None: nothing has to be."""
    one = step.queries.tokens == 1
    if one and step.causal(window):
        return None
    if one and step.absent is not None and not step.queries.padded and step.sees_all(window):
        return step.absent[:, None, None]
    return step.once((window, "added"), lambda: _added(step.mask(window)))


def _heads_may_differ(query: Tensor, causal: bool) -> bool:
    """Whether torch has a kernel for fewer key heads than query heads; without one it forms the logits of all pairs.

    On a GPU only FlashAttention takes them, and that takes neither masks nor float32 nor large heads.
    """
    if query.device.type == "cpu" or query.shape[2] <= FEW:
        return True
    return causal and query.dtype.itemsize == 2 and query.shape[-1] <= 256


def _virtual_queries(query: Tensor, step: Step) -> Tensor:
    """[B, H, Nq, D], interleaved where keys turn."""
    rows = None
    if step.expands:
        rows = step.once("query rows", lambda: rows_behind(step.queries.group, step.queries.width))
    if not step.turned:
        return query if rows is None else _rows_of(query.transpose(1, 2), rows).transpose(1, 2)
    if rows is None:
        size, channels = query.shape[-1], step.channels
        _, order = step.once_for_all(  # the channels are kept as well, so that no others get their identity
            ("side by side", size, id(channels)), lambda: (channels, side_by_side(size, channels).to(query.device))
        )
        return query.index_select(-1, order)
    pairs = _rows_of(as_pairs(query.transpose(1, 2), step.channels), rows)
    if step.query_turn is not None:
        pairs = pairs.mul_(step.query_turn[:, :, None])
    return interleaved(pairs, query.dtype).transpose(1, 2)


def _rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """[B, N, ...]: the rows of x [B, M, ...], flattened."""
    chosen: Tensor = x.flatten(0, 1).index_select(0, rows)
    return chosen.view(len(x), -1, *x.shape[2:])


def _rows_of_turned(step: Step, key: Tensor) -> Tensor:
    heads, stored = key.shape[1:3]
    return step.once_for_all(("turned rows", heads), lambda: rows_behind(step.keys[:, : step.turned], stored, heads))


def _added(mask: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
