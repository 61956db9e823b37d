"""Ask about a video, and draw which patches of its frames merge:
`python examples/video.py MODEL VIDEO [QUESTION] [SHEET.png]`, with a model that takes videos (the demo takes none)."""

import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu
from dymu.media.videos import load
from dymu.prompting import video_inputs_for

if len(sys.argv) < 3:
    sys.exit("name a model that takes videos, and a video or a folder of frames: python examples/video.py MODEL VIDEO")
DEFAULTS = ("What happens in this video?", "frames.png")
name, video, question, sheet = (*sys.argv[1:5], *DEFAULTS[len(sys.argv) - 3 :])

model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
processor = AutoProcessor.from_pretrained(name)
shown = load(video, frames=8)  # spread over its length
inputs = video_inputs_for(model, processor, shown.frames, question, shown.fps)

with dymu.apply(model, name, budget=0.3) as handle:  # each frame keeps 0.3 on average; see also per_second
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    print(f"{handle.last.kept[0]} of {handle.last.original[0]} tokens, {handle.last.cache_bytes_saved:,} bytes saved")
    handle.last.draw(shown.frames).save(sheet)
