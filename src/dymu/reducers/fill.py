"""What stands for a dropped token: the kept one that is nearest, by what it shows or by where it lies; or the mean of
those that are dropped beside it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.reducers.reducer import Reduced, Tokens
from dymu.token_map import TokenMap, at_least_float32, take


def fill_alike(tokens: Tokens, reduced: Reduced) -> Reduced:
    """Let each dropped token stand with the kept one of the largest cosine; features of kept tokens do not change."""
    unit = normalize(at_least_float32(tokens.features), dim=-1)
    return _filled(tokens, reduced, unit @ unit.mT)


def fill_alike_in_picture(tokens: Tokens, reduced: Reduced) -> Reduced:
    """The same among the tokens of each picture (tile, frame); of one that keeps none, among all."""
    unit = normalize(at_least_float32(tokens.features), dim=-1)
    picture, kept = tokens.picture.gather(1, tokens.map.first()), reduced.map.group >= 0
    own = picture[:, :, None] == picture[:, None]
    apart = ~own & (own & kept[:, None]).any(-1, keepdim=True)
    return _filled(tokens, reduced, (unit @ unit.mT).masked_fill(apart, -torch.inf))


def fill_beside(tokens: Tokens, reduced: Reduced) -> Reduced:
    """Let each dropped token stand with the kept one that lies nearest in the user's picture, of the same view: the
    whole image, its tiles put together, or a frame."""
    first = tokens.map.first()
    box = take(tokens.location, first).nan_to_num()
    centre = (box[..., :2] + box[..., 2:]) / 2
    where = torch.cat((centre, 2.0 * _view(tokens)[..., None]), -1)
    return _filled(tokens, reduced, -torch.cdist(where, where, compute_mode="donot_use_mm_for_euclid_dist"))


def fill_runs(tokens: Tokens, reduced: Reduced) -> Reduced:
    """Join the dropped tokens of each run, as many as follow each other, row after row of one view, in their mean
    (after FocusUI, 2026, which trains what stands there)."""
    dropped = (reduced.map.group < 0) & tokens.present
    index = torch.arange(dropped.shape[1], device=dropped.device).expand_as(dropped)
    begins, view = dropped.clone(), _view(tokens)
    begins[:, 1:] &= ~(dropped[:, :-1] & (view[:, 1:] == view[:, :-1]))
    first = torch.where(begins, index, -1).cummax(1).values
    return Reduced(TokenMap.from_leaders(torch.where(dropped, first, index), tokens.present))


def _view(tokens: Tokens) -> Tensor:
    """int64 [B, T], the view of the user's picture that each token is of: the whole image (0), its tiles put together
    (1), or a frame."""
    picture = tokens.picture.gather(1, tokens.map.first())
    return picture if tokens.shown.video else picture.clamp(max=1)


def _filled(tokens: Tokens, reduced: Reduced, nearness: Tensor) -> Reduced:
    """Fill by the nearness [B, T, T] of two tokens; of equally near ones the first is taken."""
    kept = reduced.map.group >= 0
    nearness = nearness.nan_to_num(torch.finfo(nearness.dtype).min, neginf=-torch.inf)  # NaN is nearest to nothing
    nearest = nearness.masked_fill(~kept[:, None], -torch.inf).argmax(-1)
    group = torch.where(kept, reduced.map.group, reduced.map.group.gather(1, nearest))
    group = group.masked_fill(~tokens.present, -1)
    filled = TokenMap(group, reduced.map.kept, reduced.map.width, tokens.map.padded)
    return Reduced(filled, tokens.features_of(reduced))
