"""What merging costs reading: how many letters can still be told from a real vision encoder's tokens.

`python -m experiments.legibility` trains a small probe on pages of words: from the untouched features of DINOv2-S/14
around a letter, and from where within its patch the letter's middle lies, it is to say which letter it is. On pages in
other fonts, with other words, it is then given features whose tokens merged and were copied back to their places
(`TokenMap.expand`), and those that pooling and random keep restored. A word is read if all its letters are. No language
model is involved: this asks what the tokens still hold, and says nothing of unmerging.

Thresholds are calibrated on pages in fonts that the held-out pages do not use. Needs the training pack:
`python -m training.pack`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import dymu
from benchmarks import record
from dymu.choices import Schedule
from dymu.files import whole_file
from dymu.hooks.focus import InFocus
from dymu.reducers import AveragePool, FixedMerge, Reducer, ThresholdMerge
from dymu.token_map import TokenMap
from experiments import RESULTS
from experiments.dinov2 import PATCH, Tower
from experiments.saliency import interval, thinned
from scenes import Materials, evaluation_pack
from training.cache import cache_root
from training.features import pixels as normalised
from training.tower import FEATURE_LAYER
from training.vlm.base import training_pack

SIDE = 336
GRID = SIDE // PATCH
BUDGETS = (0.75, 0.5, 0.3, 0.2, 0.15, 0.1)
SCHEDULE: Schedule = "reverse_linear"
LETTERS = 26
SIZES = (24, 32, 42)
"""Of fonts, in pixels: small letters are then some 12, 16 and 21 pixels high."""

MARGIN, ATTEMPTS = 6, 12
SEEDS = {"training": 11, "calibration": 12, "heldout": 13}


@dataclass(frozen=True)
class Page:
    """A picture of words, and where the middle of each of their letters lies, in pixels: x, y."""

    image: Image.Image
    words: tuple[str, ...]
    middles: tuple[tuple[float, float], ...]

    def targets(self) -> Tensor:
        """[letters]: which each is, from 0 to 25."""
        return torch.tensor([ord(letter) - ord("a") for word in self.words for letter in word])


def page(materials: Materials, use: str, number: int) -> Page:
    """Page `number` of a use: one to as many lines of words as fit, over a plain colour or a photo."""
    rng = np.random.default_rng((SEEDS[use], number))
    backgrounds = [each.file for each in materials.backgrounds if each.use == use]
    fonts = [each.file for each in materials.fonts if each.use == use]
    if rng.random() < 0.5:
        image = materials.picture(backgrounds[rng.integers(len(backgrounds))]).convert("RGB").resize((SIDE, SIDE))
    else:
        image = Image.new("RGB", (SIDE, SIDE), _colour(rng, 0, 256))
    font = materials.font(fonts[rng.integers(len(fonts))], int(rng.choice(SIZES)))
    dark = rng.random() < 0.5
    paper, ink = (_colour(rng, *span) for span in (((215, 256), (0, 100)) if dark else ((0, 45), (160, 256))))
    draw = ImageDraw.Draw(image)
    ascent, descent = font.getmetrics()
    height = ascent + descent + MARGIN
    lines = int(rng.integers(1, (SIDE - 2 * MARGIN) // height + 1))
    top = int(rng.integers(MARGIN, SIDE - MARGIN - lines * height + 1))
    words: list[str] = []
    middles: list[tuple[float, float]] = []
    for y in range(top, top + lines * height, height):
        at, end = float(rng.integers(MARGIN, SIDE // 3)), SIDE - rng.integers(MARGIN, SIDE // 3)
        chosen: list[str] = []
        for word in (materials.words[k] for k in rng.integers(len(materials.words), size=ATTEMPTS)):
            if at + font.getlength(" ".join([*chosen, word])) <= end:
                chosen.append(word)
        if not chosen:
            continue
        text = " ".join(chosen)
        draw.rectangle((at - MARGIN, y, at + font.getlength(text) + MARGIN, y + height), fill=paper)
        draw.text((at, y + MARGIN // 2), text, font=font, fill=ink)
        ends = [at + font.getlength(text[:count]) for count in range(len(text) + 1)]
        words += chosen
        middles += [
            ((ends[k] + ends[k + 1]) / 2, y + MARGIN // 2 + ascent * 0.65)
            for k, letter in enumerate(text)
            if letter != " "
        ]
    return Page(image, tuple(words), tuple(middles))


def _colour(rng: np.random.Generator, low: int, high: int) -> tuple[int, ...]:
    return tuple(int(value) for value in rng.integers(low, high, 3))


def pages(materials: Materials, use: str, count: int) -> list[Page]:
    """The first `count` pages of a use that hold at least one word."""
    kept: list[Page] = []
    number = 0
    while len(kept) < count:
        shown = page(materials, use, number)
        kept += [shown] * bool(shown.words)
        number += 1
    return kept


@dataclass(frozen=True)
class Network:
    """The tower, read where the demo model reads it."""

    tower: Tower

    @classmethod
    def load(cls) -> Network:
        """With its weights."""
        return cls(Tower.load(FEATURE_LAYER))

    def features(self, shown: Page) -> Tensor:
        """Features [1, patches, C] of all tokens."""
        states = self.tower.model(normalised([shown.image]), output_hidden_states=True).hidden_states
        return states[FEATURE_LAYER][:, 1:]

    def merged(self, shown: Page, reducer: Reducer, focus: InFocus | None = None) -> tuple[Tensor, TokenMap]:
        """Features [1, patches, C], reduced and copied back, and what merged (the class token with it)."""
        hidden, merges = self.tower.merged(normalised([shown.image]), reducer, focus)
        return merges.expand(hidden)[:, 1:], merges


def asked(features: Tensor, shown: Page) -> Tensor:
    """What the probe is given, [letters, 9 C + 2]: features [1, patches, C] around each letter, and where in its patch
    its middle lies, from -1 to 1 in x and y. Beyond the edge features are zeros."""
    middles = torch.tensor(shown.middles) / PATCH
    column, row = middles.long().clamp(0, GRID - 1).unbind(1)
    grid = pad(features[0].unflatten(0, (GRID, GRID)), (0, 0, 1, 1, 1, 1))
    near = [grid[row + down, column + right] for down in range(3) for right in range(3)]
    return torch.cat([*near, 2 * middles.frac() - 1], dim=1)


def train_probe(network: Network, learned: Sequence[Page], passes: int) -> tuple[nn.Module, float]:
    """A probe of one hidden layer, trained on untouched features; with its share of right letters on the last 5 %.

    It is kept in the cache for these pages, passes and features.
    """
    first = asked(network.features(learned[0]), learned[0])
    about = f"{len(learned)} {passes} {first.sum(0).round(decimals=1).abs().tolist()}"
    file = cache_root("experiments") / f"letters-{sha256(about.encode()).hexdigest()[:16]}.safetensors"
    torch.manual_seed(0)
    probe = nn.Sequential(
        nn.Dropout(0.1), nn.Linear(first.shape[1], 768), nn.GELU(), nn.Dropout(0.3), nn.Linear(768, LETTERS)
    )
    if file.exists():
        weights = load_file(file)
        seen = float(weights.pop("seen"))
        probe.load_state_dict(weights)
        return probe.eval(), seen
    x = torch.cat([asked(network.features(shown), shown).bfloat16() for shown in track(learned, "features to learn")])
    y = torch.cat([shown.targets() for shown in learned])
    kept, batch = len(x) - len(x) // 20, 512
    steps = max(passes * kept // batch, 10)
    optimiser = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    with torch.enable_grad():
        for _ in track(range(steps), "the probe"):
            chosen = torch.randint(kept, (batch,))
            loss = cross_entropy(probe(x[chosen].float()), y[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rates.step()
    probe.eval()
    seen = (probe(x[kept:].float()).argmax(1) == y[kept:]).float().mean()
    with whole_file(file) as partial:
        save_file({**probe.state_dict(), "seen": seen}, partial)
    return probe, float(seen)


def read(probe: nn.Module, features: Tensor, shown: Page) -> tuple[float, float]:
    """Shares of a page's letters and of its words that are read."""
    right = (probe(asked(features, shown)).argmax(1) == shown.targets()).split([len(word) for word in shown.words])
    return float(torch.cat(right).float().mean()), float(np.mean([bool(word.all()) for word in right]))


@dataclass
class Row:
    """One way to spend tokens, over all pages."""

    method: str
    budget: int | None = None
    thresholds: list[float] | None = None
    kept: list[int] = field(default_factory=list)
    letters: list[float] = field(default_factory=list)
    words: list[float] = field(default_factory=list)

    def to_json(self, parts: Sequence[np.ndarray], untouched: Row) -> dict[str, Any]:
        """The row of the result file: over all pages, and over each part of them by how much text they show."""

        def over(chosen: np.ndarray) -> dict[str, Any]:
            letters, kept = np.asarray(self.letters)[chosen], np.asarray(self.kept)[chosen]
            return {
                "tokens": float(kept.mean()),
                "tokens_sd": float(kept.std()),
                "letters": interval(letters),
                "words": interval(np.asarray(self.words)[chosen]),
                "letters_less_untouched": interval(letters - np.asarray(untouched.letters)[chosen]),
            }

        everything = over(np.arange(len(self.kept)))
        return {
            "method": self.method,
            "budget": self.budget,
            "thresholds": self.thresholds,
            **everything,
            "parts": [over(part) for part in parts],
        }


class Setting:
    """The held-out pages with their untouched features, and the probe that reads them."""

    def __init__(self, network: Network, probe: nn.Module, shown: Sequence[Page]) -> None:
        self.network, self.probe, self.pages = network, probe, shown
        self.features = [network.features(each) for each in track(shown, "all tokens")]

    def check(self, count: int = 2) -> float:
        """The largest difference that merging nothing makes; refuses to measure where there is one."""
        nothing = ThresholdMerge((2.0,) * len(self.network.tower.layers))
        gap = 0.0
        for shown, untouched in list(zip(self.pages, self.features, strict=True))[:count]:
            gap = max(gap, float((self.network.merged(shown, nothing)[0] - untouched).abs().max()))
        if gap > 1e-4:
            raise SystemExit(f"features differ by {gap} with nothing merged")
        return gap

    def restored(self, row: Row, tokens: int, how: Callable[[Tensor], Tensor]) -> Row:
        """Reduce the untouched features, which leaves `tokens`, and restore them."""
        for features, shown in zip(self.features, self.pages, strict=True):
            self._add(row, how(features), tokens, shown)
        return row

    def merged(self, row: Row, reducer: Reducer | Sequence[Reducer], focus: Sequence[InFocus] | None = None) -> Row:
        """Merge in the encoder, by one rule for all pages or one for each, or pool what it gives."""
        rules = reducer if isinstance(reducer, Sequence) else [reducer] * len(self.pages)
        focuses = [None] * len(self.pages) if focus is None else focus
        shown_by = zip(track(self.pages, f"{row.method} {row.budget}"), rules, focuses, strict=True)
        for shown, rule, where in shown_by:
            features, merges = self.network.merged(shown, rule, where)
            self._add(row, features, int(merges.kept) - 1, shown)
        return row

    def _add(self, row: Row, features: Tensor, tokens: int, shown: Page) -> None:
        letters, words = read(self.probe, features, shown)
        row.kept.append(tokens)
        row.letters.append(letters)
        row.words.append(words)


def measured(setting: Setting, samples: Sequence[Page]) -> dict[str, Any]:
    """All rows."""

    def processor(images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        return {"pixel_values": normalised(list(images))}

    full = GRID * GRID
    untouched = setting.restored(Row("all tokens"), full, lambda features: features)
    rows = [untouched]
    budgets = [round(share * full) for share in BUDGETS]
    thresholds = dymu.calibrate(
        setting.network.tower.vlm, processor, [shown.image for shown in samples], budgets, schedule=SCHEDULE
    )
    chance = torch.Generator().manual_seed(0)
    for budget in budgets:
        limits = [float(limit) for limit in thresholds.per_layer(budget)]
        dynamic = setting.merged(Row("DToMe", budget, limits), ThresholdMerge(tuple(limits)))
        # Held-out pages keep a little more or less than the budget; the others get what DToMe really kept.
        count = round(float(np.mean(dynamic.kept)))
        square = round(count**0.5) ** 2
        rows += [
            dynamic,
            setting.merged(Row("ToMe", budget), FixedMerge(count, SCHEDULE)),
            setting.merged(Row("pooling", budget), AveragePool(square)),
            setting.restored(Row("random", budget), count, lambda x, count=count: thinned(x, GRID, count, chance)),
        ]
    letters = np.array([len(shown.middles) for shown in setting.pages])
    edges = np.quantile(letters, (1 / 3, 2 / 3))
    parts = [np.flatnonzero(np.searchsorted(edges, letters) == part) for part in range(3)]
    return {
        "full_tokens": full,
        "parts": [{"pages": len(part), "letters_a_page": float(letters[part].mean())} for part in parts],
        "rows": [row.to_json(parts, untouched) for row in rows],
        "dtome_against_tome": [
            {"budget": dynamic.budget, "all": interval(gains), "parts": [interval(gains[part]) for part in parts]}
            for dynamic, fixed in zip(rows[1::4], rows[2::4], strict=True)
            for gains in [np.subtract(dynamic.letters, fixed.letters)]
        ],
    }


def main(
    count: Annotated[int, typer.Option("--pages", min=9, help="Held-out pages.")] = 150,
    samples: Annotated[int, typer.Option(min=1, help="Pages to calibrate on.")] = 150,
    learn: Annotated[int, typer.Option(min=10, help="Pages that the probe learns from.")] = 1500,
    passes: Annotated[int, typer.Option(min=1, help="Times that it sees each letter.")] = 15,
    name: Annotated[str, typer.Option(help="Of the result file.")] = "legibility",
) -> None:
    """Train the probe, measure, and write the result file."""
    network, packed = Network.load(), evaluation_pack()
    with torch.no_grad():
        probe, seen = train_probe(network, pages(Materials(training_pack()), "training", learn), passes)
        setting = Setting(network, probe, pages(packed, "heldout", count))
        gap = setting.check()
        result = measured(setting, pages(packed, "calibration", samples))
    about = {"pages": count, "calibrated_on": samples, "learned_from": learn, "right_letters_in_known_fonts": seen}
    print(record.write(name, {**about, "largest_difference_with_nothing_merged": gap, **result}, RESULTS))


if __name__ == "__main__":
    typer.run(main)
