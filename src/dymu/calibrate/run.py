"""All sample images on their way through the encoder, layer by layer, and into the prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dymu.calibrate.edges import NEVER, threshold_for
from dymu.calibrate.rounds import ROUNDS, Shelved, rounds
from dymu.calibrate.samples import Inputs, hollow, spans
from dymu.errors import BadBudget, DymuError
from dymu.families import Parts
from dymu.merging import MergedTokens, above, merge_step
from dymu.placed import Placed
from dymu.placement import features_of, grid, place
from dymu.settling import Standing
from dymu.shelf import Place, Shelf
from dymu.thresholds import Calibrated
from dymu.token_map import TokenMap


@dataclass(frozen=True)
class Layout:
    """How the sample images lie in the prompt.

    Attributes:
        tokens: patches of one picture.
        counts: patches of every image, as the language model gets them.
        plain: whether every image is one picture.
        mixes: whether some images are shrunk, see `dymu.placed.Placed.mixes`.
        videos: whether the family takes videos that can be followed.
    """

    tokens: int
    counts: list[int]
    plain: bool
    mixes: bool
    videos: bool

    @property
    def full(self) -> float:
        """Tokens of an untouched image, on average."""
        return self.tokens if self.plain else sum(self.counts) / len(self.counts)

    def targets(self, budgets: Sequence[int | float]) -> list[int | float]:
        """The budgets in tokens, each once, smallest first.

        Raises:
            BadBudget: one is more than there are.
        """
        targets = {
            min(round(budget * self.full), self.full) if isinstance(budget, float) and 0 < budget <= 1 else budget
            for budget in budgets
        }
        if not self.plain and max(targets) > self.full:
            raise BadBudget(
                f"cannot keep {max(targets):g} tokens of images that have {self.full:.1f} on average; take fewer."
            )
        return sorted(targets)

    def per_picture(self, target: float) -> float:
        """Of `target` tokens of an image, those of one picture."""
        return target if self.plain else self.tokens * target / self.full

    def untouched(self, depth: int) -> Calibrated:
        """What keeps every token."""
        never = (NEVER,) * ROUNDS
        return summed_up(self.full, (NEVER,) * depth, self.counts, never * self.mixes, never * self.videos)


def summed_up(
    target: float,
    thresholds: Sequence[float],
    kept: Sequence[int],
    images: tuple[float, ...],
    frames: tuple[float, ...],
) -> Calibrated:
    counts = torch.tensor(kept)
    return Calibrated(
        budget=target,
        thresholds=tuple(thresholds),
        achieved=int(counts.sum()) / len(kept),
        sd=counts.double().std(correction=0).item(),
        min=int(counts.min()),
        max=int(counts.max()),
        images=images,
        frames=frames,
    )


@dataclass(frozen=True)
class Batch:
    """The pictures of some images between the attention of a layer and its merging."""

    images: list[Inputs]
    place: Place
    """Holds their tokens, in the state's layout."""
    state: MergedTokens
    similarity: Tensor
    """[B, A] of each A token to its best partner, -inf where a row has no such token; see `best_partner`. [B, 0] where
    the layer does not merge."""
    partner: Tensor


class Run:
    """All images on their way through the encoder, layer by layer, by the arithmetic of inference."""

    def __init__(self, parts: Parts, merging: Collection[int], prefix: int) -> None:
        self._parts, self._merging, self._prefix = parts, merging, prefix
        self._layers = parts.encoder_layers[: max(parts.feature_layers())]

    def begin(self, embedded: Tensor, images: list[Inputs], place: Place) -> Batch:
        """The embedded pictures [B, T, C] of some images, through the first attention."""
        return self._attend(0, embedded, MergedTokens.unmerged(embedded), images, place)

    def thresholds(
        self,
        removed: Sequence[float],
        batches: Sequence[Batch],
        places: Sequence[Place],
        advance: Callable[[], object],
    ) -> tuple[list[float], Sequence[Batch]]:
        """Find the thresholds at which layer l removes `removed[l]` tokens per picture, and run the pictures through.

        Args:
            removed: one number per layer.
            batches: from `begin`; not changed, but for the places they share with `places`.
            places: where each batch may keep its tokens from here on.
            advance: called when a batch has gone through a layer.

        Returns:
            The thresholds, and the batches ahead of the last merging.
        """
        pictures = sum(batch.state.map.batch for batch in batches)
        thresholds: list[float] = []
        wanted, merged = 0.0, 0
        for index, removed_here in enumerate(removed):
            wanted += pictures * removed_here  # what earlier layers could not remove is still among it
            edges = torch.cat([batch.similarity.flatten() for batch in batches])
            threshold, count = threshold_for(edges[edges.isfinite()], round(wanted) - merged)
            thresholds.append(threshold)
            merged += count
            if index + 1 < len(removed):
                onward = []
                for batch, place in zip(batches, places, strict=True):
                    onward.append(self._next(index, batch, threshold, place))
                    advance()
                batches = onward
        return thresholds, batches

    def kept(self, batches: Sequence[Batch], threshold: float) -> list[int]:
        """Tokens of each image as it stands in the prompt, after the last merging.

        Args:
            batches, threshold: from `thresholds`, the last of them.
        """
        placed = (self.placed(batch, self._final_map(batch, threshold)) for batch in batches)
        return [item.budgeted for items in placed for item in items]

    def settled(
        self, target: float, batches: Sequence[Batch], threshold: float, layout: Layout, shelf: Shelf
    ) -> tuple[tuple[float, ...], list[int], tuple[float, ...]]:
        """The rounds that settle images in the prompt, what they leave of each, and the rounds of the frames of videos.

        Args:
            target: tokens of an image to leave on average.
            batches, threshold: see `kept`.
            shelf: for what stands in the prompt.
        """
        images, kept, videos, patches = list[Shelved](), list[int](), list[Shelved](), 0
        for batch in batches:
            tokens, hidden = self._final_map(batch, threshold), self._hidden(batch, threshold)
            placed = self.placed(batch, tokens)
            kept += [item.budgeted for item in placed]
            if layout.mixes:
                of_images = self._features(batch, tokens, hidden)
                pairs = zip(placed, of_images, strict=True)
                images += [Shelved.put(Standing.of([item], [features]), shelf) for item, features in pairs]
            if layout.videos:
                # The whole image, which comes first, is what the family would see of a frame.
                first = torch.tensor([start for start, _ in spans(batch.images)], device=hidden.device)
                whole = TokenMap(tokens.group[first], tokens.kept[first], tokens.width)
                given = (hollow(len(batch.images), 1, 3, *batch.images[0].size),)
                frames = place(self._parts, "video", given, {}, whole, self._unseen(batch.images[0], len(first), whole))
                features = features_of(self._parts, "video", given, {}, whole, hidden[first])
                videos.append(Shelved.put(Standing.of(frames, list(features)), shelf))
                patches += sum(int(item.patch.sum()) for item in frames)
        for_images: tuple[float, ...] = ()
        if layout.mixes:
            for_images, images = rounds(images, round(target * len(kept)))
            kept = [image.standing.state.layout.total for image in images]
        for_frames = rounds(videos, round(target / layout.full * patches))[0] if layout.videos else ()
        return for_images, kept, for_frames

    def layout(self, batches: Sequence[Batch]) -> Layout:
        """How the images of unmerged batches lie in the prompt."""
        items = [item for batch in batches for item in self.placed(batch, batch.state.map)]
        tokens = batches[0].state.map.tokens - self._prefix
        counts = [item.budgeted for item in items]
        plain = all(item.pictures == 1 and count == tokens for item, count in zip(items, counts, strict=True))
        parts = self._parts
        mixes = any(item.mixes for item in items)
        videos = "video" in parts.placeholders and not parts.pools_with_weights
        if (mixes or videos) and len(parts.feature_layers()) > 1:
            raise DymuError(
                "this model reads features of several encoder layers and makes means over neighbouring tokens, which "
                "calibration does not know yet; set vision_feature_layer to one layer."
            )
        return Layout(tokens, counts, plain, mixes, videos)

    def placed(self, batch: Batch, tokens: TokenMap) -> list[Placed]:
        """How the images lie in the prompt, once `tokens` of their pictures were merged."""
        items = []
        for image, (start, end) in zip(batch.images, spans(batch.images), strict=True):
            own = TokenMap(tokens.group[start:end], tokens.kept[start:end], tokens.width)
            items += place(self._parts, "image", (), image.given, own, self._unseen(image, image.pictures, own))
        return items

    def _unseen(self, image: Inputs, pictures: int, tokens: TokenMap) -> Tensor:
        """Colours of pictures that nobody will look at, [pictures, 3, rows, columns]."""
        rows, columns = grid(tokens.tokens - self._parts.prefix, *image.size)
        return torch.zeros(pictures, 3, rows, columns, device=tokens.group.device)

    def _features(self, batch: Batch, tokens: TokenMap, hidden: Tensor) -> Iterator[Tensor]:
        """The features [N, C] of each image, of its pictures' merged tokens [B, M, C]."""
        for image, (start, end) in zip(batch.images, spans(batch.images), strict=True):
            own = TokenMap(tokens.group[start:end], tokens.kept[start:end], tokens.width)
            yield from features_of(self._parts, "image", (), image.given, own, hidden[start:end])

    def _final_map(self, batch: Batch, threshold: float) -> TokenMap:
        """Encoder tokens of each picture to those left after the last layer."""
        if threshold > 1:
            return batch.state.map
        step, _ = merge_step(above(threshold, batch.similarity, batch.partner), batch.state.layout, self._prefix)
        return replace(batch.state.map.then(step), padded=False)

    def _hidden(self, batch: Batch, threshold: float) -> Tensor:
        """[B, M, C], the tokens left after the last layer."""
        x, state = self._merged(batch, threshold)
        return state.layout.pad(self._layers[-1].feed_forward(x))

    def _merged(self, batch: Batch, threshold: float) -> tuple[Tensor, MergedTokens]:
        x, state = batch.place.get().to(batch.similarity.device), batch.state
        if threshold <= 1:
            x, state = state.merge(x, above(threshold, batch.similarity, batch.partner), self._prefix)
        return x, state

    def _next(self, index: int, batch: Batch, threshold: float, place: Place) -> Batch:
        """Merge, finish layer `index` and go through the next one's attention."""
        x, state = self._merged(batch, threshold)
        return self._attend(index + 1, self._layers[index].feed_forward(x), state, batch.images, place)

    def _attend(self, index: int, x: Tensor, state: MergedTokens, images: list[Inputs], place: Place) -> Batch:
        x, keys = self._layers[index].attend(x, state)
        if index in self._merging:
            similarity, partner = state.match(keys, self._prefix)
        else:
            similarity, partner = keys.new_empty(state.map.batch, 0), state.layout.length.new_empty(state.map.batch, 0)
        place.put(x)
        return Batch(images, place, state, similarity, partner)
