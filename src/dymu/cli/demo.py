"""`dymu demo`: a page in the browser on which a model is tried with all image tokens and with few."""

import logging
import os
import signal
import sys
import tempfile
import warnings
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from dymu.cli import errors, models
from dymu.cli.app import (
    RUN,
    Debug,
    Device,
    Dtype,
    ModelOrDemo,
    Revision,
    ThresholdsName,
    app_command,
    parse_budget,
    quieten_transformers,
)
from dymu.cli.output import Output
from dymu.cli.serve import in_url, listen, warn_of_others
from dymu.errors import DymuError

SAMPLES = ("photo.jpg", "pyramid.jpg", "scene.png")


@app_command(RUN, "dymu demo --model llava-hf/llava-1.5-7b-hf --thresholds llava.json")
def demo(
    model: ModelOrDemo = None,
    thresholds: ThresholdsName = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", "-b", metavar="N|0.15", parser=parse_budget, show_default="0.30, if calibrated",
                     help="Where the dial stands at first: a number of image tokens, or a fraction of all."),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.jsonl", help="Results of dymu evaluate to show; may be given several times.",
                     show_default=False),
    ] = None,
    host: Annotated[str, typer.Option(metavar="NAME", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0: any that is free.")] = 7860,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Try a model on a page in the browser: a forecast of tokens, answers both ways, what merged, and what it saves.

    The page asks no other machine for anything.
    """
    out = Output(False)
    missing = [name for name in ("gradio", "uvicorn", "fastapi") if find_spec(name) is None]
    if missing:
        raise errors.BadInput(f"the page needs {' and '.join(missing)}, not installed: `pip install 'dymu[demo]'`.")
    for path in results or ():
        if not path.is_file():
            raise errors.BadInput(f"{path} is no file: name a result file of dymu evaluate.")
    named = models.named(model or models.demo_model(), revision)
    calibrated = named.thresholds(thresholds)
    at_first = _at_first(calibrated, budget)
    listening = listen(host, port)
    with tempfile.TemporaryDirectory(prefix="dymu-demo-") as kept:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported
        os.environ["GRADIO_TEMP_DIR"] = kept  # what visitors upload, until the page ends
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        with out.during("loading torch, transformers and Gradio"):
            quieten_transformers()
            import uvicorn

            import dymu
            from dymu.demo.asked import Subject
            from dymu.demo.page import page
            from dymu.demo.server import app_of
        with out.during(f"loading {named.name}"):
            loaded = models.load(named, device, dtype)
        # The dial goes through all budgets, and its words say that those between are interpolated.
        warnings.filterwarnings("ignore", message="a budget of .* tokens lies between")
        given = {"model": model, "thresholds": thresholds, "revision": revision, "device": device, "dtype": dtype}
        subject = Subject(
            title=named.name if model else "models/demo",
            model=loaded.model,
            processor=loaded.processor,
            thresholds=calibrated,
            handle=dymu.apply(loaded.model, calibrated, budget=at_first),
            budget=at_first,
            options=tuple(word for name, value in given.items() if value for word in (f"--{name}", value)),
            toy=models.is_the_demo(named),
        )
        samples = [path for name in SAMPLES if (path := models.EXAMPLES / name).is_file()]
        app: Any = app_of(page(subject, samples, results or ()))
        where = f"http://{in_url(host)}:{listening.getsockname()[1]}"
        out.note(f"the page is at {where}; Ctrl+C ends it")
        if subject.toy:
            out.note(models.TOY)
        warn_of_others(out, host)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        config = uvicorn.Config(app, log_level="warning", limit_concurrency=256, timeout_graceful_shutdown=2)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was uploaded is removed then, too
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def _at_first(calibrated: Any, budget: float | None) -> float:
    """Where the dial stands: as asked, else at `models.DEMO_BUDGET`, else at the middle of what is calibrated."""
    if budget is not None:
        return float(calibrated.tokens_for(budget))
    try:
        return float(calibrated.tokens_for(models.DEMO_BUDGET))
    except DymuError:
        return float(calibrated.budgets[len(calibrated.budgets) // 2])
