"""How well the demo answers, untouched and with merged image tokens.

``python -m training.evaluate --json training/results/evaluation.json`` asks every held-out
question of the stock model, then again with DyMU at each budget, with and without unmerging.
"""

import datetime
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor

from training.export import DEMO
from training.heldout import Asked, heldout
from training.scenes import TEST_SEED
from training.train import SEED

BATCH = 20
UNMERGE: tuple[Literal["exact", "none"], ...] = ("exact", "none")


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share."""
    share = right / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (middle - spread) / scale, (middle + spread) / scale


def answers(
    model: Any, processor: Any, asked: list[Asked], handle: Any = None, label: str = ""
) -> tuple[list[str], list[int]]:
    """Greedy answers, and how many image tokens each image kept."""
    said: list[str] = []
    kept: list[int] = []
    for start in track(range(0, len(asked), BATCH), description=label):
        rows = asked[start : start + BATCH]
        prompts = [f"<user><image>{row.text}<assistant>" for row in rows]
        inputs = processor(images=[row.image for row in rows], text=prompts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=10, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        said += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        kept += list(handle.last.kept) if handle is not None else [256] * len(rows)
    return said, kept


def score(asked: list[Asked], said: list[str], kept: list[int]) -> dict[str, Any]:
    """Exact match per kind; ``all`` is over the kinds with trained phrasings."""
    kinds: dict[str, list[bool]] = {}
    for row, text in zip(asked, said, strict=True):
        kinds.setdefault(row.kind, []).append(text == row.answer)
    trained = [hits for kind, hits in kinds.items() if kind != "unseen phrasing"]
    kinds["all"] = [hit for hits in trained for hit in hits]
    table = {}
    for kind, hits in kinds.items():
        low, high = wilson(sum(hits), len(hits))
        table[kind] = {"right": sum(hits), "n": len(hits), "accuracy": sum(hits) / len(hits),
                       "low": low, "high": high}  # fmt: skip
    mean = sum(kept) / len(kept)
    return {"kept_mean": mean, "kept_share": mean / 256, "kinds": table}


@contextmanager
def merged(model: Any, thresholds: Path, budget: float, unmerge: Literal["exact", "none"]) -> Iterator[Any]:
    """The model with its image tokens merged, for a moment."""
    import dymu

    handle = dymu.apply(model, str(thresholds), budget=budget, unmerge=unmerge)
    try:
        yield handle
    finally:
        handle.remove()


def markdown(settings: list[dict[str, Any]]) -> str:
    """One row per setting, one column per kind."""
    kinds = list(settings[0]["kinds"])
    first = settings[0]["kinds"]
    lines = [
        "| setting | tokens | " + " | ".join(f"{kind} (n={first[kind]['n']})" for kind in kinds),
        "| --- " * (2 + len(kinds)),
    ]
    for row in settings:
        cells = []
        for kind in kinds:
            cell = row["kinds"][kind]
            cells.append(f"{100 * cell['accuracy']:.0f} [{100 * cell['low']:.0f}, {100 * cell['high']:.0f}]")
        lines.append(f"| {row['name']} | {row['kept_mean']:.0f} | " + " | ".join(cells))
    return "\n".join(line + " |" for line in lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(
    model_folder: Annotated[Path, typer.Option("--model")] = DEMO,
    thresholds: Path = DEMO / "thresholds.json",
    budgets: str = "0.5,0.3,0.15",
    out: Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")] = None,
    untouched_only: bool = False,
    every: Annotated[int, typer.Option(help="Ask only every n-th question.")] = 1,
    show_errors: bool = False,
) -> None:
    """Print a Markdown table; write the numbers after every setting when asked."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    processor = AutoProcessor.from_pretrained(model_folder)
    model = AutoModelForImageTextToText.from_pretrained(model_folder).eval()
    asked = heldout()[::every]
    began = time.monotonic()
    said, kept = answers(model, processor, asked, label="untouched")
    settings = [{"name": "untouched", **score(asked, said, kept)}]
    _write(out, settings, model, began)
    if show_errors:
        for row, text in zip(asked, said, strict=True):
            if text != row.answer:
                print(f"{row.kind:16} {row.text:50} {row.answer:20} {text}")
    for budget in [] if untouched_only else map(float, budgets.split(",")):
        for unmerge in UNMERGE:
            name = f"{budget:.0%}, unmerge {unmerge}"
            with merged(model, thresholds, budget, unmerge) as handle:
                said, kept = answers(model, processor, asked, handle, name)
            found = score(asked, said, kept)
            settings.append({"name": name, "budget": budget, "unmerge": unmerge, **found})
            _write(out, settings, model, began)
    print(markdown(settings))


def _write(out: Path | None, settings: list[dict[str, Any]], model: Any, began: float) -> None:
    """The numbers so far, with what they were measured by."""
    if out is None:
        return
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python -m training.evaluate " + " ".join(sys.argv[1:]),
        "seed": {"training": SEED, "held-out scenes": TEST_SEED},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "dymu": _version("dymu")},
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "dtype": str(model.dtype),
        "seconds": round(time.monotonic() - began),
        "settings": settings,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
