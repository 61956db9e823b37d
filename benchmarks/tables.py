"""Make the tables of the README, the docs and the model card from result files.

`python -m benchmarks.tables` rewrites what stands between `<!-- table NAME -->` and `<!-- end -->`; `--check` only says
whether something would change. A name is that of a function here or in `experiments.tables`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer

from benchmarks import peers
from benchmarks.record import RESULTS, ROOT, made_by, read
from dymu.bench import tables as bench_tables
from dymu.bench.results import Bench
from dymu.bench.results import load as load_bench
from dymu.bench.summary import PARTS, CellSummary, Line
from dymu.bench.summary import summarise as summarise_bench
from dymu.choices import UNMERGE
from dymu.evaluation.methods import UNTOUCHED, Row
from dymu.evaluation.results import Results
from dymu.evaluation.summary import ALL, RowSummary, Share, parts_by, share, summarise
from dymu.evaluation.tables import (
    LIKENESS,
    cost_table,
    difference,
    likeness,
    points,
    provenance,
    series,
)
from dymu.families import listing
from dymu.measure.markdown import markdown
from experiments import tables as studies

PAGES = tuple(
    ROOT / page
    for page in (
        "README.md",
        "models/demo/README.md",
        "models/vlm/README.md",
        *(
            f"docs/{page}.md"
            for page in (
                "how-it-works",
                "evidence",
                "speed",
                "encoder",
                "memory",
                "families",
                "serving",
                "triton",
                "forecast",
                "counts",
                "comparison",
                "methods",
            )
        ),
        *(f"experiments/{page}.md" for page in ("saliency", "legibility")),
    )
)
BENCH_SHORT = "bench-llava-1.5-shape-0.5b.json"
BENCH_OF_TILES = "bench-llava-onevision-0.5b.json"
BENCH_ON_GPU = "bench-llava-1.5-7b-gpu.json"
BENCH_OF_FAMILIES = (
    "bench-smolvlm-256m.json", "bench-internvl3-1b.json", "bench-qwen3-vl-2b.json", "bench-qwen2.5-vl-3b.json",
    "bench-gemma3-4b.json",
)  # fmt: skip
EVALUATION = ROOT / "training" / "results" / "heldout.jsonl"
VLM = EVALUATION.with_name("vlm-quick.jsonl")
METHODS, COSTS = (EVALUATION.with_name(f"{name}.jsonl") for name in ("methods", "costs"))
DEFAULT = ("dtome", "reverse_linear")
"""The method and the schedule on which forms of unmerging are compared."""


def kept_tokens() -> str:
    """Wanted and kept tokens on images that were not calibrated on."""
    result = read(RESULTS / "kept_tokens.json")
    full = result["full_tokens"]
    rows = [
        [f"{row['budget']:g} ({row['budget'] / full:.0%})", f"{row['mean']:.1f}", f"{row['sd']:.1f}", str(row["min"]),
         str(row["max"])]
        for row in reversed(result["rows"])
    ]  # fmt: skip
    header = ["budget", f"kept, mean of {result['images']} unseen images", "sd", "least", "most"]
    return markdown(header, rows) + made_by(result)


def bench() -> str:
    """Times and bytes as parts of the untouched model's, of every `bench-….json` that no other table is of."""
    elsewhere = (BENCH_OF_TILES, BENCH_ON_GPU, *BENCH_OF_FAMILIES)
    return "\n\n".join(_bench(path) for path in sorted(RESULTS.glob("bench-*.json")) if path.name not in elsewhere)


def bench_tiles() -> str:
    """The same of a model that cuts images into tiles."""
    return _bench(RESULTS / BENCH_OF_TILES)


def bench_gpu() -> str:
    """The same of a large model on a GPU."""
    return _bench(RESULTS / BENCH_ON_GPU)


def bench_families() -> str:
    """What DyMU costs in models of other families, a line for each budget and batch."""
    measured = [load_bench(RESULTS / name) for name in BENCH_OF_FAMILIES if (RESULTS / name).exists()]
    rows = [
        [results.model.name, results.model.weights.removeprefix("random").strip(", ") or "all layers",
         _tokens(cell, results), str(cell.batch), *_ratios(line),
         f"{line.cache_bytes / cell.lines[0].cache_bytes:.2f}"]
        for results in measured
        for cell in summarise_bench(results)
        for line in cell.lines
        if line.variant.backend and line.variant.cache == "merged" and line.ratios
    ]  # fmt: skip
    header = ["shape", "of it", "image tokens", "batch", *PARTS.values(), "KV cache"]
    made = "\n".join(f"<sub>{bench_tables.provenance(results)}</sub>\n" for results in measured)
    return f"{markdown(header, rows)}\n\n{made}".rstrip()


def families() -> str:
    """What each family may hold and takes."""
    lines = [[_code(line[0]), *line[1:-2], *map(_codes, line[-2:])] for line in listing.listed()]
    return markdown(listing.HEADER, lines)


def family_limits() -> str:
    """What is not supported, or may surprise, and where."""
    return "\n".join(f"* {', '.join(map(_code, names))}: {phrase}." for phrase, names in listing.limits().items())


def plain_decoders() -> str:
    """The language models that `families` calls plain."""
    return f"Plain language models are {_codes(listing.plain_decoders())}."


def _codes(names: str) -> str:
    """Names as code, but for words in between."""
    words = names.removeprefix("any plain one")
    begin, words = names[: len(names) - len(words)], words.removeprefix(" but ")
    but = " but " if begin and words else ""
    return begin + but + ", ".join(_code(name) for name in words.split(", ") if name)


def _code(name: str) -> str:
    return f"`{name}`"


def bench_short() -> str:
    """What one prompt costs at each budget, of one shape alone."""
    results = load_bench(RESULTS / BENCH_SHORT)
    rows = [
        [_tokens(cell, results), line.variant.name, *_ratios(line), f"{line.cache_bytes / full.cache_bytes:.2f}"]
        for cell in summarise_bench(results)
        if cell.batch == 1
        for full in cell.lines[:1]
        for line in cell.lines
        if line.ratios
    ]
    header = ["image tokens", "", *PARTS.values(), "KV cache"]
    measured_on = f"{results.device}, {results.dtype}, torch {results.versions['torch']}, {results.date[:10]}"
    return f"{markdown(header, rows)}\n\n<sub>`dymu bench {results.model.name}` on {measured_on}</sub>"


def _bench(path: Path) -> str:
    results = load_bench(path)
    return f"{overview(results)}\n\n<sub>{bench_tables.provenance(results)}</sub>"


def overview(results: Bench) -> str:
    """One Markdown table over all cells: times and bytes as parts of the untouched model's; slower ones in bold."""
    header = ["image tokens", "batch", "prompt", "", *PARTS.values(), "peak memory", "KV cache"]
    rows = []
    for cell in summarise_bench(results):
        measured = [_tokens(cell, results), str(cell.batch), cell.prompt]
        for line in cell.lines:
            if line.ratios:
                full = cell.lines[0]
                sizes = [line.peak_bytes / full.peak_bytes, line.cache_bytes / full.cache_bytes]
                rows.append([*measured, line.variant.name, *_ratios(line), *(f"{size:.2f}" for size in sizes)])
        if cell.lines:
            counted = [f"{cell.flop_ratios[part]:.2f}" if part in cell.flop_ratios else "" for part in PARTS]
            rows.append([*measured, "FLOPs, counted", *counted, "", ""])
        rows += [[*measured, remark, *[""] * (len(PARTS) + 2)] for remark in bench_tables.left_out(cell)]
    return markdown(header, rows)


def _tokens(cell: CellSummary, results: Bench) -> str:
    return f"{cell.tokens:.0f} of {results.full_tokens}"


def _ratios(line: Line) -> list[str]:
    ratios = {part: f"{ratio.ratio:.2f}" for part, ratio in line.ratios.items()}
    ratios |= {part: f"**{ratios[part]}**" for part in ratios if PARTS[part] in line.slower_in}
    return [ratios.get(part, "") for part in PARTS]


def tiles() -> str:
    """A vision encoder's milliseconds per picture, and what token counts alone would give."""
    result = read(RESULTS / "tiles.json")
    rows = [
        [str(row["pictures"]), f"{row['budget'] / result['full_tokens']:.0%}", f"{row['kept']:.0f}",
         f"{row['untouched_ms']:,.0f}", f"{row['dymu_ms']:,.0f}", f"{row['merge_ms']:.0f}",
         f"**{row['ratio']:.2f}** ({row['ratio_least']:.2f} to {row['ratio_most']:.2f})", f"{row['count_ratio']:.2f}"]
        for row in result["rows"]
    ]  # fmt: skip
    header = ["pictures", "budget", f"kept of {result['full_tokens']}", "untouched, ms per picture", "DyMU",
              "of it matching and merging", "untouched / DyMU", "count ratio"]  # fmt: skip
    return markdown(header, rows) + made_by(result)


def _layer(phase: str, columns: dict[str, str]) -> str:
    """Milliseconds of a decoder layer's parts, a line for each length of prompt."""
    result = read(RESULTS / "roofline.json")
    rows = []
    for tokens, kept in dict.fromkeys((row["image_tokens"], row["kept"]) for row in result["rows"]):
        of_part = {
            row["part"]: row
            for row in result["rows"]
            if (row["image_tokens"], row["kept"], row["phase"]) == (tokens, kept, phase)
        }
        times = [of_part[part]["ms"] if part in of_part else None for part in columns]
        cells = ["" if ms is None else f"{ms:,.2f}" if ms < 10 else f"{ms:,.0f}" for ms in times]
        merged = of_part["linear, merged"]["ms"]
        floor = merged + of_part["attention, untouched on M tokens"]["ms"]
        ours = [part for part in columns if "DyMU" in part and part in of_part]
        ratios = [f"{(merged + of_part[part]['ms']) / floor:.2f}" for part in ours]
        rows.append([f"{tokens:,}", f"{kept:,}", *cells, " · ".join(ratios)])
    header = ["image tokens", "kept", *columns.values(), "the layer, over the floor"]
    return markdown(header, rows) + made_by(result)


def _gpu_attention(part: str, ways: dict[str, str]) -> str:
    """Milliseconds of the GPU's work alone, a line for each shape, prompt and batch; bold: the least of DyMU's."""
    result = read(RESULTS / "gpu_attention.json")
    rows = []
    for row in result["rows"]:
        if row["part"] == part:
            times = {way: row["ways"][way]["gpu_ms"] for way in ways}
            least = min(ms for way, ms in times.items() if way.startswith(("triton", "sdpa")) and "," not in way)
            cells = [f"**{ms:.3f}**" if ms == least else f"{ms:.3f}" for ms in times.values()]
            heads = f"{row['shape']['heads']} / {row['shape']['key_heads']}"
            rows.append([heads, f"{row['tokens']:,}", f"{row['kept']:,}", str(row["batch"]), *cells])
    header = ["heads", "tokens", "image tokens kept", "batch", *ways.values()]
    return markdown(header, rows) + made_by(result)


def gpu_prefill() -> str:
    """One layer's attention in prefill."""
    return _gpu_attention(
        "prefill",
        {
            "untouched": "untouched",
            "authors": "as the authors' code",
            "sdpa": "exact, sdpa",
            "triton": "exact, triton",
            "sdpa, representative": "representative, sdpa",
            "triton, representative": "representative, triton",
            "floor": "untouched, M tokens",
        },
    )


def gpu_decode() -> str:
    """One layer's attention of one more token."""
    ways = {"untouched": "untouched", "sdpa": "sdpa", "triton": "triton", "floor": "untouched, M tokens"}
    return _gpu_attention("decode", ways)


def layer_prefill() -> str:
    """One decoder layer's prefill."""
    return _layer(
        "prefill",
        {
            "linear, untouched": "projections and MLP, all tokens",
            "linear, merged": "merged tokens",
            "attention, untouched": "attention, untouched",
            "attention, DyMU": "exact",
            "attention, DyMU, representative": "representative",
            "attention, DyMU, representative, near and far": "near and far",
            "attention, untouched on M tokens": "untouched, M tokens",
        },
    )


def layer_decode() -> str:
    """One decoder layer for one more token."""
    return _layer(
        "decode",
        {
            "linear, merged": "projections and MLP",
            "attention, untouched": "attention, untouched",
            "attention, DyMU": "merged cache",
            "attention, DyMU, fast cache": "fast cache",
            "attention, untouched on M tokens": "untouched, M tokens",
        },
    )


ENCODERS = {
    "encoder_clip_l_15": "CLIP-L/336",
    "encoder_clip_l_30": "CLIP-L/336",
    "encoder_demo_576": "DINOv2-S, 576",
    "encoder_demo_256": "DINOv2-S, 256",
}
"""Result files of `benchmarks.encoder`, in the table's order: which tower, at how many tokens."""


def encoder() -> str:
    """The encoder with DyMU, what token counts alone would give, and what its layers alone give on so many tokens."""
    results = {tower: read(RESULTS / f"{tower}.json") for tower in ENCODERS}
    rows = [
        [ENCODERS[tower], f"{row['budget']:.0%}", str(row["batch"]), f"{row['kept']:.0f}", f"**{row['ratio']:.2f}**",
         f"{row['count_ratio']:.2f} ({row['of_count_ratio']:.0%})", f"{row['layers_ratio']:.2f}",
         f"{row['ratio'] / row['layers_ratio']:.0%}", f"{row['merge_share']:.1%}"]
        for tower, result in results.items()
        for row in result["rows"]
    ]  # fmt: skip
    header = ["tower", "budget", "images at a time", "kept", "untouched / DyMU", "count ratio", "layers alone",
              "of layers alone", "matching and merging"]  # fmt: skip
    made = "\n".join(made_by(result).strip() for result in results.values())
    return f"{markdown(header, rows)}\n\n{made}"


def encoder_gpu() -> str:
    """The encoder on a GPU, milliseconds per image."""
    result = read(RESULTS / "encoder_gpu_mask.json")
    rows = [
        [f"{row['kept']:.0f} of {result['full_tokens']}", str(row["batch"]), f"{row['untouched_ms']:.2f}",
         f"{row['dymu_ms']:.2f}", f"{row['merge_share']:.0%}", f"{row['layers_ms']:.2f}",
         f"{row['ratio']:.2f}", f"{row['count_ratio']:.2f}"]
        for row in result["rows"]
    ]  # fmt: skip
    header = ["kept", "batch", "untouched", "DyMU", "of it matching and merging", "its layers alone",
              "untouched / DyMU", "what counts promise"]  # fmt: skip
    return markdown(header, rows) + made_by(result)


def encoder_buckets() -> str:
    """DyMU's time over that of the layers alone, for attention over buckets of so many images."""
    result = read(RESULTS / "encoder_buckets.json")
    lines: dict[int, list[str]] = {}
    buckets = dict[str, None]()
    for row in sorted(result["rows"], key=lambda row: (row["batch"], row["bucket"])):
        buckets["all" if row["bucket"] > row["batch"] else str(row["bucket"])] = None
        lines.setdefault(row["batch"], []).append(f"{row['dymu_ms'] / row['layers_ms']:.2f}")
    header = ["images at a time", *buckets]
    return markdown(header, [[str(batch), *cells] for batch, cells in lines.items()]) + made_by(result)


def encoder_every() -> str:
    """Merging in all layers against merging in every second and third."""
    result = read(RESULTS / "encoder_every.json")
    rows = [
        ["all" if row["every"] == 1 else f"every {row['every']}", f"{row['budget']:.0%}", f"{row['kept']:.0f}",
         f"**{row['ratio']:.2f}**", f"{row['merge_share']:.1%}", f"{row['cosine']:.3f}"]
        for row in result["rows"]
    ]  # fmt: skip
    header = ["merging in layers", "budget", "kept", "untouched / DyMU", "matching and merging", "cosine"]
    return markdown(header, rows) + made_by(result)


def load() -> str:
    """Requests per second of both servers, untouched and with few tokens, and the CPU time of each."""
    results = [read(RESULTS / f"load_{name}.json") for name in ("vllm", "transformers")]
    names = {"vllm": "vLLM", "serve": "transformers"}
    rows = [
        [f"{names[result['server']]}, {result['unmerge']}",
         f"{row['budget']:.0%}" if isinstance(row["budget"], float) else row["budget"], f"**{row['per_second']:.1f}**",
         f"{row['least']:.1f} to {row['most']:.1f}", f"{1000 * row['front_cpu_s']:.0f}",
         f"{1000 * row['engine_cpu_s']:.0f}" if row["engine_cpu_s"] else ""]
        for result in results
        for row in result["rows"]
    ]  # fmt: skip
    header = ["server", "budget", "requests per second", "of the rounds", "CPU ms, takes requests", "CPU ms, engine"]
    return markdown(header, rows) + "".join(map(made_by, results))


def memory() -> str:
    """Peak megabytes of one layer's attention beside what it is given, a line for each way, and how they grow."""
    result = read(RESULTS / "memory.json")
    lengths = list(dict.fromkeys(row["tokens"] for row in result["rows"]))
    rows = []
    for fit in result["fits"]:
        peaks = {
            row["tokens"]: row["peak_bytes"]
            for row in result["rows"]
            if (row["model"], row["way"]) == (fit["model"], fit["way"])
        }
        cells = [f"{peaks[tokens] / 1e6:,.0f}" if tokens in peaks else "" for tokens in lengths]
        rows.append([fit["model"], fit["way"], *cells, f"{fit['exponent']:.2f}"])
    header = ["layer of", "", *(f"{tokens:,}" for tokens in lengths), "exponent"]
    return markdown(header, rows) + made_by(result)


def _evaluated(path: Path) -> str:
    """A line below a table in Markdown: of which result file of `dymu evaluate` it is, and where its command stands."""
    file = path.relative_to(ROOT)
    return f"\n\n<sub>`{file}`, made as `training/README.md` says: {provenance(Results.load(path))}</sub>"


def accuracy() -> str:
    """Accuracy over all kinds of questions, and, where the file holds it, how like the untouched model the rows are."""
    results = Results.load(EVALUATION)
    summaries = summarise(results)
    compared = any(ALL in summary.same for summary in summaries)
    rows = [
        [series(summary.row), f"{summary.tokens_mean:.0f}", f"{100 * cell.mean:.1f}",
         f"{100 * cell.low:.1f} to {100 * cell.high:.1f}", *(likeness(summary) if compared else [])]
        for summary in summaries
        for cell in [summary.accuracy[ALL]]
    ]  # fmt: skip
    header = ["", "tokens, mean", f"right answers, % of {summaries[0].accuracy[ALL].n}", "95 % interval"]
    header += LIKENESS if compared else []
    return f"{markdown(header, rows)}{_evaluated(EVALUATION)}"


def accuracy_short() -> str:
    """What the toy's answers lose with unmerging: right ones, and how like the untouched model's all are."""
    results = Results.load(EVALUATION)
    summaries = [row for row in summarise(results) if row.row == UNTOUCHED or row.row.unmerge == "exact"]
    full = summaries[0].tokens_mean
    rows = [[f"{row.tokens_mean:.0f}", f"{100 * row.accuracy[ALL].mean:.1f}", *likeness(row)] for row in summaries]
    header = [f"image tokens, of {full:.0f}", f"right, % of {summaries[0].accuracy[ALL].n}", *LIKENESS]
    return markdown(header, rows)


def forms() -> str:
    """Ways to attend to the same merged tokens, a column for each budget: what each loses, and how like it is."""
    results = Results.load(METHODS)
    exact = [row for row in results.header.rows if (row.method, row.schedule, row.unmerge) == (*DEFAULT, "exact")]
    of_row = {summary.row: summary for summary in summarise(results)}
    lines = []
    for way in UNMERGE:
        cells = []
        for row in exact:
            summary = of_row[msgspec.structs.replace(row, unmerge=way)]
            lost = summary.difference[ALL] if way == "exact" else _paired(results, summary.row, row)
            cells.append(f"{points(lost)}; {summary.divergence[ALL].mean:.3g}")
        lines.append([f"{way}, against {'untouched' if way == 'exact' else 'exact'}", *cells])
    full = of_row[UNTOUCHED].tokens_mean
    header = ["points; KL from untouched", *(f"{of_row[row].tokens_mean:.0f} of {full:.0f} tokens" for row in exact)]
    return f"{markdown(header, lines)}{_evaluated(METHODS)}"


def _paired(results: Results, row: Row, other: Row) -> Share:
    """The score of one row less that of another, on each question."""
    scores = [
        np.concatenate([batch.scores for _, batch in sorted(results.answers[each.key].items())])
        for each in (row, other)
    ]
    return share(scores[0] - scores[1], (-1, 1))


def methods() -> str:
    """Points lost against the untouched model by every way to have fewer tokens, a column for each budget."""
    results = Results.load(METHODS).only(["exact"])
    summaries = summarise(results)
    rest = [row for row in summaries if row.row != UNTOUCHED]
    curves: dict[str, list[RowSummary]] = {}
    for row in sorted(rest, key=lambda row: -row.row.budget):
        curves.setdefault(series(row.row), []).append(row)
    budgets = sorted({row.row.budget for row in rest if row.row.method == "dtome"}, reverse=True)
    rows = [
        # Pooling and smaller images take the square nearest to each budget.
        [name, *(f"{difference(row)} at {row.tokens_mean:.0f}" for _, row in zip(budgets, curve, strict=True))]
        for name, curve in curves.items()
    ]
    full, everything = summaries[0].tokens_mean, summaries[0].accuracy[ALL]
    columns = [f"{budget / full:.0%}" for budget in budgets]
    header = [f"points against untouched ({100 * everything.mean:.1f} % of {everything.n})", *columns]
    return f"{markdown(header, rows)}{_evaluated(METHODS)}"


def dynamic() -> str:
    """DToMe less ToMe, calibrated to about the same mean, and for parts of the scenes by what they hold."""
    results = Results.load(METHODS).only(["exact"])
    parts = parts_by(results, "objects")
    columns = [summarise(results, part, "tome") for part in (None, *parts)]
    header = ["DToMe", f"all, photos too ({columns[0][0].accuracy[ALL].n})"]
    for part, column in zip(parts, columns[1:], strict=True):
        span = " to ".join(dict.fromkeys(f"{end:.0f}" for end in (part.low, part.high)))
        header.append(f"scenes, things: {span} ({column[0].accuracy[ALL].n})")
    rows = [
        [f"{cells[0].row.schedule.replace('_', '-')}, {cells[0].row.budget}",
         *(f"{points(cell.difference[ALL])} at {cell.tokens_mean:.0f}; {cell.against_tokens:.0f}" for cell in cells)]
        for cells in zip(*columns, strict=True)
        if cells[0].row.method == "dtome"
    ]  # fmt: skip
    return f"{markdown(header, rows)}{_evaluated(METHODS)}"


def schedules() -> str:
    """The three schedules: what each loses, how like the untouched model it is, and when it says its first token."""
    results, costs = Results.load(METHODS).only(["exact"]), Results.load(COSTS)
    spent = {summary.row: summary.costs for summary in summarise(costs)}
    lines: dict[str, list[str]] = {}
    budgets = dict[int, str]()
    summaries = summarise(results)
    for summary in summaries:
        if summary.row.method == "dtome" and (cost := spent[summary.row]) is not None:
            budgets[summary.row.budget] = f"{summary.row.budget / summaries[0].tokens_mean:.0%}"
            cell = (
                f"{points(summary.difference[ALL])}; {summary.divergence[ALL].mean:.3g}; {cost.first_token_ms:.0f} ms"
            )
            lines.setdefault(summary.row.schedule, []).append(cell)
    untouched = spent[UNTOUCHED]
    assert untouched is not None
    header = [f"untouched: {untouched.first_token_ms:.0f} ms", *budgets.values()]
    return markdown(header, [[f"`{name}`", *cells] for name, cells in lines.items()]) + "".join(
        map(_evaluated, (METHODS, COSTS))
    )


def costs_of_methods() -> str:
    """What a prompt costs with merging on each schedule, and with a smaller image."""
    results = Results.load(COSTS)
    chosen = [row for row in summarise(results) if row.row.method not in ("pool", "random")]
    return f"{cost_table(chosen)}{_evaluated(COSTS)}"


def accuracy_by_kind() -> str:
    """Accuracy per kind of question, percent with its 95 % interval, and per phrasing that training never showed."""
    return _by_kind(EVALUATION)


def forecast_times() -> str:
    """How long a forecast takes, for a picture that is decoded and for a file."""
    result = read(RESULTS / "forecast.json")
    rows = [
        [f"{row['width']:,} × {row['height']:,}", *(f"{row[name]:.1f} ms" for name in ("features_ms", "from_jpeg_ms"))]
        for row in result["rows"]
    ]
    return markdown(["a photo of so many pixels", "decoded", "from a JPEG file"], rows) + made_by(result)


def vlm_accuracy() -> str:
    """The same of the strong model."""
    return _by_kind(VLM)


def _by_kind(path: Path) -> str:
    results = Results.load(path)
    summaries = summarise(results)
    kinds = list(summaries[0].accuracy)
    header = ["", "tokens", *(f"{kind} ({summaries[0].accuracy[kind].n})" for kind in kinds)]
    rows = [
        [series(summary.row), f"{summary.tokens_mean:.0f}", *(_percent(summary.accuracy[kind]) for kind in kinds)]
        for summary in summaries
    ]
    return f"{markdown(header, rows)}{_evaluated(path)}"


def _percent(share: Share) -> str:
    return f"{100 * share.mean:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


FUNCTIONS = (
    kept_tokens, bench, bench_short, bench_tiles, bench_families, families, family_limits, plain_decoders, encoder,
    encoder_buckets, encoder_every, tiles, load, bench_gpu, gpu_prefill, gpu_decode, encoder_gpu, layer_prefill,
    layer_decode, memory, accuracy, accuracy_short, accuracy_by_kind, vlm_accuracy, forms, methods, dynamic,
    schedules, costs_of_methods, forecast_times, *peers.FUNCTIONS, *studies.FUNCTIONS,
)  # fmt: skip
TABLES: dict[str, Callable[[], str]] = {function.__name__: function for function in FUNCTIONS}


def filled(page: str) -> str:
    """The page with each of its tables made anew."""

    def table(marked: re.Match[str]) -> str:
        return f"<!-- table {marked[1]} -->\n{TABLES[marked[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def main(
    check: Annotated[bool, typer.Option(help="Change nothing; fail if a table is not up to date.")] = False,
) -> None:
    """Fill in the tables."""
    stale = []
    for path in PAGES:
        page = path.read_text()
        if filled(page) != page:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(filled(page))
    if check and stale:
        raise SystemExit(f"not made from the result files: {', '.join(stale)}; run python -m benchmarks.tables")
    print("\n".join(stale) or "all tables were up to date")


if __name__ == "__main__":
    typer.run(main)
