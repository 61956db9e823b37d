"""The KV cache of merged, un-rotated tokens: it says the length of the full prompt and stores the merged one."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from dymu.errors import UnsupportedCache
from dymu.token_map import TokenMap


class History:
    """What the entries of one cache stand for; shared by its layers.

    Attributes:
        slot: int64 [B, N], the cache entry behind each token of the full prompt so far; -1 for padding.
        position: int64 [B, N], the rotary position of each of them.
        entries: entries stored per row (the widest row's).
        plain: whether every entry so far is one token in its place, none merged and none missing.
        padded: whether some row misses tokens.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.slot: Tensor | None = None
        self.position: Tensor | None = None
        self.entries = 0
        self.plain, self.padded = True, False

    @property
    def length(self) -> int:
        """Tokens of the full prompt so far."""
        return 0 if self.slot is None else self.slot.shape[1]

    def append(self, tokens: TokenMap, position: Tensor, plain: bool) -> None:
        """Add tokens of the full prompt whose merged forms are about to be stored after the present entries."""
        slot = tokens.group + self.entries
        if tokens.padded:
            slot = torch.where(tokens.group < 0, -1, slot)
        if self.slot is not None and self.position is not None:
            slot, position = (
                torch.cat((self.slot, slot), 1),
                torch.cat((self.position, position), 1),
            )
        self.slot, self.position, self.entries = slot, position, self.entries + tokens.width
        self.plain, self.padded = self.plain and plain, self.padded or tokens.padded

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.slot is not None and self.position is not None:
            rows = rows.to(self.slot.device)
            self.slot, self.position = self.slot[rows], self.position[rows]

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens, and the entries that only they needed."""
        if self.slot is not None and self.position is not None and length < self.length:
            self.slot, self.position = self.slot[:, :length], self.position[:, :length]
            self.entries = int(self.slot.max()) + 1 if self.slot.numel() else 0


class MergedLayer(DynamicLayer):
    """One layer of the cache: keys and values [B, H, entries, D] as projected, before rotation.

    Args:
        history: shared by all layers of the cache.
        leads: whether this layer keeps `history` up to date when rows or tokens are dropped (one layer does).
    """

    keys: Tensor
    values: Tensor

    def __init__(self, history: History, leads: bool) -> None:
        super().__init__()
        self.history, self.leads = history, leads

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        stored = self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0
        if stored + key_states.shape[-2] != self.history.entries:
            raise UnsupportedCache(
                "this KV cache stores merged tokens, which the model cannot read while DyMU is removed or disabled; "
                "start with a new cache or apply DyMU again."
            )
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def get_seq_length(self) -> int:
        return self.history.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.history.length + query_length, 0

    def reset(self) -> None:
        self.is_initialized = False
        self.keys = self.values = torch.tensor([])
        self.history.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.leads:
            self.history.select(indices)
        if self.is_initialized:
            rows = indices.to(self.keys.device)
            self.keys, self.values = self.keys[rows], self.values[rows]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove that many tokens of the full prompt from the end (before transformers 5.18, a positive number is the
        length to keep)."""
        if self.leads:
            keep = tokens_to_remove if tokens_to_remove > 0 else self.history.length + tokens_to_remove
            self.history.crop(max(keep, 0))
        if self.is_initialized:
            self.keys = self.keys[..., : self.history.entries, :]
            self.values = self.values[..., : self.history.entries, :]


def adopt(cache: Cache) -> History:
    """Make an empty stock `DynamicCache` store merged tokens; a cache adopted before keeps its history.

    Raises:
        UnsupportedCache: another kind of cache, or one that was filled without DyMU.
    """
    if cache.layers and isinstance(cache.layers[0], MergedLayer):
        return cache.layers[0].history
    if type(cache) is not DynamicCache or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise UnsupportedCache(
            f"DyMU stores merged tokens in a DynamicCache, not in a {type(cache).__name__}; "
            "leave cache_implementation and past_key_values unset."
        )
    if cache.get_seq_length():
        raise UnsupportedCache(
            "this KV cache was filled without DyMU and holds rotated keys of all tokens; start with a new cache."
        )
    history = History()
    if cache.layer_class_to_replicate is None:
        cache.layers = [MergedLayer(history, leads=index == 0) for index in range(len(cache.layers))]
    else:
        cache.layers.append(MergedLayer(history, leads=True))
        cache.layer_class_to_replicate = lambda: MergedLayer(history, leads=False)
    return history


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that the cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
