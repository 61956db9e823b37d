"""TokenMap: which merged token stands for each original token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class TokenMap:
    """A batch of maps from N original tokens to M merged ones (paper section 3.1: the positions P of each token).

    Rows may keep different numbers of tokens; merged tensors are padded to the widest row. Laws, for every map `m`:
    ``m.average(m.expand(x)) == x``, ``m.expand`` then ``m.average`` is idempotent, ``m.size().sum(1)`` is the number of
    original tokens that are there, and ``a.then(b).expand(x) == a.expand(b.expand(x))``.

    Args:
        group: int64 [B, N], the merged token behind each original token; -1 where a row has no token (padding), or
            where a token is gone without a trace.
        kept: int64 [B], merged tokens per row.
        width: M, the largest of `kept`.
        padded: whether any `group` may be -1.
    """

    group: Tensor
    kept: Tensor
    width: int
    padded: bool = False
    _made: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def identity(cls, batch: int, tokens: int, device: torch.device | str | None = None) -> TokenMap:
        """Every token stands for itself."""
        group = torch.arange(tokens, device=device).expand(batch, tokens)
        return cls(group, torch.full((batch,), tokens, device=device), tokens)

    @property
    def batch(self) -> int:
        return self.group.shape[0]

    @property
    def tokens(self) -> int:
        """N, original tokens per row."""
        return self.group.shape[1]

    def _slot(self) -> tuple[Tensor, int]:
        """Row of the flattened [B * stride, ...] merged tensor for each original token; padding has its own."""
        stride = self.width + self.padded
        group = torch.where(self.group < 0, self.width, self.group) if self.padded else self.group
        offset = torch.arange(self.batch, device=group.device)[:, None] * stride
        return (group + offset).flatten(), stride

    def _bags(self) -> tuple[Tensor, Tensor]:
        """The flattened original tokens ordered by slot, and where in that order each slot begins; made once.

        One pass over such bags is several times quicker on a CPU than to add to slots here and there, and on a GPU it
        adds up in one order.
        """
        if "bags" not in self._made:
            slot, stride = self._slot()
            slot, order = slot.sort(stable=True)
            first = torch.searchsorted(slot, torch.arange(self.batch * stride, device=slot.device))
            self._made["bags"] = order, first
        return self._made["bags"]

    def expand(self, merged: Tensor) -> Tensor:
        """Copy each merged token to the tokens it stands for: [B, M, ...] -> [B, N, ...]; padding becomes 0."""
        if merged.shape[:2] != (self.batch, self.width):
            raise ValueError(f"expected merged tokens [{self.batch}, {self.width}, ...], got {tuple(merged.shape)}")
        rows = torch.arange(self.batch, device=merged.device)[:, None]
        full = merged[rows, self.group.clamp(min=0) if self.padded else self.group]
        if self.padded:
            absent = (self.group < 0).view(self.batch, self.tokens, *(1,) * (merged.ndim - 2))
            full = full.masked_fill(absent, 0)
        return full

    def sum(self, original: Tensor) -> Tensor:
        """Sum each group, in float32 or wider: [B, N, ...] -> [B, M, ...]; rows past `kept` are 0."""
        if original.shape[:2] != (self.batch, self.tokens):
            raise ValueError(
                f"expected original tokens [{self.batch}, {self.tokens}, ...], got {tuple(original.shape)}"
            )
        rest, dtype = original.shape[2:], _accumulation_dtype(original.dtype)
        if original.numel() == 0:
            return original.new_zeros(self.batch, self.width, *rest, dtype=dtype)
        order, first = self._bags()
        flat = original.reshape(self.batch * self.tokens, -1)
        total = embedding_bag(order, flat.to(dtype), first, mode="sum")
        return total.view(self.batch, -1, *rest)[:, : self.width]

    def average(self, original: Tensor) -> Tensor:
        """Mean of each group: [B, N, ...] -> [B, M, ...], summed in float32 or wider; rows past `kept` are 0."""
        total = self.sum(original)
        size = self.size().clamp(min=1).to(total.dtype)
        return (total / size.view(self.batch, self.width, *(1,) * (total.ndim - 2))).to(original.dtype)

    def size(self) -> Tensor:
        """float32 [B, M]: how many original tokens each merged token stands for."""
        slot, stride = self._slot()
        count = torch.zeros(self.batch * stride, device=slot.device)
        return count.index_add_(0, slot, count.new_ones(slot.shape)).view(self.batch, stride)[:, : self.width]

    def first(self) -> Tensor:
        """int64 [B, M]: the first original token of each group (0 past `kept`)."""
        slot, stride = self._slot()
        index = torch.arange(self.tokens, device=slot.device).expand(self.batch, -1).flatten()
        first = torch.full((self.batch * stride,), self.tokens, device=slot.device)
        first = first.scatter_reduce(0, slot, index, "amin").view(self.batch, stride)[:, : self.width]
        return torch.where(first == self.tokens, 0, first)

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
        """The map without its first `tokens` original tokens, each of which must stand for itself in its place."""
        group = self.group[:, tokens:] - tokens
        if self.padded:
            group = group.clamp(min=-1)
        return TokenMap(group, self.kept - tokens, self.width - tokens, self.padded)

    def after(self, tokens: int) -> TokenMap:
        """The inverse of `drop`: the map behind `tokens` more, each of which stands for itself."""
        own = torch.arange(tokens, device=self.group.device).expand(self.batch, -1)
        group = torch.where(self.group < 0, -1, self.group + tokens)
        return TokenMap(torch.cat((own, group), 1), self.kept + tokens, self.width + tokens, self.padded)
