"""The encoder half of DyMU: tokens that are alike merge (paper section 3.1). Torch only."""

from dymu.merging.encoder_layer import EncoderLayer, MergedTokens
from dymu.merging.in_prompt import ROUNDS, PictureTokens
from dymu.merging.layout import Layout
from dymu.merging.match import a_count, above, focus_last, in_focus, most_similar
from dymu.merging.merge import merge_step
from dymu.merging.peaks import distances, nearest_of, peaks
from dymu.merging.pictures import Pictures
from dymu.merging.units import Units

__all__ = [
    "ROUNDS",
    "EncoderLayer",
    "Layout",
    "MergedTokens",
    "PictureTokens",
    "Pictures",
    "Units",
    "a_count",
    "above",
    "distances",
    "focus_last",
    "in_focus",
    "merge_step",
    "most_similar",
    "nearest_of",
    "peaks",
]
