"""Comparison of backends with the reference; only those that agree are timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from dymu.bench.prompts import inputs_of
from dymu.bench.results import Checked
from dymu.bench.variants import Variant
from dymu.choices import Unmerge
from dymu.errors import UnsupportedModel
from dymu.families.resolve import Parts, find, resolve
from dymu.handle import Handle, apply
from dymu.hooks.versions import going_on
from dymu.merging import a_count
from dymu.reducers import Candidates, Reducer

ALLOWED = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""The largest relative error (Frobenius norm) of the attention's outputs, by dtype."""

LAYERS, VOCABULARY, SPECIAL = 2, 64, 8
"""Layers of each half, ids, and how many of these, the last ones, are no words."""
ROWS, KEY_HEADS = 8, 2
"""Rows of tokens of an image that is one picture, and key heads, at most: the reference takes its time."""
TEXT = (5, 19)
"""Words before and after the image."""
BATCH, DECODED = 2, 2


class Reference:
    """A small model like the measured one, and the reference's attention outputs for a prompt.

    It keeps the family with its way to lay out tiles and to regroup patches, the size of a head, how many query heads
    share a key head, rotary angles and windows, and has two layers (two kinds of them, where there are), up to two key
    heads, and coarser patches or a smaller image. Two images merge at random, each to another number of tokens, and two
    tokens are decoded. The reference runs in float32 on the CPU.

    Args:
        model: the measured one; the small one runs on its device and in its dtype.
        shown: the measured model's image arguments for one image twice; the pixels are replaced by noise.
    """

    def __init__(self, model: Any, shown: Mapping[str, Tensor]) -> None:
        self._device, self._dtype = model.device, model.dtype
        torch.manual_seed(0)
        pixels = shown["pixel_values"]
        try:
            config = _small(resolve(model), pictures=pixels.shape[1] if pixels.ndim > 4 else 1)
        except RuntimeError as error:
            name = resolve(model).family.model_type
            raise UnsupportedModel(
                f"dymu bench cannot make a small {name} to compare backends with, and times none that it has not "
                f"compared ({error})."
            ) from error
        self._model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in self._model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
            self._shown = _smaller(resolve(model), {name: value.cpu() for name, value in shown.items()})
            with apply(self._model, merge=RandomMerges()) as handle:
                resolve(self._model).inner.get_image_features(**self._shown)
                tokens = sum(handle.last.original) // BATCH
        words = [torch.randint(VOCABULARY - SPECIAL, (BATCH, count)) for count in (*TEXT, DECODED)]
        image = torch.full((BATCH, tokens), VOCABULARY - 1)
        self._ids, self._decoded = torch.cat((words[0], image, words[1]), 1), words[2]
        _cast(self._model, self._dtype)  # to weights that the measured dtype holds: only the arithmetic differs
        _cast(self._model, torch.float32)
        self._expected = dict[Unmerge, Tensor]()

    def check(self, variant: Variant) -> Checked:
        """Compare the variant's attention outputs with the reference's."""
        allowed = ALLOWED.get(self._dtype, max(ALLOWED.values()))
        model = copy.deepcopy(self._model).to(self._device)
        _cast(model, self._dtype)
        try:
            attended = self._attended(model, variant)
            if variant.unmerge not in self._expected:
                reference = Variant("reference", "reference", unmerge=variant.unmerge)
                self._expected[variant.unmerge] = self._attended(self._model, reference)
        except Exception as error:  # kernel compilers raise many kinds of errors
            return Checked(None, allowed, " ".join(str(error).split()) or type(error).__name__)
        expected = self._expected[variant.unmerge]
        off = float((attended - expected).norm() / expected.norm())
        return Checked(off, allowed) if math.isfinite(off) else Checked(None, allowed, "its outputs are not finite")

    @torch.no_grad()
    def _attended(self, model: Any, variant: Variant) -> Tensor:
        """Outputs of the attention layers for every merged token of the prompt and of the decoding, [all, C]."""
        outputs: list[Tensor] = []
        handle: Handle | None = None

        def take(_module: object, _args: object, output: Any) -> None:
            assert handle is not None
            rows: Any = output[0].float().cpu()
            lengths = [sum(TEXT) + kept for kept in _by_prompt(handle.last.kept)]
            if len(rows) < BATCH:  # rows of different lengths travel as one
                rows = rows[0].split(lengths)
            outputs.extend(row[:length] for row, length in zip(rows, lengths, strict=True))  # padding may be anything

        hooks = [module.register_forward_hook(take) for module in resolve(model).attentions]
        try:
            with variant.on(model, {"merge": RandomMerges()}) as handle:
                prompt = {**inputs_of(resolve(model), self._ids), **self._shown}
                prompt["pixel_values"] = prompt["pixel_values"].to(model.dtype)
                output = model(**{name: value.to(model.device) for name, value in prompt.items()}, use_cache=True)
                for words in self._decoded.split(1, 1):
                    output = model(input_ids=words.to(model.device), use_cache=True, **going_on(model, output))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(outputs)


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights; rotary frequencies stay as they are, as they do when a model is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _by_prompt(kept: Sequence[int]) -> list[int]:
    """Tokens left in each prompt, of those left of each item."""
    each = len(kept) // BATCH
    return [sum(kept[start : start + each]) for start in range(0, len(kept), each)]


def _small(parts: Parts, pictures: int) -> Any:
    """The config of a small model.

    Args:
        pictures: that an image is cut into.
    """
    config, family, kind = copy.deepcopy(parts.config), parts.family, parts.tower_kind
    text, vision = config.get_text_config(), config.vision_config
    wide = text.hidden_size
    head = getattr(text, "head_dim", None) or wide // text.num_attention_heads
    shared = text.num_attention_heads // text.num_key_value_heads
    heads = min(text.num_key_value_heads, KEY_HEADS)
    text.head_dim, text.num_key_value_heads, text.num_attention_heads = head, heads, heads * shared
    text.hidden_size = text.intermediate_size = head * heads * shared
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = LAYERS, VOCABULARY, None
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = (list(dict.fromkeys(text.layer_types)) * LAYERS)[:LAYERS]
    width = kind.width.removeprefix("config.")
    # What is as wide as the language model, but for the encoder itself, stays so.
    for settings in (vision, config):
        for name, value in vars(settings).items():
            if value == wide and not (settings is vision and name == width):
                setattr(settings, name, text.hidden_size)
    small: dict[str, Any] = {
        width: 32,
        kind.heads.removeprefix("config."): 2,
        "head_dim": 16,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "depth": LAYERS,
    }
    small |= {name: [LAYERS - 1] for name in vars(vision) if name.endswith("_indexes")}
    for name, value in small.items():
        if hasattr(vision, name):
            setattr(vision, name, value)
    if kind.arrangement == "batch":
        rows = max(round(ROWS / math.sqrt(pictures)), 2) * parts.side()
        side, patch = (
            min(size) if isinstance(size, list | tuple) else size for size in (vision.image_size, vision.patch_size)
        )
        # The side of a picture stays, by which the family cuts images.
        patch = max(side // min(rows, side), patch)
        vision.patch_size = [patch, patch] if isinstance(vision.patch_size, list | tuple) else patch
    if isinstance(family.feature_layer, str):
        for name in (name for name in family.feature_layer.split("|") if hasattr(config, name)):
            layers = getattr(config, name)
            setattr(config, name, -1 if isinstance(layers, int) else [-1] * len(layers))
    for name in (name for name in vars(config) if name.endswith(("token_id", "token_index"))):
        if isinstance(getattr(config, name), int):
            setattr(config, name, VOCABULARY - 2)
    setattr(config, family.image_token, VOCABULARY - 1)
    return config


def _smaller(parts: Parts, shown: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same arguments with noise for pixels, and, where pictures have sizes of their own, smaller ones."""
    pixels, sizes = shown["pixel_values"], shown.get((parts.family.grid or "").format(modality="image"))
    patches = ROWS * parts.side("image", shown)
    if sizes is not None and parts.tower_kind.arrangement in ("packed", "raster"):
        if sizes.shape[1] == 3:  # of patches, in one row
            sizes = torch.cat((sizes[:, :1], sizes[:, 1:].clamp(max=patches)), 1)
            pixels = pixels[: int(sizes.prod(1).sum())]
        else:  # in pixels
            longest = patches * int(find(parts.tower, parts.tower_kind.patch_size))
            pixels, sizes = pixels[..., :longest, :longest], sizes.clamp(max=longest)
        shown = {**shown, parts.family.grid.format(modality="image"): sizes}  # type: ignore[union-attr]
    return {**shown, "pixel_values": torch.randn(pixels.shape)}


class RandomMerges(Reducer):
    """In every layer a random half of the A tokens merges with random partners, in pictures of the second half of the
    images a quarter: alike on every device and in every dtype."""

    def in_layer(self, candidates: Candidates) -> Tensor:
        rows, prefix, similarity = (
            candidates.state.rows(candidates.windowed).units,
            candidates.prefix,
            candidates.similarity,
        )
        generator = torch.Generator().manual_seed(candidates.layer)
        chance, choice = (torch.rand(similarity.shape, generator=generator).to(similarity.device) for _ in range(2))
        second = candidates.picture * BATCH // len(candidates.tokens)
        partners = rows.length - prefix - a_count(rows.length, prefix)
        merges = (similarity > -torch.inf) & (chance < 0.5 / (1 + second[:, None])) & (partners[:, None] > 0)
        return torch.where(merges, (choice * partners[:, None]).long(), -1)
