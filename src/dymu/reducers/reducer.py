"""What a way to have fewer tokens is asked, and what it answers with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NoReturn

import torch
from torch import Tensor

from dymu.errors import BadBudget, BadPrompt
from dymu.merging import MergedTokens, PictureTokens
from dymu.token_map import TokenMap, leaders_of, take

Stage = Literal["before_encoder", "in_layer", "after_encoder", "in_prompt"]
"""When a reducer may act, in order; each is a method of it."""


def _unknown() -> NoReturn:
    raise BadPrompt("a reducer asks for the question, or for where things lie in the picture, which is not known here.")


@dataclass(frozen=True, eq=False)
class Shown:
    """What one call shows the encoder. `text` and `location` are computed when they are read.

    Attributes:
        pixels: [pictures, 3, height, width], as the processor made them; where pictures have sizes of their own, of
            each its [3, height, width], or its patches [N, any].
        grids: of every picture the rows and columns of its patches; of units, where the family makes one token of
            several patches.
        single: whether every item is one picture, of which the language model gets all patches; not so for tiles and
            frames.
        video: whether the pictures are frames of videos.
    """

    pixels: Tensor | Sequence[Tensor]
    grids: tuple[tuple[int, int], ...]
    single: bool
    video: bool
    find_text: Callable[[], Sequence[Tensor]] = field(default=_unknown, repr=False)
    find_location: Callable[[], Tensor] = field(default=_unknown, repr=False)

    @property
    def counts(self) -> tuple[int, ...]:
        """Patches (units) of every picture."""
        return tuple(rows * columns for rows, columns in self.grids)

    @cached_property
    def text(self) -> Sequence[Tensor]:
        """For each picture, int64 [words]: the ids of the prompt that shows it, without its placeholders and padding.

        Raises:
            BadPrompt: the pictures are encoded by themselves, so no prompt is known.
        """
        return self.find_text()

    @cached_property
    def location(self) -> Tensor:
        """float [pictures, longest, 4], the part of the user's picture that each patch shows: left, top, right, bottom
        in widths and heights of it (of what the processor left of it, where that crops). Padding lies beyond 0 to 1;
        past the end of a smaller picture stands nan. A frame of a video is a picture. Patches (units) come in the order
        of the encoder's layers, in which those of a window follow each other.
        """
        return self.find_location()


@dataclass(frozen=True, eq=False)
class Pixels:
    """Pictures ahead of the encoder, [pictures, 3, height, width]."""

    pixels: Tensor
    shown: Shown


@dataclass(frozen=True, eq=False)
class Candidates:
    """Tokens between the attention and the MLP of one encoder layer.

    Attributes:
        layer: its index; `layers` run in all.
        tokens: of each picture ahead of the first layer, those that may merge.
        prefix: leading tokens that never merge. They count where tokens are paired, see `dymu.merging.match.halves`.
        state: which tokens there are, and how many patches (units) each stands for.
        x: the patches of the tokens, as they travel, with C channels.
        keys: [..., H, D], the keys of the layer's attention, likewise.
        windowed: whether the layer attends, and tokens merge, within windows.
    """

    layer: int
    layers: int
    tokens: tuple[int, ...]
    prefix: int
    state: MergedTokens
    x: Tensor
    keys: Tensor
    shown: Shown
    windowed: bool = False

    @cached_property
    def _matches(self) -> tuple[Tensor, Tensor]:
        return self.state.match(self.keys, self.prefix, self.windowed)

    @property
    def similarity(self) -> Tensor:
        """[rows, A] of each A token to its best partner; -inf where a row has no such token. A row is a picture, or a
        window of one. See `best_partner`."""
        return self._matches[0]

    @property
    def partner(self) -> Tensor:
        """int64 [rows, A], the index within B of that partner."""
        return self._matches[1]

    @property
    def picture(self) -> Tensor:
        """int64 [rows], the picture that each row is of."""
        return self.state.picture(self.windowed)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Finished tokens: of pictures after the encoder, or of items, projected, where they stand in the prompt.

    Class, register and learned tokens (newlines of tiles) are not among them.

    Attributes:
        features: [B, T, C], padded to the longest row.
        map: from the N patches of a picture, or the N tokens of an item in the prompt, to the T tokens; -1 for learned
            and dropped ones.
        picture: int64 [B, N], which of the row's pictures each of the N shows.
        first: for each row the index of its first picture among all that are shown; then their number.
    """

    features: Tensor
    map: TokenMap
    picture: Tensor
    first: tuple[int, ...]
    shown: Shown
    find_grids: Callable[[], Sequence[Sequence[Tensor]]] = field(repr=False)
    find_location: Callable[[], Tensor] = field(repr=False)

    @cached_property
    def counts(self) -> list[int]:
        """Tokens of each row."""
        counts: list[int] = self.map.kept.tolist()
        return counts

    @cached_property
    def size(self) -> Tensor:
        """float32 [B, T]: how many of the N each token stands for."""
        return self.map.size()

    @cached_property
    def present(self) -> Tensor:
        """bool [B, T]: whether there is a token."""
        return torch.arange(self.map.width, device=self.map.kept.device) < self.map.kept[:, None]

    @cached_property
    def grids(self) -> Sequence[Sequence[Tensor]]:
        """For each row int64 [rows, columns] grids of indices below N, -1 for none: of the picture; of the whole image
        and of its tiles put together; or of every frame.

        Raises:
            ValueError: the tokens are no grids.
        """
        return self.find_grids()

    @cached_property
    def location(self) -> Tensor:
        """float [B, N, 4], the part of the user's picture that each of the N shows, see `Shown.location`; nan: none."""
        return self.find_location()

    @property
    def text(self) -> Sequence[Tensor]:
        """For each row the ids of its prompt, see `Shown.text`."""
        return [self.shown.text[first] for first in self.first[:-1]]

    def features_of(self, reduced: Reduced) -> Tensor:
        """[B, M, C], the features of the tokens that are left of these."""
        if reduced.features is not None:
            return reduced.features
        return reduced.map.average(self.features, self.size)

    def keep(self, kept: Tensor) -> Reduced:
        """Keep the tokens bool [B, T] as they are, in their order, and drop the others."""
        kept = kept & self.present
        count = kept.sum(1)
        group = (kept.cumsum(1) - 1).masked_fill(~kept, -1)
        merges = TokenMap(group, count, int(count.max()), padded=True)
        return Reduced(merges, take(self.features, merges.first()))

    def by_picture(self) -> tuple[PictureTokens, Tensor]:
        """The tokens picture by picture, and their indices int64 [S] among the flattened [B * T] ones."""
        of_row = torch.tensor(self.first[:-1], device=self.picture.device)[:, None]
        picture = (of_row + self.picture.gather(1, self.map.first()))[self.present]
        index = self.present.flatten().nonzero()[:, 0]
        picture, order = picture.sort(stable=True)
        index = index[order]
        features, size = self.features.flatten(0, 1)[index], self.size.flatten()[index]
        return PictureTokens.of(features, picture, size), index

    def joined(self, group: Tensor, index: Tensor, features: Tensor | None = None) -> Reduced:
        """Join the tokens `index`, see `by_picture`, that have the same group.

        Args:
            group: int64 [S], of each of these tokens.
            features: [groups, C]; None: the means.
        """
        label = torch.full_like(self.present, -1, dtype=torch.long).flatten()
        label[index] = group
        label = label.view_as(self.present)
        merges = TokenMap.from_leaders(leaders_of(label, len(index)), self.present)
        if features is None:
            return Reduced(merges)
        return Reduced(merges, features[label.gather(1, merges.first())].to(self.features.dtype))

    def then(self, reduced: Reduced) -> Tokens:
        """The tokens that are left."""
        return replace(self, features=self.features_of(reduced), map=self.map.then(reduced.map))


@dataclass(frozen=True, eq=False)
class Reduced:
    """What is left of tokens [B, T].

    Attributes:
        map: to the M that are left; -1 for dropped tokens.
        features: [B, M, C] of those; None: the mean of each group, weighed by size.
    """

    map: TokenMap
    features: Tensor | None = None

    def after(self, earlier: TokenMap) -> Reduced:
        """The same for the tokens that `earlier` maps to these."""
        return Reduced(earlier.then(self.map), self.features)

    def check_answers(self, reducer: Reducer, stage: Stage, tokens: Tokens) -> None:
        """Refuse what does not fit the tokens that the reducer was asked to reduce.

        Raises:
            BadBudget: nothing is left of an image.
            ValueError: the map or the features are of other shapes.
        """
        name, shape = f"{type(reducer).__name__}.{stage}", tuple(self.map.group.shape)
        asked = (len(tokens.features), tokens.map.width)
        if shape != asked:
            raise ValueError(f"{name} was asked about tokens {list(asked)} and answered a map of {list(shape)}.")
        expected = (*shape[:1], self.map.width, tokens.features.shape[-1])
        if self.features is not None and tuple(self.features.shape) != expected:
            raise ValueError(
                f"{name} answered features {list(self.features.shape)}; its map asks for {list(expected)}."
            )
        empty = (self.map.kept < 1) & (tokens.map.kept > 0)
        is_of_items = stage == "in_prompt" or tokens.shown.single  # of an image's tiles, some may go
        if bool(empty.any() if is_of_items else empty.all()):
            raise BadBudget(f"{name} leaves no token of an image; keep at least one of each.")


class Reducer:
    """A way to have fewer tokens. It takes part in one stage or several; what it does not define leaves tokens alone.

    Every picture, and every item, is reduced by itself: what a row gets must not depend on the others.
    """

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        """Refuse an encoder, before any work.

        Args:
            layers: that run.
            tokens: patches of a picture; None where that is not known yet.

        Raises:
            BadBudget, ValueError, UnsupportedModel: naming what does not fit.
        """

    def reduces(self, stage: Stage, shown: Shown) -> bool:
        """Whether it takes part in this stage of a call; if not, its argument is not computed."""
        return getattr(type(self), stage) is not getattr(Reducer, stage)

    def before_encoder(self, pixels: Pixels) -> tuple[Tensor, TokenMap] | None:
        """Other pixels, of the same pictures, and a map [pictures, patches] to the patches that enter the encoder.

        Where the pixels make as many patches as before, the first one of each group enters, as heavy as the group.
        Where they make fewer, those are the groups, and the encoder sees a smaller picture as it would any.
        """
        return None

    def in_layer(self, candidates: Candidates) -> Tensor | None:
        """int64 [rows, A], the partner (an index within B) that each A token merges into, -1: it stays. None: the layer
        merges nothing."""
        return None

    def after_encoder(self, tokens: Tokens) -> Reduced | None:
        """Reduce the tokens that the last layer gave. None: not at all."""
        return None

    def in_prompt(self, tokens: Tokens) -> Reduced | None:
        """Reduce tokens where they stand in the prompt. None: not at all."""
        return None
