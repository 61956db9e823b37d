"""`dymu serve` and `dymu vllm`: a model with merged image tokens behind the OpenAI API."""

import ipaddress
import os
import re
import socket
import sys
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from dymu.choices import IN_VLLM, Unmerge
from dymu.cli import errors
from dymu.cli.app import (
    SERVE,
    Cache,
    CountingBy,
    Debug,
    Device,
    Dtype,
    Model,
    Revision,
    ThresholdsName,
    UnmergeBy,
    app_command,
    check_cache,
    parse_budget,
    quieten_transformers,
)
from dymu.cli.output import Output

Budget = Annotated[
    float | None,
    typer.Option("--budget", "-b", metavar="N|0.15", parser=parse_budget, show_default="the only calibrated one",
                 help="Image tokens to keep on average, where a request does not say: a number, or a fraction of all."),
]  # fmt: skip


@app_command(SERVE, "dymu serve llava-hf/llava-1.5-7b-hf --thresholds llava.json -b 96")
def serve(
    model: Model,
    thresholds: ThresholdsName = None,
    budget: Budget = None,
    counting: CountingBy = "mean",
    unmerge: UnmergeBy = "exact",
    cache: Cache = "merged",
    host: Annotated[str, typer.Option(metavar="NAME", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0: any that is free.")] = 8000,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    debug: Debug = False,
) -> None:
    """Serve a model by transformers' own server: OpenAI's chat API, exact, one request at a time.

    A request may have a field `budget` of its own, or one for each image; "untouched" merges nothing. The answer's
    `usage.image_tokens` says how many there were, and how many were kept. Images come as data URLs.
    """
    out = Output(False)
    check_cache(cache, unmerge)
    from dymu.cli import models

    named = models.named(model, revision)
    calibrated = named.thresholds(thresholds)
    if counting == "mean" or budget is None:
        budget = calibrated.tokens_for(budget)
    listening = listen(host, port)
    with out.during("loading torch and transformers"):
        quieten_transformers()
        transformers_server = _server()
        import uvicorn

        from dymu.counts import Count

        count = Count.of(counting, budget)
        count.rule(calibrated)
    with out.during(f"loading {named.name}"):
        served = transformers_server.Served(
            name=named.name,
            source=named.source + (f"@{revision}" if revision else ""),
            thresholds=calibrated,
            budget=budget,
            counting=counting,
            options={"unmerge": unmerge, "cache": cache},
            device=str(models.device_named(device)),
            dtype=dtype or "auto",
        )
    where = f"http://{in_url(host)}:{listening.getsockname()[1]}/v1"
    out.note(f"serving {named.name} at {where}: unmerge={unmerge}, {count}, one request at a time")
    warn_of_others(out, host)
    config = uvicorn.Config(transformers_server.app_of(served), log_level="warning", limit_concurrency=256)
    uvicorn.Server(config).run(sockets=[listening])


def _server() -> Any:
    missing = [name for name in ("fastapi", "uvicorn", "openai", "accelerate") if find_spec(name) is None]
    if missing:
        raise errors.BadInput(f"serving needs {' and '.join(missing)}, not installed: `pip install 'dymu[serve]'`.")
    from dymu.serving import transformers_server

    return transformers_server


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; before anything is loaded, since it may be taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise errors.BadInput(
            f"cannot listen at {host}, port {port} ({errors.one_line(error)}): choose another with --host or --port."
        ) from error


def in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def warn_of_others(out: Output, host: str) -> None:
    try:
        alone = ipaddress.ip_address(host).is_loopback
    except ValueError:
        alone = host == "localhost"
    if not alone:
        out.note(f"{host} may be reached from other machines, and no password is asked for.")


@app_command(
    SERVE,
    "dymu vllm llava-hf/llava-1.5-7b-hf --thresholds llava.json -b 96 --max-model-len 4096",
    passes_on=True,
)
def vllm(
    context: typer.Context,
    model: Model,
    thresholds: ThresholdsName = None,
    budget: Budget = None,
    counting: CountingBy = "mean",
    unmerge: Annotated[
        Unmerge, typer.Option(metavar="NAME", help=f"How the model attends to merged tokens: {', '.join(IN_VLLM)}.")
    ] = IN_VLLM[0],
    host: Annotated[str, typer.Option(metavar="NAME", help="Where to listen.")] = "127.0.0.1",
    revision: Revision = None,
    debug: Debug = False,
) -> None:
    """Serve a model by vLLM, with any further flag of `vllm serve`.

    A request may have a budget of its own: `"mm_processor_kwargs": {"budget": 48}`; "untouched" merges nothing. See
    docs/serving.md for what is exact.
    """
    out = Output(False)
    from dymu.cli import models
    from dymu.serving import vllm as plugin

    named = models.named(model, revision)
    with out.during("looking at the model"):
        added = plugin.options(named.source, thresholds, budget, unmerge, counting=counting, revision=revision)
    given = {re.split("[=.]", word)[0].replace("_", "-") for word in context.args if word.startswith("--")}
    if taken := sorted(given & plugin.OWN_FLAGS):
        raise typer.BadParameter(
            f"{' and '.join(taken)} is written by dymu, or would undo what it writes: leave it out."
        )
    plugin.check_flags(added, context.args)
    words = ["--host", host, *plugin.words(added, given), *context.args]
    words += ["--revision", revision] if revision else []
    how = "is exact" if unmerge == "exact" else "approximates what the untouched model computes"
    out.note(f"vLLM serves {named.name} with merged image tokens; unmerge={unmerge} {how}")
    warn_of_others(out, host)
    os.execv(sys.executable, [sys.executable, "-m", *plugin.program(named.source), *words])
