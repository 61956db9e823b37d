"""Whether a model of the user's keeps the contract: tried on the model itself, on one or two pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedModel

from dymu.errors import AlreadyApplied, DymuError, UnsupportedModel
from dymu.families.resolve import find, resolve
from dymu.files import first_line
from dymu.handle import apply, handle_of
from dymu.hooks.cache import cache_bytes
from dymu.hooks.versions import cache_of
from dymu.prompting import generate, inputs_for, items_by_prompt
from dymu.reducers import FixedMerge

IN_FULL = (1e-5, 1e-4)
"""How far logits may be off where nothing merges, and in a batch from its rows alone, in parts of the largest."""
IN_HALF = {torch.float16: (1e-2, 1e-2), torch.bfloat16: (5e-2, 5e-2)}
"""The same in half precision."""
NOTHING, HALF = FixedMerge(keep=1.0), FixedMerge(keep=0.5)
QUESTIONS = ("What is in the picture?", "What else can be seen in this one, and where in it is that?")
NEW_TOKENS = 16


class Finding(msgspec.Struct, frozen=True):
    """One part of the contract, whether the model keeps it, and what was seen."""

    part: str
    passed: bool
    seen: str


class ModelCheck(msgspec.Struct, frozen=True):
    """What `check` found, in order. Where the model is of no described family, nothing else is tried."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)


def check(model: PreTrainedModel, processor: Any, image: Image.Image | None = None) -> ModelCheck:
    """Try the contract on a model: what DyMU does to it, and that nothing of that stays.

    In float32 logits may be off by 1e-5 of the largest, and a batch by 1e-4. Half precision rounds more, see `IN_HALF`:
    there near ties may give other words, and a batch other merges than its rows alone, and neither counts as a failure.

    Args:
        model: a transformers model, without DyMU, in evaluation mode; it is as it was afterwards.
        processor: the model's processor.
        image: what to show it; None: a picture that is drawn for it.

    Raises:
        AlreadyApplied: DyMU is applied to the model.
        DymuError: the model is in training mode.
        BadPrompt: its processor makes no prompt.
    """
    if model.training:
        raise DymuError("a model in training mode answers otherwise each time (dropout): call model.eval() first.")
    part = "its family is described"
    try:
        parts = resolve(model)
        if handle_of(model) is not None:
            raise AlreadyApplied("DyMU is applied to this model, so it cannot be checked; call handle.remove() first.")
        with apply(model, merge=NOTHING):
            pass
    except UnsupportedModel as error:
        return ModelCheck((Finding(part, False, str(error)),))
    halves = [find(half, "config.model_type") for half in (parts.tower, parts.language_model)]
    seen = f"{parts.family.model_type} of {' and '.join(halves)}"
    tried = _Tried(model, processor, image or example_picture())
    return ModelCheck((Finding(part, True, seen), *map(tried.finding, tried.parts())))


def example_picture() -> Image.Image:
    """A picture with flat, smooth and busy parts, so that some of its tokens are alike and some are not."""
    pixels = np.full((240, 320, 3), (90, 140, 200), dtype=np.uint8)
    pixels[120:, :, 1] = np.linspace(40, 220, 320, dtype=np.uint8)
    pixels[80:200, 60:150] = np.random.default_rng(0).integers(0, 255, (120, 90, 3), dtype=np.uint8)
    pixels[30:90, 200:280] = (230, 60, 40)
    return Image.fromarray(pixels)


class _Differs(Exception):
    """What is not as it should be."""


class _Tried:
    """The model, prompts about two pictures, and what the untouched model makes of the first."""

    def __init__(self, model: PreTrainedModel, processor: Any, image: Image.Image) -> None:
        self._model, self._processor = model, processor
        first = image.convert("RGB")
        second = ImageOps.flip(first).crop((0, 0, max(first.width * 2 // 3, 1), first.height))
        self._asked = [([picture], question) for picture, question in zip((first, second), QUESTIONS, strict=True)]
        self._inputs = self._prompts(self._asked[:1])
        self._logits, self._again = self._forward().logits, self._forward().logits
        self._half = model.dtype in IN_HALF
        self._allowed, self._allowed_in_batch = IN_HALF.get(model.dtype, IN_FULL)

    def parts(self) -> dict[str, Callable[[], str]]:
        """What to try, by the part of the contract; each answers with what it saw, or raises."""
        return {
            "nothing merged: the same logits": self._same_logits,
            "nothing merged: the same text": self._same_text,
            "a batch of two gives each what it gets alone": self._same_in_batch,
            "the KV cache stores merged tokens": self._merged_cache,
            "remove() gives the model back": self._given_back,
        }

    def finding(self, part: str) -> Finding:
        try:
            return Finding(part, True, self.parts()[part]())
        except _Differs as differs:
            return Finding(part, False, str(differs))
        except Exception as error:  # a model of any make raises what it likes
            return Finding(part, False, f"{type(error).__name__}: {first_line(error)}")

    def _prompts(self, asked: list[Any]) -> dict[str, Any]:
        return inputs_for(self._model, self._processor, asked)

    @torch.inference_mode()
    def _forward(self, inputs: dict[str, Any] | None = None) -> Any:
        stock: Any = self._model
        return stock(**(self._inputs if inputs is None else inputs), use_cache=True)

    def _text(self) -> str:
        return generate(self._model, self._processor, self._inputs, NEW_TOKENS)[0][0]

    def _compared(self, logits: Tensor, expected: Tensor, allowed: float) -> tuple[float, str]:
        """How far logits are off, as part of the largest, and that in words."""
        scale = float(expected.abs().max())
        off = float((logits.float() - expected.float()).abs().max()) / scale
        seen = f"off by {off:.1e} of the largest; {allowed:.0e} is allowed"
        if not off <= allowed:  # nor where it is not a number
            raise _Differs(seen)
        return off, seen

    def _same_logits(self) -> str:
        with apply(self._model, merge=NOTHING):
            return self._compared(self._forward().logits, self._logits, self._allowed)[1]

    def _same_text(self) -> str:
        expected = self._text()
        with apply(self._model, merge=NOTHING):
            text = self._text()
        if text == expected:
            return f"{text!r}"
        if self._half:
            return f"{text!r} instead of {expected!r}, as near ties may turn in half precision"
        raise _Differs(f"{text!r} instead of {expected!r}")

    def _same_in_batch(self) -> str:
        together = self._prompts(self._asked)
        with apply(self._model, merge=HALF) as handle:
            logits = self._forward(together).logits
            items = items_by_prompt(self._model, together, handle.last.items)
            seen, worst = "other tokens merge than alone, as rounding may in half precision", -1.0
            for row, asked in enumerate(self._asked):
                alone = self._prompts([asked])
                expected = self._forward(alone).logits[0]
                pairs = zip(handle.last.items, items[row], strict=True)
                if not all(torch.equal(item.group, beside.group) for item, beside in pairs):
                    if not self._half:
                        raise _Differs(f"in row {row + 1} other tokens merge than alone")
                    continue
                off, said = self._compared(logits[row, -len(expected) :], expected, self._allowed_in_batch)
                if off > worst:
                    seen, worst = said, off
        return seen

    def _merged_cache(self) -> str:
        full = cache_bytes(cache_of(self._forward()))
        with apply(self._model, merge=HALF) as handle:
            cache = cache_of(self._forward())
            stored, length = cache_bytes(cache), self._inputs["input_ids"].shape[1]
            kept, original = sum(handle.last.kept), sum(handle.last.original)
            seen = f"{stored:,} of {full:,} bytes, for {kept} of {original} image tokens"
            if (stored, full) != (handle.last.cache_bytes, handle.last.cache_bytes_full):
                reported = f"{handle.last.cache_bytes:,} of {handle.last.cache_bytes_full:,}"
                raise _Differs(f"{seen}; reported are {reported}")
            entries = {
                layer.keys.shape[-2] for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor)
            }
            if entries != {length - original + kept}:
                raise _Differs(f"{seen}; its layers hold {sorted(entries)} tokens of {length}")
            if cache.get_seq_length() != length:
                raise _Differs(f"it says that it is {cache.get_seq_length()} tokens long, and the prompt has {length}")
        return seen

    def _given_back(self) -> str:
        logits = self._forward().logits
        if torch.equal(logits, self._logits):
            return "the same logits bit by bit"
        if not torch.equal(self._again, self._logits):  # some kernels add up in another order each time
            return "not told: the untouched model itself gives other logits each time"
        return self._compared(logits, self._logits, 0.0)[1]
