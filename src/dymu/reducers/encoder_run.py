"""One batch of pictures in the encoder, reduced layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dymu.merging import EncoderLayer, Layout, MergedTokens, a_count
from dymu.reducers.reducer import Candidates, Pixels, Reducer, Shown, Tokens
from dymu.token_map import TokenMap, take


class EncoderRun:
    """One batch of pictures in the encoder.

    Args:
        reducer: which tokens merge.
        depth: encoder layers that run and may merge, from the first on.
        shown: what the pictures show.
        prefix: class and register tokens ahead of the patches.
        protected: leading tokens that never merge, though they count where tokens are paired; more than `prefix` where
            the language model does not get the first patch.

    Attributes:
        states: the tokens ahead of the first layer, and after each.
        gives_features: whether the features at the end are the reducer's, not means of the encoder's.
    """

    def __init__(self, reducer: Reducer, depth: int, shown: Shown, prefix: int, protected: int = 0) -> None:
        self.reducer, self.depth, self.shown = reducer, depth, shown
        self.prefix, self.protected = prefix, max(prefix, protected)
        self.states: list[MergedTokens] = []
        self.gives_features = False
        self._entering: TokenMap | None = None

    def pixels(self, pixels: Tensor) -> Tensor:
        """The pictures [pictures, 3, height, width] that the encoder gets."""
        if self.reducer.reduces("before_encoder", self.shown):
            before = pixels
            pixels, self._entering = self.reducer.before_encoder(Pixels(pixels, self.shown)) or (pixels, None)
            shape = (len(before), self.shown.rows * self.shown.columns)
            if self._entering is not None and tuple(self._entering.group.shape) != shape:
                raise ValueError(
                    f"{type(self.reducer).__name__}.before_encoder was asked about patches {list(shape)} and answered "
                    f"a map of {list(self._entering.group.shape)}."
                )
        return pixels

    def layer(self, index: int, layer: EncoderLayer, x: Tensor) -> Tensor:
        """Run encoder layer `index` on what the layer before it gave.

        Fewer tokens may come out. Between layers they travel as the states' layouts say; the last of `depth` gives
        [B, T, C] again, and later ones return their input, since nobody reads their features.
        """
        if index == 0:
            x = self._enter(x)
        state = self.states[-1]
        if index < self.depth:
            x, keys = layer.attend(x, state)
            into = self.reducer.in_layer(
                Candidates(index, self.depth, state.map.tokens, self.protected, state, x, keys, self.shown)
            )
            if into is not None:
                self._check(into, state.layout)
                x, state = state.merge(x, into, self.protected)
            x = layer.feed_forward(x)
        if index + 1 == self.depth:
            x, state = self._leave(state.layout.pad(x), state)
        self.states.append(state)
        return x

    @property
    def map(self) -> TokenMap:
        """Encoder tokens, prefix included, to those that are left."""
        return self.states[-1].map

    def in_final_tokens(self, hidden: Tensor, layers: int) -> Tensor:
        """Average what the first `layers` layers gave down to the tokens left at the end, [B, M, C]."""
        if layers >= self.depth:
            return hidden
        state, final = self.states[layers], self.map
        if layers == 0:
            hidden = self._entered(hidden)
        hidden = state.layout.pad(hidden)
        if state.map is final:
            return hidden
        group = final.group.gather(1, state.map.first())
        onward = TokenMap(torch.where(state.layout.present, group, -1), final.kept, final.width, padded=True)
        return onward.average(hidden, state.map.size())

    def _enter(self, x: Tensor) -> Tensor:
        """The embedded tokens [B, T, C] that go into the first layer."""
        self.states = [MergedTokens.unmerged(x)]
        if self._entering is None:
            return x
        entering = self._entering.after(self.prefix)
        layout = Layout.of(entering.kept)
        size = layout.pack(entering.size()) if x.shape[1] == entering.tokens else None
        self.states = [MergedTokens(entering, layout, size)]
        return self._entered(x)

    def _entered(self, x: Tensor) -> Tensor:
        """Of the embedded tokens [B, T, C] those that enter, in the layout of the first layer."""
        entering = self.states[0]
        if self._entering is None or x.shape[1] != entering.map.tokens:
            return x
        return entering.layout.pack(take(x, entering.map.first()))

    def _check(self, into: Tensor, layout: Layout) -> None:
        """Raises ValueError where a reducer's `in_layer` answers something else than partners."""
        shape = (layout.batch, a_count(layout.longest, self.protected))
        if into.dtype != torch.int64 or tuple(into.shape) != shape:
            raise ValueError(
                f"{type(self.reducer).__name__}.in_layer must answer int64 {list(shape)}, the partner of each A token "
                f"or -1, and answered {into.dtype} {list(into.shape)}."
            )

    def _leave(self, x: Tensor, state: MergedTokens) -> tuple[Tensor, MergedTokens]:
        """What the encoder gives: tokens [B, M, C], and which they are."""
        if not self.reducer.reduces("after_encoder", self.shown):
            return x, state
        tokens = self._finished(x, state)
        reduced = self.reducer.after_encoder(tokens)
        if reduced is None:
            return x, state
        reduced.check_answers(self.reducer, "after_encoder", tokens)
        merges = reduced.map.after(self.protected)
        if reduced.features is None:
            x = merges.average(x, state.map.size())
        else:
            self.gives_features = True
            x = torch.cat((x[:, : self.protected], reduced.features.to(x.dtype)), 1)
        return x, MergedTokens(state.map.then(merges), Layout.of(merges.kept))

    def _finished(self, x: Tensor, state: MergedTokens) -> Tokens:
        patches = state.map.drop(self.protected)
        missing = self.protected - self.prefix
        grid = torch.arange(self.shown.rows * self.shown.columns, device=x.device).sub(missing).clamp(min=-1)
        return Tokens(
            features=x[:, self.protected :],
            map=patches,
            picture=torch.zeros_like(patches.group),
            first=tuple(range(len(x) + 1)),
            shown=self.shown,
            find_grids=lambda: [[grid.view(self.shown.rows, self.shown.columns)]] * len(x),
            find_location=lambda: self.shown.location[:, missing:],
        )
