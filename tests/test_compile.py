"""torch.compile of the language model, or of its layers, with DyMU applied."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

import dymu
import tiny
from dymu.reducers import ThresholdMerge

SOME = ThresholdMerge((0.9,) * tiny.LAYERS)


@pytest.mark.parametrize(
    ("backend", "whole"),
    [
        pytest.param("eager", False, id="traced-layers"),
        pytest.param("eager", True, id="traced-decoder"),
        pytest.param(
            "inductor",
            False,
            id="compiled-layers",
            marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
        ),
    ],
)
def test_a_compiled_decoder_says_the_same(backend, whole):
    torch._dynamo.reset()
    counters.clear()
    model = tiny.llava("clip", "qwen2", text={"num_hidden_layers": 1})
    decoder = model.model.language_model
    ids = torch.stack([tiny.prompt(model, 4, "image", 7, seed=seed) for seed in range(2)])

    def ask(first: int, words: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {"input_ids": ids[:, : ids.shape[1] - words], "pixel_values": tiny.pictures(4)[first : first + 2]}
        options = {"do_sample": False, "max_new_tokens": 5, "suppress_tokens": [tiny.IMAGE_TOKEN]}
        return model(**inputs).logits, model.generate(**inputs, **options)

    with dymu.apply(model, merge=SOME):
        expected = [ask(1, 0), ask(2, 2), ask(0, 3)]
        for module in [decoder] if whole else decoder.layers:
            module.compile(backend=backend, dynamic=True)
        for (first, words), (logits, text) in zip([(1, 0), (2, 2)], expected, strict=False):
            compiled = ask(first, words)
            torch.testing.assert_close(compiled[0], logits, atol=1e-4, rtol=0)
            assert torch.equal(compiled[1], text)
        graphs = counters["stats"]["unique_graphs"]
        assert graphs > 0
        compiled = ask(0, 3)
        assert counters["stats"]["unique_graphs"] == graphs, "other numbers of tokens are no reason to compile again"
        torch.testing.assert_close(compiled[0], expected[2][0], atol=1e-4, rtol=0)
        assert torch.equal(compiled[1], expected[2][1])
