"""TokenMap: which merged token stands for each original token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def at_least_float32(x: Tensor) -> Tensor:
    """In the type of sums: float64 stays, all else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def take(x: Tensor, index: Tensor) -> Tensor:
    """The entries at int64 [B, K] of each row of x [B, N, ...]: [B, K, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def leaders_of(label: Tensor, labels: int) -> Tensor:
    """int64 [B, N]: for each token the first one of its row with the same label.

    Args:
        label: int64 [B, N], below `labels`; -1 for tokens that are dropped, and so is the answer.
    """
    dropped, index = label < 0, torch.arange(label.shape[1], device=label.device).expand_as(label)
    label = label.masked_fill(dropped, labels)
    first = label.new_full((len(label), labels + 1), label.shape[1]).scatter_reduce(1, label, index, "amin")
    return first.gather(1, label).masked_fill(dropped, -1)


@dataclass(frozen=True, eq=False)
class TokenMap:
    """A batch of maps from N original tokens to M merged ones (paper section 3.1: the positions P of each token).

    Rows may keep different numbers of tokens; merged tensors are padded to the widest row. Laws, for every map `m`:
    ``m.average(m.expand(x)) == x``, ``m.expand`` then ``m.average`` is idempotent, ``m.size().sum(1)`` is the number of
    original tokens that are there, and ``a.then(b).expand(x) == a.expand(b.expand(x))``.

    Args:
        group: int64 [B, N], the merged token behind each original token; -1 where a row has no token (padding), or
            where a token is dropped.
        kept: int64 [B], merged tokens per row.
        width: M, the largest of `kept`.
        padded: whether any `group` may be -1.
    """

    group: Tensor
    kept: Tensor
    width: int
    padded: bool = False

    @classmethod
    def identity(cls, batch: int, tokens: int, device: torch.device | str | None = None) -> TokenMap:
        """Every token stands for itself."""
        group = torch.arange(tokens, device=device).expand(batch, tokens)
        return cls(group, torch.full((batch,), tokens, device=device), tokens)

    @classmethod
    def from_leaders(cls, leaders: Tensor, present: Tensor | None = None) -> TokenMap:
        """Number the groups of each row by their first token; padding and dropped tokens belong to none.

        Args:
            leaders: int64 [B, N], for every token the first one of its group, or one that is not `present`; -1 for one
                that is dropped.
            present: bool [B, N], the tokens that there are; None: all.
        """
        index = torch.arange(leaders.shape[1], device=leaders.device).expand_as(leaders)
        dropped = leaders < 0
        if present is not None or bool(dropped.any()):
            present = ~dropped if present is None else present & ~dropped
            leaders = leaders.clamp(min=0)
            leaders = torch.where(present.gather(1, leaders), leaders, index)
        leads = leaders == index if present is None else (leaders == index) & present
        group = (leads.cumsum(1) - 1).gather(1, leaders)
        if present is not None:
            group = torch.where(present, group, -1)
        kept = leads.sum(1)
        return cls(group, kept, max(int(kept.max()), 1), padded=present is not None)

    @property
    def batch(self) -> int:
        return self.group.shape[0]

    @property
    def tokens(self) -> int:
        """N, original tokens per row."""
        return self.group.shape[1]

    @cached_property
    def _bags(self) -> tuple[Tensor, Tensor, int]:
        """The flattened original tokens ordered by merged token; where in that order the bag of each merged token
        begins, and the end; and the bags of a row, of which padding has the last.

        One pass over such bags is several times quicker on a CPU than to add to merged tokens here and there, and on a
        GPU it adds up in one order.
        """
        bags = self.width + self.padded
        group = torch.where(self.group < 0, self.width, self.group) if self.padded else self.group
        bag = group + torch.arange(self.batch, device=group.device)[:, None] * bags
        bag, order = bag.flatten().sort(stable=True)
        return order, torch.searchsorted(bag, torch.arange(self.batch * bags + 1, device=group.device)), bags

    def expand(self, merged: Tensor) -> Tensor:
        """Copy each merged token to the tokens it stands for: [B, M, ...] -> [B, N, ...]; padding becomes 0."""
        if merged.shape[:2] != (self.batch, self.width):
            raise ValueError(f"expected merged tokens [{self.batch}, {self.width}, ...], got {tuple(merged.shape)}")
        if not self.padded:
            return take(merged, self.group)
        absent = (self.group < 0).view(self.batch, self.tokens, *(1,) * (merged.ndim - 2))
        return take(merged, self.group.clamp(min=0)).masked_fill(absent, 0)

    def sum(self, original: Tensor, weight: Tensor | None = None) -> Tensor:
        """Sum each group, in float32 or wider: [B, N, ...] -> [B, M, ...]; rows past `kept` are 0.

        Args:
            weight: [B, N], of each token; None: 1.
        """
        if original.shape[:2] != (self.batch, self.tokens):
            raise ValueError(
                f"expected original tokens [{self.batch}, {self.tokens}, ...], got {tuple(original.shape)}"
            )
        original, rest = at_least_float32(original), original.shape[2:]
        if original.numel() == 0:
            return original.new_zeros(self.batch, self.width, *rest)
        order, begins, bags = self._bags
        flat = original.reshape(self.batch * self.tokens, -1)
        weights = None if weight is None else weight.to(flat.dtype).flatten()[order]
        total = embedding_bag(order, flat, begins, mode="sum", per_sample_weights=weights, include_last_offset=True)
        return total.view(self.batch, bags, *rest)[:, : self.width]

    def max(self, original: Tensor) -> Tensor:
        """The largest of each group: [B, N] -> [B, M]; rows past `kept` are 0."""
        label = torch.where(self.group < 0, self.width, self.group)
        largest = original.new_zeros(self.batch, self.width + 1)
        return largest.scatter_reduce(1, label, original, "amax", include_self=False)[:, : self.width]

    def any(self, original: Tensor) -> Tensor:
        """Whether any of each group is so: bool [B, N] -> [B, M]."""
        return self.sum(original.float()[..., None])[..., 0] > 0

    def average(self, original: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean of each group: [B, N, ...] -> [B, M, ...], summed in float32 or wider; rows past `kept` are 0.

        Args:
            weight: float32 [B, N], of each token of `original` [B, N, C]; None: all weigh the same.
        """
        if weight is None:
            total, size = self.sum(original), self.size()
        else:
            total, size = self.sum(original, weight), self.sum(weight)
        size = size.clamp(min=1).to(total.dtype)
        return (total / size.view(self.batch, self.width, *(1,) * (total.ndim - 2))).to(original.dtype)

    def size(self) -> Tensor:
        """float32 [B, M]: how many original tokens each merged token stands for."""
        _, begins, bags = self._bags
        return begins.diff().view(self.batch, bags)[:, : self.width].float()

    def first(self) -> Tensor:
        """int64 [B, M]: the first original token of each group (0 past `kept`)."""
        return self._member(self._bags[1][:-1])

    def median(self) -> Tensor:
        """int64 [B, M]: the original token in the middle of each group, of two the earlier (0 past `kept`)."""
        begins = self._bags[1]
        return self._member(begins[:-1] + (begins.diff() - 1).clamp(min=0) // 2)

    def rank(self) -> Tensor:
        """int64 [B, N]: which one of its group each original token is, from 0; anything for dropped ones."""
        order, begins, _ = self._bags
        index = torch.arange(len(order), device=order.device)
        first = begins[:-1].repeat_interleave(begins.diff(), output_size=len(order))
        return torch.empty_like(order).scatter_(0, order, index - first).view(self.batch, self.tokens)

    def _member(self, at: Tensor) -> Tensor:
        """The original tokens at some places of the order of all."""
        order, begins, bags = self._bags
        member = order[at.clamp(max=len(order) - 1)] % self.tokens
        return torch.where(begins.diff() > 0, member, 0).view(self.batch, bags)[:, : self.width]

    def then(self, further: TokenMap) -> TokenMap:
        """Merge the merged tokens once more: a map from this map's originals to `further`'s merged tokens."""
        if (further.batch, further.tokens) != (self.batch, self.width):
            raise ValueError(
                f"expected a map of [{self.batch}, {self.width}] tokens, got [{further.batch}, {further.tokens}]"
            )
        if self.padded:
            group = torch.where(self.group < 0, -1, further.group.gather(1, self.group.clamp(min=0)))
        else:
            group = further.group.gather(1, self.group)
        return TokenMap(group, further.kept, further.width, self.padded or further.padded)

    def drop(self, tokens: int) -> TokenMap:
        """The map without its first `tokens` original tokens, each of which must stand for itself."""
        group = self.group[:, tokens:] - tokens
        if self.padded:
            group = group.clamp(min=-1)
        return TokenMap(group, self.kept - tokens, self.width - tokens, self.padded)

    def after(self, tokens: int) -> TokenMap:
        """The inverse of `drop`: the map behind `tokens` more, each of which stands for itself."""
        first = torch.arange(tokens, device=self.group.device).expand(self.batch, -1)
        group = torch.where(self.group < 0, -1, self.group + tokens)
        return TokenMap(torch.cat((first, group), 1), self.kept + tokens, self.width + tokens, self.padded)
