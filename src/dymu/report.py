"""What merged in the last call: counts, bytes, maps and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dymu.item import Item, View
from dymu.media.contact_sheet import contact_sheet
from dymu.media.drawing import arranged, blended, draw, draw_seen
from dymu.merging.dense import Filling, dense
from dymu.token_map import TokenMap


@dataclass(repr=False)
class Report:
    """What merged in one call of the model. Its items are the images in the order of the prompts, then the videos.

    Attributes:
        items: the tokens of each in the prompt.
        cache_bytes: bytes of the KV cache after the last forward.
        cache_bytes_full: bytes that the untouched model's cache would have.
        drift: what all images since the budget was set kept, over what those of calibration kept, on average; None: the
            budget says nothing of images like these, as with a focus, or no image was shown.
        ran: for each prompt, where tokens are pruned within the language model, how many of its image tokens each layer
            ran.
    """

    items: list[Item] = field(default_factory=list)
    cache_bytes: int = 0
    cache_bytes_full: int = 0
    drift: float | None = None
    ran: list[list[int]] = field(default_factory=list)

    def __repr__(self) -> str:
        counts = [f"{kept} of {original}" for kept, original in zip(self.kept, self.original, strict=True)]
        what = f"kept {', '.join(counts)} tokens" if counts else "nothing shown"
        return f"<dymu report: {what}; KV cache {self.cache_bytes:,} of {self.cache_bytes_full:,} bytes>"

    def _repr_png_(self) -> bytes | None:
        """What notebooks show: every item with its groups outlined, as coarse as the encoder saw it."""
        if not self.items:
            return None
        try:
            drawn = [_drawn(None, _labelled([item])[-1]) for item in self.items]
        except ValueError:  # its tokens are no grid
            return None
        labels = [f"{kept} of {original}" for kept, original in zip(self.kept, self.original, strict=True)]
        png = io.BytesIO()
        contact_sheet(drawn, labels=labels).save(png, "PNG")
        return png.getvalue()

    @property
    def original(self) -> list[int]:
        """Tokens of each item that the language model expects."""
        return [len(item.leaders) for item in self.items]

    @property
    def kept(self) -> list[int]:
        """Merged tokens of each item."""
        return [item.kept for item in self.items]

    @property
    def layers(self) -> list[list[int]]:
        """After each encoder layer that may merge, the tokens left of each item."""
        return [list(kept) for kept in zip(*(item.kept_by_layer.sum(1).tolist() for item in self.items), strict=True)]

    @property
    def cache_bytes_saved(self) -> int:
        """Bytes of KV cache that merging saves."""
        return self.cache_bytes_full - self.cache_bytes

    @property
    def map(self) -> TokenMap:
        """From the tokens of each item to its merged ones: `average` makes merged tokens [B, M, C] of features
        [B, N, C], and `expand` features of those."""
        return TokenMap.from_leaders(pad_sequence([item.leaders for item in self.items], True, -1))

    def dense(self, features: Tensor, i: int | None = None, *, filling: Filling = "copy") -> Tensor:
        """Features of all items [B, N, C], or of item i [N, C], on the grid of the picture: [B, rows, columns, C], or
        [rows, columns, C].

        Args:
            features: of patches alone, without class token and registers; of merged tokens, `map.expand` makes them.
            filling: `copy`: each place has the features of its group. `bilinear`: see `dymu.merging.dense.Filling`.

        Raises:
            IndexError: the call had no item i.
            ValueError: there are more features or fewer than patches, an item is no grid of patches, or the grids of
                several items differ.
        """
        if i is None:
            of_items = [self.dense(part, number, filling=filling) for number, part in enumerate(features)]
            if len(features) != len(self.items) or len({part.shape for part in of_items}) != 1:
                raise ValueError(
                    f"features of {len(features)} items do not fill grids of one size; the last call had "
                    f"{len(self.items)} items: ask for one after the other by its number i"
                )
            return torch.stack(of_items)
        item = self._item(i)
        if len(item.grids) > 1 or bool((item.grids[0] < 0).any()) or item.grids[0].numel() != len(features):
            raise ValueError(
                f"item {i} of the last call has {len(item.leaders)} tokens and {len(item.grids)} grids of patches, and "
                f"there are {len(features)} features: give those of one grid, without class token and registers"
            )
        grid = item.grids[0].to(features.device)
        return dense(features[grid], item.group.to(features.device)[grid], filling)

    def group(self, i: int = 0) -> Tensor:
        """int64 [N]: for item i, the merged token behind every token the language model expects.

        Raises:
            IndexError: the call had no item i.
        """
        return self._item(i).group

    def draw(self, image: Image.Image | Sequence[Image.Image], i: int | slice = 0, *, view: int = -1) -> Image.Image:
        """Item i with every group of merged patches outlined and filled with its mean colour.

        Args:
            image: the image that was item i of the last call, of any mode and size; of a video its frames, which are
                drawn on a contact sheet.
            i: the item, or all that show one image, where each of its tiles is an item.
            view: of an image that was cut into tiles, -1 draws the tiles put together, 0 the whole image that the
                model sees beside them.

        Returns:
            An RGB picture, see `dymu.media.drawing.draw`. A patch that stands for itself keeps its pixels; what the
            encoder did not see of the image is dimmed.

        Raises:
            IndexError: the call had no item i, or it no such view.
            BadImage: `image` cannot be used at all.
            ValueError: `image` is another image or not as many frames, or the call's image tokens are no grid.
        """
        items = self._items(i)
        if any(item.video for item in items):
            (item,) = items
            drawn = self.draw_frames([image] if isinstance(image, Image.Image) else image, self.items.index(item))
            return contact_sheet(drawn, labels=[f"{fresh} new" for fresh in item.fresh])
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"item {i} of the last call is an image: give it as a PIL image, not a {type(image).__name__}"
            )
        return _drawn(image, self.groups(image, i, view=view))

    def groups(self, image: Image.Image, i: int | slice = 0, *, view: int = -1) -> View:
        """What `draw` draws of an image: a view with the number of a group in place of each token.

        Groups are counted from 0, over the items one after the other.
        """
        items = self._items(i)
        views = _labelled(items)
        if len(views) > 1 and items[0].apart:
            views = _together(image, views)
        if not -len(views) <= view < len(views):
            raise IndexError(f"image {i} has {len(views)} views, so there is no view {view}")
        return views[view]

    def _items(self, i: int | slice) -> list[Item]:
        items = self.items[i] if isinstance(i, slice) else [self._item(i)]
        if not items:
            raise IndexError(f"the last call had {len(self.items)} items, and none of those asked for")
        return items

    def draw_frames(self, frames: Sequence[Image.Image], i: int = 0) -> list[Image.Image]:
        """The frames of item i, a video, drawn like images; patches whose token stood in a frame before are dimmed.

        Raises:
            IndexError, BadImage, ValueError: see `draw`.
        """
        item = self._item(i)
        if not item.video:
            raise ValueError(f"item {i} of the last call is no video")
        each = -(-len(frames) // item.pictures)  # what the encoder sees at once may be several frames
        shown = [frames[start : start + each] for start in range(0, len(frames), max(each, 1))]
        if len(shown) != item.pictures:
            raise ValueError(
                f"the model saw {item.pictures} frames of this video, and not {len(frames)}: give those it saw"
            )
        first = torch.where(item.leaders < 0, -1, item.picture[item.leaders.clamp(min=0)])
        group = torch.where(first < item.picture, -1, item.group)
        views = [replace(view, token=_taken(group, view.token)) for view in item.views]
        return [_drawn(blended(together), view) for together, view in zip(shown, views, strict=True)]

    def _item(self, i: int) -> Item:
        if not -len(self.items) <= i < len(self.items):
            what = "item" if any(item.video for item in self.items) else "image"
            raise IndexError(f"the last call had {len(self.items)} {what}s, so there is no {what} {i}")
        return self.items[i]


def _taken(group: Tensor, token: Tensor) -> Tensor:
    """The group of each token; -1 where there is none."""
    return torch.where(token < 0, -1, group[token.clamp(min=0)])


def _labelled(items: Sequence[Item]) -> list[View]:
    """The views of all items, with the number of a merged token, among those of all, in place of each token's."""
    views, before = list[View](), 0
    for item in items:
        group = torch.where(item.group < 0, -1, item.group + before)
        views += [replace(view, token=_taken(group, view.token)) for view in item.views]
        before += item.kept
    return views


def _together(image: Image.Image, views: Sequence[View]) -> list[View]:
    """The whole image, if it is among some tiles of an image, and the tiles put together."""
    whole, rows = arranged(image, [view.seen.float().cpu().numpy() for view in views])
    tiles = [view for number, view in enumerate(views) if number != whole]
    columns = len(tiles) // rows

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.cat(list(parts[row * columns :][:columns]), 1) for row in range(rows)])

    together = View(joined([tile.token for tile in tiles]), joined([tile.seen for tile in tiles]))
    return [*([] if whole is None else [views[whole]]), together]


def _drawn(image: Image.Image | None, view: View) -> Image.Image:
    """One view, see `_labelled`, on the image or else on what the encoder saw."""
    group, seen = view.token.cpu().numpy(), view.seen.float().cpu().numpy()
    return draw_seen(group, seen) if image is None else draw(image, group, seen, view.covered)
