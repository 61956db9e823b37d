"""One batch of pictures in an encoder whose every layer gives all tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dymu.errors import UnsupportedModel
from dymu.merging import EncoderLayer, MergedTokens, Pictures
from dymu.merging.encoder_layer import Angles
from dymu.reducers.encoder_run import EncoderRun
from dymu.reducers.reducer import Reducer, Shown
from dymu.token_map import TokenMap


class WholeRun(EncoderRun):
    """One batch of pictures in an encoder by itself: what a layer gives are copies of the merged tokens at all places.

    So hidden states, norms, pooling, and whoever else reads what a layer gives, find stock shapes.

    Args:
        padded: whether padding may follow the patches of a picture.
    """

    def __init__(self, reducer: Reducer, depth: int, shown: Shown, pictures: Pictures, padded: bool) -> None:
        super().__init__(reducer, depth, shown, pictures)
        self._padded = padded
        self._places = 0
        self._copies = self._merged = torch.empty(0)
        self._version: int | None = None

    def layer(
        self,
        index: int,
        layer: EncoderLayer,
        x: Tensor,
        angles: Angles | None = None,
        window: Tensor | None = None,
        windowed: bool = False,
    ) -> Tensor:
        """Run encoder layer `index` on [B, T, C], what the layer before it gave, or that with changes by somebody else.

        Returns:
            [B, T, C]; where a picture is padded, 0.

        Raises:
            UnsupportedModel: another number of tokens enters than the pixels have, layers are left out, or the reducer
                drops tokens.
        """
        if len(self.states) != (index + 1 if index else 0):
            raise UnsupportedModel(
                f"layer {index} of the encoder does not run behind layer {index - 1}, so that dymu cannot follow; call "
                "the encoder as it is, without leaving layers out, or within handle.disabled()."
            )
        if index == 0:
            x = self._begin(x)
        else:
            x, angles = self._merged_of(x), None
        x = super().layer(index, layer, x, angles)
        state = self.states[-1]
        self._copies, self._merged = self._at_all_places(x, state, index + 1 == self.depth), x
        self._version = _version(self._copies)
        return self._copies

    def _begin(self, x: Tensor) -> Tensor:
        """The tokens of all pictures as they travel."""
        layout = self.pictures.layout(x.device)
        self._places = x.shape[1]
        if self._places < layout.longest or (self._places > layout.longest and not self._padded):
            raise UnsupportedModel(
                f"{self._places} tokens of each picture enter the encoder's first layer, and not the {layout.longest} "
                "that its pixels have: it drops patches (patch dropout in training), pads pictures, or makes its "
                "patches otherwise than dymu knows; call encoder.eval(), or give pictures of whole patches."
            )
        return layout.pack(x[:, : layout.longest])

    def _merged_of(self, copies: Tensor) -> Tensor:
        """The merged tokens, as they travel, of those at all places: means where somebody may have changed some."""
        state = self.states[-1]
        if self._whole(state):
            return copies
        if copies is self._copies and self._version is not None and _version(copies) == self._version:
            return self._merged
        return state.layout.pack(state.map.average(copies[:, : state.map.tokens]))

    def _at_all_places(self, x: Tensor, state: MergedTokens, last: bool) -> Tensor:
        """What a layer gave, at all places; the last gives it padded, see `Pictures.leave`."""
        if self._whole(state):
            return x
        copies = state.map.expand(x if last else state.layout.pad(x))
        self._refuse_dropped(state.map)
        missing = self._places - copies.shape[1]
        return pad(copies, (0, 0, 0, missing)) if missing else copies

    def _whole(self, state: MergedTokens) -> bool:
        """Whether every place has a token of its own."""
        whole = state.map.width == self._places and not state.map.padded
        return whole and state is self.states[0]

    def _refuse_dropped(self, tokens: TokenMap) -> None:
        if tokens.padded:
            length = self.pictures.layout(tokens.group.device).length
            if bool(((tokens.group >= 0).sum(1) < length).any()):
                raise UnsupportedModel(
                    f"{type(self.reducer).__name__} drops tokens, and an encoder by itself has features at all places; "
                    "merge instead, or let a kept token stand for each dropped one."
                )


def _version(x: Tensor) -> int | None:
    """What changes with every change in place; tensors of inference mode do not count them."""
    return None if x.is_inference() else x._version
