"""What every published method chooses and merges, on six tokens by hand and against slow, obvious references."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dymu.merging import Layout, MergedTokens, peaks
from dymu.merging.match import best_partner
from dymu.reducers import Candidates, FixedMerge, Reducer, Shown, ThresholdMerge
from dymu.reducers.anchors import anchors
from dymu.reducers.ap_et import hardest
from dymu.reducers.cd_pruner import likeliest, relevance_of
from dymu.reducers.dart import unlike_pivots
from dymu.reducers.div_prune import far_apart
from dymu.reducers.faster_vlm import largest
from dymu.reducers.hierarchical_pool import ward
from dymu.reducers.holo_v import in_stretches
from dymu.reducers.keep import of_pictures, shared_out
from dymu.reducers.mm_tok import covering
from dymu.reducers.pixel_prune import predicted
from dymu.reducers.pru_merge import outliers
from dymu.reducers.saint import least_alike
from dymu.reducers.v_scan import scanned
from dymu.reducers.vid_com2 import rates
from dymu.reducers.vis_pruner import pruned
from dymu.reducers.vision_zip import gathered

DEGREES = torch.tensor([0.0, 8, 20, 90, 103, 180], dtype=torch.float64)
TOY = torch.stack((DEGREES.deg2rad().cos(), DEGREES.deg2rad().sin()), 1)
COSINE = TOY @ TOY.mT
SCORE = torch.tensor([0.05, 0.10, 0.30, 0.20, 0.25, 0.12], dtype=torch.float64)


def groups(label: Tensor) -> list[list[int]]:
    return [(label == one).nonzero()[:, 0].tolist() for one in label.unique()]


def test_the_largest_scores_stay_and_of_equal_ones_the_first() -> None:
    assert sorted(largest(SCORE, 3).tolist()) == [2, 3, 4]
    assert largest(torch.ones(5), 2).tolist() == [0, 1]


def test_pru_merge_takes_outliers_and_at_least_one() -> None:
    assert outliers(SCORE, plus=False).tolist() == [2], "none is above .436, and one stays"
    assert outliers(torch.tensor([0.02, 0.02, 0.03, 0.03, 0.05, 0.85]), plus=False).tolist() == [5]
    for count, spaced in ((16, 48), (32, 96), (48, 144)):
        score = torch.full((576,), 0.01)
        score[torch.arange(count) * 12 + 5] = 1.0
        kept = outliers(score, plus=True)
        grid = torch.arange(0, 575, int(576 // count / 3))
        assert abs(len(grid) - spaced) <= 1
        assert set(kept.tolist()) == set(grid.tolist()) | set((torch.arange(count) * 12 + 5).tolist())


def test_what_a_text_is_about_merges_later() -> None:
    layout, relevance = Layout.equal(1, 6), torch.tensor([[0.0, 0, 1, 0, 0, 0.4]], dtype=torch.float64)
    similarity, partner = best_partner(TOY[None], layout, apart=0.0 * relevance)
    assert torch.equal(similarity, best_partner(TOY[None], layout)[0])
    torch.testing.assert_close(similarity[0], DEGREES.new_tensor([0.9903, 0.9781, 0.9744]), atol=1e-4, rtol=0)
    assert partner.tolist() == [[0, 0, 1]]
    similarity, _ = best_partner(TOY[None], layout, apart=0.5 * relevance)
    torch.testing.assert_close(similarity[0], DEGREES.new_tensor([0.9903, 0.4781, 0.9744]), atol=1e-4, rtol=0)
    _, partner = best_partner(TOY[None], layout, apart=3.0 * torch.tensor([[0.0, 1, 0, 0, 0, 0]]))
    assert partner.tolist() == [[1, 1, 1]], "another partner, where the nearest is relevant"


def in_one_layer(rule: Reducer, x: Tensor) -> tuple[list[list[int]], Tensor, Tensor]:
    """The groups that the only layer leaves of tokens [N, C] that are their own keys, and their features and sizes."""
    state = MergedTokens.unmerged(Layout.equal(1, len(x)))
    shown = Shown(torch.empty(0), ((1, len(x)),), single=True, video=False)
    into = rule.in_layer(Candidates(0, 1, (len(x),), 0, state, x[None], x[None, :, None], shown))
    if into is None:
        return [[i] for i in range(len(x))], x, torch.ones(len(x))
    assert isinstance(into, Tensor)
    merged, state = state.merge(x[None], into, 0)
    assert state.size is not None
    return groups(state.map.group[0]), merged[0], state.size[0]


def test_tome_merges_so_many_and_dtome_what_is_alike() -> None:
    assert in_one_layer(FixedMerge(6), TOY)[0] == [[i] for i in range(6)]
    found, x, size = in_one_layer(FixedMerge(4), TOY)
    assert sorted(found) == [[0, 1, 2], [3], [4], [5]]
    first = found.index([0, 1, 2])
    torch.testing.assert_close(x[first], DEGREES.new_tensor([0.9767, 0.1604]), atol=1e-4, rtol=0)
    assert size.tolist() == [3 if number == first else 1 for number in range(4)]
    torch.testing.assert_close((size[:, None] * x).sum(0), TOY.sum(0))
    assert sorted(in_one_layer(ThresholdMerge((0.975,)), TOY)[0]) == [[0, 1, 2], [3], [4], [5]]
    assert sorted(in_one_layer(ThresholdMerge((0.97,)), TOY)[0]) == [[0, 1, 2], [3, 4], [5]]
    many = torch.randn(60, 3, generator=torch.Generator().manual_seed(8))
    taus = torch.linspace(0.2, 1.0, 30).tolist()
    left = [len(in_one_layer(ThresholdMerge((tau,)), many)[0]) for tau in taus]
    assert left == sorted(left)
    assert left[0] == 30, "half of them, at most"
    assert left[-1] == len(in_one_layer(ThresholdMerge((2.0,)), many)[0]) == 60


def test_vision_zip_gathers_what_is_not_dominant() -> None:
    label, target = gathered(SCORE, TOY, dominant=2, contextual=2)
    assert groups(label) == [[0, 1], [2], [3, 5], [4]]
    assert target.nonzero()[:, 0].tolist() == [0, 3]
    label, target = gathered(SCORE, TOY, dominant=6, contextual=2)
    assert label.tolist() == [*range(6)]
    assert not target.any()


def test_vis_pruner_drops_what_is_most_alike() -> None:
    assert sorted(pruned(SCORE, TOY, 4, 0.5).tolist()) == [0, 2, 4, 5]
    for keep, size in itertools.product(range(1, 6), (6, 5)):
        assert len(set(pruned(SCORE[:size], TOY[:size], min(keep, size), 0.5).tolist())) == min(keep, size)


def test_holo_v_shares_out_among_stretches() -> None:
    assert in_stretches(SCORE, 4, 2).tolist() == [2, 4, 3, 5]
    assert sorted(in_stretches(SCORE, 6, 2).tolist()) == [*range(6)], "what a stretch has no tokens for goes to others"
    assert len(in_stretches(torch.zeros(10), 4, 16)) == 4


def test_v_scan_takes_some_of_every_window() -> None:
    window = torch.arange(24)[:, None] // 6 * 4 + torch.arange(24) // 6
    same = torch.ones(576, dtype=torch.float64)
    kept = scanned(same, same, window.flatten(), 64)
    of_window = torch.bincount(window.flatten()[kept], minlength=16)
    assert len(kept) == 64
    assert of_window.min() >= 2
    first = [int((window.flatten() == number).nonzero()[0, 0]) for number in range(16)]
    assert set(first) <= set(kept.tolist()), "of equal ones the first"
    assert len(scanned(same, same, window.flatten(), 60)) == 16 + 30, "half of 60 is no multiple of 16"


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (torch.zeros(4, 4), {(0, 0)}),
        (torch.tensor([[0, 0, 1, 1]] * 4), {(0, 0), (0, 2)}),
        (torch.tensor([[0] * 4] * 2 + [[1] * 4] * 2), {(0, 0), (2, 0)}),
    ],
)
def test_pixel_prune_keeps_what_is_not_predicted(picture: Tensor, expected: set[tuple[int, int]]) -> None:
    stands = predicted(picture[..., None].float(), 0.0)
    assert {divmod(index, 4) for index in stands.flatten().tolist()} == expected


def test_pixel_prune_finds_the_corners_of_a_rectangle() -> None:
    picture = torch.zeros(5, 5, 1)
    picture[1:3, 1:4] = 1.0
    stands = predicted(picture, 0.0)
    assert {divmod(index, 5) for index in stands.flatten().tolist()} == {(0, 0), (1, 1), (1, 4), (3, 1)}


@pytest.mark.parametrize("tolerance", [0.0, 0.3])
def test_pixel_prune_gives_the_picture_back(tolerance: float) -> None:
    blocks = torch.rand(9, 7, 12, generator=torch.Generator().manual_seed(0)).mul(4).round().div(4)
    stands = predicted(blocks, tolerance)
    again = blocks.flatten(0, 1)[stands.flatten()].view_as(blocks)
    assert (again - blocks).abs().max() <= tolerance
    kept = stands.flatten() == torch.arange(63)
    assert bool(kept[stands.flatten()].all()), "what stands for others stands for itself"


def test_div_prune_takes_what_is_farthest() -> None:
    assert far_apart(1 - COSINE, 3).tolist() == [5, 0, 3]
    x = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    distance, chosen = 1 - x @ x.mT, far_apart(1 - x @ x.mT, 12).tolist()
    for number in range(1, 12):
        nearest = [min(float(distance[i, j]) for j in chosen[:number]) for i in range(40)]
        nearest = [-math.inf if i in chosen[:number] else value for i, value in enumerate(nearest)]
        assert chosen[number] == max(range(40), key=nearest.__getitem__)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    moved = far_apart(distance[order][:, order], 12)
    assert order[moved].tolist() == chosen, "equivariant"
    assert far_apart(torch.zeros(1, 1), 1).tolist() == [0]


def test_cd_pruner_is_greedy_in_the_determinant() -> None:
    text = torch.tensor([0.30, 0.25, 0.20, 0.10, 0.15, 0.05], dtype=torch.float64)
    relevance = relevance_of(text)
    torch.testing.assert_close(
        relevance, torch.tensor([0, 0.2, 0.4, 0.8, 0.6, 1.0], dtype=torch.float64), atol=1e-5, rtol=0
    )
    assert likeliest(relevance[:, None] * COSINE * relevance, 3).tolist() == [5, 3], "of two dimensions no third"
    other = relevance_of(-text)
    assert likeliest(other[:, None] * COSINE * other, 2).tolist() == [0, 4]
    x = torch.nn.functional.normalize(
        torch.randn(12, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64), dim=-1
    )
    weight = torch.rand(12, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.1
    kernel, chosen = weight[:, None] * (x @ x.mT) * weight, list[int]()
    for _ in range(6):
        free = [i for i in range(12) if i not in chosen]
        chosen.append(max(free, key=lambda i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
    assert likeliest(kernel, 6).tolist() == chosen


def test_mm_tok_covers_words_and_tokens() -> None:
    words = torch.eye(2, dtype=torch.float64)
    assert covering(TOY, words, TOY, 3).tolist() == [3, 0, 5]
    x = torch.nn.functional.normalize(torch.randn(20, 4, generator=torch.Generator().manual_seed(5)), dim=-1)
    assert sorted(covering(x, x[:3], x, 20).tolist()) == [*range(20)]
    assert len(covering(x, x[:0], x, 5)) == 5, "a prompt without words"


def test_density_peaks_gather_their_neighbours() -> None:
    distance = torch.cdist(TOY, TOY) / math.sqrt(2)
    score = peaks(distance, 3)
    expected = torch.tensor([0.0964, 1.3994, 0.1438, 0.6459, 0.1226, 0.4872], dtype=torch.float64)
    torch.testing.assert_close(score, expected, atol=1e-4, rtol=0)
    centres = (score > 0.5).nonzero()[:, 0]
    assert groups(distance[:, centres].argmin(1)) == [[0, 1, 2], [3, 4, 5]]


def test_vid_com2_gives_unlike_frames_more() -> None:
    torch.testing.assert_close(rates(torch.full((4,), 0.7), 0.25), torch.full((4,), 0.25))
    for apart, expected in ((0.005, (0.2194, 0.2806)), (0.01, (0.1922, 0.3078)), (0.05, (0.1267, 0.3733))):
        found = rates(torch.tensor([1.0 + apart, 1.0], dtype=torch.float64), 0.25)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0)


def test_dart_takes_pivots_and_what_is_least_like_them() -> None:
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(6))
    words = torch.randn(5, 8, generator=torch.Generator().manual_seed(7))
    for keep in (1, 3, 4, 5, 20, 59, 60):
        chosen = unlike_pivots(x, words, keep).tolist()
        assert len(set(chosen)) == len(chosen) == keep
    assert set(unlike_pivots(x, words, 4).tolist()) == set(largest(x.abs().sum(-1), 4).tolist())


def test_anchors_are_what_many_are_like() -> None:
    assert sorted(anchors(COSINE, 2).tolist()) == [2, 3]


def test_skip_visions_merge_joins_what_all_are_like() -> None:
    """Of the toy's tokens 3 and 2 are most like all, and join 4 and 1."""
    kept = largest(-COSINE.sum(1), 4)
    assert sorted(kept.tolist()) == [0, 1, 4, 5]
    assert [int(kept[COSINE[token, kept].argmax()]) for token in (3, 2)] == [4, 1]


def test_ap_et_keeps_what_cannot_be_combined() -> None:
    x = torch.eye(6, dtype=torch.float64)
    x[4] = torch.nn.functional.normalize(x[0] + x[1], dim=0)
    x[5] = torch.nn.functional.normalize(x[0] - x[1], dim=0)
    assert set(hardest(x, 4, 4).tolist()) <= {0, 1, 2, 3, 4, 5}
    assert {2, 3} <= set(hardest(x, 4, 4).tolist())


def test_saint_drops_the_most_alike() -> None:
    left, total = set(range(6)), {}
    for _ in range(3):
        total = {i: sum(float(COSINE[i, j]) for j in left) for i in left}
        left.remove(max(left, key=total.__getitem__))
    assert set(least_alike(COSINE, 3).tolist()) == left


def test_ward_joins_by_its_rule() -> None:
    distance = torch.cdist(TOY, TOY)
    label, heights = ward(1 - COSINE, 1)
    expected = torch.tensor([0.0097, 0.0256, 0.0521, 1.0329, 2.2910], dtype=torch.float64)
    torch.testing.assert_close(heights, expected, atol=1e-4, rtol=0)
    assert groups(ward(1 - COSINE, 3)[0]) == [[0, 1, 2], [3, 4], [5]]
    assert groups(ward(1 - COSINE, 4)[0]) == [[0, 1], [2], [3, 4], [5]]
    assert groups(ward(distance, 6)[0]) == [[i] for i in range(6)]
    assert len(label.unique()) == 1


def one_by_one(distance: Tensor, clusters: int) -> tuple[list[set[int]], list[float]]:
    """Ward's clusters, the two of the least distance joined at each step; and the heights."""
    groups, heights = [{i} for i in range(len(distance))], list[float]()
    square = {(a, b): float(distance[a, b]) ** 2 for a in range(len(distance)) for b in range(len(distance)) if a != b}
    alive = [*range(len(distance))]
    while len(alive) > clusters:
        a, b = min(itertools.combinations(alive, 2), key=square.__getitem__)
        apart, (m, n) = square[a, b], (len(groups[a]), len(groups[b]))
        heights.append(math.sqrt(apart))
        alive.remove(b)
        for c in alive:
            if c != a:
                k = len(groups[c])
                joined = ((m + k) * square[a, c] + (n + k) * square[b, c] - k * apart) / (m + n + k)
                square[a, c] = square[c, a] = joined
        groups[a] |= groups[b]
    return [groups[a] for a in alive], heights


@pytest.mark.parametrize("seed", range(12))
def test_ward_all_at_once_is_ward_one_by_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(2, 40, (1,), generator=generator))
    x = torch.nn.functional.normalize(torch.randn(count, 4, generator=generator, dtype=torch.float64), dim=-1)
    distance = (1 - x @ x.mT).clamp(0, 2)
    for clusters in (1, count // 3 + 1, count):
        expected, heights = one_by_one(distance, clusters)
        label, found = ward(distance, clusters)
        assert sorted(map(sorted, expected)) == groups(label)
        torch.testing.assert_close(found[: len(heights)], torch.tensor(heights, dtype=torch.float64))
    same = ward(torch.zeros(count, count, dtype=torch.float64), min(count, 3))[0]
    assert len(same.unique()) == min(count, 3), "ties, too, end"


def test_whole_parts_are_shared_out() -> None:
    assert shared_out(7, [1, 1, 1], [9, 9, 9]) == [3, 2, 2]
    assert shared_out(10, [1, 3], [9, 5]) == [5, 5]
    assert shared_out(0, [1, 2], [3, 3]) == [0, 0]
    assert shared_out(3, [math.nan, 1, math.nan], [2, 1, 2]) == [1, 1, 1]
    assert shared_out(4, [5, 1, 1, 1], [9, 9, 9, 9]) == [3, 1, 0, 0], "the largest remainders, of equal ones the first"
    assert shared_out(9, [5, 1, 1, 1], [3, 9, 9, 9]) == [3, 2, 2, 2]
    assert of_pictures(3, [9, 1, 1], [9, 9, 9]) == [1, 1, 1]
    assert of_pictures(5, [9, 1, 1], [9, 9, 9]) == [3, 1, 1]
    assert of_pictures(16, [16, 48], [16, 48]) == [4, 12]
    assert of_pictures(16, [3, 7, 3, 3], [9, 9, 9, 9]) == [3, 7, 3, 3]
    assert of_pictures(4, [9, 0.1, 0.1], [9, 9, 0]) == [3, 1, 0]
    assert of_pictures(2, [1, 9, 9], [9, 9, 9]) == [0, 1, 1]
    assert sum(shared_out(17, [0.2, 0.5, 0.3], [30, 30, 30])) == 17
