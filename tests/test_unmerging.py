"""Unmerging in the language model: every backend against the formula, and the formula against plain attention."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from dymu.choices import UNMERGE
from dymu.token_map import TokenMap, take
from dymu.unmerging import (
    BACKENDS,
    History,
    NewTokens,
    check_backend,
    leaders_within,
    near_far,
    place_leaders,
    plan_step,
)
from dymu.unmerging.backends import IN_FLOAT64, faster_on_gpu, sdpa
from dymu.unmerging.prompt import nearest_to_mean
from dymu.unmerging.step import Step

SIZE = 8


def phase(positions: Tensor, size: int = SIZE) -> Tensor:
    """complex [B, N, size / 2], the rotary angles of positions [B, N], or of the sum of [B, N, axes]."""
    angle = positions.reshape(*positions.shape[:2], -1).sum(-1)[..., None].double()
    return torch.polar(torch.ones(()).double(), angle * 100.0 ** -(torch.arange(0, size, 2) / size).double())


def grow(
    history: History,
    tokens: TokenMap,
    unmerge: str,
    *,
    positions: Tensor | None = None,
    size: int = SIZE,
    representatives: int = 1,
    **options: Any,
) -> tuple[Step, NewTokens, Tensor]:
    """The step of further tokens; these; and their positions, consecutive ones by default."""
    if positions is None:
        positions = torch.arange(history.length, history.length + tokens.tokens).expand(tokens.batch, -1)
    if not tokens.padded and torch.equal(tokens.group, torch.arange(tokens.tokens).expand(tokens.batch, -1)):
        new = NewTokens.identity(tokens.batch, tokens.tokens, tokens.group.device)
    else:
        new = NewTokens.of(tokens, positions, unmerge, representatives)
    turn = new.turn(phase(positions, size))
    step = plan_step(new, history, unmerge=unmerge, turn=turn, **{"backend": "sdpa", **options})
    return step, new, positions


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


def restoring(draw: st.DrawFn, unmerge: str, history: History, queries: TokenMap) -> dict[str, Any]:
    """What `restore` adds."""
    if unmerge != "restore":
        return {}
    shown = torch.rand(queries.group.shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.5
    return {"distances": torch.linspace(0, 1, history.length + queries.tokens), "shown": shown}


@st.composite
def steps(
    draw: st.DrawFn, unmerge: str = "exact", both_ways: bool = True
) -> tuple[Step, Tensor, Tensor, Tensor, int | None]:
    """A forward of one to three: queries, keys and values of a merged, ragged prompt that grew in pieces.

    Args:
        both_ways: whether some tokens may attend to later ones.
    """
    batch, heads, shared = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    history, step = History(), None
    for _ in range(draw(st.integers(1, 3))):
        tokens = draw(st.integers(1, 8))
        queries = draw(prompts(tokens, batch))
        block = draw(blocks(batch, tokens)) if both_ways and draw(st.booleans()) else None
        step, _, _ = grow(
            history, queries, unmerge, block=block, beyond_window=draw(st.booleans()),
            representatives=draw(st.integers(1, 2)), **restoring(draw, unmerge, history, queries),
        )  # fmt: skip
    assert step is not None
    torch.manual_seed(draw(st.integers(0, 2**16)))
    query = torch.randn(batch, heads * shared, step.queries.width, SIZE, dtype=torch.float64)
    key, value = torch.randn(2, batch, heads, history.entries, SIZE, dtype=torch.float64)
    return step, query, key, value, draw(st.sampled_from([None, 1, 3, 6, 100]))


def as_float32(step: Step) -> Step:
    return dataclasses.replace(step, turn=None if step.turn is None else step.turn.to(torch.complex64))


@given(st.data())
def test_new_tokens_keep_the_groups_in_the_order_of_their_representatives(data):
    tokens, batch = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    before = data.draw(prompts(tokens, batch))
    positions = torch.randint(0, 5, (batch, tokens, data.draw(st.integers(1, 3))))
    for unmerge in ("exact", "compact", "none"):
        new = NewTokens.of(before, positions, unmerge)
        assert new.merged == bool((before.size() > 1).any())
        for row in range(batch):
            old, group = before.group[row], new.map.group[row]
            assert torch.equal(old[:, None] == old, group[:, None] == group)
            assert torch.equal(old < 0, group < 0)
            kept = int(before.kept[row])
            chosen = new.representative[row, :kept].tolist()
            assert chosen == sorted(chosen)
            assert new.represents[row].nonzero()[:, 0].tolist() == chosen
            for m, token in enumerate(chosen):
                members = (group == m).nonzero()[:, 0]
                if unmerge == "none":
                    expected = members[0]
                elif unmerge == "compact":
                    expected = members[(len(members) - 1) // 2]
                else:
                    at = positions[row, members].double()
                    expected = members[(at - at.mean(0)).square().sum(1).argmin()]
                assert token == expected


@given(st.data())
def test_two_representatives_are_of_the_two_halves(data):
    tokens, batch = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 2))
    drawn, positions = data.draw(prompts(tokens, batch)), torch.arange(tokens).expand(batch, -1)
    new = NewTokens.of(drawn, positions, "representative", representatives=2)
    assert new.several == new.merged
    for row in range(batch):
        expected = []
        for m in range(int(new.map.kept[row])):
            members = (new.map.group[row] == m).nonzero()[:, 0]
            half = (len(members) + 1) // 2 if new.merged else len(members)
            for part in (members[:half], members[half:]):
                if len(part):
                    expected.append(int(part[(part.double() - part.double().mean()).abs().argmin()]))
        asked = new.asked[row].tolist()
        assert asked[: len(expected)] == sorted(expected)
        assert set(asked[len(expected) :]) <= {-1}


def formula(
    query: Tensor, key: Tensor, value: Tensor, groups: list[TokenMap], at: Tensor, window: int | None
) -> Tensor:
    """What the last of `groups` get by the paper's formula, [B, M, H, D]: every token of the full prompt stands at its
    own position `at`, int64 [B, N], sees those before it that are there, and groups take means.

    Args:
        query: [B, H, M, D]; key, value: [B, H, entries, D], all not rotated.
    """
    slots, entries = [], 0
    for tokens in groups:
        slots.append(torch.where(tokens.group < 0, -1, tokens.group + entries))
        entries += tokens.width
    slot, newest, rows = torch.cat(slots, 1), groups[-1], torch.arange(len(at))[:, None]

    def virtual(x: Tensor, row: Tensor, turn: Tensor) -> Tensor:
        expanded = x.transpose(1, 2)[rows, row.clamp(min=0)]
        first, second = expanded.chunk(2, -1)
        turned = torch.complex(first, second) * turn[:, :, None]
        return torch.cat((turned.real, turned.imag), -1).transpose(1, 2)

    turns = phase(at)
    keys, queries = virtual(key, slot, turns), virtual(query, newest.group, turns[:, -newest.tokens :])
    values = value.transpose(1, 2)[rows, slot.clamp(min=0)].transpose(1, 2)
    index = torch.arange(slot.shape[1])
    sees = (index <= index[-newest.tokens :, None]) & (slot >= 0)[:, None]
    if window is not None:
        place = (slot >= 0).cumsum(1)
        sees = sees & (place[:, -newest.tokens :, None] - place[:, None] < window)
    logits = (queries @ keys.mT * 0.3).masked_fill(~sees[:, None], -torch.inf)
    attended = logits.softmax(-1).nan_to_num() @ values
    return newest.average(attended.transpose(1, 2))


@given(st.data())
def test_exact_is_the_formula(data):
    """Whatever came before: maps that grow, padding on either side, positions with gaps, windows, beams."""
    batch, history, groups, at, start = data.draw(st.integers(1, 3)), History(), [], [], 0
    for _ in range(data.draw(st.integers(1, 4))):
        tokens = data.draw(st.integers(1, 7))
        places = start + torch.arange(tokens).expand(batch, -1) * data.draw(st.integers(1, 2))
        start = int(places.max()) + 1
        drawn = data.draw(prompts(tokens, batch))
        step, new, _ = grow(history, drawn, "exact", positions=places)
        groups.append(new.map)
        at.append(places)
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    query = torch.randn(batch, 2, step.queries.width, SIZE, dtype=torch.float64)
    key, value = torch.randn(2, batch, 2, history.entries, SIZE, dtype=torch.float64)
    window = data.draw(st.sampled_from([None, 1, 3, 6]))
    expected = formula(query, key, value, groups, torch.cat(at, 1), window)
    query, key = standing(query, key, groups, at, new)
    tiny.close(BACKENDS["reference"](query, key, value, step, 0.3, window), expected, part=1e-9)


def standing(
    query: Tensor, key: Tensor, groups: list[TokenMap], at: list[Tensor], new: NewTokens
) -> tuple[Tensor, Tensor]:
    """Queries and keys as the model rotates them, to the positions of representatives."""

    def turned(x: Tensor, turn: Tensor) -> Tensor:
        pairs = torch.complex(*x.chunk(2, -1)) * turn[:, None]
        return torch.cat((pairs.real, pairs.imag), -1)

    of_keys = [
        take(phase(positions), nearest_to_mean(tokens, positions)) for tokens, positions in zip(groups, at, strict=True)
    ]
    return turned(query, take(phase(at[-1]), new.representative)), turned(key, torch.cat(of_keys, 1))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("unmerge", "expected"),
    [("exact", 0.5215), ("compact", 0.4235), ("original", 0.2687), ("none", 0.4194), ("restore", 0.6397)],
)
def test_two_merged_tokens_and_a_word_of_one_head_by_hand(unmerge, expected, name):
    """The merged one, at 0 for 0 and 1, says 1 and the word behind it 0; queries and keys are alike, and turn by one
    radian for each place. With `restore` the two are 2 - cos 2 times as heavy, by the place where their key stands."""
    tokens = TokenMap.from_leaders(torch.tensor([[0, 0, 2]]))
    more = {"distances": (2 - torch.arange(3.0).cos()).log(), "shown": torch.tensor([[True, True, False]])}
    step, new, positions = grow(History(), tokens, unmerge, size=2, **more)
    at = torch.arange(2)[None] if unmerge == "none" else positions.gather(1, new.representative)
    turned = torch.view_as_real(phase(at, 2)[0])[:, 0]
    query = turned[None, None]
    value = torch.tensor([1.0, 0.0], dtype=torch.float64)[None, None, :, None].expand(-1, -1, -1, 2)
    if name not in IN_FLOAT64:
        query, value, step = query.float(), value.float(), as_float32(step)
    said = BACKENDS[name](query, query, value, step, 2**-0.5)
    assert said[0, :, 0, 0].tolist() == pytest.approx([1, expected], abs=1e-4)


@given(st.data())
def test_a_representative_gets_what_exact_gives_its_token(data):
    """Of each group what `exact` would give the one virtual query, before it takes the mean."""
    tokens, batch = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    drawn, seed = data.draw(prompts(tokens, batch)), data.draw(st.integers(0, 2**16))
    found, whole = (grow(History(), drawn, unmerge)[0] for unmerge in ("representative", "exact"))
    if not (drawn.size() > 1).any():
        return
    torch.manual_seed(seed)
    query = torch.randn(batch, 2, drawn.width, SIZE, dtype=torch.float64)
    key, value = torch.randn(2, batch, 2, drawn.width, SIZE, dtype=torch.float64)
    every = TokenMap(
        torch.where(whole.queries.group < 0, -1, torch.arange(tokens)), whole.queries.kept, tokens, drawn.padded
    )
    new = NewTokens.of(drawn, torch.arange(tokens).expand(batch, -1), "representative")
    rows = take(query.transpose(1, 2), whole.queries.group.clamp(min=0)).transpose(1, 2)
    alone = BACKENDS["reference"](rows, key, value, dataclasses.replace(whole, queries=every), 0.3)
    at = new.representative if found.at is None else found.at
    expected = take(alone, at)
    past_end = torch.arange(drawn.width) >= drawn.kept[:, None]
    tiny.close(
        BACKENDS["reference"](query, key, value, found, 0.3),
        expected.masked_fill(past_end[..., None, None], 0),
        part=1e-9,
    )


@pytest.mark.parametrize("name", IN_FLOAT64)
@given(data=st.data())
def test_far_keys_are_one_for_each_group(name, data):
    """Each query sees all keys from so many places before its piece on; before, of each group one, at the mean of the
    turns of its places, with the log of their number."""
    tokens, pieces, window = data.draw(st.integers(4, 14)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    drawn = data.draw(prompts(tokens, batch := data.draw(st.integers(1, 2))))
    step, _, _ = grow(History(), drawn, "representative")
    if step.merged is None:
        return
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    query = torch.randn(batch, 2, drawn.width, SIZE, dtype=torch.float64)
    key, value = torch.randn(2, batch, 1, drawn.width, SIZE, dtype=torch.float64)
    expected = torch.zeros(batch, drawn.width, 2, SIZE, dtype=torch.float64)
    for row in range(batch):
        group = step.keys[row].tolist()
        at = step.at[row].tolist()
        kept = int(drawn.kept[row])
        last_merged = max([m for m in range(kept) if group.count(m) > 1], default=-1)
        for m in range(kept):
            begin = m // pieces * pieces
            near = max(0, at[begin] - window) if m <= last_merged else 0
            keys, values, bias = [], [], []
            for place in range(near, at[m] + 1):
                if group[place] >= 0:
                    keys.append(pairs_of(key[row, 0, group[place]]) * step.turn[row, place])
                    values.append(value[row, 0, group[place]])
                    bias.append(0.0)
            for other in sorted(set(group[:near]) - {-1}):
                places = [place for place in range(near) if group[place] == other]
                keys.append(pairs_of(key[row, 0, other]) * step.turn[row, places].mean(0))
                values.append(value[row, 0, other])
                bias.append(math.log(len(places)))
            for head in range(2):
                logits = (torch.stack(keys) * pairs_of(query[row, head, m]).conj()).real.sum(1) * 0.3
                weights = (logits + torch.tensor(bias)).softmax(0)
                expected[row, m, head] = weights @ torch.stack(values)
    with pytest.MonkeyPatch.context() as patch:
        for limit, size in (("LONG", 0), ("QUERIES", pieces), ("WINDOW", window)):
            patch.setattr(near_far, limit, size)
        patch.setattr(sdpa, "FEW", 0)
        found = BACKENDS[name](query, key, value, step, 0.3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def pairs_of(x: Tensor) -> Tensor:
    return torch.complex(*x.chunk(2, -1))


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
def test_the_reference_without_merging_is_causal_attention(tokens, seed, window):
    torch.manual_seed(seed)
    query = torch.randn(1, 4, tokens, SIZE, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, tokens, SIZE, dtype=torch.float64)
    step, _, _ = grow(History(), TokenMap.identity(1, tokens), "exact")
    output = BACKENDS["reference"](query, key, value, step, 0.3, window)
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
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
    step, _, _ = grow(History(), queries, "exact")
    query, key, value = (torch.randn(2, 1, queries.width, SIZE, dtype=torch.float64) for _ in range(3))
    query.requires_grad_()
    BACKENDS["sdpa"](query, key, value, step, 0.3).sum().backward()
    assert torch.isfinite(query.grad).all()


@pytest.mark.parametrize("few", [0, 8])
def test_gradients_of_ragged_later_turns_are_finite(few, monkeypatch):
    """There absent tokens stand before present ones, and a mask must leave them something to see."""
    torch.set_grad_enabled(True)
    monkeypatch.setattr(sdpa, "FEW", few)
    history = History()
    for leaders in ([[0, 0, 2, 3], [0, 1, 2, 3]], [[0, 1, 2, 3], [0, 1, 2, 3]]):
        present = torch.tensor([[True] * 4, [False, False, True, True]])
        queries = TokenMap.from_leaders(torch.tensor(leaders), present)
        step, _, _ = grow(history, queries, "exact")
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
    drawn = TokenMap(torch.tensor([[0, 1, 0, 2], [0, 0, 0, 0]]), torch.tensor([3, 1]), 3)
    grow(history, drawn, "exact")
    grow(history, TokenMap.identity(2, 1), "exact")
    # Of two tokens at 0 and 2 the first stands for both, of four at 0 to 3 the second.
    assert history.tokens.slot.tolist() == [[0, 1, 0, 2, 3], [0, 0, 0, 0, 3]]
    assert history.tokens.represents.tolist() == [[True, True, False, True, True], [False, True, False, False, True]]
    assert (history.length, history.entries) == (5, 4)
    keys = history.keys
    assert keys.slot.tolist() == [[0, -1, -1, 0, 1, 2, 3], [0, 0, 0, 0, -1, -1, 3]]
    assert keys.place.tolist() == [[2, 0, 1, 0, 1, 3, 4], [0, 2, 3, 1, -1, -1, 4]]
    assert keys.size.tolist() == [[2, 1, 1, 1], [4, 0, 0, 1]]
    history.select(torch.tensor([1, 0, 0]))
    assert history.tokens.slot[0].tolist() == [0, 0, 0, 0, 3]
    assert history.keys.slot[0].tolist() == [0, 0, 0, 0, -1, -1, 3]
    history.crop(3)
    assert (history.length, history.entries) == (3, 2)
    history.crop(99)
    assert history.length == 3
    history.crop(0)
    assert (history.length, history.entries) == (0, 0)


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match=r"reference.*sdpa"):
        check_backend("tritom")


@pytest.mark.parametrize(
    ("unmerge", "tokens", "chosen"),
    [("exact", 200, "triton"), ("exact", 5000, "sdpa"), ("representative", 5000, "triton"), ("none", 200, "sdpa")],
)
def test_on_a_gpu_what_measured_faster_is_chosen(unmerge, tokens, chosen):
    """By docs/triton.md: long exact prompts, and prompts with nothing to unmerge, are torch's."""
    leaders = torch.arange(tokens)[None] // 4 * 4
    history = History()
    step, _, _ = grow(history, TokenMap.from_leaders(leaders), unmerge)
    assert faster_on_gpu(step) == chosen
    step, _, _ = grow(history, TokenMap.identity(1, 1), unmerge)
    assert faster_on_gpu(step) == ("sdpa" if unmerge == "none" else "triton"), "a token decoded after it"
