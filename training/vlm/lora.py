"""Low-rank updates of the language model's linear layers, folded into the weight in every forward pass.

Folding costs nothing per token (two thin products and an addition per layer would), and what is trained is, by
construction and to the last bit of bfloat16, what merging exports.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn


class LoraLinear(nn.Linear):
    """A frozen linear layer with a trained update of low rank: weight + scale * b @ a."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float

    @classmethod
    def around(cls, linear: nn.Linear, rank: int, scale: float) -> LoraLinear:
        """The same function as ``linear`` until it is trained, since ``b`` starts at zero. Shares its weight."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.scale = scale
        device = linear.weight.device
        layer.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        layer.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(layer.lora_a, a=math.sqrt(5))
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, merged(self.weight, self.lora_a, self.lora_b, self.scale), self.bias)


def merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """The updated weight, added in float32 and rounded once to the weight's own type."""
    with torch.autocast(weight.device.type, enabled=False):
        return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)


def add_lora(model: nn.Module, rank: int, scale: float) -> None:
    """Replace every linear layer below ``model``, in place, and freeze everything else."""
    model.requires_grad_(False)
    linear = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for parent, name, child in linear:
        setattr(parent, name, LoraLinear.around(child, rank, scale))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Every updated layer by its name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module
