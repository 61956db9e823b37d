"""The vision tower: DINOv2-S/14 out of an ONNX file into a stock ``Dinov2Model``."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from training.assets import tower_onnx

try:
    import onnx
    from onnx import numpy_helper
except ImportError as error:
    raise SystemExit(
        "the recipe reads the tower with onnx, which is not installed: `pip install -r training/requirements.txt`."
    ) from error

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FEATURE_LAYER = -3
"""``vision_feature_layer``: the hidden state after layer 10 of 12."""


def tower_config() -> Dinov2Config:
    """DINOv2-S/14 with its own 37x37 position grid; smaller images interpolate it."""
    return Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4,
        image_size=518, patch_size=14, layerscale_value=1.0,
    )  # fmt: skip


def load_tower(path: Path | None = None) -> Dinov2Model:
    """The tower with its weights, every one of them, in evaluation mode."""
    graph = onnx.load(str(path or tower_onnx())).graph
    tensors = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:  # dense weights kept no name of their own: take their node's
        if node.op_type == "MatMul" and node.input[1] in tensors and "/backbone/" in node.name:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = tensors[node.input[1]].T
    class_part, patch_part = _position_parts(tensors)
    weights["embeddings.position_embeddings"] = np.concatenate([class_part, patch_part], axis=1)
    state = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in weights.items()}
    with TemporaryDirectory() as folder:  # from_pretrained knows every version's module names
        tower_config().save_pretrained(folder)
        save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model, report = Dinov2Model.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    missing = set(report["missing_keys"]) - {"embeddings.mask_token"}
    if missing or report["unexpected_keys"]:
        raise ValueError(f"DINOv2: missing {missing}, unexpected {report['unexpected_keys']}")
    torch.nn.init.zeros_(model.embeddings.mask_token)  # never used, but equal in every export
    return model.eval()


def _position_parts(tensors: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The position embedding is stored as one class part and one patch part, both unnamed."""
    unnamed = [value for name, value in tensors.items() if name.startswith("onnx::")]
    (class_part,) = [value for value in unnamed if value.shape == (1, 1, 384)]
    (patch_part,) = [value for value in unnamed if value.shape == (1, 37 * 37, 384)]
    return class_part, patch_part
