"""The encoder half of DyMU: tokens that are alike merge (paper section 3.1)."""

from dymu.merging.baselines import AveragePool, RandomKeep
from dymu.merging.encoder_layer import EncoderLayer, MergedTokens, MergeRun
from dymu.merging.layout import Layout
from dymu.merging.rule import (
    SCHEDULES,
    Chooser,
    FixedMerge,
    MergeRule,
    Reduction,
    Schedule,
    ThresholdMerge,
    above,
    removals,
)

__all__ = [
    "SCHEDULES",
    "AveragePool",
    "Chooser",
    "EncoderLayer",
    "FixedMerge",
    "Layout",
    "MergeRule",
    "MergeRun",
    "MergedTokens",
    "RandomKeep",
    "Reduction",
    "Schedule",
    "ThresholdMerge",
    "above",
    "removals",
]
