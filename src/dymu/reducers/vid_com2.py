"""VidCom2 (arXiv 2505.14454): frames unlike the video, and tokens unlike their frame, keep more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.choices import Fill
from dymu.reducers.faster_vlm import largest
from dymu.reducers.fill import fill_alike_in_picture
from dymu.reducers.keep import FixedKeep, of_pictures
from dymu.reducers.reducer import Tokens

WIDTHS = tuple(2.0**power for power in range(-3, 2))
TEMPERATURE = 0.01


def likeness(x: Tensor, centre: Tensor) -> Tensor:
    """[N] of tokens [N, C] with one: the sum of five Gaussians of their distance."""
    squares = (x - centre).square().sum(-1)
    return torch.stack([(-squares / (2 * width)).exp() for width in WIDTHS]).sum(0)


def rates(of_frames: Tensor, part: float) -> Tensor:
    """[frames], the part that each frame keeps, by the mean likeness [frames] of its tokens with the whole video."""
    unlike = (-of_frames / TEMPERATURE).softmax(0)
    return (part * (1 + unlike - unlike.mean())).clamp(max=1)


@dataclass(frozen=True)
class VidCom2(FixedKeep):
    """Of a video, tokens stay that are least like the mean of all, and of their frame; frames least like all keep more.

    An image is a video of one frame, a tiled one of as many as it has tiles. Frames keep whole tokens that together are
    `keep`, where the authors' program rounds each; at least one each, where `keep` is as many.

    Args:
        keep: a number of tokens; a float up to 1 is a fraction.
        fill: what stands for the others: nothing, the most similar one that its frame keeps, or the
            mean of each run.

    Raises:
        BadBudget: `keep` is not above 0; or in use, more than there are.
    """

    keep: int | float
    fill: Fill = "none"
    fill_nearest = fill_alike_in_picture

    def choose(self, tokens: Tokens, row: int, keep: int) -> Tensor:
        x = tokens.values(row)
        x = normalize(x[:, largest(-x.var(0, correction=0), x.shape[1] // 2)], dim=-1)
        frames = tokens.indices(row)
        of_video = likeness(x, x.mean(0))
        share = rates(torch.stack([of_video[frame].mean() for frame in frames]), keep / len(x))
        counts = [len(frame) for frame in frames]
        weights = [rate * count for rate, count in zip(share.tolist(), counts, strict=True)]
        kept = []
        for frame, count in zip(frames, of_pictures(keep, weights, counts), strict=True):
            alike = of_video[frame] + likeness(x[frame], x[frame].mean(0))
            kept.append(frame[largest(-alike, count)])
        return torch.cat(kept)
