"""Make the tables of the README and the model card from result files.

`python -m benchmarks.tables` rewrites what stands between `<!-- table NAME -->` and `<!-- end -->`; `--check` only says
whether something would change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.record import RESULTS, ROOT
from dymu.bench.results import load as load_bench
from dymu.bench.tables import overview
from dymu.bench.tables import provenance as made_by
from dymu.evaluate import UNTOUCHED, Results, RowSummary, parts_by, summarise
from dymu.evaluate.summary import ALL, Share
from dymu.evaluate.tables import accuracy_table, cost_table, difference, kind_table, points, provenance, series

DOCS = ("saliency", "legibility", "evidence", "speed", "encoder", "memory")
PAGES = tuple(ROOT / page for page in ("README.md", "models/demo/README.md", *(f"docs/{page}.md" for page in DOCS)))
BENCH_OF_TILES = "bench-llava-onevision-0.5b.json"
EVALUATION = ROOT / "training" / "results" / "heldout.jsonl"
METHODS = EVALUATION.with_name("methods.jsonl")


def _load(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _made_by(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"\n\n<sub>`{result['command']}`, {result['date'][:10]}, {result['device']}, {versions}</sub>"


def kept_tokens() -> str:
    """Wanted and kept tokens on images that were not calibrated on."""
    result = _load(RESULTS / "kept_tokens.json")
    full = result["full_tokens"]
    rows = [
        [f"{row['budget']:g} ({row['budget'] / full:.0%})", f"{row['mean']:.1f}", f"{row['sd']:.1f}", str(row["min"]),
         str(row["max"])]
        for row in reversed(result["rows"])
    ]  # fmt: skip
    header = ["budget", f"kept, mean of {result['images']} unseen images", "sd", "least", "most"]
    return _markdown(header, rows) + _made_by(result)


def bench() -> str:
    """Times and bytes as parts of the untouched model's, of every `bench-….json` but that of `bench_tiles`."""
    return "\n\n".join(_bench(path) for path in sorted(RESULTS.glob("bench-*.json")) if path.name != BENCH_OF_TILES)


def bench_tiles() -> str:
    """The same of a model that cuts images into tiles."""
    return _bench(RESULTS / BENCH_OF_TILES)


def _bench(path: Path) -> str:
    results = load_bench(path)
    return f"{overview(results)}\n\n<sub>{made_by(results)}</sub>"


def tiles() -> str:
    """A vision encoder's milliseconds per picture, and what token counts alone would give."""
    result = _load(RESULTS / "tiles.json")
    rows = [
        [str(row["pictures"]), f"{row['budget'] / result['full_tokens']:.0%}", f"{row['kept']:.0f}",
         f"{row['untouched_ms']:,.0f}", f"{row['dymu_ms']:,.0f}", f"{row['merge_ms']:.0f}",
         f"**{row['ratio']:.2f}** ({row['ratio_least']:.2f} to {row['ratio_most']:.2f})", f"{row['count_ratio']:.2f}"]
        for row in result["rows"]
    ]  # fmt: skip
    header = ["pictures", "budget", f"kept of {result['full_tokens']}", "untouched, ms per picture", "DyMU",
              "of it matching and merging", "untouched / DyMU", "count ratio"]  # fmt: skip
    return _markdown(header, rows) + _made_by(result)


def _layer(phase: str, columns: dict[str, str]) -> str:
    """Milliseconds of a decoder layer's parts, a line for each length of prompt."""
    result = _load(RESULTS / "roofline.json")
    rows = []
    for tokens, kept in dict.fromkeys((row["image_tokens"], row["kept"]) for row in result["rows"]):
        found = {
            row["part"]: row
            for row in result["rows"]
            if (row["image_tokens"], row["kept"], row["phase"]) == (tokens, kept, phase)
        }
        times = [found[part]["ms"] for part in columns]
        cells = [f"{ms:,.2f}" if ms < 10 else f"{ms:,.0f}" for ms in times]
        if phase == "prefill":
            rate = f"{found['attention, DyMU']['gflops']:.0f} G/s"
        else:
            rate = f"{found['linear, merged']['gbytes_s']:.0f} GB/s"
        rows.append([f"{tokens:,}", f"{kept:,}", *cells, rate])
    last = "operations, DyMU's attention" if phase == "prefill" else "bytes, projections and MLP"
    header = ["image tokens", "kept", *columns.values(), last]
    return _markdown(header, rows) + _made_by(result)


def layer_prefill() -> str:
    """One decoder layer's prefill."""
    return _layer(
        "prefill",
        {
            "linear, untouched": "projections and MLP, all tokens",
            "linear, merged": "merged tokens",
            "attention, untouched": "attention, untouched",
            "attention, DyMU": "DyMU",
            "attention, expanded first": "authors' way",
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
            "attention, DyMU": "DyMU",
            "attention, untouched on M tokens": "untouched, M tokens",
        },
    )


def memory() -> str:
    """Peak megabytes of one layer's attention beside what it is given, a line for each way, and how they grow."""
    result = _load(RESULTS / "memory.json")
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
    return _markdown(header, rows) + _made_by(result)


def accuracy() -> str:
    """Accuracy over all kinds of questions, with its 95 % interval."""
    results = Results.load(EVALUATION)
    rows = [
        [series(found.row), f"{found.tokens_mean:.0f}", f"{100 * cell.mean:.1f}",
         f"{100 * cell.low:.1f} to {100 * cell.high:.1f}"]
        for found in summarise(results)
        for cell in [found.accuracy[ALL]]
    ]  # fmt: skip
    count = summarise(results)[0].accuracy[ALL].n
    header = ["", "tokens, mean", f"right answers, % of {count}", "95 % interval"]
    return f"{_markdown(header, rows)}\n\n<sub>{provenance(results)}</sub>"


def compact() -> str:
    """Ways to attend to the same merged tokens, and their paired differences from the untouched model."""
    results = Results.load(EVALUATION.with_name("compact.jsonl"))
    return f"{accuracy_table(summarise(results))}\n\n<sub>{provenance(results)}</sub>"


def methods() -> str:
    """Points lost against the untouched model by every way to have fewer tokens, a column for each budget."""
    results = Results.load(METHODS)
    found = summarise(results)
    rest = [row for row in found if row.row != UNTOUCHED]
    curves: dict[str, list[RowSummary]] = {}
    for row in sorted(rest, key=lambda row: -row.row.budget):
        curves.setdefault(series(row.row), []).append(row)
    budgets = sorted({row.row.budget for row in rest if row.row.method == "dtome"}, reverse=True)
    rows = [
        # Pooling and smaller images take the square nearest to each budget.
        [name, *(f"{difference(row)} at {row.tokens_mean:.0f}" for _, row in zip(budgets, curve, strict=True))]
        for name, curve in curves.items()
    ]
    full, everything = found[0].tokens_mean, found[0].accuracy[ALL]
    columns = [f"{budget / full:.0%}" for budget in budgets]
    header = [f"points against untouched ({100 * everything.mean:.1f} % of {everything.n})", *columns]
    return f"{_markdown(header, rows)}\n\n<sub>{provenance(results)}</sub>"


def dynamic() -> str:
    """DToMe less ToMe, calibrated to about the same mean, and for parts of the scenes by what they hold."""
    results = Results.load(METHODS)
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
    return f"{_markdown(header, rows)}\n\n<sub>{provenance(results)}</sub>"


def costs_of_methods() -> str:
    """What a prompt costs with merging on each schedule, and with a smaller image."""
    results = Results.load(METHODS)
    chosen = [row for row in summarise(results) if row.row.method not in ("pool", "random")]
    return f"{cost_table(chosen)}\n\n<sub>{provenance(results)}</sub>"


def accuracy_by_kind() -> str:
    """Accuracy per kind of question, percent with its 95 % interval, and per phrasing that training never showed."""
    results = Results.load(EVALUATION)
    return f"{kind_table(summarise(results))}\n\n<sub>{provenance(results)}</sub>"


def calibration_size() -> str:
    """By how much held-out images miss their budget, for calibration sets of several sizes and kinds."""
    result = _load(RESULTS / "calibration_size.json")
    sets: dict[tuple[str, int], list[dict[str, list[float]]]] = {}
    for row in result["rows"]:
        sets.setdefault((row["calibrated_on"], row["images"]), []).append(row["kept"])
    columns = [(test, index) for test in result["tests"] for index in range(len(result["budgets"]))]
    rows = []
    for (kind, images), draws in sets.items():
        cells = []
        for test, index in columns:
            missed = [100 * (kept[test][index] / result["budgets"][index] - 1) for kept in draws]
            cells.append(" ".join(f"{each:+.1f}" for each in missed))
        rows.append([kind, str(images), *cells])
    header = ["calibrated on", "images"]
    header += [f"{result['tests'][test]} {test}, budget {result['budgets'][index]}" for test, index in columns]
    return _markdown(header, rows) + _made_by(result)


def _with_interval(cell: dict[str, float], sign: str = "") -> str:
    return f"{cell['mean']:{sign}.3f} [{cell['low']:{sign}.3f}, {cell['high']:{sign}.3f}]"


def _saliency_rows(rows: list[dict[str, Any]], full: int, first: Callable[[dict[str, Any]], str]) -> list[list[str]]:
    """`first` column, share, tokens and three metrics with their intervals."""
    return [
        [first(row), f"{row['budget'] / full:.0%}", f"{row['tokens']:.0f} ± {row['tokens_sd']:.0f}",
         *(_with_interval(row[metric]) for metric in ("correlation", "mae", "iou"))]
        for row in rows
    ]  # fmt: skip


SALIENCY_HEADER = ["budget", "tokens, mean ± sd", "correlation", "mean absolute error", "IoU above 0.5"]


def saliency() -> str:
    """Saliency maps after merging, and after other ways to have fewer tokens, against those of all tokens."""
    result = _load(RESULTS / "saliency.json")
    tables = []
    for size in result["sizes"]:
        chosen = [r for r in size["rows"] if "budget" in r and r.get("schedule") in (None, "reverse_linear")]
        rows = _saliency_rows(chosen, size["full_tokens"], lambda row: str(row["method"]))
        title = f"**{size['size_px']} px: {size['full_tokens']} tokens, {result['photos']} photos**"
        tables.append(f"{title}\n\n{_markdown(['', *SALIENCY_HEADER], rows)}")
    return "\n\n".join(tables) + _made_by(result)


def saliency_schedules() -> str:
    """Where to merge: the three schedules at the same budgets."""
    result = _load(RESULTS / "saliency.json")
    size = result["sizes"][0]
    compared = {row["budget"] for row in size["rows"] if row.get("schedule") == "constant"}
    chosen = [row for row in size["rows"] if row.get("budget") in compared and "schedule" in row]
    chosen.sort(key=lambda row: (-row["budget"], row["method"]))
    rows = _saliency_rows(chosen, size["full_tokens"], lambda row: f"{row['method']}, {row['schedule']}")
    return _markdown([f"{size['size_px']} px", *SALIENCY_HEADER], rows) + _made_by(result)


def saliency_paired() -> str:
    """DToMe less ToMe on each photo, in thousandths of correlation, and on which photos."""
    result = _load(RESULTS / "saliency.json")

    def thousandths(cell: dict[str, float]) -> str:
        return f"{1000 * cell['mean']:+.1f} [{1000 * cell['low']:+.1f}, {1000 * cell['high']:+.1f}]"

    rows = []
    for size in result["sizes"]:
        for pair in size["dtome_against_tome"]:
            rank = pair["gain_with_kept"]
            rows.append(
                [f"{size['size_px']} px, {pair['schedule']}, {pair['budget'] / size['full_tokens']:.0%}",
                 f"{pair['tokens'][0]:.1f}, {pair['tokens'][1]:.0f}", thousandths(pair["gain_correlation"]),
                 f"{pair['better_on']:.0%}", f"{rank['value']:+.2f} [{rank['low']:+.2f}, {rank['high']:+.2f}]",
                 *(thousandths(third["gain_correlation"]) for third in pair["by_kept"])]
            )  # fmt: skip
    header = ["", "tokens: DToMe, ToMe", "gain, all photos", "better on", "rank correlation of gain and kept tokens",
              "third that keeps least", "middle third", "third that keeps most"]  # fmt: skip
    return _markdown(header, rows) + _made_by(result)


def _letters(cell: dict[str, Any]) -> str:
    return f"{100 * cell['letters']['mean']:.0f}, {points(Share(**cell['letters_less_untouched'], n=0))}"


def _parts(result: dict[str, Any]) -> list[str]:
    return [f"{part['pages']} pages of {part['letters_a_page']:.0f} letters" for part in result["parts"]]


def legibility() -> str:
    """Letters and words that are read after merging, for all pages and for thirds of them by how much they show."""
    result = _load(RESULTS / "legibility.json")
    header = ["", "budget", "tokens", "words, %", "letters, %; against all tokens", *_parts(result)]
    rows = []
    for row in result["rows"]:
        share = f"{row['budget'] / result['full_tokens']:.0%}" if row["budget"] else ""
        rows.append(
            [row["method"], share, f"{row['tokens']:.0f} ± {row['tokens_sd']:.0f}", f"{100 * row['words']['mean']:.0f}",
             _letters(row), *(f"{_letters(part)} at {part['tokens']:.0f}" for part in row["parts"])]
        )  # fmt: skip
    return _markdown(header, rows) + _made_by(result)


def legibility_paired() -> str:
    """DToMe less ToMe on each page, in points of letters."""
    result = _load(RESULTS / "legibility.json")
    header = ["letters, DToMe less ToMe", "all pages", *_parts(result)]
    rows = [
        [f"{pair['budget'] / result['full_tokens']:.0%}", *(points(Share(**cell, n=0)) for cell in cells)]
        for pair in result["dtome_against_tome"]
        for cells in [(pair["all"], *pair["parts"])]
    ]
    return _markdown(header, rows) + _made_by(result)


FUNCTIONS = (
    kept_tokens, bench, bench_tiles, tiles, layer_prefill, layer_decode, memory, accuracy, accuracy_by_kind, compact,
    methods, dynamic, costs_of_methods, calibration_size, saliency, saliency_schedules, saliency_paired, legibility,
    legibility_paired,
)  # fmt: skip
TABLES: dict[str, Callable[[], str]] = {function.__name__: function for function in FUNCTIONS}


def filled(page: str) -> str:
    """The page with each of its tables made anew."""

    def table(found: re.Match[str]) -> str:
        return f"<!-- table {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->"

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
