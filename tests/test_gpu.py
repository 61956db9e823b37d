"""On a GPU, where there is one: families give what they give on the CPU, by torch's attention and by our kernels."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import dymu
import tiny
from test_contract import MODELS, SOME, four_prompts, unmergings

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1", reason="sh benchmarks/gpu.sh tests runs it"
)

ONE_OF_EACH = [model for model in MODELS if any(mark.name == "one_of_each" for mark in model.marks)]
OFF = 1e-3
"""Of the largest logit: a GPU adds in another order, in every layer."""


@pytest.fixture(params=ONE_OF_EACH)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return tiny.build(request.param) if isinstance(request.param, str) else tiny.llava(*request.param)


def answers(model: Any, batch: dict[str, Any], **options: Any) -> tuple[list[int], Tensor]:
    """Tokens kept of each image, and the logits of four tokens [B, 4, V] after the batch."""
    moved = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    with dymu.apply(model, merge=SOME, **options) as handle:
        out = model.generate(
            **moved, do_sample=False, max_new_tokens=4, min_new_tokens=4, suppress_tokens=tiny.specials(model),
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return list(handle.last.kept), torch.stack(out.logits, 1).float().cpu()


def options(model: Any) -> list[dict[str, Any]]:
    """Every form, with each way to compute it and each cache that the model can have."""
    forms = [
        {"unmerge": form, "backend": backend} for form in unmergings(model) for backend in ("sdpa", "triton", "auto")
    ]
    return [*forms, *({"cache": "fast", "backend": backend} for backend in ("sdpa", "triton"))]


def test_a_batch_gets_what_it_gets_on_the_cpu(model):
    images = tiny.uneven(model, 4)
    batch = tiny.inputs(model, four_prompts(model, images), images)
    there = copy.deepcopy(model).cuda()
    compared, refused, wrong = 0, [], []
    for chosen in options(model):
        on_cpu = {**chosen, "backend": "sdpa"}
        try:
            kept, expected = answers(model, batch, **on_cpu)
            found, logits = answers(there, batch, **chosen)
        except dymu.DymuError as error:
            refused.append(f"{chosen}: {error}")
            continue
        compared += 1
        off = float((logits - expected).abs().max() / expected.abs().max())
        if found != kept or not off < OFF:
            wrong.append(f"{chosen}: kept {found} for {kept}, off by {off:.1e}")
    print(*refused, sep="\n")
    assert not wrong, "\n".join(wrong)
    assert compared >= 6, refused


def test_it_can_be_undone_there():
    model = tiny.llava().cuda()
    images = tiny.pictures(4)
    batch = {name: value.cuda() for name, value in tiny.inputs(model, four_prompts(model, images), images).items()}
    with torch.inference_mode():
        before = model(**batch).logits
        with dymu.apply(model, merge=SOME):
            merged = model(**batch).logits
        assert torch.equal(model(**batch).logits, before)
    assert not torch.equal(merged[:, -1], before[:, -1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_near(dtype):
    """The first token's logits; later ones are of other tokens, where these differ."""
    model = tiny.llava("clip", "qwen2")
    images = tiny.pictures(4)
    batch = tiny.inputs(model, four_prompts(model, images), images)
    there = copy.deepcopy(model).cuda()
    for chosen in ({"backend": "sdpa"}, {"backend": "triton"}, {"backend": "auto"}, {"cache": "fast"}):
        _, expected = answers(there, batch, **chosen)
        half = copy.deepcopy(model).to("cuda", dtype)
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
        _, logits = answers(half, cast, **chosen)
        assert torch.isfinite(logits).all()
        assert float((logits[:, 0] - expected[:, 0]).norm() / expected[:, 0].norm()) < 0.1
