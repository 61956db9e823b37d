"""From a folder or a hub name to a model ready to be asked, and from a question to its prompt."""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import typer

from dymu.cli.errors import BadModel, one_line
from dymu.errors import BadBudget, DymuError, UnsupportedModel
from dymu.families import FAMILIES
from dymu.files import expanded
from dymu.schedule import fewest
from dymu.thresholds import Thresholds, beside

DEMO_BUDGET = 0.30
MUCH = 0.85
"""Part of all image tokens, above which a budget shows little."""
CHECKOUT = Path(__file__).parents[3]
EXAMPLES = CHECKOUT / "examples"
"""Pictures of things that the demo model knows."""
TOY = (
    "the demo model is a toy: it knows some two hundred things, and says something wrong of all others; "
    "name a model of yours with --model."
)
NO_VIDEOS = "this model takes no videos: take one that does, such as a llava_onevision, or show it an image."
_UNSAID = (KeyError, TypeError, ValueError, ArithmeticError)
"""Raised where a config does not say something, or not as transformers writes it; loading the model will tell."""


@dataclass(frozen=True)
class Loaded:
    """A model with its processor."""

    model: Any
    processor: Any


@dataclass(frozen=True)
class Named:
    """A model as it was named, and what its files say before it is loaded.

    Attributes:
        name: as the user wrote it.
        source: as transformers takes it.
        revision: on the hub.
        config: its config.json.
    """

    name: str
    source: str
    revision: str | None
    config: dict[str, Any]

    @cached_property
    def tokens(self) -> int | None:
        """Image tokens of one image; None where that differs from image to image, or its files do not say."""
        family = FAMILIES.get(self.config["model_type"])
        vision = self.config.get("vision_config") or {}
        if family is None or family.unit is not None or family.cuts_images or family.takes_any_size(vision):
            return None
        processor = self._json("processor_config.json").get("image_processor") or self._json("preprocessor_config.json")
        try:
            cropped = "crop_size" in processor and processor["do_center_crop"]
            side = processor["crop_size" if cropped else "size"]
            patch = self.config["vision_config"]["patch_size"]
            return int(side["height"] // patch * (side["width"] // patch)) if processor["do_resize"] else None
        except _UNSAID:
            return None

    @property
    def depth(self) -> int | None:
        """How many encoder layers may merge; None where its config does not say."""
        try:
            layers: Any = FAMILIES[self.config["model_type"]].feature_layer
            if not isinstance(layers, int):
                layers = self.config.get("vision_feature_layer", self.config.get("vision_feature_layers"))
            vision = self.config["vision_config"]
            count = int(vision.get("num_hidden_layers", vision.get("depth")))
            return max(int(layer) % (count + 1) for layer in (layers if isinstance(layers, list) else [layers]))
        except _UNSAID:
            return None

    def check_budgets(self, budgets: Iterable[int | float], merging_layers: int = 0) -> None:
        """Refuse budgets that cannot be met, as far as the model's files say.

        Args:
            merging_layers: in which tokens merge; 0: any number may stay.
        """
        if self.tokens is None:
            return
        lowest = fewest(self.tokens, merging_layers) if merging_layers else 1
        for budget in budgets:
            kept = round(budget * self.tokens) if isinstance(budget, float) and 0 < budget <= 1 else budget
            if not lowest <= kept <= self.tokens:
                raise BadBudget(
                    f"a budget of {budget:g} cannot be met: an image of {self.name} has {self.tokens} tokens, of which "
                    f"{lowest:.4g} to {self.tokens} can be kept."
                )

    def check_videos(self) -> None:
        """Raises: BadModel, where its family takes no videos."""
        if FAMILIES[str(self.config["model_type"])].video_token is None:
            raise BadModel(NO_VIDEOS)

    def thresholds(self, named: str | None = None) -> Thresholds:
        """The thresholds that were named, a file, a folder or a hub name; else those that the model ships."""
        return Thresholds.load(named) if named else beside(self.source, "--thresholds", self.revision)

    def _json(self, name: str) -> dict[str, Any]:
        """A file of the model; empty where it has none of that name."""
        try:
            read = json.loads(_file(self.source, name, self.revision).read_text(encoding="utf-8"))
        except Exception:  # the hub and json raise their own; what it needs, transformers will say
            return {}
        return read if isinstance(read, dict) else {}


def demo_model() -> str:
    """The demo model's folder: `DYMU_DEMO_MODEL`, else the one in the checkout this runs from."""
    folder = _demo_folder()
    if not (folder / "config.json").is_file():
        where = "the demo model comes with the repository, and this dymu was installed without it"
        if "DYMU_DEMO_MODEL" in os.environ:
            where = f"DYMU_DEMO_MODEL names {folder}, which holds no model"
        raise BadModel(f"{where}: say which model to use, with --model (dymu run, dymu demo) or as the first argument.")
    return str(folder)


def _demo_folder() -> Path:
    return Path(os.environ.get("DYMU_DEMO_MODEL") or CHECKOUT / "models" / "demo")


def demo_budget(budget: float | None, calibrated: Thresholds) -> float | None:
    """The budget for the demo model: as asked, else the only calibrated one, else `DEMO_BUDGET`."""
    return DEMO_BUDGET if budget is None and len(calibrated.budgets) > 1 else budget


def some_budgets(calibrated: Thresholds, count: int) -> list[float]:
    """So many of the calibrated budgets at which much merges, or all where there are fewer, spread over their range,
    smallest first."""
    from dymu.media.frames import spread

    full = calibrated.full or math.inf
    budgets = [budget for budget in calibrated.budgets if budget <= MUCH * full] or calibrated.budgets
    return [budgets[index] for index in spread([math.log(budget) for budget in budgets], count)]


def beyond_the_demo(model: Named, shown: Path) -> bool:
    """Whether the demo model is asked about a picture that is none of its examples."""
    return is_the_demo(model) and EXAMPLES not in shown.resolve().parents


def is_the_demo(model: Named) -> bool:
    """Whether it is the demo model."""
    return Path(model.source).resolve() == _demo_folder().resolve()


def named(name: str, revision: str | None = None) -> Named:
    """Look a folder or a hub name up, without importing torch.

    Raises:
        BadModel: it holds no model.
        UnsupportedModel: of a family that dymu does not know.
    """
    source = _source(name)
    if revision is not None and Path(source).is_dir():
        raise typer.BadParameter(f"--revision is for models on the hub, and {name} is a folder: leave it out.")
    try:
        config = json.loads(_file(source, "config.json", revision).read_text(encoding="utf-8"))
    except Exception as error:  # the hub and json raise their own
        raise _not_loaded(name, error) from error
    model_type = config.get("model_type", "(none)") if isinstance(config, dict) else "(none)"
    if str(model_type) not in FAMILIES:
        raise UnsupportedModel(
            f"{name} is of the type {model_type!r}, which dymu does not know; it knows "
            f"{', '.join(sorted(FAMILIES))}: docs/add-a-family.md says how to add one."
        )
    return Named(name, source, revision, config)


def load(model: Named, device: str | None = None, dtype: str | None = None) -> Loaded:
    """Model and processor.

    Args:
        device: None: the accelerator if there is one.
        dtype: of the weights, by torch's name; None: as they are stored.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    where = device_named(device)
    loaded_processor = processor(model)
    with _said_of(model):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            model.source, revision=model.revision, dtype=getattr(torch, dtype) if dtype else "auto"
        )
    return Loaded(loaded.to(where).eval(), loaded_processor)


def processor(model: Named) -> Any:
    """Its processor alone."""
    from transformers import AutoProcessor

    with _said_of(model):
        return AutoProcessor.from_pretrained(model.source, revision=model.revision)


@contextmanager
def _said_of(model: Named) -> Iterator[None]:
    """Turns whatever loading raises into one sentence."""
    try:
        yield
    except (MemoryError, DymuError):
        raise
    except Exception as error:  # safetensors, tokenizers, json and the hub each raise their own
        if "torchvision" in str(error).lower():
            import torch

            release = ".".join(torch.__version__.split(".")[:2])
            raise BadModel(
                f"the processor of {model.name} needs torchvision, which is not installed, or not for this torch: "
                f"`pip install 'torch=={release}.*' torchvision`."
            ) from error
        if isinstance(error, ImportError):
            raise BadModel(f"{model.name} needs a package that is missing ({one_line(error)}): install it.") from error
        raise _not_loaded(model.name, error) from error


def device_named(device: str | None) -> Any:
    """Raises: BadModel, where this machine has no such device."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return accelerator or torch.device("cpu")
    kind, _, index = device.partition(":")
    count = 1 if kind == "cpu" else torch.accelerator.device_count() if accelerator and kind == accelerator.type else 0
    if int(index or 0) >= count:
        kinds = "cpu" if accelerator is None else f"cpu and {accelerator.type} (of which {count or 'some'})"
        raise BadModel(f"torch cannot use the device {device} here: take another with --device; there is {kinds}.")
    return torch.device(device)


def _not_loaded(name: str, error: Exception) -> BadModel:
    why = one_line(error).rstrip(".")
    if expanded(name).is_dir():
        return BadModel(f"{name} could not be loaded ({why}): check that the folder is whole.")
    return BadModel(f"{name} is no folder here, and the hub did not give it ({why}): check its name.")


def ask(loaded: Loaded, shown: Any, question: str, fps: float | None = None) -> dict[str, Any]:
    """What the model takes for one image, or the frames of a video (so many per second), and one question."""
    from dymu.families.resolve import resolve
    from dymu.prompting import check_length, inputs_for, video_inputs_for

    if not isinstance(shown, list):
        what, inputs = "the image", inputs_for(loaded.model, loaded.processor, [([shown], question)])
    elif "video" in resolve(loaded.model).placeholders:
        what = f"{len(shown)} frames"
        inputs = video_inputs_for(loaded.model, loaded.processor, shown, question, fps)
    else:
        raise BadModel(NO_VIDEOS)
    check_length(loaded.model, inputs, what)
    return inputs


def answer(loaded: Loaded, inputs: dict[str, Any], max_new_tokens: int) -> tuple[str, int | None]:
    """The model's greedy answer, and the bytes of its KV cache at the end of it; None where it keeps no cache."""
    from dymu.hooks.cache import cache_bytes
    from dymu.prompting import generate

    texts, cache = generate(loaded.model, loaded.processor, inputs, max_new_tokens)
    return texts[0], None if cache is None else cache_bytes(cache)


def _source(name: str) -> str:
    """The name as transformers takes it; what is no model folder and no hub name is refused."""
    path = expanded(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadModel(
                f"{name} is a folder without a config.json, so it holds no model in Hugging Face "
                "format: name the folder that does."
            )
        return str(path)
    if path.exists():
        raise BadModel(f"{name} is a file: name the folder that holds the model.")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or name.startswith("models/"):
        raise BadModel(f"{name} does not exist: check the path.")
    return name


def _file(source: str, name: str, revision: str | None) -> Path:
    """A file of a model, fetched where it is on the hub."""
    if Path(source).is_dir():
        return Path(source) / name
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, name, revision=revision))
