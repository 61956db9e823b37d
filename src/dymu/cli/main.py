"""The `dymu` command: importing the modules of the commands adds them to the app, in the order that help lists."""

import os
import sys
import warnings

import typer

from dymu.cli import errors
from dymu.cli.app import UsageError, app

from dymu.cli.run import run  # noqa: F401, isort: skip
from dymu.cli.demo import demo  # noqa: F401, isort: skip
from dymu.cli.draw import draw  # noqa: F401, isort: skip
from dymu.cli.check import check  # noqa: F401, isort: skip
from dymu.cli.serve import serve, vllm  # noqa: F401, isort: skip
from dymu.cli.caption import caption  # noqa: F401, isort: skip
from dymu.cli.calibrate import calibrate, calibrate_videos  # noqa: F401, isort: skip
from dymu.cli.forecast import forecast  # noqa: F401, isort: skip
from dymu.cli.stats import stats  # noqa: F401, isort: skip
from dymu.cli.evaluate import evaluate, report  # noqa: F401, isort: skip
from dymu.cli.bench import bench  # noqa: F401, isort: skip
from dymu.cli.show import env, families, inspect  # noqa: F401, isort: skip


def main() -> None:
    """Exit code 0, 1 (it failed) or 2 (it was called wrongly). A user's mistake shows no traceback, unless asked to."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what a terminal's encoding lacks is shown as ?, and never an error
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    try:
        sys.exit(app(prog_name="dymu", standalone_mode=False))
    except UsageError as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # for which typer has shown the help
            print(f"dymu: {errors.usage_sentence(error)}", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        sys.exit(1)
    except Exception as error:
        if "--debug" in sys.argv or os.environ.get("DYMU_DEBUG", "") not in ("", "0"):
            raise
        print(f"dymu: {errors.sentence(error)}", file=sys.stderr)
        sys.exit(1)
