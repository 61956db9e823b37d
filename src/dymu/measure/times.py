"""Times and costs of one prompt, as result files hold them. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import msgspec

from dymu.files import Amount, Count


class Times(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Wall-clock milliseconds of one prompt, or the medians of several."""

    encoder_ms: Amount
    """From the start of the first forward to the start of the language model: the vision part."""
    prefill_ms: Amount
    """The rest of the first forward: the language model over the whole prompt, and the logits."""
    decode_ms_per_token: Amount
    """From one token to the next, after the first."""

    @property
    def first_token_ms(self) -> float:
        return self.encoder_ms + self.prefill_ms

    @classmethod
    def medians(cls, runs: Sequence[Times]) -> Times:
        return Times(*(median(getattr(run, part) for run in runs) for part in PARTS))


PARTS = Times.__struct_fields__
"""The names of the times."""


class Cost(Times, frozen=True):
    """Times of one prompt, FLOPs of its first forward, and bytes of its KV cache after that."""

    flops: Amount
    cache_bytes: Count
