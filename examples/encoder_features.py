"""Features of a vision encoder alone, of merged tokens and back on the grid:
`python examples/encoder_features.py [ENCODER] [PHOTO ...]`."""

import sys

from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText

import dymu

name = sys.argv[1] if sys.argv[1:] else "models/demo"
paths = sys.argv[2:] or ["examples/photo.jpg", "examples/pyramid.jpg", "examples/scene.png"]
if name == "models/demo":
    encoder = AutoModelForImageTextToText.from_pretrained(name).model.vision_tower  # a DINOv2
else:
    encoder = AutoModel.from_pretrained(name)  # such as facebook/dinov2-small
encoder = encoder.eval().requires_grad_(False)
processor = AutoImageProcessor.from_pretrained(name)
thresholds = dymu.calibrate(encoder, processor, paths, budgets=[0.3])  # better: hundreds of images

pixels = processor(images=[Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
stock = encoder(**pixels).last_hidden_state
with dymu.apply(encoder, thresholds) as handle:
    features = encoder(**pixels).last_hidden_state  # of stock shape: merged ones are copied to all their places
    patches = features[:, -handle.last.original[0] :]  # without class token and registers
    merged = handle.last.map.average(patches)  # [photos, merged tokens, channels]
    for number, (path, kept) in enumerate(zip(paths, handle.last.kept, strict=True)):
        alike = cosine_similarity(features[number], stock[number], dim=-1).mean()
        print(f"{path}: {kept} of {patches.shape[1]} features; cosine to the untouched ones {alike:.3f}")
    print(f"all of them: {list(merged.shape)}, where those that keep less end in zeros")
