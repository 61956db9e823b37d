"""Train the demo model: ``python -m training.train``.

Two stages on cached features of the frozen tower. First the projector and the word embeddings
alone, from dense supervision; then everything but the tower, from answers, with the dense loss
kept at ``DENSE_WEIGHT``. From answers alone, naming stays at chance for a long time.

Every ``SAVE_EVERY`` steps the state goes to disk, so a killed run goes on where it stopped.
"""

import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training import attention
from training.cache import cache_root
from training.features import Example, FeatureStore, cache_features
from training.model import build_model
from training.packing import PREFIX, Batch, DenseWords, pack, prefix_id

SEED = 20250417
DENSE_WEIGHT = 0.3
SAVE_EVERY = 100
DENSE_PARTS = {"name": 1.0, "colour": 0.4, "column": 0.2, "row": 0.2}


class Trainer:
    """The model, its optimiser and where it is: all that a checkpoint holds."""

    def __init__(self, dense_steps: int, steps: int, batch: int, asked: int, peak: float) -> None:
        torch.manual_seed(SEED)
        self.model = build_model()
        self.model.model.vision_tower.requires_grad_(False)
        self.model.model.language_model.set_attn_implementation(attention.register(PREFIX))
        self.dense_steps, self.steps = dense_steps, steps
        self.batch, self.asked, self.peak = batch, asked, peak
        self.step = 0
        self.words = DenseWords()
        self.store = FeatureStore()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.98), weight_decay=0.02)

    def save(self, path: Path) -> None:
        """Write to a scratch file first: a kill leaves the last good checkpoint."""
        weights = {name: value for name, value in self.model.state_dict().items() if "vision_tower" not in name}
        state = {"step": self.step, "weights": weights, "optimiser": self.optimiser.state_dict()}
        scratch = path.with_suffix(".partial")
        torch.save(state, scratch)
        os.replace(scratch, path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["weights"], strict=False)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]

    def one_step(self) -> dict[str, float]:
        """One update; everything random in it depends on the step's number alone."""
        rng = np.random.default_rng((SEED, self.step))
        learns_answers = self.step >= self.dense_steps
        rate = self._rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        asked = self.asked if learns_answers else 1
        batch = pack(self._draw(rng, learns_answers), self.words, asked, rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            visual = self.model.model.multi_modal_projector(batch.features)
            dense, named = self._dense_loss(visual, batch)
            loss, right = dense, float("nan")
            if learns_answers:
                answer, right = self._answer_loss(visual, batch)
                loss = answer + DENSE_WEIGHT * dense
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        return {"loss": loss.item(), "dense": dense.item(), "named": named, "right": right}

    def _rate(self) -> float:
        """Warm up in each stage, then down a cosine."""
        answers = self.step >= self.dense_steps
        begin = self.dense_steps if answers else 0
        end = self.steps if answers else self.dense_steps * 2
        warm = min(1.0, (self.step - begin + 1) / 100)
        at = (self.step - begin) / (end - begin)
        return self.peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, at))))

    def _draw(self, rng: np.random.Generator, learns_answers: bool) -> list[Example]:
        """Scenes for one step; the first tenth of the answers is about few things."""
        count = len(self.store)
        most = 2 if self.step - self.dense_steps < 0.06 * self.steps and learns_answers else 9
        examples: list[Example] = []
        while len(examples) < self.batch:
            example = self.store[int(rng.integers(count))]
            if len(example.facts.items) <= most:
                examples.append(example)
        return examples

    def _dense_loss(self, visual: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, float]:
        """How badly each image token names what is at its place, and how often it is right."""
        table = self.model.get_input_embeddings().weight
        total = visual.new_zeros(())
        named = 0.0
        for key, weight in DENSE_PARTS.items():
            logits = (visual @ table[self.words.unique[key]].T).flatten(0, 1).float()
            targets = batch.dense[key].flatten()
            if key == "name":  # most of a scene is background: things weigh more
                background = targets == self._background
                rarely = torch.where(background, 0.15, 1.0)
                each = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
                known = (targets >= 0) * rarely
                total = total + weight * (each * known).sum() / known.sum().clamp(min=1)
                things = (targets >= 0) & ~background
                hits = (logits.argmax(1) == targets) & things
                named = float(hits.sum() / things.sum().clamp(min=1))
            elif bool((targets >= 0).any()):
                total = total + weight * F.cross_entropy(logits, targets, ignore_index=-100)
        return total, named

    @property
    def _background(self) -> int:
        return self.words._index["name"]["background"]

    def _answer_loss(self, visual: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, float]:
        """Cross entropy of the answers, and the share of their tokens that greedy gets right."""
        language = self.model.model.language_model
        embed = language.embed_tokens
        rows = len(batch.ids)
        front = embed(torch.full((rows, 1), prefix_id()))
        inputs = torch.cat([front, visual.to(front.dtype), embed(batch.ids)], dim=1)
        ahead = torch.arange(inputs.shape[1] - batch.ids.shape[1]).expand(rows, -1)
        hidden = language(
            inputs_embeds=inputs,
            attention_mask=batch.mask,
            position_ids=torch.cat([ahead, batch.positions], dim=1),
            use_cache=False,
        ).last_hidden_state[:, ahead.shape[1] :]
        supervised = batch.targets >= 0
        logits = (hidden[supervised] @ embed.weight.T).float()
        targets = batch.targets[supervised]
        right = float((logits.argmax(1) == targets).float().mean())
        return F.cross_entropy(logits, targets), right


def main(
    scenes: int = 20000,
    dense_steps: int = 1000,
    steps: int = 11500,
    batch: int = 8,
    asked: int = 14,
    peak: float = 1.3e-3,
    threads: int = 2,
    fresh: bool = False,
    export: bool = True,
    wait_for_features: bool = True,
) -> None:
    """Fetch, compose, cache, train, export."""
    torch.set_num_threads(threads)
    if wait_for_features:
        cache_features(scenes)
    path = cache_root() / "checkpoint.pt"
    trainer = Trainer(dense_steps, steps, batch, asked, peak)
    if path.exists() and not fresh:
        trainer.load(path)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    began = time.monotonic()
    sums: dict[str, list[float]] = {}
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps, completed=trainer.step)
        while trainer.step < steps:
            for key, value in trainer.one_step().items():
                sums.setdefault(key, []).append(value)
            progress.update(task, completed=trainer.step)
            if trainer.step % 50 == 0:
                means = "  ".join(f"{key} {np.mean(value):.3f}" for key, value in sums.items())
                seconds = time.monotonic() - began
                progress.print(f"step {trainer.step}  {means}  scenes {len(trainer.store)}"
                               f"  {seconds:.0f} s")  # fmt: skip
                sums.clear()
            if trainer.step % SAVE_EVERY == 0 or trainer.step == steps:
                trainer.save(path)
                trainer.store.refresh()
    if export:
        from training.export import export_model

        export_model(trainer.model)


if __name__ == "__main__":
    typer.run(main)
