"""Unmerging attention at thousands of tokens: no tensor is as large as the pairs of tokens, in any way to attend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dymu
import tiny
from dymu.choices import UNMERGE
from dymu.reducers import FixedMerge
from dymu.token_map import TokenMap
from dymu.unmerging import BACKENDS, History, Step
from dymu.unmerging.backends import sdpa
from test_unmerging import SIZE, grow, steps

TOKENS, GROUP, HEADS, KEY_HEADS = 4096, 7, 2, 1
TOO_MANY = TOKENS**2 // 8


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation of torch returns, in elements, and which it was."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.name = 0, "nothing"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() // leaf.element_size() > self.elements:
                self.elements = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.name = f"{func} -> {tuple(leaf.shape)}"
        return out


@contextmanager
def nothing_large() -> Iterator[None]:
    with Largest() as largest:
        yield
    assert 0 < largest.elements < TOO_MANY, largest.name


def grown(unmerge: str, side: str, new: tuple[int, ...]) -> tuple[Step, History]:
    """Forwards of so many tokens, a prompt's merged by sevens; with a side, the second row lacks tokens there."""
    history = History()
    batch = 1 if side == "none" else 2
    for tokens in new:
        indices = torch.arange(tokens).expand(batch, -1)
        plain = tokens < 100
        present = torch.ones(batch, tokens, dtype=torch.bool)
        if not plain and side != "none":
            present[1, slice(0, 1000) if side == "left" else slice(tokens - 1000, tokens)] = False
        queries = TokenMap.from_leaders(
            indices if plain else indices // GROUP * GROUP, None if present.all() else present
        )
        step, _, _ = grow(history, queries, unmerge)
    return step, history


def attend(step: Step, entries: int, window: int | None, dtype: torch.dtype, backend: str = "sdpa") -> Tensor:
    batch = len(step.keys)
    query = torch.randn(batch, step.queries.width, HEADS, SIZE, dtype=dtype).transpose(1, 2)
    key, value = torch.randn(2, batch, entries, KEY_HEADS, SIZE, dtype=dtype).transpose(2, 3)
    return BACKENDS[backend](query, key, value, step, 0.3, window)


FORWARDS = {
    "prefill": (TOKENS,),
    "one more": (TOKENS, 1),
    "five more": (TOKENS, 5),
    "twenty more": (TOKENS, 20),
    "chunk": (TOKENS // 2, TOKENS // 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("unmerge", UNMERGE)
def test_sdpa_forms_nothing_as_large_as_all_pairs(unmerge, side, dtype):
    for new in FORWARDS.values():
        for window in (None, 700):
            with nothing_large():
                step, history = grown(unmerge, side, new)
                attend(step, history.entries, window, dtype)


@pytest.mark.parametrize("unmerge", UNMERGE)
def test_nor_do_the_tables_of_the_triton_kernels(unmerge):
    triton = pytest.importorskip("dymu.unmerging.backends.triton", reason="it needs Triton", exc_type=ImportError)
    for new in FORWARDS.values():
        for window in (None, 700):
            with nothing_large():
                step, history = grown(unmerge, "left", new)
                query = torch.randn(2, HEADS, step.queries.width, SIZE)
                key, value = torch.randn(2, 2, KEY_HEADS, history.entries, SIZE)
                prepare = triton.decode if triton.decodes(query, key, step) else triton.prefill
                prepare(query, key, value, step, 0.3, window)


@pytest.mark.parametrize("decoder", ["qwen2", "mistral"])
@pytest.mark.parametrize("unmerge", UNMERGE)
def test_nor_does_a_model_that_generates(decoder, unmerge):
    """From pictures to text, with all that transformers does around the attention; mistral has a sliding window."""
    model = tiny.llava("clip", decoder, text={"num_hidden_layers": 1})
    model.config.text_config.max_position_embeddings = TOKENS
    ids = [tiny.prompt(model, TOKENS - tiny.PATCHES - 1 - short, "image", 1) for short in (0, 50)]
    inputs = {**tiny.pad(ids), **tiny.shown(model, tiny.pictures(2))}
    with dymu.apply(model, merge=FixedMerge(keep=7), unmerge=unmerge), nothing_large():
        model.generate(**inputs, max_new_tokens=2, do_sample=False, prefill_chunk_size=None)


def test_the_check_sees_a_matrix_of_all_pairs():
    query = torch.randn(1, 1, TOKENS, SIZE)
    with pytest.raises(AssertionError, match="4096"), nothing_large():
        (query @ query.mT).softmax(-1)
    with nothing_large():
        scaled_dot_product_attention(query, query, query, is_causal=True)
    with pytest.raises(AssertionError, match="4096"), nothing_large():
        grown("exact", "none", FORWARDS["prefill"])[0].mask(700)


@given(data=st.data())
@pytest.mark.parametrize("differ", [True, False])
def test_masks_in_pieces_equal_the_reference(differ, data):
    """What short prompts do not reach by themselves; and key heads repeated, as GPUs need them."""
    step, query, key, value, window = data.draw(steps(data.draw(st.sampled_from(UNMERGE))))
    expected = BACKENDS["reference"](query, key, value, step, 0.3, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "FEW", 0)
        patch.setattr(sdpa, "MASK", 3)
        patch.setattr(sdpa, "_heads_may_differ", lambda *_: differ)
        output = BACKENDS["sdpa"](query, key, value, step, 0.3, window)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)


def test_masks_are_formed_in_pieces_where_the_rest_is_compiled(monkeypatch):
    torch._dynamo.reset()
    queries_masked, mask = [], Step.mask

    def seen(*args):
        piece = mask(*args)
        queries_masked.append(piece.shape[2])
        return piece

    monkeypatch.setattr(Step, "mask", seen)
    counters.clear()
    compiled = torch.compile(attend, backend="eager", dynamic=True)
    graphs = []
    for tokens in (TOKENS // 2, TOKENS, TOKENS // 3):
        queries = TokenMap.from_leaders(torch.arange(tokens)[None] // GROUP * GROUP)
        step, _, _ = grow(History(), queries, "exact")
        torch.manual_seed(0)
        expected = attend(step, queries.width, 100, torch.float32)
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(step, queries.width, 100, torch.float32), expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert max(queries_masked) == sdpa.MASK
    assert len(set(graphs)) == 1, "other numbers of tokens are no reason to compile again"
