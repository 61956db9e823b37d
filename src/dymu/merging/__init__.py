"""The encoder half of DyMU: tokens that are alike merge (paper section 3.1). Torch only."""

from dymu.merging.encoder_layer import EncoderLayer, MergedTokens
from dymu.merging.in_prompt import ROUNDS, PictureTokens
from dymu.merging.layout import Layout
from dymu.merging.match import a_count, above
from dymu.merging.merge import merge_step

__all__ = [
    "ROUNDS",
    "EncoderLayer",
    "Layout",
    "MergedTokens",
    "PictureTokens",
    "a_count",
    "above",
    "merge_step",
    "removals",
]
