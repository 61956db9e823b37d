"""The KV cache: it says the length of the full prompt, and stores merged tokens."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from dymu.choices import CacheForm
from dymu.errors import UnsupportedCache
from dymu.hooks.versions import EMPTY_LAYERS
from dymu.unmerging import History
from dymu.unmerging.history import ROOM


class Room:
    """Memory in which keys or values grow without a copy of all of them for each token: it has room for `ROOM` entries
    ahead. With gradients, and where something else stores them in another dtype, they are copied. Other keys may stand
    ahead of them in one piece with them."""

    def __init__(self) -> None:
        self._whole: Tensor | None = None
        self._memory: Tensor | None = None
        self._written = 0

    def after(self, before: Tensor, new: Tensor) -> Tensor:
        """[B, H, entries, D]: what came before, [B, H, any, D] or of no size, followed by what is new."""
        stored = before.shape[-2] if before.numel() else 0
        cast = stored and before.dtype != new.dtype
        if cast or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.cat((before, new), -2)
        entries, memory = stored + new.shape[-2], self._memory
        if memory is None or entries > memory.shape[-2] or not self._ends(stored, before):
            memory = self._memory = new.new_empty(*new.shape[:-2], entries + ROOM, new.shape[-1])
            self._whole = None
            if stored:
                memory[..., :stored, :] = before
        memory[..., stored:entries, :] = new
        self._written = entries
        return memory[..., :entries, :]

    def put_ahead(self, others: Tensor, stored: Tensor) -> Tensor:
        """Move what is stored behind others, both [B, H, any, D], into memory of its own; what is stored, there."""
        ahead, entries = others.shape[-2], stored.shape[-2]
        self._whole = stored.new_empty(*stored.shape[:-2], ahead + entries + ROOM, stored.shape[-1])
        self._whole[..., :ahead, :] = others
        self._memory, self._written = self._whole[..., ahead:, :], entries
        self._memory[..., :entries, :] = stored
        return self._memory[..., :entries, :]

    def whole(self, stored: Tensor) -> Tensor | None:
        """What was put ahead, and behind it what is stored; None: nothing was, or these are stored elsewhere."""
        if self._whole is None or not self._ends(stored.shape[-2], stored):
            return None
        return self._whole[..., : self.ahead(stored) + self._written, :]

    def ahead(self, stored: Tensor) -> int:
        """How many entries stand ahead of what is stored, in the same memory."""
        if self._whole is None or self._memory is None or self._memory.data_ptr() != stored.data_ptr():
            return 0
        return self._whole.shape[-2] - self._memory.shape[-2]

    def _ends(self, stored: int, before: Tensor) -> bool:
        """Whether these are what the memory holds, and more may be written behind them now."""
        memory = self._memory
        return (
            memory is not None
            and stored == self._written > 0
            and memory.data_ptr() == before.data_ptr()
            and memory.dtype == before.dtype
            and memory.shape[0] == len(before)
            and (not memory.is_inference() or torch.is_inference_mode_enabled())
        )

    def __reduce__(self) -> tuple[type[Room], tuple[()]]:
        """Copies have memory of their own."""
        return Room, ()


class MergedLayer(DynamicLayer):
    """One layer of the cache: keys and values [B, H, entries, D], the keys rotated to their representatives' positions.

    Args:
        history: shared by all layers of the cache.
        leads: whether this layer keeps `history` up to date when rows or tokens are dropped (one layer does).
        window: so many tokens an untouched cache would keep in this layer; None: all.
    """

    keys: Any
    values: Any

    def __init__(self, history: History, leads: bool, window: int | None = None) -> None:
        super().__init__()
        self.history, self.leads, self.window = history, leads, window
        self._keys, self._values = Room(), Room()
        self._ahead: object = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if (packed := self.history.packed) is not None:
            key_states, value_states = packed.pad_heads(key_states), packed.pad_heads(value_states)
        self._expect(key_states.shape[-2])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._keys.after(self.keys, key_states), self._values.after(self.values, value_states)
        self.history.stored_by = self if self.history.fast else None
        return self.keys, self.values

    def behind(self, known: object, others: Callable[[], Tensor]) -> Tensor:
        """[B, H, others + entries, D]: the keys behind others, which stay ahead of them while they hold.

        Args:
            known: what the others are of: they are asked for again where it is another.
        """
        whole = self._keys.whole(self.keys) if self._ahead is known else None
        if whole is None:
            self.keys, self._ahead = self._keys.put_ahead(others(), self.keys), known
            whole = self._keys.whole(self.keys)
        assert whole is not None
        return whole

    @property
    def bytes_ahead(self) -> int:
        """Of the keys ahead of those stored."""
        if self.keys is None or not self.keys.numel():
            return 0
        each: int = self.keys.nbytes // self.keys.shape[-2]
        return self._keys.ahead(self.keys) * each

    def _expect(self, entries: int) -> None:
        stored = self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0
        if stored + entries != self.history.entries:
            raise UnsupportedCache(
                "this KV cache was filled with DyMU, and the model cannot read it while DyMU is removed or disabled; "
                "start with a new cache or apply DyMU again."
            )

    def get_seq_length(self) -> int:
        return self.history.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.history.length + query_length, 0

    def reset(self) -> None:
        self.history.reset()
        self.keep_first(0)

    def keep_first(self, entries: int) -> None:
        """Forget all but so many entries."""
        if not entries:
            self.is_initialized, self.keys, self.values = False, None, None
            self._keys, self._values = Room(), Room()
        elif self.is_initialized:
            self.keys, self.values = self.keys[..., :entries, :], self.values[..., :entries, :]

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
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens of the full prompt from the end: as in transformers, minus so many."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, such as -3, not {tokens_to_remove}")
        if self.leads:
            self.history.crop(max(self.history.length + tokens_to_remove, 0))
        self.keep_first(self.history.entries)


def adopt(cache: Cache, form: CacheForm = "merged") -> History:
    """Make an empty stock `DynamicCache` store merged tokens; a cache adopted before keeps its form and its history.

    Raises:
        UnsupportedCache: another kind of cache, or one that was filled without DyMU.
    """
    history = history_of(cache)
    if history is not None:
        if history.interrupted:
            raise UnsupportedCache(
                "a call with this KV cache was interrupted, and what the language model's layers without attention "
                "remember cannot be taken back; start with a new cache."
            )
        return history
    known = (DynamicLayer, LinearAttentionLayer, *EMPTY_LAYERS)
    if type(cache) is not DynamicCache or not all(isinstance(layer, known) for layer in cache.layers):
        raise UnsupportedCache(
            f"DyMU stores merged tokens in a DynamicCache, not in a {type(cache).__name__}; "
            "leave cache_implementation and past_key_values unset."
        )
    if cache.get_seq_length():
        raise UnsupportedCache(
            "this KV cache was filled without DyMU and holds rotated keys of all tokens; start with a new cache."
        )
    history = History(fast=form == "fast")
    if cache.layer_class_to_replicate is None:
        first = next(index for index, stock in enumerate(cache.layers) if isinstance(stock, DynamicLayer))
        cache.layers = [
            MergedLayer(history, index == first, _window(stock)) if isinstance(stock, DynamicLayer) else stock
            for index, stock in enumerate(cache.layers)
        ]
    else:
        cache.layers.append(MergedLayer(history, leads=True))
        cache.layer_class_to_replicate = functools.partial(MergedLayer, history, leads=False)
    return history


def history_of(cache: Any) -> History | None:
    """What the entries of an adopted cache stand for; None for another, or none."""
    return next((layer.history for layer in _merged(cache)), None)


def recall(module: nn.Module, cache: Any) -> None:
    """Let a module know of the tokens in a cache what it knew after the call before, maybe in another thread."""
    history = history_of(cache)
    if history is not None and history.length:
        for name, value in history.remembered.items():
            setattr(module, name, value)


def _merged(cache: Any) -> Iterator[MergedLayer]:
    """The layers that store merged tokens; others remember in other ways."""
    return (layer for layer in getattr(cache, "layers", ()) if isinstance(layer, MergedLayer))


def remembered(cache: Any) -> Callable[[bool], None]:
    """What brings a cache back to what it is now, after a call that did not end well; to be told whether any layer may
    have run. What layers without attention remember of a cache that holds something cannot be brought back."""
    layers, replicated = list(cache.layers), cache.layer_class_to_replicate
    history = history_of(cache)
    before = None if history is None else history.copy()
    if history is None:
        layers = [copy.deepcopy(layer) if isinstance(layer, LinearAttentionLayer) else layer for layer in layers]

    def rewind(ran: bool) -> None:
        cache.layers, cache.layer_class_to_replicate = layers, replicated
        if history is not None and before is not None:
            history.restore(before)
            for layer in _merged(cache):
                layer.keep_first(history.entries)
            history.interrupted = ran and any(isinstance(layer, LinearAttentionLayer) for layer in layers)

    return rewind


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that the cache holds, merged or not."""
    history = history_of(cache)
    if history is None:
        return sum(map(_bytes, cache.layers))
    grows, rest = _sizes(cache, history)
    return sum(grows.values()) * history.entries + rest + sum(layer.bytes_ahead for layer in _merged(cache))


def untouched_bytes(cache: Cache) -> int:
    """Bytes that an untouched cache would hold in place of an adopted one."""
    history = history_of(cache)
    assert history is not None
    grows, rest = _sizes(cache, history)
    return sum(size * min(history.length, window or history.length) for window, size in grows.items()) + rest


def _sizes(cache: Cache, history: History) -> tuple[dict[int | None, int], int]:
    """Bytes of each entry in all layers that store merged tokens, by the window of the layer, and of all others."""
    if history.sizes is None:
        grows, rest = Counter[int | None](), 0
        for layer in cache.layers:
            if isinstance(layer, MergedLayer):
                grows[layer.window] += _bytes(layer) // max(history.entries, 1)
            else:
                rest += _bytes(layer)
        if not history.entries:
            return dict(grows), rest
        history.sizes = dict(grows), rest
    return history.sizes


def _bytes(layer: Any) -> int:
    stored = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(states.numel() * states.element_size() for states in stored if isinstance(states, Tensor))


def _window(layer: DynamicLayer) -> int | None:
    """Of the tokens in its window, a stock layer keeps all but one for the next."""
    return layer.sliding_window - 1 if isinstance(layer, DynamicSlidingWindowLayer) else None
