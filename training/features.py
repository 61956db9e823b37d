"""The tower's features of every training scene, computed once and kept on disk.

``features.f16`` is a memory map [scenes, tokens, channels]; ``facts.jsonl`` has one line per
finished scene, written after its features, so a killed run goes on where it stopped.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch.utils.data import DataLoader, Dataset

from training.cache import cache_root
from training.scenes import GRID, TRAIN_SEED, Facts, Scene, compose
from training.tower import FEATURE_LAYER, MEAN, STD, load_tower

TOKENS, CHANNELS = GRID * GRID, 384
BATCH = 8


@dataclass(frozen=True)
class Example:
    """One cached scene: features [tokens, channels] and what is known about it."""

    features: np.ndarray
    facts: Facts
    names: list[str]
    colours: list[str]


class FeatureStore:
    """Read access to the scenes finished so far; it may grow while it is being read."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_root() / "features"
        self._examples: list[tuple[Facts, list[str], list[str]]] = []
        self._offset = 0
        self._map: np.ndarray | None = None
        self.refresh()

    def __len__(self) -> int:
        return len(self._examples)

    def refresh(self) -> int:
        """See what has been added since; return how many scenes there are."""
        path = self.folder / "facts.jsonl"
        if path.exists():
            with path.open("rb") as stream:
                stream.seek(self._offset)
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    data = json.loads(line)
                    self._examples.append((Facts.from_json(data["facts"]), data["names"], data["colours"]))
        if self._map is None and self._examples:
            self._map = np.memmap(self.folder / "features.f16", dtype=np.float16, mode="r").reshape(
                -1, TOKENS, CHANNELS
            )
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        if self._map is None:
            raise IndexError("no features yet: run python -m training.features")
        return Example(self._map[index], *self._examples[index])


class _Scenes(Dataset):
    """Training scenes by index, for a loader that composes ahead of the tower."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Scene:
        return compose("train", TRAIN_SEED, self.start + index)


def pixels(images: list) -> torch.Tensor:
    """PIL images of the tower's size -> normalised [B, 3, H, W]."""
    stack = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (stack.permute(0, 3, 1, 2).float() / 255 - mean) / std


def cache_features(count: int, folder: Path | None = None) -> None:
    """Make sure that the first ``count`` scenes are cached."""
    store = FeatureStore(folder)
    done = len(store)
    if done >= count:
        return
    store.folder.mkdir(parents=True, exist_ok=True)
    path = store.folder / "features.f16"
    size_bytes = count * TOKENS * CHANNELS * 2
    with path.open("ab") as stream:
        if path.stat().st_size < size_bytes:
            stream.truncate(size_bytes)
    shape = (path.stat().st_size // (TOKENS * CHANNELS * 2), TOKENS, CHANNELS)
    out = np.memmap(path, dtype=np.float16, mode="r+", shape=shape)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    tower = load_tower()
    loader = DataLoader(_Scenes(done, count), BATCH, num_workers=1, collate_fn=list)
    with (store.folder / "facts.jsonl").open("a+b") as facts, Progress() as progress:
        facts.truncate(store._offset)
        task = progress.add_task("features", total=count, completed=done)
        for scenes in loader:
            with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
                states = tower(pixels([scene.image for scene in scenes]), output_hidden_states=True)
            batch = states.hidden_states[FEATURE_LAYER][:, 1:].to(torch.float16).numpy()
            out[done : done + len(scenes)] = batch
            out.flush()
            for scene in scenes:
                row = {"facts": scene.facts.to_json(), "names": scene.names,
                       "colours": scene.colours}  # fmt: skip
                facts.write(json.dumps(row).encode() + b"\n")
            facts.flush()
            done += len(scenes)
            progress.update(task, completed=done)


if __name__ == "__main__":
    import sys

    cache_features(int(sys.argv[1]))
