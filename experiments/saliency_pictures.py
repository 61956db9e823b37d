"""Draw the two pictures of saliency.md.

`python -m experiments.saliency_pictures` makes saliency.png out of the result file, and saliency-examples.png by
running the network on three held-out photos with the thresholds of the result file. Needs `training/requirements.txt`.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dymu.media import images
from dymu.reducers import ThresholdMerge
from experiments import FOLDER, RESULTS
from experiments.saliency import HELD_OUT, MAIN, Network, processor
from experiments.saliency_decoder import SIZE
from training.assets import photos
from training.tower import MEAN, STD

STYLES = {
    "DToMe": ("#0b5fa5", "o", "-"),
    "ToMe": ("#d9760f", "s", "-"),
    "smaller image": ("#4f8f4f", "^", "--"),
    "pooling": ("#8a5aa8", "v", "--"),
    "random": ("#777777", "x", ":"),
}
"""Colour, marker and line of each method."""

SHOWN = (0.3, 0.15)


def curve(sizes: list[dict[str, Any]]) -> Figure:
    """Correlation with the map of all tokens against tokens, one panel a size."""
    figure, panels = plt.subplots(1, len(sizes), figsize=(4.7 * len(sizes), 4.2), sharey=True, squeeze=False)
    for panel, result in zip(panels[0], sizes, strict=True):
        for method, (colour, marker, line) in STYLES.items():
            rows = [
                r for r in result["rows"] if r["method"] == method and r.get("schedule") in (None, "reverse_linear")
            ]
            share = [100 * row["tokens"] / result["full_tokens"] for row in rows]
            cells = [row["correlation"] for row in rows]
            panel.fill_between(share, [c["low"] for c in cells], [c["high"] for c in cells], color=colour, alpha=0.15)
            panel.plot(
                share, [c["mean"] for c in cells], color=colour, marker=marker, linestyle=line, label=method,
                fillstyle="none", markersize=11 if method == "DToMe" else 6,  # the two lie on one another
            )  # fmt: skip
        panel.set_xscale("log")
        panel.set_xticks([10, 15, 20, 30, 50, 75], labels=["10", "15", "20", "30", "50", "75"])
        panel.minorticks_off()
        panel.set_xlabel("image tokens left, % of all (mean)")
        panel.set_title(f"{result['size_px']} px, {result['full_tokens']} tokens")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("correlation with the map of all tokens")
    panels[0][-1].legend(loc="lower right")
    figure.tight_layout()
    return figure


def strip(result: dict[str, Any]) -> Figure:
    """The photos that keep the least, the median and the most at the first of SHOWN, and their saliency."""
    network, prepare = Network.load(), processor(result["size_px"])
    held_out = photos(*HELD_OUT)
    order = sorted(range(len(held_out)), key=_pair(result, SHOWN[0])["kept"].__getitem__)
    figure, panels = plt.subplots(3, 2 + len(SHOWN), figsize=(8.4, 7), layout="constrained")
    ranks = {"keeps the fewest": 0, "the median": len(order) // 2, "keeps the most": -1}
    for line, (title, rank) in zip(panels, ranks.items(), strict=True):
        photo = held_out[order[rank]]
        pixels = prepare(images=[images.load(photo.path).image])["pixel_values"]
        with torch.inference_mode():
            maps = [(network.decoded(network.dense(pixels), pixels), f"all {result['full_tokens']} tokens")]
            for share in SHOWN:
                features, kept = network.merged(pixels, ThresholdMerge(tuple(_row(result, share)["thresholds"])))
                maps.append((network.decoded(features, pixels), f"DToMe {share:.0%}: {kept} tokens"))
        print(photo.path.name, photo.author, photo.licence)
        line[0].imshow(_seen(pixels))
        line[0].set_title(title, fontsize=10)
        for panel, (saliency, tokens) in zip(line[1:], maps, strict=True):
            panel.imshow(saliency, vmin=0, vmax=1, cmap="magma")
            panel.set_title(tokens, fontsize=10)
    for panel in panels.flat:
        panel.axis("off")
    return figure


def _pair(result: dict[str, Any], share: float) -> dict[str, Any]:
    sought = (round(share * result["full_tokens"]), MAIN)
    (pair,) = (pair for pair in result["dtome_against_tome"] if (pair["budget"], pair["schedule"]) == sought)
    return dict(pair)


def _row(result: dict[str, Any], share: float) -> dict[str, Any]:
    sought = ("DToMe", round(share * result["full_tokens"]), MAIN)
    (row,) = (r for r in result["rows"] if (r["method"], r.get("budget"), r.get("schedule")) == sought)
    return dict(row)


def _seen(pixels: Tensor) -> Tensor:
    """Normalised pixels [1, 3, height, width] as a picture again."""
    return (pixels[0].permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)).clamp(0, 1)


def save(figure: Figure, path: Path, dpi: int) -> None:
    """A PNG without transparency, packed tightly to keep the repository small."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    Image.open(buffer).convert("RGB").save(path, optimize=True)
    print(path, path.stat().st_size, "bytes")


def main() -> None:
    """Draw both."""
    sizes = json.loads((RESULTS / "saliency.json").read_text())["sizes"]
    (usual,) = (result for result in sizes if result["size_px"] == SIZE)
    save(curve(sizes), FOLDER / "saliency.png", 110)
    save(strip(usual), FOLDER / "saliency-examples.png", 80)


if __name__ == "__main__":
    plt.switch_backend("agg")
    main()
