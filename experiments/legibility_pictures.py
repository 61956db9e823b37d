"""Draw the two pictures of legibility.md.

`python -m experiments.legibility_pictures` makes legibility.png out of the result file, and legibility-pages.png, some
of its pages with what DToMe makes of them. Needs `training/requirements.txt`.
"""

from __future__ import annotations

import json
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from dymu.media.drawing import draw
from dymu.reducers import ThresholdMerge
from experiments import FOLDER, RESULTS
from experiments.legibility import GRID, Network, pages
from experiments.saliency_pictures import STYLES, save
from scenes import evaluation_pack

SHOWN = 0.3
TITLES = ("least text", "middle third", "most text")


def curve(result: dict[str, Any]) -> Figure:
    """Letters that are read against tokens, one panel for each third of the pages."""
    parts = result["parts"]
    figure, panels = plt.subplots(1, len(parts), figsize=(4.1 * len(parts), 4), sharey=True)
    for part, (panel, about) in enumerate(zip(panels, parts, strict=True)):
        everything = result["rows"][0]["parts"][part]["letters"]["mean"]
        panel.axhline(100 * everything, color="black", linewidth=1, label="all tokens")
        for method, (colour, marker, line) in STYLES.items():
            rows = [row["parts"][part] for row in result["rows"] if row["method"] == method]
            if not rows:
                continue
            tokens, cells = [row["tokens"] for row in rows], [row["letters"] for row in rows]
            low, high = ([100 * cell[end] for cell in cells] for end in ("low", "high"))
            panel.fill_between(tokens, low, high, color=colour, alpha=0.15)
            panel.plot(
                tokens, [100 * cell["mean"] for cell in cells], color=colour, marker=marker, linestyle=line,
                label=method, fillstyle="none",
            )  # fmt: skip
        panel.set_xscale("log")
        ticks = [20, 40, 80, 160, 320, result["full_tokens"]]
        panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set_xlabel(f"image tokens left of {result['full_tokens']}, mean")
        panel.set_title(f"{TITLES[part]}: {about['letters_a_page']:.0f} letters a page", fontsize=10)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("letters that are read, %")
    panels[0].legend(loc="center left", fontsize=8)
    figure.tight_layout()
    return figure


def strip(result: dict[str, Any]) -> Figure:
    """A page with little, with middling and with much text, and how its tokens merged."""
    network, packed = Network.load(), evaluation_pack()
    budget = round(SHOWN * result["full_tokens"])
    (row,) = (row for row in result["rows"] if (row["method"], row["budget"]) == ("DToMe", budget))
    reducer = ThresholdMerge(tuple(row["thresholds"]))
    shown = pages(packed, "heldout", result["pages"])
    order = np.argsort([len(each.middles) for each in shown], kind="stable")
    figure, panels = plt.subplots(2, 3, figsize=(9, 6.4), layout="constrained")
    for column, rank in enumerate((len(order) // 6, len(order) // 2, -len(order) // 6)):
        chosen = shown[order[rank]]
        with torch.no_grad():
            _, merges = network.merged(chosen, reducer)
        group = merges.group[0, 1:].view(GRID, GRID).numpy()
        seen = np.asarray(chosen.image.resize((GRID, GRID), Image.Resampling.BOX), dtype=np.float32)
        panels[0][column].imshow(chosen.image)
        panels[0][column].set_title(f"{len(chosen.middles)} letters", fontsize=10)
        panels[1][column].imshow(draw(chosen.image, group, seen))
        panels[1][column].set_title(f"{int(merges.kept) - 1} of {result['full_tokens']} tokens", fontsize=10)
    for panel in panels.flat:
        panel.axis("off")
    return figure


def main() -> None:
    """Draw both."""
    result = json.loads((RESULTS / "legibility.json").read_text())
    save(curve(result), FOLDER / "legibility.png", 110)
    save(strip(result), FOLDER / "legibility-pages.png", 80)


if __name__ == "__main__":
    plt.switch_backend("agg")
    main()
