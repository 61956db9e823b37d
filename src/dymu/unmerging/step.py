"""What one forward of the language model must know to attend as if no token had been merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from dymu.choices import EACH_ONCE, SIZED, Unmerge
from dymu.token_map import TokenMap
from dymu.unmerging.history import History
from dymu.unmerging.prompt import NewTokens

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """The virtual tokens of one forward: Nk keys, and Nq queries that are some of them, in the order in which they see
    each other.

    The model has rotated queries and keys by the angles of their representatives. The first T keys, and all queries if
    these are expanded, turn further from there, to positions of their own; the other keys are the cache entries from
    the first one on (without a cache: the merged tokens) as they are.

    Attributes:
        queries: Nq virtual tokens to the Mq merged ones that this forward computes.
        keys: int64 [B, Nk], the cache entry behind each virtual key; -1 for none.
        place: int64 [B, Nk], what a sliding window counts in: tokens that are there; for forms that show every merged
            token once, merged ones.
        stands: int64 [B, Nk], where there are `distances`: which one of the tokens that are there each key stands at.
        length: tokens of the full prompt so far, at which no window hides anything.
        turned: T.
        reach: entries from the first one on, behind which there is none that a key to turn is of; None: all.
        turn: complex [B, T, D / 2], what rotates keys from where their entry's stands; None: they stand there.
        at: int64 [B, Nq], which key each query is; None: they are the last ones.
        expands: whether virtual queries differ from merged ones, in number, order or position.
        merged: int64 [B], how many queries there are up to the last one that stands for several tokens, where near and
            far keys may differ, see `dymu.unmerging.near_far`; None: they may not.
        padded: whether absent keys (-1) may come before present ones; if not, causality hides them.
        absent: float32 [B, Nk], of cached keys of which some may be absent: -inf for these, 0 for others.
        bias: float32 [B, Nk], added to the logits of each virtual key; None for 0.
        first_bias: the same in the first layer, where it differs.
        distances: float32 [B, L], added to the logits of keys so many places away; None for 0.
        block: int64 [B, Nk]: tokens with the same number see each other, also later ones; -1: they see no later ones.
            None: none does.
        beyond_window: whether they do wherever these are, and not within a sliding window alone.
        memo: what was computed for this step and those of the tokens before it, and holds for later ones.
        channels: int64 [D], the channels of a head in an order in which i and i + D / 2 turn together; None: they do.
    """

    queries: TokenMap
    keys: Tensor
    place: Tensor
    backend: str
    length: int
    turned: int = 0
    reach: int | None = None
    turn: Tensor | None = None
    at: Tensor | None = None
    expands: bool = False
    merged: Tensor | None = None
    padded: bool = False
    absent: Tensor | None = None
    bias: Tensor | None = None
    first_bias: Tensor | None = None
    distances: Tensor | None = None
    block: Tensor | None = None
    beyond_window: bool = False
    channels: Tensor | None = None
    stands: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    _results: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def once(self, name: Any, compute: Callable[[], T]) -> T:
        """What `compute` returns, computed in the first decoder layer that asks for `name` and kept for the others."""
        if name not in self._results:
            self._results[name] = compute()
        result: T = self._results[name]
        return result

    def once_for_all(self, name: Any, compute: Callable[[], T]) -> T:
        """The same of something that no later token changes, kept for their steps, too, see `memo`."""
        if torch.compiler.is_compiling():  # where the first of these steps would be compiled apart
            return self.once(name, compute)
        key = name, torch.is_inference_mode_enabled()  # what is computed in it is of no use for gradients
        if key not in self.memo:
            self.memo[key] = compute()
        result: T = self.memo[key]
        return result

    @property
    def query_at(self) -> Tensor:
        """int64 [B or 1, Nq], which key each query is."""
        if self.at is not None:
            return self.at
        seen = self.keys.shape[1]
        return torch.arange(seen - self.queries.tokens, seen, device=self.keys.device)[None]

    def of_queries(self, x: Tensor) -> Tensor:
        """What stands for each key [B, Nk, ...], of the queries [B, Nq, ...]."""
        if self.at is None:
            return x[:, x.shape[1] - self.queries.tokens :]
        return x[torch.arange(len(x), device=x.device)[:, None], self.at]

    @property
    def query_turn(self) -> Tensor | None:
        """complex [B, Nq, D / 2], what rotates expanded queries from where their merged one stands; None: nothing."""
        turn = self.turn
        return None if turn is None else self.once("query turn", lambda: self.of_queries(turn))

    def average(self, attended: Tensor) -> Tensor:
        """[B, Mq, ...] of queries [B, Nq, ...]; 0 past a row's end."""
        if self.expands:
            return self.queries.average(attended)
        if not self.queries.padded:
            return attended
        absent = self.once("absent queries", lambda: self.queries.group < 0)
        return attended.masked_fill(absent.view(*absent.shape, *(1,) * (attended.ndim - 2)), 0)

    def only(self, wanted: Tensor) -> Step:
        """The step of some merged queries, int64 [B, k]; others get 0."""
        group = self.queries.group
        wants = (group[:, :, None] == wanted[:, None]).any(-1) & (group >= 0)
        order = (~wants).byte().argsort(dim=1, stable=True)[:, : int(wants.sum(1).max())]
        group = torch.where(wants.gather(1, order), group.gather(1, order), -1)
        at = self.query_at.expand(len(group), -1).gather(1, order)
        queries = replace(self.queries, group=group, padded=True)
        return replace(self, queries=queries, at=at, expands=True, merged=None)

    def causal(self, window: int | None = None) -> bool:
        """Whether plain causal attention over equally many queries and keys, or one query that sees every key, is all
        that a mask could say.

        Args:
            window: sliding window in virtual tokens, or None.
        """
        tokens, seen = self.queries.tokens, self.keys.shape[1]
        return self.sees_all(window) and self.at is None and not self.padded and (tokens == 1 or tokens == seen)

    def sees_all(self, window: int | None) -> bool:
        """Whether no window, bias or block says more than which keys are there, and which queries come before."""
        return (window is None or window >= self.length) and self.bias is None and self.block is None

    def sees(self, start: int, end: int) -> int:
        """How many keys, from the first on, any of the queries from `start` to `end` may see."""
        if self.block is None and self.at is None:
            return self.keys.shape[1] - self.queries.tokens + end
        ends: list[int] = self.once("ends", lambda: self._ends().tolist())
        return max(ends[start:end])

    def _ends(self) -> Tensor:
        """int64 [Nq]: behind the last key that each query sees in any row."""
        last = self.query_at
        if self.block is not None:
            last = self.of_queries(_last_of_block(self.block))
        absent = self.queries.group < 0
        return (last.expand_as(absent).masked_fill(absent, 0).amax(0) + 1).clamp(max=self.keys.shape[1])

    def mask(self, window: int | None = None, start: int = 0, end: int | None = None) -> Tensor:
        """[B or 1, 1, end - start, keys]: which key each of the queries from `start` to `end` sees (bool) or, with a
        bias, what is added to its logit (float32). Of the keys, those up to the last that any of these queries sees; of
        all queries, all.

        Args:
            window: sliding window in virtual tokens, or None.
        """
        sees = self.keys.shape[1] if end is None else self.sees(start, end)
        end = self.queries.tokens if end is None else end
        mask = torch.arange(sees, device=self.keys.device) <= self.query_at[:, start:end, None]
        block = None
        if self.block is not None:
            own = self.of_queries(self.block)[:, start:end, None]
            block = (own >= 0) & (own == self.block[:, None, :sees])
            mask = mask | block
        if window is not None and window < self.length:
            near = self.place[:, None, :sees] > self.of_queries(self.place)[:, start:end, None] - window
            mask = mask & (near if block is None or not self.beyond_window else near | block)
        if self.padded:
            mask = mask & (self.keys[:, None, :sees] >= 0)
        if self.queries.padded:  # so that no softmax is over nothing
            mask = mask | (self.queries.group[:, start:end] < 0)[:, :, None]
        if self.bias is not None:
            bias = self.bias[:, None, :sees]
            if self.distances is not None:
                apart = self.of_queries(self.stands)[:, start:end, None] - self.stands[:, None, :sees]
                bias = bias + self.distances.gather(1, apart.abs().flatten(1)).view_as(apart)
            mask = bias.masked_fill(~mask, -torch.inf)
        return mask[:, None]


def plan_step(
    new: NewTokens,
    history: History,
    *,
    unmerge: Unmerge,
    backend: str,
    turn: Tensor | None = None,
    place: Tensor | None = None,
    block: Tensor | None = None,
    beyond_window: bool = False,
    distances: Tensor | None = None,
    shown: Tensor | None = None,
) -> Step:
    """Add new tokens to the history and say how they attend.

    Args:
        new: the new tokens of the full prompt.
        history: what the cache holds; the new tokens are appended.
        unmerge: see `Unmerge`.
        backend: name of the backend to compute it with.
        turn: complex [B, N, P], see `Tokens.turn`; None: no token has to turn.
        place: int64 [B, N], see `History.places`; None: those are there that stand for something.
        block: int64 [B, N], see `Step.block`.
        beyond_window: see `Step`.
        distances: float32 [L], for `restore`: added to the logits of keys so many places away in prompts with images.
        shown: bool [B, N], for `restore`: the tokens of images; None: there are none.
    """
    tokens = new.map
    if place is None:
        there = tokens.group >= 0 if tokens.padded else None
        place = history.places(there, tokens.batch, tokens.tokens, tokens.group.device)
    if block is not None:
        block = block.masked_fill(tokens.group < 0, -1)
    before = history.copy() if new.merged else None
    represents = None if new.plain else new.represents
    history.append(tokens, place, plain=new.plain, represents=represents, turn=turn)
    if history.plain:
        keys = torch.arange(history.entries, device=place.device).expand(tokens.batch, -1)
        step = Step(tokens, keys, keys, backend, history.length)
    elif before is not None and unmerge not in EACH_ONCE:
        step, block = _all_tokens(new, before, history, unmerge, backend, block)
    else:
        step, block = _one_each(new, history, unmerge, backend, block)
        if unmerge == "restore" and distances is not None and shown is not None:
            step = _restored(step, new, history, distances, shown)
    if block is None:
        return step
    return replace(
        step, block=pad(block, (step.keys.shape[1] - block.shape[1], 0), value=-1), beyond_window=beyond_window
    )


def _one_each(
    new: NewTokens, history: History, unmerge: Unmerge, backend: str, block: Tensor | None
) -> tuple[Step, Tensor | None]:
    """Every new merged token is one virtual token. And the block of each."""
    queries, known = new.map, history.keys
    if not new.plain:
        group = torch.arange(queries.width, device=known.slot.device).expand(queries.batch, -1)
        group = torch.where(group < queries.kept[:, None], group, -1)
        if block is not None:
            block = block.gather(1, new.representative).masked_fill(group < 0, -1)
        queries = TokenMap(group, queries.kept, queries.width, history.gaps)
    padded = history.length > new.map.tokens and history.gaps
    if unmerge not in EACH_ONCE:
        step = Step(
            queries,
            known.slot,
            known.place,
            backend,
            history.length,
            turned=known.turned,
            reach=known.reach,
            turn=known.turn,
            padded=padded,
            absent=known.absent if padded else None,
            memo=known.memo,
        )
        return step, block
    there = known.size > 0
    keys = torch.where(there, torch.arange(history.entries, device=there.device), -1)
    bias = known.size.clamp(min=1).log() if unmerge in SIZED else None
    return Step(queries, keys, there.cumsum(1), backend, history.length, padded=padded, bias=bias), block


def _restored(step: Step, new: NewTokens, history: History, distances: Tensor, shown: Tensor) -> Step:
    """See `restore` in `dymu.choices.Unmerge`."""
    assert step.bias is not None
    known, newest = history.keys, step.bias[:, -new.map.width :]
    of_image = shown.gather(1, new.representative) & (step.queries.group >= 0)
    tokens, merged = (x.sum(1, keepdim=True).clamp(min=1) for x in (shown & (new.map.group >= 0), of_image))
    alike = torch.where(of_image, (tokens / merged).log().to(newest), newest)
    return replace(
        step,
        first_bias=torch.cat((step.bias[:, : -new.map.width], alike), 1),
        distances=distances * shown.any(1, keepdim=True),
        stands=known.place[:, known.turned :].clamp(min=0),
    )


def _all_tokens(
    new: NewTokens, before: History, history: History, unmerge: Unmerge, backend: str, block: Tensor | None
) -> tuple[Step, Tensor | None]:
    """Every new token is a virtual key, absent ones last, so that causality alone hides them; queries are all tokens,
    or one of each group. And the block of each key."""
    queries, added, asked = new.map, history.newest, new.asked
    if queries.padded:
        order = (queries.group < 0).byte().argsort(dim=1, stable=True)
        added = added.in_order(order)
        asked = torch.where(asked < 0, -1, order.argsort(1).gather(1, asked.clamp(min=0)))
        queries = replace(queries, group=queries.group.gather(1, order))
        block = None if block is None else block.gather(1, order)
    keys = added if not before.length else before.keys.as_tokens().then(added)
    seen = keys.slot.shape[1]
    step = Step(
        queries,
        keys.slot,
        keys.place,
        backend,
        history.length,
        turned=seen,
        turn=keys.turn,
        expands=True,
        padded=before.length > 0 and before.gaps,
    )
    if unmerge == "exact":
        return step, block
    there, merged = asked >= 0, None
    group = torch.where(there, queries.group.gather(1, asked.clamp(min=0)), -1)
    if not before.length:
        number = torch.arange(1, asked.shape[1] + 1, device=asked.device)
        merged = (number * (new.map.size().gather(1, group.clamp(min=0)) > 1) * there).amax(1)
    step = replace(
        step,
        queries=TokenMap(group, queries.kept, queries.width, bool((~there).any())),
        at=asked.clamp(min=0) + seen - new.map.tokens,
        expands=new.several,
        merged=merged,
    )
    return step, block


def _last_of_block(block: Tensor) -> Tensor:
    """int64 [B, Nk]: of keys that have a block, the last key of it; of others, themselves."""
    index = torch.arange(block.shape[1], device=block.device).expand_as(block)
    numbers = torch.where(block < 0, 0, block + 1)
    last = torch.zeros(len(block), int(numbers.max()) + 1, dtype=torch.long, device=block.device)
    last = last.scatter_reduce(1, numbers, index, "amax")
    return torch.where(block < 0, index, last.gather(1, numbers))
