"""What a way to have fewer tokens is asked, and what it answers with."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import ClassVar, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.errors import BadPrompt
from dymu.merging import MergedTokens, PictureTokens, in_focus
from dymu.reducers.sources import Sources
from dymu.token_map import TokenMap, at_least_float32, leaders_of, take

Stage = Literal["before_encoder", "in_layer", "after_encoder", "in_prompt"]
"""When a reducer may act, in order; each is a method of it."""


def _unknown() -> NoReturn:
    raise BadPrompt("a reducer asks for the question, or for where things lie in the picture, which is not known here.")


@dataclass(frozen=True, eq=False)
class Shown:
    """What one call shows the encoder. `items`, `text` and `location` are computed when they are read.

    Attributes:
        pixels: [pictures, 3, height, width], as the processor made them; where pictures have sizes of their own, of
            each its [3, height, width], or its patches [N, any].
        grids: of every picture the rows and columns of its patches; of units, where the family makes one token of
            several patches.
        single: whether every item is one picture, of which the language model gets all patches; not so for tiles and
            frames.
        video: whether the pictures are frames of videos.
        focus: of every picture bool [rows, columns], the patches (units) that merge last, or by a rule of their own;
            None: none is ahead of another.
        sources: what the encoder's layers tell of the pictures, to a reducer that asks for it in `reads`.
        embed: from ids int64 [words] of the prompt to embeddings [words, C] of the language model.
        by_image: whether it is known which tiles are of one image, by the prompt that shows them. If not, `items` are
            tiles.
    """

    pixels: Tensor | Sequence[Tensor]
    grids: tuple[tuple[int, int], ...]
    single: bool
    video: bool
    by_image: bool = True
    focus: Sequence[Tensor] | None = field(default=None, repr=False)
    sources: Sources = field(default_factory=Sources, repr=False)
    find_items: Callable[[], Sequence[Sequence[int]]] | None = field(default=None, repr=False)
    find_text: Callable[[], Sequence[Tensor]] = field(default=_unknown, repr=False)
    find_location: Callable[[], Tensor] = field(default=_unknown, repr=False)
    embed: Callable[[Tensor], Tensor] = field(default=lambda ids: _unknown(), repr=False)

    @property
    def counts(self) -> tuple[int, ...]:
        """Patches (units) of every picture."""
        return tuple(rows * columns for rows, columns in self.grids)

    @cached_property
    def items(self) -> Sequence[Sequence[int]]:
        """For each image or video of the user's, how many tokens the language model gets of each of its pictures with
        nothing merged: of the image, its tiles, or its frames. Learned tokens are not counted.
        """
        return [(count,) for count in self.counts] if self.find_items is None else self.find_items()

    def check_by_image(self) -> None:
        """Raises: BadPrompt, where it is not known which tiles are of one image."""
        if not self.by_image:
            raise BadPrompt(
                "prompts of this model say which tiles are one image, and none is known here: give input_ids along "
                "with the images, or a fraction for all alike."
            )

    @cached_property
    def notes(self) -> dict[Reducer, Tensor]:
        """What a reducer keeps from layer to layer of this call."""
        return {}

    @cached_property
    def item(self) -> Sequence[int]:
        """Of each picture, the number of the image or video that it is of."""
        return [number for number, pictures in enumerate(self.items) for _ in pictures]

    @cached_property
    def image(self) -> Sequence[int]:
        """Of each picture, the number of the image that it is of; every frame of a video is one."""
        return range(len(self.item)) if self.video else self.item

    @cached_property
    def image_tokens(self) -> Sequence[int]:
        """Of each `image`, all its tokens that the language model gets with nothing merged."""
        return [count for pictures in self.items for count in (pictures if self.video else (sum(pictures),))]

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
    """Pictures ahead of the encoder.

    Attributes:
        pixels: [pictures, 3, height, width]; where pictures have sizes of their own, as the encoder gets them.
    """

    pixels: Tensor
    shown: Shown
    find_blocks: Callable[[], Sequence[Tensor]] = field(repr=False)

    @cached_property
    def blocks(self) -> Sequence[Tensor]:
        """For each picture float [rows, columns, values], the pixels of each patch (unit)."""
        return self.find_blocks()


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
        focus: bool [pictures, T], of the tokens ahead of the first layer; see `Shown.focus`.
        apart: float32 [pictures, T], of these tokens, what the similarity of two is lowered by: the larger one of
            theirs, of a merged token that of its members; None: nothing.
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
    focus: Tensor | None = None
    apart: Tensor | None = None

    @cached_property
    def _matches(self) -> tuple[Tensor, Tensor]:
        apart = None if self.apart is None else self._in_rows(self.state.map.max(self.apart))
        return self.state.match(self.keys, self.prefix, self.windowed, apart)

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

    @cached_property
    def focused(self) -> Tensor:
        """bool [rows, A], whether each A token or its partner is in focus."""
        assert self.focus is not None
        return in_focus(self._in_rows(self.state.map.any(self.focus)), self.partner, self.prefix)

    def _in_rows(self, now: Tensor) -> Tensor:
        """What stands for the tokens that there are [pictures, M], for those of each row."""
        rows = self.state.rows(self.windowed).units
        return rows.pad(self.state.layout.pack(now).reshape(rows.shape))

    @property
    def features(self) -> Tensor:
        """[pictures, M, C] of the tokens that there are, the prefix among them; of a unit, the mean of its patches."""
        units = self.state.layout.pad(self.state.units.gather(self.x, self.state.layout))
        mean: Tensor = units.unflatten(-1, (self.state.units.patches, -1)).mean(-2)
        return mean


class SomeMerge(NamedTuple):
    """What merges in a layer that does not merge for some rows: what a row is alone must not depend on the others.

    Attributes:
        into: see `Reducer.in_layer`.
        still: bool [rows], those for which it does not; of them none merges.
    """

    into: Tensor
    still: Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """Finished tokens: of pictures after the encoder, or of items, projected, where they stand in the prompt.

    Class, register and learned tokens (newlines of tiles) are not among them.

    Attributes:
        features: [B, T, C], padded to the longest row.
        map: from the N patches of a picture, or the N tokens of an item in the prompt, to the T tokens; -1 for learned
            and dropped ones.
        counts: tokens of each row.
        picture: int64 [B, N], which of the row's pictures each of the N shows.
        first: for each row the index of its first picture among all that are shown; then their number.
        focus: bool [B, N], see `Shown.focus`.
    """

    features: Tensor
    map: TokenMap
    counts: Sequence[int]
    picture: Tensor
    first: tuple[int, ...]
    shown: Shown
    find_grids: Callable[[], Sequence[Sequence[Tensor]]] = field(repr=False)
    find_location: Callable[[], Tensor] = field(repr=False)
    find_places: Callable[[Sequence[Tensor]], Tensor] = field(repr=False)
    focus: Tensor | None = None

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

    @cached_property
    def place(self) -> Tensor:
        """int64 [B, T, 2], row and column of each token in its picture, of a merged one those of the first."""
        grids = [
            torch.cartesian_prod(*(torch.arange(size, device=self.map.group.device) for size in grid)).view(*grid, 2)
            for grid in self.shown.grids
        ]
        return take(self.find_places(grids), self.map.first())

    @cached_property
    def words(self) -> Sequence[Tensor]:
        """For each row the embeddings [words, C] of `text`.

        Raises:
            BadPrompt: a prompt has no word.
        """
        if not all(map(len, self.text)):
            raise BadPrompt(
                "a reducer reads the question, and a prompt has no word beside its image: ask something, or take "
                "another reducer."
            )
        return [self.shown.embed(ids).nan_to_num(0, 0, 0) for ids in self.text]

    def indices(self, row: int) -> list[Tensor]:
        """Of a row, the tokens of each of its pictures that has any: int64 [tokens] each, rising."""
        picture = self.picture[row].gather(0, self.map.first()[row, : self.counts[row]])
        return [(picture == number).nonzero()[:, 0] for number in picture.unique().tolist()]

    def values(self, row: int) -> Tensor:
        """float32 [tokens, C], the features of a row, for choosing among them: 0 where they are no finite numbers."""
        return at_least_float32(self.features[row, : self.counts[row]]).nan_to_num(0, 0, 0)

    def unit(self, row: int) -> Tensor:
        """The same, each of length 1."""
        return normalize(self.values(row), dim=-1)

    def of_pictures(self, grids: Sequence[Tensor]) -> Tensor:
        """What stands at the patches of each picture, [rows, columns, ...], for each token, [B, T, ...]: the mean over
        its places, 0 where that is no finite number."""
        return self.map.average(self.find_places(grids)).nan_to_num(0, 0, 0)

    def attention(self, layer: int | None = -1, heads: bool = True) -> Tensor:
        """float32 [B, T], the attention that each token gets in an encoder layer, see `Sources.attention`."""
        if (layer, heads) not in self._attention:
            self._attention[layer, heads] = self.of_pictures(self.shown.sources.attention(layer, heads))
        return self._attention[layer, heads]

    @cached_property
    def _attention(self) -> dict[tuple[int | None, bool], Tensor]:
        return {}

    @cached_property
    def keys(self) -> Tensor:
        """float32 [B, T, D], the keys of each token in the last encoder layer that runs, their mean over heads."""
        return self.of_pictures(self.shown.sources.keys())

    @cached_property
    def encoded(self) -> Tensor:
        """float32 [B, T, C], what the encoder gave for each token, ahead of any projection."""
        return self.of_pictures(self.shown.sources.features())

    def features_of(self, reduced: Reduced) -> Tensor:
        """[B, M, C], the features of the tokens that are left of these."""
        if reduced.features is not None:
            return reduced.features
        return reduced.map.average(self.features, self.size)

    def keep(self, kept: Tensor) -> Reduced:
        """Keep the tokens bool [B, T] as they are, in their order, and drop the others.

        Raises:
            ValueError: `kept` is something else.
        """
        if kept.dtype != torch.bool or kept.shape != self.present.shape:
            raise ValueError(
                f"keep takes bool {list(self.present.shape)}, which tokens stay, not {kept.dtype} {list(kept.shape)}."
            )
        kept = kept & self.present
        count = kept.sum(1)
        group = (kept.cumsum(1) - 1).masked_fill(~kept, -1)
        merges = TokenMap(group, count, int(count.max()), padded=True)
        return Reduced(merges, take(self.features, merges.first()))

    def by_picture(self) -> tuple[PictureTokens, Tensor, Tensor]:
        """The tokens picture by picture; their indices int64 [S] among the flattened [B * T] ones; and which of all
        pictures these are, int64 [pictures that have any]."""
        picture = self._pictures.gather(1, self.map.first())[self.present]
        index = self.present.flatten().nonzero()[:, 0]
        picture, order = picture.sort(stable=True)
        index = index[order]
        features, size = self.features.flatten(0, 1)[index], self.size.flatten()[index]
        focus = None if self.focus is None else self.map.any(self.focus).flatten()[index]
        return PictureTokens.of(features, picture, size, focus), index, picture.unique_consecutive()

    def merge_to(self, goal: Sequence[int], exactly: bool = False) -> Reduced | None:
        """Merge the most similar tokens of each picture until its image has no more than so many. None: none has.

        More are left where tokens cannot be compared: those of a picture of NaN.

        Args:
            goal: of each image, see `Shown.image`; no fewer than its pictures.
            exactly: whether an image that has fewer by now gets as many: what stands for several tokens then stands for
                them in several parts, with the same features.
        """
        if self.shown.single and not exactly and all(map(operator.le, self.counts, goal)):
            return None
        by_picture, index, pictures = self.by_picture()
        image = torch.tensor(self.shown.image, device=pictures.device)
        due = torch.tensor(goal, device=pictures.device)
        left = by_picture.left(image[pictures], len(goal))
        merged = None
        if bool((left > due).any()):
            merged = self.joined(by_picture.merge_to(due, image[pictures]).group, index)
        short = left < due
        if not exactly or not bool(short.any()):
            return merged
        return self.chosen([merged, self._from_places(goal)], short[image].long())

    def _from_places(self, goal: Sequence[int]) -> Reduced:
        """The same from all N, were each a token of its own; those of one token, exactly alike, merge first."""
        present = self.map.group >= 0
        count = present.sum(1)
        group = (present.cumsum(1) - 1).masked_fill(~present, -1)
        places = TokenMap(group, count, max(int(count.max()), 1), padded=True)
        features = take(self.map.expand(self.features), places.first())
        apart = replace(self, features=features, map=places, counts=count.tolist())
        merged = apart.merge_to(goal)
        if merged is None:
            return Reduced(places, apart.features, of_places=True)
        return Reduced(places.then(merged.map), apart.features_of(merged), of_places=True)

    def chosen(self, answers: Sequence[Reduced | None], of_picture: Tensor) -> Reduced | None:
        """For the tokens of each picture one of several answers.

        Args:
            answers: none of which joins tokens of several pictures; None reduces nothing.
            of_picture: int64 [pictures], the answer for each.
        """
        if all(answer is None for answer in answers):
            return None
        places = any(answer is not None and answer.of_places for answer in answers)
        index = torch.arange(self.map.width, device=self.map.kept.device).where(self.present, -1)
        same = TokenMap(index, self.map.kept, self.map.width, padded=True)
        every = [answer or Reduced(same, self.features) for answer in answers]
        groups = [(self.map.then(one.map) if places and not one.of_places else one.map).group for one in every]
        picture = self._pictures if places else self._pictures.gather(1, self.map.first())
        starts = torch.tensor([0, *accumulate(one.map.width for one in every)], device=index.device)
        answer = of_picture[picture]
        label = torch.stack(groups).gather(0, answer[None])[0]
        label = torch.where(label < 0, -1, label + starts[answer])
        merges = TokenMap.from_leaders(leaders_of(label, int(starts[-1])))
        if all(one is None or one.features is None for one in answers):
            return Reduced(merges)
        features = torch.cat([self.features_of(one) for one in every], 1)
        return Reduced(merges, take(features, label.gather(1, merges.first()).clamp(min=0)), places)

    @cached_property
    def _pictures(self) -> Tensor:
        """int64 [B, N], the picture that each of the N shows, among all that are shown."""
        return torch.tensor(self.first[:-1], device=self.picture.device)[:, None] + self.picture

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
        merged = self.map.then(reduced.map)
        return replace(self, features=self.features_of(reduced), map=merged, counts=merged.kept.tolist())

    def reduced(self, steps: Iterable[Callable[[Tokens], Reduced | None]]) -> Reduced | None:
        """What is left after some steps, each of which gets what the one before left. None: they reduce nothing."""
        tokens, total = self, None
        for step in steps:
            reduced = step(tokens)
            if reduced is not None:
                left = tokens.then(reduced)
                total = reduced if total is None else Reduced(total.map.then(reduced.map), left.features)
                tokens = left
        return total


@dataclass(frozen=True, eq=False)
class Reduced:
    """What is left of tokens [B, T].

    Attributes:
        map: to the M that are left; -1 for dropped tokens.
        features: [B, M, C] of those; None: the mean of each group, weighed by size.
        of_places: whether the map is from the N places of each row, see `Tokens.map`, and not from its tokens. Then the
            features are given.
    """

    map: TokenMap
    features: Tensor | None = None
    of_places: bool = False


class Reducer:
    """A way to have fewer tokens. It takes part in one stage or several; what it does not define leaves tokens alone.

    Every picture, and every item, is reduced by itself: what a row gets must not depend on the others.

    Attributes:
        focuses: whether it merges in layers, so that what is in focus can merge last; see `Shown.focus`.
    """

    focuses: ClassVar[bool] = False

    def reads(self, layers: int) -> Collection[int | None]:
        """Encoder layers that it asks `Shown.sources` for.

        Args:
            layers: that run.

        Returns:
            Their indices; -1 is the last that runs. None: what that gave, and the attention of the layer behind it (of
            itself, where there is none).
        """
        return ()

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        """Refuse an encoder, before any work.

        Args:
            layers: that run.
            tokens: patches of a picture; None where that is not known yet.

        Raises:
            BadBudget, ValueError, UnsupportedModel: naming what does not fit.
        """

    def check_shown(self, shown: Shown, images: Collection[int] | None = None) -> None:
        """Refuse what a call shows, before any work.

        Args:
            images: those that are reduced in this way, see `Shown.image`; None: all.

        Raises:
            BadBudget: naming what does not fit.
        """

    def reduces(self, stage: Stage, shown: Shown) -> bool:
        """Whether it takes part in this stage of a call; if not, its argument is not computed."""
        return getattr(type(self), stage) is not getattr(Reducer, stage)

    def before_encoder(self, pixels: Pixels) -> tuple[Tensor, TokenMap] | None:
        """Other pixels, of the same pictures, and a map [pictures, patches] to the patches (units) that enter the
        encoder, row after row.

        Every patch is of a group; -1 stands past a picture's last patch alone. Where the pixels make as many patches as
        before, the first one of each group enters, as heavy as the group.
        Where they make fewer, those are the groups, and the encoder sees a smaller picture as it would any.
        """
        return None

    def in_layer(self, candidates: Candidates) -> Tensor | SomeMerge | None:
        """int64 [rows, A], the partner (an index within B) that each A token merges into, -1: it stays, or the row has
        no such token. None: the layer merges nothing."""
        return None

    def after_encoder(self, tokens: Tokens) -> Reduced | None:
        """Reduce the tokens that the last layer gave. None: not at all."""
        return None

    def in_prompt(self, tokens: Tokens) -> Reduced | None:
        """Reduce tokens where they stand in the prompt. None: not at all."""
        return None
