"""Ask several questions about several photos in one batch, each of which merges by itself:
`python examples/batch_of_questions.py [MODEL] [PHOTO ...]`."""

import sys

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu

name = sys.argv[1] if sys.argv[1:] else "models/demo"
paths = sys.argv[2:] or ["examples/photo.jpg", "examples/pyramid.jpg", "examples/scene.png"]
questions = ["What is this?", "How many objects are there?"]

model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
processor = AutoProcessor.from_pretrained(name)
asked = [(path, question) for path in paths for question in questions]
texts = []
for _, question in asked:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
images = [[Image.open(path).convert("RGB")] for path, _ in asked]  # of each prompt
inputs = processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")

with dymu.apply(model, budget=0.3) as handle:
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    kept = handle.last.kept  # of each image, in the order of the prompts
answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
for (path, question), answer, tokens in zip(asked, answers, kept, strict=True):
    print(f"{path} ({tokens} tokens): {question} {answer.strip()}")
