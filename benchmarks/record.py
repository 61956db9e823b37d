"""Result files: numbers with their command, date, device and versions."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dymu
from dymu.files import whole_file
from dymu.measure.provenance import device_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def write(name: str, data: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write NAME.json into the folder, whole or not at all, and return its path."""
    module = sys.modules["__main__"].__spec__
    command = ["python", "-m", module.name if module else sys.argv[0], *sys.argv[1:]]
    body = {
        "command": shlex.join(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": {
            "dymu": dymu.__version__,  # which need not be installed
            "torch": version("torch"),
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        **data,
    }
    path = folder / f"{name}.json"
    with whole_file(path) as partial:
        partial.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def made_by(result: dict[str, Any]) -> str:
    """A line below a table in Markdown: which command made the result file, when and where."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"\n\n<sub>`{result['command']}`, {result['date'][:10]}, {result['device']}, {versions}</sub>"


def _commit() -> str:
    command = ["git", "describe", "--always", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
