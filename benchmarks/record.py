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
from dymu.evaluate.run import device_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def write(name: str, data: dict[str, Any]) -> Path:
    """Write `benchmarks/results/NAME.json`, whole or not at all, and return its path."""
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
    path = RESULTS / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(body, indent=1) + "\n")
    part.replace(path)
    return path


def _commit() -> str:
    command = ["git", "describe", "--always", "--exclude=*", "--dirty"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"
