"""Is the converted tower the tower of the ONNX file? Compare the two on composed scenes.

``python -m training.check_tower`` needs onnxruntime; the recipe itself does not.
"""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from training.assets import tower_onnx
from training.features import pixels
from training.scenes import compose
from training.tower import FEATURE_LAYER, load_tower

RESULT = Path(__file__).with_name("results") / "tower.json"
LAYER = 13 + FEATURE_LAYER
"""How many encoder layers lie below the features: 13 hidden states, counted from the end."""


def main(images: int = 8) -> None:
    """Print and record the largest difference at the features and at the last layer."""
    model = onnx.load(str(tower_onnx()))
    node = {node.name: node for node in model.graph.node}
    outputs = {
        f"after layer {LAYER}": node[f"/backbone/encoder/layer.{LAYER}/norm1/ReduceMean"].input[0],
        "after the final norm": node["/backbone/layernorm/Add_1"].output[0],
    }
    for output in outputs.values():
        value = onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)
        model.graph.output.append(value)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    batch = pixels([compose("train", 5, index).image for index in range(images)])
    expected = session.run(list(outputs.values()), {"input_image": batch.numpy()})
    with torch.inference_mode():
        states = load_tower()(batch, output_hidden_states=True)
    computed = (states.hidden_states[FEATURE_LAYER], states.last_hidden_state)
    record: dict[str, object] = {"images": images, "torch": torch.__version__,
                                 "onnxruntime": onnxruntime.__version__}  # fmt: skip
    for name, reference, ours in zip(outputs, expected, computed, strict=True):
        record[name] = {
            "largest difference": float(np.abs(reference - ours.numpy()).max()),
            "largest value": float(np.abs(reference).max()),
        }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
