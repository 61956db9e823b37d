"""What all commands share: the app that they add themselves to, options, and ways to read arguments."""

import math
from pathlib import Path
from typing import Annotated

import typer

from dymu.version import __version__

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
CHARTS = (".png", ".svg", ".pdf")

app = typer.Typer(
    name="dymu",
    help="Fewer image tokens for simple images, in a vision-language model as it was trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def parse_budget(text: str) -> int | float:
    """'96' tokens, or '0.15' or '15%' of them."""
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if text.endswith("%") and 0 < number <= 100:
        return number / 100
    if text.endswith("%") or not math.isfinite(number):
        raise typer.BadParameter(f"{text!r} is neither a number of tokens (96) nor a fraction of them (0.15 or 15%).")
    return int(text) if text.lstrip("+-").isdecimal() else number


def parse_layers(text: str) -> list[int]:
    """'1,3,5', indices of layers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of layers such as 1,3,5.") from None


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder or hub name.")]
NewThresholds = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE.json", help="The thresholds file to write.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, on the last line of stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error (so does DYMU_DEBUG=1).")]


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _dymu(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


def quieten_transformers() -> None:
    """Turn off its progress bars and advice, which are about its own loading; errors still come as exceptions."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
