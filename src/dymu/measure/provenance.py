"""Provenance of measurements: device, versions, weights."""

from __future__ import annotations

import hashlib
import json
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from dymu.thresholds import Thresholds
from dymu.version import __version__


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"CPU ({_processor()}), {torch.get_num_threads()} threads"


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, this library and the packages, where installed, by name."""
    numbers = {"python": platform.python_version(), "dymu": __version__}
    for name in packages:
        with suppress(PackageNotFoundError):
            numbers[name] = version(name)
    return numbers


def fingerprint(model: nn.Module) -> str:
    """A hash of every parameter's name and shape and of a sample of its values."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        some = flat[:: max(len(flat) // 64, 1)].float().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + some.tobytes())
    return digest.hexdigest()[:16]


def short_hash(data: object) -> str:
    """16 hexadecimal digits that tell one piece of data, as JSON, from another."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def thresholds_hash(thresholds: Thresholds) -> str:
    """A hash of all that decides what merges: per budget its thresholds, and those in the prompt where there are any.

    Without the latter it is what earlier versions wrote.
    """
    decided = []
    for entry in thresholds.calibrated:
        in_prompt = [entry.images, entry.frames] if entry.images or entry.frames else []
        decided.append([entry.budget, entry.thresholds, *in_prompt])
    return short_hash(decided)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.machine()
    names = (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line)
    return next(names, platform.machine())
