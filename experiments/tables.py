"""The tables of finished studies, from their result files; `python -m benchmarks.tables` fills them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.record import made_by, read
from dymu.evaluation.summary import Share
from dymu.evaluation.tables import points
from dymu.measure.markdown import markdown
from experiments import RESULTS


def calibration_size() -> str:
    """By how much held-out images miss their budget, for calibration sets of several sizes and kinds."""
    result = read(RESULTS / "calibration_size.json")
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
    return markdown(header, rows) + made_by(result)


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
    result = read(RESULTS / "saliency.json")
    tables = []
    for size in result["sizes"]:
        chosen = [r for r in size["rows"] if "budget" in r and r.get("schedule") in (None, "reverse_linear")]
        rows = _saliency_rows(chosen, size["full_tokens"], lambda row: str(row["method"]))
        title = f"**{size['size_px']} px: {size['full_tokens']} tokens, {result['photos']} photos**"
        tables.append(f"{title}\n\n{markdown(['', *SALIENCY_HEADER], rows)}")
    return "\n\n".join(tables) + made_by(result)


def saliency_schedules() -> str:
    """Where to merge: the three schedules at the same budgets."""
    result = read(RESULTS / "saliency.json")
    size = result["sizes"][0]
    compared = {row["budget"] for row in size["rows"] if row.get("schedule") == "constant"}
    chosen = [row for row in size["rows"] if row.get("budget") in compared and "schedule" in row]
    chosen.sort(key=lambda row: (-row["budget"], row["method"]))
    rows = _saliency_rows(chosen, size["full_tokens"], lambda row: f"{row['method']}, {row['schedule']}")
    return markdown([f"{size['size_px']} px", *SALIENCY_HEADER], rows) + made_by(result)


def saliency_paired() -> str:
    """DToMe less ToMe on each photo, in thousandths of correlation, and on which photos."""
    result = read(RESULTS / "saliency.json")

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
    return markdown(header, rows) + made_by(result)


def _letters(cell: dict[str, Any]) -> str:
    return f"{100 * cell['letters']['mean']:.0f}, {points(Share(**cell['letters_less_untouched'], n=0))}"


def _parts(result: dict[str, Any]) -> list[str]:
    return [f"{part['pages']} pages of {part['letters_a_page']:.0f} letters" for part in result["parts"]]


def legibility() -> str:
    """Letters and words that are read after merging, for all pages and for thirds of them by how much they show."""
    result = read(RESULTS / "legibility.json")
    header = ["", "budget", "tokens", "words, %", "letters, %; against all tokens", *_parts(result)]
    rows = []
    for row in result["rows"]:
        share = f"{row['budget'] / result['full_tokens']:.0%}" if row["budget"] else ""
        rows.append(
            [row["method"], share, f"{row['tokens']:.0f} ± {row['tokens_sd']:.0f}", f"{100 * row['words']['mean']:.0f}",
             _letters(row), *(f"{_letters(part)} at {part['tokens']:.0f}" for part in row["parts"])]
        )  # fmt: skip
    return markdown(header, rows) + made_by(result)


def legibility_paired() -> str:
    """DToMe less ToMe on each page, in points of letters."""
    result = read(RESULTS / "legibility.json")
    header = ["letters, DToMe less ToMe", "all pages", *_parts(result)]
    rows = [
        [f"{pair['budget'] / result['full_tokens']:.0%}", *(points(Share(**cell, n=0)) for cell in cells)]
        for pair in result["dtome_against_tome"]
        for cells in [(pair["all"], *pair["parts"])]
    ]
    return markdown(header, rows) + made_by(result)


def forms_on_demo() -> str:
    """KL(exact ‖ form) at the answers of the demo model, in nats, and KL(untouched ‖ exact)."""
    result = read(RESULTS / "forms_on_demo.json")
    header = ["nats per token", *(f"{row['budget']:.0%}" for row in result["rows"])]
    rows = [
        [_KL.get(form, form), *(_nats(row["forms"][form]) for row in result["rows"])]
        for form in result["rows"][0]["forms"]
    ]
    return markdown(header, rows) + made_by(result)


def forms_on_text() -> str:
    """The same of a language model that was trained on text, at prompts of several lengths."""
    result = read(RESULTS / "forms_on_text.json")
    header = [
        "nats per token",
        *(f"{row['kept']:,.0f} of {row['tokens']:,} ({row['prompts']})" for row in result["rows"]),
    ]
    forms = dict.fromkeys(form for row in result["rows"] for form in row["forms"])
    rows = [
        [
            _KL.get(form, form),
            *(f"{row['forms'][form]['mean']:.3g}" if form in row["forms"] else "" for row in result["rows"]),
        ]
        for form in forms
    ]
    return markdown(header, rows) + made_by(result)


def forecast() -> str:
    """How well counts are told beforehand, by what was calibrated on and what is shown."""
    result = read(RESULTS / "forecast.json")
    cells: dict[tuple[str, str], dict[float, dict[str, Any]]] = {}
    for row in result["rows"]:
        cells.setdefault((row["calibrated_on"], row["kind"]), {})[row["budget"]] = row
    budgets = sorted({row["budget"] for row in result["rows"]})
    rows = [
        [calibrated_on, kind, *(_told(of_budget[budget]) if budget in of_budget else "" for budget in budgets)]
        for (calibrated_on, kind), of_budget in sorted(cells.items(), key=lambda item: -len(item[1]))
    ]
    header = ["calibrated on", "shown", *(f"{budget} ({budget / result['full_tokens']:.0%})" for budget in budgets)]
    return markdown(header, rows) + made_by(result)


def forecast_anew() -> str:
    """For how many pictures of each kind the reserve of all kinds is enough, over many divisions of the subjects."""
    result = read(RESULTS / "forecast.json")
    cells: dict[str, list[str]] = {}
    for row in sorted(result["anew"], key=lambda row: row["budget"]):
        cells.setdefault(row["kind"], []).append(f"{100 * row['enough']:.0f} ({100 * row['below']:.0f})")
    budgets = sorted({row["budget"] for row in result["anew"]})
    header = ["shown", *(f"{budget} ({budget / result['full_tokens']:.0%})" for budget in budgets)]
    return markdown(header, [[kind, *row] for kind, row in cells.items()]) + made_by(result)


def _percent(cell: dict[str, float]) -> str:
    return f"{100 * cell['mean']:.0f} [{100 * cell['low']:.0f}, {100 * cell['high']:.0f}]"


def _told(row: dict[str, Any]) -> str:
    return f"{row['r2']:.2f}; {_percent(row['enough'])}; {row['cost']:.2f} ({row['one_for_all']:.2f})"


def dial() -> str:
    """How well budgets between calibrated ones are met, and how often a lower one keeps more."""
    result = read(RESULTS / "dial.json")
    steps = list(next(iter(result["kinds"].values()))["lower_keeps_more"])
    rows = []
    for kind, found in result["kinds"].items():
        strays = [100 * abs(part) for part in found["between_less_chance"]]
        on_dial = [stray for stray, dials in zip(strays, found["dials"][1:], strict=True) if dials]
        chance = [100 * (part - 1) for part in found["kept_over_budget"]]
        rows.append(
            [
                kind,
                f"{sum(chance) / len(chance):+.1f} ({min(chance):+.1f} to {max(chance):+.1f})",
                f"{sum(strays) / len(strays):.1f}, at most {max(strays):.1f}",
                f"{sum(on_dial) / len(on_dial):.1f}, at most {max(on_dial):.1f}",
                " / ".join(f"{100 * found['lower_keeps_more'][step]:.1f}" for step in steps),
            ]
        )
    header = ["held-out pictures", "kept beside the budget, on the grid, %", "halfway between: beside that, %"]
    header += ["of these on a dial", f"a lower budget keeps more, {' / '.join(steps)} apart, %"]
    return markdown(header, rows) + made_by(result)


def guard() -> str:
    """What pictures of every kind keep with text guarded, and without."""
    result = read(RESULTS / "guard.json")
    rows = []
    for row in result["rows"]:
        agreement = _percent(row["photos_same_answer"])
        kept = (f"{row['kept'][kind]:.0f} (least {row['least'][kind]})" for kind in row["kept"])
        rows.append([str(row["budget"]), row["guard"] or "–", *kept, agreement])
    header = ["budget", "guard", *result["rows"][0]["kept"], "photos: same answer as untouched, %"]
    return markdown(header, rows) + made_by(result)


def legibility_focus() -> str:
    """Letters that are read with a focus on text, at as many tokens of every page."""
    result = read(RESULTS / "legibility_focus.json")
    methods = list(dict.fromkeys(row["method"] for row in result["rows"][1:]))
    budgets = sorted({row["budget"] for row in result["rows"][1:]}, reverse=True)
    cells = {(row["method"], row["budget"]): row for row in result["rows"]}
    lines = []
    for method in methods:
        of_budgets = (cells[method, budget] for budget in budgets)
        lines.append([method, *(f"{_percent(row['letters'])} at {row['tokens']:.0f}" for row in of_budgets)])
    everything = _percent(result["rows"][0]["letters"])
    header = [f"letters read, % (all tokens: {everything})", *(f"{b / result['full_tokens']:.0%}" for b in budgets)]
    return markdown(header, lines) + made_by(result)


_KL = {"untouched": "KL(untouched ‖ exact)"}


def _nats(cell: dict[str, float]) -> str:
    return f"{cell['mean']:.2g} [{cell['low']:.2g}, {cell['high']:.2g}]"


FUNCTIONS = (
    forms_on_demo, forms_on_text, calibration_size, saliency, saliency_schedules, saliency_paired, legibility,
    legibility_paired, forecast, forecast_anew, dial, guard, legibility_focus,
)  # fmt: skip
