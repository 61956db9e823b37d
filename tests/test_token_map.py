"""The laws of TokenMap."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dymu.token_map import TokenMap


@st.composite
def token_maps(draw: st.DrawFn, batch: int | None = None, tokens: int | None = None, padding: bool = True) -> TokenMap:
    """Maps whose groups are numbered without gaps, some rows shorter than others."""
    batch = draw(st.integers(1, 3)) if batch is None else batch
    tokens = draw(st.integers(1, 12)) if tokens is None else tokens
    rows = []
    for _ in range(batch):
        present = draw(st.integers(1, tokens)) if padding else tokens
        labels = draw(st.lists(st.integers(0, tokens - 1), min_size=present, max_size=present))
        number = {label: index for index, label in enumerate(sorted(set(labels)))}
        rows.append([number[label] for label in labels] + [-1] * (tokens - present))
    group = torch.tensor(rows)
    kept = group.max(1).values + 1
    return TokenMap(group, kept, int(kept.max()), padded=bool((group < 0).any()))


def merged_values(tokens: TokenMap, channels: int = 2) -> torch.Tensor:
    """Values [B, M, channels] that are 0 past each row's end, as merged tensors are."""
    values = torch.randn(tokens.batch, tokens.width, channels, dtype=torch.float64)
    return values * (torch.arange(tokens.width) < tokens.kept[:, None])[..., None]


@given(token_maps())
def test_averaging_what_was_expanded_gives_it_back(tokens):
    x = merged_values(tokens)
    torch.testing.assert_close(tokens.average(tokens.expand(x)), x, atol=1e-12, rtol=0)


@given(token_maps())
def test_expanding_averages_twice_changes_nothing_more(tokens):
    y = torch.randn(tokens.batch, tokens.tokens, 3, dtype=torch.float64)
    once = tokens.expand(tokens.average(y))
    torch.testing.assert_close(tokens.expand(tokens.average(once)), once, atol=1e-12, rtol=0)


@given(token_maps())
def test_sizes_count_the_original_tokens(tokens):
    assert torch.equal(tokens.size().sum(1), (tokens.group >= 0).sum(1).float())
    assert torch.equal((tokens.size() > 0).sum(1), tokens.kept)


@given(token_maps(), st.sampled_from([torch.float32, torch.float64]))
def test_a_weighted_mean_is_that_of_a_loop(tokens, dtype):
    x, weight = torch.randn(tokens.batch, tokens.tokens, 3, dtype=dtype), torch.rand(tokens.batch, tokens.tokens) + 1
    expected = torch.zeros(tokens.batch, tokens.width, 3, dtype=torch.float64)
    for row, group in enumerate(tokens.group):
        for merged in range(int(tokens.kept[row])):
            own = group == merged
            expected[row, merged] = (x[row, own].double() * weight[row, own, None]).sum(0) / weight[row, own].sum()
    torch.testing.assert_close(tokens.average(x, weight).double(), expected, atol=1e-5, rtol=1e-5)


@given(token_maps(), st.sampled_from([torch.nan, torch.inf]), st.data())
def test_what_is_no_number_stays_in_its_group(tokens, value, data):
    """Also where it is of no group at all."""
    y = torch.randn(tokens.batch, tokens.tokens, 3, dtype=torch.float64)
    expected, b = tokens.average(y), data.draw(st.integers(0, tokens.batch - 1))
    n = data.draw(st.integers(0, tokens.tokens - 1))
    y[b, n] = value
    average = tokens.average(y, None)
    weighted = tokens.average(y, torch.ones(tokens.batch, tokens.tokens))
    for found in (average, weighted):
        hit = (found != expected).any(-1)
        assert hit.sum() == int(tokens.group[b, n] >= 0)
        assert not hit[b].any() or hit[b, tokens.group[b, n]]
    spoilt = torch.zeros_like(tokens.group, dtype=torch.bool)
    spoilt[b] = (tokens.group[b] == tokens.group[b, n]) & (tokens.group[b] >= 0)
    assert torch.equal(tokens.expand(average).isfinite().all(-1), ~spoilt)


@given(token_maps())
def test_average_is_the_mean_of_each_group_alone(tokens):
    y = torch.randn(tokens.batch, tokens.tokens, 2, 2, dtype=torch.float64)
    average = tokens.average(y)
    for b in range(tokens.batch):
        for m in range(int(tokens.kept[b])):
            members = y[b][tokens.group[b] == m]
            torch.testing.assert_close(average[b, m], members.mean(0), atol=1e-12, rtol=0)


@given(token_maps())
def test_first_is_the_first_member(tokens):
    for b in range(tokens.batch):
        for m in range(int(tokens.kept[b])):
            assert tokens.first()[b, m] == (tokens.group[b] == m).nonzero()[0]


@given(st.data(), token_maps())
def test_then_expands_like_both_in_turn(data, first):
    second = data.draw(token_maps(first.batch, first.width))
    both = first.then(second)
    x = torch.randn(both.batch, both.width, 2)
    assert torch.equal(both.expand(x), first.expand(second.expand(x)))


@given(st.data(), token_maps())
def test_then_is_associative_and_identity_is_neutral(data, a):
    b = data.draw(token_maps(a.batch, a.width, padding=False))
    c = data.draw(token_maps(b.batch, b.width, padding=False))
    assert torch.equal(a.then(b).then(c).group, a.then(b.then(c)).group)
    assert torch.equal(TokenMap.identity(a.batch, a.tokens).then(a).group, a.group)
    assert torch.equal(a.then(TokenMap.identity(a.batch, a.width)).group, a.group)


def test_half_precision_is_summed_in_float32():
    tokens = TokenMap(torch.zeros(1, 1000, dtype=torch.long), torch.tensor([1]), 1)
    ones = torch.ones(1, 1000, 1, dtype=torch.bfloat16)
    assert tokens.sum(ones).item() == 1000
    assert tokens.average(ones).dtype == torch.bfloat16


@pytest.mark.parametrize(("batch", "tokens", "kept"), [(0, 5, 5), (2, 0, 0), (2, 0, 3)])
def test_of_no_tokens_sum_and_average_are_zeros(batch, tokens, kept):
    group = torch.zeros(batch, tokens, dtype=torch.long)
    empty = TokenMap(group, torch.full((batch,), kept), kept)
    given = torch.ones(batch, tokens, 2, 3, dtype=torch.bfloat16)
    for found, dtype in ((empty.sum(given), torch.float32), (empty.average(given), torch.bfloat16)):
        assert torch.equal(found, torch.zeros(batch, kept, 2, 3, dtype=dtype))


def test_shapes_that_do_not_fit_are_refused():
    tokens = TokenMap.identity(2, 5)
    with pytest.raises(ValueError, match=r"\[2, 5"):
        tokens.expand(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\[2, 5"):
        tokens.average(torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"\[2, 5\]"):
        tokens.then(TokenMap.identity(2, 4))


def test_drop_forgets_the_prefix():
    tokens = TokenMap(torch.tensor([[0, 1, 2, 1, 2]]), torch.tensor([3]), 3)
    dropped = tokens.drop(1)
    assert dropped.group.tolist() == [[0, 1, 0, 1]]
    assert dropped.kept.tolist() == [2]
    assert dropped.width == 2


def test_drop_and_after_leave_gone_tokens_gone():
    tokens = TokenMap(torch.tensor([[0, 1, -1, 1]]), torch.tensor([2]), 2, padded=True)
    assert tokens.drop(1).group.tolist() == [[0, -1, 0]]
    assert tokens.drop(1).after(1).group.tolist() == tokens.group.tolist()
