"""The Triton kernel that finds partners, in Triton's interpreter against the same in torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dymu.merging.layout import Layout
from dymu.merging.match import best_partner, similarity_metric

fused = pytest.importorskip("benchmarks.candidates.triton_match", reason="it needs Triton", exc_type=ImportError)


@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=3), st.sampled_from([0, 1, 2, 5]), st.sampled_from([4, 16, 72])
)
def test_it_finds_the_same_partners(lengths, prefix, channels):
    lengths = [length + prefix for length in lengths]
    layout = Layout.of(torch.tensor(lengths))
    torch.manual_seed(sum(lengths))
    shape = (1, layout.total) if layout.packed else (layout.batch, layout.longest)
    metric = similarity_metric(torch.randn(*shape, 2, channels))
    similarity, partner = fused.best_partner(metric, layout, prefix)
    expected, chosen = best_partner(metric, layout, prefix)
    torch.testing.assert_close(similarity, expected, atol=1e-6, rtol=0)
    decided = expected > -torch.inf
    assert torch.equal(partner[decided], chosen[decided])


def test_of_equal_partners_it_takes_the_first():
    metric = torch.nn.functional.normalize(torch.ones(1, 150, 4), dim=-1)
    similarity, partner = fused.best_partner(metric, Layout.equal(1, 150))
    assert partner.eq(0).all()
    torch.testing.assert_close(similarity, torch.ones(1, 75))


def test_it_decides_in_float32_alone():
    with pytest.raises(ValueError, match=r"in float32, not in torch\.float64"):
        fused.best_partner(torch.ones(1, 4, 4, dtype=torch.float64), Layout.equal(1, 4))
