"""Pictures -> what merged of each, by the encoder alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from dymu.calibration.samples import arguments_for
from dymu.families.resolve import resolve
from dymu.handle import Handle
from dymu.prompting import items_by_prompt, pixels_for
from dymu.report import Report


class Encoder:
    """The encoder of a model that DyMU is applied to.

    Args:
        model, processor: of transformers.
        handle: see `dymu.apply`; it says how much merges.
    """

    def __init__(self, model: Any, processor: Any, handle: Handle) -> None:
        self._model, self._processor, self._handle = model, processor, handle
        self._parts = resolve(model)

    def __call__(self, images: Sequence[Image.Image]) -> list[Report]:
        """A report of each RGB image, as if it had been shown alone.

        Raises:
            ValueError: the processor or the model does not take them.
        """
        processed = pixels_for(self._processor, images)
        arguments = arguments_for(self._parts, "image", self._processor, processed)
        prompts = {name: processed[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
        inner: Any = self._parts.inner
        with torch.inference_mode():
            inner.get_image_features(**{**arguments, **prompts})
        items = items_by_prompt(self._model, processed, self._handle.last.items)
        return [Report(of_image) for of_image in items]
