"""The picture of every method under every form of unmerging: `python -m benchmarks.peers_chart docs/comparison.png`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.peers import Compared
from dymu.evaluation.methods import METHODS, UNTOUCHED, Row
from dymu.evaluation.summary import SHARE, share
from dymu.measure.charts import GREY, PALETTE, Chart

FILES = ("peers-50", "peers-30", "peers-15", "peers-8")
DRAWN = ("dtome", "hierarchical", "mm-tok", "v-scan", "div-prune", "vision-zip")
LOOKS = {"none": {"linestyle": ":", "marker": "v", "alpha": 0.7}, "exact": {"linestyle": "-", "marker": "o"}}


def main(output: Annotated[Path, typer.Argument(metavar="FILE.png")]) -> None:
    """Draw it."""
    chart = Chart(1, 2, (4.6, 3.6))
    answers, distance = chart.panels[0]
    compared = [Compared(name) for name in FILES]
    colours = {name: PALETTE[number] for number, name in enumerate(DRAWN)} | {"downscale": GREY}
    for method, colour in colours.items():
        for way, look in LOOKS.items():
            if method == "downscale" and way == "exact":
                continue
            label = METHODS[method].label if way == "exact" or method == "downscale" else None
            rows = [_row(one, method, way) for one in compared]
            for panel, field, bounds in ((answers, "scores", SHARE), (distance, "kl", None)):
                points = []
                for one, row in zip(compared, rows, strict=True):
                    values = one.of(row, field)
                    part = share(values, SHARE if bounds else (0.0, float("inf")))
                    factor = 100 if bounds else 1
                    tokens = float(one.of(row, "kept").mean())
                    points.append((tokens, factor * part.mean, factor * part.low, factor * part.high))
                chart.curve(panel, points, color=colour, label=label, **look)
    full = share(compared[1].of(UNTOUCHED, "scores"), SHARE)
    answers.axhline(100 * full.mean, color="black", linewidth=0.8, label="untouched")
    for panel in (answers, distance):
        panel.set_xscale("log")
        panel.set_xticks([20, 38, 77, 128], labels=["20", "38", "77", "128"])
        panel.minorticks_off()
        panel.set_xlabel("image tokens, of 256")
    answers.set_ylabel("right answers, %")
    distance.set_yscale("log")
    distance.set_ylabel("KL from the untouched model, nats")
    chart.panels[0][0].plot([], [], color="black", linestyle="-", marker="o", markersize=4, label="exact unmerging")
    chart.panels[0][0].plot(
        [], [], color="black", linestyle=":", marker="v", markersize=4, label="none: a shorter prompt"
    )
    chart.save(output, legend_columns=5)


def _row(compared: Compared, method: str, way: str) -> Row:
    return next(forms[way] for forms in compared.methods() if forms["none"].method == method)


if __name__ == "__main__":
    typer.run(main)
