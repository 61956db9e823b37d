"""From questions about images to what a model takes, and from what it generates to answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from dymu.errors import BadPrompt
from dymu.families.resolve import resolve
from dymu.hooks.versions import cache_of

_LLAVA_PROMPT = "USER: {items}\n{question} ASSISTANT:"


def prompt(processor: Any, question: str, items: int = 1, kind: str = "image") -> str:
    """The question in the words that the model was trained on, with a placeholder for each image or video ahead of it.

    Raises:
        BadPrompt: the question holds a placeholder, or the chat template has another number of them than `items`.
    """
    placeholder = getattr(processor, f"{kind}_token")
    if placeholder in question:
        raise BadPrompt(
            f"the question holds {placeholder}, which stands for {'an' if kind == 'image' else 'a'} {kind}, and each "
            f"{kind} gets its place by itself: ask without it."
        )
    if processor.chat_template is None:
        return _LLAVA_PROMPT.format(items=placeholder * items, question=question)
    content = [{"type": kind}] * items + [{"type": "text", "text": question}]
    text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    count = text.count(placeholder)
    if count != items:
        raise BadPrompt(
            f"this model's chat template gives {count} {kind} placeholders ({placeholder}) for {items} "
            f"{kind}{'s' * (items > 1)}: use a model whose template gives each {kind} its own."
        )
    return text


def inputs_for(model: nn.Module, processor: Any, asked: Sequence[tuple[Sequence[Image.Image], str]]) -> dict[str, Any]:
    """What the model takes for a batch of (images, question), padded on the left, on the model's device."""
    texts = [prompt(processor, question, len(images)) for images, question in asked]
    images = [image for images, _ in asked for image in images]
    return processed(model, processor, texts, images=images or None)


def video_inputs_for(model: nn.Module, processor: Any, frames: Sequence[Image.Image], question: str) -> dict[str, Any]:
    """What the model takes for a question about a video."""
    return processed(model, processor, [prompt(processor, question, kind="video")], videos=[list(frames)])


def processed(model: nn.Module, processor: Any, texts: list[str], **items: Any) -> dict[str, Any]:
    """What the model takes for prompts that hold placeholders, and their `images` or `videos`, see `inputs_for`."""
    inputs = processor(
        text=texts, return_tensors="pt", padding=len(texts) > 1, padding_side="left",
        add_special_tokens=adds_special_tokens(processor.tokenizer, texts[0]), **items,
    )  # fmt: skip
    like: Any = model
    return dict(inputs.to(like.device, dtype=like.dtype))


def image_tokens(model: Any, inputs: dict[str, Any]) -> list[int]:
    """Image tokens of each prompt, none merged."""
    counts: list[int] = (inputs["input_ids"] == resolve(model).placeholders["image"]).sum(1).tolist()
    return counts


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the chat template has left the first special token to the tokenizer, which would else double it."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)


@torch.inference_mode()
def generate(model: nn.Module, processor: Any, inputs: dict[str, Any], max_new_tokens: int) -> tuple[list[str], Any]:
    """The model's greedy answers to a batch, and the KV cache at the end of them."""
    stock: Any = model
    output = stock.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, return_dict_in_generate=True)
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts], cache_of(output)
