"""The harness on a tiny model: every row, interruptions, and numbers that can be worked out by hand."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers.image_utils import SizeDict

import dymu
import tiny
from dymu.choices import UNMERGE
from dymu.errors import AlreadyApplied, BadBudget, BadImage, BadOutput, BadPrompt, DymuError, UnsupportedModel
from dymu.evaluation.chart import draw_chart
from dymu.evaluation.divergence import divergence, divergences
from dymu.evaluation.methods import FORMER, METHODS, UNTOUCHED, Method, Row, applying, rows_for
from dymu.evaluation.results import Answers, Examples, Header, Line, Model, ResultFile, Results
from dymu.evaluation.rows import running
from dymu.evaluation.run import evaluate, full_tokens
from dymu.evaluation.summary import Part, Share, compared_with, parts_by, share, summarise
from dymu.evaluation.tables import accuracy_table, cost_table, part_table, provenance, series
from dymu.evaluation.tasks import Example, scoring
from dymu.evaluation.tasks.folder import Folder
from dymu.families.resolve import resolve
from dymu.handle import encoder_of
from dymu.measure.costs import cost
from dymu.measure.results import BadResults
from dymu.measure.times import Cost
from dymu.prompting import Answer, generate, inputs_for
from dymu.reducers import DensityPeaks, FixedMerge, RandomKeep, Reduced, Stride, Tokens, VScan
from dymu.thresholds import Calibrated, Thresholds

WORDS = ("red", "cat", "a")


@dataclass(frozen=True)
class Words:
    """Which word is this? Its images are noise; `broken` ones cannot be read; it stops at `stop_at`."""

    length: int = 7
    broken: tuple[int, ...] = ()
    stop_at: int | None = None
    name: str = "words"
    max_new_tokens: int = 2
    yes_no: tuple[str, ...] = ("red",)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if index == self.stop_at:
            raise KeyboardInterrupt
        if index in self.broken:
            raise BadImage(f"picture {index} is damaged: get another.")
        word = WORDS[index % 3]
        return Example((tiny.photos(index + 1)[index],), "what is this ?", (word,), word, {"number": index})

    def score(self, example: Example, answer: str) -> float:
        return scoring.exact(answer, example.references)

    def describe(self) -> dict[str, object]:
        return {"broken": list(self.broken)}


@pytest.fixture(scope="module")
def model():
    return tiny.llava("clip", "llama")


@pytest.fixture(scope="module")
def processor():
    return tiny.llava_processor()


@pytest.fixture(scope="module")
def thresholds(model):
    every, none = (0.0,) * (tiny.LAYERS - 1), (2.0,) * (tiny.LAYERS - 1)
    return Thresholds(
        (Calibrated(10, every), Calibrated(tiny.PATCHES, none)),
        encoder=encoder_of(resolve(model), tokens=tiny.PATCHES),
        schedule="reverse_linear",
    )


OF_EACH_KIND = ["dtome", "tome", "pool", "random", "stride", "downscale", "faster-vlm", "vision-zip", "cd-pruner"]
ROWS = rows_for([16], OF_EACH_KIND, ["exact", "compact", "none"])


HEADER = Header(
    dymu_results=1, date="", model=Model("", None, "", ""), tasks={"t": {"length": 2}},
    rows=[UNTOUCHED], yes_no={"t": ["yesno"]}, batch_size=1, timed=0, seed=0, versions={}, device="",
)  # fmt: skip
COST = msgspec.json.encode(Cost(1.0, 1.0, 1.0, 1, 1)).decode()
FIRST_LINE = msgspec.json.encode(HEADER).decode() + "\n"


def told(path: Path) -> dict:
    """What a result file says, without when and how fast."""
    results = Results.load(path)
    header = msgspec.structs.replace(results.header, date="")
    counted = {
        row: {example: (cost.flops, cost.cache_bytes) for example, cost in costs.items()}
        for row, costs in results.costs.items()
    }
    return {"header": header, "examples": results.examples, "answers": results.answers, "counted": counted}


def test_rows_are_every_combination_that_says_something():
    rows = rows_for([8, 4, 8], ["dtome", "random", "downscale"], UNMERGE, ["linear", "constant"])
    keys = [row.key for row in rows]
    assert len(set(keys)) == len(keys)
    assert keys[0] == "untouched"
    for budget in (8, 4):
        assert {key for key in keys if f"-{budget}-" in key} == {
            *(f"dtome-{budget}-{way}-{schedule}" for way in UNMERGE for schedule in ("linear", "constant")),
            *(f"random-{budget}-{way}" for way in ("exact", "restore", "none")),
            *(["downscale-4-none"] if budget == 4 else []),
        }  # fmt: skip
    assert "downscale-9-none" in keys, "the square nearest to 8"
    with pytest.raises(ValueError, match="'best' is unknown"):
        rows_for([8], ["best"])
    with pytest.raises(ValueError, match="dtome takes no further arguments but unmerge_from: leave 'side=4' out"):
        rows_for([8], ["dtome:side=4"])
    (_, scan) = rows_for([8], ["v-scan:side=4,early=3"])
    assert METHODS["v-scan"].make(scan, 8, 0) == VScan(8, side=4, early=3)
    assert series(scan) == "VScan, first half side=4,early=3 + VTU"
    (_, tome) = rows_for([8], ["tome:schedule=0.5"])
    assert METHODS["tome"].make(tome, 8, 0) == FixedMerge(8, 0.5)
    assert tome.key == "tome-8-exact-schedule=0.5"
    later = rows_for([8], ["dtome:unmerge_from=2", "fast-v:layer=1,unmerge_from=2"], ["exact"], ["linear"])
    assert [row.key for row in later[1:]] == [
        "dtome-8-exact-linear-unmerge_from=2", "fast-v-8-exact-layer=1,unmerge_from=2",
    ]  # fmt: skip
    for method in ("downscale:unmerge_from=2", "dtome:unmerge_from=2,side=4"):
        with pytest.raises(ValueError, match="takes no further arguments"):
            rows_for([8], [method])
    marked = rows_for([8], ["random:fill=runs", "div-prune:fill=none"], ["exact", "original", "none"])
    assert [row.key.replace("-8", "") for row in marked[1:]] == [
        *(f"random-{way}-fill=runs" for way in ("exact", "original", "none")),
        *(f"div-prune-{way}-fill=none" for way in ("exact", "none")),
    ]
    assert METHODS["random"].make(marked[2], 8, 3) == RandomKeep(8, 3, "runs")
    assert series(marked[1]) == "random keep fill=runs + VTU"
    assert series(Row("random", 8, "exact")) == "random keep in place"
    assert rows_for([8], ["random:,"]) == rows_for([8], ["random"])
    with pytest.raises(ValueError, match="the argument side is given twice"):
        rows_for([8], ["v-scan:side=4,side=5"])
    (_, peaks) = rows_for([8], ["density-peaks:threshold=0.2"])
    with pytest.raises(ValueError, match="either keep, or threshold"):
        METHODS["density-peaks"].make(peaks, 8, 0)
    (_, published) = rows_for([8], ["density-threshold:threshold=0.5,least=64"])
    assert METHODS["density-threshold"].make(published, 8, 0) == DensityPeaks()
    (_, solved) = rows_for([8], ["density-threshold:threshold=0.3"])
    assert METHODS["density-threshold"].make(solved, 8, 0) == DensityPeaks(0.3, least=1)
    for wrong, said in (
        ("v-scan:sides=4", "no argument 'sides'"),
        ("v-scan:sides=4", "it has side, early, unmerge_from"),
        ("v-scan:side=a", "takes a whole number for side, not 'a'"),
    ):
        (_, row) = rows_for([8], [wrong])
        with pytest.raises(ValueError, match=said):
            METHODS["v-scan"].make(row, 8, 0)


@pytest.mark.parametrize("template", ["{{ bos_token }}<image> what ?", "<image> what ?"])
def test_a_prompt_begins_with_one_first_token(model, template):
    processor = tiny.llava_processor()
    processor.chat_template, processor.tokenizer.bos_token = template, "word20"
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="word20 $A", special_tokens=[("word20", processor.tokenizer.bos_token_id)]
    )
    ids = inputs_for(model, processor, [(tiny.photos(1), "what ?")])["input_ids"][0]
    assert (ids == processor.tokenizer.bos_token_id).nonzero().tolist() == [[0]]


def test_the_full_count_is_what_budgets_count(model, processor):
    assert full_tokens(model, processor) == tiny.PATCHES


def test_every_row_answers_as_the_model_does_when_asked_so(model, processor, thresholds, tmp_path):
    task = Words()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    results = evaluate(
        model, processor, [task], ROWS, tmp_path / "r.jsonl", thresholds=[thresholds], batch_size=3, timed=1
    )
    for row in ROWS:
        for index in range(len(task)):
            start = index - index % 3
            alone = [task[i] for i in range(start, min(start + 3, 7))]
            with running(row, model, processor, {"reverse_linear": thresholds}, tiny.PATCHES) as handle:
                inputs = inputs_for(model, processor, [(e.images, e.question) for e in alone])
                texts, _ = generate(model, processor, inputs, 2)
                kept = None if handle is None else handle.last.kept[index - start]
            batch, number = results.answers[row.key]["words", start], index - start
            assert batch.answers[number] == texts[number]
            assert batch.scores[number] == scoring.exact(texts[number], task[index].references)
            if kept is not None:
                assert batch.kept[number] == kept
        assert ("words", 0) in results.costs[row.key]
    kept = {row: set(np.concatenate([b.kept for b in results.answers[row.key].values()])) for row in ROWS}
    assert kept[UNTOUCHED] == {tiny.PATCHES}
    for row in ROWS[1:]:
        if row.method != "dtome":
            assert kept[row] == {16}, row
    assert processor.image_processor.size["height"] == tiny.SIDE
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_forms_of_unmerging_share_an_encoding(model, processor, thresholds, tmp_path, monkeypatch):
    rows = rows_for([16], ["dtome", "random"], UNMERGE)
    assert len(rows) == 1 + len(UNMERGE) + 3
    calls = Counter()
    forward = type(model.model.vision_tower).forward

    def counted(tower, *args, **kwargs):
        calls["tower"] += 1
        return forward(tower, *args, **kwargs)

    monkeypatch.setattr(type(model.model.vision_tower), "forward", counted)
    evaluate(model, processor, [Words()], rows, tmp_path / "r.jsonl", thresholds=[thresholds], batch_size=7, timed=0)
    assert calls["tower"] == 3, "untouched, thresholds, random"


@dataclass(frozen=True)
class AskedStride(Stride):
    """Keeps tokens by a question that it must be able to read."""

    def in_prompt(self, tokens: Tokens) -> Reduced:
        assert len(tokens.text) > 0
        return super().in_prompt(tokens)


def test_methods_may_read_the_question(model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(dymu.reducers, "AskedStride", AskedStride, raising=False)
    monkeypatch.setitem(METHODS, "asked", Method("asked", "asked", "black", "AskedStride", leaves="singles"))
    rows = [UNTOUCHED, Row("asked", 16, "exact"), Row("stride", 16, "exact")]
    results = evaluate(model, processor, [Words()], rows, tmp_path / "r.jsonl", batch_size=4, timed=0)
    for start in (0, 4):
        asked, stride = (results.answers[row.key]["words", start] for row in rows[1:])
        assert asked == stride


def test_rows_of_some_ways_to_unmerge(model, processor, thresholds, tmp_path):
    rows = rows_for([16], ["dtome", "random"], ["original", "none"])
    results = evaluate(model, processor, [Words()], rows, tmp_path / "r.jsonl", thresholds=[thresholds], timed=0)
    schedule = "reverse_linear"
    original, random = Row("dtome", 16, "original", schedule), Row("random", 16, "exact")
    assert results.only(["original"]).header.rows == [UNTOUCHED, original, random]
    former = msgspec.structs.replace(results.header, rows=[UNTOUCHED, Row("dtome", 16, FORMER, schedule)])
    assert len(replace(results, header=former).only(["original"]).header.rows) == 2
    assert len(replace(results, header=former).only(["none"]).header.rows) == 1


@dataclass(frozen=True)
class Lengths(Words):
    """Questions of several lengths about no, one and two images."""

    max_new_tokens: int = 5

    def __getitem__(self, index: int) -> Example:
        images = (tiny.photos(index + 1)[index],) * (1, 2, 0, 1)[index % 4]
        return Example(images, "what is this ? " + "what is red ? " * (index % 3), ("cat",), "cat", {})


def test_a_row_may_unmerge_from_a_layer_on(model, processor, thresholds, tmp_path):
    layers = len(model.model.language_model.layers)
    names = ["tome", "tome:unmerge_from=1", f"tome:unmerge_from={layers}"]
    rows = [*rows_for([16], names), *rows_for([16], ["tome"], ["compact"])[1:]]
    results = evaluate(model, processor, [Words()], rows, tmp_path / "r.jsonl", batch_size=7, timed=0, progress=False)
    exact, later, never, compact = (next(iter(results.answers[row.key].values())).kl for row in rows[1:])
    assert never == pytest.approx(compact)
    assert later != pytest.approx(exact)
    assert later != pytest.approx(compact)
    assert applying("tome:unmerge_from=1", 16, "exact", layers)["unmerge_from"] == 1
    wrong = ((f"unmerge_from={layers + 1}", "exact"), ("unmerge_from=1", "none"), ("unmerge_from=a", "exact"))
    for options, way in wrong:
        row = Row("tome", 16, way, "constant", options)
        with pytest.raises(BadBudget, match=r"cannot run: .*from 0 to"):
            evaluate(model, processor, [Words()], [row], tmp_path / "s.jsonl", timed=0)
    with pytest.raises(ValueError, match="counted from 0"):
        rows_for([16], ["tome:unmerge_from=a"])
    forms = rows_for([16], ["tome", "tome:unmerge_from=0", "tome:unmerge_from=2", "stride:unmerge_from=2"], UNMERGE)
    later = [row for row in forms if row.options]
    assert [(row.method, row.unmerge) for row in later] == [("tome", "exact"), ("tome", "representative")]
    assert len(forms) == 1 + len(UNMERGE) + 2 + 1


def direct(row: Row, model, processor, thresholds, example: Example, most: int) -> tuple[list[int], float]:
    """The untouched answer's tokens and KL(untouched ‖ row), by one forward without cache for each token."""
    ends, said, terms = model.generation_config.eos_token_id, [], []
    while len(said) < most and (not said or said[-1] != ends):
        log_probs = []
        for way in (UNTOUCHED, row):
            with running(way, model, processor, {"reverse_linear": thresholds}, tiny.PATCHES), torch.no_grad():
                inputs = inputs_for(model, processor, [(example.images, example.question)])
                more = torch.tensor([said], dtype=torch.long)
                inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                log_probs.append(model(**inputs, use_cache=False).logits[0, -1].double().log_softmax(0))
        untouched, other = log_probs
        terms.append(float((untouched.exp() * (untouched - other)).sum()))
        untouched[tiny.IMAGE_TOKEN] = -math.inf
        said.append(int(untouched.argmax()))
    return said, sum(terms) / len(terms)


@pytest.mark.parametrize(("decoder", "family"), [("llama", "llava"), ("mistral", "llava"), ("qwen3", "vipllava")])
def test_divergence_is_that_of_one_forward_for_each_token(thresholds, tmp_path, decoder, family):
    """In batches of several lengths, with answers that end early and text alone, for every method and form."""
    model, processor, task = tiny.llava("clip", decoder, family), tiny.full_processor("llava"), Lengths(4)
    if family == "vipllava":
        processor.patch_size = tiny.PATCH
    calibrated = thresholds
    if family == "vipllava":
        depth = encoder_of(resolve(model), tokens=tiny.PATCHES)
        calibrated = Thresholds(
            (Calibrated(10, (0.0,) * depth.depth), Calibrated(tiny.PATCHES, (2.0,) * depth.depth)),
            encoder=depth, schedule="reverse_linear",
        )  # fmt: skip
    inputs = inputs_for(model, processor, [(task[1].images, task[1].question)])
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    model.generation_config.eos_token_id = int(answer[2])
    model.generation_config.suppress_tokens = [tiny.IMAGE_TOKEN]  # logits are compared as they are before
    ways = [way for way in UNMERGE if way != "restore"]  # which says other things of later tokens
    # One that reads the question would read the answer here, and one with features of its own has a single layer's.
    rows = rows_for([16], [name for name in OF_EACH_KIND if name not in ("cd-pruner", "vision-zip")], ways)
    results = evaluate(
        model, processor, [task], rows, tmp_path / "r.jsonl", thresholds=[calibrated], batch_size=3, timed=0
    )
    told = dict[str, list[float]]()
    for row in rows:
        batches = [results.answers[row.key]["words", start] for start in (0, 3)]
        told[row.key] = [kl for batch in batches for kl in batch.kl]
        same = [same for batch in batches for same in batch.same]
        texts = [text for batch in batches for text in batch.answers]
        untouched = [text for start in (0, 3) for text in results.answers["untouched"]["words", start].answers]
        assert same == [text == other for text, other in zip(texts, untouched, strict=True)]
        for index, kl in enumerate(told[row.key]):
            said, expected = direct(row, model, processor, calibrated, task[index], task.max_new_tokens)
            assert kl == pytest.approx(expected, rel=2e-3, abs=2e-5), (row, index, said)
    assert told["untouched"] == [0] * 4
    assert all(kls[2] == pytest.approx(0, abs=1e-5) for kls in told.values()), "text alone is as ever"
    assert sum(max(kls) > 0.01 for kls in told.values()) > len(rows) // 2


@pytest.mark.parametrize(
    "method", ["cd-pruner", "mm-tok", "fast-v:layer=1", "sparse-vlm:layers=0,rates=0.3", "reroute:rates=(0.5,0.3)"]
)
def test_what_a_method_reads_of_the_prompt_is_not_the_untouched_answer(processor, tmp_path, method):
    """Divergence is that of each token after a prompt which the method has read alone."""
    model = tiny.llava("clip")
    model.generation_config.suppress_tokens = [tiny.IMAGE_TOKEN]
    (row,) = rows_for([20], [method], ["exact"])[1:]
    task = Lengths(4)
    results = evaluate(model, processor, [task], [UNTOUCHED, row], tmp_path / "r.jsonl", batch_size=3, timed=0)
    told = [kl for start in (0, 3) for kl in results.answers[row.key]["words", start].kl]
    for index, kl in enumerate(told):
        example, read = task[index], list[list[torch.Tensor]]()
        inputs = inputs_for(model, processor, [(example.images, example.question)])
        before = model.generate(**inputs, do_sample=False, max_new_tokens=task.max_new_tokens)
        said = before[0, inputs["input_ids"].shape[1] :].tolist()
        for way in (UNTOUCHED, row):
            with running(way, model, processor, {}, tiny.PATCHES), torch.no_grad():
                output, read = model(**inputs, use_cache=True), [*read, []]
                for number, token in enumerate(said):
                    read[-1].append(output.logits[0, -1].double().log_softmax(0))
                    there = torch.ones(1, inputs["input_ids"].shape[1] + number + 1, dtype=torch.long)
                    output = model(
                        input_ids=torch.tensor([[token]]), attention_mask=there, past_key_values=output.past_key_values
                    )
        terms = [float((p.exp() * (p - q)).sum()) for p, q in zip(*read, strict=True)]
        assert kl == pytest.approx(sum(terms) / len(terms), rel=2e-3, abs=2e-5), index
    assert max(told) > 0.001


def test_nothing_merged_diverges_by_nothing(model, processor, thresholds, tmp_path):
    ways = [way for way in UNMERGE if way != "restore"]  # which adds to logits also where nothing merged
    rows = [UNTOUCHED, *(Row("dtome", tiny.PATCHES, way, "reverse_linear") for way in ways)]
    results = evaluate(model, processor, [Lengths()], rows, tmp_path / "r.jsonl", thresholds=[thresholds], timed=0)
    full, *merged = summarise(results)
    assert (full.same["all"], full.divergence["all"]) == (Share(1, 1, 1, 7), Share(0, 0, 0, 7))
    for summary in merged:
        assert summary.same["all"].mean == 1
        assert summary.same["all"].low < 1, "seven answers are no certainty"
        assert summary.divergence["all"].mean < 1e-5


def test_divergence_of_what_is_masked_or_no_number():
    rows = torch.tensor([[1.0, 2.0, -math.inf], [0.0, 0.0, -math.inf]])
    assert divergence(rows, rows) == 0
    other = torch.tensor([[2.0, 1.0, -math.inf], [0.0, 0.0, 5.0]])
    p, q = torch.softmax(rows.double(), 1), torch.softmax(other.double(), 1)
    expected = (p[:, :2] * (p[:, :2] / q[:, :2]).log()).sum(1).mean()
    assert divergence(rows, other) == pytest.approx(float(expected), abs=1e-6)
    assert divergence(rows, torch.tensor([[1.0, -math.inf, 0.0], [0.0, 0.0, 0.0]])) is None, "infinite"
    assert divergence(rows, rows * math.nan) is None


def test_an_answer_that_holds_a_placeholder_has_no_divergence(model, processor):
    tokens = torch.tensor([5, tiny.IMAGE_TOKEN])
    before = Answer("", tokens, torch.zeros(2, tiny.VOCAB))
    after = replace(before, tokens=torch.tensor([5, 6]))
    inputs = {"input_ids": torch.tensor([[7, 8], [7, 8]])}
    assert divergences(model, [before, after], [after, before], inputs)[0] is None
    other = replace(before, tokens=torch.tensor([6, 5]))
    asked_alone = divergences(model, [after], [other], {"input_ids": torch.tensor([[7, 8]])})
    assert asked_alone[0] > 0
    assert divergences(model, [before, after], [after, other], inputs) == pytest.approx([None, *asked_alone], abs=1e-6)
    assert divergences(model, [before], [before], {}) == [0], "nothing has to be run again"


def test_files_without_divergences_still_load(model, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(model.generation_config, "suppress_tokens", [tiny.IMAGE_TOKEN])
    path = tmp_path / "r.jsonl"
    evaluate(model, processor, [Words()], rows_for([16], ["random"]), path, timed=0, batch_size=4)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[:4]:
        for name in ("same", "kl"):
            line.get("answers", {}).pop(name, None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    full, merged = summarise(Results.load(path))
    assert (merged.accuracy["all"].n, merged.same["all"].n, merged.divergence["all"].n) == (7, 3, 3)
    assert "(n = 3) |" in accuracy_table([full, merged])
    for line in lines:
        for name in ("same", "kl"):
            line.get("answers", {}).pop(name, None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summaries = summarise(Results.load(path))
    assert all(summary.same == summary.divergence == {} for summary in summaries)
    assert all("| – | – |" in line for line in accuracy_table(summaries).splitlines()[2:])


def test_half_a_character_does_not_end_a_run(model, processor, tmp_path):
    """It is written as its escape; a question with one is named and left out. The run can be continued."""

    @dataclass(frozen=True)
    class Halves(Words):
        name: str = "words \udcff"
        yes_no: tuple[str, ...] = ("cat \ud83d",)

        def __getitem__(self, index: int) -> Example:
            one = super().__getitem__(index)
            question = one.question + " \ud83d" * (index == 1) + processor.image_token * (index == 5)
            kind, measures = f"{one.kind} \ud83d", {"n \ud83d": index}
            return replace(one, question=question, references=("yes \ud83d",), kind=kind, measures=measures)

        def describe(self) -> dict[str, object]:
            return {"\ud83d": ["\ud83d"]}

    path, rows = tmp_path / os.fsdecode(b"r \xff.jsonl"), rows_for([16], ["random"])
    results = evaluate(model, processor, [Halves()], rows, path, timed=2, batch_size=4)
    skipped = [entry for batch in results.examples.values() for entry in batch.skipped]
    assert [index for index, _ in skipped] == [1, 5]
    assert "example 1 of words \\udcff is left out: the question holds '\\ud83d'" in skipped[0][1]
    assert "the question holds <image>" in skipped[1][1]
    assert results == Results.load(path)
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    again = evaluate(model, processor, [Halves()], rows, path, timed=2, batch_size=4)
    assert again.answers == results.answers
    (summary, _) = summarise(results)
    assert set(summary.f1) == {"cat \\ud83d"}
    assert {n for batch in results.examples.values() for kind in batch.kind for n in [kind]} == {
        "red \\ud83d", "cat \\ud83d", "a \\ud83d"
    }  # fmt: skip


def test_a_folder_whose_name_is_not_text(model, processor, tmp_path):
    folder = tmp_path / os.fsdecode(b"own \xff")
    folder.mkdir()
    tiny.photos(1)[0].save(folder / "a.png")
    lines(folder, {"image": "a.png", "question": "what ?", "answer": "yes \ud83d"})
    results = evaluate(model, processor, [Folder(folder)], [UNTOUCHED], tmp_path / "r.jsonl", timed=1)
    assert list(results.header.tasks) == ["own \\udcff"]
    assert results.examples["own \\udcff", 0].kind == ["own \\udcff"]
    assert provenance(results).encode()


@pytest.mark.parametrize("error", [KeyError("colour"), SystemExit("colour")])
def test_what_a_task_raises_is_said_of_its_example(model, processor, tmp_path, error):
    class Torn(Words):
        def __init__(self, what: str) -> None:
            super().__init__(3)
            object.__setattr__(self, "what", what)

        def fail(self, what: str) -> None:
            if self.what == what:
                raise error

        def __len__(self) -> int:
            self.fail("length")
            return 3

        def __getitem__(self, index: int) -> Example:
            if index == 1:
                self.fail("example")
            return super().__getitem__(index)

        def score(self, example: Example, answer: str) -> float:
            if example.measures["number"] == 2:
                self.fail("score")
            return 1

        def describe(self) -> dict[str, object]:
            self.fail("description")
            return {}

    for what, subject in {
        "length": "the length of words",
        "description": "the description of words",
        "example": "example 1 of words",
        "score": "the score of example 2 of words",
    }.items():
        path = tmp_path / f"{what}.jsonl"
        with pytest.raises(
            BadPrompt, match=f"^{subject} cannot be had \\({type(error).__name__}: '?colour'?\\): mend the task.$"
        ) as caught:
            evaluate(model, processor, [Torn(what)], [UNTOUCHED], path, timed=0)
        assert caught.value.__cause__ is error
    with pytest.raises(BadPrompt, match="example 1 of words has the question 3, which must be a text"):
        evaluate(model, processor, [Odd(2, changed={"question": 3})], [UNTOUCHED], tmp_path / "q.jsonl")
    with pytest.raises(BadPrompt, match=r"example 1 of words has the images .* PIL images"):
        evaluate(model, processor, [Odd(2, changed={"images": ("a.png",)})], [UNTOUCHED], tmp_path / "i.jsonl")


def test_results_through_a_link_and_under_a_long_name(model, processor, tmp_path):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "r.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(target)
    evaluate(model, processor, [Words(2)], [UNTOUCHED], link, timed=0, batch_size=1)
    whole = target.read_bytes()
    target.write_bytes(whole[:-5])
    evaluate(model, processor, [Words(2)], [UNTOUCHED], link, timed=0, batch_size=1)
    assert link.is_symlink()
    assert target.read_bytes() == whole
    longest = "r" * (255 - len(".jsonl")) + ".jsonl"
    evaluate(model, processor, [Words(2)], [UNTOUCHED], tmp_path / longest, timed=0)
    assert len(Results.load(tmp_path / longest).asked) == 2
    with pytest.raises(BadOutput, match="could not be written"):
        evaluate(model, processor, [Words(2)], [UNTOUCHED], tmp_path / f"r{longest}", timed=0)


def test_f1_where_no_answer_is_yes_is_unknown():
    results = hand_made()
    for texts in results.examples["t", 0].references:
        texts[:] = ["no"]
    full, merged = summarise(results)
    assert full.f1 == merged.f1 == {"yesno": None}
    assert "50.0, F1 of yes – |" in accuracy_table([full, merged])


def test_an_interrupted_run_goes_on_where_it_stopped(model, processor, thresholds, tmp_path):
    rows = rows_for([16], ["dtome", "random"], ["exact"])

    def run(path: Path, task: Words) -> None:
        evaluate(model, processor, [task], rows, path, thresholds=[thresholds], batch_size=2, timed=3)

    run(tmp_path / "whole.jsonl", Words())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "torn.jsonl", Words(stop_at=4))
    lines = (tmp_path / "torn.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) > 6
    (tmp_path / "torn.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:-9])  # killed while it wrote
    run(tmp_path / "torn.jsonl", Words())
    assert told(tmp_path / "torn.jsonl") == told(tmp_path / "whole.jsonl")
    size = (tmp_path / "torn.jsonl").stat().st_size
    run(tmp_path / "torn.jsonl", Words())
    assert (tmp_path / "torn.jsonl").stat().st_size == size, "a finished run has nothing to add"


def test_a_file_of_another_run_is_left_alone(model, processor, thresholds, tmp_path):
    path = tmp_path / "r.jsonl"
    evaluate(model, processor, [Words(2)], [UNTOUCHED], path, timed=0)
    before = path.read_bytes()
    with pytest.raises(BadResults, match="differs in seed"):
        evaluate(model, processor, [Words(2)], [UNTOUCHED], path, timed=0, seed=1)
    with pytest.raises(BadResults, match="differs in rows"):
        evaluate(model, processor, [Words(2)], ROWS, path, thresholds=[thresholds], timed=0)
    assert path.read_bytes() == before
    in_prompt = [msgspec.structs.replace(entry, images=(0.9,)) for entry in thresholds.calibrated]
    other, path = msgspec.structs.replace(thresholds, calibrated=tuple(in_prompt)), tmp_path / "t.jsonl"
    evaluate(model, processor, [Words(2)], [UNTOUCHED], path, thresholds=[thresholds], timed=0)
    with pytest.raises(BadResults, match="differs in thresholds"):
        evaluate(model, processor, [Words(2)], [UNTOUCHED], path, thresholds=[other], timed=0)


@pytest.mark.parametrize(
    "content", ["{", "[]\n", '{"dymu_results": 99}\n', "\x00\x01\n", '{"dymu_results":1}\n', FIRST_LINE + '{"a":1}\n']
)
def test_a_file_that_holds_no_results_is_refused(tmp_path, content):
    (tmp_path / "r.jsonl").write_text(content)
    with pytest.raises(BadResults):
        Results.load(tmp_path / "r.jsonl")
    with pytest.raises(BadResults):
        ResultFile(tmp_path / "r.jsonl", HEADER)
    assert (tmp_path / "r.jsonl").read_text() == content


def examples_line(start=0, **changed) -> str:
    fields = {"index": [0, 1], "kind": ["a", "b"], "references": [["x"], []], "measures": [{}, {}], "skipped": []}
    return json.dumps({"task": "t", "start": start, "examples": fields | changed}) + "\n"


def answers_line(start, *answers) -> str:
    of_batch = {"answers": answers, "scores": [1] * len(answers), "kept": [9] * len(answers)}
    return json.dumps({"task": "t", "start": start, "row": "untouched", "answers": of_batch}) + "\n"


def cost_line(index, **changed) -> str:
    costs = {"encoder_ms": 1, "prefill_ms": 1, "decode_ms_per_token": 1, "flops": 1, "cache_bytes": 1} | changed
    return json.dumps({"task": "t", "start": index, "row": "untouched", "cost": costs}) + "\n"


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (examples_line(kind=["a"]), "differ in length"),
        (examples_line(references=[["x"]]), "differ in length"),
        (examples_line(kind=["a", "all"]), "all kinds together"),
        (examples_line(kind=["a", "yesno"]), "has no reference"),
        (examples_line(kind=["a", "c"]), "other examples"),
        (examples_line(start=1, index=[1, 2]), "one of another batch"),
        (examples_line(start=2, index=[2, 2]), "an example twice"),
        (answers_line(0, "yes"), "as many examples"),
        (answers_line(2, "yes"), "as many examples"),
        (cost_line(2), "no earlier line holds its example"),
        *((cost_line(0, **{name: -1}), name) for name in Cost.__struct_fields__),
        *((cost_line(0, **{name: 1e300}), name) for name in Cost.__struct_fields__),
        (cost_line(0, flops=math.inf), "malformed"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path, last, says):
    path = tmp_path / "r.jsonl"
    path.write_text(FIRST_LINE + examples_line() + answers_line(0, "yes", "no") + cost_line(1) + examples_line())
    assert summarise(Results.load(path))[0].costs.n == 1
    path.write_text(path.read_text() + last)
    with pytest.raises(BadResults, match=rf"line 6 of .*r\.jsonl is damaged \(.*{says}"):
        Results.load(path)


def test_costs_whose_answers_were_deleted_do_not_count(tmp_path):
    path = tmp_path / "r.jsonl"
    other = examples_line(start=2, index=[2, 3])
    path.write_text(
        FIRST_LINE + examples_line() + cost_line(0) + other + answers_line(2, "a", "b") + cost_line(2, encoder_ms=7)
    )
    (summary,) = summarise(Results.load(path))
    assert (summary.costs.n, summary.costs.encoder_ms) == (1, 7)


@dataclass(frozen=True)
class Odd(Words):
    """One field of example 1, or the score of its answer, is another."""

    changed: dict = field(default_factory=dict)

    def __getitem__(self, index: int) -> Example:
        if "example" in self.changed:
            return self.changed["example"]
        example = super().__getitem__(index)
        return replace(example, **{k: v for k, v in self.changed.items() if k != "score"}) if index == 1 else example

    def score(self, example: Example, answer: str) -> float:
        return self.changed.get("score", 1) if example.kind == "cat" else 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("score", value) for value in (1.5, -0.1, math.nan, math.inf, None, "1", 10**400)),
        *(("kind", value) for value in ("all", "", None, 3)),
        *(("references", value) for value in ("cat", None, (1,))),
        *(("measures", value) for value in ({"n": math.nan}, {"n": 10**400}, {"n": "2"}, {3: 1}, None)),
    ],
)
def test_examples_and_scores_are_checked_before_they_are_written(model, processor, tmp_path, name, value):
    task = Odd(2, changed={name: value})
    with pytest.raises(BadPrompt, match=f"^example 1 of words has the {name} .*, which must be .*: mend the task.$"):
        evaluate(model, processor, [task], [UNTOUCHED], tmp_path / "r.jsonl", timed=0)
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()[1:]]
    assert [[*line][-1] for line in lines] == (["examples"] if name == "score" else [])


def test_a_task_with_odd_fields_is_refused_before_any_work(model, processor, tmp_path):
    for changed in (
        {"name": 5},
        {"name": " "},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.0},
        {"max_new_tokens": True},
        {"yes_no": "red"},
    ):
        with pytest.raises(BadPrompt, match=f"(words|a task) has the {next(iter(changed))} .*: mend the task"):
            evaluate(model, processor, [Words(**changed)], [UNTOUCHED], tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize("value", [Path("a"), np.int64(3), {("a",): object()}])
def test_a_description_that_no_file_can_hold_is_refused(model, processor, tmp_path, value):
    class Described(Words):
        def describe(self) -> dict[str, object]:
            return {"of": value}

    with pytest.raises(BadPrompt, match=r"the description of words cannot be had .*: mend the task"):
        evaluate(model, processor, [Described()], [UNTOUCHED], tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_only_one_process_writes_a_file(tmp_path):
    path = tmp_path / "r.jsonl"
    with ResultFile(path, HEADER), pytest.raises(BadResults, match=r"another dymu evaluate is writing .*r\.jsonl"):
        ResultFile(path, HEADER)
    whole = path.read_bytes()
    with ResultFile(path, HEADER) as file:
        assert path.read_bytes() == whole
        path.unlink()
        with pytest.raises(BadOutput, match="it was deleted meanwhile"):
            file.add(Line("t", 0, examples=Examples([], [], [], [], [])))


def test_rows_of_other_versions(tmp_path):
    (tmp_path / "r.jsonl").write_text(FIRST_LINE.replace('"untouched"', '"quadtree"'))
    with pytest.raises(BadResults, match="unknown method, 'quadtree'"):
        Results.load(tmp_path / "r.jsonl")


def test_what_is_no_example_and_yes_or_no_without_a_reference_are_refused(model, processor, tmp_path):
    task = Odd(2, changed={"example": 3})
    with pytest.raises(BadPrompt, match="example 0 of words is 3, which is no Example"):
        evaluate(model, processor, [task], [UNTOUCHED], tmp_path / "a.jsonl")
    task = Odd(2, yes_no=("cat",), changed={"references": ()})
    with pytest.raises(BadPrompt, match=r"example 1 of words has the references .* yes or no"):
        evaluate(model, processor, [task], [UNTOUCHED], tmp_path / "b.jsonl")
    evaluate(model, processor, [replace(task, yes_no=())], [UNTOUCHED], tmp_path / "c.jsonl", timed=0)


def test_numbers_of_numpy_are_numbers(model, processor, tmp_path):
    task = Odd(2, changed={"score": np.float32(0.5), "measures": {"n": np.int64(3)}})
    evaluate(model, processor, [task], [UNTOUCHED], tmp_path / "r.jsonl", timed=0)
    results = Results.load(tmp_path / "r.jsonl")
    assert results.answers["untouched"]["words", 0].scores == [1, 0.5]
    assert results.examples["words", 0].measures[1] == {"n": 3}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('"row":"untouched"', "it needs one of"),
        ('"answers":{"answers":[],"scores":[],"kept":[]},"cost":' + COST, "it needs one of"),
        ('"answers":{"answers":["a","b"],"scores":[1,1],"kept":[9]}', "differ in length"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, content, says):
    path = tmp_path / "r.jsonl"
    path.write_text(FIRST_LINE + f'{{"task":"t","start":0,{content}}}\n')
    with pytest.raises(BadResults, match=rf"line 2 of .*r\.jsonl is damaged \(.*{says}"):
        Results.load(path)


def test_a_row_that_cannot_be_had_is_refused_before_any_work(model, processor, thresholds, tmp_path):
    with pytest.raises(BadBudget, match="linear"):
        evaluate(
            model, processor, [Words()], [Row("dtome", 16, "exact", "linear")], tmp_path / "r.jsonl",
            thresholds=[thresholds],
        )  # fmt: skip
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(
    "row", [Row("random", 99, "exact"), Row("pool", 64, "exact"), Row("tome", 99, "exact", "constant")]
)
def test_a_budget_that_cannot_be_met_is_refused_before_any_work(model, processor, tmp_path, row):
    with pytest.raises(BadBudget):
        evaluate(model, processor, [Words()], [UNTOUCHED, row], tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(
    ("row", "says"),
    [(Row("best", 9, "exact"), "the method 'best'"), (Row("random", 9, "best"), "the way to unmerge 'best'")],
)
def test_a_row_of_unknown_names_is_refused_before_any_work(model, processor, tmp_path, row, says):
    with pytest.raises(ValueError, match=f"{says} is unknown; choose some of"):
        evaluate(model, processor, [Words()], [UNTOUCHED, row], tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


def test_a_method_that_would_ignore_the_budget_is_refused():
    method = Method("fixed", "fixed", "red", "ThresholdMerge")
    with pytest.raises(TypeError, match="ThresholdMerge has no field `keep`, so fixed would ignore its budget"):
        method.make(Row("fixed", 9), 0.5, 0)


def test_tasks_of_one_name_and_merged_models_are_refused(model, processor, tmp_path):
    with pytest.raises(DymuError, match="2 tasks are named words; give each task once"):
        evaluate(model, processor, [Words(2), Words(3)], [UNTOUCHED], tmp_path / "r.jsonl")
    with dymu.apply(model, merge=dymu.FixedMerge(9)), pytest.raises(AlreadyApplied):
        evaluate(model, processor, [Words(2)], [UNTOUCHED], tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


def test_examples_that_changed_meanwhile_are_refused(model, processor, tmp_path):
    @dataclass(frozen=True)
    class Same(Words):
        def describe(self) -> dict[str, object]:
            return {}

    rows = rows_for([16], ["random"])
    evaluate(model, processor, [Same(2, broken=(1,))], rows, tmp_path / "r.jsonl", timed=0)
    whole = (tmp_path / "r.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "r.jsonl").write_bytes(b"".join(whole[:-1]))
    with pytest.raises(BadResults, match="mended or replaced"):
        evaluate(model, processor, [Same(2)], rows, tmp_path / "r.jsonl", timed=0)
    assert summarise(Results.load(tmp_path / "r.jsonl")) == []


def test_rows_take_turns_when_they_are_timed(model, processor, tmp_path):
    rows = rows_for([16, 9], ["random"])
    results = evaluate(model, processor, [Words(3)], rows, tmp_path / "r.jsonl", timed=3)
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    first = {}
    for line in lines:
        if "cost" in line:
            first.setdefault(line["start"], line["row"])
    assert sorted(first.values()) == sorted(row.key for row in rows)
    assert all(summary.costs.tokens == summary.tokens_mean for summary in summarise(results))


def test_several_images_of_a_question_are_counted_together(model, processor, tmp_path):
    @dataclass(frozen=True)
    class Pairs(Words):
        def __getitem__(self, index: int) -> Example:
            one = super().__getitem__(index)
            return replace(one, images=one.images * (1 + index % 2))

    results = evaluate(model, processor, [Pairs(4)], rows_for([16], ["random"]), tmp_path / "r.jsonl", timed=0)
    assert results.answers["untouched"]["words", 0].kept == [tiny.PATCHES, 2 * tiny.PATCHES] * 2
    assert results.answers["random-16-exact"]["words", 0].kept == [16, 32] * 2


def test_images_in_tiles_are_compared_with_the_untouched_model(tmp_path):
    """Budgets are of whole images, as calibrated; what keeps tokens of each picture is refused."""
    model, processor = tiny.llava("siglip", "qwen2", "llava_onevision"), tiny.full_processor("llava_onevision")
    calibrated = dymu.calibrate(model, processor, tiny.photos(6), [0.3, 1.0], progress=False)
    assert full_tokens(model, processor, [calibrated]) == round(calibrated.image_tokens) > tiny.PATCHES
    with dymu.apply(model, calibrated, budget=1.0) as handle:
        model.get_image_features(**processor.image_processor(tiny.photos(1), return_tensors="pt"))
        (item,) = handle.last.items
    budget = round(calibrated.budgets[0])
    run = {"thresholds": [calibrated], "limit": 4, "timed": 1, "progress": False}
    rows = rows_for([budget], ["dtome", "random", "stride", "pool", "tome"])
    results = evaluate(model, processor, [Words()], rows, tmp_path / "a.jsonl", **run)
    kept = [sum(batch.kept) for row in results.answers.values() for batch in row.values()]
    assert all(0 < each < 0.6 * kept[0] for each in kept[1:])
    newlines = 4 * int((~item.patch).sum())
    assert kept[2] == kept[3] == pytest.approx(4 * budget + newlines, abs=4)
    assert kept[5] == pytest.approx(4 * budget + newlines, abs=4)
    with pytest.raises(UnsupportedModel, match="cuts images into several"):
        evaluate(model, processor, [Words()], rows_for([budget], ["downscale"]), tmp_path / "b.jsonl", **run)


def test_kinds_of_several_tasks_are_told_apart(model, processor, tmp_path):
    tasks = [Words(3), Words(3, name="other", yes_no=())]
    (summary,) = summarise(evaluate(model, processor, tasks, [UNTOUCHED], tmp_path / "r.jsonl", timed=0))
    assert {kind: one.n for kind, one in summary.accuracy.items()} == {
        "all": 6, **{f"{task}: {word}": 1 for task in ("words", "other") for word in WORDS}
    }  # fmt: skip
    assert set(summary.f1) == {"words: red"}


@pytest.mark.parametrize("crop", [tiny.SIDE, None])
def test_a_smaller_image_shows_the_same_part(model, processor, crop):
    """At full size it is the stock model's input, where the processor resizes by the shorter side and crops as well."""
    images = processor.image_processor
    kept = images.size, images.crop_size
    images.size, images.crop_size = SizeDict(shortest_edge=tiny.SIDE + 8), SizeDict(height=tiny.SIDE, width=tiny.SIDE)
    if crop is None:
        images.size = SizeDict(height=tiny.SIDE, width=tiny.SIDE)
    try:
        photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 50, 3), dtype=np.uint8))
        stock = inputs_for(model, processor, [([photo], "what ?")])
        with running(Row("downscale", tiny.PATCHES), model, processor, {}, tiny.PATCHES):
            same = inputs_for(model, processor, [([photo], "what ?")])
        with running(Row("downscale", 9), model, processor, {}, tiny.PATCHES):
            small = inputs_for(model, processor, [([photo], "what ?")])
        assert torch.equal(stock["pixel_values"], same["pixel_values"])
        assert small["pixel_values"].shape[-2:] == (3 * tiny.PATCH, 3 * tiny.PATCH)
    finally:
        images.size, images.crop_size = kept


def test_unreadable_images_are_named_and_left_out(model, processor, tmp_path):
    results = evaluate(
        model, processor, [Words(broken=(0, 4))], [UNTOUCHED], tmp_path / "r.jsonl", batch_size=2, timed=2
    )
    skipped = [entry for batch in results.examples.values() for entry in batch.skipped]
    assert skipped == [(0, "picture 0 is damaged: get another."), (4, "picture 4 is damaged: get another.")]
    (summary,) = summarise(results)
    assert summary.accuracy["all"].n == 5
    assert list(results.costs["untouched"]) == [("words", 1)]


def hand_made() -> Results:
    """Two rows, four questions of two kinds, scores one can add up."""
    rows = [UNTOUCHED, Row("tome", 4, "exact", "constant")]
    results = Results(msgspec.structs.replace(HEADER, rows=rows))
    examples = Examples(
        index=[0, 1, 2, 3], kind=["yesno", "name", "yesno", "name"], skipped=[],
        references=[["Yes."], ["a"], ["no"], ["b"]],
        measures=[{"objects": 1}, {"objects": 2}, {"objects": 3}, {"objects": 4}],
    )  # fmt: skip
    results.take(Line("t", 0, examples=examples))
    results.take(Line("t", 4, examples=examples))
    answers = Answers(["yes", "a", "no", "b"], [1, 1, 1, 1], [9, 9, 9, 9])
    results.take(Line("t", 0, rows[0].key, answers=answers))
    results.take(Line("t", 4, rows[0].key, answers=answers))
    answers = Answers(["yes.", "x", "Yes, it is", "b"], [1, 0, 0, 1], [2, 4, 6, 4])
    results.take(Line("t", 0, rows[1].key, answers=answers))
    for index, ms in enumerate((10.0, 30.0, 80.0, 5.0)):
        if index < 3:
            results.take(Line("t", index, rows[0].key, cost=Cost(1.0, 1.0, 1.0, 1, 1)))
        results.take(Line("t", index, rows[1].key, cost=Cost(ms, 1.0, 2.0, 2e12, 1000)))
    return results


def test_the_summary_of_numbers_one_can_add_up():
    full, merged = summarise(hand_made())
    assert full.accuracy["all"].n == merged.accuracy["all"].n == 4, "the second batch was not answered by every row"
    assert full.accuracy["all"].mean == 1
    assert full.difference == {}
    assert merged.accuracy["all"].mean == 0.5
    assert merged.difference["all"].mean == merged.difference["name"].mean == -0.5
    assert (merged.tokens_mean, merged.tokens_sd) == (4, pytest.approx(2**0.5))
    assert full.f1 == {"yesno": 1.0}
    assert merged.f1 == {"yesno": pytest.approx(2 / 3)}
    assert full.costs.encoder_ms == 1
    assert (merged.costs.encoder_ms, merged.costs.n) == (30, 3), "the last was not timed in every row"
    assert merged.costs.tokens == 4
    assert merged.costs.tflops == 2
    few = summarise(hand_made(), lambda measures: measures["objects"] <= 2)
    assert [summary.accuracy["all"].n for summary in few] == [2, 2]
    assert few[1].tokens_mean == 3


def test_differences_are_paired():
    """Both rows answer the same half of the questions."""
    results = hand_made()
    (full, merged), some = results.answers.values(), [1, 0, 1, 0]
    full["t", 0].scores, merged["t", 0].scores = some, some
    difference = summarise(results)[1].difference["all"]
    assert (difference.mean, difference.n) == (0, 4)
    assert -difference.low == difference.high == pytest.approx(0.49, abs=0.001), "that of 0 of 4"


def test_parts_are_about_equal_and_keep_equal_values_together():
    results = hand_made()
    assert parts_by(results, "objects", 2) == [Part("objects", 1, 2), Part("objects", 3, 4)]
    measures = results.examples["t", 0].measures
    measures[:] = [{"objects": 1}, {"objects": 1}, {"objects": 1}, {"objects": 5}]
    assert parts_by(results, "objects", 3) == [Part("objects", 1, 1), Part("objects", 5, 5)]
    measures[:] = [{"objects": 1}, {"objects": 2}, {"objects": 2}, {"objects": 3}]
    assert parts_by(results, "objects", 3) == [Part("objects", n, n) for n in (1, 2, 3)], "ties do not swallow others"
    measures[0]["objects"] = math.nan
    assert parts_by(results, "objects", 3) == [Part("objects", 2, 2), Part("objects", 3, 3)]
    del measures[3]["objects"]
    (only,) = parts_by(results, "objects", 3)
    assert [summary.accuracy["all"].n for summary in summarise(results, only)] == [2, 2], "two have none"
    with pytest.raises(DymuError, match="no question has the measure 'words'; take one of: objects"):
        parts_by(results, "words")


def test_differences_from_another_method():
    dtome, tome = Row("dtome", 10, "exact", "linear"), [Row("tome", n, "exact", "constant") for n in (4, 9)]
    plain = Row("tome", 10, "none", "constant")
    rows = [UNTOUCHED, dtome, *tome, plain]
    assert compared_with(dtome, rows, "tome") == tome[1], "unmerged alike, and nearest"
    assert compared_with(msgspec.structs.replace(dtome, unmerge="none"), rows, "tome") == plain
    assert compared_with(tome[0], rows, "tome") is None
    assert compared_with(UNTOUCHED, rows, "tome") is None
    assert compared_with(tome[0], rows, "pool") is None
    assert compared_with(tome[0], [dtome, tome[0]], "untouched") is None, "a file may have no such row"
    holo, wide = (Row("holo-v", 9, options=options) for options in ("", "stretches=8"))
    assert [compared_with(dtome, some, "holo-v") for some in ([holo, wide], [wide, holo], [wide])] == [holo, holo, wide]
    assert [compared_with(row, [holo, wide], "holo-v:stretches=8") for row in (dtome, holo, wide)] == [wide, wide, None]
    solved = [Row("pru-merge", n, solved=f"outliers={n}.5") for n in (4, 9)]
    named = Row("pru-merge", 9, options="outliers=1.5")
    assert compared_with(dtome, solved, "pru-merge") == solved[1]
    assert compared_with(holo, [*solved, named], "pru-merge:outliers=1.5") == named
    assert compared_with(named, [*solved, named], "pru-merge") is None
    results = hand_made()
    results.header.rows.append(Row("dtome", 5, "exact", "linear"))
    answers = Answers(["no", "a", "no", "x"], [0, 1, 1, 0], [3, 3, 3, 3])
    results.take(Line("t", 0, "dtome-5-exact-linear", answers=answers))
    full, fixed, merged = summarise(results, against="tome")
    assert full.difference == fixed.difference == {}
    assert (merged.difference["all"].mean, merged.difference["name"].mean) == (0, 0)
    assert (merged.against, merged.against_tokens) == (fixed.row, 4)
    assert "| +0.0 [-100.0, +100.0] (4 tokens) |" in accuracy_table([full, fixed, merged], "tome")
    parts = [(part, summarise(results, part, "tome")) for part in parts_by(results, "objects", 2)]
    table = part_table(parts, "tome")
    assert "| objects 1 to 2 (n = 2) | against ToMe | objects 3 to 4 (n = 2) |" in table
    assert "| ToMe + VTU, 4 | 50.0 at 3 tokens |  | 50.0 at 5 tokens |  |" in table
    assert "| DToMe + VTU (linear), 5 | 50.0 at 3 tokens | +0.0 [-100.0, +100.0] (3 tokens) |" in table


@pytest.mark.parametrize(("right", "count"), [(0.7, 60), (0.95, 12), (0.5, 3)])
def test_intervals_cover_what_they_should(right, count):
    rng = np.random.default_rng(0)
    shares = [share((rng.random(count) < right).astype(float)) for _ in range(2000)]
    covered = np.mean([one.low <= right <= one.high for one in shares])
    assert 0.92 <= covered <= 1
    assert share(np.ones(5)) == share(np.ones(5))


@pytest.mark.parametrize(("right", "count"), [(0, 4), (4, 4), (1, 1), (7, 20), (1000, 1000)])
def test_shares_have_wilsons_interval(right, count):
    """Its ends p are where (mean - p)² = z² p (1 - p) / n."""
    one = share(np.arange(count) < right)
    assert (one.mean, one.n) == (right / count, count)
    assert 0 <= one.low < one.high <= 1
    for end in (one.low, one.high):
        assert (one.mean - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count, rel=1e-4, abs=1e-12)


def test_equal_values_are_no_certainty():
    others = 1.959964**2 / (4 + 1.959964**2)
    for value, ends in ((0, (-1, 1)), (-1, (-1, 1)), (0.5, (0, 1)), (0.5, (-1, 1))):
        one = share(np.full(4, float(value)), ends)
        assert one.mean == value
        assert (one.low, one.high) == pytest.approx([value + others * (end - value) for end in ends])
    many = share(np.zeros(1000), (-1, 1))
    assert many.high == pytest.approx(0.0038, abs=1e-4)
    assert share(np.full(4, 0.25), None) == Share(0.25, 0.25, 0.25, 4), "nothing bounds them"
    mixed = share(np.array([0.25, 0.5, 1.0, 0.0]), None)
    assert mixed.low < mixed.mean < mixed.high
    assert math.isnan(share(np.array([])).mean)


def test_flops_are_those_of_the_layers(model, processor):
    """Counted once more from the shapes: 2 FLOPs for each weight and token, 4 · D for each pair of query and key."""
    inputs = inputs_for(model, processor, [(tiny.photos(1), "what is this ?")])
    parts = resolve(model)
    tokens, patches = inputs["input_ids"].shape[1], tiny.PATCHES

    def weights(module: nn.Module) -> int:
        return sum(p.weight.numel() for p in module.modules() if isinstance(p, nn.Linear))

    wide, text = parts.tower.config.hidden_size, model.config.text_config
    expected = 2 * parts.tower.get_input_embeddings().weight.numel() * patches
    expected += 2 * sum(weights(layer) for layer in parts.encoder_modules) * (patches + 1)
    expected += 4 * len(parts.encoder_modules) * (patches + 1) ** 2 * wide
    expected += 2 * weights(parts.projector) * patches
    expected += 2 * sum(weights(layer) for layer in parts.language_model.layers) * tokens
    expected += 2 * len(parts.language_model.layers) * tokens * (tokens + 1) * text.head_dim * text.num_attention_heads
    expected += 2 * weights(model.lm_head)
    assert cost(model, inputs).flops == pytest.approx(expected, rel=0.002)


def test_tables_and_picture(tmp_path):
    summaries = summarise(hand_made())
    table = accuracy_table(summaries)
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| ToMe + VTU | 4 ± 1 | 50.0 [15.0, 85.0] | -50.0 [-100.0, +0.0] | – | – | 50.0, F1 of yes 67 |" in table
    assert "| ToMe + VTU | 4 | 30 | 1 | 2.0 | 2.000 | 0.00 |" in cost_table(summaries)
    pytest.importorskip("matplotlib")
    other_schedule = [replace(one, row=msgspec.structs.replace(one.row, schedule="weird")) for one in summaries]
    draw_chart(other_schedule, tmp_path / "other.png")
    merged = next(one for one in summaries if one.row.method == "tome")
    forms = [replace(merged, row=msgspec.structs.replace(merged.row, unmerge=way)) for way in UNMERGE]
    assert len({series(one.row) for one in forms}) == len(UNMERGE)
    draw_chart(forms, tmp_path / "forms.png")
    draw_chart(summaries, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        assert min(picture.size) > 200
        assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10


def lines(folder: Path, *questions: dict) -> Path:
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return folder


def test_a_folder_of_ones_own(tmp_path):
    for name in ("a.png", "b.png"):
        tiny.photos(1)[0].save(tmp_path / name)
    ask = {"image": "a.png", "question": "What?", "answer": "3", "measures": {"objects": 2, "pixels": 1}}
    task = Folder(
        lines(
            tmp_path,
            {**ask, "kind": "n", "score": "relaxed"}, {**ask, "kind": "n", "score": "relaxed"},
            {"images": ["a.png", "b.png"], "question": "Which?", "answers": ["b", "the b"], "kind": "w"},
        )
    )  # fmt: skip
    assert [task[i].kind for i in range(len(task))] == ["n", "w", "n"]
    assert len(task[1].images) == 2
    assert (task[0].measures["objects"], set(task[1].measures)) == (2, {"bytes", "pixels"})
    assert task[0].measures["pixels"] > 1, "those are counted"
    assert task.score(task[0], "3.1") == 1
    assert task.score(task[1], "3.1") == 0
    assert task.score(task[1], "The B.") == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"image": "a.png", "question": "What?"}, "line 1 is no object"),
        ({"image": "c.png", "question": "What?", "answer": "3"}, "names 'c.png', which is not in"),
        *(
            ({"image": name, "question": "What?", "answer": "3"}, "which is not in")
            for name in ("c" * 5000, "\0.png", "\ud83d.png")
        ),
        ({"image": "a.png", "question": "What?", "answer": 3}, "other than text"),
        ({"image": "a.png", "question": "What?", "answers": []}, "no answer"),
        ({"image": "a.png", "question": "What?", "answer": "3", "score": "best"}, "unknown score 'best'"),
        ({"image": "a.png", "question": "What?", "answer": "3", "score": ["exact"]}, "other than text"),
        ({"image": "a.png", "question": "What?", "answers": "yes"}, "no \\[list\\]"),
        ({"images": None, "question": "What?", "answer": "yes"}, "no \\[list\\]"),
        ({"image": "a.png", "question": "What?", "answers": ["a", "b"], "score": "vqa"}, "at least 4"),
        ({"image": "a.png", "question": "What?", "answer": "3", "kind": "all"}, "all kinds together"),
        ({"image": "a.png", "question": "What?", "answer": "3", "kind": ""}, 'line 1 is of the kind ""'),
        ({"image": "a.png", "question": "What?", "answer": "3", "measures": [2]}, "no object of numbers"),
        ({"image": "a.png", "question": "What?", "answer": "3", "measures": {"words": "2"}}, "no object of numbers"),
        ({"image": "a.png", "question": "What?", "answer": "3", "measures": {"words": True}}, "no object of numbers"),
        ({"image": "a.png", "question": "What?", "answer": "3", "measures": {"n": 10**400}}, "no object of numbers"),
        ({"image": "a.png", "question": "What?", "answer": "3", "measures": {"n": math.nan}}, "no object of numbers"),
    ],
)
def test_a_folder_with_a_mistake_is_refused(tmp_path, line, says):
    tiny.photos(1)[0].save(tmp_path / "a.png")
    with pytest.raises(BadPrompt, match=says):
        Folder(lines(tmp_path, line))


def test_a_line_that_is_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "questions.jsonl").write_text("[" * 100_000 + "]" * 100_000 + "\n")
    with pytest.raises(BadPrompt, match="line 1 is no object"):
        Folder(tmp_path)


def test_a_folder_is_another_with_other_images(tmp_path):
    tiny.photos(1)[0].save(tmp_path / "a.png")
    lines(tmp_path, {"image": "a.png", "question": "What?", "answer": "3"})
    before = Folder(tmp_path).describe()
    tiny.photos(2)[1].save(tmp_path / "a.png")
    assert Folder(str(tmp_path)).describe() != before
    assert Folder(tmp_path)[0].kind == tmp_path.name


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_folder_in_another_encoding(tmp_path, encoding):
    tiny.photos(1)[0].save(tmp_path / "a.png")
    line = json.dumps({"image": "a.png", "question": "What\u2028now?", "answer": "3"}, ensure_ascii=False)
    (tmp_path / "questions.jsonl").write_text(line + "\n", encoding=encoding)
    if encoding == "utf-8-sig":
        assert Folder(tmp_path)[0].question == "What\u2028now?"
    else:
        with pytest.raises(BadPrompt, match="UTF-8"):
            Folder(tmp_path)


def test_a_kind_has_one_score(tmp_path):
    tiny.photos(1)[0].save(tmp_path / "a.png")
    ask = {"image": "a.png", "question": "What?", "answer": "3"}
    with pytest.raises(BadPrompt, match="another kind"):
        Folder(lines(tmp_path, ask, {**ask, "score": "anls"}))
    with pytest.raises(BadPrompt, match=r"questions\.jsonl"):
        Folder(tmp_path / "nowhere")
