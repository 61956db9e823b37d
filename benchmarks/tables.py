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

PAGES = (ROOT / "README.md", ROOT / "models" / "demo" / "README.md")
EVALUATION = ROOT / "training" / "results" / "evaluation.json"


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


def speed() -> str:
    """Time ratios, one photo, batch 1."""
    result = _load(RESULTS / "speed.json")
    rows = [
        [f"{row['kept']} of {result['full_tokens']}",
         f"{row['ratio_encoder']:.2f}", f"{row['ratio_prefill']:.2f}", f"**{row['ratio_first_token']:.2f}**",
         f"{row['ratio_decode']:.2f}"]
        for row in reversed(result["rows"])
    ]  # fmt: skip
    header = ["image tokens", "encoder", "prefill", "encoder + prefill", "each token after"]
    return _markdown(header, rows) + _made_by(result)


def accuracy() -> str:
    """Accuracy over all kinds of questions, with its 95 % interval."""
    result = _load(EVALUATION)
    rows = []
    for setting in result["settings"]:
        cell = setting["kinds"]["all"]
        rows.append(
            [setting["name"], f"{setting['kept_mean']:.0f}", f"{100 * cell['accuracy']:.1f}",
             f"{100 * cell['low']:.1f} to {100 * cell['high']:.1f}"]
        )  # fmt: skip
    count = result["settings"][0]["kinds"]["all"]["n"]
    header = ["", "tokens, mean", f"right answers, % of {count}", "95 % interval"]
    return _markdown(header, rows) + _made_by(result)


def accuracy_by_kind() -> str:
    """Accuracy per kind of question, percent with its 95 % interval."""
    result = _load(EVALUATION)
    kinds = result["settings"][0]["kinds"]
    header = ["", "tokens", *(f"{kind} (n={cell['n']})" for kind, cell in kinds.items())]
    rows = []
    for setting in result["settings"]:
        cells = [setting["kinds"][kind] for kind in kinds]
        rows.append(
            [setting["name"], f"{setting['kept_mean']:.0f}"]
            + [f"{100 * c['accuracy']:.0f} [{100 * c['low']:.0f}, {100 * c['high']:.0f}]" for c in cells]
        )
    return _markdown(header, rows) + _made_by(result)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function for function in (kept_tokens, speed, accuracy, accuracy_by_kind)
}


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
