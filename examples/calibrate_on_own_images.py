"""Find thresholds on a folder of your images, and tell beforehand what another will keep:
`python examples/calibrate_on_own_images.py [MODEL] [FOLDER] [THRESHOLDS.json] [PHOTO]`."""

import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu

DEFAULTS = ("models/demo", "src/dymu/bench/photos", "thresholds.json", "examples/photo.jpg")
name, folder, path, photo = (*sys.argv[1:5], *DEFAULTS[len(sys.argv) - 1 :])

model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
processor = AutoProcessor.from_pretrained(name)
thresholds = dymu.calibrate(model, processor, folder, budgets=[0.15, 0.3, 0.5])  # better: hundreds of images
thresholds.save(path)

for entry in thresholds.calibrated:
    print(f"budget {entry.budget:g}: these images keep {entry.achieved:.1f} ± {entry.sd:.1f}")
if thresholds.forecasts is not None:  # of 20 images or more
    forecast = thresholds.forecast(photo, budget=0.3, tokens=processor)
    print(f"{photo}: {forecast.expected:.0f} expected, {forecast.reserve} in reserve, of {forecast.most}")
with dymu.apply(model, path, budget=0.3) as handle:
    print(handle)
