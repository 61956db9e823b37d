"""Try, as DyMU is applied, whether a model's layers compute what the descriptions say, and how its heads rotate.

An encoder layer must give what its parts give together. What makes tokens of units must make each of one unit. Every
attention layer of the language model must rotate pairs of channels of its heads by the angles that it gets, or none.
What a description leaves out would else be a wrong number later.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dymu.errors import UnsupportedModel
from dymu.families.encoders import LoneEncoder
from dymu.families.resolve import EncoderParts, Parts, find
from dymu.hooks.attention import Angles, Rotation, Rotations, angles_of, one_of_two
from dymu.merging import Layout, MergedTokens
from dymu.unmerging.virtual import as_pairs

TOKENS = 5
POSITIONS = (0, 1, 5, 17, 40)

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Of the largest magnitude, by type; what a description leaves out changes far more."""
HALF_PRECISION = 0.05


class _Recorder:
    """In place of a step: keeps queries [B, H, N, D] and keys [B, Hkv, N, D] as a layer hands them over."""

    module: Any = None

    def attend(self, module: Any, query: Tensor, key: Tensor, *_: object) -> Tensor:
        self.module, self.query, self.key = module, query, key
        return torch.zeros_like(query).transpose(1, 2)


@torch.no_grad()
def check_layers(parts: Parts | LoneEncoder) -> Rotations:
    """How the layers of the language model rotate, if there is one.

    Raises:
        UnsupportedModel: a layer computes something else; names it.
    """
    if any(parameter.is_meta for parameter in parts.model.parameters()):
        raise UnsupportedModel(
            "weights of the model are not loaded, or offloaded (they are on the device meta), which dymu does not know "
            "yet; load all of them onto one device first."
        )
    with torch.autocast(next(parts.model.parameters()).device.type, enabled=False):
        encoder = [] if _left_to_chance(parts.tower) else _encoder_errors(parts)  # dropout would make them differ
        for index, error in enumerate(encoder):
            if error:
                raise UnsupportedModel(
                    f"layer {index} of the vision encoder does not compute what its description says ({error:.2g} of "
                    "the largest value apart), so that merging within it would be wrong; somebody exchanged its parts, "
                    "or the description is of another encoder (docs/add-a-family.md)."
                )
        if not isinstance(parts, Parts):
            return Rotations({}, {})
        for part in filter(None, (parts.projector, parts.merger, *parts.side_mergers)):
            if not _left_to_chance(part) and _mixes(parts, part):
                raise mixing(part)
        return _rotations(parts)


def mixing(part: nn.Module) -> UnsupportedModel:
    """What is said of a part that makes a token of several units."""
    return UnsupportedModel(
        f"what makes tokens of the encoder's, a {type(part).__name__}, mixes those of different units, so that merged "
        "ones would be wrong; dymu knows projectors and mergers that make each token of one unit."
    )


def differ(features: Tensor, leaders: Tensor) -> bool:
    """Whether tokens [N, C] of a group, whose first ones are int64 [N], are not alike."""
    there = leaders >= 0
    rows, firsts = features[there], features[leaders[there]]
    return bool(_apart(rows, firsts) > TOLERANCE.get(features.dtype, HALF_PRECISION))


def _mixes(parts: Parts, part: nn.Module) -> bool:
    """Whether a part that makes tokens of patches, or of units, lets one unit change what it makes of another; where it
    takes no made-up ones, the first call tells, see `differ`."""
    size = getattr(find(parts.tower, "config"), "image_size", None)
    grids = [(8, 8), *((size // high, size // wide) for high, wide in [parts.patch_sides] if isinstance(size, int))]
    widths = dict.fromkeys((parts.width, *(size for parameter in part.parameters() for size in parameter.shape)))
    for width, (rows, columns), flat in itertools.product(widths, grids, (False, True)):
        x = _random(parts.tower, width, rows * columns)
        x = x[0] if flat else x
        try:
            made = part.forward(x)
            side = math.isqrt(rows * columns // made.shape[-2])
            above = rows // 2 // side * side * columns  # of the first rows of units, row after row or unit after unit
            changed = part.forward(torch.cat((x[..., :above, :], x[..., above:, :].flip(-2) + 1), -2))
        except Exception:  # it takes others
            continue
        if made.shape[:-2] == x.shape[:-2] and rows * columns == side**2 * made.shape[-2]:
            first = slice(above // side**2)
            return bool(
                _apart(changed[..., first, :], made[..., first, :]) > HALF_PRECISION
            )  # quantised ones round by all
    return False


def _rotations(parts: Parts) -> Rotations:
    x = _random(parts.language_model, parts.language_model.config.hidden_size)
    angles = angles_of(parts, x, torch.tensor(POSITIONS, device=x.device)[None])
    interleaved = {kind: torch.equal(cos[..., 0::2], cos[..., 1::2]) for kind, (cos, _) in angles.items()}
    starts = dict(zip(angles, accumulate((cos.shape[-1] // 2 for cos, _ in angles.values()), initial=0), strict=False))
    by_module, kinds = dict[int, Rotation](), dict[Rotation, Rotation]()
    shared: Shared = {}, {}
    for index, attention in enumerate(parts.attentions):
        kind = parts.angle_kind(attention)
        module, rotation = _rotation(attention, x, angles[kind], interleaved[kind], parts.decoder_kind.shared, shared)
        if parts.family.both_ways != "prefix" and getattr(module, "is_causal", True) is False:
            raise UnsupportedModel(
                f"attention layer {index} of the language model, a {type(attention).__name__}, lets every token attend "
                "to later ones, which dymu knows of images and of prompts only."
            )
        if isinstance(rotation, str):
            raise UnsupportedModel(
                f"attention layer {index} of the language model, a {type(attention).__name__}, does not rotate pairs "
                f"of channels of its heads by the angles it is given ({rotation}); dymu does not know its kind of "
                "rotation."
            )
        rotation = replace(rotation, start=starts[kind])
        by_module[id(module)] = kinds.setdefault(rotation, rotation)  # equal ones are one, as `LayerSteps` takes them
    return Rotations(interleaved, by_module)


def _left_to_chance(tower: Any) -> bool:
    """Whether a part drops out anything, by its config or else by its modules."""
    if not tower.training:
        return False
    if hasattr(tower, "config"):
        return any(value for name, value in tower.config.to_dict().items() if "drop" in name)
    rates = (getattr(module, name, 0) for module in tower.modules() for name in ("p", "drop_prob", "dropout"))
    return any(rate > 0 for rate in rates if isinstance(rate, float))


def _encoder_errors(parts: EncoderParts) -> list[float]:
    """Of each layer how far its own forward is from its parts, if too far, else 0."""
    errors = []
    kind, prefix, tokens = parts.tower_kind, parts.prefix, parts.prefix + TOKENS
    x = _random(parts.tower, parts.width, tokens)
    state, asked = MergedTokens.unmerged(Layout.equal(1, tokens, x.device)), dict[str, Any]()
    if kind.angles is not None:
        first = parts.encoder_layer(0)
        size = first.project(first.norm1(x))[0].shape[-1]
        # Every pair turns by an angle of its own, or angles given to other pairs would look the same.
        generator = torch.Generator("cpu").manual_seed(1)
        turns = 6 * torch.rand(TOKENS, size // 2, generator=generator, device="cpu").to(x.device)
        turns = turns.unflatten(-1, (kind.turning, -1)).repeat(1, 1, 2).flatten(1)
        angles = pad(turns, (0, 0, prefix, 0))  # what stands ahead of patches is not rotated
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        state = replace(state, angles=(cos[None], sin[None]))
        of_patches = cos[prefix:], sin[prefix:]
        asked[kind.angles] = (cos[None], sin[None]) if kind.arrangement == "padded" else of_patches
    if kind.segments is not None:
        asked[kind.segments] = torch.tensor([0, tokens], dtype=torch.int32, device=x.device)
    if kind.positions is not None:
        asked[kind.positions] = torch.zeros(1, tokens, 2, dtype=torch.long, device=x.device)
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


Shared = tuple[dict[str, Any], dict[str, Any]]
"""What layers that are tried take of earlier ones, un-rotated and rotated."""


def _rotation(
    attention: nn.Module, x: Tensor, angles: Angles, interleaved: bool, named: str | None, shared: Shared
) -> tuple[Any, Rotation | str]:
    """The module that asks for attention and how it rotates x, or why that is not known.

    Args:
        named: see `Decoder.shared`.
    """
    cos, sin = angles
    still = torch.ones_like(cos), torch.zeros_like(sin)
    try:
        plain, rotated = (
            _handed_over(attention, x, turns, {} if named is None else {named: states})
            for turns, states in zip((still, angles), shared, strict=True)
        )
    except UnsupportedModel:
        raise
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    if plain.module is None or rotated.module is None:
        return None, "it does not call the attention function that its config names"
    size, pairs = plain.query.shape[-1], cos.shape[-1] // 2
    if 2 * pairs > size:
        return None, f"it has angles for {2 * pairs} of {size} channels"
    phase = torch.complex(
        *(one_of_two(part, interleaved).to(torch.promote_types(part.dtype, torch.float32)) for part in angles)
    )
    for turning, neighbours in ((pairs, False), (pairs, True), (0, False)):
        rotation = Rotation(0, turning, neighbours, size)
        rest = phase.new_ones(*phase.shape[:-1], size // 2 - rotation.pairs)
        turns = torch.cat((phase[..., : rotation.pairs], rest), -1)[:, None]
        before, after = (
            [as_pairs(rotation.half_split(part)) for part in (handed.query, handed.key)] for handed in (plain, rotated)
        )
        apart = [
            _apart(torch.view_as_real(one * turns), torch.view_as_real(other))
            for one, other in zip(before, after, strict=True)
        ]
        if max(apart) <= TOLERANCE.get(x.dtype, HALF_PRECISION):
            return plain.module, rotation
    return None, "its queries or keys are rotated otherwise"


def _handed_over(attention: nn.Module, x: Tensor, angles: Angles, shared: dict[str, Any]) -> _Recorder:
    recorder = _Recorder()
    attention.forward(hidden_states=x, position_embeddings=angles, attention_mask=None, dymu_step=recorder, **shared)
    return recorder


def _apart(x: Tensor, expected: Tensor) -> Tensor:
    """How far x is off, as part of the largest magnitude; where both are NaN (weights may be), it is right."""
    both = x.isnan() & expected.isnan()
    largest = expected.nan_to_num(0).abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return (x - expected).masked_fill(both, 0).nan_to_num(torch.inf).abs().max() / largest


def _random(half: nn.Module, width: int, tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(1, tokens, width, generator=generator, dtype=torch.float32, device="cpu")
    parameter = next(parameter for parameter in half.parameters() if parameter.is_floating_point())
    return x.to(parameter.device, parameter.dtype)
