"""Merging in the encoder, against a slow reference of one image at a time in float64."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dymu
import tiny
from dymu.choices import SCHEDULES
from dymu.errors import BadBudget
from dymu.families.resolve import resolve
from dymu.merging import EncoderLayer, Layout, Pictures, above, most_similar
from dymu.merging.attention import sized_attention
from dymu.merging.layout import BUCKET
from dymu.merging.match import best_partner, similarity_metric
from dymu.merging.merge import merge_step, merge_tokens
from dymu.reducers import EncoderRun, FixedMerge, Shown, ThresholdMerge
from dymu.reducers.tome import _counts
from dymu.schedule import fewest, removals
from dymu.token_map import TokenMap


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
        query, key, value = (project(normed).view(len(x), layer.heads, -1) for project in layer.projections)
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
            a, b = ([i for i in range(prefix, len(x)) if i % 2 == odd] for odd in (0, 1))
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


def shown(images: Tensor) -> Shown:
    side = tiny.SIDE // tiny.PATCH
    return Shown(images, ((side, side),) * len(images), single=True, video=False)


def goal(step: TokenMap, before: Layout, after: Layout) -> Tensor:
    """int64 [S], where each token goes."""
    return before.pack(after.index(step.group)).flatten()


def embedded(model: torch.nn.Module, images: Tensor) -> Tensor:
    """[B, T, C], what reaches the first encoder layer."""
    caught: list[Tensor] = []
    first = resolve(model).encoder_modules[0]
    hook = first.register_forward_pre_hook(lambda _module, args, kwargs: caught.append(args[0]), with_kwargs=True)
    model.model.vision_tower(images)
    hook.remove()
    return caught[0]


@pytest.mark.parametrize("tower", tiny.TOWERS)
@pytest.mark.parametrize("threshold", [0.97, 0.9, 0.75])
def test_token_maps_equal_the_float64_reference(tower, threshold):
    model = tiny.llava(tower)
    parts = resolve(model)
    images = torch.cat([tiny.pictures(4, seed) for seed in range(3)])
    thresholds = [threshold] * tiny.LAYERS
    run = EncoderRun(
        ThresholdMerge(tuple(thresholds)),
        tiny.LAYERS,
        shown(images),
        Pictures(shown(images).grids, prefix=parts.prefix),
    )
    tokens = embedded(model, images)
    x = tokens
    for index, layer in enumerate(parts.encoder_layers):
        x = run.layer(index, layer, x)
    exact = resolve(copy.deepcopy(model).double()).encoder_layers
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


@st.composite
def layouts(draw: st.DrawFn, least: int = 1) -> Layout:
    """Layouts of one to seven images, of equal lengths as often as not."""
    lengths = st.integers(least, least + 8)
    count = draw(st.integers(1, 7))
    equal = draw(st.booleans())
    length = [draw(lengths)] * count if equal else draw(st.lists(lengths, min_size=count, max_size=count))
    return Layout(torch.tensor(length), tuple(length))


def as_rows(layout: Layout, x: Tensor) -> list[Tensor]:
    """The tokens of each image, by plain slicing of what travels."""
    length = layout.length.tolist()
    if len(set(length)) > 1:
        assert x.shape[:2] == (1, sum(length))
        return list(x[0].split(length))
    assert x.shape[:2] == (len(length), length[0])
    return list(x)


def travelling(rows: list[Tensor]) -> Tensor:
    """The other way round."""
    return torch.cat(rows)[None] if len({len(row) for row in rows}) > 1 else torch.stack(rows)


@given(layouts(least=0))
def test_what_travels_is_packed_where_lengths_differ(layout):
    rows = [torch.randn(int(n), 3) for n in layout.length]
    x = travelling(rows)
    padded = layout.pad(x)
    assert padded.shape == (layout.batch, layout.longest, 3)
    for row, expected, present in zip(padded, rows, layout.present, strict=True):
        assert torch.equal(row[present], expected)
        assert torch.equal(row[: len(expected)], expected)
        assert not len(expected) or (row[len(expected) :] == expected[-1]).all()
    assert torch.equal(layout.pack(padded), x)
    assert all(torch.equal(a, b) for a, b in zip(as_rows(layout, x), rows, strict=True))
    assert Layout.of(layout.length).lengths == layout.lengths


@given(layouts(least=0))
def test_buckets_hold_every_token_once(layout):
    x = travelling([torch.randn(int(n), 3) for n in layout.length])
    buckets, absent = layout.split(x), layout.absent()
    assert torch.equal(layout.join(buckets), x)
    present = [
        bucket.flatten(0, 1) if missing is None else bucket[~missing]
        for bucket, missing in zip(buckets, absent, strict=True)
    ]
    assert sorted(torch.cat(present).tolist()) == sorted(x.flatten(0, 1).tolist())
    assert sum(len(bucket) for bucket in buckets) == layout.batch
    assert not layout.packed or max(len(bucket) for bucket in buckets) <= BUCKET


@given(st.data(), st.sampled_from([0, 1, 2, 5]), st.integers(0, 2**16), st.floats(-1, 1))
def test_one_merge_equals_plain_loops_in_ragged_batches(data, prefix, seed, threshold):
    before = data.draw(layouts(least=1 + prefix))
    generator = torch.Generator().manual_seed(seed)
    length = before.length.tolist()

    def random(*shape: int) -> list[Tensor]:
        return [torch.randn(n, *shape, generator=generator, dtype=torch.float64) for n in length]

    keys, x = random(2, 4), random(5)
    size = [torch.randint(1, 4, (n,), generator=generator).float() for n in length]
    similarity, partner = best_partner(similarity_metric(travelling(keys)), before, prefix)
    step, after = merge_step(above(threshold, similarity, partner), before, prefix)
    (merged,), merged_size = merge_tokens([travelling(x)], travelling(size), goal(step, before, after), after)
    results = zip(as_rows(after, merged), as_rows(after, merged_size), strict=True)
    for row, (found, found_size) in enumerate(results):
        metric = keys[row].mean(1)
        metric = metric / metric.norm(dim=1, keepdim=True)
        a, b = ([i for i in range(prefix, length[row]) if i % 2 == odd] for odd in (0, 1))
        goes_to = {i: max(b, key=lambda j: float(metric[i] @ metric[j])) for i in a if b}
        goes_to = {i: j for i, j in goes_to.items() if float(metric[i] @ metric[j]) > threshold}
        order = [*range(prefix), *(i for i in a if i not in goes_to), *b]
        expected_group = [order.index(goes_to.get(i, i)) for i in range(length[row])]
        assert step.group[row].tolist() == expected_group + [-1] * (before.longest - length[row])
        assert step.kept[row] == len(order) == len(found)
        for m in range(len(order)):
            members = [i for i, g in enumerate(expected_group) if g == m]
            weights = size[row][members].double()
            torch.testing.assert_close(found_size[m].double(), weights.sum())
            torch.testing.assert_close(found[m], weights @ x[row][members] / weights.sum(), rtol=1e-12, atol=1e-12)


def tome(metric: Tensor, x: Tensor, size: Tensor, count: int, first: int) -> tuple[Tensor, Tensor]:
    """ToMe's section 3 for one image: tokens alternate between two sets from the first of the sequence on, each of one
    set has an edge to its most similar of the other, and the `count` most similar edges merge.

    Args:
        metric, x, size: of its tokens.
        first: leading tokens (ToMe knows one, the class token) that have no edge.

    Returns:
        The tokens left and their sizes; the leading ones first, then what is left of the one set, then the other.
    """
    count_tokens = len(x)
    a, b = list(range(0, count_tokens, 2)), list(range(1, count_tokens, 2))
    edges = []
    for i in a:
        scores = [float(metric[i] @ metric[j]) if min(i, j) >= first else -math.inf for j in b]
        if scores and max(scores) > -math.inf:
            edges.append((max(scores), i, b[scores.index(max(scores))]))
    chosen = {i: j for _, i, j in sorted(edges, reverse=True)[:count]}
    order = [n for n in [*a, *b] if n < first]
    order = sorted(order) + [n for n in [*a, *b] if n >= first and n not in chosen]
    groups = [[n, *(i for i, j in chosen.items() if j == n)] for n in order]
    mass = torch.stack([size[group].sum() for group in groups])
    return torch.stack([(size[group, None] * x[group]).sum(0) for group in groups]) / mass[:, None], mass


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("lengths", [[49], [50], [50, 49, 50, 37], [12, 13, 14]])
def test_pairs_are_counted_from_the_first_token_as_in_tome(prefix, lengths):
    """Also in a second layer, whose tokens have sizes."""
    generator = torch.Generator().manual_seed(prefix + len(lengths))
    layout = Layout.of(torch.tensor([prefix + length for length in lengths]))
    rows = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in layout.lengths]
    sizes = [torch.ones(n) for n in layout.lengths]
    for count in (5, 3):
        keys = [torch.randn(len(row), 2, 4, generator=generator, dtype=torch.float64) for row in rows]
        metric = similarity_metric(travelling(keys))
        due, images = torch.full((len(lengths),), count), torch.arange(len(lengths))
        into = most_similar(due, *best_partner(metric, layout, prefix), images)
        step, after = merge_step(into, layout, prefix)
        (x,), size = merge_tokens([travelling(rows)], travelling(sizes), goal(step, layout, after), after)
        expected = [
            tome(m, row, size.double(), count, prefix)
            for m, row, size in zip(as_rows(layout, metric), rows, sizes, strict=True)
        ]
        layout, rows, sizes = after, as_rows(after, x), as_rows(after, size)
        assert layout.lengths == tuple(len(row) for row, _ in expected)
        for row, size, (row_of_tome, size_of_tome) in zip(rows, sizes, expected, strict=True):
            torch.testing.assert_close(row, row_of_tome)
            torch.testing.assert_close(size.double(), size_of_tome)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("channels", [8, 64, 72])
def test_sizes_weigh_the_same_in_a_mask_and_in_channels(dtype, channels):
    """Both equal the formula in float64, as near as the rounded inputs allow; a mask rounds log(size) to the type."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 11, channels, generator=generator).to(dtype) for _ in range(3))
    size = torch.randint(1, 500, (2, 11), generator=generator).float()
    size[1, 7:] = 0
    logits = query.double() @ key.double().mT / channels**0.5 + size.double().log()[:, None, None]
    exact = logits.softmax(-1) @ value.double()
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    for way in ("mask", "channels"):
        found = sized_attention(query, key, value, size.log(), way)
        assert found.dtype == dtype
        assert found.shape == exact.shape
        torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=0)


def test_channels_hold_more_of_a_size_than_a_mask_in_bfloat16():
    """Keys alike in all but size: the weights are the sizes, and values tell them apart."""
    size = torch.arange(1, 301).float()
    value = torch.eye(300)[None, None]
    same = torch.zeros(1, 1, 300, 300)
    expected = size / size.sum()
    error = {}
    for way in ("mask", "channels"):
        weights = sized_attention(*(part.bfloat16() for part in (same, same, value)), size.log()[None], way)
        error[way] = ((weights[0, 0, 0].float() - expected).abs() / expected).max()
    assert error["channels"] < 0.01 < error["mask"]


class Waits(TorchDispatchMode):
    """Counts how often the host waits for numbers of the device; `tolist` it must be told of."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        masked = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in tree_leaves(args[1:])
        )
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        waiting = name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")
        self.count += masked or unsized or waiting
        return func(*args, **kwargs)


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("rule", [ThresholdMerge((0.9, 0.8, 2.0, 0.7)), FixedMerge(keep=9)], ids=["DToMe", "ToMe"])
def test_a_merging_layer_waits_for_the_device_once(images, rule, monkeypatch):
    model = tiny.llava(layer=-1)
    layers, tokens = resolve(model).encoder_layers, embedded(model, tiny.pictures(images))
    seen = shown(tiny.pictures(images))
    run = EncoderRun(rule, tiny.LAYERS, seen, Pictures(seen.grids, prefix=1))
    waits, tolist = Waits(), Tensor.tolist

    def counted(tensor: Tensor) -> list:
        waits.count += 1
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    with torch.no_grad(), waits:
        tokens[0, 0, 0].item(), tokens[tokens > 0], tokens.nonzero(), tokens[0, 0].tolist()
        assert waits.count == 4, "the counter should see these four"
        for index, layer in enumerate(layers):
            tokens = run.layer(index, layer, tokens)
    assert waits.count - 4 == sum(one.map is not other.map for one, other in pairwise(run.states)) >= 3


def test_layers_whose_features_nobody_reads_do_not_run():
    model = tiny.llava(layer=2)
    pixels = tiny.pictures(3)
    stock = model.get_image_features(pixels).pooler_output
    unread = resolve(model).encoder_modules[2:]
    for parameter in (p for module in unread for p in module.parameters()):
        parameter.data.fill_(torch.nan)
    with dymu.apply(model, merge=ThresholdMerge((2.0,) * tiny.LAYERS)):
        found = model.get_image_features(pixels, output_hidden_states=True)
    torch.testing.assert_close(torch.stack(found.pooler_output), torch.stack(stock), atol=1e-5, rtol=0)
    assert [hidden is None for hidden in found.hidden_states] == [False] * 3 + [True] * 2
    assert torch.equal(found.last_hidden_state, found.hidden_states[2])


@given(st.integers(2, 729), st.integers(2, 27), st.floats(0.01, 1), st.sampled_from(SCHEDULES))
def test_removals_add_up_and_no_layer_removes_more_than_pairs_can_merge(tokens, layers, part, schedule):
    keep = max(part * tokens, fewest(tokens, layers))
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


@pytest.mark.parametrize("layers", [1, 2, 23, 24])
@pytest.mark.parametrize("r", [3, 8, 13.5])
@pytest.mark.parametrize("inflection", [-1, -0.5, 0, 0.25, 1])
def test_an_inflection_is_tomes(layers, r, inflection):
    removed = removals(2000, 2000 - r * layers, layers, inflection)
    assert removed[0] == pytest.approx(r * (1 - inflection) if layers > 1 else r, abs=1e-3)
    assert removed[-1] == pytest.approx(r * (1 + inflection) if layers > 1 else r, abs=1e-3)
    steps = [after - before for before, after in pairwise(removed)]
    assert steps == pytest.approx([steps[0]] * len(steps) if steps else [], abs=1e-3)
    if layers > 1:  # ToMe's program counts in whole tokens, and ends where it ends
        low = int(r * (1 - inflection))
        theirs = [int(low + (2 * r - 2 * low) * layer / (layers - 1)) for layer in range(layers)]
        ours = _counts(2000 - sum(theirs), 2000, layers, inflection, None)
        assert sum(ours) == sum(theirs)
        assert max(abs(mine - other) for mine, other in zip(ours, theirs, strict=True)) <= 2


def test_named_schedules_are_inflections():
    for layers in (2, 12, 24):
        near = (layers - 1) / (layers + 1)
        for schedule, inflection in zip(SCHEDULES, (0, -near, near), strict=True):
            expected = removals(900, 450, layers, schedule)
            assert removals(900, 450, layers, inflection) == pytest.approx(expected)


def test_an_inflection_lets_no_layer_out():
    assert sum(removals(64, 17, 2, 1.0)) == pytest.approx(47), "the first layer removes what the others cannot"
    assert removals(64, 48, 4, 1.0, [0]) == pytest.approx([16, 0, 0, 0])
    for wrong in (1.1, -2, math.nan, True, "0.5"):
        with pytest.raises(ValueError, match="an inflection from -1 to 1"):
            FixedMerge(10, wrong)
    model = tiny.llava()
    with dymu.apply(model, merge=FixedMerge(10, 0.5)) as handle:
        model.get_image_features(tiny.pictures(2))
        assert handle.last.kept == [10, 10]


@pytest.mark.parametrize("keep", [49, 40, 25, 12, 7, 0.5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fixed_merge_keeps_that_many_of_every_image(keep, schedule):
    model = tiny.llava()
    with dymu.apply(model, merge=FixedMerge(keep, schedule)) as handle:
        model.get_image_features(tiny.pictures(3))
        assert handle.last.kept == [keep if keep > 1 else 24] * 3


@given(st.integers(8, 729), st.sets(st.integers(0, 11), min_size=1), st.floats(0.01, 1), st.sampled_from(SCHEDULES))
def test_only_the_chosen_layers_remove(tokens, chosen, part, schedule):
    keep = max(part * tokens, fewest(tokens, len(chosen)))
    removed = removals(tokens, keep, 12, schedule, chosen)
    assert {layer for layer, count in enumerate(removed) if count > 1e-9} <= chosen
    assert sum(removed) == pytest.approx(tokens - keep, abs=1e-6 * tokens)


@pytest.mark.parametrize(("tokens", "layers"), [(576, 1), (576, 2), (256, 3), (49, 1), (49, 4), (729, 5)])
def test_a_fixed_number_may_be_the_fewest_that_pairs_leave(tokens, layers):
    keep = tokens
    for _ in range(layers):
        keep -= keep // 2
    assert fewest(tokens, layers, alike=True) == keep


@pytest.mark.parametrize(("keep", "layers"), [(25, 1), (13, 2), (7, 3), (4, 4), (3, 1), (1, 2), (20, 1)])
def test_the_fewest_tokens_are_met_and_what_layers_cannot_merge_merges_behind_them(keep, layers):
    model = tiny.llava(layer=-1)
    with dymu.apply(model, merge=FixedMerge(keep, layers=tuple(range(layers)))) as handle:
        model.get_image_features(tiny.pictures(2))
        assert handle.last.kept == [keep] * 2


def test_layers_that_are_chosen_keep_their_proportions():
    assert removals(576, 300, 4, "reverse_linear", [1, 3]) == pytest.approx([0, 92, 0, 184])
    with pytest.raises(BadBudget, match="in 1 layers"):
        removals(576, 287, 12, "constant", [3])
    for wrong in ([], [4], [-1]):
        with pytest.raises(ValueError, match="name some of 0 to 3"):
            removals(576, 300, 4, "constant", wrong)


def test_fixed_merge_in_some_layers():
    model = tiny.llava(layer=-1)
    with dymu.apply(model, merge=FixedMerge(20, layers=(1, 3))) as handle:
        model.get_image_features(tiny.pictures(2))
        first, *others = handle.last.layers
        assert first == [tiny.PATCHES] * 2
        assert others[0] == others[1] != first
        assert handle.last.kept == [20, 20]


def test_fixed_merge_in_layers_that_there_are_not():
    for wrong in ((), (-1, 2)):
        with pytest.raises(ValueError, match="name some, counted from 0"):
            FixedMerge(20, layers=wrong)
    model = tiny.llava(layer=2)
    with pytest.raises(ValueError, match=r"layers \[2, 30\], since only 0 to 1 feed this model; name some"):
        dymu.apply(model, merge=FixedMerge(20, layers=(1, 2, 30)))
    dymu.apply(model, merge=FixedMerge(30, layers=(1,))).remove()


def test_fixed_merge_merges_the_most_alike():
    similarity = torch.tensor([[0.1, 0.9, 0.5], [0.9, -torch.inf, 0.3]])
    partner = torch.tensor([[0, 1, 2], [1, 0, 0]])
    due = torch.tensor([2, 2])
    assert most_similar(due, similarity, partner, torch.arange(2)).tolist() == [[-1, 1, 2], [1, -1, 0]]
    assert most_similar(due, similarity, partner, torch.zeros(2, dtype=torch.long)).tolist() == [
        [-1, 1, -1],
        [1, -1, -1],
    ]


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
    similarity, _ = best_partner(torch.ones(2, 1, 4), Layout.equal(2, 1))
    assert similarity.eq(-torch.inf).all()


def test_merges_under_autocast_are_decided_in_float32():
    metric = similarity_metric(torch.randn(1, 64, 2, 8))
    layout = Layout.equal(1, 64)
    expected = best_partner(metric, layout)
    with torch.autocast("cpu", torch.bfloat16):
        found = best_partner(metric, layout)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[1], expected[1])
