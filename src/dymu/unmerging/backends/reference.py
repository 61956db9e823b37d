"""Virtual token unmerging written straight from the formula, one head and one query at a time. Slow, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from dymu.unmerging import near_far
from dymu.unmerging.step import Step


def _turned(vector: Tensor, turn: Tensor | None) -> Tensor:
    if turn is None:
        return vector
    half = vector.shape[0] // 2
    turned = vector.clone()
    for i in range(half):
        turned[i] = vector[i] * turn[i].real - vector[i + half] * turn[i].imag
        turned[i + half] = vector[i + half] * turn[i].real + vector[i] * turn[i].imag
    return turned


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
    """Attention over virtual tokens (paper section 3.2): expand, turn, attend causally, average over each group.

    Args:
        query: [B, H, Mq, D], rotated to the positions of representatives.
        key: [B, Hkv, entries, D], likewise; H is a multiple of Hkv.
        value: [B, Hkv, entries, D].
        step: the virtual tokens.
        scaling: factor on the logits.
        window: sliding window in virtual tokens, or None.
        softcap: what logits approach, c tanh(x / c), before the bias; None: they are as they are.
        kept: [B, Hkv, Nk, D], the virtual keys, turned and in the usual order of channels; None: they are not kept. A
            backend need not read them.

    Returns:
        [B, Mq, H, D]; 0 for merged tokens past a row's end.
    """
    batch, heads, _, size = query.shape
    shared = heads // key.shape[1]
    if step.channels is not None:
        query, key = query[..., step.channels], key[..., step.channels]
    tokens = step.queries.tokens
    pieces = [near_far.pieces(step, row) for row in range(batch)] if near_far.applies(step, window, softcap) else []
    at = step.query_at.expand(batch, tokens)
    total = query.new_zeros(batch, step.queries.width, heads, size)
    count = query.new_zeros(batch, step.queries.width)
    for b in range(batch):
        visible = [j for j in range(step.keys.shape[1]) if step.keys[b, j] >= 0]
        for n in range(tokens):
            if step.queries.group[b, n] >= 0:
                count[b, step.queries.group[b, n]] += 1
        for h in range(heads):
            entry = step.keys[b]
            virtual_keys = {j: _turned(key[b, h // shared, entry[j]], _turn(step, b, j)) for j in visible}
            for n in range(tokens):
                merged = step.queries.group[b, n]
                if merged < 0:
                    continue
                virtual_query = query[b, h, merged]
                if step.expands:
                    virtual_query = _turned(virtual_query, _turn(step, b, int(at[b, n])))
                seen_keys = [j for j in visible if _sees(step, b, int(at[b, n]), j, window)]
                seen = [(virtual_keys[j], entry[j], _bias(step, b, int(at[b, n]), j)) for j in seen_keys]
                if pieces:
                    piece = next(piece for piece in pieces[b] if piece.start <= n < piece.end)
                    turns = [None] * len(piece.far) if piece.turn is None else piece.turn
                    numbers = piece.bias[n - piece.start]
                    seen = [pair for j, pair in zip(seen_keys, seen, strict=True) if j >= piece.near]
                    for far, turn, number in zip(piece.far, turns, numbers, strict=False):
                        seen.append((_turned(key[b, h // shared, far], turn), far, number))
                logits = torch.stack([virtual_query @ virtual_key * scaling for virtual_key, _, _ in seen])
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                weights = (logits + torch.tensor([bias for _, _, bias in seen]).to(logits)).softmax(0)
                total[b, merged, h] += sum(
                    weight * value[b, h // shared, behind] for weight, (_, behind, _) in zip(weights, seen, strict=True)
                )
    return total / count.clamp(min=1)[:, :, None, None]


def _turn(step: Step, row: int, key: int) -> Tensor | None:
    return step.turn[row, key] if step.turn is not None and key < step.turned else None


def _bias(step: Step, row: int, at: int, key: int) -> float:
    if step.bias is None:
        return 0.0
    if step.distances is None:
        return float(step.bias[row, key])
    apart = int(abs(step.stands[row, at] - step.stands[row, key]))
    return float(step.bias[row, key] + step.distances[row, apart])


def _sees(step: Step, row: int, at: int, key: int, window: int | None) -> bool:
    blocks = None if step.block is None else step.block[row]
    in_block = blocks is not None and bool(blocks[at] >= 0) and bool(blocks[at] == blocks[key])
    near = window is None or bool(step.place[row, at] - step.place[row, key] < window)
    return (key <= at or in_block) and (near or (in_block and step.beyond_window))
