"""What all commands share: the app that they add themselves to, options, and ways to read arguments."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from dymu.choices import CACHE_FORMS, EACH_ONCE, UNMERGE, CacheForm, Counting, Named, Unmerge
from dymu.cli.errors import BadModel
from dymu.version import __version__

Command = TypeVar("Command", bound=Callable[..., Any])

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
CHARTS = (".png", ".svg", ".pdf")
MOST = 2**32
"""The largest whole number that an option takes."""
UsageError: Any = typer.BadParameter.__base__
"""Raised for calls that typer refuses; the class lies in click for some versions of typer and in typer for others."""

RUN, SERVE, FIND, MEASURE, ABOUT = "Run and see", "Serve", "Find thresholds", "Measure", "About"
"""Groups of commands in the help."""


def _without_types(params: list[Any]) -> list[Any]:
    """The parameters, whose help leaves out that a flag is a <bool> and an argument a <str>."""
    for param in params:
        if param.param_type_name == "argument":
            param.display_type_rich = lambda ctx: ""
        elif getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; what is empty, or too large a number, is refused for all commands alike."""
        words = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except UsageError as error:
            error.ctx = error.ctx or ctx  # so that the sentence names this command's help
            raise
        if ctx.resilient_parsing:  # a shell completes a call that is not whole
            return rest
        for before, word in zip(("", *words), words, strict=False):
            if word == "" or re.fullmatch(r"--[a-z-]+=", word):
                option = word.removesuffix("=") or before
                what = f"the value of {option}" if option.startswith("-") else "an argument"
                raise typer.BadParameter(f"{what} is empty: write one, or leave it out.")
        params: list[Any] = self.params
        for param in params:
            value = ctx.params.get(param.name)
            for number in value if isinstance(value, (list, tuple)) else [value]:
                if type(number) is int and abs(number) > MOST:
                    raise typer.BadParameter(f"{number} is no number up to {MOST}", ctx=ctx, param=param)
        return rest


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))


app = typer.Typer(
    name="dymu",
    cls=_Group,
    help="Fewer image tokens for simple images, in a vision-language model as it was trained.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def app_command(
    group: str, example: str, name: str | None = None, passes_on: bool = False
) -> Callable[[Command], Command]:
    """Adds a function to the app.

    Args:
        group: its place in the help.
        example: a call of it, shown at the end of its help.
        passes_on: whether it takes options that it does not know, for another program.
    """
    settings = {"allow_extra_args": passes_on, "ignore_unknown_options": passes_on}
    return app.command(
        name, cls=_Command, rich_help_panel=group, epilog=f"Example: {example}", context_settings=settings
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
        raise typer.BadParameter(f"--merge-layers takes layers such as 1,3,5, not {text!r}.") from None


def _check_device(device: str | None) -> str | None:
    if device is not None and (not re.fullmatch(r"[a-z]+(:\d{1,3})?", device) or device.startswith("meta")):
        raise typer.BadParameter(f"{device!r} is no device such as cpu, cuda or cuda:1.")
    if device is not None and device.startswith("cpu:") and int(device[4:]):
        raise BadModel(f"torch cannot use the device {device} here: take cpu, of which there is one.")
    return device


def check_workers(ray: str | None, workers: int | None) -> None:
    """Refuse a number of workers of nothing."""
    if workers is not None and ray is None:
        raise typer.BadParameter("--workers is for --ray: add --ray local, or leave it out.")


def check_cache(cache: CacheForm, unmerge: Unmerge) -> None:
    """Refuse a cache of keys that the form does not have."""
    if cache == "fast" and unmerge in EACH_ONCE:
        raise typer.BadParameter(f"--cache fast keeps the keys of all tokens, and --unmerge {unmerge} has one of each.")


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder or hub name.")]
DemoOrModel = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A model's folder or hub name.", show_default="the demo model"),
]
ModelOrDemo = Annotated[
    str | None,
    typer.Option(metavar="PATH|ID", help="A model's folder or hub name.", show_default="the demo model"),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Branch, tag or commit of a model on the hub.", show_default="main"),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Where to run: cpu, cuda, cuda:1, …", callback=_check_device,
                 show_default="the accelerator, if there is one"),
]  # fmt: skip
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(metavar="NAME", help="Of the weights: float32 (often the fastest on a CPU), bfloat16 or float16.",
                 show_default="as they are stored"),
]  # fmt: skip
ThresholdsName = Annotated[
    str | None,
    typer.Option(metavar="FILE|PATH|ID", help="When to merge: a file, or a folder or hub name that holds one.",
                 show_default="thresholds.json beside the model"),
]  # fmt: skip
CountingBy = Annotated[
    Counting,
    typer.Option("--count", metavar="NAME", help="What a budget says: the mean over images (mean), what none goes "
                 "beyond (at-most), or what every one keeps (exactly)."),
]  # fmt: skip
FocusOn = Annotated[
    Named | None,
    typer.Option("--focus", metavar="NAME", help="What merges last, so that others merge in its place: text (which a "
                 "detector finds) or edges.", show_default="nothing"),
]  # fmt: skip
GuardOf = Annotated[
    Literal["text"] | None,
    typer.Option("--guard", metavar="text", help="Leave pictures of writing and drawings the budget's share.",
                 show_default="none"),
]  # fmt: skip
UnmergeBy = Annotated[
    Unmerge, typer.Option(metavar="NAME", help=f"How the model attends to merged tokens: {', '.join(UNMERGE)}.")
]
Cache = Annotated[
    CacheForm, typer.Option(metavar="NAME", help=f"What the KV cache stores: {' or '.join(CACHE_FORMS)}.")
]
NewThresholds = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE.json", help="The thresholds file to write.")
]
Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS|local", help="Spread the work over a Ray cluster: that at an address, or "
                 "one that is started here and ends with the command."),
]  # fmt: skip
Workers = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="With --ray, so many workers.", show_default="all the CPUs, or GPUs"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, on the last line of stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error (so does DYMU_DEBUG=1).")]


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback(epilog="Example: dymu run examples/photo.jpg 'what is in the picture?' --compare")
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
