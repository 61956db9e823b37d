"""Try, as DyMU is applied, whether a model's layers compute what the descriptions say.

An encoder layer must give what its parts give together, and every attention layer of the language model must rotate the
two halves of its heads by the angles that it gets. What a description leaves out would else be a wrong number later.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dymu.errors import UnsupportedModel
from dymu.families.resolve import Parts
from dymu.hooks.replaced import Method
from dymu.merging import Layout, MergedTokens
from dymu.unmerging.virtual import as_pairs, as_phase, no_rotation

TOKENS = 5
POSITIONS = (0, 1, 5, 17, 40)

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Of the largest magnitude, by type; what a description leaves out changes far more."""
HALF_PRECISION = 0.05


class _Recorder:
    """In place of a step: keeps queries [B, H, N, D] and keys [B, Hkv, N, D] as a layer hands them over."""

    called = False

    def attend(self, query: Tensor, key: Tensor) -> Tensor:
        self.query, self.key, self.called = query, key, True
        return torch.zeros_like(query).transpose(1, 2)


@torch.no_grad()
def check_layers(parts: Parts) -> None:
    """Raises UnsupportedModel, naming the layer that computes something else."""
    if any(parameter.is_meta for parameter in parts.model.parameters()):
        raise UnsupportedModel(
            "weights of the model are not loaded, or offloaded (they are on the device meta), which dymu does not know "
            "yet; load all of them onto one device first."
        )
    config = parts.tower.config.to_dict()
    chance = parts.tower.training and any(value for name, value in config.items() if "drop" in name)
    encoder = [] if chance else _encoder_errors(parts)  # dropout would make them differ
    for index, error in enumerate(encoder):
        if error:
            raise UnsupportedModel(
                f"layer {index} of the vision encoder does not compute what its description says ({error:.2g} of the "
                "largest value apart), so that merging within it would be wrong; somebody exchanged its parts, or the "
                "description is of another encoder (docs/add-a-family.md)."
            )
    for index, attention in enumerate(parts.attentions):
        if why := _rotates_otherwise(attention, parts.rotary.forward, parts.language_model):
            raise UnsupportedModel(
                f"attention layer {index} of the language model, a {type(attention).__name__}, does not rotate the two "
                f"halves of its heads by the angles it is given ({why}); dymu does not know its kind of rotation."
            )


def _encoder_errors(parts: Parts) -> list[float]:
    """Of each layer how far its own forward is from its parts, if too far, else 0."""
    errors = []
    kind, x = parts.tower_kind, _random(parts.tower, parts.width)
    state, asked = MergedTokens.unmerged(Layout.equal(1, TOKENS, x.device)), dict[str, Any]()
    if kind.angles is not None:
        turns = torch.linspace(0, 2, TOKENS * (parts.width // parts.heads // 2), device=x.device).view(1, TOKENS, -1)
        angles = torch.cat((turns, turns), -1)
        state = replace(state, angles=(angles.cos(), angles.sin()))
        asked[kind.angles] = tuple(angle[0] for angle in state.angles)
    if kind.segments is not None:
        asked[kind.segments] = torch.tensor([0, TOKENS], dtype=torch.int32, device=x.device)
    for index, module in enumerate(parts.encoder_modules):
        layer = parts.encoder_layer(index)
        try:
            merged = layer.feed_forward(layer.attend(x, state)[0])
            stock = _forwarded(module, x if kind.segments is None else x[0], asked)
        except Exception as error:
            raise UnsupportedModel(
                f"layer {index} of the vision encoder does not compute what its description says "
                f"({type(error).__name__}: {error}); somebody exchanged it, or the description is of another encoder."
            ) from error
        stock = stock[0] if isinstance(stock, tuple) else stock
        stock = stock.view_as(x)
        errors.append(_apart(merged, stock))
    limit = TOLERANCE.get(x.dtype, HALF_PRECISION)
    return [0.0 if error <= limit else error for error in torch.stack(errors).tolist()]


def _forwarded(module: nn.Module, x: Tensor, asked: dict[str, Any]) -> Any:
    try:
        return module.forward(x, **asked)
    except TypeError:  # some ask for a mask by position
        return module.forward(x, attention_mask=None, **asked)


def _rotates_otherwise(attention: nn.Module, angles: Method, decoder: PreTrainedModel) -> str:
    """Why a layer's rotation is not the one described; empty: it is."""
    x = _random(decoder, decoder.config.hidden_size)
    cos, sin = angles(x, torch.tensor(POSITIONS, device=x.device)[None])
    try:
        plain, rotated = (_handed_over(attention, x, *pair) for pair in (no_rotation(x), (cos, sin)))
    except UnsupportedModel:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not (plain.called and rotated.called):
        return "it does not call the attention function that its config names"
    if cos.shape[-1] != plain.query.shape[-1]:
        return f"it has angles for {cos.shape[-1]} of {plain.query.shape[-1]} channels"
    half = cos.shape[-1] // 2
    if not torch.equal(cos[..., :half], cos[..., half:]):
        return "its angles are of neighbouring channels"
    phase = as_phase(cos, sin)[:, None]
    for before, after in ((plain.query, rotated.query), (plain.key, rotated.key)):
        apart = _apart(torch.view_as_real(as_pairs(before) * phase), torch.view_as_real(as_pairs(after)))
        if apart > TOLERANCE.get(x.dtype, HALF_PRECISION):
            return "its queries or keys are rotated otherwise, or not at all"
    return ""


def _handed_over(attention: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> _Recorder:
    recorder = _Recorder()
    attention.forward(hidden_states=x, position_embeddings=(cos, sin), attention_mask=None, dymu_step=recorder)
    return recorder


def _apart(x: Tensor, expected: Tensor) -> Tensor:
    """How far x is off, as part of the largest magnitude; where both are NaN (weights may be), it is right."""
    both = x.isnan() & expected.isnan()
    largest = expected.nan_to_num(0).abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return (x - expected).masked_fill(both, 0).nan_to_num(torch.inf).abs().max() / largest


def _random(half: nn.Module, width: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(1, TOKENS, width, generator=generator, dtype=torch.float32, device="cpu")
    parameter = next(parameter for parameter in half.parameters() if parameter.is_floating_point())
    return x.to(parameter.device, parameter.dtype)
