"""What the reducers of published methods answer about whole pictures of a few tokens, against slow, obvious loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from dymu.errors import BadBudget
from dymu.evaluation.methods import METHODS, Row
from dymu.reducers import (
    Anchors,
    ApET,
    AveragePool,
    CDPruner,
    DARTEmbeddings,
    DensityPeaks,
    DivPrune,
    FixedMerge,
    HierarchicalPool,
    MMTok,
    PruMerge,
    Reduced,
    Reducer,
    Shown,
    SkipVision,
    ThresholdMerge,
    Tokens,
    VidCom2,
    VisionZip,
    VScan,
)
from dymu.reducers.answers import check_reduced
from dymu.reducers.mm_tok import covering
from dymu.reducers.pru_merge import outliers
from dymu.reducers.sources import Sources
from dymu.reducers.vid_com2 import likeness
from dymu.token_map import TokenMap, leaders_of
from test_peers import SCORE, TOY


@dataclass(eq=False)
class Told(Sources):
    """What an encoder would tell of tokens one after the other, by what is asked for; nothing else may be asked."""

    grids: Sequence[tuple[int, int]]
    said: dict[Any, Tensor]

    def attention(self, layer: int | None = -1, heads: bool = True) -> list[Tensor]:
        return self._by_picture("attention", layer, heads)

    def keys(self, layer: int | None = -1, heads: bool = True) -> list[Tensor]:
        return self._by_picture("keys", layer, heads)

    def features(self) -> list[Tensor]:
        return self._by_picture("features")

    def _by_picture(self, *asked: Any) -> list[Tensor]:
        parts = self.said[asked].split([math.prod(grid) for grid in self.grids])
        return [part.unflatten(0, grid) for part, grid in zip(parts, self.grids, strict=True)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(
    x: Tensor,
    grid: tuple[int, int],
    said: dict[Any, Tensor] | None = None,
    words: Tensor | None = None,
    frames: int = 1,
) -> Tokens:
    """Tokens [N, C] of one picture, or of the frames of a video, each of the grid.

    Args:
        words: [W, C], of the question.
    """
    count = math.prod(grid)
    assert len(x) == frames * count
    grids = (grid,) * frames
    shown = Shown(
        random(frames, 3, 4, 4), grids, frames == 1, frames > 1, sources=Told(grids, said or {}),
        find_items=lambda: [(count,) * frames], embed=lambda ids: x.new_empty(0) if words is None else words[ids],
        find_text=lambda: [torch.arange(0 if words is None else len(words))] * frames,
    )  # fmt: skip
    cell = torch.arange(frames * count).view(frames, *grid)
    place = torch.stack((cell % count // grid[1], cell % grid[1]), -1).flatten(0, 2).flip(-1)
    return Tokens(
        x[None], TokenMap.identity(1, len(x)), [len(x)], cell.flatten()[None] // count, (0, frames), shown,
        lambda: [list(cell)], lambda: torch.cat((place, place + 1), -1)[None].double(),
        lambda grids: torch.cat([grid.flatten(0, 1) for grid in grids])[None],
    )  # fmt: skip


def told(count: int, seed: int = 1) -> dict[Any, Tensor]:
    """Attention of the layers that are read, keys, and what the encoder gave, at random."""
    score = {("attention", layer, True): random(count, seed=seed + layer).exp() for layer in (-1, 5)}
    return score | {("keys", -1, True): random(count, 5, seed=seed), ("features",): random(count, 6, seed=seed + 9)}


def answered(reducer: Reducer, tokens: Tokens) -> tuple[Reduced, Tensor]:
    """What a reducer leaves of them, checked, and the features [M, C]."""
    stage: Any = "after_encoder" if reducer.reduces("after_encoder", tokens.shown) else "in_prompt"
    reduced = check_reduced(getattr(reducer, stage)(tokens), reducer, stage, tokens)
    return reduced, tokens.features_of(reduced)[0]


def parts(reduced: Reduced) -> list[list[int]]:
    """The tokens behind each that is left."""
    return [(reduced.map.group[0] == number).nonzero()[:, 0].tolist() for number in range(reduced.map.width)]


def kept(reduced: Reduced) -> list[int]:
    """Of a reducer that leaves nothing in place of dropped tokens, those that stay."""
    assert all(len(part) == 1 for part in parts(reduced))
    return [part[0] for part in parts(reduced)]


def most(score: Sequence[float], count: int) -> list[int]:
    """The indices of the largest, of equal ones the first."""
    return sorted(range(len(score)), key=lambda i: (-score[i], i))[:count]


def nearest(score: Tensor, among: Iterable[int]) -> int:
    """Which of some indices has the largest score [N]."""
    return max(among, key=score.tolist().__getitem__)


def groups_of(cosine: Tensor, chosen: Iterable[int]) -> list[list[int]]:
    """The tokens that each chosen one stands for, by cosines [N, N], in the order of their first."""
    chosen = set(chosen)
    stands = [i if i in chosen else nearest(row, chosen) for i, row in enumerate(cosine)]
    return sorted([i for i, one in enumerate(stands) if one == chosen_one] for chosen_one in chosen)


def test_pru_merge_adds_neighbours_by_their_attention() -> None:
    x = random(6, 3)
    said = {("attention", None, False): SCORE, ("keys", None, False): TOY}
    reduced, (one,) = answered(PruMerge(), seen(x, (2, 3), said))
    assert parts(reduced) == [[*range(6)]]
    torch.testing.assert_close(one, x[2] + sum(SCORE[j] * x[j] for j in (0, 1, 3, 4, 5)))


@pytest.mark.parametrize("plus", [False, True])
def test_pru_merge_adds_the_32_nearest_keys(plus: bool) -> None:
    x, keys, score = random(40, 4), random(40, 6, seed=1), random(40, seed=2).abs() / 100
    score[[7, 20, 33]] = torch.tensor([0.5, 0.9, 0.7], dtype=torch.float64)
    chosen = outliers(score, plus).tolist()
    assert set(chosen) == {7, 20, 33} | set(range(0, 39, 4) if plus else ())
    said = {("attention", None, False): score, ("keys", None, False): keys}
    reduced, y = answered(PruMerge(plus), seen(x, (5, 8), said))
    cosine = cosine_similarity(keys[:, None], keys, dim=-1)
    assert parts(reduced) == groups_of(cosine, chosen)
    for part, found in zip(parts(reduced), y, strict=True):
        (one,) = {*part} & {*chosen}
        near = [j for j in most(cosine[one].tolist(), 40) if j != one][:32]
        torch.testing.assert_close(found, x[one] + sum(score[j] * x[j] for j in near))


@pytest.mark.parametrize(
    ("contextual", "groups", "made"),
    [
        (2, [[0, 1], [2], [3, 5], [4]], lambda x: (x[0] + x[1], x[2], x[3] + x[5], x[4])),
        (1, [[0, 1, 3, 5], [2], [4]], lambda x: (x[0] + (x[1] + x[3] + x[5]) / 3, x[2], x[4])),
        (4, [[i] for i in range(6)], lambda x: tuple(x)),
    ],
)
def test_vision_zip_adds_the_mean_of_what_joins(
    contextual: int, groups: list[list[int]], made: Callable[[Tensor], tuple[Tensor, ...]]
) -> None:
    x = random(6, 3)
    said = {("attention", -1, True): SCORE, ("keys", -1, True): TOY}
    reduced, y = answered(VisionZip(2, contextual), seen(x, (2, 3), said))
    assert parts(reduced) == groups
    torch.testing.assert_close(y, torch.stack(made(x)))


def test_v_scan_averages_what_it_does_not_choose() -> None:
    x, said = random(24, 5), told(24)
    early, late = (said["attention", layer, True].tolist() for layer in (5, -1))
    chosen = set[int]()
    for top in (0, 2):
        for left in (0, 2, 4):
            window = [6 * row + column for row in (top, top + 1) for column in (left, left + 1)]
            chosen.add(max(window, key=early.__getitem__))
    chosen |= set(most([-1.0 if i in chosen else score for i, score in enumerate(late)], 7))
    assert len(chosen) == 13, "14, but that half of it is no multiple of six windows"
    reduced, y = answered(VScan(14, side=2), seen(x, (4, 6), said))
    cosine = cosine_similarity(x[:, None], x, dim=-1)
    assert sorted(parts(reduced)) == groups_of(cosine, chosen)
    assert reduced.map.size().sum() == 24
    for part, found in zip(parts(reduced), y, strict=True):
        torch.testing.assert_close(found, x[part].mean(0))


def test_mm_toks_gains_fall() -> None:
    """Of what words and tokens are covered by, the words' row by row a part of 1, the tokens' of a half."""

    def gains(x: Tensor, words: Tensor, keep: int) -> list[float]:
        by_words = torch.stack([(x @ word / 0.02).softmax(0) / len(words) for word in words])
        by_tokens = torch.stack([(x @ one / 0.2).softmax(0) / len(x) for one in x])
        rows = torch.cat((by_words, by_tokens / 2))
        covered, chosen = [0.0], list[int]()
        for pick in covering(x, words, x, keep).tolist():
            cover = {one: float(rows[:, [*chosen, one]].amax(1).sum()) for one in range(len(x)) if one not in chosen}
            assert cover[pick] == pytest.approx(max(cover.values()))
            chosen.append(pick)
            covered.append(cover[pick])
        return [after - before for before, after in itertools.pairwise(covered)]

    assert gains(TOY, torch.eye(2, dtype=torch.float64), 3) == pytest.approx([0.4747, 0.3803, 0.0805], abs=1e-4)
    for seed in range(5):
        x = normalize(random(30, 6, seed=seed), dim=-1)
        found = gains(x, normalize(random(12, 6, seed=seed + 10), dim=-1), 20)
        assert all(after <= before + 1e-12 for before, after in itertools.pairwise(found))
        assert found[-1] < found[0] / 2


def of_video(x: Tensor, frames: int, keep: int) -> Reduced:
    return answered(VidCom2(keep), seen(x, (2, len(x) // frames // 2), frames=frames))[0]


def counted(reduced: Reduced, frames: int) -> list[int]:
    """Tokens that each frame keeps."""
    each = reduced.map.tokens // frames
    return torch.bincount(torch.tensor(kept(reduced)) // each, minlength=frames).tolist()


def test_vid_com2_keeps_as_many_of_frames_alike_and_more_of_others() -> None:
    frame = random(8, 6) + 3
    assert counted(of_video(frame.repeat(4, 1), 4, 8), 4) == [2, 2, 2, 2]
    assert counted(of_video(frame.repeat(4, 1), 4, 20), 4) == [5, 5, 5, 5]
    other = torch.cat((frame, frame, frame + 4 * torch.tensor([1.0, -1, 1, -1, 1, -1]), frame))
    few = counted(of_video(other, 4, 12), 4)
    assert sum(few) == 12
    assert few[2] == max(few) > max(few[:2] + few[3:])


def test_vid_com2_keeps_what_is_odd_in_its_frame() -> None:
    """Of four channels the first two vary least, and tell one token of each frame from the others."""
    places = [1, 6, 3]
    x = torch.cat((1 + random(24, 2) / 20, 3 * random(24, 2, seed=1)), 1)
    odd = torch.tensor([at + 8 * number for number, at in enumerate(places)])
    x[odd, 1] = -1.0
    assert kept(of_video(x, 3, 3)) == odd.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_vid_com2_reads_the_channels_that_vary_least(seed: int) -> None:
    x = random(24, 10, seed=seed) * torch.linspace(0.3, 2, 10, dtype=torch.float64) + random(10, seed=seed + 9)
    x[8:16] += random(10, seed=seed + 20) / 2
    reduced = of_video(x, 3, 9)
    channels = sorted(range(10), key=lambda c: float(((x[:, c] - x[:, c].mean()) ** 2).sum()))[:5]
    unit = [one / one.norm() for one in x[:, channels]]

    def alike(one: Tensor, others: list[Tensor]) -> float:
        square = float(((one - sum(others) / len(others)) ** 2).sum())
        return sum(math.exp(-square / (2 * width)) for width in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    found = likeness(torch.stack(unit), torch.stack(unit).mean(0))
    assert found.tolist() == pytest.approx([alike(one, unit) for one in unit])

    for number, count in enumerate(counted(reduced, 3)):
        own = unit[8 * number : 8 * number + 8]
        score = [-alike(one, unit) - alike(one, own) for one in own]
        stay = [token - 8 * number for token in kept(reduced) if token // 8 == number]
        assert sorted(most(score, count)) == stay


def test_dart_keeps_what_is_least_like_its_pivots() -> None:
    x, words = random(60, 8), random(6, 8, seed=1)
    for keep in (3, 4, 20, 45):
        chosen = most(x.abs().sum(1).tolist(), min(4, keep))
        pivots = [*x[chosen], *words[most(words.abs().sum(1).tolist(), 4)]]
        left = keep - len(chosen)
        for number, pivot in enumerate(pivots):
            for _ in range(math.ceil(left / (8 - number))):
                rest = [i for i in range(60) if i not in chosen]
                chosen.append(nearest(-cosine_similarity(x, pivot, dim=-1), rest))
                left -= 1
        reduced, y = answered(DARTEmbeddings(keep), seen(x, (6, 10), words=words))
        assert kept(reduced) == sorted(chosen)
        assert torch.equal(y, x[sorted(chosen)])


@pytest.mark.parametrize("keep", [5, 6, 9, 17])
def test_dart_keeps_some_of_every_frame_and_fills_within_it(keep: int) -> None:
    x, words = random(30, 8, seed=3), random(4, 8, seed=4)
    x[6:12] *= 20  # a frame of the largest pivots
    plain, _ = answered(DARTEmbeddings(keep), seen(x, (2, 3), words=words, frames=5))
    frames = [token // 6 for token in kept(plain)]
    assert (len(frames), set(frames)) == (keep, {0, 1, 2, 3, 4})
    filled, _ = answered(DARTEmbeddings(keep, fill="nearest"), seen(x, (2, 3), words=words, frames=5))
    cosine = cosine_similarity(x[:, None], x, dim=-1)
    apart = torch.arange(30)[:, None] // 6 != torch.arange(30) // 6
    assert sorted(parts(filled)) == groups_of(cosine.masked_fill(apart, -2), kept(plain))
    assert all(one in part for one, part in zip(kept(plain), parts(filled), strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_ap_et_keeps_what_its_basis_approximates_worst(seed: int) -> None:
    x = random(30, 7, seed=seed)
    unit = [one / one.norm() for one in x]
    apart = [[float(((one - other) ** 2).sum()) for other in unit] for one in unit]
    basis = [max(range(30), key=lambda i: min(apart[i][j] for j in range(30) if j != i))]
    for _ in range(3):
        rest = [i for i in range(30) if i not in basis]
        basis.append(max(rest, key=lambda i: min(apart[i][j] for j in basis)))
    span = torch.stack([unit[i] for i in basis], 1)
    error = [float((span @ torch.linalg.lstsq(span, one[:, None]).solution - one[:, None]).norm()) for one in unit]
    chosen = {*basis, *most([-1.0 if i in basis else e for i, e in enumerate(error)], 8)}
    reduced, y = answered(ApET(12, basis=4), seen(x, (5, 6)))
    assert sorted(parts(reduced)) == groups_of(torch.stack(unit) @ torch.stack(unit).mT, chosen)
    torch.testing.assert_close(y, torch.stack([x[part].mean(0) for part in parts(reduced)]))


CONSERVING: list[Reducer] = [
    AveragePool(6), DensityPeaks(keep=7), DensityPeaks(0.5, neighbours=3), Anchors(7), SkipVision(7),
    HierarchicalPool(7), ApET(7, basis=3), VScan(7, side=2), FixedMerge(7), ThresholdMerge((), images=(0.3, 0.2)),
]  # fmt: skip


@pytest.mark.parametrize("rule", CONSERVING, ids=str)
def test_sizes_and_what_they_weigh_are_conserved(rule: Reducer) -> None:
    """Of tokens that are means of several already, too."""
    whole = seen(random(30, 5), (5, 6), told(30))
    label = torch.randint(18, (1, 30), generator=torch.Generator().manual_seed(4))
    some = whole.then(Reduced(TokenMap.from_leaders(leaders_of(label, 18))))
    assert some.size.unique().tolist() == [1, 2, 3, 4]
    for tokens in (whole, some):
        reduced, y = answered(rule, tokens)
        assert 1 < len(y) < tokens.counts[0]
        group = tokens.map.then(reduced.map).group[0]
        assert reduced.map.sum(tokens.size).sum() == 30
        torch.testing.assert_close(
            y, torch.stack([whole.features[0, group == number].mean(0) for number in range(len(y))])
        )
        torch.testing.assert_close((reduced.map.sum(tokens.size)[0, :, None] * y).sum(0), whole.features[0].sum(0))


def test_skip_visions_merge_of_the_toy() -> None:
    reduced, y = answered(SkipVision(4), seen(TOY, (2, 3)))
    assert parts(reduced) == [[0], [1, 2], [3, 4], [5]]
    torch.testing.assert_close(y[1], (TOY[1] + TOY[2]) / 2)


EQUIVARIANT: list[Reducer] = [
    DivPrune(9), CDPruner(9), CDPruner(14, fill="nearest"), MMTok(9), ApET(9, basis=4), Anchors(9), SkipVision(9),
    DensityPeaks(keep=9), DensityPeaks(0.3, neighbours=6), HierarchicalPool(9),
]  # fmt: skip


def differs(rule: Reducer) -> bool:
    """Whether tokens in another order are left in other groups."""
    x, words, encoded = random(40, 8), random(5, 8, seed=1), random(40, 6, seed=2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    found = []
    for moved in (torch.arange(40), order):
        reduced, y = answered(rule, seen(x[moved], (5, 8), {("features",): encoded[moved]}, words))
        groups = [tuple(sorted(moved[part].tolist())) for part in parts(reduced)]
        by_first = sorted(range(len(groups)), key=groups.__getitem__)
        found.append((sorted(groups), y[by_first]))
    (one, of_one), (other, of_other) = found
    assert 1 < len(one) < 40
    return one != other or not torch.allclose(of_one, of_other)


@pytest.mark.parametrize("rule", EQUIVARIANT, ids=str)
def test_the_order_of_tokens_changes_nothing(rule: Reducer) -> None:
    assert not differs(rule)


def test_where_the_order_of_tokens_counts_it_is_found_out() -> None:
    assert differs(FixedMerge(9))


@pytest.mark.parametrize(("count", "distinct"), [(40, 5), (41, 7), (32, 1), (23, 22)])
def test_of_repeated_tokens_one_of_each_is_left(count: int, distinct: int) -> None:
    """Wherever they stand: a round that merges nothing changes who is compared with whom, all the same."""
    generator = torch.Generator().manual_seed(count)
    for _ in range(5):
        kind = torch.cat((torch.arange(distinct), torch.randint(distinct, (count - distinct,), generator=generator)))
        kind = kind[torch.randperm(count, generator=generator)]
        x = random(distinct, 6)
        reduced, y = answered(ThresholdMerge((), images=(0.9999,) * 30), seen(x[kind], (1, count)))
        found = sorted(parts(reduced))
        assert found == sorted((kind == one).nonzero()[:, 0].tolist() for one in range(distinct))
        torch.testing.assert_close(y, torch.stack([x[kind[part[0]]] for part in parts(reduced)]))


COUNTED = [method for method in METHODS.values() if method.reducer and method.solves is None]
FEWER = {"vision-zip", "v-scan"}
"""Which may keep fewer than are asked for. Pooling rounds rows and columns each, to whatever number that makes."""


@pytest.mark.parametrize("grid", [(1, 13), (13, 1), (3, 7), (1, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("method", COUNTED, ids=lambda method: method.name)
def test_odd_grids_and_numbers(method: Any, grid: tuple[int, int]) -> None:
    count = math.prod(grid)

    def made(keep: int) -> Reducer:
        reducer: Reducer = method.make(Row(method.name, keep, "exact", (method.schedules or ("",))[0]), keep, 0)
        return reducer

    for constant in (False, True):
        x = torch.ones(count, 6, dtype=torch.float64) if constant else random(count, 6)
        said = {asked: torch.ones_like(part) if constant else part for asked, part in told(count).items()}
        tokens = seen(x, grid, said, random(5, 6, seed=1))
        for keep in sorted({1, 2, count // 2, count - 1, count} & {*range(1, count + 1)}):
            if method.name == "vision-zip" and keep == 1:
                with pytest.raises(BadBudget, match="at least 2"):  # of two kinds of tokens there is one each
                    made(keep)
                continue
            if method.name == "tome" and keep == count:
                assert made(keep).after_encoder(tokens) is None
                continue
            made(keep).check_fits(24, count)
            reduced, y = answered(made(keep), tokens)
            assert torch.isfinite(y).all()
            of_fields = method.name == "pool" and min(grid) > 1 and abs(len(y) - keep) <= min(grid) / 2
            assert of_fields or len(y) == keep or (method.name in FEWER and len(y) < keep < count)
            if constant and method.name != "vision-zip":
                torch.testing.assert_close(y, torch.ones_like(y))
            if method.unmerges("compact") == "compact":  # something stands for every token
                assert bool((reduced.map.group >= 0).all())
        with pytest.raises(BadBudget):
            made(count + 1).check_fits(24, count)
        if method.name != "tome":  # of which that is asked ahead of its layers
            with pytest.raises(BadBudget):
                answered(made(count + 1), tokens)
