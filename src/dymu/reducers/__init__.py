"""The ways to have fewer tokens, one file each. Torch only.

A new one is a file here with a `Reducer`, and a line in `dymu.evaluation.methods` for tables and the command line.
"""

from dymu.reducers.average_pool import AveragePool
from dymu.reducers.by_image import ByImage
from dymu.reducers.dtome import ThresholdMerge
from dymu.reducers.encoder_run import EncoderRun
from dymu.reducers.focus import Focus
from dymu.reducers.guard import Guard
from dymu.reducers.keep import FixedKeep
from dymu.reducers.prompt import picture_tokens, reduce_in_prompt, tokens_of
from dymu.reducers.random_keep import RandomKeep
from dymu.reducers.reducer import Candidates, Pixels, Reduced, Reducer, Shown, SomeMerge, Stage, Tokens
from dymu.reducers.stride import Stride
from dymu.reducers.tome import FixedMerge
from dymu.reducers.whole_run import WholeRun

__all__ = [
    "AveragePool",
    "ByImage",
    "Candidates",
    "EncoderRun",
    "FixedKeep",
    "FixedMerge",
    "Focus",
    "Guard",
    "Pixels",
    "RandomKeep",
    "Reduced",
    "Reducer",
    "Shown",
    "SomeMerge",
    "Stage",
    "Stride",
    "ThresholdMerge",
    "Tokens",
    "WholeRun",
    "picture_tokens",
    "reduce_in_prompt",
    "tokens_of",
]
