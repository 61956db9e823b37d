"""What a visitor does on the page: choose a picture, read the forecast, ask, turn the dial."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu
from dymu.media.images import load
from dymu.prompting import generate, inputs_for

ROOT = Path(__file__).parents[2]
DEMO, EXAMPLES = ROOT / "models" / "demo", ROOT / "examples"
PHOTO, PYRAMID, SCENE = EXAMPLES / "photo.jpg", EXAMPLES / "pyramid.jpg", EXAMPLES / "scene.png"
ASK = "Ask with all tokens and with few"
LONG = 60_000

Visit = Callable[..., Any]


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Visit]:
    """Opens the page as a new visitor."""
    contexts = []

    def opened(width: int = 1280, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.goto(url)
        page.get_by_role("button", name=ASK).wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()


def choose(page: Any, path: Path, within: str = "#dymu-picture") -> None:
    page.locator(f"{within} input[type=file]").set_input_files(path)


def forecast(page: Any) -> int:
    """Tokens that are expected, once that is said."""
    page.locator(".dymu-forecast").wait_for()
    return int(page.locator(".dymu-forecast strong").first.inner_text())


def turn_dial(page: Any, budget: int) -> None:
    """Sets the budget, and waits for the forecast to follow."""
    before = page.locator(".dymu-forecast").inner_text() if page.locator(".dymu-forecast").count() else None
    number = page.locator("#dymu-dial input[type=number]")
    number.fill(str(budget))
    number.press("Enter")
    number.blur()
    if before is not None:
        page.wait_for_function(
            "before => document.querySelector('.dymu-forecast').innerText !== before", arg=before, timeout=10_000
        )


def ask(page: Any, question: str | None = None) -> dict[str, Any]:
    """Asks, waits for all that there is to see, and gives the JSON that stands there."""
    if question is not None:
        page.locator("#dymu-question textarea, #dymu-question input").fill(question)
    page.evaluate("document.querySelector('#dymu-shown .dymu-done')?.remove()")  # of an earlier answer
    page.get_by_role("button", name=ASK).click()
    return answer(page)


def answer(page: Any) -> dict[str, Any]:
    page.locator("#dymu-shown .dymu-done").wait_for(state="attached", timeout=LONG)
    data: dict[str, Any] = json.loads(page.locator("#dymu-shown pre").nth(1).inner_text())
    return data


@pytest.fixture(scope="module")
def library() -> Callable[[Path, float], tuple[str, int, str]]:
    """The merged answer, its tokens and the untouched answer, by the library itself."""
    model = AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(DEMO)
    handle = dymu.apply(model, DEMO, budget=77)

    def by_library(path: Path, budget: float, question: str = "What is this?") -> tuple[str, int, str]:
        inputs = inputs_for(model, processor, [([load(path).image], question)])
        with handle.at(budget):
            (merged,), _ = generate(model, processor, inputs, 64)
            kept = sum(handle.last.kept)
        with handle.disabled():
            (untouched,), _ = generate(model, processor, inputs, 64)
        return merged, kept, untouched

    return by_library


def test_the_forecast_comes_first_and_then_both_answers(visit: Visit, library: Any) -> None:
    page = visit()
    begins = time.monotonic()
    choose(page, PHOTO)
    assert 0 < forecast(page) < 256
    assert page.locator("#dymu-shown .dymu-answer").count() == 0
    page.get_by_role("button", name=ASK).click()
    page.locator("#dymu-shown .dymu-answer").first.wait_for()
    assert time.monotonic() - begins < 10
    data = answer(page)
    merged, kept, untouched = library(PHOTO, 77)
    assert (data["answer"], data["kept_tokens"], data["untouched"]["answer"]) == (merged, kept, untouched)
    assert page.locator(".dymu-answer").all_inner_texts() == [untouched, merged]
    assert f"256 image tokens → became {kept}" in " ".join(page.locator(".dymu-counts .dymu-big").inner_text().split())
    assert page.locator("#dymu-shown .dymu-group").count() == kept
    assert page.locator("#dymu-plot circle").count() == 2  # one picture: kept, and forecast
    command = page.locator("#dymu-shown pre").first.inner_text()
    assert command == "dymu run photo.jpg 'What is this?' --budget 77 --compare --draw merged.png --json"


def test_a_lower_dial_means_fewer_tokens(visit: Visit) -> None:
    page = visit()
    choose(page, PYRAMID)
    expected, kept = [], []
    for budget in (128, 38):
        forecast(page)
        turn_dial(page, budget)
        expected.append(forecast(page))
        kept.append(ask(page)["kept_tokens"])
        page.get_by_role("button", name=ASK).wait_for()
    assert expected[1] < expected[0]
    assert kept[1] < kept[0]
    assert page.locator("#dymu-plot circle").count() == 4


def test_the_dial_does_not_change_what_was_asked(visit: Visit) -> None:
    page = visit()
    choose(page, PHOTO)
    data = ask(page)
    turn_dial(page, 20)
    assert answer(page) == data


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.jpg", PHOTO.read_bytes()[:5000], "cut.jpg is damaged or cut short"),
        ("words.png", b"no picture at all", "words.png is not an image"),
        ("empty.png", b"", "empty.png"),
    ],
)
def test_a_bad_file_gets_a_sentence(visit: Visit, tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    page = visit()
    choose(page, path)
    alert = page.get_by_role("alert").filter(has_text=said)
    alert.wait_for()
    page.get_by_role("button", name=ASK).click()
    page.locator("#dymu-shown [role=alert]").wait_for()
    assert "Traceback" not in page.content()


def test_very_wide_pictures(visit: Visit, tmp_path: Path) -> None:
    wide, too_large = tmp_path / "wide.png", tmp_path / "large.png"
    Image.new("RGB", (20_000, 900), "teal").save(wide)
    Image.new("1", (20_000, 3_000)).save(too_large)
    page = visit()
    choose(page, wide)
    forecast(page)
    assert ask(page)["kept_tokens"] < 77
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page = visit()
    choose(page, too_large)
    page.get_by_role("alert").filter(has_text="60 million pixels, more than the 50 million").wait_for()


def test_no_picture_and_no_question(visit: Visit) -> None:
    page = visit()
    page.get_by_role("button", name=ASK).click()
    page.get_by_role("alert").filter(has_text="There is no picture yet").wait_for()
    choose(page, PHOTO)
    page.locator("#dymu-question textarea, #dymu-question input").fill("  ")
    page.get_by_role("button", name=ASK).click()
    page.get_by_role("alert").filter(has_text="There is no question yet").wait_for()


def test_words_stay_words(visit: Visit) -> None:
    question = "<b id='injected'>is</b> ${1+1} {{value}} `this`?"
    page = visit()
    choose(page, PHOTO)
    ask(page, question)
    assert page.locator("#injected").count() == 0
    assert "${1+1} {{value}} `this`" in page.locator("#dymu-shown pre").first.inner_text()


def test_eight_visitors_at_once_each_get_their_own(visit: Visit, library: Any) -> None:
    asked = [(path, budget) for budget in (38, 77, 128) for path in (PHOTO, PYRAMID, SCENE)][:8]
    pages = [visit() for _ in asked]
    for page, (path, budget) in zip(pages, asked, strict=True):
        choose(page, path)
        forecast(page)
        if budget != 77:
            turn_dial(page, budget)
    for page in pages:
        page.get_by_role("button", name=ASK).click()
    for page, (path, budget) in zip(pages, asked, strict=True):
        data = answer(page)
        assert (data["answer"], data["kept_tokens"], data["untouched"]["answer"]) == library(path, budget)
        assert data["budget"] == budget
        assert page.locator("#dymu-plot tbody th").all_inner_texts() == [path.name]


def test_groups_by_pointer_and_keys(visit: Visit) -> None:
    page = visit()
    choose(page, PHOTO)
    ask(page)
    tip = page.locator(".dymu-tip")
    first, second = page.locator(".dymu-group").nth(0), page.locator(".dymu-group").nth(1)
    first.locator(".dymu-fill").hover(force=True)
    assert tip.is_visible()
    first.focus()
    page.keyboard.press("ArrowRight")
    assert second.evaluate("group => group === document.activeElement")
    assert re.fullmatch(r"\d+ patches are one token, the last joined in encoder layer \d+", tip.inner_text())
    assert tip.inner_text() == second.get_attribute("aria-label")


def test_a_box_drawn_on_the_picture_is_in_focus(visit: Visit) -> None:
    page = visit()
    choose(page, PHOTO)
    forecast(page)
    box = page.locator("#dymu-picture img").bounding_box()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.7 * box["height"], steps=4)
    page.mouse.up()
    data = ask(page)
    assert data["focus"] == [pytest.approx([0.4, 0.3, 0.6, 0.7], abs=0.02)]
    assert page.locator("#dymu-shown .dymu-box").count() == 1
    page.get_by_role("button", name="scene").locator("visible=true").click()
    page.wait_for_function("() => document.querySelector('#dymu-boxes :is(textarea, input)').value === ''")


def test_copies(visit: Visit) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    choose(page, PHOTO)
    ask(page)
    page.get_by_role("button", name="Copy: Command").click()
    page.get_by_text("Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == page.locator("#dymu-shown pre").first.inner_text()


def test_turns_give_earlier_pictures_less(visit: Visit) -> None:
    page = visit()
    page.get_by_role("tab", name="Screenshots in turns").click()
    for path in (PHOTO, SCENE):
        choose(page, path, "#dymu-screen")
        page.get_by_role("button", name="Add this turn").click()
        page.locator(".dymu-table tbody th", has_text=re.compile("^all$")).locator("visible=true").wait_for()
        page.get_by_text("The same in Python").wait_for()
        if path == PHOTO:
            alone = int(
                page.locator("tr", has_text="photo.jpg").locator("visible=true").locator("td").nth(1).inner_text()
            )
            page.get_by_role("button", name="Remove").or_(page.get_by_label("Clear")).locator("visible=true").click()
    page.locator("tr", has_text="scene.png").locator("visible=true").wait_for()
    page.get_by_text("dymu_budget=[38.5, 77]").wait_for()
    earlier = int(page.locator("tr", has_text="photo.jpg").locator("visible=true").locator("td").nth(1).inner_text())
    assert earlier < alone


def test_results_are_shown_and_uploaded(visit: Visit, tmp_path: Path) -> None:
    page = visit()
    page.get_by_role("tab", name="Results").click()
    page.get_by_role("heading", name="heldout.jsonl").wait_for()
    assert page.locator("td", has_text="73.7 [70.9, 76.3]").is_visible()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    page.locator("input[type=file]").last.set_input_files([bad])
    page.get_by_role("alert").filter(has_text="bad.jsonl is no result file").wait_for()


def test_a_model_without_videos_says_so(visit: Visit) -> None:
    page = visit()
    page.get_by_role("tab", name="Video").click()
    page.get_by_text("This model takes no videos").wait_for()


def test_nothing_is_asked_of_other_machines(visit: Visit, url: str, browser: Any) -> None:
    asked: list[str] = []
    context = browser.new_context()
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.get_by_role("button", name=ASK).wait_for()
    choose(page, PHOTO)
    ask(page)
    for tab in ("Video", "Screenshots in turns", "Results"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
    context.close()
    assert len(asked) > 10
    assert [each for each in asked if not each.startswith((url, "data:", "blob:"))] == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_and_is_accessible(visit: Visit, width: int, scheme: str) -> None:
    page = visit(width, color_scheme=scheme)

    def check(state: str) -> None:
        page.wait_for_timeout(400)  # until colours have changed
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), state
        violations = Axe().run(page).response["violations"]
        bad = [(each["id"], each["nodes"]) for each in violations if each["impact"] in ("serious", "critical")]
        assert not bad, (state, bad)

    check("at first")
    page.get_by_role("button", name=ASK).click()
    page.get_by_role("alert").wait_for()
    check("an error")
    choose(page, PHOTO)
    forecast(page)
    check("a forecast")
    ask(page)
    check("answered")
    for tab in ("Video", "Screenshots in turns", "Results"):
        if not page.get_by_role("tab", name=tab).is_visible():
            page.locator(".overflow-menu > button").click()
            page.locator(".overflow-dropdown button", has_text=tab).click()
        else:
            page.get_by_role("tab", name=tab).click()
        check(tab)


@pytest.mark.parametrize("path", ["{root}/docs/merged.png", "{root}/models/demo/config.json", "{other}/a.png"])
def test_a_request_cannot_have_the_server_read_for_it(url: str, path: str) -> None:
    """Neither files of this machine nor addresses, by a request as no browser sends it."""
    asked: list[str] = []

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    other = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    named = path.format(root=ROOT, other=f"http://127.0.0.1:{other.server_port}")
    with urllib.request.urlopen(f"{url}/config") as answer:
        events = json.load(answer)["dependencies"]
    (look,) = [event for event in events if len(event["inputs"]) == 1 and len(event["outputs"]) == 3]
    file = {"path": named, "url": None, "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [file], "fn_index": look["id"], "session_hash": "no-browser"}).encode()
    request = urllib.request.Request(f"{url}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=20).close()
    with urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash=no-browser", timeout=20) as said:
        for line in said:
            if b"process_completed" in line:
                break
    other.shutdown()
    assert b"was not uploaded here" in line
    assert not asked
