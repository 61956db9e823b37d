"""DART on embeddings (arXiv 2502.11494): tokens least like a few pivots stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.choices import Fill
from dymu.reducers.faster_vlm import largest
from dymu.reducers.keep import KeepOfPictures
from dymu.reducers.reducer import Tokens
from dymu.token_map import at_least_float32

PIVOTS = 4
"""Of tokens, and as many of words."""


def unlike_pivots(x: Tensor, words: Tensor, keep: int) -> Tensor:
    """int64 [keep], those of the tokens [N, C] that stay: pivots of the largest sum of absolute values, and for each
    pivot in turn, then for each word [W, C] of the largest, those of the rest that are least like it."""
    first = largest(x.abs().sum(-1), min(PIVOTS, keep))
    pivots = torch.cat((x[first], words[largest(words.abs().sum(-1), PIVOTS)]))
    alike = normalize(x, dim=-1) @ normalize(pivots, dim=-1).mT
    kept, left = [first], keep - len(first)
    alike[first] = torch.inf
    for number in range(len(pivots)):
        more = -(-left // (len(pivots) - number))
        nearest = largest(-alike[:, number], more)
        alike[nearest] = torch.inf
        kept.append(nearest)
        left -= more
    return torch.cat(kept)


@dataclass(frozen=True)
class DARTEmbeddings(KeepOfPictures):
    """Of every picture four pivots stay, the tokens of the largest absolute values, and those least like these or like
    four words of the prompt.

    Args:
        keep: of an image or video, a number of tokens; a float up to 1 is a fraction.
        fill: what stands for the others: nothing, the kept token that is most like each, or the mean of each run.

    Raises:
        BadBudget: `keep` is not above 0; or in use, more than there are.
        BadPrompt: in use, the prompt is not known.
    """

    keep: int | float
    fill: Fill = "none"

    def choose_of(self, tokens: Tokens, row: int, index: Tensor, keep: int) -> Tensor:
        return unlike_pivots(tokens.values(row)[index], at_least_float32(tokens.words[row]), keep)
