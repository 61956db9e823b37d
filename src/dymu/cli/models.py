"""From a folder or a hub name to a model ready to be asked, and from a question to its prompt."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dymu.cli.errors import BadModel, one_line
from dymu.errors import BadPrompt, BadThresholds, UnsupportedModel

DEMO_BUDGET = 0.30
THRESHOLDS_NAME = "thresholds.json"


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
        where = (
            f"DYMU_DEMO_MODEL names {folder}, which holds no model"
            if named
            else ("the demo model comes with the repository, and this dymu was installed without it")
        )
        raise BadModel(f"{where}: say which model to use with --model.")
    return str(folder)


def thresholds_beside(model: str) -> Path:
    """The thresholds that a model folder ships."""
    path = Path(_source(model)) / THRESHOLDS_NAME
    if path.is_file():
        return path
    raise BadThresholds(
        f"{model} ships no {THRESHOLDS_NAME}: name one with --thresholds, or make it with "
        f"`dymu calibrate {model} IMAGES... -b 0.3 -o {THRESHOLDS_NAME}`."
    )


def load(name: str) -> Loaded:
    """Model and processor from a folder or a hub name, on the accelerator if there is one."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from dymu.families import FAMILIES

    source = _source(name)
    with _as_bad_model(name):
        model_type = _model_type(source)
    if model_type not in FAMILIES:
        raise UnsupportedModel(
            f"{name} is of the type {model_type!r}, which dymu does not know; it knows "
            f"{', '.join(sorted(FAMILIES))}: docs/add-a-family.md says how to add one."
        )
    accelerated = torch.accelerator.is_available()
    with _as_bad_model(name):
        processor = AutoProcessor.from_pretrained(source)
        # CPUs are slow in bfloat16, so there the weights are widened.
        model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto" if accelerated else torch.float32)
    if accelerated:
        model = model.to(torch.accelerator.current_accelerator())
    return Loaded(model.eval(), processor)


def ask(loaded: Loaded, shown: Any, question: str) -> dict[str, Any]:
    """What the model takes for one image, or the frames of a video, and one question."""
    from dymu.asking import inputs_for, video_inputs_for
    from dymu.families import FAMILIES, resolve

    if not isinstance(shown, list):
        return _checked(loaded, inputs_for(loaded.model, loaded.processor, [([shown], question)]), "the image")
    if "video" not in resolve(loaded.model, FAMILIES).placeholders:
        raise BadModel(
            "this model takes no videos: take one that does, such as a llava_onevision, or show it an image."
        )
    inputs = video_inputs_for(loaded.model, loaded.processor, shown, question)
    return _checked(loaded, inputs, f"{len(shown)} frames")


def _checked(loaded: Loaded, inputs: dict[str, Any], what: str) -> dict[str, Any]:
    """The inputs, unless they are longer than the language model was made for."""
    tokens, limit = inputs["input_ids"].shape[1], loaded.model.config.get_text_config().max_position_embeddings
    if tokens > limit:
        raise BadPrompt(
            f"{what} and the question make a prompt of {tokens:,} tokens, more than the {limit:,} that the language "
            "model was made for: take a smaller image, or fewer frames with --frames."
        )
    return inputs


def answer(loaded: Loaded, inputs: dict[str, Any], max_new_tokens: int) -> tuple[str, int]:
    """The model's greedy answer, and the bytes of its KV cache at the end of it."""
    from dymu.asking import generate
    from dymu.unmerging import cache_bytes

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


def _model_type(source: str) -> str:
    from transformers import PreTrainedConfig

    config, _ = PreTrainedConfig.get_config_dict(source)
    return str(config.get("model_type", "(none)"))


@contextmanager
def _as_bad_model(name: str) -> Iterator[None]:
    """Whatever loading stumbles over, in one sentence; a lack of memory is passed on as it is."""
    try:
        yield
    except MemoryError:
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
