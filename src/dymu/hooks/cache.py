"""The KV cache: it says the length of the full prompt, and stores merged tokens."""

from __future__ import annotations

import copy
import functools
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
        history: shared by all layers that run the same tokens.
        leads: whether this layer keeps `history` up to date when rows or tokens are dropped (one of these layers does).
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

    def take(self, index: Tensor) -> None:
        """Keep the entries at int64 [B, K] of each row."""
        if self.is_initialized:
            rows = index.to(self.keys.device)[:, None, :, None]
            self.keys, self.values = (
                states.gather(2, rows.expand(-1, states.shape[1], -1, states.shape[3]))
                for states in (self.keys, self.values)
            )

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


def adopt(
    cache: Cache, form: CacheForm = "merged", starts: Sequence[int] = (), layers: int | None = None
) -> list[History]:
    """Make an empty stock `DynamicCache` store merged tokens; a cache adopted before keeps its form and its histories.

    Args:
        starts: the layers from which on others of these tokens are stored, see `dymu.pruning`.
        layers: of the language model, where it has such.

    Returns:
        What the entries stand for; with `starts`, of the layers ahead of the first one, and from each one on.

    Raises:
        UnsupportedCache: another kind of cache, or one that was filled without DyMU, or with another pruning.
    """
    histories = histories_of(cache)
    if histories:
        if _starts(cache) != (0, *starts):
            raise UnsupportedCache(
                "this KV cache was filled with image tokens pruned at other layers, or with none pruned; start with a "
                "new cache."
            )
        if histories[0].interrupted:
            raise UnsupportedCache(
                "a call with this KV cache was interrupted, and what the language model's layers without attention "
                "remember cannot be taken back; start with a new cache."
            )
        return histories
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
    histories = [History(fast=form == "fast") for _ in range(len(starts) + 1)]
    if starts and cache.layer_class_to_replicate is not None:  # which all would share one history
        cache.layers, cache.layer_class_to_replicate = [DynamicLayer() for _ in range(layers or 0)], None
    if cache.layer_class_to_replicate is None:
        known_histories = set[int]()
        for index, stock in enumerate(cache.layers):
            if isinstance(stock, DynamicLayer):
                history = histories[bisect_right(starts, index)]
                cache.layers[index] = MergedLayer(history, id(history) not in known_histories, _window(stock))
                known_histories.add(id(history))
    else:
        cache.layers.append(MergedLayer(histories[0], leads=True))
        cache.layer_class_to_replicate = functools.partial(MergedLayer, histories[0], leads=False)
    return histories


def _starts(cache: Any) -> tuple[int, ...]:
    """The layers from which on another history says what their entries stand for, the first one among them."""
    starts = dict[int, int]()
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, MergedLayer):
            starts.setdefault(id(layer.history), index)
    _, *others = starts.values()
    return (0, *others)


def histories_of(cache: Any) -> list[History]:
    """What the entries of an adopted cache stand for, see `adopt`; empty for another, or none."""
    return list({id(layer.history): layer.history for layer in _merged(cache)}.values())


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
    histories = [(history, history.copy()) for history in histories_of(cache)]
    if not histories:
        layers = [copy.deepcopy(layer) if isinstance(layer, LinearAttentionLayer) else layer for layer in layers]

    def rewind(ran: bool) -> None:
        cache.layers, cache.layer_class_to_replicate = layers, replicated
        for history, before in histories:
            history.restore(before)
            history.interrupted = ran and any(isinstance(layer, LinearAttentionLayer) for layer in layers)
        if histories:
            for layer in _merged(cache):
                layer.keep_first(layer.history.entries)

    return rewind


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that the cache holds, merged or not."""
    if history_of(cache) is None:
        return sum(map(_bytes, cache.layers))
    sizes, rest = _sizes(cache)
    grows = sum(sum(each.values()) * history.entries for history, each in sizes)
    return grows + rest + sum(layer.bytes_ahead for layer in _merged(cache))


def untouched_bytes(cache: Cache) -> int:
    """Bytes that an untouched cache would hold in place of an adopted one."""
    sizes, rest = _sizes(cache)
    return rest + sum(
        size * min(history.length, window or history.length) for history, each in sizes for window, size in each.items()
    )


def _sizes(cache: Cache) -> tuple[list[tuple[History, dict[int | None, int]]], int]:
    """Bytes of each entry in all layers that store merged tokens, by the window of the layer, for each history; and of
    all other layers."""
    histories = histories_of(cache)
    first = histories[0]
    if first.sizes is None or any(history.sizes is None for history in histories):
        grows, rest = {id(history): Counter[int | None]() for history in histories}, 0
        for layer in cache.layers:
            if isinstance(layer, MergedLayer):
                grows[id(layer.history)][layer.window] += _bytes(layer) // max(layer.history.entries, 1)
            else:
                rest += _bytes(layer)
        found = [(history, dict(grows[id(history)])) for history in histories]
        if first.entries:
            for history, each in found:
                history.sizes = each, rest
        return found, rest
    return [(history, history.sizes[0]) for history in histories if history.sizes is not None], first.sizes[1]


def _bytes(layer: Any) -> int:
    stored = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(states.numel() * states.element_size() for states in stored if isinstance(states, Tensor))


def _window(layer: DynamicLayer) -> int | None:
    """Of the tokens in its window, a stock layer keeps all but one for the next."""
    return layer.sliding_window - 1 if isinstance(layer, DynamicSlidingWindowLayer) else None
