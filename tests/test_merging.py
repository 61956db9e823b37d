"""Merging in the encoder, against a slow reference of one image at a time in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dymu
import tiny
from dymu.errors import BadBudget
from dymu.families import FAMILIES, resolve
from dymu.merging import SCHEDULES, EncoderLayer, FixedMerge, MergeRun, ThresholdMerge, above, removals
from dymu.merging.match import best_partner, similarity_metric
from dymu.merging.merge import merge_map, merge_tokens


def reference_encoder(
    layers: tuple[EncoderLayer, ...], x: Tensor, thresholds: list[float], prefix: int
) -> tuple[list[list[int]], Tensor, float]:
    """DESIGN of paper section 3.1 in plain loops: x [T, C] in float64 through `layers`.

    Returns:
        The original tokens behind each token that is left, in order; the tokens; and how close any similarity came to
        its threshold or a runner-up to the best partner.
    """
    members = [[i] for i in range(len(x))]
    closest = math.inf
    for layer, threshold in zip(layers, thresholds, strict=True):
        normed = layer.norm1(x)
        query, key, value = (
            project(normed).view(len(x), layer.heads, -1) for project in (layer.query, layer.key, layer.value)
        )
        log_size = torch.tensor([math.log(len(group)) for group in members], dtype=x.dtype)
        attended = torch.empty_like(query)
        for head in range(layer.heads):
            logits = query[:, head] @ key[:, head].T * query.shape[-1] ** -0.5 + log_size
            attended[:, head] = logits.softmax(-1) @ value[:, head]
        update = layer.out(attended.flatten(1))
        for module in layer.after_attention:
            update = module(update)
        x = x + update

        if threshold <= 1:
            metric = key.mean(1)
            metric = metric / metric.norm(dim=-1, keepdim=True)
            a, b = list(range(prefix, len(x), 2)), list(range(prefix + 1, len(x), 2))
            joins: dict[int, list[int]] = {j: [] for j in b}
            stays = []
            for i in a:
                scores = [float(metric[i] @ metric[j]) for j in b]
                order = sorted(scores, reverse=True)
                if not scores:
                    stays.append(i)
                    continue
                closest = min(closest, abs(order[0] - threshold))
                if order[0] > threshold:
                    closest = min(closest, order[0] - order[1] if len(order) > 1 else math.inf)
                    joins[b[scores.index(order[0])]].append(i)
                else:
                    stays.append(i)
            new_x, new_members = [], []
            for i in [*range(prefix), *stays, *b]:
                group = [i, *joins.get(i, [])]
                sizes = torch.tensor([float(len(members[g])) for g in group], dtype=x.dtype)
                new_x.append((x[group] * sizes[:, None]).sum(0) / sizes.sum())
                new_members.append([original for g in group for original in members[g]])
            x, members = torch.stack(new_x), new_members

        update = layer.mlp(layer.norm2(x))
        for module in layer.after_mlp:
            update = module(update)
        x = x + update
    return members, x, closest


def embedded(model: torch.nn.Module, images: Tensor) -> Tensor:
    """[B, T, C], what reaches the first encoder layer."""
    caught: list[Tensor] = []
    first = resolve(model, FAMILIES).encoder_modules[0]
    hook = first.register_forward_pre_hook(lambda _module, args, kwargs: caught.append(args[0]), with_kwargs=True)
    model.model.vision_tower(images)
    hook.remove()
    return caught[0]


@pytest.mark.parametrize("tower", tiny.TOWERS)
@pytest.mark.parametrize("threshold", [0.97, 0.9, 0.75])
def test_token_maps_equal_the_float64_reference(tower, threshold):
    model = tiny.llava(tower)
    parts = resolve(model, FAMILIES)
    images = torch.cat([tiny.pictures(4, seed) for seed in range(3)])
    thresholds = [threshold] * tiny.LAYERS
    run = MergeRun(ThresholdMerge(tuple(thresholds)), tiny.LAYERS, parts.prefix)
    tokens = embedded(model, images)
    x = tokens
    for index, layer in enumerate(parts.encoder_layers):
        x = run.layer(index, layer, x)
    exact = resolve(copy.deepcopy(model).double(), FAMILIES).encoder_layers
    compared = 0
    for i in range(len(images)):
        members, expected, closest = reference_encoder(exact, tokens[i].double(), thresholds, parts.prefix)
        if closest < 1e-6:
            continue
        compared += 1
        group = run.map.group[i].tolist()
        assert int(run.map.kept[i]) == len(members)
        assert [[n for n, g in enumerate(group) if g == m] for m in range(len(members))] == [
            sorted(group) for group in members
        ]
        torch.testing.assert_close(x[i, : len(members)].double(), expected, atol=1e-4, rtol=1e-4)
    assert compared >= len(images) - 1


@given(st.integers(1, 9), st.integers(0, 1), st.integers(0, 2**16), st.floats(-1, 1))
def test_one_merge_equals_plain_loops_in_ragged_batches(tokens, prefix, seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, tokens + 1, (3,), generator=generator) + prefix
    length[0] = total = tokens + prefix
    keys = torch.randn(3, total, 2, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(3, total, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 4, (3, total), generator=generator).float()
    size *= torch.arange(total) < length[:, None]
    similarity, partner = best_partner(similarity_metric(keys, prefix), length - prefix)
    step = merge_map(above(threshold, similarity, partner), length, total, prefix)
    merged, merged_size = merge_tokens(x, size, step)
    for row in range(3):
        metric = keys[row, : length[row]].mean(1)
        metric = metric / metric.norm(dim=1, keepdim=True)
        a = range(prefix, int(length[row]), 2)
        b = range(prefix + 1, int(length[row]), 2)
        goes_to = {i: max(b, key=lambda j: float(metric[i] @ metric[j])) for i in a if b}
        goes_to = {i: j for i, j in goes_to.items() if float(metric[i] @ metric[j]) > threshold}
        order = [*range(prefix), *(i for i in a if i not in goes_to), *b]
        expected_group = [order.index(goes_to.get(i, i)) for i in range(int(length[row]))]
        assert step.group[row].tolist() == expected_group + [-1] * (total - int(length[row]))
        assert step.kept[row] == len(order)
        for m in range(len(order)):
            members = [i for i, g in enumerate(expected_group) if g == m]
            weights = size[row, members].double()
            torch.testing.assert_close(merged_size[row, m].double(), weights.sum())
            torch.testing.assert_close(merged[row, m], weights @ x[row, members] / weights.sum())
        assert merged_size[row, len(order) :].eq(0).all()


@given(st.integers(2, 729), st.integers(2, 27), st.floats(0.01, 1), st.sampled_from(SCHEDULES))
def test_removals_add_up_and_no_layer_removes_more_than_half(tokens, layers, part, schedule):
    keep = max(part * tokens, tokens / 2**layers)
    removed = removals(tokens, keep, layers, schedule)
    left = float(tokens)
    for count in removed:
        assert -1e-9 <= count <= left / 2 + 1e-9
        left -= count
    assert left == pytest.approx(keep, abs=1e-6 * tokens)


def test_schedules_lean_the_way_they_say():
    constant, linear, late = (removals(576, 300, 10, schedule) for schedule in SCHEDULES)
    assert constant == pytest.approx([27.6] * 10)
    assert linear == pytest.approx(late[::-1])
    assert late == sorted(late)
    with pytest.raises(BadBudget, match="keep between"):
        removals(576, 1, 4, "constant")
    with pytest.raises(ValueError, match="reverse_linear"):
        removals(576, 300, 4, "backwards")


@pytest.mark.parametrize("keep", [49, 40, 25, 12, 7, 0.5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fixed_merge_keeps_that_many_of_every_image(keep, schedule):
    model = tiny.llava()
    with dymu.apply(model, merge=FixedMerge(keep, schedule)) as handle:
        model.get_image_features(tiny.pictures(3))
        assert handle.last.kept == [keep if keep > 1 else 24] * 3


def test_fixed_merge_merges_the_most_alike():
    choose = FixedMerge(keep=3).choosers(5, 1)[0]
    similarity = torch.tensor([[0.1, 0.9, 0.5], [0.9, -torch.inf, 0.3]])
    partner = torch.tensor([[0, 1, 2], [1, 0, 0]])
    assert choose(similarity, partner).tolist() == [[-1, 1, 2], [1, -1, 0]]


def test_a_threshold_above_one_merges_nothing_even_among_equals():
    model = tiny.llava()
    images = torch.zeros(1, 3, tiny.SIDE, tiny.SIDE)
    with dymu.apply(model, merge=ThresholdMerge((1.01,) * 4)) as handle:
        model.get_image_features(images)
        assert handle.last.kept == [tiny.PATCHES]


def test_merges_of_half_precision_models_are_decided_in_float32():
    keys = torch.randn(1, 6, 2, 8).to(torch.bfloat16)
    assert similarity_metric(keys).dtype == torch.float32


def test_an_image_of_one_token_has_no_partner():
    similarity, _ = best_partner(torch.ones(2, 1, 4))
    assert similarity.eq(-torch.inf).all()


def test_merges_under_autocast_are_decided_in_float32():
    metric = similarity_metric(torch.randn(1, 64, 2, 8))
    expected = best_partner(metric)
    with torch.autocast("cpu", torch.bfloat16):
        found = best_partner(metric)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[1], expected[1])
