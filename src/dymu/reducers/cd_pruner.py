"""CDPruner (arXiv 2506.10967): tokens that are diverse and of use for the question, by a determinantal point
process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.choices import Fill
from dymu.reducers.div_prune import far_apart
from dymu.reducers.keep import FixedKeep
from dymu.reducers.reducer import Tokens
from dymu.token_map import at_least_float32

EPSILON = 1e-6


def relevance_of(cosine: Tensor) -> Tensor:
    """[N] from 0 to 1, of the mean cosine of each token with the words; as in the authors' program, the least is the
    most relevant."""
    score = -cosine
    return (score - score.min() + EPSILON) / (score.max() - score.min()).clamp(min=EPSILON)


def likeliest(kernel: Tensor, keep: int) -> Tensor:
    """int64 [up to keep], in order: the greedy subset of the largest determinant of a kernel [N, N]. Fewer where the
    kernel's rank is lower."""
    left, rows = kernel.diagonal().clone(), kernel.new_zeros(keep, len(kernel))
    chosen = list[int]()
    for number in range(keep):
        best = int(left.argmax())
        if left[best] <= EPSILON * kernel.diagonal().max():
            break
        rows[number] = (kernel[best] - rows[:number, best] @ rows[:number]) / left[best].sqrt()
        left = left - rows[number].square()
        chosen.append(best)
        left[chosen] = -torch.inf
    return torch.tensor(chosen, dtype=torch.long, device=kernel.device)


@dataclass(frozen=True)
class CDPruner(FixedKeep):
    """Of every image or video, the tokens stay whose similarities, weighed by relevance for the question, have the
    largest determinant.

    Relevance is the cosine with the words of the prompt as the language model embeds them; where the paper has CLIP's
    text encoder, a model in use has none. Where similarities are used up (of few dimensions), tokens far apart fill up.

    Args:
        keep: a number of tokens; a float up to 1 is a fraction.
        fill: what stands for the others: nothing, the kept token that is most like each, or the mean of each run.

    Raises:
        BadBudget: `keep` is not above 0; or in use, more than there are.
        BadPrompt: in use, the prompt is not known.
    """

    keep: int | float
    fill: Fill = "none"

    def choose(self, tokens: Tokens, row: int, keep: int) -> Tensor:
        x, words = tokens.unit(row), normalize(at_least_float32(tokens.words[row]), dim=-1)
        relevance = relevance_of((x @ words.mT).mean(1))
        cosine = x @ x.mT
        chosen = likeliest(relevance[:, None] * cosine * relevance, keep)
        if len(chosen) == keep:
            return chosen
        order = far_apart(1 - cosine, len(x))
        others = order[~torch.isin(order, chosen)]
        return torch.cat((chosen, others[: keep - len(chosen)]))
