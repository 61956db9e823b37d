"""The encoder half of DyMU: tokens that are alike merge (paper section 3.1)."""

from dymu.merging.baselines import AveragePool, RandomKeep
from dymu.merging.encoder_layer import EncoderLayer, MergedTokens, MergeRun
from dymu.merging.layout import Layout
from dymu.merging.match import best_partner
from dymu.merging.merge import merge_step
from dymu.merging.rule import (
    SCHEDULES,
    Chooser,
    FixedMerge,
    MergeRule,
    Reduction,
    Schedule,
    Settling,
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
    "Settling",
    "ThresholdMerge",
    "above",
    "best_partner",
    "merge_step",
    "removals",
]
