"""`dymu inspect`, `dymu families` and `dymu env`: what there is."""

import os
import platform
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Annotated, Any

import typer

from dymu.cli.app import (
    ABOUT,
    FIND,
    Debug,
    Json,
    app_command,
)
from dymu.cli.output import Output, facts, table, thresholds_data, thresholds_for_people
from dymu.files import first_line
from dymu.measure.markdown import markdown
from dymu.thresholds import Thresholds
from dymu.version import __version__


@app_command(FIND, "dymu inspect models/demo/thresholds.json")
def inspect(
    file: Annotated[
        str, typer.Argument(metavar="FILE|PATH|ID", help="A thresholds file, or a folder or hub name that holds one.")
    ],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a thresholds file holds and what it belongs to."""
    data = {"file": file, **thresholds_data(Thresholds.load(file))}
    Output(as_json).result(data, lambda: thresholds_for_people(data))


@app_command(ABOUT, "dymu families")
def families(as_json: Json = False, debug: Debug = False) -> None:
    """List the model families that dymu knows, what they may hold, and what is not supported."""
    from dymu.families import listing

    version = metadata.version("transformers")

    output = Output(as_json)

    def for_people() -> Iterable[Any]:
        known = markdown(listing.HEADER, listing.listed(version))
        plain = f"Plain language models: {listing.plain_decoders()}."
        limits = "\n".join(f"{', '.join(families)}: {phrase}." for phrase, families in listing.limits().items())
        return output.markdown([known, plain, limits], numbers=False)

    output.result({"transformers": version, "families": listing.data(version)}, for_people)


@app_command(ABOUT, "dymu methods")
def methods(as_json: Json = False, debug: Debug = False) -> None:
    """List the methods that reduce image tokens: what each needs, whether it adapts to the picture, its paper."""
    from dymu.evaluation.methods import METHODS

    output = Output(as_json)
    rows: list[dict[str, Any]] = [
        {
            "name": method.name,
            "label": method.label,
            "group": method.group,
            "needs": method.needs,
            "adapts": method.adapts,
            "solves": method.solves.field if method.solves else "",
            "class": method.reducer or method.pruning,
            "paper": method.paper,
        }
        for method in METHODS.values()
        if method.name != "untouched"
    ]

    def for_people() -> Iterable[Any]:
        printed = table("method", "group", "class", "needs", "adapts", "arXiv", numbers=False)
        for row in rows:
            adapts = (f"by {row['solves']}" if row["solves"] else "yes") if row["adapts"] else ""
            printed.add_row(row["name"], row["group"], row["class"], row["needs"], adapts, row["paper"])
        yield printed
        yield ""
        yield "E: in the encoder or right behind it; P: on projected tokens; L: within the language model."
        yield "Classes are those of dymu.reducers; of group L, of dymu.pruning."
        yield "Attention is that of the class token; where an encoder has none, that of all patches."
        yield "dymu.reducers.TextAwareMerge reads vectors of a text tower, which no argument names: from Python alone."
        yield "By an argument: dymu evaluate solves it, so that the images of its tasks keep the budget on average."

    output.result({"methods": rows}, for_people)


@app_command(ABOUT, "dymu env --json")
def env(as_json: Json = False, debug: Debug = False) -> None:
    """Show the versions and the device, for a bug report. It never fails: what cannot be found out says why."""
    packages = ("torch", "transformers", "numpy", "pillow")
    data: dict[str, Any] = {
        "dymu": __version__,
        "python": platform.python_version(),
        **{name: _or_why(metadata.version, name) for name in packages},
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": _or_why(_threads),
        "accelerator": _or_why(_accelerator),
    }
    told = {name.replace("_", " "): str(value or "none") for name, value in data.items()}
    Output(as_json).result(data, lambda: facts(told))


def _or_why(find_out: Callable[..., Any], *args: str) -> Any:
    """What a call answers, or in words why it does not."""
    try:
        return find_out(*args)
    except metadata.PackageNotFoundError:
        return None
    except Exception as error:  # broken installations have kinds of their own
        return f"unknown ({first_line(error)})"


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _accelerator() -> str | None:
    import torch

    # A build for CUDA names that device also where no driver is there.
    device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    if not torch.accelerator.is_available():
        return f"{device.type}, which torch is built for and cannot use here"
    return f"cuda: {torch.cuda.get_device_name()}" if device.type == "cuda" else device.type
