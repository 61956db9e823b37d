"""Timing asks stock questions, the same with DyMU and without, and leaves no trace."""

import pytest
import torch

import dymu
import tiny
from dymu.measure import timing
from dymu.measure.times import Times
from dymu.measure.timing import measure, measure_repeatedly
from dymu.reducers import ThresholdMerge


@pytest.fixture
def model():
    return tiny.llava()


@pytest.fixture
def inputs(model):
    ids = tiny.prompt(model, 4, "image", 7)[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": tiny.pictures(1),
    }


def test_every_part_takes_time_and_none_counts_twice(model, inputs, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(timing, "now", lambda: next(ticks))
    monkeypatch.setattr(timing, "DECODE_STEPS", 1)
    assert measure(model, inputs) == Times(encoder_ms=1000, prefill_ms=1000, decode_ms_per_token=1000)


def test_the_two_situations_alternate(model, inputs):
    seen = []
    projector = model.model.multi_modal_projector
    with (
        dymu.apply(model, merge=ThresholdMerge((0.5,) * tiny.LAYERS)) as handle,
        projector.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])),
    ):
        merged, untouched = measure_repeatedly(model, inputs, handle, repeats=3)
    assert len(merged) == len(untouched) == 3
    few, full = min(seen), max(seen)
    assert full == tiny.tokens_per_image(model)
    assert seen == [few, full, full, few, few, full]


def test_it_stops_when_time_is_up_but_not_before_one_of_each(model, inputs):
    with dymu.apply(model, merge=ThresholdMerge((0.5,) * tiny.LAYERS)) as handle:
        assert [len(runs) for runs in measure_repeatedly(model, inputs, handle, limit_s=0)] == [1, 1]
    assert [len(runs) for runs in measure_repeatedly(model, inputs, repeats=2)] == [2, 0]


def test_no_hook_is_left_behind(model, inputs):
    measure(model, inputs)
    assert not model.model.language_model._forward_pre_hooks
    with pytest.raises(ValueError, match="tokens"):
        measure(model, {**inputs, "input_ids": inputs["input_ids"][:, :-9]})
    assert not model.model.language_model._forward_pre_hooks


def test_medians():
    runs = [Times(1, 5, 2), Times(3, 1, 1), Times(2, 9, 9)]
    assert Times.medians(runs) == Times(2, 5, 2)
    assert Times.medians(runs).first_token_ms == 7
