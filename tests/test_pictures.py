"""How patches make units, and the order in which an encoder's layers get them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dymu.merging import Layout, MergedTokens, Pictures, Units, above
from dymu.merging.encoder_layer import rotated

lengths = st.lists(st.integers(0, 5), min_size=1, max_size=4)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@given(lengths=lengths, prefix=st.integers(0, 2), patches=st.integers(1, 4))
def test_units_hold_their_patches(lengths, prefix, patches):
    layout = Layout.of(torch.tensor([prefix + length for length in lengths]))
    if not layout.total:
        return
    units = Units(patches, prefix)
    of_patches = units.of_patches(layout)
    assert of_patches.lengths == tuple(prefix + length * patches for length in lengths)
    x = random(*of_patches.shape, 3)
    gathered = units.gather(x, layout)
    assert torch.equal(units.spread(gathered, layout), x)

    # One picture after the other, and one unit after the other.
    rows, expected, begin = x.flatten(0, 1), [], 0
    for length in lengths:
        expected += [rows[begin + n].repeat(patches) for n in range(prefix)]
        begin += prefix
        for _ in range(length):
            expected.append(rows[begin : begin + patches].flatten())
            begin += patches
    assert torch.equal(gathered.flatten(0, 1), torch.stack(expected))
    numbers = torch.arange(layout.total).view(layout.shape)
    counted = [1 if unit < prefix else patches for length in lengths for unit in range(prefix + length)]
    assert torch.equal(
        units.repeat(numbers, layout).flatten(), numbers.flatten().repeat_interleave(torch.tensor(counted))
    )
    keys = random(*of_patches.shape, 2, 3)
    summed = units.metric(keys, layout).flatten(0, 1)
    for number, unit in enumerate(units.gather(keys.flatten(-2), layout).flatten(0, 1)):
        torch.testing.assert_close(summed[number], unit.view(patches, 2, 3).sum(0))


ARRANGED = [
    Pictures(((4, 6),) * 3, side=2, prefix=1, regroups=True),
    Pictures(((3, 6),) * 2, side=3, regroups=True),
    Pictures(((4, 6), (2, 2), (6, 2)), side=2, arrangement="packed", regroups=True),
    Pictures(((4, 6), (2, 2), (6, 2)), side=2, arrangement="raster"),
    Pictures(((3, 5), (2, 2)), arrangement="raster"),
    Pictures(((3, 6), (3, 3), (6, 3)), side=3, arrangement="padded", regroups=True, length=20),
]


def given_to_layers(pictures: Pictures, channels: int) -> Tensor:
    """What the first layer gets: patches whose channels say the picture, the row and the column of each."""
    places = [
        [(number, row, column) for row in range(rows) for column in range(columns)]
        for number, (rows, columns) in enumerate(pictures.grids)
    ]
    if pictures.arrangement == "packed":
        side = pictures.side
        places = [sorted(p, key=lambda place: (place[1] // side, place[2] // side, place)) for p in places]
    of_each = [torch.tensor(place, dtype=torch.float64).repeat(1, channels // 3) for place in places]
    if pictures.arrangement == "batch":
        return torch.stack([torch.cat((torch.full((pictures.prefix, channels), -1.0), one)) for one in of_each])
    if pictures.arrangement == "padded":
        return torch.stack([torch.cat((one, one.new_zeros(pictures.length - len(one), channels))) for one in of_each])
    packed = torch.cat(of_each).double()
    return packed if pictures.arrangement == "packed" else packed[None]


@pytest.mark.parametrize("pictures", ARRANGED, ids=lambda p: f"{p.arrangement}-{p.side}")
def test_patches_come_out_as_they_went_in(pictures):
    x = given_to_layers(pictures, 6)
    travelling, state = pictures.enter(x, None, None)
    units = state.units.gather(travelling, state.layout).view(*state.layout.shape, -1, 6).flatten(0, 1)
    ahead = pictures.prefix
    for unit, picture in zip(
        units, torch.arange(state.layout.batch).repeat_interleave(state.layout.length), strict=True
    ):
        if unit[0, 0] >= 0:  # of one picture, and of one square of its patches
            assert bool((unit[:, 0] == picture).all())
            corner = unit[0, 1:3]
            assert bool((corner % pictures.side == 0).all())
            assert unit[:, 1:3].sub(corner).tolist() == [
                [row, column] for row in range(pictures.side) for column in range(pictures.side)
            ]
        else:
            ahead -= 1
    assert ahead == pictures.prefix * (1 - len(pictures.grids))
    assert torch.equal(
        pictures.leave(travelling, state), x if x.ndim == 2 or pictures.arrangement != "raster" else x[0]
    )
    angles = (x[..., :3], -x[..., :3]) if pictures.arrangement != "batch" else None
    _, turned = pictures.enter(x, angles, None)
    if turned.angles is not None:
        assert torch.equal(turned.angles[0], travelling[..., :3])
        assert torch.equal(turned.angles[1], -travelling[..., :3])


@pytest.mark.parametrize("pictures", ARRANGED, ids=lambda p: f"{p.arrangement}-{p.side}")
def test_merged_units_come_out_at_all_their_places(pictures):
    x = given_to_layers(pictures, 3)
    travelling, state = pictures.enter(x, (x[..., :2], x[..., :2]) if pictures.arrangement != "batch" else None, None)
    keys = random(*state.patches.shape, 1, 4)
    into = above(-1.0, *state.match(keys, pictures.prefix))
    merged, after = state.merge(travelling, into, pictures.prefix)
    assert after.layout.total < state.layout.total
    out = pictures.leave(merged, after)
    back, whole = pictures.enter(out, None, None)
    before = state.layout.pad(state.units.gather(travelling, state.layout))
    expected = state.layout.pack(after.map.expand(after.map.average(before)))
    torch.testing.assert_close(whole.units.gather(back, whole.layout), expected)
    if after.angles is not None:
        assert torch.equal(after.angles[0], merged[..., :2])


def test_each_part_of_a_head_rotates_its_own_halves():
    x, angle = random(1, 5, 2, 8), random(1, 5, 2)
    whole = torch.cat((angle, angle), -1)
    parts = rotated(x, (torch.cat((whole, whole), -1).cos(), torch.cat((whole, whole), -1).sin()), parts=2)
    for part in range(2):
        alone = rotated(x[..., 4 * part : 4 * part + 4], (whole.cos(), whole.sin()))
        assert torch.equal(parts[..., 4 * part : 4 * part + 4], alone)


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), whole=st.booleans(), seed=st.integers(0, 99))
def test_a_merged_unit_stands_in_the_window_of_its_partner(lengths, whole, seed):
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    state = MergedTokens.unmerged(Layout.equal(1, len(window)), window=window)
    x = torch.arange(len(window), dtype=torch.float64).view(1, -1, 1)
    for _ in range(3):
        keys = torch.randn(*state.patches.shape, 1, 4, generator=generator, dtype=torch.float64)
        rows = state.rows(not whole).units
        similarity, partner = state.match(keys, 0, not whole)
        into = above(0.2, similarity, partner)
        x, after = state.merge(x, into, 0, not whole)
        assert after.window is not None
        assert torch.equal(after.window, after.window.sort().values)
        stays = sorted(after.window.tolist())
        expected, begin = [], 0
        for row, length in enumerate(rows.lengths):
            for place in range(length):
                if place % 2 or into[row, place // 2] < 0:
                    expected.append(int(state.window[begin + place]))  # type: ignore[index]
            begin += length
        assert stays == sorted(expected)
        members = torch.stack([window.double(), torch.arange(len(window)).double()], -1)[None]
        torch.testing.assert_close(x, after.map.average(members)[..., 1:])
        if not whole:
            assert torch.equal(after.map.average(members)[0, :, 0], after.window.double())
        state = after
