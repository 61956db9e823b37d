"""`dymu vllm`, started as a user does, and asked over HTTP."""

import base64
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.load import PHOTOS, Server, picture, serving, under_load  # noqa: E402

FLAGS = ("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--limit-mm-per-prompt", '{"image": 2}')


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serving(["vllm", str(ROOT / "models" / "demo"), "-b", "0.3", *FLAGS], log) as running:
        yield running


def test_an_image_and_a_budget_of_its_own(server: Server) -> None:
    for budget in ("untouched", 0.3, 0.15):
        status, text = server.ask(picture(0), "What is this?", budget, 8)
        assert status == 200, text
        assert text.strip()


def test_images_of_sixteen_bits_are_not_clipped(server: Server) -> None:
    grey = np.asarray(Image.open(PHOTOS[0]).convert("L"))
    texts = []
    for pixels in (grey, 257 * grey.astype(np.uint16)):
        packed = io.BytesIO()
        Image.fromarray(pixels).save(packed, "PNG")
        image = f"data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}"
        texts.append(server.ask(image, "What is this?", 0.3, 8))
    assert texts[0] == texts[1]
    white = io.BytesIO()
    Image.new("L", grey.shape[::-1], 255).save(white, "PNG")
    image = f"data:image/png;base64,{base64.b64encode(white.getvalue()).decode()}"
    assert server.ask(image, "What is this?", 0.3, 8) != texts[0]


@pytest.mark.parametrize(
    ("image", "budget", "said"),
    [
        ("data:image/png;base64,AAAA", 0.3, "image"),
        (picture(0), 1, "outside"),
        (picture(0), "few", "a budget is a number"),
        (picture(0), None, "a budget is a number"),
    ],
    ids=["broken image", "budget", "word", "nothing"],
)
def test_errors_are_sentences(server: Server, image: str, budget: object, said: str) -> None:
    status, text = server.ask(image, "What is this?", budget, 8)
    assert status == 400, text
    assert said in json.loads(text)["error"]["message"]


def test_many_clients_some_of_them_wrong(server: Server) -> None:
    done = under_load(server, requests=60, clients=8, broken=10, words=8)
    assert done["others"] == []
    assert (done["right"], done["refused"], done["alive"]) == (50, 10, True)
    assert len(PHOTOS) > 1
