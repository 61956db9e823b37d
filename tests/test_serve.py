"""transformers' own server with DyMU applied, asked over HTTP."""

import base64
import contextlib
import io
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu
from dymu.choices import Counting
from dymu.cli.serve import listen
from dymu.errors import DymuError
from dymu.media.images import load
from dymu.prompting import generate, inputs_for
from dymu.serving.transformers_server import Served, app_of
from dymu.serving.vllm import check_flags
from dymu.thresholds import Thresholds

ROOT = Path(__file__).parent.parent
DEMO, PHOTO = ROOT / "models" / "demo", ROOT / "examples" / "photo.jpg"
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served_at(0.3, "mean") as address:
        yield address


@contextlib.contextmanager
def served_at(budget: float, counting: Counting) -> Iterator[str]:
    thresholds = Thresholds.load(DEMO)
    options = {"unmerge": "exact", "cache": "merged"}
    served = Served("demo", str(DEMO), thresholds, budget, counting, options, device="cpu", dtype="float32")
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app_of(served), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()


def data_url(image: Image.Image | bytes) -> str:
    if isinstance(image, Image.Image):
        png = io.BytesIO()
        image.save(png, "PNG")
        image = png.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def body_for(images: list[Any], question: str = QUESTION, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    content = [*parts, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0, **fields}


def posted(url: str, body: Any) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/chat/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return load(PHOTO).image


@pytest.fixture(scope="module")
def expected(photo: Image.Image) -> dict[Any, tuple[str, int]]:
    """By budget: the text, and the tokens that are kept."""
    model = AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(DEMO)
    inputs = inputs_for(model, processor, [([photo], QUESTION)])
    found: dict[Any, tuple[str, int]] = {}
    with dymu.apply(model, DEMO, budget=0.3) as handle:
        for budget in (0.3, 0.15, "untouched"):
            if budget != "untouched":
                handle.budget = budget
            with handle.disabled() if budget == "untouched" else contextlib.nullcontext():
                (text,), _ = generate(model, processor, inputs, 8)
            found[budget] = text, 256 if budget == "untouched" else handle.last.kept[0]
    return found


def test_answers_are_those_of_the_library(url: str, photo: Image.Image, expected: dict[Any, tuple[str, int]]) -> None:
    for budget, (text, kept) in expected.items():
        fields = {} if budget == 0.3 else {"budget": budget}
        status, answer = posted(url, body_for([data_url(photo)], model="demo", **fields))
        assert status == 200, answer
        assert answer["choices"][0]["message"]["content"].strip() == text
        assert answer["usage"]["image_tokens"] == {"original": 256, "kept": kept}
        assert answer["model"] == "demo"


def test_a_stream_says_the_same(url: str, photo: Image.Image, expected: dict[Any, tuple[str, int]]) -> None:
    body = body_for([data_url(photo)], stream=True, budget=0.15)
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
        assert lines[-2] == "data: [DONE]"
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    assert text.strip() == expected[0.15][0]
    assert events[-1]["usage"]["image_tokens"] == {"original": 256, "kept": expected[0.15][1]}


def test_many_clients_each_get_their_own(url: str, photo: Image.Image, expected: dict[Any, tuple[str, int]]) -> None:
    asked = [*expected] * 4

    def ask(budget: Any) -> tuple[str, int]:
        _, answer = posted(url, body_for([data_url(photo)], budget=budget))
        return answer["choices"][0]["message"]["content"].strip(), answer["usage"]["image_tokens"]["kept"]

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, asked)) == [expected[budget] for budget in asked]


def test_strings_that_end_an_answer(url: str, photo: Image.Image, expected: dict[Any, tuple[str, int]]) -> None:
    fields = {"stop": expected[0.3][0][:3], "logit_bias": {"0": -5}, "model": None}
    status, answer = posted(url, body_for([data_url(photo)], **fields))
    assert status == 200, answer
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_budget_for_each_image(url: str, photo: Image.Image, expected: dict[Any, tuple[str, int]]) -> None:
    images = [data_url(photo)] * 3
    status, answer = posted(url, body_for(images, budget=[0.15, None, "untouched"]))
    assert status == 200, answer
    assert answer["usage"]["image_tokens"]["kept"] == expected[0.15][1] + expected[0.3][1] + 256
    status, answer = posted(url, body_for(images, budget=[0.15, 0.3]))
    assert (status, answer["error"]["message"]) == (
        400,
        "2 budgets were given for 3 images: give one for each, or one for all.",
    )
    status, answer = posted(url, body_for(images, budget=[0.15, 0.3, "all"]))
    assert status == 400
    assert "'untouched', not 'all'" in answer["error"]["message"]


@pytest.mark.parametrize("counting", ["at-most", "exactly"])
def test_what_a_budget_says(counting: Counting, photo: Image.Image, expected: dict[Any, tuple[str, int]]) -> None:
    mean = expected[0.15][1]
    with served_at(20, counting) as url:
        for fields, least, most in (({}, 20, 20), ({"budget": 38}, mean, 38), ({"budget": [9, 31]}, 40, 40)):
            images = [data_url(photo)] * (2 if isinstance(fields.get("budget"), list) else 1)
            status, answer = posted(url, body_for(images, **fields))
            assert status == 200, answer
            kept = answer["usage"]["image_tokens"]["kept"]
            assert kept == most if counting == "exactly" else min(least, 20) <= kept <= most
        status, answer = posted(url, body_for([data_url(photo)], budget=300 if counting == "exactly" else 0))
        assert status == 400, answer
        assert ("have 256" if counting == "exactly" else "keep at least 1") in answer["error"]["message"]


def test_text_alone_and_two_images(url: str, photo: Image.Image) -> None:
    _, answer = posted(url, {"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 3})
    assert answer["usage"]["image_tokens"] == {"original": 0, "kept": 0}
    _, answer = posted(url, body_for([data_url(photo), data_url(photo.rotate(90))]))
    assert answer["usage"]["image_tokens"]["original"] == 512


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": 1}, "outside"),
        ({"budget": "few"}, "a budget is a number"),
        ({"budget": True}, "not as the OpenAI API has it"),
        ({"budgett": 48}, "budgett"),
        ({"model": "another"}, "'another'"),
        ({"n": 2}, "'n'"),
        ({"chat_template_kwargs": {"images": ["http://127.0.0.1/a.png"]}}, "'chat_template_kwargs'"),
        ({"generation_config": "{}"}, "'generation_config'"),
        ({"tools": [{"type": "function"}]}, "'tools'"),
        ({"budget": 10**400}, "no image has so many"),
        ({"stop": []}, "stop"),
        ({"stop": "\ud800"}, "half of a character"),
        ({"temperature": 1e-300}, "below"),
        ({"temperature": float("nan")}, "temperature"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("<ima", "ge>")]}]},
            "the question holds <image>",
        ),
        ({"messages": [{"role": "user", "content": "a " * 600_000}]}, "characters"),
        ({"logit_bias": {"99999": 1}}, "99999"),
        ({"frequency_penalty": -1.5}, "frequency_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"messages": [{"role": "user", "content": "<image> what?"}]}, "the question holds <image>"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": []}]}, "tool_calls"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": {"url": "b"}}]}]},
            "and no other",
        ),
        ({"stream": True, "messages": [{"role": "user", "content": "what? " * 3000}]}, "the prompt has"),
        ({"logprobs": True}, "'logprobs'"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "video_url"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": "what? " * 3000}]}, "the prompt has"),
    ],
)
def test_what_a_request_cannot_ask_for(url: str, photo: Image.Image, change: dict[str, Any], said: str) -> None:
    status, answer = posted(url, body_for([data_url(photo)]) | change)
    assert status == 400, answer
    assert said in answer["error"]["message"]


def test_too_many_images(url: str) -> None:
    small, large = data_url(Image.new("1", (8, 8))), data_url(Image.new("1", (9000, 8000)))
    for images, said in (([small] * 17, "more than the 16"), ([large] * 2, "together")):
        status, answer = posted(url, body_for(images))
        assert status == 400
        assert said in answer["error"]["message"]


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("data:image/png;base64,AAAA", "image 1 is not an image"),
        ("data:image/png;base64,***", "no base64"),
        ("data:image/png;base64,é", "no base64"),
        ("https://example.com/photo.png", "not followed"),
        ("file:///etc/passwd", "not followed"),
        (str(PHOTO), "not followed"),
        (data_url(PHOTO.read_bytes()[:4000]), "damaged"),
        (data_url(Image.new("L", (12000, 12000))), "million pixels"),
    ],
    ids=["no image", "no base64", "no ascii", "http", "file", "path", "cut", "huge"],
)
def test_broken_images(url: str, image: str, said: str) -> None:
    status, answer = posted(url, body_for([image]))
    assert status == 400
    assert said in answer["error"]["message"]


def test_a_body_that_is_none(url: str) -> None:
    for body in (b"", b"[]", b"{", b'"text"'):
        status, answer = posted(url, body)
        assert status == 400
        assert "JSON" in answer["error"]["message"]


def test_it_lists_its_model(url: str) -> None:
    with urllib.request.urlopen(f"{url}/models") as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["demo"]


def test_the_command_serves(photo: Image.Image, expected: dict[Any, tuple[str, int]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve", str(DEMO), "-b", "0.3", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from dymu.cli.main import main; main()", *words], stderr=subprocess.PIPE, text=True
    )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            assert process.poll() is None
            time.sleep(0.1)
        _, answer = posted(f"http://127.0.0.1:{port}/v1", body_for([data_url(photo)]))
        assert answer["choices"][0]["message"]["content"].strip() == expected[0.3][0]
    finally:
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert "unmerge=exact" in said
    assert "one request at a time" in said


@pytest.mark.parametrize(
    ("unmerge", "words", "least"),
    [
        ("exact", ["--max-num-batched-tokens", "100"], 384),
        ("representative", ["--max_num_batched_tokens=300", "--max-num-seqs", "50"], 306),
        ("exact", ["--max-num-batched-tokens", "306", "--max-num-seqs=50"], None),
        ("exact", ["--max-num-batched-tokens", "4k"], None),
        ("exact", ["--max-num-seqs", "50"], None),
        ("original", ["--max-num-batched-tokens", "100"], None),
    ],
)
def test_vllm_with_room_for_no_image(
    unmerge: str, words: list[str], least: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    added = {"hf_overrides": {"dymu": {"unmerge": unmerge, "longest": 256}}}
    if least is None:
        check_flags(added, words)
    else:
        with pytest.raises(DymuError, match=f"is less than {least}, .* 256 tokens"):
            check_flags(added, words)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(DymuError, match="choose another"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(DymuError, match="cannot listen"):
        listen("no.such.host.invalid", 0)
