"""The bench measures what it says, refuses what is wrong, and its merges are those of real photos."""

import copy
import io
import json
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu
import tiny
from benchmarks import tables as benchmark_tables
from benchmarks.tables import overview
from dymu.bench import probes, quality, results, shapes
from dymu.bench.chart import draw_chart
from dymu.bench.check import Reference
from dymu.bench.prompts import PROMPTS, ids
from dymu.bench.replay import Recorded, Replay, recorded
from dymu.bench.run import bench
from dymu.bench.summary import PARTS, Ratio, summarise
from dymu.bench.tables import left_out, page
from dymu.bench.variants import FLOOR, UNTOUCHED, Variant, quick, variants
from dymu.bench.workload import PHOTOS, Pretrained, Shape, spread
from dymu.cli import main
from dymu.errors import AlreadyApplied, BadBudget, UnsupportedModel
from dymu.evaluation.results import Results
from dymu.evaluation.summary import summarise as summarise_evaluation
from dymu.families.resolve import resolve
from dymu.handle import encoder_of
from dymu.measure import timing
from dymu.measure.costs import ATTENTION_FLOPS
from dymu.measure.provenance import short_hash
from dymu.measure.results import BadResults
from dymu.media.images import load
from dymu.reducers import ThresholdMerge
from dymu.thresholds import Calibrated, Thresholds
from dymu.unmerging import BACKENDS
from tiny_processors import processor_for

DEMO = Path(__file__).parents[1] / "models" / "demo"
QUICK = quick("sdpa").name
DYMU = "dymu (sdpa)"
MEASURED = {"encoder_ms", "prefill_ms", "decode_ms_per_token", "peak_bytes", "cache_bytes"}


@pytest.fixture(scope="module")
def workload():
    return Shape("tiny", torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tiled():
    return Shape("tiny-tiles", torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(timing, "DECODE_STEPS", 1)


def call(patch, *arguments, columns=200):
    """`dymu bench`, as a shell calls it."""
    patch.setattr(sys, "argv", ["dymu", "bench", *map(str, arguments)])
    patch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert not ended.value.code


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`dymu bench tiny` once, as a shell calls it: its last line of stdout, and the files."""
    folder = tmp_path_factory.mktemp("bench")
    files = {name: folder / name for name in ("bench-tiny.json", "tables.md", "chart.svg")}
    arguments = [
        "tiny", "-b", "89", "-b", "0.3", "--batch", "2", "--prompt", "image-text", "--backend", "sdpa",
        "--repeats", "2", "--answer", "5", "-o", files["bench-tiny.json"], "--tables", files["tables.md"],
        "--chart", files["chart.svg"], "--json",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "DECODE_STEPS", 1)
        printed = io.StringIO()
        patch.setattr(sys, "stdout", printed)
        call(patch, *arguments)
    return json.loads(printed.getvalue().splitlines()[-1]), files


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not here")
def test_replaying_gives_the_groups_that_the_real_encoder_gave():
    real = AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32).eval()
    real.config.vision_feature_layer = -1
    processor = AutoProcessor.from_pretrained(DEMO).image_processor
    processor.size = {"height": 336, "width": 336}
    random = shapes.build(shapes.config("tiny"), torch.device("cpu"), torch.float32)
    records, photo, budget = recorded(), 5, 89
    picture = load(PHOTOS / Path(records.photos[photo]).name).image
    with dymu.apply(real, merge=ThresholdMerge(records.thresholds[budget])) as handle:
        real.get_image_features(**processor(images=[picture], return_tensors="pt"))
        expected = handle.last.group(0)
    with dymu.apply(random, merge=records.rule(budget, [photo, 0])) as handle:
        random.get_image_features(pixel_values=torch.randn(2, 3, 336, 336))
        assert torch.equal(handle.last.group(0), expected)
        assert handle.last.kept == [records.kept(budget)[photo], records.kept(budget)[0]]


@pytest.mark.parametrize(("tokens", "photos", "budgets"), [(576, 32, {44, 89, 173, 195}), (729, 20, {102, 182, 335})])
def test_the_recorded_photos_keep_about_the_budget_each_its_own(tokens, photos, budgets):
    records = recorded(tokens)
    assert len(records.photos) == len(set(records.photos)) == photos
    assert budgets <= set(records.into)
    for budget in records.into:
        kept = records.kept(budget)
        assert np.mean(kept) == pytest.approx(budget, rel=0.05)
        assert np.std(kept) > 0.1 * budget


def test_recorded_merges_survive_their_file(tmp_path):
    into = tuple(
        tuple(np.array(layer, dtype=np.int16) for layer in photo) for photo in (([2, -1], [-1, 0]), ([-1, -1], [1, 1]))
    )
    before = Recorded(5, 2, ("a", "b"), {3: (0.5, 0.7)}, {3: into})
    before.save(tmp_path / "merges.safetensors")
    after = Recorded.load(tmp_path / "merges.safetensors")
    assert after.kept(3) == [3, 3]
    assert (after.tokens, after.layers, after.photos, after.thresholds) == (5, 2, ("a", "b"), {3: (0.5, 0.7)})
    for one, other in zip(after.into[3], before.into[3], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_layers_spread_by_depth_and_other_encoders_are_refused():
    rule = Replay(4, ((np.array([0, -1]), np.array([0, -1])),))
    assert [rule.recorded_layer(layer, 5) for layer in range(5)] == [None, None, 0, None, 1]
    assert [rule.recorded_layer(layer, 2) for layer in range(2)] == [0, 1]
    for tokens, layers in ((4, 1), (6, 5)):
        with pytest.raises(UnsupportedModel, match="4 tokens and 2 layers"):
            rule.check_fits(layers, tokens)


def test_a_chosen_few_stand_for_all():
    kept = [10, 90, 30, 50, 20, 40]
    assert spread(kept, 1) == [5]
    assert spread(kept, 2) == [4, 3]
    assert sorted(spread(kept, 6)) == list(range(6))
    assert sorted(spread(kept, 13)) == sorted([*range(6), *range(6), 5])


def test_budgets_near_a_recorded_one_are_that():
    assert [recorded().budget_near(asked) for asked in (89, 0.15, 0.3, 195)] == [89, 89, 173, 195]
    with pytest.raises(BadBudget, match="none of them near 120"):
        recorded().budget_near(120)
    records = recorded(729)
    assert [records.budget_near(asked, 5) for asked in (0.14, 510, 0.46)] == [102, 102, 335]
    with pytest.raises(BadBudget, match="recorded at 510, 910, 1675 of 3645 tokens, none of them near 102"):
        records.budget_near(102, 5)


def test_pictures_that_nothing_was_recorded_for_are_named():
    with pytest.raises(UnsupportedModel, match="no merges were recorded for pictures of 500 tokens"):
        recorded(500)


def test_an_image_of_several_pictures_is_counted_whole(tiled):
    newlines, records = 27, recorded(729)
    assert tiled.tokens == 3 * 729 + newlines
    assert tiled.budget(0.14) == tiled.budget(310) == 3 * 102
    kept, of_photos = tiled.kept(306), records.kept(102)
    assert len(kept) == len(of_photos) == 20
    assert kept[18] == newlines + of_photos[18] + of_photos[19] + of_photos[0]
    with dymu.apply(tiled.model, **tiled.merging(306, [18, 4])) as handle:
        tiled.model.get_image_features(**tiled.shown([18, 4]))
        assert handle.last.kept == [kept[18], kept[4]]
        assert handle.last.original == [tiled.tokens] * 2


def test_images_that_are_cropped_are_refused(monkeypatch):
    monkeypatch.setattr(shapes, "image", lambda _: shapes.Image(3, {"image_sizes": [300, 756]}))
    with pytest.raises(UnsupportedModel, match="tiny-tiles crops or shrinks its image"):
        Shape("tiny-tiles", torch.device("cpu"), torch.float32)


def test_tiles_are_measured_as_what_the_language_model_gets(tiled, tmp_path):
    run = bench(tiled, tmp_path / "b.json", budgets=[0.14], batches=[2], backends=["sdpa"], repeats=1)
    assert all(check.error < 1e-5 for check in run.checks.values())
    (cell,) = run.cells
    assert run.full_tokens == tiled.tokens
    assert (cell.budget, len(cell.kept)) == (306, 2)
    text = sum(part for part in PROMPTS["image-text"] if part != "image")
    per_token = cell.variants[UNTOUCHED.name].cache_bytes / (text + tiled.tokens)
    entries = {name: measured.cache_bytes / per_token for name, measured in cell.variants.items()}
    assert entries[DYMU] == text + max(cell.kept)
    turned = tiled.tokens - min(cell.kept)  # of the row with the most of them
    assert entries[QUICK] == entries[DYMU] + turned / 2
    assert entries[FLOOR.name] == text + round(np.mean(cell.kept))
    assert 0 < cell.variants[DYMU].merge_ms < cell.variants[DYMU].merge_of_ms
    # Two prompts of one image, which is three pictures for the encoder.
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        inner, picture = tiled.model.model, tiled.shown([0])["pixel_values"][0, :1]
        inner.multi_modal_projector(inner.vision_tower(picture).last_hidden_state[:, 1:])
    assert cell.flops["untouched"].encoder_flops == 2 * 3 * counter.get_total_flops()
    assert cell.flops["dymu"].encoder_flops < cell.flops["untouched"].encoder_flops


def test_backends_are_checked_on_tiles_too(tiled, monkeypatch):
    reference = Reference(tiled.model, tiled.shown([0, 0]))
    right = BACKENDS["sdpa"]

    def forgets_the_last_key_of_long_prompts(query, key, value, *rest):
        if query.shape[2] > 60:  # longer than the text
            value = torch.cat((value[:, :, :-1], 0 * value[:, :, -1:]), 2)
        return right(query, key, value, *rest)

    assert reference.check(Variant("", "sdpa")).right
    monkeypatch.setitem(BACKENDS, "wrong", forgets_the_last_key_of_long_prompts)
    assert not reference.check(Variant("", "wrong")).right


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_hold_their_parts(prompt):
    parts = PROMPTS[prompt]
    text = sum(part for part in parts if part != "image")
    with_images = ids(prompt, 3, 10, 7, 20, True, 0)
    assert with_images.shape == (3, text + 10 * parts.count("image"))
    assert (with_images == 7).sum(1).tolist() == [10 * parts.count("image")] * 3
    without = ids(prompt, 3, 10, 7, 20, False, 0)
    assert without.shape == with_images.shape
    assert 7 not in without
    assert without.max() == 19


def test_the_command_measures_every_variant(command):
    printed, files = command
    (told,) = printed["results"]
    assert told["file"] == str(files["bench-tiny.json"])
    held = json.loads(files["bench-tiny.json"].read_text())
    assert held["command"].startswith("dymu bench tiny -b 89")
    assert all(checked["error"] < 1e-5 for checked in held["checks"].values())
    assert [cell["budget"] for cell in held["cells"]] == [89, 173]
    text = sum(part for part in PROMPTS["image-text"] if part != "image")
    for cell in held["cells"]:
        assert list(cell["variants"]) == [UNTOUCHED.name, DYMU, QUICK, FLOOR.name]
        for measured in cell["variants"].values():
            assert set(measured) >= MEASURED
            assert np.array([np.min(measured[name]) for name in MEASURED]).min() > 0
            assert len(measured["prefill_ms"]) == 2
        stored = {name: measured["cache_bytes"] for name, measured in cell["variants"].items()}
        # The cache is as long as the longest prompt of the batch.
        merged, full = text + max(cell["kept"]), text + held["full_tokens"]
        assert stored[DYMU] * full == stored[UNTOUCHED.name] * merged
        turned = held["full_tokens"] - min(cell["kept"])  # of the row with the most of them
        assert stored[QUICK] * full * 2 == stored[UNTOUCHED.name] * (2 * merged + turned)
        assert cell["variants"][FLOOR.name]["peak_bytes"] < cell["variants"][UNTOUCHED.name]["peak_bytes"]
        assert 0 < cell["variants"][DYMU]["merge_ms"] < cell["variants"][DYMU]["merge_of_ms"]
        assert cell["flops"]["dymu"]["encoder_flops"] < cell["flops"]["untouched"]["encoder_flops"]
        assert cell["flops"]["dymu"]["prefill_flops"] < cell["flops"]["untouched"]["prefill_flops"]


def test_its_tables_and_chart_say_what_the_file_holds(command):
    _, files = command
    text, held = files["tables.md"].read_text(), results.load(files["bench-tiny.json"])
    assert text == page(held) + "\n"
    cells = summarise(held)
    assert [cell.budget for cell in cells] == [173, 89]
    line = next(line for line in cells[0].lines if line.variant.name == DYMU)
    runs = held.cells[1].variants
    assert line.ratios["prefill"].ratio == pytest.approx(
        np.median(runs[DYMU].prefill_ms) / np.median(runs[UNTOUCHED.name].prefill_ms)
    )
    whole = np.array(runs[DYMU].encoder_ms) + runs[DYMU].prefill_ms + 4 * np.array(runs[DYMU].decode_ms_per_token)
    assert line.median_ms["end_to_end"] == pytest.approx(np.median(whole))
    assert f"| {DYMU} | {line.ratios['encoder'].ratio:.2f} [" in text
    assert set(next(line for line in cells[0].lines if line.variant == FLOOR).ratios) == {"prefill", "decode"}
    assert overview(held).count("\n") == 1 + 2 * 4
    drawn = files["chart.svg"].read_text()
    assert drawn.count("<svg") == 1
    assert all(f">{name}<" in drawn or f"<!-- {name} -->" in drawn for name in PARTS.values())


def test_the_readme_table_is_made_of_result_files(command, monkeypatch):
    _, files = command
    monkeypatch.setattr(benchmark_tables, "RESULTS", files["bench-tiny.json"].parent)
    table, held = benchmark_tables.bench(), results.load(files["bench-tiny.json"])
    assert table.startswith(overview(held))
    assert "`dymu bench tiny -b 89" in table


def test_every_variant_goes_first_in_turn():
    seen = []
    timed = {name: lambda name=name: seen.append(name) or timing.Times(1, 1, 1) for name in "abc"}
    runs = timing.interleaved(timed, repeats=4, limit_s=60)
    assert "".join(seen) == "abcbcacababc"
    assert {name: len(rounds) for name, rounds in runs.items()} == {"a": 4, "b": 4, "c": 4}


def test_the_report_needs_no_model(command, monkeypatch, capsys):
    printed, files = command
    call(monkeypatch, "--report", files["bench-tiny.json"], "--json")
    assert json.loads(capsys.readouterr().out) == printed
    call(monkeypatch, "--report", files["bench-tiny.json"])
    shown = capsys.readouterr().out
    assert "image-text, 2 prompts" in shown
    assert "FLOPs, counted" in shown


def test_a_run_goes_on_where_it_stopped(command, workload, tmp_path, monkeypatch):
    _, files = command
    held = json.loads(files["bench-tiny.json"].read_text())
    file = tmp_path / "bench.json"
    late = {**held["cells"][0], "left_out": "out of memory"}  # is tried again
    file.write_text(json.dumps({**held, "cells": [late, *held["cells"][1:]]}))
    calls = []
    monkeypatch.setattr("dymu.bench.run._checks", lambda *_: {})

    def cell(_run, prompt, batch, budget):
        calls.append((prompt, batch, budget))
        return msgspec.convert({**held["cells"][0], "budget": budget}, results.Cell)

    monkeypatch.setattr("dymu.bench.run._Run.cell", cell)
    run = bench(workload, file, budgets=[89, 173], batches=[2], backends=["sdpa"], answer_tokens=5)
    assert calls == [("image-text", 2, 89)]
    assert len(run.cells) == len(json.loads(file.read_text())["cells"]) == 2
    bench(workload, file, budgets=[89, 173], batches=[2], backends=["sdpa"], answer_tokens=5)
    assert len(calls) == 1
    file.write_text(json.dumps(held))
    finished = bench(workload, file, budgets=[89, 173], batches=[2], backends=["sdpa"], answer_tokens=5)
    assert finished.checks == results.load(file).checks != {}
    lacking = {**held["cells"][0], "variants": {}}
    file.write_text(json.dumps({**held, "cells": [lacking]}))
    with pytest.raises(BadResults, match=r"cell 1 of .* is damaged"):
        results.load(file)
    file.write_text(json.dumps(held))
    with pytest.raises(BadResults, match="differs in seed: name another file"):
        bench(workload, file, budgets=[89], batches=[2], backends=["sdpa"], answer_tokens=5, seed=1)


def test_a_command_with_a_name_that_is_no_utf8_is_recorded_as_escapes(command, workload, tmp_path, monkeypatch):
    _, files = command
    held = json.loads(files["bench-tiny.json"].read_text())
    monkeypatch.setattr("dymu.bench.run._checks", lambda *_: {})
    cell = msgspec.convert(held["cells"][0], results.Cell)
    monkeypatch.setattr("dymu.bench.run._Run.cell", lambda *_: cell)
    model = workload.describe()
    model.name = "m\udcff"
    monkeypatch.setattr(workload, "describe", lambda: model)
    file = tmp_path / "bench.json"
    for budget in (89, 173):  # and it goes on
        bench(
            workload, file, budgets=[budget], batches=[2], backends=["sdpa"], command="dymu bench --images a\udcff.png"
        )
    assert results.load(file).command == r"dymu bench --images a\udcff.png"
    assert results.load(file).model.name == r"m\udcff"


def test_a_wrong_backend_is_not_timed_and_the_others_are(workload, tmp_path, monkeypatch):
    right = BACKENDS["sdpa"]
    monkeypatch.setitem(BACKENDS, "wrong", lambda *args: 1.01 * right(*args))
    run = bench(workload, tmp_path / "b.json", budgets=[89], backends=["wrong", "sdpa"], repeats=1)
    assert 0.01 < run.checks["dymu (wrong)"].error < 0.013  # a hundredth in each of two layers
    (cell,) = summarise(run)
    timed = [line.variant.name for line in cell.lines if line.rounds]
    assert timed == [UNTOUCHED.name, DYMU, QUICK, FLOOR.name]
    said, quick_said = left_out(cell)
    assert quick_said.startswith("dymu (wrong), representative, fast cache: not timed")
    off = f"{run.checks['dymu (wrong)'].error:.1e}"
    assert said.startswith(f"dymu (wrong): not timed, since it is off from the reference by {off} (allowed: 1e-04)")
    assert said in page(run)


def test_a_backend_that_cannot_run_is_told_of(workload, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such device")

    monkeypatch.setitem(BACKENDS, "broken", broken)
    reference = Reference(workload.model, workload.shown([0, 0]))
    checked = reference.check(Variant("dymu (broken)", "broken"))
    assert not checked.right
    assert checked.why == "no such device"


@pytest.mark.parametrize("decoder", ["llama", "qwen2", "mistral"])
def test_half_precision_is_as_near_as_is_allowed(decoder):
    model = tiny.llava(decoder=decoder).bfloat16()
    checked = Reference(model, tiny.shown(model, tiny.pictures(2))).check(Variant("", "sdpa"))
    assert 1e-4 < checked.error < checked.allowed


def test_what_does_not_fit_is_told_of_and_the_rest_goes_on(workload, tmp_path, monkeypatch):
    real = probes.memory

    def too_large(model, inputs):
        if inputs["input_ids"].shape[1] > 600 and not dymu.handle_of(model):
            raise torch.OutOfMemoryError("too large")
        return real(model, inputs)

    monkeypatch.setattr(probes, "memory", too_large)
    monkeypatch.setattr("dymu.bench.run._checks", lambda *_: {})
    run = bench(workload, tmp_path / "b.json", budgets=[89], backends=["sdpa"], repeats=1)
    (cell,) = summarise(run)
    assert left_out(cell) == ["untouched: out of memory"]
    line = next(line for line in cell.lines if line.variant.name == DYMU)
    assert line.median_ms["prefill"] > 0
    assert not line.ratios
    assert "untouched: out of memory" in page(run)


def test_a_cell_that_takes_too_long_says_so(workload, tmp_path, monkeypatch):
    monkeypatch.setattr("dymu.bench.run._checks", lambda *_: {})
    run = bench(workload, tmp_path / "b.json", budgets=[89], backends=["sdpa"], limit_s=0)
    (cell,) = summarise(run)
    assert left_out(cell) == ["not timed: one round takes longer than the limit of 0 s"]
    assert "not timed" in overview(run)
    assert "not timed" in page(run)
    with pytest.raises(dymu.DymuError, match="nothing to draw"):
        draw_chart([cell], tmp_path / "chart.png")


def test_slower_is_said_beyond_noise_only():
    assert Ratio(1.2, 1.1, 1.3).slower
    assert not Ratio(1.2, 0.9, 1.3).slower
    assert not Ratio(0.9, 0.8, 1.0).slower


def measured_line(rounds: int, untouched_ms: float, floor_ms: float, ms: float):
    """Of DyMU, in a cell of which every round takes the same."""
    held = results.load(DEMO.parents[1] / "benchmarks" / "results" / "bench-demo.json")
    held.cells = held.cells[:1]
    (cell,) = held.cells
    for name, measured in cell.variants.items():
        took = {"untouched": untouched_ms, FLOOR.name: floor_ms}.get(name, ms)
        for part in ("encoder_ms", "prefill_ms", "decode_ms_per_token"):
            setattr(measured, part, [] if name == FLOOR.name and part == "encoder_ms" else [took] * rounds)
    return next(line for line in summarise(held)[0].lines if line.variant.backend), held


def test_few_rounds_give_no_verdict():
    for rounds, verdict in ((1, False), (2, False), (3, True)):
        line, held = measured_line(rounds, 10, 5, 20)
        assert bool(line.slower_in) is verdict
        assert ("**2.00**" in overview(held)) is verdict


def test_what_a_floor_hardly_saves_is_not_said_to_be_realised():
    assert "decode" not in measured_line(3, 100, 92, 95)[0].realised
    assert measured_line(3, 100, 88, 94)[0].realised["decode"] == pytest.approx(0.5)


def test_a_report_breaks_names_at_spaces(monkeypatch, capsys):
    call(monkeypatch, "--report", DEMO.parents[1] / "benchmarks" / "results" / "bench-demo.json", columns=80)
    lines = capsys.readouterr().out.splitlines()
    broken = [line for line in lines if line.startswith("representative,")]
    assert broken
    assert max(map(len, broken)) <= 80


def test_peak_memory_counts_what_is_held_at_once():
    def hold(*_, **__):
        for _ in range(3):
            tensor = torch.zeros(1000, 1000)
            del tensor
        return torch.zeros(1000)

    with probes._peak(torch.device("cpu")) as peak:
        hold()
    assert 4_000_000 <= peak() <= 4_100_000


@pytest.mark.parametrize(("tower", "family"), [("clip", "llava"), ("dinov2", "llava"), ("clip", "llava_next")])
def test_a_model_with_weights_of_its_own(tmp_path, tower, family, monkeypatch):
    monkeypatch.setattr("dymu.bench.run._checks", lambda *_: {})
    monkeypatch.setattr("dymu.bench.workload.SQUARE_PX", 2 * tiny.SIDE)
    model, processor = tiny.llava(tower, family=family), tiny.full_processor(family)
    thresholds = dymu.calibrate(model, processor, tiny.photos(6), [0.3, 1.0], progress=False)
    run = bench(
        Pretrained(model, processor, thresholds), tmp_path / "b.json", budgets=[0.5], backends=["sdpa"], repeats=1
    )
    (cell,) = run.cells
    assert len(cell.kept) == 1
    assert cell.kept[0] < run.full_tokens
    assert run.full_tokens == (tiny.PATCHES if family == "llava" else 5 * tiny.PATCHES + 14)
    stored = {name: each.cache_bytes for name, each in cell.variants.items()}
    assert stored[DYMU] == stored[FLOOR.name] < stored[UNTOUCHED.name]
    assert 0 < cell.variants[DYMU].merge_ms < cell.variants[DYMU].merge_of_ms
    with dymu.apply(model, thresholds, budget=0.5), pytest.raises(AlreadyApplied):
        bench(Pretrained(model, processor, thresholds), tmp_path / "c.json", budgets=[0.5])


def test_thresholds_are_told_apart_by_all_that_merges():
    model, processor = tiny.llava(), tiny.full_processor("llava")
    entry = Calibrated(49, (0.5,) * (tiny.LAYERS - 1))
    same, images, frames = (
        msgspec.structs.replace(entry, **more) for more in ({}, {"images": (0.9,)}, {"frames": (0.9,)})
    )
    described = [
        Pretrained(model, processor, Thresholds((each,))).describe().merges for each in (entry, same, images, frames)
    ]
    assert described[0] == described[1]
    assert len(set(described)) == 3
    assert described[0].endswith(short_hash([[entry.budget, entry.thresholds]])), "as in the files of earlier versions"


@pytest.mark.parametrize(
    ("asked", "says"),
    [({"prompts": ["image"]}, "unknown prompt image"), ({"backends": ["reference"]}, "cannot time the backend")],
)
def test_wrong_names_are_refused(workload, tmp_path, asked, says):
    with pytest.raises(ValueError, match=says):
        bench(workload, tmp_path / "b.json", budgets=[89], **asked)


@pytest.mark.parametrize("text", ["{", "[]", '{"dymu_bench": 1}', '{"dymu_bench": 2}'])
def test_other_files_are_no_results(tmp_path, text):
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(BadResults, match="no result file"):
        results.load(tmp_path / "b.json")


def test_variants_are_each_once():
    names = [variant.name for variant in variants(["auto", "sdpa", "auto"])]
    assert names == [UNTOUCHED.name, "dymu (auto)", quick("auto").name, DYMU, QUICK, FLOOR.name]


@pytest.mark.parametrize("name", shapes.names())
def test_shapes_are_models_that_dymu_knows(name):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shapes.config(name))
    parts = resolve(model)
    vision, depth = model.config.vision_config, max(parts.feature_layers())
    if shapes.image(name).units is None:
        records = recorded((vision.image_size // vision.patch_size) ** 2)
        records.rule(min(records.into), [0]).check_fits(depth, records.tokens)
    assert parts.prefix == parts.dropped()
    file = json.loads((shapes.FOLDER / f"{name}.json").read_text())
    layers = {"encoder": len(parts.encoder_modules), "decoder": len(parts.decoder_layers)}
    assert all(layers[part] <= count for part, count in file.get("published", layers).items())


REGROUPING = {
    "smolvlm-256m": ({"patch_size": 21}, {"units": 36}),
    "internvl3-1b": ({"patch_size": [28, 28]}, {"units": 64}),
    "qwen2.5-vl-3b": ({}, {"units": 64, "pixels": [256, 1176], "arguments": {"image_grid_thw": [1, 16, 16]}}),
    "qwen3-vl-2b": ({}, {"units": 64, "pixels": [256, 1536], "arguments": {"image_grid_thw": [1, 16, 16]}}),
    "gemma3-4b": ({"patch_size": 28}, {"units": 64}),
}
"""Shapes whose models make one token of several patches, and with what they are shown fewer."""


def narrow(name):
    """The file of a shape with the same angles, ways and depth of the encoder, and next to nothing else."""
    file = copy.deepcopy(shapes._read(name))
    patches, picture = REGROUPING[name]
    vision, text = file.config["vision_config"], file.config["text_config"]
    size = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    text |= {"hidden_size": 2 * size, "intermediate_size": 64, "head_dim": size, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    if "layer_types" in text:
        text["layer_types"] = list(dict.fromkeys(text["layer_types"]))
    small = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_attention_heads": 2}
    vision |= {setting: value for setting, value in small.items() if setting in vision} | patches
    if "out_hidden_size" in vision:
        vision["out_hidden_size"] = 2 * size
    if "mm_tokens_per_image" in file.config:
        file.config["mm_tokens_per_image"] = picture["units"]
    file.image = msgspec.structs.replace(file.image, **picture)
    return file


@pytest.fixture(scope="module", params=REGROUPING)
def regrouping(request):
    file = narrow(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "_read", lambda _: file)
        return Shape(request.param, torch.device("cpu"), torch.float32)


def test_a_picture_of_units_keeps_as_many_as_a_photo(regrouping):
    records = recorded()
    for asked, near in ((0.15, 89), (0.3, 173)):
        budget = regrouping.budget(asked)
        part = budget / regrouping.tokens
        assert part == pytest.approx(near / records.tokens, abs=0.5 / regrouping.tokens)
        assert regrouping.budget(budget) == budget
        kept = regrouping.kept(budget)
        assert np.mean(kept) == pytest.approx(budget, rel=0.1)
        assert len(set(kept)) > 3
    with dymu.apply(regrouping.model, **regrouping.merging(budget, [18, 4])) as handle:
        regrouping.model.get_image_features(**regrouping.shown([18, 4]))
        assert handle.last.kept == [kept[18], kept[4]]
        assert handle.last.original == [regrouping.tokens] * 2
    with pytest.raises(BadBudget, match="merges were recorded at"):
        regrouping.budget(0.9)


def test_a_shape_of_units_is_measured(regrouping, tmp_path):
    held = bench(regrouping, tmp_path / "b.json", budgets=[0.3], batches=[2], backends=["sdpa"], repeats=1)
    (cell,) = held.cells
    assert held.checks[DYMU].error < 1e-5
    assert held.checks[QUICK].error < 1e-5
    timed = [name for name, measured in cell.variants.items() if measured.prefill_ms]
    assert timed == [UNTOUCHED.name, DYMU, QUICK, FLOOR.name]
    text = sum(part for part in PROMPTS["image-text"] if part != "image")
    stored = {name: cell.variants[name].cache_bytes for name in (DYMU, UNTOUCHED.name)}
    assert stored[DYMU] * (text + held.full_tokens) == stored[UNTOUCHED.name] * (text + max(cell.kept))
    assert cell.flops["dymu"].encoder_flops < cell.flops["untouched"].encoder_flops
    assert 0 < cell.variants[DYMU].merge_ms < cell.variants[DYMU].merge_of_ms
    said = page(held)
    assert "decoder 2 of " in said
    assert "merges: as many as recorded from real photos, the most similar by these weights" in said
    (row,) = [line for line in overview(held).splitlines() if f"| {DYMU} |" in line]
    assert f"{np.mean(cell.kept):.0f} of {regrouping.tokens}" in row


def test_other_counts_than_the_workload_says_are_no_measurement(tmp_path, monkeypatch):
    workload = Shape("tiny", torch.device("cpu"), torch.float32)
    monkeypatch.setattr("dymu.bench.run._checks", lambda *_: {})
    right = workload.kept(89)
    monkeypatch.setattr(workload, "kept", lambda _: [count + 1 for count in right])
    with pytest.raises(ValueError, match="tokens should be left of the images"):
        bench(workload, tmp_path / "b.json", budgets=[89], backends=["sdpa"], repeats=1)


def test_budgets_of_units_are_checked_without_torch():
    for name in REGROUPING:
        shapes.check_budget(name, 0.15)
        with pytest.raises(BadBudget, match="merges were recorded at"):
            shapes.check_budget(name, 0.9)


@pytest.mark.parametrize("family", ["internvl", "smolvlm", "qwen2_5_vl", "mistral3"])
def test_a_model_of_units_with_weights_of_its_own(tmp_path, family, monkeypatch):
    monkeypatch.setattr("dymu.bench.run._checks", lambda *_: {})
    monkeypatch.setattr("dymu.bench.workload.SQUARE_PX", 56)
    model = tiny.build(family)
    processor = processor_for(family)
    thresholds = Thresholds(
        (Calibrated(9, (0.5,) * tiny.LAYERS), Calibrated(36, (2.0,) * tiny.LAYERS)),
        encoder=encoder_of(resolve(model)),
        image_tokens=36 if resolve(model).cuts_images else None,
    )
    held = bench(
        Pretrained(model, processor, thresholds), tmp_path / "b.json", budgets=[9], batches=[2], backends=["sdpa"],
        repeats=1,
    )  # fmt: skip
    (cell,) = held.cells
    assert len(cell.kept) == 2
    assert max(cell.kept) < held.full_tokens
    assert cell.variants[DYMU].cache_bytes < cell.variants[UNTOUCHED.name].cache_bytes


def test_an_evaluation_of_the_same_model_stands_beside(monkeypatch, capsys):
    def shown(bench: str, *options: str) -> str:
        call(monkeypatch, "--report", measured / bench, "--with", file, *options)
        return capsys.readouterr().out

    file = DEMO.parents[1] / "training" / "results" / "heldout.jsonl"
    rows = summarise_evaluation(Results.load(file))
    merged = [row for row in rows if row.row.unmerge == "exact"]
    assert quality.beside(quick("auto"), merged[0].row.budget, rows) is None, "nothing was evaluated so"
    for row in merged:
        assert quality.beside(variants(["auto"])[1], 1.04 * row.row.budget, rows) is row
        assert quality.beside(variants(["auto"])[1], 0.9 * row.row.budget, rows) is None
        loss, divergence = -row.difference["all"].mean, row.divergence["all"].mean
        (best,) = [best for best in quality.recommended(rows, loss, divergence) if best.row.unmerge == "exact"]
        assert best.tokens_mean <= row.tokens_mean
        assert best.difference["all"].mean >= -loss
        fewer = [one for one in merged if one.tokens_mean < best.tokens_mean]
        assert all(one.difference["all"].mean < -loss or one.divergence["all"].mean > divergence for one in fewer)
    assert quality.recommended(rows, 0, 0) == []
    measured = DEMO.parents[1] / "benchmarks" / "results"
    said = " ".join(shown("bench-demo.json").split())
    for words in ("realised encoder", "points of right answers, KL", "Recommended, the fewest tokens within 2 points"):
        assert words in said
    told = json.loads(shown("bench-demo.json", "--json", "--loss", "100", "--divergence", "9"))["recommended"]
    assert min(row["tokens_mean"] for row in told) == min(row.tokens_mean for row in rows if row.row.budget)
    with pytest.raises(AssertionError):
        shown("bench-llava-1.5-shape-0.5b.json")
    assert "give that of the same model" in capsys.readouterr().err
    with pytest.raises(AssertionError):
        call(monkeypatch, "--report", measured / "bench-demo.json", "--loss", "1")
    assert "give --with too" in capsys.readouterr().err
