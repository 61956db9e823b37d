"""Towers of timm and open_clip, in an environment that has them (`make encoders`); elsewhere nothing is collected."""

from importlib.util import find_spec

import torch

collect_ignore_glob = [] if find_spec("timm") else ["test_*.py"]

# A torchvision that was built for another torch has no compiled operators, and asks for these two as it is imported.
_operators = torch.library.Library("torchvision", "FRAGMENT")
if find_spec("timm"):
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
