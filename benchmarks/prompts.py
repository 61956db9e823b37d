"""Prompts for benchmarks of one layer's attention: merged images between text, and random queries, keys and values."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from dymu.choices import Unmerge
from dymu.token_map import TokenMap
from dymu.unmerging import History, NewTokens, Step, plan_step
from dymu.unmerging.virtual import as_phase

LARGEST_GROUP, FAR_SHARE, TEXT = 64, 0.02, 32
"""Tokens of a connected group; share of merges that join groups from anywhere; text tokens before and behind."""
BASE = 10_000.0


@dataclass(frozen=True)
class Shape:
    """Query heads, key heads and the size of a head."""

    heads: int
    key_heads: int
    size: int


QWEN, LLAMA = Shape(28, 4, 128), Shape(32, 32, 128)
SIZES = [(1, 24, 89), (1, 24, 195), (4, 27, 408), (10, 27, 1021), (41, 27, 4185)]
"""Images, their side, and tokens kept: LLaVA-1.5 at two budgets, and 14 % of 2.9k, 7.3k and 30k tokens."""


def blobs(images: int, side: int, kept: int, seed: int) -> list[int]:
    """Which of `kept` groups each token of `images` grids is in: groups grow over neighbouring cells at random, so most
    are small, few are large, and some reach far."""
    chance = random.Random(seed)
    parent = list(range(images * side * side))
    size = [1] * len(parent)

    def root(cell: int) -> int:
        while parent[cell] != cell:
            parent[cell] = parent[parent[cell]]
            cell = parent[cell]
        return cell

    def join(a: int, b: int) -> bool:
        a, b = root(a), root(b)
        if a != b:
            parent[a] = b
            size[b] += size[a]
        return a != b

    groups = len(parent)
    for _ in range(int(FAR_SHARE * (groups - kept))):
        groups -= join(chance.randrange(len(parent)), chance.randrange(len(parent)))
    edges = [(n, n + 1) for n in range(len(parent)) if (n + 1) % side]
    edges += [(n, n + side) for n in range(len(parent)) if n // side % side < side - 1]
    chance.shuffle(edges)
    for a, b in edges:
        if groups > kept and size[root(a)] + size[root(b)] <= LARGEST_GROUP:
            groups -= join(a, b)
    while groups > kept:
        groups -= join(chance.randrange(len(parent)), chance.randrange(len(parent)))
    number: dict[int, int] = {}
    return [number.setdefault(root(n), len(number)) for n in range(len(parent))]


def prompts(images: int, side: int, kept: int, batch: int, *, ragged: bool = False) -> TokenMap:
    """Prompts with text, images and text; each another map. Ragged: the first row lacks its first ten tokens."""
    rows = []
    for row in range(batch):
        image = [TEXT + group for group in blobs(images, side, kept, seed=row)]
        rows.append([*range(TEXT), *image, *range(TEXT + kept, 2 * TEXT + kept)])
    group = torch.tensor(rows)
    count = torch.full((batch,), 2 * TEXT + kept)
    if ragged:
        group[0] = torch.where(group[0] < 10, -1, group[0] - 10)
        count[0] -= 10
    return TokenMap(group, count, int(count.max()), ragged)


def turn(positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rotary angles of positions [B, N]: cosines and sines [B, N, size]."""
    powers = torch.arange(0, size, 2, device=positions.device) / size
    angle = positions[..., None].double() * BASE ** -powers.double()
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, N, D] as stock models do."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def plan(tokens: TokenMap, history: History, shape: Shape, dtype: torch.dtype, unmerge: Unmerge = "exact") -> Step:
    """The next step of a prompt, with angles in the model's type, as models make them."""
    device = tokens.group.device
    if tokens.width == tokens.tokens and not tokens.padded:
        return plan_step(
            NewTokens.identity(tokens.batch, tokens.tokens, device), history, unmerge=unmerge, backend="triton"
        )
    positions = torch.arange(history.length, history.length + tokens.tokens, device=device).expand(tokens.batch, -1)
    new = NewTokens.of(tokens, positions, unmerge)
    cos, sin = turn(positions, shape.size)
    turned = new.turn(as_phase(cos.to(dtype), sin.to(dtype)))
    return plan_step(new, history, unmerge=unmerge, backend="triton", turn=turned)


def tensors(shape: Shape, batch: int, new: int, stored: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random queries, keys and values, laid out as models project them."""
    query = torch.randn(batch, new, shape.heads, shape.size, device=device)
    key, value = torch.randn(2, batch, stored, shape.key_heads, shape.size, device=device)
    return [x.transpose(1, 2).to(dtype) for x in (query, key, value)]
