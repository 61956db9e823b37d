"""Models of a real shape with random weights: time and memory depend on the shape, not on the weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
from safetensors import safe_open

from dymu.errors import BadBudget, DymuError

if TYPE_CHECKING:
    import torch

FOLDER = Path(__file__).with_name("shapes")
RECORDED = 576
"""Tokens of the pictures of which, where units merge, it is taken how many."""
NEAR = 0.05
"""Largest relative distance of a budget from the recorded one that is used for it."""

T = TypeVar("T", int, float)


class Image(msgspec.Struct, frozen=True):
    """How a model of some shape is shown an image.

    Attributes:
        pictures: that it is cut into.
        arguments: of the model besides the pixels, for each image.
        pixels: the shape of its `pixel_values`, whose first axis is joined with other images'; None: the pictures of
            the size in the vision encoder's config.
        units: tokens of a picture for the language model, where it regroups patches; None: it gets every patch. Merges
            were recorded of patches, so where there are units only how many merge is taken from them.
    """

    pictures: int = 1
    arguments: dict[str, list[int]] = msgspec.field(name="given", default_factory=dict)
    pixels: list[int] | None = None
    units: int | None = None


class _File(msgspec.Struct):
    config: dict[str, Any]
    image: Image = Image()
    published: dict[Literal["encoder", "decoder"], int] = {}
    """Layers of the model of that name, where the shape may have fewer."""


def names() -> list[str]:
    """Shapes that come with the library, one JSON file each."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def config(name: str) -> Any:
    """The configuration of a shape, of those in `names`."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**_read(name).config)


def image(name: str) -> Image:
    """How a model of a shape, of those in `names`, is shown an image."""
    return _read(name).image


def cut(name: str, layers: Mapping[Literal["encoder", "decoder"], int]) -> str:
    """In words, what a model of a shape, of so many `layers`, lacks of the model of that name; empty: nothing."""
    published = _read(name).published
    return ", ".join(
        f"{part} {layers[part]} of {count} layers" for part, count in published.items() if layers[part] < count
    )


def check_budget(name: str, budget: int | float) -> None:
    """Raises: BadBudget, where no merges were recorded near it for this shape."""
    vision, shown = _read(name).config["vision_config"], image(name)
    tokens = shown.units or (vision["image_size"] // vision["patch_size"]) ** 2
    recorded = tokens if shown.units is None else RECORDED
    if file_for(recorded).exists():
        with safe_open(file_for(recorded), "numpy") as merges:
            kept = [int(kept) * tokens / recorded for kept in merges.keys()]  # noqa: SIM118, it is no mapping
            nearest(kept, tokens, budget, shown.pictures)


def file_for(tokens: int) -> Path:
    """The file with the recorded merges of pictures of so many tokens."""
    return FOLDER.with_name(f"merges-{tokens}.safetensors")


def nearest(recorded: Iterable[T], tokens: int, budget: int | float, pictures: int) -> T:
    """See `dymu.bench.replay.Recorded.budget_near`, of which this is the part that needs no torch."""
    recorded, full = sorted(recorded), pictures * tokens
    asked = budget * full if isinstance(budget, float) and budget <= 1 else budget
    best = min(recorded, key=lambda one: abs(pictures * one - asked))
    if abs(pictures * best - asked) > NEAR * pictures * best:
        known = ", ".join(f"{pictures * one:.0f}" for one in recorded)
        raise BadBudget(
            f"merges were recorded at {known} of {full} tokens, none of them near {asked:g}; take one of those."
        )
    return best


def check_room(name: str, dtype: torch.dtype) -> None:
    """Refuse a shape whose weights alone are more than this machine's memory has room for: the system would end us.

    Raises:
        DymuError: naming both.
    """
    import torch

    model = build(config(name), torch.device("meta"), dtype)
    need, room = sum(weight.nbytes for weight in model.parameters()), _available_bytes()
    if room is not None and need > room:
        narrower = ", bfloat16 (--dtype)" if dtype == torch.float32 else ""
        raise DymuError(
            f"the weights of {name} take {need / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, and "
            f"{room / 1e9:.1f} GB of memory are available: take a smaller shape{narrower} or a GPU (--device)."
        )


def _available_bytes() -> int | None:
    """Memory that the machine can still give, whatever a container's limit; None where the system does not say."""
    try:
        said = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        return None
    return 1024 * int(said[1]) if said else None


def build(shape: Any, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model of that configuration whose weights are drawn as for training from scratch, so that no dtype overflows.

    It is built on `device` and in `dtype`, so that nothing wider is ever held.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(shape, dtype=dtype)
    return model.eval()


def _read(name: str) -> _File:
    return msgspec.json.decode((FOLDER / f"{name}.json").read_bytes(), type=_File)
