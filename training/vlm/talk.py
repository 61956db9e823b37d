"""Text that keeps the language model able to talk: its own answers to written prompts.

Learning them from itself holds it where it was, as a penalty on the distance to it would, without a second forward pass
in every step; and prompts and answers are nobody else's.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from training.vlm import base
from training.vlm.train import SEED, default_device

REQUESTS = (
    "What is {}?", "Explain {} to a child.", "Write two sentences about {}.", "Why is {} important?",
    "Give me three facts about {}.", "Tell me a short story about {}.", "Write a short poem about {}.",
    "What do people often get wrong about {}?", "How would you describe {} to someone who has never heard of it?",
    "List five words that have to do with {}.", "What question would you ask an expert on {}?",
    "Summarise what you know about {} in one sentence.", "How did people think about {} a hundred years ago?",
    "What are the advantages and disadvantages of {}?", "Write an email to a friend about {}.",
    "What could a beginner do first to learn about {}?",
)  # fmt: skip

TOPICS = (
    "the moon", "baking bread", "the water cycle", "friendship", "a good night's sleep", "electric cars", "volcanoes",
    "learning to swim", "the printing press", "bees", "chess", "a rainy day", "recycling", "the human heart", "maps",
    "prime numbers", "gravity", "the ocean", "growing tomatoes", "public libraries", "the number zero", "music",
    "bicycles", "working from home", "photosynthesis", "a long train journey", "museums", "tea", "democracy", "robots",
    "writing a letter", "winter", "rivers", "the alphabet", "running", "telescopes", "languages", "markets", "honesty",
    "dinosaurs", "clouds", "computers", "bridges", "birds that migrate", "breakfast", "the seasons", "paper", "courage",
    "weather forecasts", "teaching", "forests", "clocks", "soap", "budgeting", "dreams", "lighthouses", "football",
    "the desert", "salt", "patience", "gardens", "vaccines", "the colour blue", "moving to a new city",
)  # fmt: skip

PLAIN = (
    "Hello!", "Good morning, how are you?", "Who are you?", "What can you do?", "Thank you very much.",
    "What is the capital of France?", "What is the capital of Japan?", "How many days are there in a week?",
    "What is 7 plus 5?", "What is 12 times 3?", "Is the sun a star? Answer with yes or no.", "Name a fruit.",
    "Name three colours.", "Translate 'good night' into Spanish.", "What is the opposite of cold?",
    "Correct this sentence: She go to school every day.", "Which is larger, a mouse or an elephant?",
    "Finish the sentence: The early bird", "Write a title for a book about a lost dog.", "Give me a riddle.",
    "Can you see images?", "Say something kind.", "How do I boil an egg?", "What should I pack for a weekend trip?",
)  # fmt: skip


def prompts() -> list[str]:
    """All of them, in an order that does not begin with one topic."""
    crossed = [request.format(topic) for request, topic in product(REQUESTS, TOPICS)]
    return [*PLAIN, *(crossed[k] for k in np.random.default_rng(SEED).permutation(len(crossed)))]


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, asked: list[str], longest: int
) -> list[str]:
    """The untrained model's answers to a batch; an answer cut short ends where its last sentence does, or is empty."""
    texts = [
        processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        for prompt in asked
    ]
    inputs = processor.tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    ).to(model.device)
    output = model.generate(
        **inputs, max_new_tokens=longest, do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.05,
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id,
    )  # fmt: skip
    answers = []
    for row in output[:, inputs["input_ids"].shape[1] :]:
        text = processor.tokenizer.decode(row, skip_special_tokens=True).strip()
        if processor.tokenizer.eos_token_id not in row.tolist():
            text = text[: max(text.rfind(mark) for mark in ".!?") + 1]
        answers.append(text)
    return answers


def main(
    output: Annotated[Path | None, typer.Option(help="A JSON object a line.")] = None,
    count: Annotated[int, typer.Option(help="Prompts, from the beginning of the list.")] = 1024,
    longest: Annotated[int, typer.Option(help="Tokens in an answer.")] = 140,
    batch: Annotated[int, typer.Option(help="Prompts answered together.")] = 256,
) -> None:
    """Let the untrained language model answer."""
    device = default_device()
    torch.manual_seed(SEED)
    model, processor = base.build_model(SEED)
    model = model.to(device, torch.bfloat16 if device.type != "cpu" else torch.float32)
    asked = prompts()[:count]
    rows = []
    for begin in range(0, len(asked), batch):
        part = asked[begin : begin + batch]
        rows += list(zip(part, answers(model, processor, part, longest), strict=True))
        print(f"{len(rows)} of {len(asked)}", flush=True)
    path = output or base.folder() / "talk.jsonl"
    text = "".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in rows if answer)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
