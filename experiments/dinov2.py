"""DINOv2-S/14 with its real weights and without a language model, as dymu merges in it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from transformers import Dinov2Model, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dymu.families.resolve import resolve
from dymu.hooks.focus import InFocus
from dymu.merging import EncoderLayer, Pictures
from dymu.reducers import EncoderRun, Reducer, Shown
from dymu.token_map import TokenMap
from training.tower import load_tower

PATCH = 14


@dataclass(frozen=True)
class Tower:
    """The network, and those of its layers that run until its features are read."""

    model: Dinov2Model
    layers: tuple[EncoderLayer, ...]
    vlm: LlavaForConditionalGeneration
    """A stock LLaVA around it, for `dymu.calibrate`. Its language model is untrained and never runs."""

    @classmethod
    def load(cls, feature_layer: int) -> Tower:
        """With features read after `feature_layer`, counted as in `vision_feature_layer`."""
        model = load_tower()
        text = LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1,
        )  # fmt: skip
        config = LlavaConfig(
            vision_config=model.config, text_config=text, image_token_id=7, vision_feature_layer=feature_layer
        )
        vlm = LlavaForConditionalGeneration(config).eval()
        vlm.model.vision_tower = model
        parts = resolve(vlm)
        return cls(model, parts.encoder_layers[: max(parts.feature_layers())], vlm)

    def merged(self, pixels: Tensor, reducer: Reducer, focus: InFocus | None = None) -> tuple[Tensor, TokenMap]:
        """Merged features [1, M, C] of the class token and an image [1, 3, height, width], and their map."""
        rows, columns = (side // PATCH for side in pixels.shape[-2:])
        shown = Shown(pixels, ((rows, columns),), single=True, video=False)
        pictures = Pictures(shown.grids, prefix=1)
        if focus is not None:
            grids = focus.grids(shown, lambda _: slice(None), pictures, False, (PATCH, PATCH))
            reducer, shown = focus.around(reducer), replace(shown, focus=grids)
        run = EncoderRun(reducer, len(self.layers), shown, pictures)
        hidden = self.model.embeddings(run.pixels(pixels))
        for index, layer in enumerate(self.layers):
            hidden = run.layer(index, layer, hidden)
        return hidden, run.map
