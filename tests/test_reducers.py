"""The protocol of reducers: what each is asked, what it may answer, and that a batch is no more than its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dymu
import tiny
from dymu.choices import UNMERGE, Fill
from dymu.errors import BadBudget, BadPrompt, UnsupportedModel
from dymu.evaluation.methods import METHODS, Row
from dymu.hooks.versions import cache_argument, cache_of
from dymu.merging import a_count, above
from dymu.reducers import (
    AveragePool,
    Candidates,
    FixedKeep,
    FixedMerge,
    KeepOfPictures,
    Pixels,
    RandomKeep,
    Reduced,
    Reducer,
    Shown,
    SomeMerge,
    Stage,
    Stride,
    ThresholdMerge,
    Tokens,
)
from dymu.token_map import TokenMap

pytestmark = pytest.mark.one_of_each

NOTHING = ThresholdMerge((2.0,) * tiny.LAYERS)
MODELS = [("clip", "llama", "llava"), ("dinov2", "mistral", "llava_next"), ("siglip", "qwen2", "llava_onevision")]


@pytest.fixture(params=MODELS, ids="-".join)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.llava(*request.param)


def call(model: Any, images: Tensor, words: int = 7) -> dict[str, Tensor]:
    prompts = [tiny.prompt(model, 3, "image", words, seed=number) for number in range(len(images))]
    return {"input_ids": torch.stack(prompts), **tiny.shown(model, images)}


# ------------------------------------------------------------------------------------ a test double of each kind


@dataclass(frozen=True)
class Darkest(Reducer):
    """Acts on pixels: patches that are as dark as the first one stand with it and never enter the encoder."""

    limit: float

    def before_encoder(self, pixels: Pixels) -> tuple[Tensor, TokenMap]:
        shown = pixels.shown
        bright = torch.nn.functional.adaptive_avg_pool2d(pixels.pixels, shown.grids[0]).mean(1).flatten(1)
        indices = torch.arange(bright.shape[1]).expand_as(bright)
        leaders = torch.where(bright < self.limit, (bright < self.limit).int().argmax(1, keepdim=True), indices)
        return pixels.pixels, TokenMap.from_leaders(leaders)


@dataclass(frozen=True)
class Halved(Reducer):
    """Acts on pixels: a picture of half the sides, of which every patch stands for four."""

    def before_encoder(self, pixels: Pixels) -> tuple[Tensor, TokenMap]:
        shown = pixels.shown
        (all_rows, all_columns), *_ = shown.grids
        rows, columns = all_rows // 2, all_columns // 2
        row = (torch.arange(all_rows) // 2).clamp(max=rows - 1)
        column = (torch.arange(all_columns) // 2).clamp(max=columns - 1)
        group = (row[:, None] * columns + column).flatten().expand(len(pixels.pixels), -1)
        side = pixels.pixels.shape[-1] // all_columns
        smaller = torch.nn.functional.interpolate(
            pixels.pixels, size=(rows * side, columns * side), mode="bilinear", antialias=True
        )
        return smaller, TokenMap(group, torch.full((len(group),), rows * columns), rows * columns)


@dataclass(frozen=True)
class Sums(Reducer):
    """Gives features of its own: the sum of each pair of neighbours instead of the mean."""

    def after_encoder(self, tokens: Tokens) -> Reduced:
        pairs = torch.arange(tokens.map.width) // 2
        count = int(pairs.max()) + 1
        merges = TokenMap(pairs.expand(len(tokens.features), -1), torch.full((len(tokens.features),), count), count)
        return Reduced(merges, merges.sum(tokens.features))


@dataclass(frozen=True)
class Asked(Reducer):
    """Asks for the question: keeps as many tokens as the prompt that shows the image has words."""

    def in_prompt(self, tokens: Tokens) -> Reduced:
        count = torch.tensor([len(words) for words in tokens.text])
        return tokens.keep(torch.arange(tokens.map.width) < count[:, None])


@dataclass(frozen=True)
class LeftHalf(Reducer):
    """Asks where a token lies in the user's picture, and drops those in its right half."""

    stage: Stage = "in_prompt"

    def after_encoder(self, tokens: Tokens) -> Reduced | None:
        return self._left(tokens) if self.stage == "after_encoder" else None

    def in_prompt(self, tokens: Tokens) -> Reduced | None:
        return self._left(tokens) if self.stage == "in_prompt" else None

    def _left(self, tokens: Tokens) -> Reduced:
        box = tokens.location.gather(1, tokens.map.first()[..., None].expand(-1, -1, 4))
        return tokens.keep((box[..., 0] + box[..., 2]) / 2 < 0.5)


@dataclass(frozen=True)
class BatchMean(Reducer):
    """What nobody may do: a threshold that depends on all pictures of the batch."""

    def in_layer(self, candidates: Candidates) -> Tensor:
        there = candidates.similarity[candidates.similarity.isfinite()]
        return above(float(there.mean()), candidates.similarity, candidates.partner)


def test_pixels_decide_what_enters_the_encoder(model):
    images = tiny.pictures(3)
    with dymu.apply(model, merge=Darkest(-100.0)) as handle:
        nothing = model(**call(model, images)).logits
        assert handle.last.kept == handle.last.original
    torch.testing.assert_close(nothing, model(**call(model, images)).logits, atol=1e-5, rtol=0)
    with dymu.apply(model, merge=Darkest(0.0)) as handle:
        together = model(**call(model, images)).logits
        kept, groups = handle.last.kept, [handle.last.group(i) for i in range(3)]
        assert all(left < full for left, full in zip(kept, handle.last.original, strict=True))
        for i in range(3):
            one = {name: value[i : i + 1] for name, value in call(model, images).items()}
            torch.testing.assert_close(model(**one).logits[0], together[i], atol=1e-4, rtol=0)
            assert torch.equal(handle.last.group(0), groups[i])


def test_a_smaller_picture_stands_for_the_full_one():
    """The stock encoder on the smaller picture, copied to all tokens of the full one."""
    model = tiny.llava("dinov2")
    images = tiny.pictures(2)
    with dymu.apply(model, merge=Halved()) as handle:
        features = torch.stack(model.get_image_features(images).pooler_output)
        assert handle.last.kept == [9, 9]
        group = handle.last.group(0)
    small = torch.nn.functional.interpolate(images, size=(12, 12), mode="bilinear", antialias=True)
    stock = torch.stack(model.get_image_features(small).pooler_output)
    torch.testing.assert_close(features, stock[:, group], atol=1e-5, rtol=0)


def test_features_of_its_own_reach_the_projector():
    model = tiny.llava("clip")
    images = tiny.pictures(2)
    stock = model.model.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    with dymu.apply(model, merge=Sums()) as handle:
        features = torch.stack(model.get_image_features(images).pooler_output)
        assert handle.last.kept == [25, 25]
    padded = torch.cat((stock, torch.zeros_like(stock[:, :1])), 1)
    sums = model.model.multi_modal_projector(padded.unflatten(1, (-1, 2)).sum(2))
    torch.testing.assert_close(features, sums.repeat_interleave(2, 1)[:, :49], atol=1e-5, rtol=0)
    several = tiny.llava("clip", layer=[-2, -1])
    with dymu.apply(several, merge=Sums()), pytest.raises(UnsupportedModel, match="features of its own"):
        several.get_image_features(images)


@pytest.mark.parametrize("how", ["forward", "generate", "beams"])
def test_a_reducer_may_read_the_question(model, how):
    rows = [tiny.prompt(model, 3, "image", words, seed=words) for words in (4, 9)]
    rows.append(tiny.prompt(model, 2, "image", 5, "image", 1))
    batch = {**tiny.pad(rows), **tiny.shown(model, tiny.pictures(4))}
    with dymu.apply(model, merge=Asked()) as handle:
        if how == "forward":
            model(**batch)
        else:
            model.generate(**batch, do_sample=False, max_new_tokens=2, num_beams=1 + (how == "beams"))
        assert [item.budgeted for item in handle.last.items] == [7, 12, 8, 8]
        with pytest.raises(BadPrompt, match="the question is asked for and not known: give the model input_ids"):
            model.get_image_features(**tiny.shown(model, tiny.pictures(1)))


@pytest.mark.parametrize("stage", ["after_encoder", "in_prompt"])
def test_a_reducer_may_ask_where_a_token_lies(model, stage):
    with dymu.apply(model, merge=LeftHalf(stage)) as handle:
        model(**call(model, tiny.pictures(2)))
        for item in handle.last.items:
            box = item.location[item.patch]
            left = (box[:, 0] + box[:, 2]) / 2 < 0.5
            assert torch.equal(item.leaders[item.patch] >= 0, left)
            assert 0.3 < left.float().mean() < 0.6


def test_locations_cover_the_picture(model):
    """Of each view once: the sum of the areas is the number of views, and boxes agree between stages."""
    boxes: list[Tensor] = []

    @dataclass(frozen=True)
    class Looks(Reducer):
        def in_prompt(self, tokens: Tokens) -> None:
            boxes.extend((tokens.location, tokens.shown.location))

    with dymu.apply(model, merge=Looks()) as handle:
        model.get_image_features(**tiny.shown(model, tiny.pictures(1)))
        (item,) = handle.last.items
    in_prompt, of_patches = boxes
    area = (in_prompt[..., 2] - in_prompt[..., 0]) * (in_prompt[..., 3] - in_prompt[..., 1])
    assert float(area.nansum()) == pytest.approx(len(item.grids), abs=1e-4)
    assert of_patches.shape == (item.pictures, tiny.PATCHES, 4)
    whole = of_patches[0]
    assert whole[:, :2].min() == pytest.approx(0, abs=1e-5)
    assert whole[:, 2:].max() == pytest.approx(1, abs=1e-5)
    if item.pictures > 1:  # two tiles side by side
        assert of_patches[1][:, 2].max() == pytest.approx(0.5, abs=1e-5)
        assert of_patches[2][:, 0].min() == pytest.approx(0.5, abs=1e-5)


# --------------------------------------------------------------------------------------------- a row alone, a control


RULES = [
    ThresholdMerge((0.9,) * tiny.LAYERS, images=(0.9,)),
    FixedMerge(0.4),
    AveragePool(0.3),
    RandomKeep(0.3),
    RandomKeep(0.3, fill="nearest"),
    Stride(0.3),
    Stride(0.3, fill="nearest"),
]


def differs(model: Any, rule: Reducer) -> bool:
    """Whether a row gets another map in a batch than alone."""
    images = tiny.pictures(4)
    with dymu.apply(model, merge=rule) as handle:
        model.get_image_features(**tiny.shown(model, images))
        together = [handle.last.group(i) for i in range(4)]
        alone = []
        for i in range(4):
            model.get_image_features(**tiny.shown(model, images[i : i + 1]))
            alone.append(handle.last.group(0))
    return not all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_picture_is_reduced_as_it_is_alone(model, rule):
    assert not differs(model, rule)


NOT_NUMBERS = [torch.nan, torch.inf]


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_a_picture_that_is_no_number_does_not_spoil_its_neighbours(tower, value):
    """Through the encoder: features and maps of the others are what each gives alone."""
    model = tiny.llava(tower)
    for rule in RULES:
        for where in (0, 2, 3):
            images = tiny.pictures(4)
            images[where] = value
            with dymu.apply(model, merge=rule) as handle:
                together = model.get_image_features(images).pooler_output
                groups = [handle.last.group(i) for i in range(4)]
                for i in {0, 1, 2, 3} - {where}:
                    (alone,) = model.get_image_features(images[i : i + 1]).pooler_output
                    assert torch.equal(handle.last.group(0), groups[i])
                    tiny.close(together[i], alone, 1e-4)


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("unmerge", UNMERGE)
def test_a_row_that_is_no_number_does_not_spoil_the_answers_of_others(model, value, unmerge):
    """A picture in `generate`; the words of a prompt, which are given as embeddings, in a forward."""
    rows = [tiny.prompt(model, 3 + i, "image", 7 - i % 2, seed=i) for i in range(3)]
    batch = {**tiny.pad(rows), **tiny.shown(model, tiny.pictures(3))}
    spoilt = {**batch, "pixel_values": batch["pixel_values"].clone()}
    spoilt["pixel_values"][1] = value
    words = model.get_input_embeddings()(batch["input_ids"])
    words[1, -3:] = value
    embedded = {"inputs_embeds": words, **{name: batch[name] for name in batch if name != "input_ids"}}
    options = {"do_sample": False, "max_new_tokens": 3, "suppress_tokens": [tiny.IMAGE_TOKEN, tiny.VIDEO_TOKEN]}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with dymu.apply(model, merge=FixedMerge(0.4), unmerge=unmerge):
        together, forward = torch.stack(model.generate(**spoilt, **options).logits, 1), model(**embedded).logits
        for i in (0, 2):
            one = {name: part[i : i + 1] for name, part in spoilt.items()}
            tiny.close(together[i], torch.stack(model.generate(**one, **options).logits, 1)[0], 1e-4)
            there = batch["attention_mask"][i].bool()
            one = {name: part[i : i + 1] for name, part in batch.items()}
            tiny.close(forward[i, there], model(**one).logits[0, there], 1e-4)
    assert not forward[1].isfinite().all()


def test_half_precision_that_overflows_stays_with_its_picture():
    model, images = tiny.llava("clip").half(), tiny.pictures(4).half()
    images[2] = 60_000
    with dymu.apply(model, merge=AveragePool(0.3)):
        together = model.get_image_features(images).pooler_output
        assert not together[2].isfinite().all()
        for i in (0, 1, 3):
            (alone,) = model.get_image_features(images[i : i + 1]).pooler_output
            tiny.close(together[i], alone, 1e-2)


def test_statistics_over_the_batch_are_found_out(model):
    """The control: what the test above would see of a reducer whose rows depend on each other."""
    assert differs(model, BatchMean())


# ------------------------------------------------------------------------------------------------ the rules themselves


def tokens(features: Tensor, rows: int, columns: int, video: bool = False) -> Tokens:
    batch, count = features.shape[:2]
    cell = torch.arange(count).view(rows, columns)
    y, x = cell // columns, cell % columns
    box = torch.stack((x / columns, y / rows, (x + 1) / columns, (y + 1) / rows), -1).flatten(0, 1)
    shown = Shown(torch.randn(batch, 3, 4, 4), ((rows, columns),) * batch, True, video)
    return Tokens(
        features, TokenMap.identity(batch, count), [count] * batch, torch.zeros(batch, count, dtype=torch.long),
        tuple(range(batch + 1)), shown, lambda: [[cell]] * batch, lambda: box.expand(batch, -1, -1),
        lambda grids: torch.stack([grid.flatten(0, 1) for grid in grids]),
    )  # fmt: skip


def test_stride_takes_the_middle_of_equal_parts():
    six = tokens(torch.randn(1, 6, 3), 2, 3)
    assert Stride(3).in_prompt(six).map.group.tolist() == [[-1, 0, -1, 1, -1, 2]]
    for count in (1, 5, 6, 7, 48):
        many = tokens(torch.randn(1, 48, 3), 6, 8)
        kept = (Stride(count).in_prompt(many).map.group[0] >= 0).nonzero()[:, 0].tolist()
        assert kept == [int((j + 0.5) * 48 / count) for j in range(count)]
    assert torch.equal(Stride(1.0).in_prompt(six).features, six.features)


@dataclass(frozen=True)
class Named(FixedKeep):
    """Keeps the tokens whose feature is 1."""

    keep: int | float
    fill: Fill = "runs"

    def choose(self, tokens: Tokens, row: int, keep: int) -> Tensor:
        return (tokens.features[row, : tokens.counts[row], 0] == 1).nonzero()[:, 0]


def test_a_run_of_dropped_tokens_is_one():
    features = torch.tensor([1.0, 1, 0, 3, 1, 5, 1])[None, :, None]
    reduced = Named(4).in_prompt(tokens(features, 1, 7))
    assert reduced.map.group.tolist() == [[0, 1, 2, 2, 3, 4, 5]], "1100101: kept 0, 1, 4, 6; and {2, 3}, {5}"
    left = tokens(features, 1, 7).features_of(reduced)
    assert left[0, :, 0].tolist() == [1, 1, 1.5, 1, 5, 1]
    assert Named(7).in_prompt(tokens(torch.ones(1, 7, 1), 1, 7)).map.kept.tolist() == [7]
    of_two = replace(tokens(torch.tensor([0.0, 0, 1, 0, 0, 0])[None, :, None], 2, 3),
                     picture=torch.tensor([[0, 0, 0, 0, 1, 2]]))  # fmt: skip
    assert Named(1).in_prompt(of_two).map.group.tolist() == [[0, 0, 1, 2, 3, 3]], "tiles are one view"
    film = replace(of_two, shown=replace(of_two.shown, video=True))
    assert Named(1).in_prompt(film).map.group.tolist() == [[0, 0, 1, 2, 3, 4]], "a frame ends a run"


def test_filled_strides_are_blocks_around_the_kept():
    grid = tokens(torch.randn(2, 24, 3), 4, 6)
    plain, filled = Stride(4).in_prompt(grid), Stride(4, fill="nearest").in_prompt(grid)
    assert torch.equal(filled.features, plain.features)
    y, x = torch.arange(24) // 6 / 4, torch.arange(24) % 6 / 6
    kept = (plain.map.group[0] >= 0).nonzero()[:, 0]
    for n in range(24):
        apart = (y[n] - y[kept]) ** 2 + (x[n] - x[kept]) ** 2
        assert apart[filled.map.group[0, n]] == apart.min()


def test_a_dropped_token_stands_with_the_kept_one_it_is_most_like():
    some = tokens(torch.randn(2, 20, 5), 4, 5)
    filled = RandomKeep(6, fill="nearest").in_prompt(some)
    kept = RandomKeep(6).in_prompt(some).map.group >= 0
    for row in range(2):
        unit = torch.nn.functional.normalize(some.features[row], dim=-1)
        similar = unit @ unit[kept[row]].T
        assert torch.equal(filled.map.group[row], similar.argmax(1))


def test_a_picture_keeps_the_same_random_tokens_wherever_it_is_shown():
    model, images = tiny.llava(), tiny.pictures(3)
    maps = []
    for order in ([0, 1, 2], [2, 0, 1]):
        for seed in (0, 1):
            with dymu.apply(model, merge=RandomKeep(9, seed)) as handle:
                model.get_image_features(images[order])
                maps.append({number: handle.last.group(i) for i, number in enumerate(order)})
    for number in range(3):
        assert torch.equal(maps[0][number], maps[2][number])
        assert not torch.equal(maps[0][number], maps[1][number])
    assert not torch.equal(maps[0][0], maps[0][1])


@pytest.mark.parametrize("kind", [RandomKeep, Stride, AveragePool, FixedMerge])
def test_numbers_that_cannot_be_kept_are_refused(kind):
    for keep in (0, -3):
        with pytest.raises(BadBudget, match="keep at least"):
            kind(keep)
    model = tiny.llava()
    with dymu.apply(model, merge=kind(1000)), pytest.raises(BadBudget):
        model.get_image_features(tiny.pictures(1))
    with pytest.raises(BadBudget):
        kind(1000).check_fits(3, tiny.PATCHES)


@pytest.mark.parametrize("kind", [RandomKeep, Stride, AveragePool, FixedMerge])
def test_what_to_keep_is_a_number_of_any_library(kind):
    assert kind(np.float32(0.5)) == kind(torch.tensor(0.5)) == kind(0.5)
    assert kind(np.int64(9)) == kind(9)
    for keep in (True, "9", None, float("inf"), float("nan")):
        with pytest.raises(BadBudget, match="keep"):
            kind(keep)


def test_one_token_is_not_all_of_them():
    """Although 1 == 1.0, whichever comes first."""
    model = tiny.llava()
    kept = []
    for keep in (1.0, 0.5, 1.0):
        with dymu.apply(model, merge=FixedMerge(keep)) as handle:
            model.get_image_features(tiny.pictures(1))
            kept += handle.last.kept
        with dymu.apply(model, merge=FixedMerge(1)) as handle:
            model.get_image_features(tiny.pictures(1))
            kept += handle.last.kept
    assert kept == [49, 1, 24, 1, 49, 1]


@pytest.mark.parametrize("kind", [RandomKeep, Stride])
def test_an_unknown_fill_is_refused(kind):
    with pytest.raises(ValueError, match="takes one of none, nearest, runs for fill, not 'nearst'"):
        kind(9, fill="nearst")


def test_layers_may_be_a_list():
    assert FixedMerge(9, layers=[1, 2]) == FixedMerge(9, layers=(1, 2))


def test_features_from_ahead_of_the_encoder_are_of_what_entered():
    """Each row of a batch its own, where the model also reads what no layer made."""
    model, images = tiny.llava("clip", layer=[0, -2]), tiny.pictures(3)
    with dymu.apply(model, merge=Darkest(0.0)):
        together = model.get_image_features(images).pooler_output
        for i in range(3):
            alone = model.get_image_features(images[i : i + 1]).pooler_output
            torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)


@dataclass(frozen=True)
class Answers(Reducer):
    """Answers what the test says."""

    answer: Any
    stage: Stage

    def reduces(self, stage: Stage, shown: Shown) -> bool:
        return stage == self.stage

    def before_encoder(self, pixels: Pixels) -> Any:
        return pixels.pixels, self.answer(pixels)

    def in_layer(self, candidates: Candidates) -> Any:
        return self.answer(candidates) if self.stage == "in_layer" else None

    def after_encoder(self, tokens: Tokens) -> Any:
        return self.answer(tokens)

    in_prompt = after_encoder


def numbered(tokens: Tokens, change: Callable[[Tensor], Tensor]) -> Reduced:
    """What keeps all, with its groups called otherwise."""
    return Reduced(replace(tokens.map, group=change(tokens.map.group)))


@pytest.mark.parametrize(
    ("stage", "answer", "error", "sentence"),
    [
        ("before_encoder", lambda pixels: TokenMap.identity(2, 40), ValueError, r"map of \[2, 40\]"),
        ("in_layer", lambda c: c.similarity > 0.5, ValueError, "answered torch.bool"),
        ("in_layer", lambda c: c.partner[:, :-1], ValueError, "must answer int64"),
        ("after_encoder", lambda t: Reduced(TokenMap.identity(2, 40)), ValueError, r"answered a map of \[2, 40\]"),
        ("in_prompt", lambda t: Reduced(t.map, t.features[..., :5]), ValueError, "answered features"),
        ("after_encoder", lambda t: t.keep(torch.zeros_like(t.present)), BadBudget, "leaves no token"),
        ("in_prompt", lambda t: t.keep((torch.arange(2)[:, None] > 0).expand_as(t.present)), BadBudget, "leaves no"),
        (
            "in_prompt",
            lambda t: t.map,
            ValueError,
            "must answer a Reduced, or None for no change, and answered a Token",
        ),
        ("in_prompt", lambda t: numbered(t, lambda group: group * 2), ValueError, "none left out"),
        ("after_encoder", lambda t: numbered(t, lambda group: group - 2), ValueError, "answered a map that is none"),
        ("after_encoder", lambda t: numbered(t, lambda group: group + 1), ValueError, "answered a map that is none"),
        ("after_encoder", lambda t: numbered(t, lambda group: group % 7), ValueError, "answered a map that is none"),
        ("before_encoder", lambda p: TokenMap(torch.full((2, 49), -1), torch.ones(2).long(), 1), ValueError, "is none"),
        ("in_prompt", lambda t: Reduced(t.map, t.features.long()), ValueError, "features of torch.int64"),
        ("in_prompt", lambda t: Reduced(t.map, None, of_places=True), ValueError, "without features"),
        ("before_encoder", lambda p: TokenMap.from_leaders(torch.arange(49).repeat(2, 1) - 1), ValueError, "drops pat"),
        ("in_layer", lambda c: c.partner + 24, ValueError, "none of its row's B tokens"),
        ("in_prompt", lambda t: Reduced(replace(t.map, group=t.map.group.tolist())), ValueError, "that is none"),
        ("in_prompt", lambda t: Reduced(replace(t.map, width=None)), ValueError, "that is none"),
        ("in_prompt", lambda t: Reduced(replace(t.map, group=t.map.group.to("meta"))), ValueError, "that is none"),
        ("in_layer", lambda c: c.partner - 25, ValueError, "none of its row's B tokens"),
        ("in_layer", lambda c: SomeMerge(c.partner, torch.tensor([False, True])), ValueError, "said not to merge"),
        ("before_encoder", lambda p: TokenMap.from_leaders(torch.full((2, 49), -1)), BadBudget, "nothing of a picture"),
        ("in_layer", lambda c: SomeMerge(c.partner, torch.zeros(3).bool()), ValueError, r"must say bool \[2\]"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(stage, answer, error, sentence):
    model = tiny.llava()
    with dymu.apply(model, merge=Answers(answer, stage)):
        with pytest.raises(error, match=sentence) as raised:
            model.get_image_features(tiny.pictures(2))
        assert f".{stage}" in str(raised.value)


def test_reads_answers_layers():
    class Reads(Reducer):
        def reads(self, layers: int) -> Any:
            return layers

        def after_encoder(self, tokens: Tokens) -> None:
            return None

    with (
        dymu.apply(model := tiny.llava(), merge=Reads()),
        pytest.raises(ValueError, match="must answer layers"),
    ):
        model.get_image_features(tiny.pictures(1))


def test_pixels_are_of_as_many_pictures():
    class One(Reducer):
        def before_encoder(self, pixels: Pixels) -> tuple[Tensor, TokenMap | None]:
            return pixels.pixels[:1], None

    with dymu.apply(model := tiny.llava(), merge=One()), pytest.raises(ValueError, match="give as many"):
        model.get_image_features(tiny.pictures(2))


@pytest.mark.parametrize(
    "answer",
    [None, True, 3, [0] * 4, [0, 1, 2, 3, 4], [0, -1], [0, 49], torch.ones(4), torch.ones(49).bool(), slice(None), {1}],
)
@pytest.mark.parametrize("kind", [FixedKeep, KeepOfPictures])
def test_what_stays_is_said_by_indices(kind, answer):
    name = "choose" if kind is FixedKeep else "choose_of"

    @dataclass(frozen=True)
    class Own(kind):
        keep: int = 4

    setattr(Own, name, lambda self, tokens, *asked: answer)
    Own.__abstractmethods__ = frozenset()
    sentence = rf"Own\.{name} must answer int64 indices of 49 tokens, each once"
    with dymu.apply(model := tiny.llava(), merge=Own()), pytest.raises(ValueError, match=sentence):
        model.get_image_features(tiny.pictures(1))


@pytest.mark.parametrize("name", ["qwen2_vl", "mistral3"])
def test_a_partner_of_a_neighbour_is_refused(name):
    """Of pictures that travel in one row behind each other."""
    model = tiny.build(name)
    seen = tiny.shown(model, tiny.uneven(model, 3))

    def beyond(candidates: Candidates) -> Tensor:
        into = torch.full_like(candidates.partner, -1)
        units = candidates.state.rows(candidates.windowed).units
        into[1, 0] = units.lengths[1] - a_count(units.lengths[1], 0)
        return into

    applied = dymu.apply(model, merge=Answers(beyond, "in_layer"))
    with applied, pytest.raises(ValueError, match="none of its row's B tokens"):
        tiny.features_of(model, **seen)


@pytest.mark.parametrize("stage", ["after_encoder", "in_prompt"])
def test_a_map_need_not_say_that_it_drops_some(stage):
    """What one row drops is no token of another."""
    model, ids = tiny.llava(), [tiny.prompt(tiny.llava(), 3, "image", n, seed=n) for n in (5, 5)]

    def answer(tokens: Tokens) -> Reduced:
        group = torch.arange(49).repeat(2, 1)
        group[1, 20:] = -1
        return Reduced(TokenMap(group, torch.tensor([49, 20]), 49))

    def alone(tokens: Tokens) -> Reduced:
        return tokens.keep(torch.ones_like(tokens.present))

    with dymu.apply(model, merge=Answers(answer, stage)):
        together = model(**tiny.inputs(model, ids, tiny.pictures(2))).logits
    with dymu.apply(model, merge=Answers(alone, stage)):
        tiny.close(together[0], model(**tiny.inputs(model, ids, tiny.pictures(2))).logits[0])


@pytest.mark.parametrize("kept", [torch.ones(2, 49), torch.ones(2, 2).bool(), torch.tensor([[0, 1], [0, 1]])])
def test_what_is_kept_is_said_of_every_token(kept):
    applied = dymu.apply(model := tiny.llava(), merge=Answers(lambda t: t.keep(kept), "in_prompt"))
    with applied, pytest.raises(ValueError, match=r"keep takes bool \[2, 49\], which tokens stay, not torch"):
        model.get_image_features(tiny.pictures(2))


@pytest.mark.parametrize(("layer", "named"), [(99, (99,)), ("a", ("a",)), (0, ())])
def test_a_layer_that_cannot_be_read_is_named(layer, named):
    class Reads(Answers):
        def reads(self, layers: int) -> Any:
            return named

    applied = dymu.apply(model := tiny.llava(), merge=Reads(lambda t: (t.attention(layer), None)[1], "in_prompt"))
    with applied, pytest.raises(ValueError, match=f"encoder layer {layer!r}.*name"):
        model.get_image_features(tiny.pictures(2))


def test_a_reducer_that_reduces_nothing_is_refused():
    class Misspelt(Reducer):
        def in_promt(self, tokens: Tokens) -> None: ...

    with pytest.raises(TypeError, match="Misspelt defines none of before_encoder, in_layer, after_encoder, in_prompt"):
        dymu.apply(tiny.llava(), merge=Misspelt())
    with pytest.raises(ValueError, match="thresholds of ThresholdMerge is no number"):
        ThresholdMerge((0.5, float("nan")))


def test_a_reducer_may_read_the_question_of_a_later_turn(model):
    first, second = tiny.prompt(model, 3, "image", 4)[None], tiny.prompt(model, 2, "image", 6, seed=3)[None]
    images = tiny.pictures(2)
    options = {"do_sample": False, "max_new_tokens": 3, "suppress_tokens": [tiny.IMAGE_TOKEN]}
    with dymu.apply(model, merge=Asked()) as handle:
        output = model.generate(first, **tiny.shown(model, images[:1]), **options, return_dict_in_generate=True)
        assert [item.budgeted for item in handle.last.items] == [7]
        both = torch.cat((output.sequences, second), 1)
        cache = {cache_argument(model.forward): cache_of(output)}
        model.generate(both, **tiny.shown(model, images[1:]), **cache, **options)
        assert [item.budgeted for item in handle.last.items] == [9]  # the first answer's last token comes with it


def test_an_odd_grid_is_pooled_in_fields_as_equal_as_possible():
    pooled = AveragePool(6).after_encoder(tokens(torch.ones(1, 35, 2), 5, 7))
    sizes = pooled.map.size()[0]
    assert sizes.tolist() == [9, 6, 6, 6, 4, 4]


def test_every_method_of_the_table_makes_its_reducer():
    for method in METHODS.values():
        if method.reducer:
            reducer = method.make(Row(method.name, 9, "exact", method.schedules[0]), 9 / 49, 3)
            assert isinstance(reducer, Reducer)
            reducer.check_fits(24, 49)
            assert getattr(reducer, "seed", 3) == 3


def test_what_is_no_reducer_is_refused():
    with pytest.raises(TypeError, match=r"dymu\.Reducer such as dymu\.FixedMerge"):
        dymu.apply(tiny.llava(), merge=Stride)
