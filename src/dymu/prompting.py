"""From questions about images to what a model takes, and from what it generates to answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor

from dymu.errors import BadPrompt
from dymu.families.resolve import resolve
from dymu.hooks.versions import cache_of
from dymu.item import Item

_LLAVA_PROMPT = "USER: {items}\n{question} ASSISTANT:"


def placeholder_of(processor: Any, kind: str = "image") -> str:
    """What stands for an image or video in a text: some processors write another word in the prompt in its place."""
    token: str | None = getattr(processor, f"{kind}_placeholder_token", None) or getattr(
        processor, f"{kind}_token", None
    )
    return token or ""


def prompt(processor: Any, question: str, items: int = 1, kind: str = "image") -> str:
    """The question in the words that the model was trained on, with a placeholder for each image or video ahead of it.

    Raises:
        BadPrompt: see `check_question`, or the chat template has another number of placeholders than `items`.
    """
    check_question(processor, question, kind)
    placeholder = placeholder_of(processor, kind)
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


def check_question(processor: Any, question: str, kind: str = "image") -> None:
    """Raises: BadPrompt, where the question holds a placeholder, or half of a character, which no tokenizer takes."""
    placeholder = placeholder_of(processor, kind)
    if placeholder in question:
        raise BadPrompt(
            f"the question holds {placeholder}, which stands for {'an' if kind == 'image' else 'a'} {kind}, and each "
            f"{kind} gets its place by itself: ask without it."
        )
    try:
        question.encode()
    except UnicodeEncodeError as error:
        half = ascii(question[error.start])
        raise BadPrompt(
            f"the question holds {half}, half of a character, which no tokenizer takes: mend it."
        ) from error


def inputs_for(model: nn.Module, processor: Any, asked: Sequence[tuple[Sequence[Image.Image], str]]) -> dict[str, Any]:
    """What the model takes for a batch of (images, question), padded on the left, on the model's device."""
    texts = [prompt(processor, question, len(images)) for images, question in asked]
    images = [image for images, _ in asked for image in images]
    return processed(model, processor, texts, images=images or None)


def video_inputs_for(
    model: nn.Module, processor: Any, frames: Sequence[Image.Image], question: str, fps: float | None = None
) -> dict[str, Any]:
    """What the model takes for a question about a video.

    Args:
        fps: of these frames; a model that reads at what time each is shown assumes its own rate where it is left out.
    """
    seen = {"total_num_frames": len(frames), "fps": fps, "frames_indices": list(range(len(frames)))}
    text = prompt(processor, question, kind="video")
    return processed(model, processor, [text], videos=[list(frames)], video_metadata=[seen])


def processed(model: nn.Module, processor: Any, texts: list[str], **items: Any) -> dict[str, Any]:
    """What the model takes for prompts that hold placeholders, and their `images` or `videos`, see `inputs_for`."""
    like: Any = model
    return dict(_called(processor, texts, **items).to(like.device, dtype=like.dtype))


def pixels_for(processor: Any, images: Sequence[Image.Image]) -> Any:
    """What the model gets of images, each in a prompt of its own: some processors cut them into tiles which their image
    processor by itself leaves whole."""
    return _called(processor, [placeholder_of(processor)] * len(images), images=list(images))


def _called(processor: Any, texts: list[str], **items: Any) -> Any:
    counts = [text.count(placeholder_of(processor) or "\0") for text in texts]
    images = items.get("images")
    if images is not None and sum(counts) == len(images):  # some processors ask for the images of each prompt
        ends = list(accumulate(counts))
        items["images"] = [list(images[end - count : end]) for end, count in zip(ends, counts, strict=True)]
    if "videos" in items:  # whose frames were chosen
        items["do_sample_frames"] = False
        if hasattr(processor.video_processor, "use_token_compression"):
            items["use_token_compression"] = False
    return processor(
        text=texts, return_tensors="pt", padding=len(texts) > 1, padding_side="left",
        add_special_tokens=adds_special_tokens(processor.tokenizer, texts[0]), **items,
    )  # fmt: skip


def check_length(model: Any, inputs: dict[str, Any], what: str) -> None:
    """Raises: BadPrompt, where `what`, with the question, is longer than the language model was made for."""
    tokens = inputs["input_ids"].shape[1]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", tokens)
    if tokens > limit:
        raise BadPrompt(
            f"{what} and the question make a prompt of {tokens:,} tokens, more than the {limit:,} that the language "
            "model was made for: take a smaller image, or fewer frames (--frames)."
        )


def image_tokens(model: Any, inputs: dict[str, Any]) -> list[int]:
    """Image tokens of each prompt, none merged."""
    counts: list[int] = (inputs["input_ids"] == resolve(model).placeholders["image"]).sum(1).tolist()
    return counts


def items_by_prompt(model: Any, inputs: dict[str, Any], items: Sequence[Item]) -> list[list[Item]]:
    """The image items of a call, prompt by prompt: an image may be several (its tiles), or a prompt's images one."""
    left, of_prompts = iter(items), list[list[Item]]()
    for count in image_tokens(model, inputs):
        of_prompts.append([])
        while count > 0:
            of_prompts[-1].append(next(left))
            count -= len(of_prompts[-1][-1].leaders)
    return of_prompts


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the chat template has left the first special token to the tokenizer, which would else double it."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)


def generate(model: nn.Module, processor: Any, inputs: dict[str, Any], max_new_tokens: int) -> tuple[list[str], Any]:
    """The model's greedy answers to a batch, and the KV cache at the end of them."""
    new, output = _generate(model, inputs, max_new_tokens)
    return _texts(processor, new), cache_of(output)


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its text, its tokens [T] with the one that ends it, and the logits [T, V] they came from."""

    text: str
    tokens: Tensor
    logits: Tensor


def answers(model: nn.Module, processor: Any, inputs: dict[str, Any], max_new_tokens: int) -> list[Answer]:
    """The model's greedy answers to a batch."""
    new, output = _generate(model, inputs, max_new_tokens, output_logits=True)
    logits = torch.stack(output.logits, dim=1)
    ends = torch.tensor(_end_tokens(model), dtype=new.dtype, device=new.device)
    ended = torch.isin(new, ends).cumsum(1)
    lengths = (ended == 0).sum(1) + (ended[:, -1] > 0)
    return [
        Answer(text, new[row, :length], logits[row, :length])
        for row, (text, length) in enumerate(zip(_texts(processor, new), lengths.tolist(), strict=True))
    ]


def logits_of(model: nn.Module, inputs: dict[str, Any], said: Sequence[Tensor]) -> list[Tensor]:
    """The logits [T, V] from which a model would choose each token of what is said after a batch of prompts.

    They are those of generation in which these tokens are chosen, so that whatever reads the prompt does not read them.

    Args:
        said: the tokens [T] after each prompt, none of them a placeholder.
    """
    length = max(map(len, said))
    if not length:
        return [torch.empty(0, 1) for _ in said]
    stock: Any = model
    no_token = len(stock.get_output_embeddings().weight)  # so that nothing ends early
    _, output = _generate(
        model, inputs, length, output_logits=True, logits_processor=[_Said(inputs, said)], eos_token_id=no_token,
        pad_token_id=0,
    )  # fmt: skip
    logits = torch.stack(output.logits, dim=1)
    return [of_row[: len(tokens)] for of_row, tokens in zip(logits, said, strict=True)]


class _Said(LogitsProcessor):
    """Leaves nothing to choose but what is said [T] after each prompt, then anything."""

    def __init__(self, inputs: dict[str, Any], said: Sequence[Tensor]) -> None:
        self._width = inputs["input_ids"].shape[1]
        anything = int(max(said, key=len)[0])
        self._said = pad_sequence(list(said), batch_first=True, padding_value=anything)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        chosen = self._said[:, input_ids.shape[1] - self._width, None].to(scores.device)
        return torch.full_like(scores, -math.inf).scatter(1, chosen, 0.0)


@torch.inference_mode()
def _generate(model: nn.Module, inputs: dict[str, Any], max_new_tokens: int, **more: Any) -> tuple[Tensor, Any]:
    """The tokens that the model adds to each prompt, greedily, and all of the output."""
    stock: Any = model
    output = stock.generate(
        **inputs, do_sample=False, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **more
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], output


def _texts(processor: Any, new: Tensor) -> list[str]:
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def _end_tokens(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]
