"""What users choose between by name. Nothing is imported for it, so that the command line can list it at once."""

from typing import Literal, get_args

Unmerge = Literal["exact", "representative", "compact", "original", "restore", "none"]
"""How the language model attends to merged tokens.

- `exact`: every token of the full prompt is a virtual token at its own position (VTU, paper section 3.2).
- `representative`: every one is a key, and of each group one is a query: that nearest to the mean of their positions.
  Attention is M x N. What does not stand for several, such as text, attends as in `exact`, and so do later tokens.
- `compact`: every merged token is one, at the position in the middle of its group and with log(size) added to the
  logits of its key. Attention is M x M, so it would fit any kernel and any paged cache.
- `original`: the same without log(size).
- `restore`: `compact`, and while a prompt with images is read, log(2 - D(t)) is added for keys t positions away, where
  D is the mean cosine of what t positions rotate by; in the first layer image tokens weigh alike (RESTORE, 2026).
- `none`: every merged token is one, at consecutive positions, as if the prompt had been that short.

A chunk that cuts an image, where a prompt is prefilled in chunks, changes the logits in every form: a merged token then
stands once in each chunk.
"""
UNMERGE: tuple[Unmerge, ...] = get_args(Unmerge)
EACH_ONCE: tuple[Unmerge, ...] = ("compact", "original", "restore", "none")
"""Forms that show every merged token once."""
SIZED: tuple[Unmerge, ...] = ("compact", "restore")
"""Of these, forms that add log(size) to the logits of a key."""

IN_VLLM: tuple[Unmerge, ...] = ("original", "compact", "exact", "representative")
"""Forms that the plug-in for vLLM has, of which the first is taken where none is named."""

CacheForm = Literal["merged", "fast"]
"""What the KV cache stores: a key and a value of each merged token, or also the keys of the tokens that it stands for,
turned to their positions: (N + M) / 2N of the untouched cache, where `merged` takes M / N."""
CACHE_FORMS: tuple[CacheForm, ...] = get_args(CacheForm)

Counting = Literal["mean", "at-most", "exactly"]
"""What a number of image tokens says: the mean over images, what none goes beyond, or what every one keeps."""
COUNTINGS: dict[Counting, str] = {"mean": "budget", "at-most": "at_most", "exactly": "exactly"}
"""By name, the argument of `dymu.apply`."""

Named = Literal["text", "edges"]
"""What can be in focus without saying where it lies: lines of text, or edges."""

UNTOUCHED = "untouched"
"""In place of a budget: nothing merges."""

Schedule = Literal["constant", "linear", "reverse_linear"]
"""How merges spread over the layers of the encoder: evenly, more in early layers, or more in late ones."""
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

Fill = Literal["none", "nearest", "runs"]
"""What stands for a dropped token: nothing, the kept token that is most like it, or the mean of the dropped ones that
follow each other there, one token more for each such run."""

Arrangement = Literal["batch", "packed", "raster", "padded"]
"""How an encoder's layers get the patches of several pictures: [pictures, N, C], class and register tokens first; all
in one row [S, C], the patches of a unit together; [1, S, C], row after row of every picture; or [pictures, P, C], row
after row and then padding."""
