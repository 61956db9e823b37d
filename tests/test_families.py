"""What is said of each family is so: what it may hold, since when it works, and what is not supported."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
import transformers
from packaging import version

import dymu
import tiny
import tiny_families
from dymu.bench.check import RandomMerges, Reference
from dymu.errors import BadPrompt, DymuError, UnsupportedCache, UnsupportedModel
from dymu.families import FAMILIES, limits, listing
from dymu.families.resolve import resolve
from dymu.reducers import FixedMerge, ThresholdMerge
from tiny_families import patches

ROOT = Path(__file__).parents[1]
HALF = FixedMerge(0.5)
NOTHING = ThresholdMerge((2.0,) * tiny.LAYERS)
TINY = [name for name, family in tiny.FAMILIES.items() if family.exists and (family.model_type or name) in FAMILIES]
BOTH_WAYS = ("gemma3", "paligemma+gemma2", "gemma4")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def two_images(model):
    return tiny.inputs(model, tiny.prompt(model, 4, "image", 3, "image", 7), tiny.pictures(2))


def items_of_two_images(name):
    model = tiny.build(name)
    with dymu.apply(model, merge=HALF) as handle:
        model(**two_images(model))
        return [item.pictures for item in handle.last.items]


# What is not supported: each phrase, and what proves it of a family.


def tiles_apart(name):
    assert items_of_two_images(name) == [1, 1]


def tiles_joined(name):
    joined = version.parse(transformers.__version__) >= version.parse("5.21")
    assert items_of_two_images(name) == ([2] if joined else [1, 1])


def padded(name):
    model = tiny.build(name)
    asked = tiny.asked(model)
    asked["pixel_attention_mask"][..., -16:] = 0
    model(**asked)
    with dymu.apply(model, merge=HALF), pytest.raises(BadPrompt, match="padded within its pixels"):
        model(**asked)


def frames_are_images(name):
    inner = tiny.build(name).model
    assert not {"pixel_values_videos", "video_grid_thw"} & set(inspect.signature(type(inner).forward).parameters)


def cache_fast(name):
    with pytest.raises(UnsupportedModel, match='cache="fast" would keep'):
        dymu.apply(tiny.build(name), merge=HALF, cache="fast")


def no_representative(name):
    with pytest.raises(UnsupportedModel, match='take unmerge="exact"'):
        dymu.apply(tiny.build(name), merge=HALF, unmerge="representative")


def linear_attention_runs_on_all(name):
    model = tiny.build(name)
    seen = []
    for mixer in resolve(model).mixers:
        mixer.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    asked = tiny.asked(model)
    with dymu.apply(model, merge=HALF):
        model(**asked)
    assert set(seen) == {asked["input_ids"].shape[1]}


def images_and_videos(name):
    model = tiny.build(name)
    one, both = tiny.asked(model), two_images(model)
    both |= {"pixel_values": one["pixel_values"], "image_grid_thw": one["image_grid_thw"]}
    both |= {"pixel_values_videos": one["pixel_values"], "video_grid_thw": one["image_grid_thw"]}
    with pytest.raises(ValueError, match="do not match"):
        model(**both)
    with dymu.apply(model, merge=HALF), pytest.raises(DymuError):
        model(**both)


def uncompressed(name):
    model = tiny.build(name)
    ids = torch.tensor([[3, 4, *[tiny.VIDEO_TOKEN] * 23, 5]])
    shown = patches(1, 1)([torch.randn(3, 24, 16)], [1])
    asked = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": shown["pixel_values"],
        "video_grid_thw": shown["image_grid_thw"], "video_merge_sizes": torch.tensor([1]),
        "video_compression_mask": torch.arange(24) != 7,
    }  # fmt: skip
    model(**asked)
    with dymu.apply(model, merge=HALF), pytest.raises(BadPrompt, match="left 1 of 24 video tokens out"):
        model(**asked)
    asked["video_compression_mask"][:] = True
    asked["input_ids"] = torch.tensor([[3, 4, *[tiny.VIDEO_TOKEN] * 24, 5]])
    asked["attention_mask"] = torch.ones_like(asked["input_ids"])
    with dymu.apply(model, merge=HALF) as handle:
        model(**asked)
        assert handle.last.kept == [12]


def ministral(name):
    text = {**tiny_families.FAMILIES[name].text, "model_type": "ministral3"}
    with pytest.raises(UnsupportedModel, match="ministral3"):
        dymu.apply(tiny.build(name, text=text), merge=HALF)


def several_layers_with_pixtral(name):
    model = tiny.build("llava+pixtral", vision_feature_layer=[-1, -2])
    assert model.config.model_type == name
    asked = tiny.asked(model)
    model(**asked)
    with dymu.apply(model, merge=HALF), pytest.raises(UnsupportedModel, match="several encoder layers"):
        model(**asked)


def frames_pooled_by_weights(name):
    model = tiny.build(name, spatial_pool_mode="conv")
    video = torch.randn(1, 2, 3, tiny_side(model), tiny_side(model))
    model.get_video_features(video)
    with dymu.apply(model, merge=HALF), pytest.raises(UnsupportedModel, match="learned weights"):
        model.get_video_features(video)


def tiny_side(model):
    return model.config.vision_config.image_size


def makes_no_images(name):
    model = tiny.build(name)
    model.generation_config.generation_kwargs = {"boi_token_id": 59}
    ids = tiny.prompt(model, 6)[None]
    with dymu.apply(model, merge=HALF), pytest.raises(UnsupportedCache):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_mode="image")


def other_sizes_of_units(name):
    model = tiny.build(name)
    shown = tiny.shown(model, tiny.pictures(2)) | {"image_merge_sizes": torch.tensor([1, 2])}
    model.get_image_features(**shown)
    with dymu.apply(model, merge=HALF), pytest.raises(UnsupportedModel, match="merged by different sizes"):
        model.get_image_features(**shown)


def soft_cap(name):
    model = tiny.build(f"{name}+gemma2")
    asked = tiny.asked(model)
    if version.parse(transformers.__version__) < version.parse("5.21"):
        under_sdpa = model(**asked).logits
        model.set_attn_implementation("eager")
        assert (under_sdpa - model(**asked).logits).abs().max() > 0.1
    expected = model(**asked).logits
    with dymu.apply(model, merge=NOTHING):
        tiny.close(model(**asked).logits, expected)


def bench_refuses(name):
    model = tiny.build(name)
    with pytest.raises(UnsupportedModel, match="cannot make a small"):
        Reference(model, tiny.shown(model, tiny.pictures(2)))


def refuses_fine_tiles(name):
    model = tiny.build(name)
    asked = {**tiny.asked(model), "tile_fine_mask": torch.ones(1, dtype=torch.bool)}
    with dymu.apply(model, merge=HALF), pytest.raises(UnsupportedModel, match="tile_fine_mask"):
        model(**asked)


PROOFS = {
    "the argument tile_fine_mask is refused": refuses_fine_tiles,
    limits.CACHE_FAST: cache_fast,
    limits.NO_REPRESENTATIVE: no_representative,
    limits.TILES_APART: tiles_apart,
    limits.TILES_JOINED: tiles_joined,
    limits.PADDED: padded,
    limits.FRAMES_ARE_IMAGES: frames_are_images,
    "the crops of pan and scan are reported as images of their own": tiles_apart,
    "layers with linear attention run on all tokens": linear_attention_runs_on_all,
    "images and videos in one call are refused, as by the model itself": images_and_videos,
    "Ministral 3's language model, which scales queries by their positions, is refused": ministral,
    "videos need use_token_compression=False": uncompressed,
    "several encoder layers read at once are refused with pixtral": several_layers_with_pixtral,
    "frames pooled by learned weights (spatial_pool_mode conv) are refused": frames_pooled_by_weights,
    "making images is refused, since its cache is static": makes_no_images,
    "images of one call that are to be merged by different sizes are refused": other_sizes_of_units,
    "before transformers 5.21, Gemma 2 under SDPA has no soft-cap; with DyMU it has": soft_cap,
    "dymu bench does not time it": bench_refuses,
}
SAID = [(phrase, name) for phrase, families in listing.limits().items() for name in families]


def test_every_limit_is_proved():
    assert set(PROOFS) == set(listing.limits())


@pytest.mark.parametrize(("phrase", "name"), SAID)
def test_a_limit_is_so(phrase, name):
    if not FAMILIES[name].works_with(transformers.__version__):
        pytest.skip("not with this transformers")
    PROOFS[phrase](name)


@pytest.mark.parametrize("name", TINY)
def test_a_fast_cache_is_right_or_refused(name):
    model = tiny.build(name)
    asked = {**tiny.asked(model), "output_logits": True, "return_dict_in_generate": True}
    with dymu.apply(model, merge=HALF):
        expected = torch.cat(tiny.answer(model, **asked).logits)
    if limits.CACHE_FAST in resolve(model).family.limits:
        cache_fast(name)
        return
    with dymu.apply(model, merge=HALF, cache="fast"):
        tiny.close(torch.cat(tiny.answer(model, **asked).logits), expected)


@pytest.mark.parametrize("name", [name for name in BOTH_WAYS if name in TINY])
def test_backends_agree_where_tokens_attend_both_ways(name):
    model = tiny.build(name)
    prompts = torch.stack([tiny.prompt(model, 5, "image", 9, seed=seed) for seed in range(2)])
    asked = tiny.inputs(model, prompts, tiny.pictures(2))
    logits = {}
    for backend in ("reference", "sdpa"):
        with dymu.apply(model, merge=RandomMerges(), backend=backend):
            logits[backend] = model(**asked).logits
    tiny.close(logits["sdpa"], logits["reference"])


# What is said of each family.


def test_the_list_says_what_the_descriptions_say():
    families = {family["model_type"]: family for family in listing.data("5.24.0")}
    assert list(families) == sorted(FAMILIES)
    assert families["qwen2_5_vl"] == {
        "model_type": "qwen2_5_vl",
        "since": "5.18",
        "usable": True,
        "images": "any size",
        "tiles": False,
        "native_resolution": ["qwen2_5_vl_vision"],
        "videos": True,
        "unit": "config.vision_config.spatial_merge_size",
        "towers": ["qwen2_5_vl_vision"],
        "decoders": ["qwen2_5_vl_text"],
        "limits": [],
    }
    assert families["llava"]["images"] == "one size, or any with pixtral"
    assert families["llava_next"]["images"] == "tiles of one size"
    lines = {line[0]: line for line in listing.listed("5.19.1")}
    assert lines["ovis2"][1] == "≥ 5.20, so not with 5.19.1"
    assert lines["llava"][1] == "≥ 5.18"
    assert lines["mistral3"][-1] == "any plain one but olmo, cohere2"
    assert not {family["model_type"]: family for family in listing.data("5.19.1")}["ovis2"]["usable"]


def test_a_family_is_refused_ahead_of_its_version(monkeypatch):
    model = tiny.build("llava")
    monkeypatch.setattr("dymu.families.resolve.transformers.__version__", "5.17.0")
    with pytest.raises(UnsupportedModel, match=r"llava works with dymu from transformers 5\.18 on, and this is 5\.17"):
        dymu.apply(model, merge=HALF)


@pytest.mark.parametrize("name", TINY)
def test_a_familys_own_kinds_are_named(name):
    """The parts that transformers builds for it are among those that the list says it may hold."""
    config = tiny.configured(name)
    family = FAMILIES[config.model_type]
    assert config.vision_config.model_type in [name for tower in family.towers for name in tower.model_types]
    assert config.get_text_config().model_type in [name for one in family.decoders for name in one.model_types]


@pytest.mark.parametrize("kind", ["towers", "decoders"])
def test_every_kind_that_is_named_exists(kind):
    usable = (family for family in FAMILIES.values() if family.works_with(transformers.__version__))
    names = {name for family in usable for part in getattr(family, kind) for name in part.model_types}
    assert names <= set(transformers.CONFIG_MAPPING)


def test_only_descriptions_know_a_family_by_name():
    """A name in a condition elsewhere would be a branch for one family; what differs is a field for all."""
    names = {
        name
        for family in FAMILIES.values()
        for name in (family.model_type, *(n for kind in (*family.towers, *family.decoders) for n in kind.model_types))
    }
    files = [path for path in (ROOT / "src").rglob("*.py") if "families" not in path.parts]
    assert len(files) > 100
    spelled = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert not spelled
