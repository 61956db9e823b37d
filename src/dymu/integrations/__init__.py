"""dymu inside its neighbours: one file each, imported only when that neighbour asks for it."""

from typing import Any


def lmms_eval_models() -> Any:
    """What lmms-eval's entry-point group `lmms_eval.models` asks for: the name of our model and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="dymu", simple_class_path="dymu.integrations.lmms_eval.Dymu")
