"""The page's layout and what its buttons do, in Gradio. What a visitor sees is made by the modules beside it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from dymu.demo import asked as asking
from dymu.demo import html, plots, results, turns, videos
from dymu.demo.asked import Asked, Picture, Subject
from dymu.errors import BadImage, BadVideo, DymuError
from dymu.media import videos as films

HERE = Path(__file__).parent
QUESTION = "What is this?"
NO_PICTURE_YET = "Choose a picture, and the forecast of its tokens stands here before anything runs."
MOST_WAITING = 32
"""Visitors' questions at a time; more are asked to come again."""
MOST_REMEMBERED = 200
"""Pictures of a visitor in the plot."""
TOY = "This model is a toy: it knows some two hundred things, and says something wrong of all others."
_LOOKING = threading.BoundedSemaphore(4)
"""So many visitors' pictures are decoded at a time."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upload:
    """A file that a visitor gave: where it lies, and what they call it."""

    path: str
    name: str


@dataclass(frozen=True)
class Looked:
    """A picture of this visitor's that forecasts can be told of."""

    upload: Upload
    picture: Picture


@dataclass(frozen=True)
class Seen:
    """A picture of this visitor that was asked about."""

    name: str
    complexity: float
    budget: float
    kept: int
    expected: float | None


def page(subject: Subject, examples: Sequence[Path] = (), result_files: Sequence[Path] = ()) -> gr.Blocks:
    """The whole page for one model.

    Args:
        examples: pictures to try.
        result_files: of `dymu evaluate`, shown from the start.
    """
    blocks = gr.Blocks(title="dymu", analytics_enabled=False, delete_cache=(3600, 3600))
    with blocks:
        gr.HTML(_top(subject))
        with gr.Tabs():
            with gr.Tab("Ask"):
                _ask_tab(subject, examples)
            with gr.Tab("Video"):
                _video_tab(subject)
            with gr.Tab("Screenshots in turns"):
                _turns_tab(subject, examples)
            with gr.Tab("Results"):
                _results_tab(result_files)
    blocks.queue(max_size=MOST_WAITING, api_open=False, default_concurrency_limit=4)
    return blocks


def look_of_the_page() -> dict[str, Any]:
    """Theme, style and script, all of which come from this machine."""
    fonts = [gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")]
    mono = [gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")]
    theme = gr.themes.Default(
        primary_hue=gr.themes.colors.blue, neutral_hue=gr.themes.colors.slate, font=fonts, font_mono=mono,
        radius_size=gr.themes.sizes.radius_md,
    )  # fmt: skip
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return {
        "theme": theme,
        "css": (HERE / "page.css").read_text(encoding="utf-8"),
        "head": f"<script>{script}</script>",
    }


def _top(subject: Subject) -> str:
    tokens = "" if subject.tokens is None else f" One picture is {subject.tokens:,.0f} tokens to it."
    toy = f' <span class="dymu-toy">{html.text(TOY)}</span>' if subject.toy else ""
    return (
        '<header class="dymu-top"><h1>dymu</h1><p>A vision-language model reads every picture as the same, large '
        "number of tokens. dymu merges those that are alike, so that simple pictures cost less. Ask with all tokens "
        "and with few, and see what changes.</p>"
        f"<p>Model: <strong>{html.text(subject.title)}</strong>.{tokens}{toy}</p></header>"
    )


# --- parts that several tabs have ---


def _uploaded(payload: Any) -> Upload | None:
    """What Gradio received, not yet opened: the page says itself what is wrong with a file."""
    if payload is None:
        return None
    return Upload(payload.path, payload.orig_name or Path(payload.path).name)


def _several(payload: Any) -> list[Upload]:
    if payload is None:
        return []
    files = getattr(payload, "root", None) or [payload]
    return [upload for file in files if (upload := _uploaded(file)) is not None]


def _receiving(component: Any, read: Callable[[Any], Any], own: Sequence[Path] = ()) -> Any:
    """A component that takes files which visitors upload, as they are.

    A request may name any path or address instead, and Gradio, where it is mounted in an app, would have the server
    read that: of these only what is the page's own is taken.
    """
    keep, folder = component.async_move_resource_to_block_cache, Path(component.GRADIO_CACHE).resolve()
    known = {str(path) for path in own}

    async def keep_files(path: str | None) -> str | None:
        if path is not None and path not in known and not Path(path).resolve().is_relative_to(folder):
            raise gr.Error("the file was not uploaded here: choose it again.")
        kept: str | None = await keep(path)
        return kept

    component.preprocess, component.async_move_resource_to_block_cache = read, keep_files
    return component


def _picture_input(label: str, name: str, examples: Sequence[Path]) -> Any:
    picture = gr.Image(
        label=label, type="filepath", sources=["upload", "clipboard"], height=300, buttons=[], elem_id=name,
        placeholder="Drop a picture here, paste one, or choose a file",
    )  # fmt: skip
    return _receiving(picture, _uploaded, examples)


def _samples(picture: Any, examples: Sequence[Path]) -> None:
    if not examples:
        return
    with gr.Row(elem_classes="dymu-samples"):
        for path in examples:
            button = gr.Button(path.stem, icon=str(path), size="sm", variant="secondary", min_width=90)
            button.click(
                _constant(str(path)), outputs=picture, api_visibility="private", queue=False, show_progress="hidden"
            )


def _question(words: str, name: str) -> Any:
    return gr.Textbox(words, label="Question", lines=1, max_lines=4, max_length=asking.MOST_CHARACTERS, elem_id=name)


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _dial(subject: Subject, label: str, name: str) -> Any:
    low, high = subject.span
    budgets = subject.thresholds.budgets
    calibrated = f"{len(budgets)} budgets" if len(budgets) > 6 else ", ".join(f"{budget:g}" for budget in budgets)
    of = "" if subject.tokens is None else f" of {subject.tokens:,.0f}"
    return gr.Slider(
        minimum=low, maximum=high if high > low else low + 1, value=subject.budget, step=1 if high - low >= 20 else 0.1,
        label=f"{label}{of}", info=f"Calibrated at {calibrated}, and interpolated between them.", buttons=[],
        interactive=high > low, elem_id=name,
    )  # fmt: skip


def _said(error: Exception) -> str:
    """One sentence for whatever was raised."""
    if isinstance(error, DymuError):
        return html.error(" ".join(str(error).split()))
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return html.error("this machine has too little memory for that: take a smaller picture, or come again later.")
    _log.error("the page failed", exc_info=error)
    return html.error(f"something failed that was not foreseen ({type(error).__name__}): the terminal says more.")


# --- Ask ---


def _ask_tab(subject: Subject, examples: Sequence[Path]) -> None:
    looked, history = gr.State(None), gr.State([])
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            picture = _picture_input("Your picture", "dymu-picture", examples)
            _samples(picture, examples)
            boxes = gr.Textbox(
                label="Focus: boxes in which tokens merge last", lines=1, max_lines=4, elem_id="dymu-boxes",
                placeholder="Drag on the picture, or write left, top, right, bottom from 0 to 1",
            )  # fmt: skip
        with gr.Column(scale=6, min_width=300):
            question = _question(QUESTION, "dymu-question")
            dial = _dial(subject, "Budget: image tokens to keep on average,", "dymu-dial")
            told = gr.HTML(html.hint(NO_PICTURE_YET))
            button = gr.Button("Ask with all tokens and with few", variant="primary", elem_id="dymu-ask")
    shown = gr.HTML(elem_id="dymu-shown")
    plot = gr.HTML(elem_id="dymu-plot")

    # Not over the queue: Gradio's client loses what joins it in the moment in which another event ends.
    quietly = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    seen = picture.change(partial(_look, subject), picture, [looked, told, boxes], **quietly)
    seen.then(partial(_forecast, subject), [picture, looked, dial, boxes], told, **quietly)
    for changed in (dial, boxes):
        changed.change(
            partial(_forecast, subject), [picture, looked, dial, boxes], told, trigger_mode="always_last", **quietly
        )
    gr.on(
        [button.click, question.submit], partial(_ask, subject),
        [picture, question, dial, history, boxes], [shown, plot, history],
        concurrency_id="model", concurrency_limit=1, api_visibility="private", show_progress="minimal",
        show_progress_on=[shown], trigger_mode="once",
    )  # fmt: skip


def _look(subject: Subject, upload: Upload | None) -> tuple[Looked | None, Any, str]:
    """What a forecast needs of the picture, or why there is none; and no boxes, which were on another."""
    if upload is None:
        return None, html.hint(NO_PICTURE_YET), ""
    try:
        with _LOOKING:
            loaded = asking.load(upload.path, upload.name)
            return Looked(upload, asking.look(subject, loaded, upload.name)), gr.skip(), ""
    except Exception as error:
        return None, _said(error), ""


def _forecast(subject: Subject, upload: Upload | None, looked: Looked | None, budget: float, boxes: str) -> Any:
    """Of the picture that is shown, once it was looked at."""
    if looked is None or looked.upload != upload:
        return gr.skip()
    try:
        picture = looked.picture
        focused = bool(boxes.strip())
        return html.forecast(asking.forecast(subject, picture, budget, focused), focused, picture.notes)
    except Exception as error:
        return _said(error)


def _ask(
    subject: Subject, upload: Upload | None, question: str, budget: float, history: list[Seen], boxes: str
) -> Iterator[tuple[Any, Any, Any]]:
    """All that the page shows of a question, as it becomes known."""
    now: Asked | None = None
    try:
        if upload is None:
            raise BadImage("there is no picture yet: drop one, paste one, or choose a sample.")
        yield html.status("Asking with merged tokens…"), gr.skip(), gr.skip()
        loaded = asking.load(upload.path, upload.name)
        for now in asking.ask(subject, loaded, upload.name, question, budget, asking.boxes_of(boxes)):
            running = "Asking the untouched model…" if now.untouched is None else "Measuring both, a few times in turn…"
            yield html.asked(subject, now, "" if now.repeats else running), gr.skip(), gr.skip()
    except Exception as error:
        yield _said(error), gr.skip(), gr.skip()
        return
    assert now is not None
    assert now.merged is not None
    expected = None if now.forecast is None else now.forecast.expected
    seen = Seen(now.picture.name, now.picture.complexity, budget, now.merged.tokens, expected)
    history = [*history, seen][-MOST_REMEMBERED:]
    yield gr.skip(), _plot(history), history


def _plot(history: Sequence[Seen]) -> str:
    """Tokens against complexity, of all pictures that this visitor asked about."""
    kept = [
        plots.Dot(seen.complexity, seen.kept, f"{seen.name}: {seen.kept} tokens at a budget of {seen.budget:g}")
        for seen in history
    ]
    expected = [
        plots.Dot(seen.complexity, seen.expected, f"{seen.name}: {seen.expected:.0f} expected at {seen.budget:g}")
        for seen in history
        if seen.expected is not None
    ]
    drawn = plots.plot(
        "Image tokens against complexity", "bytes per pixel of a small JPEG of the picture", "image tokens",
        [plots.Series("kept", kept), plots.Series("forecast", expected, hollow=True)],
    )  # fmt: skip
    lines = [
        [
            seen.name,
            f"{seen.complexity:.2f}",
            f"{seen.budget:g}",
            seen.kept,
            "–" if seen.expected is None else f"{seen.expected:.0f}",
        ]
        for seen in reversed(history)
    ]
    listed = html.table(
        "Your pictures, newest first", ["picture", "bytes per pixel", "budget", "kept", "forecast"], lines
    )
    return html.section("Your pictures so far: busier ones keep more", f'<div class="dymu-two">{drawn}{listed}</div>')


# --- Video ---


def _video_tab(subject: Subject) -> None:
    if not subject.takes_videos:
        gr.HTML(html.hint(videos.NO_VIDEOS))
        return
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            film = _receiving(gr.File(label="A video, or an animated GIF or WebP", elem_id="dymu-film"), _uploaded)
        with gr.Column(scale=6, min_width=300):
            question = _question("What happens?", "dymu-film-question")
            frames = gr.Slider(1, videos.MOST_FRAMES, 8, step=1, label="Frames, spread over its length", buttons=[])
            dial = _dial(subject, "Budget of an image, of which each frame keeps its part,", "dymu-film-dial")
            button = gr.Button("Ask about the video", variant="primary")
    shown = gr.HTML()
    gr.on(
        [button.click, question.submit], partial(_ask_video, subject), [film, question, frames, dial],
        shown, concurrency_id="model", concurrency_limit=1, api_visibility="private", show_progress="minimal",
    )  # fmt: skip


def _ask_video(subject: Subject, upload: Upload | None, question: str, frames: float, budget: float) -> Iterator[str]:
    try:
        if upload is None:
            raise BadVideo("there is no video yet: choose one.")
        yield html.status("Reading the video, and asking with merged tokens…")
        try:
            video = films.load(upload.path, frames=int(frames))
        except DymuError as error:
            raise BadVideo(str(error).replace(upload.path, upload.name)) from error
        for now in videos.ask_video(subject, video, upload.name, question, budget):
            yield _video(subject, now, int(frames))
    except Exception as error:
        yield _said(error)


def _video(subject: Subject, now: videos.AskedVideo, frames: int) -> str:
    done = now.untouched is not None
    parts = ["" if done else html.status("Asking the untouched model…"), html.counts(now.original, now.merged.tokens)]
    parts.append(
        html.answers(
            now.untouched.answer if now.untouched else None, now.merged.answer, now.original, now.merged.tokens
        )
    )
    over_time = plots.bars_over_time(now.fresh, now.each, "Tokens of each frame that no frame before had")
    parts.append(html.section("Tokens over time", over_time))
    if now.sheet is not None:
        sheet = asking.as_jpeg_url(now.sheet, max(now.sheet.size))
        words = ", ".join(f"{fresh} new" for fresh in now.fresh)
        parts.append(
            html.section("Frames", f'<img class="dymu-sheet" src="{sheet}" alt="{html.text(f"frames: {words}")}">')
        )
    if done:
        call = asking.command(subject, now.name, now.question, now.budget, "--frames", str(frames), "--compare")
        parts.append(html.section("The same on the command line", html.copyable(call, videos.as_json(subject, now))))
    return f'<div class="dymu-result">{"".join(parts)}</div>'


# --- Screenshots in turns ---


def _turns_tab(subject: Subject, examples: Sequence[Path]) -> None:
    before = gr.State([])
    gr.HTML(
        html.hint(
            "Each turn adds a picture, as when an agent looks at screen after screen. Pictures of earlier turns stay "
            "in the prompt, and get smaller budgets."
        )
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            picture = _picture_input("The next screen", "dymu-screen", examples)
            _samples(picture, examples)
        with gr.Column(scale=6, min_width=300):
            question = _question(QUESTION, "dymu-turn-question")
            dial = _dial(subject, "Budget of the newest picture,", "dymu-turn-dial")
            share = gr.Slider(
                0.1, 1.0, 0.5, step=0.05, label="An earlier picture gets this part of the next one's budget", buttons=[]
            )
            with gr.Row():
                button = gr.Button("Add this turn", variant="primary", min_width=140)
                anew = gr.Button("Begin anew", min_width=120)
    shown = gr.HTML()
    gr.on(
        [button.click, question.submit], partial(_say, subject),
        [picture, question, dial, share, before], [shown, before],
        concurrency_id="model", concurrency_limit=1, api_visibility="private", show_progress="minimal",
        show_progress_on=[shown],
    )  # fmt: skip
    anew.click(lambda: (html.hint("No turns yet."), []), outputs=[shown, before], api_visibility="private", queue=False)


def _say(
    subject: Subject, upload: Upload | None, question: str, newest: float, share: float, before: list[turns.Turn]
) -> Iterator[tuple[Any, Any]]:
    try:
        if upload is None:
            raise BadImage("there is no picture yet: drop one, paste one, or choose a sample.")
        yield html.status("Asking with merged tokens…"), gr.skip()
        turn = turns.Turn(upload.path, upload.name, question)
        images = [asking.load(each.path, each.name).image for each in (*before, turn)]
        for now in turns.say(subject, before, images, turn, newest, share):
            said = _conversation(subject, now)
            yield said, gr.skip() if now.untouched is None else list(now.turns)
    except Exception as error:
        yield _said(error), gr.skip()


def _conversation(subject: Subject, now: turns.Conversation) -> str:
    lines = [
        [str(number), turn.name, kept, full, f"{budget:.4g}", turn.question]
        for number, (turn, budget, kept, full) in enumerate(
            zip(now.turns, now.budgets, now.kept, now.original, strict=False), 1
        )
    ]
    original = sum(now.original)
    lines.append(["all", "", now.merged.tokens, original, f"{sum(now.budgets):.4g}", ""])
    header = ["turn", "picture", "with dymu", "without", "budget", "question"]
    untouched = None if now.untouched is None else now.untouched.answer
    parts = [
        html.status("Asking the untouched model…") if now.untouched is None else "",
        html.counts(original, now.merged.tokens),
        html.answers(untouched, now.merged.answer, original, now.merged.tokens),
        html.section("Tokens per turn", html.table("Image tokens in the prompt of this turn", header, lines)),
    ]
    if now.untouched is not None:
        parts.append(
            html.section(
                "The same in Python",
                html.copyable(turns.as_python(subject, now), turns.as_json(subject, now), "Python"),
            )
        )
    return f'<div class="dymu-result">{"".join(parts)}</div>'


# --- Results ---


def _results_tab(result_files: Sequence[Path]) -> None:
    named = [(str(path), path.name) for path in result_files]
    files = _receiving(
        gr.File(
            label="Result files of dymu evaluate (.jsonl)", file_count="multiple", file_types=[".jsonl"], height=140
        ),
        _several,
    )
    first = results.page(named) if named else html.hint("Choose a file that dymu evaluate wrote.")
    shown = gr.HTML(first)

    def show(uploads: list[Upload]) -> str:
        try:
            listed = [*named, *((upload.path, upload.name) for upload in uploads)]
            return results.page(listed) if listed else html.hint("Choose a file that dymu evaluate wrote.")
        except Exception as error:
            return _said(error)

    files.change(show, files, shown, api_visibility="private", queue=False, show_progress="minimal")
