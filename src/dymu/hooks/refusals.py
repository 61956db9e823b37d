"""What a call may ask for and cannot have while DyMU is applied: refused in a sentence, or said once."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dymu.errors import BadPrompt, UnsupportedModel
from dymu.families.resolve import Parts

_log = logging.getLogger("dymu")

_HARMLESS = frozenset(
    ("position_ids", "use_cache", "is_causal", "output_hidden_states", "output_attentions", "return_dict",
     "logits_to_keep", "labels", "interpolate_pos_encoding", "num_items_in_batch", "cache_position",
     "output_router_logits", "tokenizer")
)  # fmt: skip
"""Keyword arguments of attention functions that change nothing of what they compute."""


def refuse_attention_weights(arguments: Mapping[str, Any], config: Any) -> None:
    """Raises UnsupportedModel where a call, or else the model's config, asks for attention weights."""
    asked = arguments.get("output_attentions")
    if getattr(config, "output_attentions", False) if asked is None else asked:
        raise UnsupportedModel(
            "attention weights are never formed while DyMU is applied; leave output_attentions out, or ask within "
            "handle.disabled()."
        )


def refuse_unknown(module: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Raises UnsupportedModel where a layer asks for attention in a way that no backend knows, as with a soft-cap."""
    unknown = [name for name, value in arguments.items() if value is not None and name not in _HARMLESS]
    if arguments.get("is_causal") is False:
        unknown.append("is_causal=False")
    if unknown:
        raise UnsupportedModel(
            f"{type(module).__name__} asks for attention with {', '.join(sorted(unknown))}, which dymu does not know "
            "and cannot compute; leave it out of the call, ask within handle.disabled(), or remove DyMU."
        )


def refuse_arguments(arguments: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises UnsupportedModel where images are to be encoded in a way that is not known."""
    asked = [name for name in names if arguments.get(name) is not None]
    if asked:
        raise UnsupportedModel(
            f"dymu does not know {' and '.join(asked)} of this model; leave it out, or ask within handle.disabled()."
        )


def refuse_unknown_videos(arguments: Mapping[str, Any], modalities: Container[str]) -> None:
    """Raises BadPrompt where a model is given videos and takes none."""
    if "video" not in modalities and arguments.get("pixel_values_videos") is not None:
        raise BadPrompt("this model takes no videos; leave pixel_values_videos out, or give their frames as images.")


def refuse_compression(left: Any) -> None:
    """Raises BadPrompt where the mask of a video's tokens leaves some out of the prompt."""
    if isinstance(left, Tensor) and not bool(left.all()):
        raise BadPrompt(
            f"the processor left {int((left == 0).sum())} of {left.numel()} video tokens out of the prompt, which dymu "
            "cannot follow; give it use_token_compression=False, for over time dymu merges what stays alike."
        )


def refuse_late_windows(first: Tensor | None, here: Tensor | None) -> None:
    """Raises UnsupportedModel where a layer attends within windows and the `first` one did over whole pictures."""
    if first is None and here is not None:
        raise UnsupportedModel(
            "this vision encoder's first layer attends over whole pictures and a later one within windows, which dymu "
            "does not know yet; take a model whose first layer has windows, or none that has."
        )


def refuse_absent_patches(mask: Any) -> None:
    """Raises BadPrompt where the mask of an encoder layer, bool or added to logits, hides patches of a picture."""
    if isinstance(mask, Tensor) and not _shows_all(mask):
        raise BadPrompt(
            "a picture is padded within its pixels (its pixel_attention_mask hides some), which dymu does not know "
            "yet; let the processor cut images into tiles or resize them, or ask about such images one by one."
        )


def refuse_masks(module: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Raises UnsupportedModel where an encoder layer is asked for attention under a mask, or in a way that is not
    known."""
    unknown = [
        name
        for name, value in arguments.items()
        if value is not None and value is not False and name not in _HARMLESS - {"is_causal"} and not _shows_all(value)
    ]
    if unknown:
        raise UnsupportedModel(
            f"{type(module).__name__} is asked for attention with {', '.join(sorted(unknown))}, which dymu does not "
            "know and cannot compute; leave it out of the call, or ask within handle.disabled()."
        )


def _shows_all(mask: Any) -> bool:
    """Whether it is a mask, bool or added to logits, that hides nothing."""
    return isinstance(mask, Tensor) and bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all())


def refuse_packed(positions: Tensor) -> None:
    """Raises BadPrompt where positions [B, N] start over, so that a row holds several prompts. Of those on several axes
    [axes, B, N], the row for texts that may stand ahead of three says so."""
    if positions.ndim == 3:
        if len(positions) == 3:
            return
        positions = positions[0]
    if positions.shape[-1] > 1 and bool((positions.diff(dim=-1) != 1).any()):
        raise BadPrompt(
            "the position_ids start over within a row, so that it holds several prompts, which dymu cannot keep apart; "
            "give each prompt a row of its own with an attention_mask, or ask within handle.disabled()."
        )


def refuse_lost_features(embeds: Tensor, present: Tensor | None, words: Any, learned: Tensor) -> None:
    """Refuse embeddings that hold merged image features whose token map is lost.

    Merged features repeat: all tokens of a group have the same. So do words, but those stand in the table.

    Args:
        embeds: [B, N, C].
        present: bool [B, N]; None: all tokens are there.
        words: the model's embedding of ids.
        learned: [any, C], learned tokens that may stand among features.

    Raises:
        BadPrompt: naming what to give instead.
    """
    table: Any = None
    ids = torch.arange(words.weight.shape[0], device=embeds.device)
    for row, there in zip(embeds, [None] * len(embeds) if present is None else present, strict=True):
        tokens = (row if there is None else row[there]).detach()
        factors = torch.arange(1, 2 * tokens.shape[1], 2, device=tokens.device)
        hashes = (tokens.view(_INTEGERS[tokens.element_size()]).long() * factors).sum(1)
        _, group, count = hashes.unique(return_inverse=True, return_counts=True)
        repeated = (count[group] > 1).nonzero()[:, 0]
        firsts = {int(group[index]): int(index) for index in repeated.flip(0)}.values()
        if firsts and table is None:
            # An adapter may give its own, which no table holds.
            plain = type(words) is nn.Embedding and type(words.weight) is nn.Parameter and not words._forward_hooks
            table = torch.cat((words.weight if plain else words(ids), learned.to(words.weight.dtype)))
        if any(not _is_word(tokens[first], table) for first in firsts):
            raise BadPrompt(
                "these inputs_embeds repeat embeddings that are no words, as image features do that DyMU merged, and "
                "their token map is lost; give input_ids, and the images as pixels or as mm_encoder_outputs (see "
                "docs/how-it-works.md), or ask within handle.disabled()."
            )


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size in bytes."""


def _is_word(embedding: Tensor, words: Tensor) -> bool:
    """Whether an embedding [C] is one of the words [V, C], or nothing at all."""
    if not bool(embedding.any()):
        return True
    alike = (words[:, 0] == embedding[0].to(words.dtype)).nonzero()[:, 0]
    return bool((words[alike] == embedding.to(words.dtype)).all(-1).any())


def warn_of_hooks(attentions: Iterable[nn.Module], warned: set[str]) -> None:
    """Say once that hooks of somebody else on the encoder's attention do not fire; transformers' own need not."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = (hook for module in attentions for kind in kinds for hook in getattr(module, kind).values())
    if any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
        _once(
            warned,
            "hooks on the vision encoder's attention modules do not fire while DyMU is applied, since its own "
            "attention runs; hook the layers, their projections or their MLPs instead.",
        )


def warn_of_dropout(warned: set[str]) -> None:
    """Say once that dropout is left out."""
    _once(warned, "the model is in training mode, and DyMU leaves dropout in attention out; call model.eval().")


def drops_out(module: nn.Module) -> bool:
    """Whether an attention module, or the module that holds them, asks for dropout there: as a number, in its config,
    or as a module."""
    config = getattr(module, "config", None)
    rates = [getattr(module, name, 0) for name in ("dropout", "attn_drop")]
    rates += [getattr(config, name, 0) for name in ("attention_dropout", "attention_probs_dropout_prob")]
    return any(getattr(rate, "p", rate) for rate in rates)


def refuse_checkpointing(modules: Iterable[nn.Module]) -> None:
    """Raises UnsupportedModel where an encoder would compute its layers again, on other tokens, for gradients."""
    if torch.is_grad_enabled() and any(
        getattr(module, "grad_checkpointing", False)
        or (module.training and getattr(module, "gradient_checkpointing", False))
        for module in modules
    ):
        raise UnsupportedModel(
            "gradient checkpointing computes the vision encoder's layers again when nothing merges any more; switch it "
            "off there (gradient_checkpointing_disable() of the module that holds them, or "
            "set_grad_checkpointing(False)), or train within handle.disabled()."
        )


def refuse_to_prune(parts: Parts, argument: str = "prune") -> None:
    """Raises UnsupportedModel where layers of the language model cannot each run tokens of their own."""
    kind = parts.decoder_kind
    why = "some of its layers mix tokens without attention" if parts.mixers else None
    why = "layers take keys of earlier layers" if kind.shared is not None else why
    why = "its layers get further rows for each token" if kind.per_token is not None else why
    if why is not None:
        raise UnsupportedModel(
            f"the layers of this language model cannot each have tokens of their own: {why}; leave {argument} out."
        )


def refuse_to_recompute(layers: Iterable[nn.Module]) -> None:
    """Raises UnsupportedModel where layers that prune would be computed again for gradients."""
    if torch.is_grad_enabled() and any(
        layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers
    ):
        raise UnsupportedModel(
            "gradient checkpointing computes the language model's layers again, when nothing says any more which "
            "tokens each of them ran; switch it off, or leave prune and unmerge_from out."
        )


def _once(warned: set[str], text: str) -> None:
    if text not in warned:
        warned.add(text)
        _log.warning(text)
