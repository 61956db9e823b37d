"""One batch of pictures in the encoder, reduced layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from dymu.errors import BadPrompt, UnsupportedModel
from dymu.merging import EncoderLayer, Layout, MergedTokens, Pictures
from dymu.merging.encoder_layer import Angles
from dymu.reducers.answers import check_entering, check_partners, check_reduced
from dymu.reducers.reducer import Candidates, Pixels, Reducer, Shown, SomeMerge, Tokens
from dymu.token_map import TokenMap, take


class LayerMemory:
    """What the encoder's layers gave of the newest pictures with nothing merged, for later runs over the same pictures
    that merge nothing in layers."""

    def __init__(self) -> None:
        self._grids: tuple[tuple[int, int], ...] = ()
        self._known = dict[int, tuple[Tensor, Tensor]]()

    def given(self, index: int, x: Tensor, grids: tuple[tuple[int, int], ...]) -> Tensor | None:
        """What layer `index` makes of `x`; None where that is not known."""
        if index not in self._known:
            return None
        known, made = self._known[index]
        alike = index == 0 and grids == self._grids and (known.shape, known.dtype) == (x.shape, x.dtype)
        return made if known is x or (alike and torch.equal(known, x)) else None

    def keep(self, index: int, x: Tensor, made: Tensor, grids: tuple[tuple[int, int], ...]) -> None:
        """Remember what layer `index` has made of `x`."""
        if index == 0:
            self._grids, self._known = grids, {}
        self._known[index] = x, made


class EncoderRun:
    """One batch of pictures in the encoder.

    Args:
        reducer: which tokens merge.
        depth: encoder layers that run and may merge, from the first on.
        shown: what the pictures show.
        pictures: how their patches travel.
        protected: leading tokens that never merge, though they count where tokens are paired; more than the prefix
            where the language model does not get the first patch.
        behind: the layer behind the last one that runs; None: there is none.
        memory: of earlier runs with the same weights; None: there is none.

    Attributes:
        states: the tokens ahead of the first layer, and after each.
        gives_features: whether the features at the end are the reducer's, not means of the encoder's.
    """

    def __init__(
        self,
        reducer: Reducer,
        depth: int,
        shown: Shown,
        pictures: Pictures,
        protected: int = 0,
        behind: Callable[[], EncoderLayer] | None = None,
        memory: LayerMemory | None = None,
    ) -> None:
        self._memory = None if reducer.reduces("in_layer", shown) else memory
        self.reducer, self.depth, self.shown, self.pictures = reducer, depth, shown, pictures
        self.prefix, self.protected = pictures.prefix, max(pictures.prefix, protected)
        self.states: list[MergedTokens] = []
        self.gives_features = False
        self._entering: TokenMap | None = None
        self._enters: Tensor | None = None
        self._smaller = False
        self._dimensions = 3
        shown.sources.follow(pictures, depth, reducer.reads(depth), behind)

    def pixels(self, pixels: Tensor) -> Tensor:
        """The pictures that the encoder gets, see `Shown.pixels`."""
        if self.reducer.reduces("before_encoder", self.shown):
            before = pixels
            asked = Pixels(pixels, self.shown, self._blocks)
            pixels, self._entering = check_entering(
                self.reducer.before_encoder(asked), before, self.shown.counts, self.reducer
            )
            self._memory = None
            if pixels.shape != before.shape and (self.pictures.arrangement != "batch" or self.pictures.side > 1):
                raise UnsupportedModel(
                    f"{type(self.reducer).__name__} shows the encoder smaller pictures, which dymu can do only where "
                    "every patch is a token of the language model and all pictures have one size; take another reducer."
                )
            self._smaller = pixels.shape != before.shape
            if self._smaller and self._entering is None:
                raise ValueError(
                    f"{type(self.reducer).__name__}.before_encoder answered other pixels {list(pixels.shape)} without "
                    "a map of their patches; give one."
                )
        return pixels

    def _blocks(self) -> list[Tensor]:
        """See `Pixels.blocks`."""
        pixels, grids = self.shown.pixels, self.shown.grids
        if self.pictures.cut:
            units = self.pictures.to_units(torch.cat(list(pixels))).unflatten(0, (-1, self.pictures.side**2)).flatten(1)
            return [
                part.float().view(*grid, -1) for part, grid in zip(units.split(self.shown.counts), grids, strict=True)
            ]
        blocks = []
        for picture, (rows, columns) in zip(pixels, grids, strict=True):
            height, width = picture.shape[1] // rows, picture.shape[2] // columns
            whole = picture[:, : rows * height, : columns * width].float()
            cut = whole.unflatten(2, (columns, width)).unflatten(1, (rows, height))
            blocks.append(cut.permute(1, 3, 0, 2, 4).flatten(2))
        return blocks

    def layer(
        self,
        index: int,
        layer: EncoderLayer,
        x: Tensor,
        angles: Angles | None = None,
        window: Tensor | None = None,
        windowed: bool = False,
    ) -> Tensor:
        """Run encoder layer `index` on what the layer before it gave.

        Fewer tokens may come out. Between layers they travel as the states' layouts say; the last of `depth` gives what
        `Pictures.leave` says, and later ones return their input, since nobody reads their features.

        Args:
            angles, window: of the embedded tokens, see `Pictures.enter`.
            windowed: whether this layer attends within windows.
        """
        if index == 0:
            self._dimensions = x.ndim
            x = self._enter(x, angles, window)
        state = self.states[-1]
        if index < self.depth:
            self.shown.sources.passed(index, layer, x, state, windowed)
            x, state = self._through(index, layer, x, state, windowed)
        if index + 1 == self.depth:
            self.shown.sources.finished(layer, x, state)
            x, state = self._reduced(x, state)
            x = self.pictures.leave(x, state)
            x = x if x.ndim == self._dimensions else x[None]
        self.states.append(state)
        return x

    def _through(
        self, index: int, layer: EncoderLayer, x: Tensor, state: MergedTokens, windowed: bool
    ) -> tuple[Tensor, MergedTokens]:
        """What a layer gives, and the tokens that are left there."""
        grids = self.pictures.grids
        if self._memory is not None and (made := self._memory.given(index, x, grids)) is not None:
            return made, state
        entered = x
        x, keys = layer.attend(x, state, windowed)
        tokens = tuple(length - self.protected for length in self.states[0].layout.lengths)
        candidates = Candidates(
            index, self.depth, tokens, self.protected, state, x, keys, self.shown, windowed, self._focus
        )
        into, still = self.reducer.in_layer(candidates), None
        if isinstance(into, SomeMerge):
            into, still = into
        if into is not None:
            check_partners(into, still, state.rows(windowed).units, self.protected, self.reducer)
            x, state = state.merge(x, into, self.protected, windowed, still)
        x = layer.feed_forward(x)
        if self._memory is not None:
            self._memory.keep(index, entered, x, grids)
        return x, state

    @property
    def map(self) -> TokenMap:
        """Encoder tokens, prefix included, to those that are left."""
        return self.states[-1].map

    @property
    def first(self) -> Tensor:
        """int64 [S']: of each merged unit, the first of all that there were."""
        state = self.states[-1]
        original = self.pictures.layout(state.map.group.device)
        return state.layout.pack(original.index(state.map.first())).flatten()

    def expand(self, features: Tensor) -> Tensor:
        """Copy the features [S', C] of merged units, which travel without padding, to all that there were [S, C]."""
        state = self.states[-1]
        return self.pictures.expand(features.unflatten(0, state.layout.shape), state)

    def in_final_tokens(self, hidden: Tensor, layers: int) -> Tensor | None:
        """What the first `layers` layers gave, averaged down to the tokens left at the end, [B, M, C]; what the last
        one gave, as it is. None: layers that did not run gave it, or such tokens are not what the family reads."""
        if layers == self.depth:
            return hidden
        if layers > self.depth or self.pictures.restores or self.pictures.arrangement == "packed":
            return None
        state, final = self.states[layers], self.map
        if layers == 0:
            hidden = self._entered(hidden)
        hidden = state.layout.pad(hidden)
        if state.map is final:
            return hidden
        group = final.group.gather(1, state.map.first())
        onward = TokenMap(torch.where(state.layout.present, group, -1), final.kept, final.width, padded=True)
        return onward.average(hidden, state.map.size())

    def _enter(self, x: Tensor, angles: Angles | None, window: Tensor | None) -> Tensor:
        """The embedded tokens that go into the first layer."""
        if self._smaller:
            assert self._entering is not None
            entering = self._entering.after(self.prefix)
            angles = angles and self.pictures.for_all(angles, x)
            self.states = [MergedTokens(entering, Layout.of(entering.kept), angles=angles)]
            return x
        there, said = x[..., 0].numel(), self.pictures.patches
        if self.pictures.arrangement in ("packed", "raster") and there != said:
            raise BadPrompt(
                f"the encoder has {there} patches, and the pictures are said to have {said}; give the model the "
                "sizes that its processor makes, along with their pixels."
            )
        x, state = self.pictures.enter(x, angles, window)
        if self._entering is not None:
            tokens, self._enters = self.pictures.entering(self._entering)
            x, state = state.some(x, tokens, self._enters)
        self.states = [state]
        return x

    def _entered(self, x: Tensor) -> Tensor:
        """Of the embedded tokens [B, T, C] of a batch those that enter, in the layout of the first layer."""
        return x if self._enters is None else self.states[0].layout.pack(take(x, self._enters))

    def _reduced(self, x: Tensor, state: MergedTokens) -> tuple[Tensor, MergedTokens]:
        """The patches that the last layer gave, reduced once more, and which they are; both as they travel."""
        if not self.reducer.reduces("after_encoder", self.shown):
            return x, state
        units = state.layout.pad(state.units.gather(x, state.layout))
        tokens = self._finished(units, state)
        reduced = self.reducer.after_encoder(tokens)
        if reduced is None:
            return x, state
        reduced = check_reduced(reduced, self.reducer, "after_encoder", tokens)
        merges = reduced.map.after(self.protected)
        if reduced.features is None:
            units = merges.average(units, state.map.size())
        else:
            self.gives_features = True
            units = torch.cat((units[:, : self.protected], reduced.features.to(units.dtype)), 1)
        layout = Layout.of(merges.kept)
        left = MergedTokens(state.map.then(merges), layout, units=state.units)
        return state.units.spread(layout.pack(units), layout), left

    @cached_property
    def _focus(self) -> Tensor | None:
        """bool [pictures, T], of the tokens ahead of the first layer, in the order of the layers."""
        if self.shown.focus is None:
            return None
        device = self.states[0].map.group.device
        return pad(self._placed([grid.to(device) for grid in self.shown.focus]), (self.prefix, 0), value=False)

    def _placed(self, of_pictures: Sequence[Tensor]) -> Tensor:
        """[pictures, N, ...] of the patches in the order of the layers, of each picture's [rows, columns, ...]."""
        units = self.pictures.by_layers(torch.cat([grid.flatten(0, 1) for grid in of_pictures]))
        return pad_sequence(list(units.split(self.shown.counts)), True)

    def _finished(self, units: Tensor, state: MergedTokens) -> Tokens:
        patches = state.map.drop(self.protected)
        missing = self.protected - self.prefix

        def grids() -> list[list[Tensor]]:
            numbers = torch.cat([torch.arange(count, device=units.device) for count in self.shown.counts])
            of_pictures = self.pictures.by_rows(numbers).split(self.shown.counts)
            return [
                [number.sub(missing).clamp(min=-1).view(shape)]
                for number, shape in zip(of_pictures, self.shown.grids, strict=True)
            ]

        return Tokens(
            features=units[:, self.protected :],
            map=patches,
            counts=[length - self.protected for length in state.layout.lengths],
            picture=torch.zeros_like(patches.group),
            first=tuple(range(len(units) + 1)),
            shown=self.shown,
            find_grids=grids,
            find_location=lambda: self.shown.location[:, missing:],
            find_places=lambda of_pictures: self._placed(of_pictures)[:, missing:],
            focus=None if self._focus is None else self._focus[:, self.protected :],
        )
