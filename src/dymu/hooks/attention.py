"""The function that the language model's attention layers call, and how each of them rotates its heads."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dymu.families.resolve import Parts
from dymu.hooks.refusals import refuse_unknown
from dymu.unmerging import BACKENDS, History, Packed, Step
from dymu.unmerging.virtual import rows_behind, usual_order, virtual_keys

NAME = "dymu"
"""Name of the attention implementation, which layers read from their config."""


@dataclass(frozen=True)
class Rotation:
    """How an attention layer rotates its heads.

    Attributes:
        start: where its angles begin among those of all kinds.
        pairs: how many pairs of channels, from the first one on, turn; 0: the layer does not rotate.
        neighbours: whether channels 2i and 2i + 1 are a pair, and not i and i + `pairs`.
        size: channels of a head.
    """

    start: int
    pairs: int
    neighbours: bool
    size: int

    @property
    def channels(self) -> Tensor:
        """int64 [D]: the channels in an order in which i and i + D / 2 are a pair, those that do not turn behind."""
        return self.half_split(torch.arange(self.size))

    def half_split(self, x: Tensor) -> Tensor:
        """The channels of [..., D] in an order in which i and i + D / 2 are a pair, those that do not turn behind."""
        if not self.pairs:
            return x
        turning, rest = x[..., : 2 * self.pairs], x[..., 2 * self.pairs :]
        if self.neighbours:
            turning = turning.unflatten(-1, (-1, 2)).mT.flatten(-2)
        if not rest.shape[-1]:
            return turning
        halves = zip(turning.chunk(2, -1), rest.chunk(2, -1), strict=True)
        return torch.cat([part for half in halves for part in half], -1)


Angles = tuple[Tensor, Tensor]
"""Cosines and sines [B, N, any], as a rotary module gives them."""


@dataclass(frozen=True)
class Rotations:
    """How the layers of a language model rotate.

    Attributes:
        interleaved: of each kind of angles, in order, whether each is given twice in a row, and not in two halves.
        by_module: by the identity of each attention module.
    """

    interleaved: Mapping[str, bool]
    by_module: Mapping[int, Rotation]

    @property
    def plain(self) -> bool:
        """Whether all layers turn the two halves of whole heads by the same angles."""
        kinds = self.by_module.values()
        return len(self.interleaved) == 1 and all(2 * kind.pairs == kind.size and not kind.neighbours for kind in kinds)

    def joined(self, angles: Mapping[str, Angles]) -> Angles:
        """Those of all kinds side by side, [B, N, any], both halves alike."""
        kinds = list(self.interleaved.items())
        if len(kinds) == 1 and not kinds[0][1]:
            return angles[kinds[0][0]]
        cos, sin = (
            torch.cat([one_of_two(angles[kind][part], interleaved) for kind, interleaved in kinds], -1)
            for part in range(2)
        )
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def one_of_two(values: Tensor, interleaved: bool) -> Tensor:
    """Of values [..., 2 P] that stand there twice, one each."""
    return values[..., 0::2] if interleaved else values[..., : values.shape[-1] // 2]


def angles_of(parts: Parts, like: Tensor, positions: Tensor) -> dict[str, Angles]:
    """The angles of positions [B, N] or [axes, B, N], by kind."""
    rotary: Any = parts.rotary.forward
    if parts.decoder_kind.axes > 1:  # which only later versions of transformers expand themselves
        positions = positions.expand(parts.decoder_kind.axes, *positions.shape[-2:])
    return {kind: rotary(like, positions, *([kind] if kind else [])) for kind in parts.angle_kinds}


class LayerSteps:
    """The step of one forward, as each attention layer rotates.

    Args:
        step: its turns are those of all kinds of angles, side by side.
        history: of the KV cache, or of this forward alone.
        rotations: by the identity of each attention module.
        in_windows: whether tokens attend to later ones in layers with a sliding window alone.
        last: the identity of the last attention module, and the merged queries int64 [B, k] that it computes; None: it
            computes all.
    """

    def __init__(
        self,
        step: Step,
        history: History,
        rotations: Mapping[int, Rotation],
        in_windows: bool,
        last: tuple[int, Tensor] | None = None,
    ) -> None:
        self._step, self._history, self._rotations, self._in_windows = step, history, rotations, in_windows
        self._last = last
        self._steps = dict[tuple[int, int, bool], Step]()

    @property
    def packed(self) -> Packed | None:
        """See `History.packed`."""
        return self._history.packed

    def at(self, module: Any, size: int, window: int | None) -> Step:
        """The step of an attention layer whose heads have so many channels."""
        rotation, one_way = self._rotations[id(module)], self._in_windows and window is None
        asked = id(rotation), size, one_way
        if asked not in self._steps:
            self._steps[asked] = self._turned(rotation, size, one_way)
        step = self._steps[asked]
        if step.first_bias is not None and id(module) == next(iter(self._rotations)):
            step = replace(step, bias=step.first_bias)
        return step if self._last is None or id(module) != self._last[0] else step.only(self._last[1])

    def kept(self, module: Any, step: Step, key: Tensor) -> Tensor | None:
        """The keys of all virtual tokens, which a fast cache keeps, in the order of the step, see
        `dymu.unmerging.backends.reference.attend`; None: it does not, or the step has others."""
        layer = self._history.stored_by
        if not self._history.fast or self._history.plain or self._history.hidden is not None:
            return None
        if layer is None or layer.keys is not key or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None  # with gradients each step has keys of its own
        known, (heads, stored) = self._history.keys, key.shape[1:3]

        def turned() -> Tensor:
            turn, channels = _turn(self._rotations[id(module)], known.turn, key.shape[-1])
            keys = virtual_keys(key, rows_behind(known.slot[:, : known.turned], stored, heads), turn, channels)
            return usual_order(keys, channels)

        kept: Tensor | None = layer.behind(known.memo, turned) if known.turned else None
        return kept if step.turned == known.turned and step.turned < step.keys.shape[1] else None

    def _turned(self, rotation: Rotation, size: int, one_way: bool) -> Step:
        if one_way and self._step.block is not None:
            return replace(self._turned(rotation, size, False), block=None)
        step = self._step
        turn, channels = step.once_for_all(("turn", rotation, size), lambda: _turn(rotation, step.turn, size))
        same = turn is self._step.turn and channels is None
        return self._step if same else replace(self._step, turn=turn, channels=channels)


def _turn(rotation: Rotation, turn: Tensor | None, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Of the turns [B, T, any] by all kinds of angles those of a layer, [B, T, D / 2], and its order of channels, see
    `Step`."""
    if turn is None or not rotation.pairs:
        return None, None
    if turn.shape[-1] == rotation.pairs == size // 2 and not rotation.neighbours:
        return turn, None
    own = turn[..., rotation.start : rotation.start + rotation.pairs]
    still = own.new_ones(*own.shape[:-1], size // 2 - rotation.pairs)
    plain = rotation.pairs == size // 2 and not rotation.neighbours
    return torch.cat((own, still), -1), None if plain else rotation.channels.to(turn.device)


class Probe(Protocol):
    """Stands in for a step where it is tried how a layer rotates, see `dymu.hooks.probe`."""

    def attend(
        self, module: Any, query: Tensor, key: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor: ...


def unmerged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dymu_step: LayerSteps | Probe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over virtual tokens, in the signature of transformers' attention functions.

    Args:
        query: [B, H, Mq, D]; key, value: [B, Hkv, entries, D]; all merged, rotated to their representatives' positions.
        attention_mask: unused; `dymu_step` says who sees whom.
        dymu_step: the virtual tokens of this forward; None: DyMU is disabled, and the implementation that the model is
            set to attends.

    Returns:
        [B, Mq, H, D], and None for the attention weights, which are never formed.
    """
    if dymu_step is None:
        stock: Any = ALL_ATTENTION_FUNCTIONS.get_interface(
            module.config._attn_implementation_internal,  # what the config view of this layer covers
            getattr(sys.modules[type(module).__module__], "eager_attention_forward", None),
        )
        named = {"sliding_window": sliding_window, "softcap": softcap}
        kwargs |= {name: value for name, value in named.items() if value is not None}
        attended: tuple[Tensor, Tensor | None] = stock(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return attended
    refuse_unknown(module, kwargs)
    if not isinstance(dymu_step, LayerSteps):
        return dymu_step.attend(module, query, key, scaling, sliding_window, softcap), None
    if (packed := dymu_step.packed) is not None:
        query = packed.pad_heads(query)
        if len(key) < len(query):  # no cache has put them into rows
            key, value = packed.pad_heads(key), packed.pad_heads(value)
    step = dymu_step.at(module, query.shape[-1], sliding_window)
    kept = dymu_step.kept(module, step, key)
    unmerged = BACKENDS[step.backend](query, key, value, step, scaling, sliding_window, softcap, kept)
    return unmerged.contiguous() if packed is None else packed.pack(unmerged), None


AttentionInterface.register(NAME, unmerged_attention)
