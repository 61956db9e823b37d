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
from dymu.unmerging.step import Step
from dymu.unmerging.virtual import rows_behind, virtual_keys, virtual_queries, virtual_values

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
) -> Tensor:
    """See `dymu.unmerging.backends.reference.attend`."""
    few = step.expand_keys and step.queries.tokens <= FEW
    attended = (_attend_few if few else _attend_many)(query, key, value, step, scaling, window, softcap)
    return step.queries.average(attended) if step.expand_queries else attended


def _attend_many(
    query: Tensor, key: Tensor, value: Tensor, step: Step, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """Attention between expanded tokens, [B, Nq, H, D]."""
    query = virtual_queries(query, _query_rows(step), step.query_phase)
    if not step.rotated:
        rows = _key_rows(step, key) if step.expand_keys else None
        key = virtual_keys(key, rows, step.phase)
        value = value if rows is None else virtual_values(value, rows)
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


def _attend_masked(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, step: Step, window: int | None
) -> Tensor:
    """Attention that a mask must limit."""

    def mask(start: int, end: int) -> Tensor:
        mask = step.mask(window, start, end)
        return mask.to(query.dtype) if mask.is_floating_point() else mask

    tokens = step.queries.tokens
    if tokens <= MASK:
        return attend(query, key, value, attn_mask=step.once((window, "mask"), lambda: mask(0, tokens))).transpose(1, 2)
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
    query: Tensor, key: Tensor, value: Tensor, step: Step, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """The same of a few queries, where the weights on all copies of one value are summed before they meet it."""
    batch, shared, entries, size = key.shape
    tokens, seen = step.queries.tokens, step.keys.shape[1]
    query, key = at_least_float32(query), at_least_float32(key)
    phase = step.once(("scaled phase", scaling), lambda: step.query_phase * scaling)
    query = virtual_queries(query, _query_rows(step), phase).reshape(batch * shared, -1, size)
    key = virtual_keys(key, _key_rows(step, key), step.phase).flatten(0, 1)
    logits = torch.bmm(query, key.mT).view(batch, shared, -1, seen)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if tokens > 1 or not step.causal(window):
        mask = step.once((window, "added"), lambda: _added(step.mask(window)))
        logits = (logits.unflatten(2, (-1, tokens)) + mask[:, None]).flatten(2, 3)
    weights = logits.softmax(-1)
    slot = step.once("slot", lambda: step.keys.clamp(min=0)[:, None, None]).expand_as(weights)
    summed = weights.new_zeros(*weights.shape[:3], entries).scatter_add_(3, slot, weights).flatten(0, 1)
    return torch.bmm(summed.to(value.dtype), value.flatten(0, 1)).view(batch, -1, tokens, size).transpose(1, 2)


def _heads_may_differ(query: Tensor, causal: bool) -> bool:
    """Whether torch has a kernel for fewer key heads than query heads; without one it forms the logits of all pairs.

    On a GPU only FlashAttention takes them, and that takes neither masks nor float32 nor large heads.
    """
    if query.device.type == "cpu" or query.shape[2] <= FEW:
        return True
    return causal and query.dtype.itemsize == 2 and query.shape[-1] <= 256


def _query_rows(step: Step) -> Tensor | None:
    if not step.expand_queries:
        return None
    return step.once("query rows", lambda: rows_behind(step.queries.group, step.queries.width))


def _key_rows(step: Step, key: Tensor) -> Tensor:
    heads, stored = key.shape[1:3]
    return step.once(("key rows", heads), lambda: rows_behind(step.keys, stored, heads))


def _added(mask: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
