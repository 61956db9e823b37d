"""The recipe of the strong model: what is learned is what will be asked, whoever asks it and however often it stops."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    Dinov2Config,
    LlamaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import training.cache
from dymu.prompting import prompt
from scenes import compose, evaluation_pack
from training.vlm import base, pieces
from training.vlm.assemble import LANGUAGE_PREFIX, assemble
from training.vlm.data import (
    PATCH,
    ROOM,
    SIDE,
    TRAINED_KINDS,
    Asked,
    Batch,
    Batches,
    Chat,
    Example,
    Examples,
    pack,
)
from training.vlm.export import export
from training.vlm.gguf import DEQUANTISE, Gguf
from training.vlm.lora import LoraLinear, add_lora, lora_layers
from training.vlm.losses import Objective
from training.vlm.train import PEAKS, STAGE_1, Plan, Progress, Trainer, schedule


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """The recipe's own, of a vocabulary that is at hand: the bytes, and the special tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", base.IMAGE_WAS]
    letters = sorted(ByteLevel.alphabet())
    return base.build_tokenizer(
        {
            "tokenizer.ggml.tokens": [*special, *letters],
            "tokenizer.ggml.token_type": [3] * len(special) + [1] * len(letters),
            "tokenizer.ggml.merges": [],
            "llama.context_length": 8192,
        }
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The whole in miniature, at random: four image tokens a side."""
    language = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    tower = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=4 * PATCH, patch_size=PATCH
    )
    config = base.llava_config(language, tower, tokenizer.convert_tokens_to_ids(base.IMAGE))
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def tiny_example(seed: int, *asked: Asked) -> Example:
    rng = np.random.default_rng(seed)
    unknown = np.full(16, -100)
    return Example(rng.integers(0, 256, (4 * PATCH, 4 * PATCH, 3), dtype=np.uint8), asked, unknown, unknown)


ASKED = (
    Asked("naming", "What is this? Answer with one word.", "dog"),
    Asked("counting", "How many dogs are there? Answer with a number.", "7"),
    Asked("caption", "Describe the image briefly.", "7 dogs on a grey background."),
)


def tiny_batch(chat: Chat, *examples: Example) -> Batch:
    return pack(examples, [], chat, [5], [6, 7], room=320)


# What is learned


def test_packed_questions_lose_what_they_lose_one_by_one(tokenizer):
    model = tiny_model(tokenizer)
    chat = Chat(tokenizer, image_tokens=16)
    objective = Objective(model, chat, 5, [6, 7])

    def losses(*examples: Example) -> list[torch.Tensor]:
        batch = tiny_batch(chat, *examples)
        logits = objective.answer_logits(objective.visual(batch.pixels), batch)
        each = nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        return [each[batch.kinds == TRAINED_KINDS.index(asked.kind)] for asked in ASKED]

    with torch.no_grad():
        together = losses(tiny_example(1, *ASKED))
        alone = [losses(tiny_example(1, asked))[number] for number, asked in enumerate(ASKED)]
    for one, other in zip(together, alone, strict=True):
        assert len(one)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_loss_is_that_of_the_stock_model_on_the_prompt_that_the_processor_builds(tokenizer):
    model = tiny_model(tokenizer)
    chat = Chat(tokenizer, image_tokens=16)
    asked, example = ASKED[2], tiny_example(1, ASKED[2])
    ids = chat.prefix + chat.turn(asked.question, asked.answer)[0]
    labels = [-100] * (len(chat.prefix) + chat.turn(asked.question, asked.answer)[1])
    labels += ids[len(labels) :]
    objective = Objective(model, chat, 5, [6, 7])
    batch = tiny_batch(chat, example)
    pixels = (batch.pixels.permute(0, 3, 1, 2).float() - objective.mean) / objective.std
    with torch.no_grad():
        ours, _ = objective(batch, 0.0)
        model.model.language_model.set_attn_implementation("sdpa")
        stock = model(input_ids=torch.tensor([ids]), pixel_values=pixels, labels=torch.tensor([labels])).loss
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


def test_the_prompt_that_is_asked_is_the_one_that_was_trained_on(tokenizer):
    processor = base.build_processor(tokenizer)
    chat = Chat(tokenizer)
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    text = prompt(processor, ASKED[0].question)
    built = processor(images=image, text=text, add_special_tokens=False)["input_ids"][0]
    turn, question = chat.turn(ASKED[0].question, ASKED[0].answer)
    assert list(built) == chat.prefix + turn[:question]
    assert tokenizer.decode(turn[question:]) == f"{ASKED[0].answer}<|im_end|>"
    assert turn[-1] == tokenizer.eos_token_id
    assert chat.prefix.count(tokenizer.convert_tokens_to_ids(base.IMAGE)) == base.GRID**2


def test_a_prompt_without_images_is_the_language_model_s_own(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello!"}], chat_template=base.CHAT_TEMPLATE, tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    )


# What it is learned from


@pytest.fixture(scope="module")
def examples(tokenizer) -> Examples:
    """Of the library's own pack, whose calibration pictures stand in for those of training."""
    return Examples(_for_training(evaluation_pack()), Chat(tokenizer), seed=3)


def _for_training(materials):
    """The same pack, as if it were for training."""
    changed = copy.copy(materials)
    changed.backgrounds = tuple(replace(row, use="training") for row in materials.backgrounds)
    changed.fonts = tuple(replace(row, use="training") for row in materials.fonts)
    return changed


def test_the_same_number_gives_the_same_example_whoever_makes_it(examples):
    for number in (0, 5):
        first, second = examples[number], examples[number]
        assert np.array_equal(first.pixels, second.pixels)
        assert np.array_equal(first.names, second.names)
        assert first.asked == second.asked
    assert examples[0].asked != examples[5].asked


def test_a_resumed_run_goes_on_with_the_batches_it_would_have_seen(examples):
    talks = [("Hello!", "Hi."), ("Who are you?", "A model.")]
    whole, resumed = Batches(examples, talks, batch=2), Batches(examples, talks, batch=2, first=3)
    for name, value in vars(whole[4]).items():
        assert torch.equal(value, getattr(resumed[1], name)), name


def test_questions_fit_behind_the_image_and_are_of_many_kinds(examples):
    kinds = set()
    for number in range(12):
        example = examples[number]
        kinds |= {asked.kind for asked in example.asked}
        lengths = [len(examples.chat.turn(asked.question, asked.answer)[0]) for asked in example.asked]
        assert sum(lengths) <= ROOM or example.asked[0].kind == "photo"
        assert example.pixels.shape == (SIDE, SIDE, 3)
    assert len(kinds) >= 4


def test_places_are_named_after_what_lies_there(examples):
    scene = compose(examples.materials, 1, 2, 0.1, use="training", focus="colour")
    names, colours = (grid.reshape(base.GRID, base.GRID) for grid in examples.places(scene))
    for item in scene.items:
        x, y = (int(part / PATCH) for part in item.centre)
        assert names[y, x] == examples.first_token(item.name)
        if item.colour:
            assert colours[y, x] == examples.first_token(item.colour)


# How it goes on


def test_the_schedule_does_not_jump_where_a_run_is_continued():
    plan = Plan(seconds=1200)
    fractions = [plan.fraction(Progress(step, seconds)) for step, seconds in ((100, 540.0), (101, 540.3))]
    rates = [schedule(fraction)[1] for fraction in fractions]
    assert abs(rates[0] - rates[1]) < 1e-3
    assert schedule(0.0)[0] == 0
    assert schedule(STAGE_1)[0] == 1
    ends = [schedule(fraction)[1] for fraction in (STAGE_1 - 1e-9, 1.0)]
    assert all(end == pytest.approx(0.02, abs=1e-3) for end in ends)
    assert max(schedule(k / 1000)[1] for k in range(1001)) <= 1


def test_only_the_projector_learns_at_first():
    assert [name for name, rates in PEAKS.items() if rates[0]] == ["projector"]
    assert all(rates[1] for rates in PEAKS.values())


class _Tokens:
    """As much of ``Examples`` as a trainer needs."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def first_token(self, name: str) -> int:
        return 5

    def colour_tokens(self) -> list[int]:
        return [6, 7]


def tiny_trainer(tokenizer: PreTrainedTokenizerFast) -> Trainer:
    model = tiny_model(tokenizer)
    return Trainer(model, base.build_processor(tokenizer), _Tokens(Chat(tokenizer, 16)), torch.device("cpu"))


@torch.enable_grad()
def test_a_resumed_run_is_the_uninterrupted_one(tokenizer, tmp_path):
    chat = Chat(tokenizer, 16)
    batches = [tiny_batch(chat, tiny_example(seed, *ASKED)) for seed in range(6)]
    fractions = [0.02, 0.06, 0.3, 0.5, 0.6, 0.7]
    whole, stopped, resumed = (tiny_trainer(tokenizer) for _ in range(3))
    for batch, fraction in zip(batches, fractions, strict=True):
        whole.one_step(batch, fraction)
    for batch, fraction in zip(batches[:3], fractions[:3], strict=True):
        stopped.one_step(batch, fraction)
    stopped.save(tmp_path / "checkpoint.pt")
    resumed.load(tmp_path / "checkpoint.pt")
    assert resumed.progress.step == 3
    for batch, fraction in zip(batches[3:], fractions[3:], strict=True):
        resumed.one_step(batch, fraction)
    for name, value in whole.trained().items():
        assert torch.equal(value, resumed.trained()[name]), name
    first = tiny_trainer(tokenizer).trained()
    assert any("lora_b" in name and not torch.equal(value, first[name]) for name, value in whole.trained().items())


# What comes out


def test_an_update_starts_as_nothing_and_merges_exactly():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Sequential(nn.Linear(6, 4)))
    x = torch.randn(3, 8)
    before = model(x)
    add_lora(model, rank=2, scale=0.5)
    assert torch.equal(model(x), before)
    assert sorted(name for name, p in model.named_parameters() if p.requires_grad) == [
        "0.lora_a", "0.lora_b", "1.0.lora_a", "1.0.lora_b",
    ]  # fmt: skip
    layers = dict(lora_layers(model))
    assert set(layers) == {"0", "1.0"}
    layer = layers["0"]
    nn.init.normal_(layer.lora_b)
    expected = x @ (layer.weight + 0.5 * layer.lora_b @ layer.lora_a).T
    torch.testing.assert_close(layer(x), expected)
    assert isinstance(layer, LoraLinear)


@torch.enable_grad()
def test_what_is_exported_and_assembled_is_what_was_trained(tokenizer, tmp_path):
    trainer = tiny_trainer(tokenizer)
    trainer.one_step(tiny_batch(Chat(tokenizer, 16), tiny_example(0, *ASKED)), 0.3)
    with torch.no_grad():  # what is exported has no more bits than this
        for parameter in trainer.model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    export(trainer, tmp_path / "parts")
    language = {
        name: value.detach()
        for name, value in trainer.model.model.language_model.state_dict().items()
        if "lora" not in name
    }
    folder = assemble(tmp_path / "parts", tmp_path / "model", lambda: dict(language))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is LlavaForConditionalGeneration
    for name, layer in lora_layers(trainer.model.model.language_model):
        merged = (layer.weight.float() + layer.scale * layer.lora_b @ layer.lora_a).to(torch.bfloat16).float()
        assert torch.equal(model.model.language_model.get_submodule(name).weight, merged)
        assert merged.ne(layer.weight.float()).any()
    own = trainer.model.model.vision_tower.state_dict()
    for name, value in model.model.vision_tower.state_dict().items():
        assert torch.equal(value, own[name].float()), name
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert assemble(tmp_path / "parts", folder, lambda: pytest.fail("assembled twice")) == folder
    assert all(name.startswith(LANGUAGE_PREFIX) or "lora" not in name for name in language)


@torch.enable_grad()
def test_training_can_go_on_from_exported_parts(tokenizer, tmp_path):
    trainer = tiny_trainer(tokenizer)
    trainer.one_step(tiny_batch(Chat(tokenizer, 16), tiny_example(0, *ASKED)), 0.3)
    trainer.progress.seconds = 2.5
    export(trainer, tmp_path / "parts")
    restored = tiny_trainer(tokenizer)
    restored.restore(tmp_path / "parts")
    assert restored.progress == Progress(1, 2.5)
    for name, value in trainer.trained().items():
        assert torch.equal(restored.trained()[name], value.to(torch.bfloat16).float()), name


def test_damaged_parts_are_refused(tokenizer, tmp_path):
    export(tiny_trainer(tokenizer), tmp_path / "parts")
    (part,) = (tmp_path / "parts").glob("trained-*.safetensors")
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ValueError, match="fetch it again"):
        assemble(tmp_path / "parts", tmp_path / "model", dict)


def test_pieces_make_the_file_again(tmp_path):
    data = np.random.default_rng(0).bytes(2 * 2**20 + 5)
    (tmp_path / "weights.bin").write_bytes(data)
    pieces.split([tmp_path / "weights.bin"], tmp_path / "pieces", mib=1)
    assert len(json.loads((tmp_path / "pieces" / "weights.bin.json").read_text())["pieces"]) == 3
    lost = (tmp_path / "pieces" / "weights.bin.001").rename(tmp_path / "lost")
    pieces.join(tmp_path / "pieces", tmp_path / "whole")
    assert not (tmp_path / "whole" / "weights.bin").exists()
    lost.rename(tmp_path / "pieces" / "weights.bin.001")
    pieces.join(tmp_path / "pieces", tmp_path / "whole")
    assert (tmp_path / "whole" / "weights.bin").read_bytes() == data
    (tmp_path / "pieces" / "weights.bin.002").write_bytes(b"other")
    with pytest.raises(SystemExit, match="copy them again"):
        pieces.join(tmp_path / "pieces", tmp_path / "whole")


# The packaged language model


@pytest.mark.parametrize("kind", sorted(DEQUANTISE))
def test_weights_are_dequantised_as_gguf_does(kind):
    quants = pytest.importorskip("gguf.quants", reason="gguf is in training/requirements.txt only")
    from gguf import GGMLQuantizationType

    values = np.random.default_rng(kind).normal(size=(4, 64)).astype(np.float32)
    raw = quants.quantize(values, GGMLQuantizationType(kind)).view(np.uint8)
    size, dequantise = DEQUANTISE[kind]
    ours = dequantise(raw.reshape(-1, size)).reshape(values.shape)
    assert np.array_equal(ours, quants.dequantize(raw, GGMLQuantizationType(kind)).reshape(values.shape))


def test_a_gguf_file_is_read_as_it_was_written(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is in training/requirements.txt only")
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ü"])
    value = np.arange(96, dtype=np.float32).reshape(3, 32)
    writer.add_tensor("token_embd.weight", value)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    file = Gguf.open(tmp_path / "tiny.gguf")
    assert file.metadata["llama.block_count"] == 3
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b", "ü"]
    ((name, read),) = file.tensors()
    assert name == "token_embd.weight"
    assert np.array_equal(read, value)


def _cached_gguf() -> Path:
    path = training.cache.cache_root() / "vlm" / "language.gguf"
    if not path.exists():
        pytest.skip("the packaged language model is not in the cache")
    return path


def test_the_packaged_language_model_is_read_as_transformers_reads_it():
    pytest.importorskip("gguf", reason="gguf is in training/requirements.txt only")
    pytest.importorskip("accelerate", reason="accelerate is in training/requirements.txt only")
    from transformers import AutoModelForCausalLM

    path = _cached_gguf()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    ours = base.language_weights(Gguf.open(path))
    state = theirs.model.state_dict()
    assert set(state) == set(ours)
    assert all(torch.equal(state[name], value) for name, value in ours.items())
    config = base.language_config(Gguf.open(path).metadata)
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "rope_parameters"):
        assert getattr(config, name) == getattr(theirs.config, name), name
    assert config.rms_norm_eps == pytest.approx(theirs.config.rms_norm_eps, rel=1e-6)


def test_the_packaged_tokenizer_reads_and_writes():
    tokenizer = base.build_tokenizer(Gguf.open(_cached_gguf()).metadata)
    text = "How many dogs are there in 1984? Três, naïve.\n\n  def f(x): return x"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 49152
    assert tokenizer.convert_ids_to_tokens(tokenizer("1984")["input_ids"]) == list("1984")
    assert tokenizer("<image>")["input_ids"] == [tokenizer.convert_tokens_to_ids("<image>")]
    assert math.isfinite(tokenizer.model_max_length)
