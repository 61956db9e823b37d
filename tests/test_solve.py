"""Numbers that are solved for methods which leave what a picture needs."""

from __future__ import annotations

import math

import pytest

import tiny
from dymu.errors import BadBudget
from dymu.evaluation.methods import Row, applying, is_solved, options_of, rows_for
from dymu.evaluation.results import Results
from dymu.evaluation.run import evaluate
from dymu.evaluation.solve import nearest, solved
from dymu.evaluation.tables import series
from dymu.pruning import FastV
from dymu.reducers import DensityPeaks, PixelPrune, PruMerge
from test_evaluate import Words

ADAPTIVE = ["pru-merge", "pixel-prune", "density-threshold"]


def mean_of(results: Results, row: Row) -> float:
    kept = [count for answers in results.answers[row.key].values() for count in answers.kept]
    return sum(kept) / len(kept)


@pytest.mark.parametrize("budget", [1.5, 20.0, 63.0, 99.9])
@pytest.mark.parametrize("start", [-40.0, 0.5, 70.0])
def test_a_number_is_found_wherever_the_search_begins(budget: float, start: float) -> None:
    known: dict[float, float] = {}
    value = nearest(lambda at: 1 + 99 / (1 + math.exp(at - 3)), budget, start, -math.inf, known)
    assert known[value] == pytest.approx(budget, rel=0.005)
    assert len(known) < 30
    assert value == float(f"{value:.5g}")


@pytest.mark.parametrize(("budget", "expected"), [(9.0, 10.0), (1.0, 2.0), (30.0, 20.0)])
def test_what_cannot_be_reached_is_answered_by_the_nearest(budget: float, expected: float) -> None:
    known: dict[float, float] = {}
    value = nearest(lambda at: 20.0 if at < 1 else 10.0 if at < 3 else 2.0, budget, 0.0, 0.0, known)
    assert known[value] == expected
    assert min(known) >= 0


@pytest.mark.parametrize("tiles", [False, True])
def test_images_keep_the_budget_on_average(tmp_path, tiles):
    model, processor = tiny.llava("clip", "llama"), tiny.llava_processor()
    methods = ADAPTIVE
    if tiles:
        model, processor = tiny.llava("siglip", "qwen2", "llava_onevision"), tiny.full_processor("llava_onevision")
        methods = ["pru-merge", "density-threshold"]
    said: list[str] = []
    tasks, rows = [Words(9, broken=(2,))], rows_for([16, 9], methods, ["exact", "none"])
    found = solved(rows, model, processor, tasks, batch_size=4, say=said.append, progress=False)
    assert [row.budget for row in found] == [row.budget for row in rows]
    assert all(map(is_solved, found))
    assert len(said) == 2 * len(methods), "forms of unmerging share a number"
    results = evaluate(model, processor, tasks, found, tmp_path / "r.jsonl", batch_size=3, timed=0, progress=False)
    for row in found[1:]:
        sentence = next(text for text in said if row.solved in text)
        exactly = mean_of(results, row)
        if not tiles:  # whose learned tokens a budget does not count
            assert f"{exactly:.1f} tokens" in sentence
            assert abs(exactly - row.budget) < 0.5 or "no number of it reaches" in sentence
        assert "=" not in series(row), "a curve has one name"
    again = solved(rows, None, None, tasks, before=found, say=said.append)
    assert again == found, "a file that is continued says them"


def test_other_arguments_stay(tmp_path):
    model, processor = tiny.llava("clip", "llama"), tiny.llava_processor()
    rows = rows_for([20], ["pru-merge:plus=True", "pru-merge:outliers=2", "stride"])
    found = solved(rows, model, processor, [Words(4)], say=lambda text: None, progress=False)
    assert found[1].options == "plus=True"
    assert found[1].solved.startswith("outliers=")
    assert found[2:] == rows[2:]
    assert [series(row) for row in found[1:3]] == ["PruMerge plus=True + VTU", "PruMerge outliers=2 + VTU"]


@pytest.mark.parametrize("methods", [["pru-merge", "pru-merge:outliers=1.5"], ["pru-merge:outliers=1.5", "pru-merge"]])
def test_a_named_number_is_not_one_that_is_solved(methods):
    """In one file, which goes on, and from the file of the one to that of the other."""
    model, processor = tiny.llava("clip", "llama"), tiny.llava_processor()
    rows = rows_for([20, 9], methods)
    assert [row.budget for row in rows if row.options] == [20], "a row that budgets do not change is made once"
    found = solved(rows, model, processor, [Words(4)], say=lambda text: None, progress=False)
    assert [bool(row.solved) for row in found[1:]] == [not row.options for row in rows[1:]]
    assert solved(rows, None, None, [], before=found) == found
    named = [row for row in found if row.options]
    said: list[str] = []
    fresh = solved(rows_for([20], ["pru-merge"]), model, processor, [Words(4)], before=named, say=said.append)
    assert len(said) == 1
    assert fresh[1] in found


def test_a_row_without_its_number_is_refused(tmp_path):
    model, processor = tiny.llava("clip", "llama"), tiny.llava_processor()
    with pytest.raises(ValueError, match=r"by outliers: name that number \(pru-merge:outliers=…\)"):
        evaluate(model, processor, [Words(4)], [Row("pru-merge", 16, "exact")], tmp_path / "r.jsonl", timed=0)
    with pytest.raises(ValueError, match="have it solved for a budget"):
        applying("pixel-prune", 16, "exact", 4)
    assert applying("pixel-prune:tolerance=.5", 16, "exact", 4)["merge"] == PixelPrune(0.5)
    assert applying("density-threshold:threshold=-1", 16, "exact", 4)["merge"] == DensityPeaks(-1, 1)
    for kind, name in ((PruMerge, "outliers"), (PixelPrune, "tolerance"), (DensityPeaks, "threshold")):
        for wrong in (math.nan, math.inf, "much", True):
            with pytest.raises(ValueError, match=f"takes a number.*{name}"):
                kind(**{name: wrong})
    with pytest.raises(ValueError, match="from 0 on for tolerance, not -1"):
        PixelPrune(-1)


PRUNES = ["fast-v:layer=1", "pyramid-drop", "v-scan-drop", "reroute", "sparse-vlm:layers=(0,1,2)",
          "dart-layers:layer=1", "layer-skip:pattern=all", "skip-ffn"]  # fmt: skip


def test_pruning_is_compared_at_a_mean_over_layers(tmp_path) -> None:
    """The language model has 4 layers; what is recorded is what they ran on average."""
    model, processor = tiny.llava(text={"num_hidden_layers": 4}), tiny.llava_processor()
    rows = rows_for([37], PRUNES, ["none", "original", "exact"])
    assert {row.method for row in rows[1:]} == {name.partition(":")[0] for name in PRUNES}
    results = evaluate(
        model, processor, [Words(4)], rows, tmp_path / "results.jsonl", batch_size=4, timed=0, progress=False
    )
    for row in rows[1:]:
        assert mean_of(results, row) == pytest.approx(37, abs=1), row.key


def test_fractions_are_asked_for_within_the_language_model() -> None:
    assert applying("fast-v", 0.5, "exact", 32)["prune"].fill == "nearest"
    assert applying("fast-v:layer=3", 0.5, "original", 32)["prune"] == FastV((0.5 * 32 - 3) / 29, 3).scaled(1)
    assert options_of("layers=(1,2),seed=3") == {"layers": (1, 2), "seed": 3}
    for wrong, keep in (("fast-v", 64), ("fast-v", 0.01), ("fast-v:keep=0.3", 0.5), ("fast-v:depth=3", 0.5)):
        with pytest.raises((ValueError, BadBudget)):
            applying(wrong, keep, "exact", 32)
