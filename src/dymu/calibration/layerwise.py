"""All sample images on their way through the encoder, layer by layer, and into the prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dymu.calibration.in_prompt import Waiting, joined, rounds
from dymu.calibration.quantile import NEVER, Together, threshold_for
from dymu.calibration.samples import Embedded, Inputs, shape_only
from dymu.calibration.spill import Slot, Spill
from dymu.errors import BadBudget, DymuError
from dymu.families.encoders import LoneEncoder
from dymu.families.resolve import Parts
from dymu.hooks import encoder
from dymu.hooks.trace import features_of, trace
from dymu.item import Item
from dymu.merging import ROUNDS, MergedTokens, Pictures, above
from dymu.reducers import picture_tokens
from dymu.thresholds import Calibrated, Dial
from dymu.token_map import TokenMap

STEPS = 8
"""Of the dial from one budget to the next: of the default ones two neighbours are 3 % apart, and what is between them
stays between them."""


@dataclass(frozen=True)
class Sizes:
    """How many tokens the sample images have.

    Attributes:
        tokens: those of one picture of the encoder, on average.
        counts: those of every image, as the language model gets them.
        plain: whether every image is one picture, of which it gets every token.
        mixes: whether some images are shrunk, see `dymu.item.Item.mixes`.
        videos: whether the frames of videos are shrunk, in a way that can be followed.
    """

    tokens: float
    counts: list[int]
    plain: bool
    mixes: bool
    videos: bool

    @property
    def alike(self) -> bool:
        """Whether every image is one picture and all have as many tokens."""
        return self.plain and len(set(self.counts)) == 1

    @property
    def full(self) -> float:
        """Tokens of an untouched image, on average."""
        return sum(self.counts) / len(self.counts)

    def targets(self, budgets: Sequence[int | float]) -> list[int | float]:
        """The budgets in tokens, each once, smallest first.

        Raises:
            BadBudget: one is more than there are.
        """
        targets = {
            budget
            if not isinstance(budget, float) or not 0 < budget <= 1
            else self.full
            if budget == 1
            else min(round(budget * self.full), self.full)
            for budget in budgets
        }
        if not self.alike and max(targets) > self.full:
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
    counts = torch.tensor(kept, device="cpu")
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
    """The pictures of some images between the attention of a layer and its merging.

    Attributes:
        layer: its index.
        images: what they were made of.
        windowed: for each layer that may merge, whether tokens attend and merge within windows.
        slots: hold the patches, as they travel, and where the encoder rotates the cosines and sines of their angles.
        state: without these.
        similarity: [rows, A] of each A token to its best partner, -inf where a row has no such token; see
            `best_partner`. A row is a picture, or a window of one. [B, 0] where the layer does not merge.
        partner: likewise.
    """

    layer: int
    images: list[Inputs]
    windowed: tuple[bool, ...]
    slots: tuple[Slot, ...]
    state: MergedTokens
    similarity: Tensor
    partner: Tensor

    def get(self) -> tuple[Tensor, MergedTokens]:
        """The patches, and the state with their angles."""
        x, *angles = (slot.get().to(self.similarity.device) for slot in self.slots)
        return x, replace(self.state, angles=(angles[0], angles[1]) if angles else None)


def _by_image(batch: Batch, tokens: TokenMap) -> Iterator[tuple[Inputs, slice, TokenMap]]:
    """For each image: its inputs, which of the batch's pictures are its own, and their part of `tokens`."""
    end = 0
    for image in batch.images:
        start, end = end, end + len(image.pictures.grids)
        longest = image.pictures.layout(tokens.kept.device).longest
        group = tokens.group[start:end, :longest]
        yield image, slice(start, end), TokenMap(group, tokens.kept[start:end], tokens.width, tokens.padded)


def _budgeted(items: Sequence[Item]) -> int:
    """Tokens of an image that a budget counts."""
    return sum(item.budgeted for item in items)


class Run:
    """A worker's images on their way through the encoder, layer by layer, by the arithmetic of inference."""

    def __init__(self, parts: Parts | LoneEncoder, merging: Collection[int], prefix: int, together: Together) -> None:
        self._parts, self._merging, self._prefix, self._together = parts, merging, prefix, together
        self._layers = parts.encoder_layers[: max(parts.feature_layers())]

    def begin(self, embedded: Embedded, room: Spill) -> Batch:
        """Some images, through the first attention."""
        x, state = embedded.pictures.enter(embedded.x, embedded.angles, embedded.window)
        slots = tuple(room.slot(part.nbytes) for part in (x, *(state.angles or ())))
        return self._attend(0, x, state, embedded.images, embedded.windowed, slots)

    def thresholds(
        self,
        removed: Sequence[float],
        batches: Sequence[Batch],
        slots: Sequence[tuple[Slot, ...]],
        advance: Callable[[], object],
    ) -> tuple[list[float], Sequence[Batch]]:
        """Find the thresholds at which layer l removes `removed[l]` tokens per picture, and run the pictures through.

        Args:
            removed: one number per layer; where pictures differ, of one of mean size.
            batches: from `begin`; not changed, but for the slots they share with `slots`.
            slots: where each batch may keep its tokens from here on.
            advance: called when a batch has gone through a layer.

        Returns:
            The thresholds, and the batches ahead of the last merging.
        """
        pictures = self._total(batch.state.map.batch for batch in batches)
        thresholds: list[float] = []
        due, merged = 0.0, 0
        for index, removed_here in enumerate(removed):
            due += pictures * removed_here  # what earlier layers could not remove is still among it
            edges = joined([batch.similarity.flatten() for batch in batches])
            threshold, count = NEVER, 0
            if removed_here > 1e-9:  # of a token; all are to stay
                threshold, count = threshold_for(edges[edges.isfinite()], round(due) - merged, self._together)
            thresholds.append(threshold)
            merged += count
            if index + 1 < len(removed):
                onward = []
                for batch, slot in zip(batches, slots, strict=True):
                    onward.append(self._next(batch, threshold, slot))
                    advance()
                batches = onward
        return thresholds, batches

    def kept(self, batches: Sequence[Batch], threshold: float, sizes: Sizes) -> list[int]:
        """Tokens of each image of all workers as it stands in the prompt, after the last merging.

        Args:
            batches, threshold: from `thresholds`, the last of them.
        """
        if sizes.plain:
            merged = [self._merged(batch, threshold)[1].layout.lengths for batch in batches]
            return self._together.gather([length - self._prefix for lengths in merged for length in lengths])
        traced = (self.items(batch, self._merged(batch, threshold)[1].map) for batch in batches)
        return self._together.gather([_budgeted(items) for of_images in traced for items in of_images])

    def dial(self, batches: Sequence[Batch], entry: Calibrated, lowest: float, sizes: Sizes) -> tuple[Dial, ...]:
        """Budgets of the entry down to the lowest at which only the last layer merges more, as far as it can.

        Args:
            batches: ahead of the last merging, see `thresholds`.
        """
        assert entry.achieved is not None
        edges = joined([batch.similarity.flatten() for batch in batches])
        edges = edges[edges.isfinite()]
        there, merging = (self._total([count]) for count in (len(edges), int((edges > entry.thresholds[-1]).sum())))
        dials, before = list[Dial](), entry.achieved
        for step in range(1, STEPS + 1):
            budget = entry.achieved * (lowest / entry.achieved) ** (step / STEPS)
            count = merging + math.ceil((entry.achieved - budget) * len(sizes.counts) - 1e-6)
            if count > there:
                break
            threshold, count = threshold_for(edges, count, self._together)
            kept = entry.achieved - (count - merging) / len(sizes.counts)
            if not sizes.plain:
                kept = sum(counts := self.kept(batches, threshold, sizes)) / len(counts)
            if kept < before:
                dials.append(Dial(kept, threshold))
                before = kept
        return tuple(dials)

    def _total(self, numbers: Iterable[int]) -> int:
        """The sum over all workers."""
        return int(self._together.sum(torch.tensor([sum(numbers)], device="cpu"))[0])

    def in_prompt(
        self, target: float, batches: Sequence[Batch], threshold: float, sizes: Sizes, spill: Spill
    ) -> tuple[tuple[float, ...], list[int], tuple[float, ...]]:
        """The rounds that merge images in the prompt, what they leave of each, and the rounds of the frames of videos.

        Args:
            target: tokens of an image to leave on average.
            batches, threshold: see `kept`.
            spill: for what stands in the prompt.
        """
        assert isinstance(self._parts, Parts)
        images, kept, videos, patches = list[Waiting](), list[int](), list[Waiting](), 0
        for batch in batches:
            x, state = self._merged(batch, threshold)
            tokens, hidden = state.map, state.layout.pad(self._layers[-1].feed_forward(x))
            items = self.items(batch, tokens)
            kept += map(_budgeted, items)
            by_image = list(_by_image(batch, tokens))
            if sizes.mixes:
                for (image, pictures, merged), of_image in zip(by_image, items, strict=True):
                    features = features_of(
                        self._parts, "image", (), image.kwargs, image.pictures, merged, hidden[pictures]
                    )
                    images.append(Waiting.put(picture_tokens(of_image, list(features)), spill))
            if sizes.videos:
                # The whole image, which comes first, is what the family would see of a frame.
                first = [pictures.start for _, pictures, _ in by_image]
                whole = TokenMap(tokens.group[first], tokens.kept[first], tokens.width)
                args = (shape_only(len(first), 1, *batch.images[0].kwargs["pixel_values"].shape[-3:]),)
                one = batch.images[0].pictures
                shown = replace(one, grids=one.grids[:1] * len(first))
                frames = trace(self._parts, "video", args, {}, shown, whole, self._colourless(shown))
                features = features_of(self._parts, "video", args, {}, shown, whole, hidden[first])
                videos.append(Waiting.put(picture_tokens(frames, list(features)), spill))
                patches += sum(int(item.patch.sum()) for item in frames)
        for_images: tuple[float, ...] = ()
        if sizes.mixes:
            for_images, images = rounds(images, round(target * len(sizes.counts)), self._together)
            kept = [image.tokens.state.layout.total for image in images]
        for_frames: tuple[float, ...] = ()
        if sizes.videos:
            for_frames, _ = rounds(videos, round(target / sizes.full * self._total([patches])), self._together)
        return for_images, self._together.gather(kept), for_frames

    def sizes(self, batches: Sequence[Batch], together: Together) -> Sizes:
        """How many tokens the images of unmerged batches have, of all these workers."""
        items = [of_image for batch in batches for of_image in self.items(batch, batch.state.map)]
        lengths = [length - self._prefix for batch in batches for length in batch.state.layout.lengths]
        counts = [_budgeted(of_image) for of_image in items]
        lengths, counts = together.gather(lengths), together.gather(counts)
        plain = lengths == counts
        parts = self._parts
        mixes = any(together.gather([any(item.mixes for of_image in items for item in of_image)]))
        # Where a video says how many patches its frames have, the family shrinks none.
        videos = isinstance(parts, Parts) and "video" in parts.placeholders and parts.family.grid is None
        videos = videos and not parts.pools_with_weights  # type: ignore[union-attr]
        if (mixes or videos) and len(parts.feature_layers()) > 1:
            raise DymuError(
                "this model reads features of several encoder layers and makes means over neighbouring tokens, which "
                "calibration does not know yet; set vision_feature_layer to one layer."
            )
        return Sizes(sum(lengths) / len(lengths), counts, plain, mixes, videos)

    def items(self, batch: Batch, tokens: TokenMap) -> list[list[Item]]:
        """How each image lies in the prompt, once `tokens` of its pictures were merged. Its tiles may be items each."""
        items = list[list[Item]]()
        for image, _, merged in _by_image(batch, tokens):
            colours = self._colourless(image.pictures)
            if isinstance(self._parts, LoneEncoder):
                items.append(encoder.items_of(image.pictures, merged, colours))
            else:
                items.append(trace(self._parts, "image", (), image.kwargs, image.pictures, merged, colours))
        return items

    def _colourless(self, pictures: Pictures) -> list[Tensor]:
        """float [3, rows, columns] of 0 for each picture: the colours of patches, which only a drawing needs."""
        device = next(self._parts.tower.parameters()).device
        return [torch.zeros(3, *grid, dtype=torch.float32, device=device) for grid in pictures.unit_grids]

    def _merged(self, batch: Batch, threshold: float) -> tuple[Tensor, MergedTokens]:
        x, state = batch.get()
        if threshold <= 1:
            into = above(threshold, batch.similarity, batch.partner)
            x, state = state.merge(x, into, self._prefix, batch.windowed[batch.layer])
        return x, state

    def _next(self, batch: Batch, threshold: float, slots: tuple[Slot, ...]) -> Batch:
        """Merge, finish the layer and go through the next one's attention."""
        x, state = self._merged(batch, threshold)
        x = self._layers[batch.layer].feed_forward(x)
        return self._attend(batch.layer + 1, x, state, batch.images, batch.windowed, slots)

    def _attend(
        self,
        index: int,
        x: Tensor,
        state: MergedTokens,
        images: list[Inputs],
        windowed: tuple[bool, ...],
        slots: tuple[Slot, ...],
    ) -> Batch:
        x, keys = self._layers[index].attend(x, state, windowed[index])
        if index in self._merging:
            similarity, partner = state.match(keys, self._prefix, windowed[index])
        else:
            similarity, partner = keys.new_empty(state.map.batch, 0), state.layout.length.new_empty(state.map.batch, 0)
        for slot, part in zip(slots, (x, *(state.angles or ())), strict=True):
            slot.put(part)
        return Batch(index, images, windowed, slots, replace(state, angles=None), similarity, partner)
