"""Write two disjoint folders of images: to calibrate thresholds on, and to test budgets on.

``python -m training.calibration_images FOLDER`` makes FOLDER/calibrate and FOLDER/test. Both mix
composed scenes with real photos; neither shares a photo or a scene with the evaluation.
"""

from pathlib import Path

import typer
from PIL import Image

from training.assets import photos
from training.scenes import compose

CALIBRATE_SEED, TEST_BUDGETS_SEED = 3, 4


def main(folder: Path, calibrate: int = 240, test: int = 100) -> None:
    """Two thirds scenes, one third photos, each as a JPEG."""
    pictures = photos("train", "background-train")
    of_folder = {"calibrate": [p for k, p in enumerate(pictures) if k % 3 < 2], "test": pictures[2::3]}
    for name, count, seed in (
        ("calibrate", calibrate, CALIBRATE_SEED),
        ("test", test, TEST_BUDGETS_SEED),
    ):
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        chosen = of_folder[name][: count // 3]
        for number, photo in enumerate(chosen):
            image = Image.open(photo.path).convert("RGB")
            image.thumbnail((640, 640), Image.Resampling.LANCZOS)
            image.save(target / f"photo-{number:03}.jpg", quality=92)
        written, index = len(chosen), 0
        while written < count:
            scene = compose("train", seed, index)
            if scene.facts.photo is None:
                scene.image.save(target / f"scene-{index:03}.jpg", quality=95)
                written += 1
            index += 1
        print(f"{target}: {written} images, {len(chosen)} of them photos")


if __name__ == "__main__":
    typer.run(main)
