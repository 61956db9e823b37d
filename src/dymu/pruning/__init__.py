"""Ways to prune image tokens within the language model, one file each. Torch only.

A new one is a file here with a `Pruning`, and a line in `dymu.evaluation.methods` for tables and the command line.
"""

from dymu.pruning.dart import DART
from dymu.pruning.fast_v import FastV
from dymu.pruning.layer_skip import LayerSkip
from dymu.pruning.pruning import Ahead, Joined, Pruning
from dymu.pruning.pyramid_drop import PyramidDrop, Reroute
from dymu.pruning.skip_ffn import SkipFFN
from dymu.pruning.sparse_vlm import SparseVLM

__all__ = ["DART", "Ahead", "FastV", "Joined", "LayerSkip", "Pruning", "PyramidDrop", "Reroute", "SkipFFN", "SparseVLM"]
