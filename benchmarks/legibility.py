"""What merging costs reading: how many letters can still be told from a real vision encoder's tokens.

`python -m benchmarks.legibility` trains a small probe that says, from the untouched features of DINOv2-S/14 around a
place, which letter stands there, on pages of words. On pages in other fonts, with other words, it is then asked about
features whose tokens merged and were copied back to their places (`TokenMap.expand`), and about those that pooling and
random keep restored. A word is read if all its letters are. No language model is involved, so this is a bound on what
one could read, and says nothing of unmerging.

Thresholds are calibrated on pages of a third set of fonts. Needs the training pack: `python -m training.pack`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from training.features import pixels as normalised
from training.tower import FEATURE_LAYER, load_tower
from training.vlm.base import training_pack
from transformers import Dinov2Model, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import dymu
from benchmarks import record
from benchmarks.saliency import PATCH, interval, near_square, pooled, thinned
from dymu.families import FAMILIES, resolve
from dymu.merging import EncoderLayer, FixedMerge, MergeRule, MergeRun, Schedule, ThresholdMerge
from dymu.tasks.scenes import Materials, evaluation_pack
from dymu.token_map import TokenMap

SIDE = 336
GRID = SIDE // PATCH
BUDGETS = (0.75, 0.5, 0.3, 0.2, 0.15, 0.1)
SCHEDULE: Schedule = "reverse_linear"
LETTERS = 26
UNKNOWN = -100
SIZES = (24, 32, 42)
"""Of fonts, in pixels: small letters are then some 12, 16 and 21 pixels high."""

MARGIN, ATTEMPTS = 6, 12
SEEDS = {"training": 11, "calibration": 12, "heldout": 13}


@dataclass(frozen=True)
class Page:
    """A picture of words, and where each of their letters stands: for every word, for every letter, its places."""

    image: Image.Image
    words: tuple[str, ...]
    places: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def letters(self) -> int:
        """How many letters there are."""
        return sum(map(len, self.words))

    def targets(self) -> Tensor:
        """[places]: the letter (0 to 25) at each place, or `UNKNOWN`."""
        found = torch.full((GRID * GRID,), UNKNOWN)
        for word, places in zip(self.words, self.places, strict=True):
            for letter, mine in zip(word, places, strict=True):
                found[list(mine)] = ord(letter) - ord("a")
        return found


def page(materials: Materials, use: str, number: int) -> Page:
    """Page `number` of a use: one to as many lines as fit, over a plain colour or a photo."""
    rng = np.random.default_rng((SEEDS[use], number))
    backgrounds = [each.file for each in materials.backgrounds if each.use == use]
    fonts = [each.file for each in materials.fonts if each.use == use]
    if rng.random() < 0.5:
        image = materials.picture(backgrounds[rng.integers(len(backgrounds))]).convert("RGB").resize((SIDE, SIDE))
    else:
        image = Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in rng.integers(0, 256, 3)))
    font = materials.font(fonts[rng.integers(len(fonts))], int(rng.choice(SIZES)))
    dark = rng.random() < 0.5
    paper = tuple(int(value) for value in (rng.integers(215, 256, 3) if dark else rng.integers(0, 45, 3)))
    ink = tuple(int(value) for value in (rng.integers(0, 100, 3) if dark else rng.integers(160, 256, 3)))
    draw = ImageDraw.Draw(image)
    ascent, descent = font.getmetrics()
    height = ascent + descent + MARGIN
    fits = (SIDE - 2 * MARGIN) // height
    lines = int(rng.integers(1, fits + 1))
    top = int(rng.integers(MARGIN, SIDE - MARGIN - lines * height + 1))
    words: list[str] = []
    places: list[tuple[tuple[int, ...], ...]] = []
    for line in range(lines):
        at, end = float(rng.integers(MARGIN, SIDE // 3)), SIDE - rng.integers(MARGIN, SIDE // 3)
        y = top + line * height
        chosen = []
        for word in (materials.words[k] for k in rng.integers(len(materials.words), size=ATTEMPTS)):
            if at + sum(font.getlength(each + " ") for each in (*chosen, word)) <= end:
                chosen.append(word)
        text = " ".join(chosen)
        if not text:
            continue
        draw.rectangle((at - MARGIN, y, at + font.getlength(text) + MARGIN, y + height), fill=paper)
        draw.text((at, y + MARGIN // 2), text, font=font, fill=ink)
        row = min(GRID - 1, int((y + MARGIN // 2 + ascent * 0.65) / PATCH))
        for word in chosen:
            ends = [at + font.getlength(word[:count]) for count in range(len(word) + 1)]
            words.append(word)
            places.append(tuple(_places(begin, stop, row) for begin, stop in pairwise(ends)))
            at += font.getlength(word + " ")
    return Page(image, tuple(words), tuple(places))


def _places(begin: float, end: float, row: int) -> tuple[int, ...]:
    """The places of a row whose middle lies between two pixels, or the one in which the letter's own middle does."""
    columns = range(int(np.ceil(begin / PATCH - 0.5)), int(np.ceil(end / PATCH - 0.5)))
    return tuple(row * GRID + column for column in (columns or (int((begin + end) / 2 / PATCH),)))


@dataclass(frozen=True)
class Network:
    """The tower, and those of its layers that run until LLaVA reads the features."""

    tower: Dinov2Model
    layers: tuple[EncoderLayer, ...]
    vlm: LlavaForConditionalGeneration
    """A stock LLaVA around the tower, for `dymu.calibrate`. Its language model is untrained and never runs."""

    @classmethod
    def load(cls) -> Network:
        """The demo model's tower, read where the demo model reads it."""
        tower = load_tower()
        text = LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1,
        )  # fmt: skip
        config = LlavaConfig(
            vision_config=tower.config, text_config=text, image_token_id=7, vision_feature_layer=FEATURE_LAYER
        )
        vlm = LlavaForConditionalGeneration(config).eval()
        vlm.model.vision_tower = tower
        parts = resolve(vlm, FAMILIES)
        return cls(tower, parts.encoder_layers[: max(parts.feature_layers())], vlm)

    def features(self, page: Page) -> Tensor:
        """Features [1, places, C] of all tokens."""
        return self.tower(normalised([page.image]), output_hidden_states=True).hidden_states[FEATURE_LAYER][:, 1:]

    def merged(self, page: Page, rule: MergeRule) -> tuple[Tensor, TokenMap]:
        """Features [1, places, C], merged by `rule` and copied back, and what merged (the class token with it)."""
        run = MergeRun(rule, len(self.layers), prefix=1)
        hidden = self.tower.embeddings(normalised([page.image]))
        for index, layer in enumerate(self.layers):
            hidden = run.layer(index, layer, hidden)
        return run.map.expand(hidden)[:, 1:], run.map


def around(features: Tensor) -> Tensor:
    """Features [B, places, C] of a place and its eight neighbours (zeros beyond the edge), [B, places, 9 C]."""
    grid = pad(features.unflatten(1, (GRID, GRID)), (0, 0, 1, 1, 1, 1))
    shifts = [grid[:, down : down + GRID, right : right + GRID] for down in range(3) for right in range(3)]
    return torch.cat(shifts, dim=-1).flatten(1, 2)


def train_probe(network: Network, materials: Materials, pages: int, passes: int) -> tuple[nn.Module, float]:
    """A probe of one hidden layer, trained on untouched features; with its share of right letters on the last 5 %."""
    inputs, targets = [], []
    for number in track(range(pages), description="features to learn from"):
        shown = page(materials, "training", number)
        wanted = shown.targets()
        known = wanted != UNKNOWN
        inputs.append(around(network.features(shown))[0, known].to(torch.bfloat16))
        targets.append(wanted[known])
    x, y = torch.cat(inputs), torch.cat(targets)
    torch.manual_seed(0)
    probe = nn.Sequential(
        nn.Dropout(0.1), nn.Linear(x.shape[1], 768), nn.GELU(), nn.Dropout(0.3), nn.Linear(768, LETTERS)
    )
    kept = len(x) - len(x) // 20
    steps, batch = passes * kept // 512, 512
    optimiser = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    with torch.enable_grad():
        for _ in track(range(steps), description="the probe"):
            chosen = torch.randint(kept, (batch,))
            loss = cross_entropy(probe(x[chosen].float()), y[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rates.step()
    probe.eval()
    return probe, float((probe(x[kept:].float()).argmax(1) == y[kept:]).float().mean())


def read(probe: nn.Module, features: Tensor, shown: Page) -> tuple[float, float]:
    """Shares of letters and of words that are read: a letter is what all its places say together."""
    said = probe(around(features)[0]).log_softmax(-1)
    letters, words = [], []
    for word, places in zip(shown.words, shown.places, strict=True):
        right = [
            int(said[list(mine)].sum(0).argmax()) == ord(letter) - ord("a")
            for letter, mine in zip(word, places, strict=True)
        ]
        letters += right
        words.append(all(right))
    return float(np.mean(letters)), float(np.mean(words))


@dataclass
class Row:
    """One way to spend tokens, over all pages."""

    method: str
    budget: int | None = None
    thresholds: list[float] | None = None
    kept: list[int] = field(default_factory=list)
    letters: list[float] = field(default_factory=list)
    words: list[float] = field(default_factory=list)

    def to_json(self, thirds: Sequence[np.ndarray], untouched: Row) -> dict[str, Any]:
        """The row of the result file: over all pages, and over each third of them by how much text they show."""

        def over(chosen: np.ndarray) -> dict[str, Any]:
            lost = np.subtract(np.take(self.letters, chosen), np.take(untouched.letters, chosen))
            return {
                "tokens": float(np.take(self.kept, chosen).mean()),
                "tokens_sd": float(np.take(self.kept, chosen).std()),
                "letters": interval(np.take(self.letters, chosen).tolist()),
                "words": interval(np.take(self.words, chosen).tolist()),
                "letters_less_untouched": interval(lost.tolist()),
            }

        everything = over(np.arange(len(self.kept)))
        return {
            "method": self.method,
            "budget": self.budget,
            "thresholds": self.thresholds,
            **everything,
            "thirds": [over(third) for third in thirds],
        }


def measured(network: Network, probe: nn.Module, pages: Sequence[Page], samples: Sequence[Page]) -> dict[str, Any]:
    """All rows."""
    features = [network.features(shown) for shown in track(pages, description="all tokens")]

    def restored(row: Row, tokens: int, how: Callable[[Tensor], Tensor]) -> Row:
        for found, shown in zip(features, pages, strict=True):
            add(row, how(found), tokens, shown)
        return row

    def merged(row: Row, rule: MergeRule) -> Row:
        for shown in track(pages, description=f"{row.method} {row.budget}"):
            found, merges = network.merged(shown, rule)
            add(row, found, int(merges.kept) - 1, shown)
        return row

    def add(row: Row, found: Tensor, tokens: int, shown: Page) -> None:
        letters, words = read(probe, found, shown)
        row.kept.append(tokens)
        row.letters.append(letters)
        row.words.append(words)

    def processor(images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        return {"pixel_values": normalised(list(images))}

    full = GRID * GRID
    untouched = restored(Row("all tokens"), full, lambda found: found)
    rows = [untouched]
    budgets = [round(share * full) for share in BUDGETS]
    thresholds = dymu.calibrate(network.vlm, processor, [shown.image for shown in samples], budgets, schedule=SCHEDULE)
    chance = torch.Generator().manual_seed(0)
    for budget in budgets:
        limits = [float(limit) for limit in thresholds.per_layer(budget)]
        dynamic = merged(Row("DToMe", budget, limits), ThresholdMerge(tuple(limits)))
        # Held-out pages keep a little more or less than the budget; the others get what DToMe really kept.
        count = round(float(np.mean(dynamic.kept)))
        shape = near_square(count, GRID)
        rows += [
            dynamic,
            merged(Row("ToMe", budget), FixedMerge(count, SCHEDULE)),
            restored(Row("pooling", budget), shape[0] * shape[1], lambda x, shape=shape: pooled(x, GRID, shape)),
            restored(Row("random", budget), count, lambda x, count=count: thinned(x, GRID, count, chance)),
        ]
    order = np.argsort([shown.letters for shown in pages], kind="stable")
    thirds = np.array_split(order, 3)
    pairs = []
    for dynamic, fixed in zip(rows[1::4], rows[2::4], strict=True):
        gains = np.subtract(dynamic.letters, fixed.letters)
        pairs.append(
            {
                "budget": dynamic.budget,
                "all": interval(gains.tolist()),
                "thirds": [interval(gains[third].tolist()) for third in thirds],
            }
        )
    return {
        "full_tokens": full,
        "letters_a_page": [float(np.mean([pages[k].letters for k in third])) for third in thirds],
        "rows": [row.to_json(thirds, untouched) for row in rows],
        "dtome_against_tome": pairs,
    }


def main(
    pages: Annotated[int, typer.Option(help="Held-out pages.")] = 150,
    samples: Annotated[int, typer.Option(help="Pages to calibrate on.")] = 150,
    learn: Annotated[int, typer.Option(help="Pages that the probe learns from.")] = 2000,
    passes: Annotated[int, typer.Option(help="Times that it sees each letter.")] = 12,
    name: Annotated[str, typer.Option(help="Of the result file.")] = "legibility",
) -> None:
    """Train the probe, measure, and write the result file."""
    network, packed = Network.load(), evaluation_pack()
    with torch.no_grad():
        probe, seen = train_probe(network, Materials(training_pack()), learn, passes)
        found = measured(
            network,
            probe,
            [page(packed, "heldout", number) for number in range(pages)],
            [page(packed, "calibration", number) for number in range(samples)],
        )
    print(
        record.write(
            name,
            {
                "pages": pages,
                "calibrated_on": samples,
                "learned_from": learn,
                "right_letters_in_known_fonts": seen,
                **found,
            },
        )
    )


if __name__ == "__main__":
    typer.run(main)
