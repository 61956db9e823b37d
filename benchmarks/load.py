"""Many clients of a server, some of whose requests are broken: `dymu vllm` or `dymu serve`, started here on loopback.

`python -m benchmarks.load` (in the environment of `make test-serving`) first asks every question alone, then all from
many clients at once at mixed budgets, then untouched, at 30 % and at 15 % in turn, pictures that no cache holds. The
result file holds the wrong answers and lost requests of the second, and of the third the requests per second and the
CPU time of the process that takes requests and of the one that runs the language model.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from benchmarks import record
from dymu.media.images import load

ROOT = Path(__file__).parent.parent
PHOTOS = sorted((ROOT / "src" / "dymu" / "bench" / "photos").glob("*.webp"))
BUDGETS = ("untouched", 0.3, 0.15)
QUESTIONS = ("What is this?", "What is in the picture?")
START_S = 180
BROKEN: tuple[dict[str, Any], ...] = (
    {"image": "data:image/png;base64,AAAA"},
    {"image": "data:image/png;base64,***"},
    {"budget": 1},
    {"budget": "few"},
    {"field": {"n": 0}},
)
"""What is wrong with a request."""


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        field: where a request has its budget.
    """

    url: str
    process: psutil.Process
    field: tuple[str, ...]

    def ask(self, image: str, question: str, budget: Any, words: int, **fields: Any) -> tuple[int, str]:
        """The status and the text, or the error."""
        parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
        body: dict[str, Any] = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": words}
        inner = body
        for name in self.field[:-1]:
            inner = inner.setdefault(name, {})
        inner[self.field[-1]] = budget
        data = json.dumps(body | fields).encode()
        request = urllib.request.Request(f"{self.url}/chat/completions", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, json.load(answer)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far of the process that takes requests, and of those that it started."""
        spent = self.process.cpu_times()
        times = {"front": spent.user + spent.system, "engine": 0.0}
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                spent = child.cpu_times()
                times["engine"] += spent.user + spent.system
        return times


@contextlib.contextmanager
def serving(words: Sequence[str], log: Path) -> Iterator[Server]:
    """`dymu WORDS` until the end of the context.

    Raises:
        RuntimeError: it does not answer in time.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("dymu")), *words, "--port", str(port)]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        url, began = f"http://127.0.0.1:{port}", time.monotonic()
        try:
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
                if process.poll() is not None or time.monotonic() - began > START_S:
                    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.5)
            field = ("mm_processor_kwargs", "budget") if words[0] == "vllm" else ("budget",)
            yield Server(f"{url}/v1", psutil.Process(process.pid), field)
        finally:
            process.terminate()
            process.wait(30)


def picture(number: int) -> str:
    """A picture that no other number gives, as a data URL."""
    photo = load(PHOTOS[number % len(PHOTOS)]).image.resize((224, 224))
    photo.putpixel((0, 0), (number % 256, number // 256 % 256, number // 65536))
    png = io.BytesIO()
    photo.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def under_load(server: Server, requests: int, clients: int, broken: int, words: int) -> dict[str, Any]:
    """Requests from many clients at mixed budgets, some of which are broken: what went wrong."""
    asked = [(picture(number // 6), QUESTIONS[number % 2], BUDGETS[number // 2 % 3]) for number in range(60)]
    alone = [server.ask(*one, words) for one in asked]
    chosen = random.Random(0)
    numbers = [chosen.randrange(len(asked)) for _ in range(requests - broken)]
    jobs: list[tuple[int, dict[str, Any]]] = [(number, {}) for number in numbers]
    jobs += [(chosen.randrange(len(asked)), BROKEN[number % len(BROKEN)]) for number in range(broken)]
    chosen.shuffle(jobs)

    def run(job: tuple[int, dict[str, Any]]) -> str:
        number, wrong = job
        image, question, budget = asked[number]
        try:
            status, text = server.ask(
                wrong.get("image", image), question, wrong.get("budget", budget), words, **wrong.get("field", {})
            )
        except OSError as error:
            return f"lost: {error}"
        if wrong:
            return "refused" if status == 400 else f"not refused: {status} {text[:200]}"
        return "right" if (status, text) == alone[number] else f"wrong: {status} {text!r}, alone {alone[number]}"

    with ThreadPoolExecutor(clients) as pool:
        outcomes = list(pool.map(run, jobs))
    counted = {outcome: outcomes.count(outcome) for outcome in ("right", "refused")}
    others = [outcome for outcome in outcomes if outcome not in counted]
    return {"requests": requests, "clients": clients, **counted, "others": others, "alive": server.process.is_running()}


def throughput(server: Server, rounds: int, requests: int, clients: int, words: int) -> list[dict[str, Any]]:
    """Requests per second at each budget in turn."""
    runs: dict[Any, list[dict[str, float]]] = {budget: [] for budget in BUDGETS}
    number = 1000
    for turn in range(rounds + 1):
        for budget in BUDGETS:
            pictures = [picture(number + each) for each in range(requests)]
            number += requests
            before, began = server.cpu_s(), time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                ask = functools.partial(server.ask, question=QUESTIONS[1], budget=budget, words=words)
                answers = list(pool.map(ask, pictures))
            took, after = time.perf_counter() - began, server.cpu_s()
            assert all(status == 200 for status, _ in answers), answers
            if turn:  # the first warms up
                spent = {f"{name}_cpu_s": (after[name] - before[name]) / requests for name in before}
                runs[budget].append({"per_second": requests / took, **spent})
    return [
        {"budget": budget, **{name: statistics.median(run[name] for run in of_budget) for name in of_budget[0]},
         "least": min(run["per_second"] for run in of_budget), "most": max(run["per_second"] for run in of_budget)}
        for budget, of_budget in runs.items()
    ]  # fmt: skip


def main(
    model: Annotated[str, typer.Option()] = "models/demo",
    server: Annotated[str, typer.Option(help="vllm or serve.")] = "vllm",
    unmerge: Annotated[str, typer.Option()] = "original",
    requests: Annotated[int, typer.Option()] = 200,
    clients: Annotated[int, typer.Option()] = 16,
    broken: Annotated[int, typer.Option()] = 20,
    rounds: Annotated[int, typer.Option()] = 5,
    words: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 16,
    name: Annotated[str, typer.Option(help="Of the result file.")] = "load_vllm",
) -> None:
    """Load a server, and write the result file."""
    flags = [server, model, "-b", "0.3", "--unmerge", unmerge, "--dtype", "float32"]
    if server == "vllm":
        flags += ["--max-model-len", "1024", "--limit-mm-per-prompt", '{"image": 2}', "--max-num-seqs", "16"]
    log = Path(f"{name}.log")
    with serving(flags, log) as running:
        loaded = under_load(running, requests, clients, broken, words)
        print(json.dumps(loaded, indent=1))
        rows = throughput(running, rounds, 3 * clients, clients, words)
    for row in rows:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    record.write(name, {"server": server, "unmerge": unmerge, "load": loaded, "clients": clients, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
