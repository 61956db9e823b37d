"""Is this machine ready? ``python -m training.vlm.check``, before hours or money are spent on it.

A fixed batch must lose on the accelerator what it loses on a CPU, and three steps after a checkpoint must be the three
steps that follow it without one. ``--record`` writes the CPU's losses, which are kept in ``results/``.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import torch
import typer

from training.vlm import base
from training.vlm.data import TRAINED_KINDS, Batch, Batches
from training.vlm.train import default_device, setup

RECORD = Path(__file__).parents[1] / "results" / "vlm-check.json"
TOLERANCE = 0.02
"""Relative: bfloat16 adds in another order on every machine."""


def fixed_losses(pack: Path, device: torch.device) -> tuple[dict[str, float], Batch]:
    """Mean loss by kind of the first batch of two, untrained, without autocast to lower precision."""
    trainer, examples = setup(pack, device)
    trainer.model.float()
    batch = Batches(examples, [("Hello!", "Hello! How can I help you today?")], 2)[0]
    with torch.no_grad():
        _, scores = trainer.objective(batch.to(device), 1.0)
    names = (*TRAINED_KINDS, "places")
    means = (scores.loss / scores.count).tolist()
    return {name: value for name, value in zip(names, means, strict=True) if value == value}, batch


def resumes(pack: Path, device: torch.device) -> float:
    """The largest difference of a weight after four steps, two of them after a checkpoint or without one."""
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        for resumed in (False, True):
            trainer, examples = setup(pack, device)
            batches = Batches(examples, [], 2)
            if resumed:
                trainer.load(path)
            for step in range(2 * resumed, 4):
                trainer.one_step(batches[step], 0.05 if step < 1 else 0.5)
                if step == 1:
                    trainer.save(path)
            ends.append({name: value.detach().clone() for name, value in trainer.trained().items()})
    return max(float((value - ends[1][name]).abs().max()) for name, value in ends[0].items())


def main(
    pack: Annotated[Path | None, typer.Option(help="The training pack.")] = None,
    record: Annotated[bool, typer.Option(help="Write the losses instead of comparing with them.")] = False,
) -> None:
    """Check, and say what differs."""
    torch.set_float32_matmul_precision("highest")
    device = default_device()
    pack = pack or base.training_pack()
    losses, batch = fixed_losses(pack, device)
    digest = _digest(batch)
    if record:
        RECORD.write_text(json.dumps({"batch": digest, "loss": losses}, indent=2) + "\n", encoding="utf-8")
        print(f"{RECORD}: {losses}")
        return
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    if recorded["batch"] != digest:
        print("the batch is another one: the pack, Pillow or numpy differ, so that losses cannot be compared")
    for name, value in losses.items():
        expected = recorded["loss"].get(name, float("nan"))
        verdict = "ok" if abs(value - expected) <= TOLERANCE * expected else "DIFFERS"
        print(f"{name:12} {value:9.4f}, on the CPU {expected:9.4f}  {verdict}")
    difference = resumes(pack, device)
    print(f"resumed weights differ by at most {difference:.1e}  {'ok' if difference < 1e-3 else 'DIFFERS'}")
    print(f"{base.folder()} holds what training starts from")


def _digest(batch: Batch) -> str:
    """Of everything in a batch."""
    whole = hashlib.sha256()
    for field in fields(batch):
        whole.update(getattr(batch, field.name).numpy().tobytes())
    return whole.hexdigest()[:16]


if __name__ == "__main__":
    typer.run(main)
