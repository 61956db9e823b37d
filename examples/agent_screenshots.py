"""An agent that sees a screenshot in each turn, and keeps older ones with fewer tokens:
`python examples/agent_screenshots.py [MODEL] [SCREENSHOT ...]`."""

import sys

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu

NEWEST, BEFORE, OLDER = 0.5, 0.3, 0.15  # parts of an image's tokens
name = sys.argv[1] if sys.argv[1:] else "models/demo"
paths = sys.argv[2:] or ["examples/photo.jpg", "examples/pyramid.jpg", "examples/scene.png"]

model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
processor = AutoProcessor.from_pretrained(name)
conversation, screenshots = [], []
with dymu.apply(model, budget=NEWEST) as handle:
    for path in paths:
        screenshots.append(Image.open(path).convert("RGB"))
        content = [{"type": "image"}, {"type": "text", "text": "What do you see?"}]
        conversation.append({"role": "user", "content": content})
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        inputs = processor(images=screenshots, text=text, return_tensors="pt")
        budgets = ([OLDER] * len(screenshots) + [BEFORE, NEWEST])[-len(screenshots) :]  # one for each image
        output = model.generate(**inputs, dymu_budget=budgets, max_new_tokens=16, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        tokens = " + ".join(map(str, handle.last.kept))
        print(f"turn {len(screenshots)}: {tokens} of {sum(handle.last.original)} image tokens: {answer}")
