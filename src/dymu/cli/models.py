"""From a folder or a hub name to a model ready to be asked, and from a question to its prompt."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dymu.cli.errors import BadModel, one_line
from dymu.errors import BadPrompt, DymuError, UnsupportedModel
from dymu.thresholds import beside

DEMO_BUDGET = 0.30


@dataclass(frozen=True)
class Loaded:
    """A model with its processor."""

    model: Any
    processor: Any


def demo_model() -> str:
    """The demo model's folder: `DYMU_DEMO_MODEL`, else the one in the checkout this runs from."""
    named = os.environ.get("DYMU_DEMO_MODEL")
    folder = Path(named) if named else Path(__file__).parents[3] / "models" / "demo"
    if not (folder / "config.json").is_file():
        where = "the demo model comes with the repository, and this dymu was installed without it"
        if named:
            where = f"DYMU_DEMO_MODEL names {folder}, which holds no model"
        raise BadModel(
            f"{where}: say which model to use, dymu run with --model, other commands as their first argument."
        )
    return str(folder)


def thresholds_beside(model: str) -> Path:
    """The thresholds file that a model folder ships."""
    return beside(_source(model), "--thresholds")


def load(name: str) -> Loaded:
    """Model and processor from a folder or a hub name, on the accelerator if there is one."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig

    from dymu.families import FAMILIES

    source = _source(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        config, _ = PreTrainedConfig.get_config_dict(source)
        model_type = config.get("model_type", "(none)")
        if model_type not in FAMILIES:
            raise UnsupportedModel(
                f"{name} is of the type {model_type!r}, which dymu does not know; it knows "
                f"{', '.join(sorted(FAMILIES))}: docs/add-a-family.md says how to add one."
            )
        processor = AutoProcessor.from_pretrained(source)
        # CPUs are slow in bfloat16, so there the weights are widened.
        model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto" if accelerator else torch.float32)
    except (MemoryError, DymuError):
        raise
    except ImportError as error:
        missing = "torchvision" if "torchvision" in str(error).lower() else one_line(error).rstrip(".")
        raise BadModel(
            f"{name} needs a package that is not installed ({missing}): install it, for example with "
            "`pip install torchvision`."
        ) from error
    except Exception as error:  # safetensors, tokenizers, json and the hub each raise their own
        why = one_line(error).rstrip(".")
        if Path(name).expanduser().is_dir():
            sentence = f"{name} could not be loaded ({why}): check that the folder is whole."
        else:
            sentence = f"{name} is no folder here, and the hub did not give it ({why}): check its name."
        raise BadModel(sentence) from error
    return Loaded(model.to(accelerator or "cpu").eval(), processor)


def ask(loaded: Loaded, shown: Any, question: str) -> dict[str, Any]:
    """What the model takes for one image, or the frames of a video, and one question."""
    from dymu.families.resolve import resolve
    from dymu.prompting import inputs_for, video_inputs_for

    if not isinstance(shown, list):
        what, inputs = "the image", inputs_for(loaded.model, loaded.processor, [([shown], question)])
    elif "video" in resolve(loaded.model).placeholders:
        what, inputs = f"{len(shown)} frames", video_inputs_for(loaded.model, loaded.processor, shown, question)
    else:
        raise BadModel(
            "this model takes no videos: take one that does, such as a llava_onevision, or show it an image."
        )
    tokens, limit = inputs["input_ids"].shape[1], loaded.model.config.get_text_config().max_position_embeddings
    if tokens > limit:
        raise BadPrompt(
            f"{what} and the question make a prompt of {tokens:,} tokens, more than the {limit:,} that the language "
            "model was made for: take a smaller image, or fewer frames with --frames."
        )
    return inputs


def answer(loaded: Loaded, inputs: dict[str, Any], max_new_tokens: int) -> tuple[str, int]:
    """The model's greedy answer, and the bytes of its KV cache at the end of it."""
    from dymu.hooks.cache import cache_bytes
    from dymu.prompting import generate

    texts, cache = generate(loaded.model, loaded.processor, inputs, max_new_tokens)
    return texts[0], cache_bytes(cache)


def _source(name: str) -> str:
    """The name as transformers takes it; what is no model folder and no hub name is refused."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadModel(
                f"{name} is a folder without a config.json, so it holds no model in Hugging Face "
                "format: name the folder that does."
            )
        return str(path)
    if path.exists():
        raise BadModel(f"{name} is a file: name the folder that holds the model.")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BadModel(f"{name} does not exist: check the path.")
    return name
