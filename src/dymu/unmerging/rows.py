"""Attention weights of a few queries, which backends never form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dymu.token_map import TokenMap, at_least_float32
from dymu.unmerging.step import Step
from dymu.unmerging.virtual import as_pairs, interleaved, rows_behind, virtual_keys


def attention_rows(
    query: Tensor,
    key: Tensor,
    step: Step,
    row: int,
    asked: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """How much some merged tokens of one prompt attend to each cache entry.

    Args:
        query: [B, H, Mq, D], key: [B, Hkv, entries, D], rotated to the positions of representatives.
        step: of the layer.
        row: of the batch.
        asked: int64 [R], merged queries.
        scaling, window, softcap: see `dymu.unmerging.backends.reference.attend`.

    Returns:
        float32 or wider [H, R, entries], each summing to 1: of all tokens that an entry stands for together, the mean
        over the tokens that a query stands for.
    """
    turns = step.expands  # else queries stand where the model has rotated them to
    step = _of_row(step, row).only(asked[None])
    query, key = (at_least_float32(x[row : row + 1]) for x in (query, key))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    heads, entries = key.shape[1:3]
    turned = step.turned
    rows = rows_behind(step.queries.group, step.queries.width)
    queries = as_pairs(query.transpose(1, 2).flatten(0, 1)[rows][None], step.channels)
    if turns and step.query_turn is not None:
        queries = queries * step.query_turn[:, :, None]
    keys = interleaved(as_pairs(key, step.channels), key.dtype)
    if turned:
        behind = rows_behind(step.keys[:, :turned], entries, heads)
        ahead = virtual_keys(key, behind, step.turn, step.channels)
        keys = torch.cat((ahead, keys), 2) if turned < step.keys.shape[1] else ahead
    logits = interleaved(queries, key.dtype).transpose(1, 2) @ keys.mT * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    mask = step.mask(window)
    logits = logits + mask if mask.is_floating_point() else logits.masked_fill(~mask, -torch.inf)
    weights = step.queries.average(logits.softmax(-1).transpose(1, 2))[0, asked]
    to = step.keys[0].clamp(min=0).expand_as(weights)
    return weights.new_zeros(*weights.shape[:2], entries).scatter_add(2, to, weights).transpose(0, 1)


def _of_row(step: Step, row: int) -> Step:
    """The step of one prompt of a batch."""

    def cut(x: Any) -> Any:
        return x[row : row + 1] if isinstance(x, Tensor) and x.ndim and len(x) > 1 else x

    names = ("keys", "place", "stands", "turn", "at", "absent", "bias", "first_bias", "distances", "block")
    queries = step.queries
    return replace(
        step,
        queries=TokenMap(cut(queries.group), cut(queries.kept), queries.width, queries.padded),
        merged=None,
        padded=True,
        memo={},
        **{name: cut(getattr(step, name)) for name in names},
    )
