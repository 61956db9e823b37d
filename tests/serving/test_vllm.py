"""What vLLM answers with merged image tokens, token by token what transformers answers with DyMU."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams

import dymu
from dymu.choices import IN_VLLM
from dymu.media.images import load
from dymu.serving import vllm as plugin
from dymu.serving.asked import count_of
from dymu.thresholds import Thresholds

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models" / "demo"
PHOTOS = sorted((ROOT / "src" / "dymu" / "bench" / "photos").glob("*.webp"))
WORDS = 24
BUDGETS = ("untouched", 0.3, 0.15)
LONG = SamplingParams(temperature=0, max_tokens=WORDS, ignore_eos=True)

Asked = tuple[str, list[Path], Any]
"""A prompt, its images and their budget."""

ONE_IMAGE: list[Asked] = [
    (f"<user><image>{question}<assistant>", [photo], BUDGETS[number % 3])
    for number, photo in enumerate(PHOTOS[:12])
    for question in ("What is this?", "What is in the picture?")
]
SEVERAL: list[Asked] = [
    ("<user><image><image>What is this?<assistant>", [PHOTOS[0], PHOTOS[1]], 0.15),
    ("<user><image>and<image>What is this?<assistant>", [PHOTOS[2], PHOTOS[2]], 0.3),
    ("<user>What do you see?<assistant>", [], 0.3),
]
ALL = ONE_IMAGE + SEVERAL


@pytest.fixture(scope="session")
def by_transformers() -> dict[str, list[list[int]]]:
    """By form, the tokens of every answer."""
    model = AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(DEMO)
    found: dict[str, list[list[int]]] = {}
    for form in IN_VLLM:
        found[form] = []
        with dymu.apply(model, DEMO, budget=0.3, unmerge=form) as handle:
            for text, photos, budget in ALL:
                images = [load(photo).image for photo in photos]
                inputs = processor(images=images or None, text=text, return_tensors="pt")
                if budget != "untouched":
                    handle.budget = budget
                with handle.disabled() if budget == "untouched" else contextlib.nullcontext():
                    ids = model.generate(
                        **inputs, do_sample=False, max_new_tokens=WORDS, min_new_tokens=WORDS, eos_token_id=None
                    )
                found[form].append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return found


@contextlib.contextmanager
def serving(form: str, **options: Any) -> Iterator[LLM]:
    settings: dict[str, Any] = {
        **plugin.options(DEMO, budget=0.3, unmerge=form),
        "dtype": "float32",
        "max_model_len": 1024,
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 2},
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "block_size": 32,
        **options,
    }
    llm = LLM(str(DEMO), **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def request_for(text: str, photos: list[Path], budget: Any) -> dict[str, Any]:
    request: dict[str, Any] = {"prompt": text}
    if photos:
        request["multi_modal_data"] = {"image": [load(photo).image for photo in photos]}
        request["mm_processor_kwargs"] = {"budget": budget}
    return request


def answers(llm: LLM, asked: list[Asked]) -> list[Any]:
    """All in one batch, budgets mixed."""
    return llm.generate([request_for(*one) for one in asked], LONG, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("form", IN_VLLM)
def test_answers_are_those_of_transformers(form: str, by_transformers: dict[str, list[list[int]]]) -> None:
    """Mixed budgets, two images, text alone; asked again, from the prefix cache."""
    with serving(form) as llm:
        first = answers(llm, ALL)
        assert tokens(first) == by_transformers[form]
        lengths = {budget: [] for budget in BUDGETS}
        for (_, _, budget), output in zip(ONE_IMAGE, first, strict=False):
            lengths[budget].append(len(output.prompt_token_ids))
        assert set(lengths["untouched"]) <= {260, 261, 262, 263, 264}
        assert max(lengths[0.3]) < 200
        again = answers(llm, ALL)
        assert tokens(again) == by_transformers[form]
        assert sum(output.num_cached_tokens for output in again) > 32 * len(ALL)


@pytest.mark.parametrize("form", ["original", "exact"])
def test_long_prompts_in_chunks_and_too_few_blocks(form: str, by_transformers: dict[str, list[list[int]]]) -> None:
    """Chunks of 100 tokens, or of an image where it must be whole; blocks for two prompts, so that some are evicted."""
    chunk = 300 if form in plugin.WHOLE else 100
    short = {"max_num_batched_tokens": chunk, "num_gpu_blocks_override": 20, "max_model_len": 320}
    with serving(form, disable_log_stats=False, **short) as llm:
        for _ in range(2):
            assert tokens(answers(llm, ONE_IMAGE)) == by_transformers[form][: len(ONE_IMAGE)]
        counted = {metric.name: metric for metric in llm.get_metrics()}
        assert counted["vllm:num_preemptions"].value > 0


@pytest.mark.parametrize("form", ["compact", "exact"])
def test_bfloat16(form: str, by_transformers: dict[str, list[list[int]]]) -> None:
    """Most first tokens are those of float32, whose angles and sizes the forms must not lose."""
    with serving(form, dtype="bfloat16") as llm:
        first = [each[0] for each in tokens(answers(llm, ONE_IMAGE))]
    same = sum(one == other[0] for one, other in zip(first, by_transformers[form], strict=False))
    assert same >= len(first) - 4


@pytest.mark.parametrize(
    ("computed", "new", "waits"),
    [(0, 40, False), (10, 90, False), (10, 89, True), (11, 88, True), (50, 49, True), (50, 50, False), (99, 1, False)],
)
def test_no_chunk_ends_within_an_image(computed: int, new: int, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of 90 tokens behind 10 of text."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from dymu.serving.vllm.scheduler import WholeImages

    monkeypatch.setattr(Scheduler, "_try_schedule_encoder_inputs", lambda *args: "stock")
    image = SimpleNamespace(mm_position=SimpleNamespace(offset=10, length=90))
    request = SimpleNamespace(mm_features=[image])
    found = WholeImages._try_schedule_encoder_inputs(object.__new__(WholeImages), request, computed, new, 100)
    assert found == (([], 0, 100, [], []) if waits else "stock")


def test_engines_that_would_cut_images() -> None:
    options = plugin.options(DEMO, budget=0.3, unmerge="exact")
    options["disable_chunked_mm_input"] = False
    with pytest.raises(RuntimeError), serving("exact", **options):
        pass


def test_a_placeholder_in_the_text_and_a_text_too_long() -> None:
    with serving("original", limit_mm_per_prompt={"image": 1}) as llm:
        text, photos, _ = ONE_IMAGE[0]
        with pytest.raises(ValueError, match="2 placeholders of images, and 1 images"):
            llm.generate([request_for(f"<image>{text}", photos, 0.3)], LONG, use_tqdm=False)
        with pytest.raises(Exception, match="1024"):
            llm.generate([request_for(text + " what" * 980, [PHOTOS[5]], 0.3)], LONG, use_tqdm=False)
        for each in (photos, [PHOTOS[5]]):
            assert len(tokens(llm.generate([request_for(text, each, 0.3)], LONG, use_tqdm=False))[0]) == WORDS


def test_requests_that_cannot_be_met() -> None:
    with serving("original") as llm:
        text, photos, _ = ONE_IMAGE[0]
        good = request_for(text, photos, 0.3)
        for kwargs, said in (
            ({"budget": 1}, "outside"),
            ({"budget": "few"}, "a budget is a number"),
            ({"budgett": 48}, "budgett"),
        ):
            with pytest.raises(ValueError, match=said):
                llm.generate([{**good, "mm_processor_kwargs": kwargs}], LONG, use_tqdm=False)
        with pytest.raises(Exception, match="At most 2 image"):
            llm.generate([request_for("<image>" * 3, [photos[0]] * 3, 0.3)], LONG, use_tqdm=False)
        assert len(tokens(llm.generate([good], LONG, use_tqdm=False))[0]) == WORDS


def test_the_hash_of_an_image_holds_what_decides_its_tokens(tmp_path: Path) -> None:
    """And not the name that a client gives it, under which it may send another."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import ProcessorInputs

    other = json.loads((DEMO / "thresholds.json").read_text())
    for entry in other["calibrated"]:
        entry["thresholds"] = [value - 0.01 for value in entry["thresholds"]]
        entry["dial"] = []
    (tmp_path / "other.json").write_text(json.dumps(other))
    found = []
    for thresholds, budget, form, counting in (
        (DEMO, 0.3, "original", "mean"), (tmp_path / "other.json", 0.3, "original", "mean"),
        (DEMO, 0.15, "original", "mean"), (DEMO, 0.3, "compact", "mean"), (DEMO, 0.3, "original", "exactly"),
    ):  # fmt: skip
        options = plugin.options(DEMO, thresholds, budget, form, counting=counting)
        config = EngineArgs(str(DEMO), **options).create_model_config()
        processor = MULTIMODAL_REGISTRY.create_processor(config)
        for photo in PHOTOS[:2]:
            items = processor.info.parse_mm_data({"image": [load(photo).image]})
            for asked in ({}, {"budget": 48}):
                keys = [
                    processor._get_mm_hashes(ProcessorInputs([], items, uuids, asked))["image"][0]
                    for uuids in (None, {"image": ["mine"]})
                ]
                assert keys[0] == keys[1]
                found.append(keys[0])
            if counting == "exactly":
                for asked, kept in ((30, 30), (0.5, 128)):
                    (shown,) = processor.info.front(
                        [load(photo).image], count_of(asked, Thresholds.load(DEMO), counting)
                    )
                    assert len(shown.features) == kept
    assert len(set(found)) == len(found)
    assert Thresholds.load(DEMO).source


def test_images_are_read_as_elsewhere() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    config = EngineArgs(str(DEMO), **plugin.options(DEMO, budget=0.3)).create_model_config()
    read = MULTIMODAL_REGISTRY.create_processor(config).info.parse_mm_data
    deep = Image.fromarray(257 * np.arange(256, dtype=np.uint16).reshape(16, 16))
    (image,) = read({"image": deep})["image"]
    assert np.asarray(image)[..., 0].ravel().tolist() == list(range(256)), "vLLM by itself would clip it"
    with pytest.raises(ValueError, match="embeddings and rows of images are not taken"):
        read({"image": torch.zeros(1, 40, 256)})
    with pytest.raises(ValueError, match="send the image every time"):
        read({"image": [None]})


def test_no_other_version_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "version", lambda name: "0.40.1")
    with pytest.raises(dymu.DymuError, match=r"0\.40\.1"):
        plugin.options(DEMO, budget=0.3)
    plugin.register()
