"""The `dymu` command: importing the modules of the commands adds them to the app, in the order that help lists."""

import os
import sys

from dymu.cli import errors
from dymu.cli.app import app

from dymu.cli.run import run  # noqa: F401, isort: skip
from dymu.cli.calibrate import calibrate, calibrate_videos  # noqa: F401, isort: skip
from dymu.cli.show import env, families, inspect  # noqa: F401, isort: skip
from dymu.cli.evaluate import evaluate, report  # noqa: F401, isort: skip
from dymu.cli.bench import bench  # noqa: F401, isort: skip


def main() -> None:
    """Exit code 0, 1 (it failed) or 2 (it was called wrongly). A user's mistake shows no traceback, unless asked to."""
    try:
        app(prog_name="dymu")
    except Exception as error:
        if "--debug" in sys.argv or os.environ.get("DYMU_DEBUG", "") not in ("", "0"):
            raise
        print(f"dymu: {errors.sentence(error)}", file=sys.stderr)
        sys.exit(1)
