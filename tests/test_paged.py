"""Unmerging over pages of merged tokens against every virtual token written out, in float64."""

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dymu.serving.vllm.paged import Pages, Slots
from dymu.token_map import TokenMap
from dymu.unmerging import BACKENDS, place_leaders
from dymu.unmerging.prompt import NewTokens

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
BLOCK, HEADS, KEY_HEADS, CHANNELS = 4, 4, 2, 8
FREQUENCIES = 1.0 / 100 ** (torch.arange(0, CHANNELS, 2, dtype=torch.float64) / CHANNELS)


def _rotated(x: Tensor, positions: Tensor) -> Tensor:
    angle = positions.double()[:, None, None] * FREQUENCIES
    low, high = x.chunk(2, -1)
    return torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), -1)


@dataclass
class Prompt:
    """Text, an image of 12 tokens in some groups, text, and tokens of an answer; q, k, v of its merged tokens."""

    group: Tensor
    representative: Tensor
    begin: int
    q: Tensor
    k: Tensor
    v: Tensor
    prefilled: int

    @classmethod
    def random(cls, seed: int, answer: int = 3) -> "Prompt":
        make = torch.Generator().manual_seed(seed)
        text = int(torch.randint(1, 5, (1,), generator=make))
        leaders = torch.randint(0, 5, (12,), generator=make)
        first = torch.tensor([int((leaders == leader).nonzero()[0, 0]) for leader in leaders])
        tokens = text + 12 + 3 + answer
        index = torch.arange(tokens)[None]
        shown = (index >= text) & (index < text + 12)
        merged = TokenMap.from_leaders(place_leaders(index, shown, [first]))
        new = NewTokens.of(merged, index, "exact")
        count = int(merged.kept)
        q, k, v = (
            torch.randn(count, heads, CHANNELS, dtype=torch.float64, generator=make)
            for heads in (HEADS, KEY_HEADS, KEY_HEADS)
        )
        return cls(new.map.group[0], new.representative[0], text, q, k, v, count - answer)

    def by_hand(self, each_query: bool) -> Tensor:
        """[M, H, D]: attention among all virtual tokens, or of one query for each merged token."""
        positions = torch.arange(len(self.group))
        keys = _rotated(self.k[self.group], positions).repeat_interleave(HEADS // KEY_HEADS, 1)
        values = self.v[self.group].repeat_interleave(HEADS // KEY_HEADS, 1)
        asked = positions if each_query else self.representative
        queries = _rotated(self.q[self.group] if each_query else self.q, asked)
        logits = torch.einsum("qhd,khd->hqk", queries, keys) / CHANNELS**0.5
        weights = logits.masked_fill(positions > asked[:, None], -torch.inf).softmax(-1)
        found = torch.einsum("hqk,khd->qhd", weights, values)
        if not each_query:
            return found
        return torch.stack([found[self.group == token].mean(0) for token in range(len(self.q))])


class Cache:
    """Pages of several prompts, block tables in no order."""

    def __init__(self, prompts: list[Prompt], dtype: torch.dtype = torch.float64, heads_first: bool = True) -> None:
        self.prompts = prompts
        blocks = [-(-len(prompt.q) // BLOCK) for prompt in prompts]
        order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(0))
        self.tables = torch.full((len(prompts), max(blocks)), 999)
        for row, part in enumerate(order.split(blocks)):
            self.tables[row, : len(part)] = part
        self.slots = Slots(sum(blocks) * BLOCK, 12, DEVICE)
        shape = (sum(blocks), KEY_HEADS, BLOCK, 2 * CHANNELS)
        cache = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        if not heads_first:  # in memory
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        self.pages = Pages.of(cache)
        self.cache = cache
        self.done = [0] * len(prompts)

    def step(self, new: list[int], each_query: bool, backend: str = "sdpa") -> list[Tensor]:
        """So many more tokens of each prompt: what their queries get."""
        found = []
        for row, (prompt, count) in enumerate(zip(self.prompts, new, strict=True)):
            span = torch.arange(self.done[row], self.done[row] + count)
            slots = self._slots(row, span)
            position = prompt.representative[span]
            members = torch.zeros(count, 12, dtype=torch.bool)
            shown = (position >= prompt.begin) & (position < prompt.begin + 12)
            members[~shown, 0] = True
            members[shown] = prompt.group[prompt.begin : prompt.begin + 12] == span[shown][:, None]
            begin = torch.where(shown, prompt.begin, position)
            self.slots.write(*(x.to(DEVICE) for x in (slots, position, begin, members)))
            keys_and_values = torch.cat((_rotated(prompt.k[span], position), prompt.v[span]), -1)
            self.cache[slots // BLOCK, :, slots % BLOCK] = keys_and_values.to(self.cache)
            self.done[row] += count
            own = self._slots(row, torch.arange(self.done[row])).to(DEVICE)
            in_pages = backend == "triton"
            rows = self.pages.rows(own, BLOCK) if in_pages else None
            step = self.slots.step(
                own, count, FREQUENCIES.to(DEVICE), each_query=each_query, backend=backend, rows=rows
            )
            entries = self.cache[own // BLOCK, :, own % BLOCK].transpose(0, 1)[None].chunk(2, -1)
            keys, values = (self.pages.keys, self.pages.values) if in_pages else entries
            asked = _rotated(prompt.q[span], position).to(self.cache).transpose(0, 1)[None]
            (got,) = BACKENDS[backend](asked, keys, values, step, CHANNELS**-0.5)
            found.append(got.double().cpu())
        return found

    def _slots(self, row: int, span: Tensor) -> Tensor:
        return self.tables[row, span // BLOCK] * BLOCK + span % BLOCK


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
@pytest.mark.parametrize("each_query", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_pages_give_what_virtual_tokens_give(seed: int, each_query: bool, backend: str, heads_first: bool) -> None:
    prompts = [Prompt.random(10 * seed + number) for number in range(3)]
    cache = Cache(prompts, torch.float32 if backend == "triton" else torch.float64, heads_first)
    found: list[list[Tensor]] = [[] for _ in prompts]
    for new in [[prompt.prefilled for prompt in prompts], *[[1] * len(prompts)] * 3]:
        for row, got in enumerate(cache.step(new, each_query, backend)):
            found[row].append(got)
    for prompt, got in zip(prompts, found, strict=True):
        torch.testing.assert_close(torch.cat(got), prompt.by_hand(each_query), rtol=1e-5, atol=1e-5)


def test_an_image_cut_in_two_gives_something_else() -> None:
    """Which is why the scheduler never does: the first half asks before the second is there."""
    off = 0.0
    for seed in range(6):
        prompt = Prompt.random(seed)
        cache, half = Cache([prompt]), prompt.begin + 2
        found = torch.cat([*cache.step([half], True), *cache.step([prompt.prefilled - half], True)])
        off = max(off, float((found - prompt.by_hand(True)[: prompt.prefilled]).abs().max()))
    assert off > 1e-3
