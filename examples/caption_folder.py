"""Caption the images of a folder, and go on where an earlier run was stopped:
`python examples/caption_folder.py [MODEL] [FOLDER] [CAPTIONS.jsonl]`, as `dymu caption` does."""

import sys
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu
from dymu.captioning import Captioner, caption, sources_in

DEFAULTS = ("models/demo", "examples", "captions.jsonl")
name, folder, captions = (*sys.argv[1:4], *DEFAULTS[len(sys.argv) - 1 :])

model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
processor = AutoProcessor.from_pretrained(name)
thresholds = dymu.Thresholds.load(name)
handle = dymu.apply(model, thresholds, budget=0.3)
captioner = Captioner(model, processor, handle, "What is this?", max_new_tokens=16)

sources, _ = sources_in(Path(folder))
rows = caption(
    lambda batches: map(captioner, batches), captioner.header(folder, thresholds, "exact"), sources, captions
)
for row in rows.values():
    print(f"{row.image}: {row.error or row.caption} ({row.kept} of {row.original} image tokens)")
