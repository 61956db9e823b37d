"""Hooks for private methods that `generate` calls: to encode items ahead of the first forward, to repeat them for
beams, and to prefill a prompt in chunks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import transformers
from torch import Tensor

from dymu.errors import BadPrompt
from dymu.families.resolve import Parts
from dymu.hooks.call import PIXELS, CallState, Prompts, arguments_of, length
from dymu.hooks.versions import cache_among, cuts_encoded_images
from dymu.unmerging.prompt import Features, carried_leaders, carry_leaders

Method = Callable[..., Any]


class GenerationHooks:
    """Functions that take a method of the model and return what replaces it; `names` says for which methods."""

    def __init__(self, parts: Parts, state: CallState) -> None:
        self._parts, self._state = parts, state

    @property
    def names(self) -> dict[str, Callable[[Method], Method]]:
        """By the name of the method."""
        return {
            "_maybe_prepare_encoder_kwargs_for_generation": self.encode,
            "_expand_multimodal_outputs": self.repeat,
            "_prefill": self.prefill,
        }

    def encode(self, encode: Method) -> Method:
        """Collect one report of all images and videos, which are encoded one after the other."""

        @functools.wraps(encode)
        def encoding(inputs_tensor: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            state = self._state
            if any(model_kwargs.get(name) is not None for name in PIXELS):
                state.begin_report()
                ids = model_kwargs.get("input_ids", inputs_tensor)
                ids = ids if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point() else None
                ids = ids if ids is None else _new_ids(ids, model_kwargs)
                state.asked = Prompts.of(self._parts, ids, present=model_kwargs.get("attention_mask"))
            try:
                return encode(inputs_tensor, model_kwargs, *args, **kwargs)
            finally:
                state.collecting, state.asked = False, None

        return encoding

    def repeat(self, repeat: Method) -> Method:
        """Repeat the encoded items of each prompt for its beams, with their token maps, which `repeat` would lose.

        That of transformers 5.18 also mixes up the order of several images of one prompt.
        """

        @functools.wraps(repeat)
        def repeating(
            ids: Tensor | None, outputs: dict[str, Any], expand_size: int = 1, inputs_embeds: Tensor | None = None
        ) -> dict[str, Any]:
            prompts = Prompts.of(self._parts, ids if ids is not None and ids.numel() else None, inputs_embeds)
            prompts.show_encoded(outputs)
            for modality, mask in prompts.placeholders.items():
                if outputs.get(modality) is not None:
                    output = outputs[modality]
                    output.pooler_output = _repeated(output.pooler_output, mask.sum(1).tolist(), expand_size)
            return outputs

        return repeating

    def prefill(self, prefill: Method) -> Method:
        """Remember the token maps of the whole prompt, which features that are cut into chunks no longer carry."""
        signature = inspect.signature(prefill)

        @functools.wraps(prefill)
        def prefilling(*args: Any, **kwargs: Any) -> Any:
            arguments = arguments_of(signature, args, kwargs)
            inputs = arguments["model_kwargs"]
            encoded = inputs.get("mm_encoder_outputs") or {}
            if arguments["generation_config"].prefill_chunk_size is not None and any(encoded.values()):
                if not cuts_encoded_images():
                    raise BadPrompt(
                        f"transformers {transformers.__version__} cannot prefill a prompt with images in chunks; leave "
                        "prefill_chunk_size out, or update transformers to 5.23 or newer."
                    )
                whole = Prompts.of(self._parts, _new_ids(arguments["input_ids"], inputs))
                whole.show_encoded(encoded)
                past = length(cache_among(inputs))
                self._state.chunked = None if whole.leaders is None else (past, whole.leaders)
            try:
                return prefill(*args, **kwargs)
            finally:
                self._state.chunked = None

        return prefilling


def _new_ids(ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The ids [B, N] that are not in the cache: callers give `generate` the whole conversation, or its newest turn."""
    mask = inputs.get("attention_mask")
    whole = mask is None or mask.shape[1] == ids.shape[1]
    return ids[:, length(cache_among(inputs)) :] if whole else ids


def _repeated(features: Features, tokens: Sequence[int], times: int) -> Features:
    """The features of all items of each prompt, with their leaders, several times in a row.

    Args:
        tokens: placeholders of each prompt.
    """
    order, rest = list[int](), iter(range(len(features)))
    for left in tokens:
        items = list[int]()
        while left > 0:
            items.append(next(rest))
            left -= features[items[-1]].shape[:-1].numel()
        order += items * times
    leaders = carried_leaders(features)
    repeated = features[order] if isinstance(features, Tensor) else [features[item] for item in order]
    if leaders is not None:
        carry_leaders(repeated, [leaders[item] for item in order])
    return repeated
