"""One HTML file about what pictures keep, which needs nothing but itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from dymu.survey.summary import AtBudget, Costs, Summary
from dymu.survey.svg import Chart

THUMBNAIL = 320
"""Pixels of the longer side of a picture."""
ROOM = 1.06
"""How far beyond the largest value an axis goes."""
POINTS = 4000
"""Dots of a chart at most, so that the page stays small."""
BINS = 32
FAILURES = 50
"""Of pictures that could not be read, so many are named."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --muted: #5f6670; --line: #d9dce1; --band: #f5f6f8;
  --accent: #0072b2; --second: #c04a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --ink: #e6e8eb; --muted: #9aa2ad; --line: #343941;
  --band: #1e2126; --accent: #56b4e9; --second: #f0a030; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
p, dl { margin: .3rem 0 .8rem; max-width: 48rem; }
.muted, figcaption, dt { color: var(--muted); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 500; color: var(--muted); }
th:first-child, td:first-child { text-align: left; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 1rem 1.5rem; }
.panels figure { max-width: 32rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 45%), 1fr)); gap: .8rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .85rem; line-height: 1.35; margin-top: .2rem; }
figcaption b { color: var(--ink); font-weight: 600; }
img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--band); border-radius: .3rem;
  display: block; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--muted); }
.axis { stroke: var(--muted); } .grid { stroke: var(--line); stroke-width: .7; }
.bar { fill: var(--accent); } .bar:hover { fill: var(--second); }
.dots { fill: none; stroke: var(--accent); stroke-linecap: round; stroke-opacity: .75; }
.mean { stroke: var(--second); stroke-width: 1.5; } .equal { stroke: var(--second); stroke-width: 1.2; }
code, pre { font: .85rem/1.5 ui-monospace, monospace; }
pre { background: var(--band); padding: .6rem .8rem; border-radius: .3rem; white-space: pre-wrap;
  margin: .3rem 0 .8rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1rem; }
dd { margin: 0; min-width: 0; }
ul { padding-left: 1.2rem; }
"""


@dataclass(frozen=True)
class Thumbnail:
    """A picture of the page: with its groups drawn where that can be, its name, and its tokens."""

    picture: Image.Image
    name: str
    kept: int
    tokens: int


@dataclass(frozen=True)
class Made:
    """How the page was made: the command, and facts by name."""

    command: str
    facts: dict[str, str]


def page(summary: Summary, simplest: Sequence[Thumbnail], most_complex: Sequence[Thumbnail], made: Made) -> str:
    """The HTML."""
    count, full = len(summary.rows), summary.untouched
    each = f"{full.least:,}" if full.least == full.most else f"{full.mean:,.1f} on average"
    title = f"Image tokens of {_counted(count, 'picture')}"
    told = any(at.told for at in summary.budgets)
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{escape(made.facts.get('model', ''))} turns a picture into {each} tokens. At a budget, tokens that are "
        "alike merge: simple pictures keep fewer than the budget, complex ones more, and pictures like those of "
        "calibration keep as many on average.</p>",
        *_section("What they cost", "Tokens for the language model, as budgets count them.", _costs(summary)),
        *_section(
            "How many tokens pictures keep",
            "Pictures by the tokens that they keep; the line is the mean.",
            _panels((at, _histogram(at)) for at in summary.budgets),
        ),
        *_section(
            "Simple and complex pictures",
            f"At a budget of {_number(summary.shown.budget)}. Every outlined patch is one token for the language "
            "model; what merged has its mean colour.",
            *_pictures("Fewest tokens", simplest),
            *_pictures("Most tokens", most_complex),
        ),
        *_section(
            "Tokens and complexity",
            "What a picture keeps, against the bytes per pixel of a JPEG of it at 192 × 192 pixels, as the paper's "
            "figure 3 does. Spearman's correlation with its 95 % interval. " + _some(count),
            _panels((at, _complexity(summary, at), _correlation(at)) for at in summary.budgets),
        ),
        *(
            _section(
                "Told beforehand",
                "What is expected of a picture from its pixels alone, before the encoder runs, against what it keeps; "
                "on the line both are the same. The reserve is meant to be enough for 95 of 100 pictures like those of "
                "calibration.",
                _told(summary),
                _panels((at, _expected(at)) for at in summary.budgets),
            )
            if told
            else []
        ),
        *(_section("What could not be read", "", _failures(summary)) if summary.failed else []),
        *_section("How this was made", "", f"<pre>{escape(made.command)}</pre>", _facts(made.facts)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _section(title: str, text: str, *parts: str) -> list[str]:
    return [f"<h2>{title}</h2>", *([f"<p>{text}</p>"] if text else []), *parts]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _costs(summary: Summary) -> str:
    header = ("budget", "mean", "95 % keep at most", "fewest", "most", "all pictures", "of untouched")

    def line(name: str, costs: Costs) -> list[str]:
        return [
            name,
            f"{costs.mean:,.1f} ± {costs.sd:,.1f}",
            f"{costs.quantile:,}",
            f"{costs.least:,}",
            f"{costs.most:,}",
            f"{costs.total:,}",
            f"{costs.total / summary.untouched.total:.1%}",
        ]

    rows = [line(_number(at.budget), at.costs) for at in summary.budgets]
    note = '<p class="muted">Mean ± standard deviation over pictures.</p>'
    return _table(header, [*rows, line("untouched", summary.untouched)]) + note


def _panels(panels: Iterable[tuple[AtBudget, str] | tuple[AtBudget, str, str]]) -> str:
    figures = []
    for at, chart, *more in panels:
        caption = " ".join([f"<b>budget {_number(at.budget)}</b>", *more])
        figures.append(f"<figure>{chart}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="panels">{"".join(figures)}</div>'


def _histogram(at: AtBudget) -> str:
    high = int(at.kept.max()) + 1
    width = max(-(-high // BINS), 1)
    edges = np.arange(0, high + width, width)
    heights, _ = np.histogram(at.kept, edges)
    chart = Chart((0, float(edges[-1])), (0, float(heights.max()) * ROOM), "tokens kept", "pictures")
    chart.bars(edges.tolist(), heights.tolist())
    chart.vertical(at.costs.mean, f"mean {at.costs.mean:,.1f}", "mean")
    return chart.svg(f"Histogram of tokens kept at a budget of {_number(at.budget)}")


def _complexity(summary: Summary, at: AtBudget) -> str:
    across, up = float(summary.jpeg.max()) * ROOM, float(at.kept.max()) * ROOM
    chart = Chart((0, across), (0, up), "JPEG bytes per pixel", "tokens kept")
    some = _chosen(len(at.kept))
    chart.points(summary.jpeg[some].tolist(), at.kept[some].tolist())
    return chart.svg(f"Tokens kept at a budget of {_number(at.budget)} against JPEG bytes per pixel")


def _correlation(at: AtBudget) -> str:
    if at.complexity is None:
        return "no correlation can be told"
    return f"ρ = {at.complexity.value:.2f} [{at.complexity.low:.2f}, {at.complexity.high:.2f}]"


def _told(summary: Summary) -> str:
    header = ("budget", "expected, all", "kept, all", "reserve, all", "within the reserve")
    rows = [
        [
            _number(at.budget),
            f"{at.told.expected.sum():,.0f}",
            f"{at.costs.total:,}",
            f"{at.told.reserve.sum():,}",
            f"{at.told.covered.value:.1%} [{at.told.covered.low:.1%}, {at.told.covered.high:.1%}]",
        ]
        for at in summary.budgets
        if at.told is not None
    ]
    return _table(header, rows)


def _expected(at: AtBudget) -> str:
    assert at.told is not None
    most = float(max(at.kept.max(), at.told.expected.max())) * ROOM
    chart = Chart((0, most), (0, most), "tokens expected", "tokens kept")
    some = _chosen(len(at.kept))
    chart.points(at.told.expected[some].tolist(), at.kept[some].tolist())
    chart.line((0, 0), (most, most), "equal")
    return chart.svg(f"Tokens kept against tokens expected at a budget of {_number(at.budget)}")


def _pictures(title: str, thumbnails: Sequence[Thumbnail]) -> list[str]:
    figures = [
        f'<figure><img src="{data_url(one.picture)}" alt=""><figcaption><b>{one.kept:,} of {one.tokens:,}</b> '
        f"{escape(one.name)}</figcaption></figure>"
        for one in thumbnails
    ]
    return [f'<h3>{title}</h3><div class="pictures">{"".join(figures)}</div>'] if figures else []


def _failures(summary: Summary) -> str:
    named = [f"<li>{escape(row.error or '')}</li>" for row in summary.failed[:FAILURES]]
    more = len(summary.failed) - len(named)
    rest = f"<p>And {more:,} more, which the file of counts names.</p>" if more else ""
    return f"<p>{_counted(len(summary.failed), 'picture')}:</p><ul>{''.join(named)}</ul>{rest}"


def _facts(facts: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items()) + "</dl>"


def data_url(picture: Image.Image) -> str:
    """A small JPEG of a picture, within the page."""
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    small.save(written, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()


def _chosen(count: int) -> np.ndarray:
    """Which pictures are dots: all, or `POINTS` drawn from them, the same every time."""
    if count <= POINTS:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, POINTS, replace=False))


def _some(count: int) -> str:
    return f"Of {count:,} pictures {POINTS:,} drawn at random are shown." if count > POINTS else ""


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _number(budget: float) -> str:
    return f"{budget:,.0f}" if budget == round(budget) else f"{budget:,.1f}"
