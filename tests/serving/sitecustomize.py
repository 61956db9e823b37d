"""Before torchvision is first imported, declares two operations of its compiled part, which is built for another torch.

vLLM imports torchvision and needs neither. Python runs this file at its start where its folder is on PYTHONPATH.
"""

import importlib.abc
import sys
from typing import Any


class _Operations(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, *_: Any) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for operation in ("nms", "qnms"):
                library.define(f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].library = library  # type: ignore[attr-defined]


sys.meta_path.insert(0, _Operations())
