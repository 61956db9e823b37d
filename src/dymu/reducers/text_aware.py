"""Text-aware merging (after EMMA, 2024): what the instruction is about merges later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.checks import check_fields
from dymu.reducers.keep import check_finite
from dymu.reducers.reducer import Candidates, SomeMerge
from dymu.reducers.tome import FixedMerge
from dymu.token_map import at_least_float32


@dataclass(frozen=True, eq=False, kw_only=True)
class TextAwareMerge(FixedMerge):
    """`FixedMerge` by another similarity: the cosine of two tokens, less `weight` times the relevance of the more
    relevant one.

    Relevance is the mean cosine of a token with the vectors of a text, from 0 for the least relevant token of an image
    to 1 for the most. It is measured once, ahead of the first layer that merges; a merged token has that of its most
    relevant member. What the layers leave beyond `keep` merges by features alone, as in `FixedMerge`.

    Args:
        text: float [words, D], of the instruction, in the space that patches are projected into, as by CLIP's text
            tower; or what gives these from the ids int64 [any] of the prompt that shows a picture.
        project: from features of the encoder [..., C] to that space, as by CLIP's last norm and visual projection.
        weight: of the relevance; above 2 what is relevant by 1 merges after all else.
        inverted: whether what is least like the text is most relevant.
        layers: must be named, since features of the first of them say how relevant a patch is; early ones say little.

    Raises:
        ValueError: `layers` are not named, `weight` is no number from 0 on, or the text no vectors of the projection.
        BadPrompt: in use, `text` reads the prompt, and it is not known.
    """

    text: Tensor | Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor] = field(repr=False)
    weight: float = 0.1
    inverted: bool = False
    focuses: ClassVar[bool] = False
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        check_finite(self, "weight", least=0.0)
        if not callable(self.project) or not (isinstance(self.text, Tensor) or callable(self.text)):
            raise ValueError("TextAwareMerge takes vectors, or what gives them, for text, and a function for project.")
        if self.layers is None:
            raise ValueError("TextAwareMerge reads relevance ahead of the first layer that merges: name the `layers`.")

    def in_layer(self, candidates: Candidates) -> Tensor | SomeMerge | None:
        notes = candidates.shown.notes
        assert self.layers is not None
        if candidates.layer not in self.layers:
            return None
        if self not in notes:
            notes[self] = candidates.state.map.expand(self._relevance(candidates))
        return super().in_layer(replace(candidates, apart=self.weight * notes[self]))

    def _relevance(self, candidates: Candidates) -> Tensor:
        """float32 [pictures, M], from 0 to 1."""
        shown, x = candidates.shown, at_least_float32(self.project(candidates.features))
        texts = [self.text] * len(x) if isinstance(self.text, Tensor) else list(map(self.text, shown.text))
        relevance = torch.stack([_mean_cosine(*pair) for pair in zip(x, texts, strict=True)])
        there = candidates.state.layout.present.clone()
        there[:, : candidates.prefix] = False
        image = torch.tensor(shown.image, device=x.device)[:, None].expand_as(relevance)
        low, high = (_extreme(relevance, there, image, sign) for sign in (-1, 1))
        relevance = (relevance - low) / (high - low).clamp(min=torch.finfo(relevance.dtype).tiny)
        return (1 - relevance if self.inverted else relevance).masked_fill(~there, 0)


def _mean_cosine(x: Tensor, text: Tensor) -> Tensor:
    if text.ndim != 2 or not len(text) or text.shape[1] != x.shape[1]:
        raise ValueError(
            f"the text is {list(text.shape)}, and patches are projected to {x.shape[1]} numbers: give vectors "
            f"[words, {x.shape[1]}]."
        )
    return (normalize(x, dim=-1) @ normalize(text.to(x), dim=-1).mT).mean(1).nan_to_num(0, 0, 0)


def _extreme(values: Tensor, there: Tensor, image: Tensor, sign: int) -> Tensor:
    """[pictures, 1], the largest (sign 1) or the least value that is there, of each picture's image."""
    most = (sign * values).masked_fill(~there, -torch.inf)
    found = torch.full((int(image.max()) + 1,), -torch.inf, dtype=values.dtype, device=values.device)
    return sign * found.scatter_reduce(0, image.flatten(), most.flatten(), "amax")[image[:, :1]]
