"""Hooks for private methods that `generate` calls: to encode items ahead of the first forward, to repeat them for
beams, and to prefill a prompt in chunks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import transformers
from torch import Tensor

from dymu.errors import BadPrompt
from dymu.families.resolve import Parts
from dymu.hooks.cache import recall
from dymu.hooks.call import (
    PIXELS,
    CallState,
    Features,
    Prompts,
    arguments_of,
    carried_items,
    carry_items,
    length,
)
from dymu.hooks.replaced import Around, Method
from dymu.hooks.versions import cache_among, cuts_encoded_images


class GenerationHooks:
    """What stands around `generate` of the model, and around the methods within it that `names` says."""

    def __init__(self, parts: Parts, state: CallState) -> None:
        self.parts, self._state = parts, state

    @property
    def names(self) -> dict[str, Around]:
        """By the name of the method."""
        return {
            "_maybe_prepare_encoder_kwargs_for_generation": self.encode,
            "_expand_multimodal_outputs": self.repeat,
            "_prefill": self.prefill,
        }

    def generate(self, generate: Method, *args: Any, **kwargs: Any) -> Any:
        """One report for all forwards of `generate`."""
        state = self._state
        nested, before = state.generating, state.prompted
        try:
            if not nested:
                state.begin_report(cache=cache_among(kwargs))
                recall(self.parts.inner, cache_among(kwargs))
            state.generating, state.prompted = True, _prompted(args, kwargs)
            return generate(*args, **kwargs)
        finally:
            state.generating, state.prompted = nested, before

    def encode(
        self, encode: Method, inputs_tensor: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Collect one report of all images and videos, which are encoded one after the other, or were before."""
        state = self._state
        try:
            if any(model_kwargs.get(name) is not None for name in PIXELS):
                state.begin_report()
                state.collecting = True
                ids = model_kwargs.get("input_ids", inputs_tensor)
                ids = ids if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point() else None
                ids = ids if ids is None else _new_ids(ids, model_kwargs)
                state.asked = Prompts.of(self.parts, ids, present=model_kwargs.get("attention_mask"))
            elif encoded := model_kwargs.get("mm_encoder_outputs"):
                outputs = (encoded.get(modality) for modality in self.parts.placeholders)
                items = (carried_items(output.pooler_output) for output in outputs if output is not None)
                state.begin_report([item for carried in items for item in carried or ()])
            return encode(inputs_tensor, model_kwargs, *args, **kwargs)
        finally:
            state.collecting, state.asked = False, None

    def repeat(
        self,
        repeat: Method,
        ids: Tensor | None,
        outputs: dict[str, Any],
        expand_size: int = 1,
        inputs_embeds: Tensor | None = None,
    ) -> dict[str, Any]:
        """Repeat the encoded items of each prompt for its beams, with their token maps, which `repeat` would lose.

        That of transformers 5.18 also mixes up the order of several images of one prompt.
        """
        prompts = Prompts.of(self.parts, ids if ids is not None and ids.numel() else None, inputs_embeds)
        prompts.show_encoded(outputs)
        repeated = dict(outputs)
        for modality, mask in prompts.placeholders.items():
            if outputs.get(modality) is not None:
                repeated[modality] = output = copy.copy(outputs[modality])
                tokens = mask.sum(1).tolist()
                output.pooler_output = _repeated(output.pooler_output, tokens, expand_size)
                if getattr(output, "deepstack_features", None):
                    output.deepstack_features = [
                        _repeated(features, tokens, expand_size) for features in output.deepstack_features
                    ]
        return repeated

    def prefill(self, prefill: Method, *args: Any, **kwargs: Any) -> Any:
        """Remember the token maps of the whole prompt, which features that are cut into chunks no longer carry."""
        arguments = arguments_of(self.parts.model, "_prefill", args, kwargs)
        inputs = arguments["model_kwargs"]
        encoded = inputs.get("mm_encoder_outputs") or {}
        try:
            if arguments["generation_config"].prefill_chunk_size is not None:
                shown = any(encoded.values()) or any(inputs.get(name) is not None for name in PIXELS)
                if shown and not cuts_encoded_images():
                    raise BadPrompt(
                        f"transformers {transformers.__version__} cannot prefill a prompt with images in chunks; leave "
                        "prefill_chunk_size out, or update transformers to 5.23 or newer."
                    )
                if any(encoded.values()):
                    whole = Prompts.of(self.parts, _new_ids(arguments["input_ids"], inputs))
                    whole.show_encoded(encoded)
                    past = length(cache_among(inputs))
                    self._state.chunked = None if whole.leaders is None else (past, whole.leaders)
            return prefill(*args, **kwargs)
        finally:
            self._state.chunked = None


def _prompted(args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
    """How many tokens the prompts of a call of `generate` have, those in the cache among them."""
    given = (*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
    prompts = next((each for each in given if isinstance(each, Tensor) and each.ndim > 1), None)
    if prompts is None:
        return None
    mask, past = kwargs.get("attention_mask"), length(cache_among(kwargs))
    whole = not past or mask is None or mask.shape[1] == prompts.shape[1]
    return prompts.shape[1] if whole else past + prompts.shape[1]


def _new_ids(ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The ids [B, N] that are not in the cache: callers give `generate` the whole conversation, or its newest turn."""
    mask = inputs.get("attention_mask")
    whole = mask is None or mask.shape[1] == ids.shape[1]
    return ids[:, length(cache_among(inputs)) :] if whole else ids


def _repeated(features: Features, tokens: Sequence[int], times: int) -> Features:
    """The features of all items of each prompt, with their items, several times in a row.

    Args:
        tokens: placeholders of each prompt.
    """
    order, rest = list[int](), iter(range(len(features)))
    for left in tokens:
        of_prompt = list[int]()
        while left > 0:
            of_prompt.append(next(rest))
            left -= features[of_prompt[-1]].shape[:-1].numel()
        order += of_prompt * times
    items = carried_items(features)
    repeated = features[order] if isinstance(features, Tensor) else [features[item] for item in order]
    if items is not None:
        carry_items(repeated, [items[item] for item in order])
    return repeated
