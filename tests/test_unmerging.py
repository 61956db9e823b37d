"""Unmerging in the language model: every backend against the formula, and the formula against plain attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dymu.choices import UNMERGE
from dymu.token_map import TokenMap
from dymu.unmerging import BACKENDS, History, choose, in_mean_order, leaders_within, place_leaders, plan_step
from dymu.unmerging.backends import IN_FLOAT64, sdpa
from dymu.unmerging.step import Step

SIZE = 8


def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
    frequency = 1.0 / (100.0 ** (torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE))
    turn = positions[..., None] * frequency
    turn = torch.cat((turn, turn), -1)
    return turn.cos(), turn.sin()


@st.composite
def prompts(draw: st.DrawFn, tokens: int, batch: int) -> TokenMap:
    """Maps of ragged prompts, padded on either side, each with runs of tokens in random groups."""
    leaders, present = [], []
    for _ in range(batch):
        start = draw(st.integers(0, tokens - 1))
        end = draw(st.integers(start + 1, tokens))
        if draw(st.booleans()):
            start, end = 0, tokens
        row: list[int] = []
        for n in range(tokens):
            row.append(draw(st.sampled_from([n, *{row[m] for m in range(max(n - 4, 0), n)}])))
        leaders.append(row)
        present.append([start <= n < end for n in range(tokens)])
    mask = torch.tensor(present)
    return TokenMap.from_leaders(torch.tensor(leaders), None if mask.all() else mask)


@st.composite
def blocks(draw: st.DrawFn, batch: int, tokens: int) -> Tensor:
    """int64 [B, N]: runs of tokens that attend to each other both ways."""
    rows = []
    for _ in range(batch):
        row: list[int] = []
        while len(row) < tokens:
            row += [draw(st.sampled_from([-1, len(row)]))] * draw(st.integers(1, 4))
        rows.append(row[:tokens])
    return torch.tensor(rows)


@st.composite
def steps(
    draw: st.DrawFn, unmerge: str = "exact", both_ways: bool = True
) -> tuple[Step, Tensor, Tensor, Tensor, int | None]:
    """A forward of one to three: queries, keys and values of a merged, ragged prompt that grew in pieces.

    Args:
        both_ways: whether some tokens may attend to later ones.
    """
    batch, heads, shared = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    history, start, step = History(), 0, None
    for _ in range(draw(st.integers(1, 3))):
        tokens = draw(st.integers(1, 8))
        queries = draw(prompts(tokens, batch))
        positions = torch.arange(start, start + tokens).expand(batch, tokens)
        plain = bool((queries.group == torch.arange(tokens)).all())
        block = draw(blocks(batch, tokens)) if both_ways and draw(st.booleans()) else None
        step = plan_step(
            queries, positions, history, angles, plain=plain, unmerge=unmerge, backend="sdpa", block=block,
            beyond_window=draw(st.booleans()),
        )  # fmt: skip
        start += tokens
    assert step is not None
    torch.manual_seed(draw(st.integers(0, 2**16)))
    query = torch.randn(batch, heads * shared, step.queries.width, SIZE, dtype=torch.float64)
    key, value = torch.randn(2, batch, heads, history.entries, SIZE, dtype=torch.float64)
    return step, query, key, value, draw(st.sampled_from([None, 1, 3, 6, 100]))


def as_float32(step: Step) -> Step:
    return dataclasses.replace(step, phase=step.phase.to(torch.complex64))


@given(st.data())
def test_in_mean_order_keeps_the_groups_and_sorts_them(data):
    tokens = data.draw(st.integers(1, 9))
    before = data.draw(prompts(tokens, data.draw(st.integers(1, 3))))
    after = in_mean_order(before)
    place = torch.arange(tokens, dtype=torch.float64)
    for old, new, kept in zip(before.group, after.group, before.kept, strict=True):
        assert torch.equal(old[:, None] == old, new[:, None] == new)
        assert torch.equal(old < 0, new < 0)
        means = [place[new == m].mean().item() for m in range(int(kept))]
        assert means == sorted(means)


@pytest.mark.parametrize("unmerge", UNMERGE)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
@given(data=st.data())
def test_backends_equal_the_reference(name, unmerge, data):
    step, query, key, value, window = data.draw(steps(unmerge))
    softcap = data.draw(st.sampled_from([None, 0.5]))
    expected = BACKENDS["reference"](query, key, value, step, 0.3, window, softcap)
    if name in IN_FLOAT64:
        exact = BACKENDS[name](query, key, value, step, 0.3, window, softcap)
        torch.testing.assert_close(exact, expected, atol=1e-12, rtol=1e-12)
    single = BACKENDS[name](query.float(), key.float(), value.float(), as_float32(step), 0.3, window, softcap)
    error = (single.double() - expected).norm() / expected.norm().clamp(min=1e-3)
    assert error < 1e-5


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", BACKENDS)
@given(data=st.data())
def test_a_row_that_is_no_number_leaves_the_others_as_they_are(name, data):
    step, query, key, value, window = data.draw(steps(data.draw(st.sampled_from(UNMERGE))))
    bad, other = data.draw(st.integers(0, len(query) - 1)), data.draw(st.sampled_from([torch.nan, torch.inf]))
    query, key, value, step = query.float(), key.float(), value.float(), as_float32(step)
    expected = BACKENDS[name](query, key, value, step, 0.3, window)
    for spoilt in (query, key, value):
        spoilt[bad] = other
    found = BACKENDS[name](query, key, value, step, 0.3, window)
    rest = torch.arange(len(query)) != bad
    torch.testing.assert_close(found[rest], expected[rest])


@pytest.mark.parametrize("limits", [{"FEW": 0}, {"FEW": 0, "PIECE": 3}, {"FEW": 0, "MASK": 3}], ids=str)
@given(data=st.data())
def test_sdpa_in_pieces_equals_the_reference(limits, data):
    """What short prompts do not reach by themselves: copied values, causal attention and masks in pieces."""
    step, query, key, value, window = data.draw(steps(data.draw(st.sampled_from(["exact", "compact"]))))
    expected = BACKENDS["reference"](query, key, value, step, 0.3, window)
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in limits.items():
            patch.setattr(sdpa, name, limit)
        output = BACKENDS["sdpa"](query, key, value, step, 0.3, window)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)


@given(st.integers(1, 9), st.integers(0, 2**16), st.sampled_from([None, 2, 5]))
def test_the_reference_without_merging_is_rotary_causal_attention(tokens, seed, window):
    torch.manual_seed(seed)
    query = torch.randn(1, 4, tokens, SIZE, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, tokens, SIZE, dtype=torch.float64)
    positions = torch.arange(tokens)[None] + 3
    step = plan_step(
        TokenMap.identity(1, tokens), positions, History(), angles, plain=True, unmerge="exact", backend="sdpa"
    )
    output = BACKENDS["reference"](query, key, value, step, 0.3, window)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1).contiguous())
        frequency = 1.0 / (100.0 ** (torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE))
        pairs = pairs * torch.polar(torch.ones(()).double(), positions[0][:, None] * frequency)
        return torch.cat((pairs.real, pairs.imag), -1)

    logits = turned(query) @ turned(key).repeat_interleave(2, 1).transpose(2, 3) * 0.3
    place = torch.arange(tokens)
    seen = place[None] <= place[:, None]
    if window is not None:
        seen &= place[:, None] - place[None] < window
    expected = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=1e-12, rtol=1e-12)


def test_gradients_of_ragged_batches_are_finite():
    """Rows of padding attend to something, so no softmax is over nothing."""
    torch.set_grad_enabled(True)
    queries = TokenMap.from_leaders(
        torch.tensor([[0, 0, 2], [0, 1, 2]]), torch.tensor([[True] * 3, [False, False, True]])
    )
    positions = torch.arange(3).expand(2, 3)
    step = plan_step(queries, positions, History(), angles, plain=False, unmerge="exact", backend="sdpa")
    query, key, value = (torch.randn(2, 1, queries.width, SIZE, dtype=torch.float64) for _ in range(3))
    query.requires_grad_()
    BACKENDS["sdpa"](query, key, value, step, 0.3).sum().backward()
    assert torch.isfinite(query.grad).all()


@pytest.mark.parametrize("few", [0, 8])
def test_gradients_of_ragged_later_turns_are_finite(few, monkeypatch):
    """There absent tokens stand before present ones, and a mask must leave them something to see."""
    torch.set_grad_enabled(True)
    monkeypatch.setattr(sdpa, "FEW", few)
    history, positions = History(), torch.arange(4).expand(2, 4)
    for leaders in ([[0, 0, 2, 3], [0, 1, 2, 3]], [[0, 1, 2, 3], [0, 1, 2, 3]]):
        present = torch.tensor([[True] * 4, [False, False, True, True]])
        queries = TokenMap.from_leaders(torch.tensor(leaders), present)
        step = plan_step(queries, positions, history, angles, plain=False, unmerge="exact", backend="sdpa")
    assert step.padded
    query = torch.randn(2, 1, queries.width, SIZE, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, 2, 1, history.entries, SIZE, dtype=torch.float64)
    BACKENDS["sdpa"](query, key, value, step, 0.3).sum().backward()
    assert torch.isfinite(query.grad).all()


def test_prompt_maps_number_groups_by_their_first_token():
    images = torch.tensor([[0, 1, 0], [0, 0, 0]])
    places = torch.tensor([[False, True, True, True, False], [True, True, True, False, False]])
    leaders = place_leaders(torch.arange(5).expand(2, 5), places, list(images))
    assert leaders.tolist() == [[0, 1, 2, 1, 4], [0, 0, 0, 3, 4]]
    present = torch.tensor([[True] * 5, [True, True, True, True, False]])
    tokens = TokenMap.from_leaders(leaders, present)
    assert tokens.group.tolist() == [[0, 1, 2, 1, 3], [0, 0, 0, 1, -1]]
    assert tokens.kept.tolist() == [4, 2]
    assert leaders_within(leaders, 2, 2).tolist() == [[0, 1], [0, 1]]
    assert leaders_within(leaders, 1, 3).tolist() == [[0, 1, 0], [0, 0, 2]]


def test_a_history_follows_rows_and_crops():
    history = History()
    tokens = TokenMap(torch.tensor([[0, 1, 0, 2], [0, 0, 0, 0]]), torch.tensor([3, 1]), 3)
    history.append(tokens, torch.arange(4).expand(2, 4), plain=False)
    history.append(TokenMap.identity(2, 1), torch.tensor([[4], [4]]), plain=True)
    assert history.slot.tolist() == [[0, 1, 0, 2, 3], [0, 0, 0, 0, 3]]
    assert (history.length, history.entries) == (5, 4)
    history.select(torch.tensor([1, 0, 0]))
    assert history.slot[0].tolist() == [0, 0, 0, 0, 3]
    history.crop(3)
    assert (history.length, history.entries) == (3, 2)
    history.crop(99)
    assert history.length == 3
    history.crop(0)
    assert (history.length, history.entries) == (0, 0)


def test_unknown_backends_are_refused():
    assert choose("auto") in BACKENDS
    with pytest.raises(ValueError, match=r"reference.*sdpa"):
        choose("tritom")
