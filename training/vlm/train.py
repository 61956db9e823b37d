"""Train: ``python -m training.vlm.train --minutes 9 --total 20``, again and again until the plan is done.

The plan is a length of time (or, for trials, a number of steps), and everything that changes in the course of it is a
function of the fraction that is done. The fraction is in the checkpoint, so a run that was stopped, by its
``--minutes`` or by a kill, goes on in the next call as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from scenes import Materials
from training.vlm import base
from training.vlm.assemble import INDEX, LANGUAGE_PREFIX, PARTS, assemble
from training.vlm.data import BACKGROUND, TRAINED_KINDS, Batch, Batches, Chat, Examples, read_talks
from training.vlm.lora import add_lora
from training.vlm.losses import Objective, Scores

SEED = 20261122
RANK, SCALE = 32, 1.0
STAGE_1 = 0.1
"""Part of the plan in which the projector learns alone."""

PEAKS = {"projector": (1e-3, 5e-4), "lora": (0.0, 4e-4), "tower": (0.0, 4e-5)}
"""Learning rates of the two stages."""

DENSE_WEIGHTS = (1.0, 0.2)
WARM, FLOOR = 0.05, 0.02
"""Part of a stage in which rates rise, and what part of the peak they end at."""


def schedule(fraction: float) -> tuple[int, float]:
    """The stage at a fraction of the plan (0 or 1), and by what the peak rates are multiplied."""
    stage = int(fraction >= STAGE_1)
    begin, end = ((0.0, STAGE_1), (STAGE_1, 1.0))[stage]
    done = min(1.0, (fraction - begin) / (end - begin))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return stage, min(1.0, done / WARM + 0.01) * (FLOOR + (1 - FLOOR) * cosine)


@dataclass
class Progress:
    """How far a plan is: steps done, and seconds spent on them."""

    step: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """How long to train in all: so many seconds, or so many steps."""

    seconds: float = math.inf
    steps: float = math.inf

    def fraction(self, progress: Progress) -> float:
        """How much of it is done."""
        return max(progress.seconds / self.seconds, progress.step / self.steps)


class Trainer:
    """A model in training: all that a checkpoint holds."""

    def __init__(
        self, model: LlavaForConditionalGeneration, processor: LlavaProcessor, examples: Examples, device: torch.device
    ) -> None:
        torch.manual_seed(SEED)
        self.model, self.processor, self.device = model.to(device).train(), processor, device
        add_lora(model.model.language_model, RANK, SCALE)
        model.model.language_model.to(device)
        for module in (model.model.language_model, model.lm_head):
            for parameter in module.parameters():
                if not parameter.requires_grad:  # frozen weights need no more bits than they came with
                    parameter.data = parameter.data.to(torch.bfloat16)
        self.objective = Objective(model, examples.chat, examples.first_token(BACKGROUND), examples.colour_tokens())
        self.groups = {
            "projector": list(model.model.multi_modal_projector.parameters()),
            "lora": [p for p in model.model.language_model.parameters() if p.requires_grad],
            "tower": list(model.model.vision_tower.parameters()),
        }
        self.optimiser = torch.optim.AdamW(
            [{"params": group, "name": name, "lr": 0.0} for name, group in self.groups.items()],
            betas=(0.9, 0.98), weight_decay=0.01, fused=True,
        )  # fmt: skip
        self.progress = Progress()

    def one_step(self, batch: Batch, fraction: float) -> Scores:
        """One update at a fraction of the plan."""
        stage, part = schedule(fraction)
        for group in self.optimiser.param_groups:
            group["lr"] = PEAKS[group["name"]][stage] * part
            for parameter in group["params"]:
                parameter.requires_grad_(PEAKS[group["name"]][stage] > 0)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss, scores = self.objective(batch.to(self.device), DENSE_WEIGHTS[stage])
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.groups.values():  # apart, since their gradients differ in size
            torch.nn.utils.clip_grad_norm_(group, 1.0)
        self.optimiser.step()
        self.progress.step += 1
        return scores

    def trained(self) -> dict[str, torch.Tensor]:
        """Everything that is not as it came from the packages, by the model's own names."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {names[id(p)]: p for group in self.groups.values() for p in group}

    def save(self, path: Path) -> None:
        """Write beside it and rename: a kill leaves the last good checkpoint."""
        state = {
            "progress": asdict(self.progress),
            "weights": {name: p.detach() for name, p in self.trained().items()},
            "optimiser": self.optimiser.state_dict(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".partial")
        torch.save(state, scratch)
        os.replace(scratch, path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, weights_only=True, map_location=self.device)
        for name, parameter in self.trained().items():
            parameter.copy_(state["weights"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.progress = Progress(**state["progress"])

    @torch.no_grad()
    def restore(self, parts: Path) -> None:
        """Go on from exported parts where the checkpoint is lost; the optimiser begins anew."""
        with tempfile.TemporaryDirectory() as folder:
            whole = LlavaForConditionalGeneration.from_pretrained(
                assemble(parts, Path(folder) / "model", lambda: {}), dtype=torch.float32
            )
        saved = dict(whole.named_parameters())  # tower and projector; the language model in it is at random
        for file in parts.glob(PARTS):
            saved |= {f"model.{name}": value for name, value in load_file(file).items() if "lora" in name}
        for name, parameter in self.trained().items():
            parameter.copy_(saved[name.replace(".language_model.", f".{LANGUAGE_PREFIX}")])
        self.progress = Progress(**json.loads((parts / INDEX).read_text(encoding="utf-8"))["progress"])

    def compile(self) -> None:
        """Compile the layers, which are alike: one compilation each serves all of a kind."""
        for layer in self.model.model.language_model.layers:
            layer.compile()
        for name, layer in self.model.model.vision_tower.named_modules():
            if name.rsplit(".", 1)[-1].isdigit():
                layer.compile()


class Tally:
    """Scores since the last report, summed where they were made: reading them would wait for the accelerator."""

    def __init__(self) -> None:
        self.scores: Scores | None = None
        self.began = time.perf_counter()
        self.images = 0

    def add(self, scores: Scores, images: int) -> None:
        """One step's."""
        if self.scores:
            scores = Scores(*(a + b for a, b in zip(vars(self.scores).values(), vars(scores).values(), strict=True)))
        self.scores = scores
        self.images += images

    def report(self) -> dict[str, Any]:
        """Images a second; mean loss and part of tokens that greedy gets right, by kind."""
        assert self.scores is not None
        loss, right, count = (value.tolist() for value in vars(self.scores).values())
        rate = self.images / (time.perf_counter() - self.began)
        seen = [k for k, number in enumerate(count) if number]
        names = (*TRAINED_KINDS, "places")
        return {
            "images_per_second": round(rate, 2),
            "loss": {names[k]: round(loss[k] / count[k], 3) for k in seen},
            "right": {names[k]: round(right[k] / count[k], 3) for k in seen},
        }


def loader(examples: Examples, talks: list[tuple[str, str]], batch: int, first: int, workers: int) -> Iterator[Batch]:
    """Batches from a step on, made ahead by workers."""
    options: dict[str, Any] = {"prefetch_factor": 3} if workers else {}
    return iter(
        DataLoader(
            Batches(examples, talks, batch, first), batch_size=None, num_workers=workers,
            pin_memory=torch.cuda.is_available(), **options,
        )
    )  # fmt: skip


def setup(pack: Path, device: torch.device) -> tuple[Trainer, Examples]:
    """The untrained model on a device, and what it is to learn from."""
    model, processor = base.build_model(SEED)
    examples = Examples(Materials(pack), Chat(processor.tokenizer), SEED)
    return Trainer(model, processor, examples, device), examples


def default_device() -> torch.device:
    """The accelerator, if there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def main(
    minutes: Annotated[float, typer.Option(help="Of this call, all included.")] = 9.0,
    total: Annotated[float, typer.Option(help="Minutes of training in the whole plan.")] = 20.0,
    steps: Annotated[int, typer.Option(help="A plan of so many steps instead, for trials.")] = 0,
    batch: Annotated[int, typer.Option(help="Images in a step.")] = 64,
    workers: Annotated[int, typer.Option(help="Processes that compose images.")] = 16,
    pack: Annotated[Path | None, typer.Option(help="The training pack.")] = None,
    talk: Annotated[Path | None, typer.Option(help="What talk.py wrote; 'none' leaves it out.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Continued if it is there.")] = None,
    parts: Annotated[Path | None, typer.Option(help="Exported parts to go on from where no checkpoint is.")] = None,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 60.0,
    log_every: Annotated[int, typer.Option(help="Steps between reports.")] = 25,
    log: Annotated[Path | None, typer.Option(help="Where reports go, a JSON object a line.")] = None,
    compiled: Annotated[bool, typer.Option(help="Compile the layers; costs a minute or two at first.")] = False,
    probe: Annotated[bool, typer.Option(help="Measure only: save nothing.")] = False,
) -> None:
    """Train as long as this call may, or until the plan is done."""
    called = time.perf_counter()
    torch.set_float32_matmul_precision("high")
    device = default_device()
    trainer, examples = setup(pack or base.training_pack(), device)
    checkpoint = checkpoint or base.folder() / "checkpoint.pt"
    if checkpoint.exists() and not probe:
        trainer.load(checkpoint)
    elif parts:
        trainer.restore(parts)
    if compiled:
        trainer.compile()
    talks = [] if str(talk) == "none" else read_talks(talk or base.folder() / "talk.jsonl")
    plan = Plan(steps=steps) if steps else Plan(seconds=60 * total)
    batches = loader(examples, talks, batch, trainer.progress.step, workers)
    tally, saved, last, first = Tally(), time.perf_counter(), time.perf_counter(), True
    print(f"begins at step {trainer.progress.step}, {plan.fraction(trainer.progress):.1%} of the plan", flush=True)
    while (fraction := plan.fraction(trainer.progress)) < 1 and time.perf_counter() - called < 60 * minutes:
        scores = trainer.one_step(next(batches), fraction)
        tally.add(scores, batch)
        if first:  # compiling and starting the workers are no part of the plan
            float(scores.count.sum())
            tally, last, first = Tally(), time.perf_counter(), False
        now = time.perf_counter()
        trainer.progress.seconds += now - last
        last = now
        if trainer.progress.step % log_every == 0 and tally.scores:
            report = {"step": trainer.progress.step, "fraction": round(plan.fraction(trainer.progress), 4)}
            report |= tally.report()
            print(json.dumps(report), flush=True)
            if log:
                with log.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(report) + "\n")
            tally = Tally()
        if not probe and now - saved > save_every:
            trainer.save(checkpoint)
            saved = time.perf_counter()
    if not probe:
        trainer.save(checkpoint)
    fraction = plan.fraction(trainer.progress)
    if trainer.progress.seconds:
        rate = (trainer.progress.step - 1) * batch / trainer.progress.seconds
        print(f"{rate:.1f} images a second; {rate * 60 * total:,.0f} in a plan of {total:g} minutes", flush=True)
    if device.type == "cuda":
        print(f"at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of memory", flush=True)
    print(f"ends at step {trainer.progress.step}, {fraction:.1%} of the plan{' (not saved)' * probe}", flush=True)


if __name__ == "__main__":
    typer.run(main)
