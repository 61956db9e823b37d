"""What users choose between by name. Nothing is imported for it, so that the command line can list it at once."""

from typing import Literal, get_args

Unmerge = Literal["exact", "compact", "original", "none"]
"""How the language model attends to merged tokens.

- `exact`: every token of the full prompt is a virtual token at its own position (VTU, paper section 3.2).
- `compact`: every merged token is one, at the mean position of its group and with log(size) added to the logits of its
  key. Attention is M x M, so it would fit any kernel and any paged cache.
- `original`: the same without log(size).
- `none`: every merged token is one, at consecutive positions, as if the prompt had been that short.

Only `exact` gives a prompt that is prefilled in chunks the logits of the whole: elsewhere a merged token stands once in
each chunk.
"""
UNMERGE: tuple[Unmerge, ...] = get_args(Unmerge)
COMPACT: tuple[Unmerge, ...] = ("compact", "original")
"""Forms in which the position of a merged token is the mean of its group's."""

CacheForm = Literal["merged", "expanded"]
"""What the KV cache stores: one un-rotated entry per merged token, or a rotated one per token of the full prompt."""
CACHE_FORMS: tuple[CacheForm, ...] = get_args(CacheForm)

Schedule = Literal["constant", "linear", "reverse_linear"]
"""How merges spread over the layers of the encoder: evenly, more in early layers, or more in late ones."""
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

Fill = Literal["none", "nearest"]
"""What stands for a dropped token: nothing, or the kept token that is most like it."""

Arrangement = Literal["batch", "packed", "raster", "padded"]
"""How an encoder's layers get the patches of several pictures: [pictures, N, C], class and register tokens first; all
in one row [S, C], the patches of a unit together; [1, S, C], row after row of every picture; or [pictures, P, C], row
after row and then padding."""
