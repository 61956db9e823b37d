"""The encoder half of DyMU: tokens that are alike merge (paper section 3.1). Torch only."""

from dymu.merging.encoder_layer import EncoderLayer, MergedTokens
from dymu.merging.in_prompt import PictureTokens
from dymu.merging.layout import Layout
from dymu.merging.match import above
from dymu.merging.merge import merge_step
from dymu.merging.schedule import removals

__all__ = ["EncoderLayer", "Layout", "MergedTokens", "PictureTokens", "above", "merge_step", "removals"]
