"""Vision encoders by themselves."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import dymu
import tiny
import tiny_encoders
from dymu.errors import AlreadyApplied, BadBudget, BadImage, BadThresholds, DymuError, UnsupportedModel
from dymu.reducers import AveragePool, FixedMerge, Pixels, RandomKeep, Reduced, Reducer, ThresholdMerge, Tokens
from dymu.thresholds import Calibrated, Encoder, Thresholds
from dymu.token_map import TokenMap
from tiny_encoders import (
    DINOV2,
    DINOV3,
    KINDS,
    LAYERS,
    MERGING,
    PATCH,
    SIDE,
    SIGLIP2,
    Kind,
    apart,
    images,
    noisy_pictures,
)

MERGE = ThresholdMerge(MERGING)


@pytest.fixture(params=KINDS)
def kind(request: Any) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def encoder(kind: Kind) -> nn.Module:
    return tiny_encoders.randomised(kind.make())


@pytest.fixture
def dinov2() -> Any:
    return tiny_encoders.randomised(DINOV2.make())


@pytest.fixture
def dinov3() -> Any:
    return tiny_encoders.randomised(DINOV3.make())


def test_merged_outputs_equal_merging_by_hand(kind: Kind, encoder: nn.Module) -> None:
    tiny_encoders.check_by_hand(kind, encoder)


def test_nothing_merged_is_the_untouched_encoder_and_removal_restores_it(kind: Kind, encoder: nn.Module) -> None:
    tiny_encoders.check_untouched(kind, encoder)


def test_an_image_gets_in_a_batch_what_it_gets_alone(kind: Kind, encoder: nn.Module) -> None:
    tiny_encoders.check_alone(kind, encoder)


def test_a_hook_may_ask_the_same_encoder(dinov2: Any) -> None:
    inside: list[Tensor] = []

    def ask(*_: Any) -> None:
        if not inside:
            inside.append(images())
            inside.append(dinov2(images()[1:2]).pooler_output)

    with dymu.apply(dinov2, merge=MERGE) as handle:
        expected = [dinov2(part).pooler_output for part in (images(), images()[1:2])]
        dinov2.encoder.layer[1].register_forward_pre_hook(ask)
        assert torch.equal(dinov2(images()).pooler_output, expected[0])
        assert torch.equal(inside[1], expected[1])
        assert len(handle.last.kept) == 3


@pytest.mark.parametrize("in_place", [False, True])
def test_what_hooks_change_between_layers_goes_on(dinov2: Any, in_place: bool) -> None:
    """A hook on a layer sees all tokens; what it makes of them is what the next layer gets."""
    steering = 0.3 * torch.randn(32)

    def steer(_layer: Any, _args: Any, output: Tensor) -> Tensor | None:
        assert output.shape[1:] == (1 + DINOV2.patches, 32)
        if not in_place:
            return output + steering.to(output.dtype)
        output.add_(steering.to(output.dtype))
        return None

    dinov2.encoder.layer[0].register_forward_hook(steer)
    tiny_encoders.check_by_hand(DINOV2, dinov2)
    with torch.inference_mode():
        tiny_encoders.check_by_hand(DINOV2, dinov2)


def test_an_encoder_merges_in_half_precision_and_for_gradients(dinov3: Any) -> None:
    dinov3.bfloat16()
    with dymu.apply(dinov3, merge=FixedMerge(keep=20)) as handle:
        assert dinov3(images().bfloat16()).last_hidden_state.isfinite().all()
        assert handle.last.kept == [20] * 3
    dinov3.float().requires_grad_(True)
    with dymu.apply(dinov3, merge=FixedMerge(keep=20)), torch.enable_grad():
        dinov3(images()).pooler_output.sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in dinov3.model.parameters())


def cut(grids: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Pictures of so many rows and columns of patches, as Siglip2's processor pads them."""
    patches = torch.full((len(grids), SIGLIP2.patches, 3 * PATCH * PATCH), torch.nan)
    for number, (rows, columns) in enumerate(grids):
        part = tiny_encoders.patches_of(images()[number : number + 1, :, : rows * PATCH, : columns * PATCH])
        patches[number, : rows * columns] = part[0]
    present = ~patches.isnan().all(-1)
    return {
        "pixel_values": patches.nan_to_num(0),
        "pixel_attention_mask": present.long(),
        "spatial_shapes": torch.tensor(grids),
    }


def test_padded_pictures_get_what_they_get_without_padding() -> None:
    encoder = tiny_encoders.randomised(SIGLIP2.make())
    grids = [(8, 8), (5, 8), (3, 7)]
    inputs, counts = cut(grids), [rows * columns for rows, columns in grids]
    stock = encoder(**inputs)
    with dymu.apply(encoder, merge=ThresholdMerge((2.0,) * LAYERS)) as handle:
        output = encoder(**inputs)
        assert handle.last.kept == handle.last.original == counts
    for number, count in enumerate(counts):
        assert apart(output.last_hidden_state[number, :count], stock.last_hidden_state[number, :count]) < 1e-5
    assert apart(output.pooler_output, stock.pooler_output) < 1e-5
    with dymu.apply(encoder, merge=MERGE) as handle:
        output = encoder(**inputs)
        report = handle.last
        assert all(kept < count for kept, count in zip(report.kept, counts, strict=True))
        for number, (count, (rows, columns)) in enumerate(zip(counts, grids, strict=True)):
            alone = encoder(
                pixel_values=inputs["pixel_values"][number : number + 1, :count],
                pixel_attention_mask=None,
                spatial_shapes=inputs["spatial_shapes"][number : number + 1],
            )
            assert handle.last.kept == report.kept[number : number + 1]
            features = output.last_hidden_state[number, :count]
            assert apart(features, alone.last_hidden_state[0]) < 1e-4
            assert apart(output.pooler_output[number], alone.pooler_output[0]) < 1e-4
            assert report.dense(features, number).shape == (rows, columns, 32)
        with pytest.raises(BadImage, match="pixel_attention_mask"):
            encoder(**{**inputs, "pixel_attention_mask": torch.ones_like(inputs["pixel_attention_mask"])})


def test_a_budget_is_met_and_can_be_changed(dinov3: Any) -> None:
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    thresholds = dymu.calibrate(dinov3, processor, noisy_pictures(), [16, 0.5, 1.0], progress=False)
    assert [entry.achieved for entry in thresholds.calibrated] == [16, 32, 64]

    def kept() -> float:
        return sum(
            handle.last.kept[0] for image in noisy_pictures() if dinov3(**processor(images=image, return_tensors="pt"))
        ) / len(noisy_pictures())

    with dymu.apply(dinov3, thresholds, budget=0.25) as handle:
        assert dymu.handle_of(dinov3) is handle
        assert repr(handle) == "<dymu.Handle of DINOv3ViTModel: budget 16>"
        assert kept() == 16
        handle.budget = 32
        assert kept() == 32
        with pytest.raises(BadBudget, match="videos"):
            handle.per_second = 3
        again = dymu.calibrate(dinov3, processor, noisy_pictures(), 16, progress=False)
        assert again.calibrated == thresholds.calibrated[:1]


def test_thresholds_of_a_tower_are_for_the_same_tower_alone(dinov2: Any, tmp_path: Path) -> None:
    encoder = Encoder(model_type="dinov2", layers=LAYERS, depth=LAYERS, hidden_size=32, heads=2, tokens=64)
    Thresholds((Calibrated(16, MERGING),), encoder).save(tmp_path / "thresholds.json")
    with dymu.apply(dinov2, tmp_path, budget=16) as handle:
        dinov2(images())
        assert max(handle.last.kept) < DINOV2.patches
    shallow = Encoder(model_type="dinov2", layers=LAYERS, depth=LAYERS - 1, hidden_size=32, heads=2, tokens=64)
    with pytest.raises(BadThresholds, match="depth 2 instead of 3"):
        dymu.apply(dinov2, Thresholds((Calibrated(16, MERGING[:2]),), shallow))
    with pytest.raises(BadThresholds, match="cut into tiles"):
        dymu.apply(dinov2, Thresholds((Calibrated(16, MERGING),), encoder, image_tokens=100))
    with pytest.raises(BadThresholds, match=r"thresholds\.json"):
        dymu.apply(dinov2)


def test_each_thread_gets_its_own_answers_and_report(dinov3: Any) -> None:
    with dymu.apply(dinov3, merge=MERGE) as handle:
        alone = []
        for picture in images():
            output = dinov3(picture[None]).pooler_output
            alone.append((output, handle.last.kept))
        problems = []

        def ask(number: int) -> None:
            torch.set_grad_enabled(False)
            for _ in range(10):
                output = dinov3(images()[number : number + 1]).pooler_output
                if not torch.equal(output, alone[number][0]) or handle.last.kept != alone[number][1]:
                    problems.append(number)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems


def test_disabled_is_the_untouched_encoder_in_this_thread(dinov2: Any) -> None:
    stock = dinov2(images()).last_hidden_state
    with dymu.apply(dinov2, merge=MERGE) as handle:
        with handle.disabled():
            assert torch.equal(dinov2(images()).last_hidden_state, stock)
        assert not torch.equal(dinov2(images()).last_hidden_state, stock)


def test_an_encoder_is_changed_once_and_not_copied(dinov2: Any) -> None:
    names = list(dinov2.state_dict())
    handle = dymu.apply(dinov2, merge=MERGE)
    with pytest.raises(AlreadyApplied):
        dymu.apply(dinov2, merge=MERGE)
    for copying in (copy.deepcopy, pickle.dumps):
        with pytest.raises(DymuError, match="cannot be copied"):
            copying(dinov2)
    assert list(dinov2.state_dict()) == names
    handle.remove()
    copy.deepcopy(dinov2)


def test_the_encoder_of_a_changed_model_is_not_changed_again() -> None:
    model: Any = tiny.llava("dinov2", "llama")
    with dymu.apply(model, merge=MERGE) as handle:
        assert dymu.handle_of(model.model.vision_tower) is handle
        with pytest.raises(AlreadyApplied):
            dymu.apply(model.model.vision_tower, merge=MERGE)
    with dymu.apply(model.model.vision_tower, merge=MERGE), pytest.raises(AlreadyApplied):
        dymu.apply(model, merge=MERGE)


def test_exchanged_layers_are_followed_or_refused(dinov2: Any) -> None:
    other = tiny_encoders.randomised(DINOV2.make()).encoder.layer[0]
    exchanged = copy.deepcopy(dinov2)
    exchanged.encoder.layer[0] = copy.deepcopy(other)
    by_hand = tiny_encoders.merged_by_hand(DINOV2, exchanged, "forward", MERGING, images())
    with dymu.apply(dinov2, merge=MERGE):
        dinov2(images())
        dinov2.encoder.layer[0] = other
        assert apart(dinov2(images()).pooler_output, by_hand.outputs[0]) < 1e-4
        other.forward = lambda x, *_, **__: 2 * x
        with pytest.raises(UnsupportedModel, match="layer 0"):
            dinov2(images())


@dataclass(frozen=True)
class Halve(Reducer):
    """Of two patches side by side one enters the encoder, as heavy as both; or all enter."""

    width: int

    def before_encoder(self, pixels: Pixels) -> tuple[Tensor, TokenMap]:
        leaders = torch.arange(pixels.shown.counts[0]).expand(len(pixels.pixels), -1) // self.width * self.width
        return pixels.pixels, TokenMap.from_leaders(leaders)


def test_other_reducers_fill_all_places(dinov3: Any) -> None:
    stock = dinov3(images()).last_hidden_state
    for reducer, kept in (
        (FixedMerge(keep=20), [20] * 3),
        (AveragePool(keep=16), [16] * 3),
        (Halve(2), [32] * 3),
        (Halve(1), [64] * 3),
    ):
        with dymu.apply(dinov3, merge=reducer) as handle:
            output = dinov3(images()).last_hidden_state
            assert output.shape == stock.shape
            assert handle.last.kept == kept
            patches = output[:, DINOV3.prefix :]
            copies = patches.gather(
                1, torch.stack([item.leaders for item in handle.last.items])[..., None].expand_as(patches)
            )
            assert torch.equal(patches, copies)
            if kept[0] == DINOV3.patches:
                assert apart(output, stock) < 1e-5
    with dymu.apply(dinov3, merge=AveragePool(keep=16)) as handle:
        dinov3.norm = nn.Identity()
        output = dinov3(images()).last_hidden_state[:, DINOV3.prefix :]
        handle.remove()
        assert apart(output, _pooled(dinov3(images()).last_hidden_state[:, DINOV3.prefix :])) < 1e-5


def _pooled(patches: Tensor) -> Tensor:
    """Means over squares of 2 x 2 patches, at all places."""
    grid = patches.mT.unflatten(-1, (SIDE // PATCH, -1))
    means = nn.functional.avg_pool2d(grid, 2)
    return nn.functional.interpolate(means, scale_factor=2).flatten(-2).mT


@dataclass(frozen=True)
class Shrink(Reducer):
    def before_encoder(self, pixels: Pixels) -> tuple[Tensor, TokenMap]:
        return pixels.pixels[..., ::2, ::2], TokenMap.identity(len(pixels.pixels), pixels.shown.counts[0])


class Drop(Reducer):
    def after_encoder(self, tokens: Tokens) -> Reduced:
        return tokens.keep(torch.arange(tokens.map.width).expand(len(tokens.features), -1) < 9)


@pytest.mark.parametrize(
    ("reducer", "why"), [(Drop(), "drops tokens"), (Shrink(), "smaller pictures"), (RandomKeep(16), "in the prompt")]
)
def test_reducers_that_cannot_fill_all_places_are_refused(dinov2: Any, reducer: Reducer, why: str) -> None:
    with dymu.apply(dinov2, merge=reducer), pytest.raises(UnsupportedModel, match=why):
        dinov2(images())


def test_patches_know_where_they_lie(dinov2: Any) -> None:
    seen = []

    class Note(Reducer):
        def before_encoder(self, pixels: Pixels) -> None:
            seen.append(pixels.shown.location)

    with dymu.apply(dinov2, merge=Note()):
        dinov2(images())
    side = SIDE // PATCH
    assert seen[0].shape == (3, side * side, 4)
    assert torch.allclose(seen[0][1, side + 2], torch.tensor([2, 1, 3, 2]) / side)


def test_what_cannot_be_had_with_merged_tokens_is_refused(dinov2: Any) -> None:
    with pytest.raises(ValueError, match="no language model"):
        dymu.apply(dinov2, merge=MERGE, unmerge="compact")
    with dymu.apply(dinov2, merge=MERGE):
        with pytest.raises(UnsupportedModel, match="attention weights"):
            dinov2(images(), output_attentions=True)
        hidden = torch.ones(3, 1 + DINOV2.patches)
        assert dinov2(images(), attention_mask=hidden).pooler_output.isfinite().all()
        hidden[:, -1] = 0
        with pytest.raises(UnsupportedModel, match="attention_mask"):
            dinov2(images(), attention_mask=hidden)
        dinov2.train()
        dinov2.gradient_checkpointing_enable()
        with torch.enable_grad(), pytest.raises(UnsupportedModel, match="checkpointing"):
            dinov2(images())


def test_layers_that_are_left_out_are_refused(dinov2: Any) -> None:
    with dymu.apply(dinov2, merge=MERGE):
        dinov2.encoder.forward = lambda x, **_: dinov2.encoder.layer[1](x)
        with pytest.raises(UnsupportedModel, match="layer 1 of the encoder"):
            dinov2(images())


def test_other_models_are_refused_by_name() -> None:
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    for model, name in ((text, "clip_text_model"), (nn.Linear(2, 2), "torch.Linear")):
        with pytest.raises(UnsupportedModel, match=rf"{name}.*siglip2_vision_model.*timm\.VisionTransformer"):
            dymu.apply(model, merge=MERGE)


def test_the_vision_half_of_a_contrastive_model_merges() -> None:
    model: Any = tiny_encoders.randomised(
        transformers.CLIPModel(
            transformers.CLIPConfig(
                vision_config=tiny_encoders.CLIP.make().config.to_dict(),
                text_config=tiny_encoders.TEXT,
                projection_dim=8,
            )
        )
    )
    words = torch.arange(5)[None]
    stock = model(pixel_values=images(), input_ids=words)
    with dymu.apply(model.vision_model, merge=MERGE) as handle:
        merged = model.get_image_features(images()).pooler_output
        assert max(handle.last.kept) < 64
    with dymu.apply(model, merge=MERGE):
        assert torch.equal(model.get_image_features(images()).pooler_output, merged)
        both = model(pixel_values=images(), input_ids=words)
        assert torch.equal(both.text_embeds, stock.text_embeds)
        assert apart(both.image_embeds, nn.functional.normalize(merged, dim=-1)) < 1e-5


def test_a_report_draws_what_merged_and_has_merged_tokens(dinov2: Any) -> None:
    shown = [picture.resize((SIDE, SIDE)) for picture in noisy_pictures()[2:5]]
    pixels = torch.stack([torch.from_numpy(np.array(picture)).movedim(2, 0) / 64 - 2 for picture in shown])
    with dymu.apply(dinov2, merge=MERGE) as handle:
        features = dinov2(pixels).last_hidden_state[:, 1:]
        report = handle.last
    assert repr(report.items[0]).startswith(f"<dymu image: kept {report.kept[0]} of 64")
    assert report.draw(shown[1], 1).width % SIDE == 0
    merged = report.map.average(features)
    assert merged.shape == (3, max(report.kept), 32)
    assert apart(merged[2, report.group(2)], features[2]) < 1e-5
    assert apart(report.map.expand(merged), features) < 1e-5
    grid = report.dense(features)
    assert torch.equal(grid, features.unflatten(1, (8, 8)))
    assert torch.equal(report.dense(features, filling="bilinear")[1], report.dense(features[1], 1, filling="bilinear"))
    for wrong in (features[:2], features[:, 1:], torch.cat((features, features))):
        with pytest.raises((ValueError, IndexError), match=r"items|features|image 3"):
            report.dense(wrong)


def test_the_pages_example_runs_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parent.parent / "docs/encoders-alone.md"
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    monkeypatch.chdir(page.parent.parent)
    exec(compile(snippet, page.name, "exec"), {})
    kept, shape, alike = capsys.readouterr().out.strip().splitlines()
    assert 60 < int(re.fullmatch(r"\[(\d+)\] \[256\]", kept)[1]) < 110
    assert shape == "torch.Size([1, 16, 16, 384])"
    assert float(alike) > 0.999
