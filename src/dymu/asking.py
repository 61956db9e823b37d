"""From questions about images to what a model takes, and from what it generates to answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from dymu.errors import BadPrompt

_LLAVA_PROMPT = "USER: {images}\n{question} ASSISTANT:"


def prompt(processor: Any, question: str, images: int = 1) -> str:
    """The question in the words that the model was trained on, with a placeholder for each image ahead of it.

    Raises:
        BadPrompt: the question holds a placeholder of its own, or the chat template places other than `images`.
    """
    placeholder = processor.image_token
    if placeholder in question:
        raise BadPrompt(
            f"the question holds {placeholder}, which stands for an image, and each image gets its place by itself: "
            "ask without it."
        )
    if processor.chat_template is None:
        return _LLAVA_PROMPT.format(images=placeholder * images, question=question)
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    places = text.count(placeholder)
    if places != images:
        raise BadPrompt(
            f"this model's chat template gives {places} image placeholders ({placeholder}) for {images} "
            f"image{'s' * (images > 1)}: use a model whose template gives each image its own."
        )
    return text


def inputs_for(model: nn.Module, processor: Any, asked: Sequence[tuple[Sequence[Image.Image], str]]) -> dict[str, Any]:
    """What the model takes for a batch of (images, question), padded on the left, on the model's device."""
    texts = [prompt(processor, question, len(images)) for images, question in asked]
    images = [image for images, _ in asked for image in images]
    inputs = processor(
        images=images or None, text=texts, return_tensors="pt", padding=len(texts) > 1, padding_side="left",
        add_special_tokens=adds_special_tokens(processor.tokenizer, texts[0]),
    )  # fmt: skip
    like: Any = model
    return dict(inputs.to(like.device, dtype=like.dtype))


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
    return [text.strip() for text in texts], output.past_key_values
