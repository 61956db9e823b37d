"""The encoder half of DyMU: tokens that are alike merge (paper section 3.1)."""

from dymu.merging.baselines import AveragePool, RandomKeep
from dymu.merging.encoder_layer import EncoderLayer, MergedTokens, MergeRun
from dymu.merging.rule import SCHEDULES, FixedMerge, MergeRule, Reduction, Schedule, ThresholdMerge, removals

__all__ = [
    "SCHEDULES",
    "AveragePool",
    "EncoderLayer",
    "FixedMerge",
    "MergeRule",
    "MergeRun",
    "MergedTokens",
    "RandomKeep",
    "Reduction",
    "Schedule",
    "ThresholdMerge",
    "removals",
]
