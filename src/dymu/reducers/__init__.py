"""The ways to have fewer tokens, one file each. Torch only.

A new one is a file here with a `Reducer`, and a line in `dymu.evaluation.methods` for tables and the command line.
"""

from dymu.reducers.anchors import Anchors
from dymu.reducers.ap_et import ApET
from dymu.reducers.average_pool import AveragePool
from dymu.reducers.by_image import ByImage
from dymu.reducers.cd_pruner import CDPruner
from dymu.reducers.dart import DARTEmbeddings
from dymu.reducers.density_peaks import DensityPeaks
from dymu.reducers.div_prune import DivPrune
from dymu.reducers.dtome import ThresholdMerge
from dymu.reducers.encoder_run import EncoderRun, LayerMemory
from dymu.reducers.faster_vlm import FasterVLM
from dymu.reducers.focus import Focus
from dymu.reducers.hierarchical_pool import HierarchicalPool
from dymu.reducers.holo_v import HoloV
from dymu.reducers.keep import FixedKeep, KeepOfPictures
from dymu.reducers.mm_tok import MMTok
from dymu.reducers.pixel_prune import PixelPrune
from dymu.reducers.prompt import picture_tokens, reduce_in_prompt, tokens_of
from dymu.reducers.pru_merge import PruMerge
from dymu.reducers.random_keep import RandomKeep
from dymu.reducers.reducer import Candidates, Pixels, Reduced, Reducer, Shown, SomeMerge, Stage, Tokens
from dymu.reducers.saint import SAINT
from dymu.reducers.skip_vision import SkipVision
from dymu.reducers.stride import Stride
from dymu.reducers.text_aware import TextAwareMerge
from dymu.reducers.tome import FixedMerge
from dymu.reducers.v_scan import VScan
from dymu.reducers.vid_com2 import VidCom2
from dymu.reducers.vis_pruner import VisPruner
from dymu.reducers.vision_zip import VisionZip
from dymu.reducers.whole_run import WholeRun

__all__ = [
    "SAINT",
    "Anchors",
    "ApET",
    "AveragePool",
    "ByImage",
    "CDPruner",
    "Candidates",
    "DARTEmbeddings",
    "DensityPeaks",
    "DivPrune",
    "EncoderRun",
    "FasterVLM",
    "FixedKeep",
    "FixedMerge",
    "Focus",
    "HierarchicalPool",
    "HoloV",
    "KeepOfPictures",
    "LayerMemory",
    "MMTok",
    "PixelPrune",
    "Pixels",
    "PruMerge",
    "RandomKeep",
    "Reduced",
    "Reducer",
    "Shown",
    "SkipVision",
    "SomeMerge",
    "Stage",
    "Stride",
    "TextAwareMerge",
    "ThresholdMerge",
    "Tokens",
    "VScan",
    "VidCom2",
    "VisPruner",
    "VisionZip",
    "WholeRun",
    "picture_tokens",
    "reduce_in_prompt",
    "tokens_of",
]
