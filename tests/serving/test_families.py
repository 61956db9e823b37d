"""Families besides LLaVA, tiny and random, in vLLM: what transformers answers with DyMU."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import tiny_folders
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams

import dymu
from dymu.errors import UnsupportedModel
from dymu.media.images import load
from dymu.prompting import processed
from dymu.serving import vllm as plugin

PHOTOS = [
    load(photo).image.resize(size)
    for photo, size in zip(
        sorted((Path(dymu.__file__).parent / "bench" / "photos").glob("*.webp")),
        [(96, 48), (48, 96), (64, 64), (80, 60), (96, 96), (48, 48)],
        strict=False,
    )
]
WORDS = 16


def by_transformers(folder: Path, form: Any, asked: list[tuple[str, list[Any], Any]]) -> list[list[int]]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    found = []
    with dymu.apply(model, folder, budget=0.4, unmerge=form) as handle:
        for text, images, budget in asked:
            if budget != "untouched":
                handle.budget = budget
            inputs = processed(model, processor, [text], images=images)
            with handle.disabled() if budget == "untouched" else contextlib.nullcontext():
                ids = model.generate(
                    **inputs, do_sample=False, max_new_tokens=WORDS, min_new_tokens=WORDS, eos_token_id=None
                )
            found.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return found


@pytest.fixture(scope="module", params=list(tiny_folders.PROMPTS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / request.param
    tiny_folders.save(request.param, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    dymu.calibrate(model, processor, PHOTOS, [0.3, 0.4], progress=False).save(folder / "thresholds.json")
    return folder


@pytest.mark.parametrize("form", ["original", "exact"])
def test_answers_are_those_of_transformers(folder: Path, form: str) -> None:
    prompt = tiny_folders.PROMPTS[folder.name]
    if (folder.name, form) == ("qwen2_5_vl", "exact"):
        with pytest.raises(ValueError, match="three axes"):
            plugin.options(folder, budget=0.4, unmerge="exact")
        return
    asked = [(prompt.format("<image>"), [photo], budget) for photo in PHOTOS for budget in ("untouched", 0.4, 0.3)]
    asked.append((prompt.format("<image> and <image>"), [PHOTOS[0], PHOTOS[1]], 0.3))
    if folder.name == "qwen2_5_vl":
        asked[-1] = (prompt.format("<image> <end> and <begin> <image>"), [PHOTOS[0], PHOTOS[1]], 0.3)
    llm = LLM(
        str(folder), **plugin.options(folder, budget=0.4, unmerge=form), dtype="float32", max_model_len=1024,
        enforce_eager=True, limit_mm_per_prompt={"image": 2}, max_num_seqs=8, max_num_batched_tokens=1024,
        block_size=32,
    )  # fmt: skip
    try:
        outputs = llm.generate(
            [
                {"prompt": text, "multi_modal_data": {"image": images}, "mm_processor_kwargs": {"budget": budget}}
                for text, images, budget in asked
            ],
            SamplingParams(temperature=0, max_tokens=WORDS, ignore_eos=True),
            use_tqdm=False,
        )
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert [list(output.outputs[0].token_ids) for output in outputs] == by_transformers(folder, form, asked)
    lengths = [len(output.prompt_token_ids) for output in outputs]
    assert lengths[1] < lengths[0]
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > 3


def test_families_that_it_does_not_serve(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "smolvlm"}')
    with pytest.raises(UnsupportedModel, match="smolvlm"):
        plugin.options(tmp_path, tmp_path, budget=0.4)
