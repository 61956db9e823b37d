"""MMTok (arXiv 2508.18264): tokens that together cover the question's words and the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.choices import Fill
from dymu.reducers.keep import FixedKeep
from dymu.reducers.reducer import Tokens
from dymu.token_map import at_least_float32

OF_WORDS, OF_TOKENS, WEIGHT = 0.02, 0.2, 0.5
"""Temperatures of what words and tokens are covered by, and the weight of the second."""


def covering(x: Tensor, words: Tensor, features: Tensor, keep: int) -> Tensor:
    """int64 [keep], in order: greedily, the tokens that raise most what is covered.

    Args:
        x: [N, C] tokens; words: [W, C]; features: [N, any], of the tokens in the encoder; all of length 1.
    """
    by_words = (words @ x.mT / OF_WORDS).softmax(-1) / max(len(words), 1)
    by_tokens = (features @ features.mT / OF_TOKENS).softmax(-1) / len(x)
    cover = torch.cat((by_words, WEIGHT * by_tokens))
    best, free = cover.new_zeros(len(cover), 1), cover.new_zeros(len(x))
    chosen = list[int]()
    for _ in range(keep):
        gain = (cover - best).clamp(min=0).sum(0) + free
        chosen.append(int(gain.argmax()))
        free[chosen[-1]] = -torch.inf
        best = torch.maximum(best, cover[:, chosen[-1:]])
    return torch.tensor(chosen, device=x.device)


@dataclass(frozen=True)
class MMTok(FixedKeep):
    """Of every image or video, the tokens stay that together are most like the words of the prompt, and like all
    tokens.

    Words are all of the prompt, as the language model embeds them: no list of stop words is known here.

    Args:
        keep: a number of tokens; a float up to 1 is a fraction.
        fill: what stands for the others: nothing, the kept token that is most like each, or the mean of each run.

    Raises:
        BadBudget: `keep` is not above 0; or in use, more than there are.
        BadPrompt: in use, the prompt is not known.
    """

    keep: int | float
    fill: Fill = "none"

    def reads(self, layers: int) -> tuple[None]:
        return (None,)

    def choose(self, tokens: Tokens, row: int, keep: int) -> Tensor:
        features = tokens.encoded[row, : tokens.counts[row]]
        words = normalize(at_least_float32(tokens.words[row]), dim=-1)
        return covering(tokens.unit(row), words, normalize(features, dim=-1), keep)
