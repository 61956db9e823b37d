"""What windows and rotary angles add to a layer of a vision encoder that merges.

`python -m benchmarks.windows` times layers of Qwen2.5-VL's size (1280 channels, 16 heads, units of 2 × 2 patches,
windows of 4 × 4 units) on one picture, in which three tenths of the units merge: attention, matching, merging and the
MLP, without windows and angles, with either, and with both. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from dymu.families.resolve import resolve
from dymu.measure.markdown import markdown
from dymu.merging import EncoderLayer, Layout, MergedTokens, Units, most_similar

SIDE, WINDOW, WIDTH, HEADS, PART = 20, 4, 1280, 16, 0.3
"""Units on a side of the picture and of a window, channels, heads, and the part of the units that merges."""
WAYS = {"neither": (False, False), "windows": (True, False), "angles": (False, True), "both": (True, True)}


def model() -> Qwen2_5_VLForConditionalGeneration:
    """One encoder layer of random weights, and a language model that is not used."""
    vision = {"depth": 1, "hidden_size": WIDTH, "num_heads": HEADS, "intermediate_size": 3420, "out_hidden_size": 64}
    text = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=60, video_token_id=61)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def tokens(windows: bool, angles: bool) -> MergedTokens:
    """The units of one picture as they are embedded."""
    state = MergedTokens.unmerged(Layout.equal(1, SIDE**2, torch.device("cpu")), Units(4))
    if windows:
        state = replace(state, window=torch.arange(SIDE**2) // WINDOW**2)
    if angles:
        turns = torch.rand(1, 4 * SIDE**2, WIDTH // HEADS // 2).repeat(1, 1, 2)
        state = replace(state, angles=(turns.cos(), turns.sin()))
    return state


def run(layer: EncoderLayer, x: Tensor, state: MergedTokens, windowed: bool) -> tuple[float, float]:
    """Milliseconds of the layer, and of these those for matching and merging."""
    start = time.perf_counter()
    x, keys = layer.attend(x, state, windowed)
    attended = time.perf_counter()
    similarity, partner = state.match(keys, 0, windowed)
    due = torch.tensor([round(PART * SIDE**2)])
    into = most_similar(due, similarity, partner, state.picture(windowed))
    x, state = state.merge(x, into, 0, windowed)
    merged = time.perf_counter()
    layer.feed_forward(x)
    return 1000 * (time.perf_counter() - start), 1000 * (merged - attended)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=25)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    layer = resolve(model()).encoder_layer(0)
    x = torch.randn(1, 4 * SIDE**2, WIDTH)
    states = {name: tokens(*way) for name, way in WAYS.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for round_ in range(repeats + 1):
        for name, state in states.items():
            measured = run(layer, x, state, WAYS[name][0])
            if round_:
                times[name].append(measured)
    rows = []
    for name, measured in times.items():
        whole, merging = (statistics.median(part) for part in zip(*measured, strict=True))
        rows.append([name, f"{whole:.0f}", f"{merging:.1f}", f"{merging / whole:.1%}"])
    print(markdown(["with", "layer, ms", "matching and merging, ms", "of it"], rows))


if __name__ == "__main__":
    main()
