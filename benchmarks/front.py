"""Whether images of different requests should be encoded together ahead of vLLM: `python -m benchmarks.front`.

vLLM calls a model's processor on one thread, with the images of one request. Here so many clients ask for an image at a
time, one after the other, of the demo model's vision half on a CPU: by that one thread, or by a thread that takes all
who wait, up to a number, into one call. No transport is in it: a service in a process of its own pays for that, too.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from benchmarks import record
from benchmarks.load import PHOTOS
from dymu.serving.front import Front
from dymu.thresholds import Thresholds

DEMO = record.ROOT / "models" / "demo"
TOGETHER = 8
"""Images that are encoded together at most."""


def alone(front: Front, budget: float) -> tuple[Callable[[Image.Image], Any], Callable[[], None]]:
    """What encodes an image for a client, as vLLM does; and what ends it."""
    thread = ThreadPoolExecutor(1)
    return lambda image: thread.submit(front._encoded, [image], budget).result(), thread.shutdown


def together(front: Front, budget: float) -> tuple[Callable[[Image.Image], Any], Callable[[], None]]:
    """The same, with all who wait, up to `TOGETHER`, in one call."""
    waiting: queue.Queue[tuple[Image.Image, Future[Any]] | None] = queue.Queue()

    def work() -> None:
        while (first := waiting.get()) is not None:
            batch = [first]
            while len(batch) < TOGETHER and not waiting.empty():
                if (one := waiting.get()) is None:
                    waiting.put(None)
                    break
                batch.append(one)
            for (_, asked), encoded in zip(batch, front._encoded([image for image, _ in batch], budget), strict=True):
                asked.set_result(encoded)

    def ask(image: Image.Image) -> Any:
        asked: Future[Any] = Future()
        waiting.put((image, asked))
        return asked.result()

    thread = threading.Thread(target=work)
    thread.start()
    return ask, lambda: (waiting.put(None), thread.join())[1]


def images_per_second(ask: Callable[[Image.Image], Any], images: list[Image.Image], clients: int) -> float:
    """So many clients, each of whom asks again once it was answered."""
    with ThreadPoolExecutor(clients) as pool:
        began = perf_counter()
        list(pool.map(ask, images))
        return len(images) / (perf_counter() - began)


def main(
    budget: Annotated[float, typer.Option(help="Image tokens.")] = 38,
    images: Annotated[int, typer.Option(help="In a round.")] = 64,
    repeats: int = 5,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
) -> None:
    """Both ways in turn at 1, 8 and 32 clients, and write the result file."""
    torch.set_num_threads(threads)
    front = Front(str(DEMO), Thresholds.load(DEMO), "original")
    shown = [Image.open(PHOTOS[index % len(PHOTOS)]).convert("RGB") for index in range(images)]
    ways = {"alone": alone, "together": together}
    found: dict[tuple[int, str], list[float]] = {}
    for turn in range(repeats + 1):
        for clients in (1, 8, 32):
            for name, way in ways.items():
                ask, end = way(front, budget)
                rate = images_per_second(ask, shown, clients)
                end()
                if turn:  # the first round warms up
                    found.setdefault((clients, name), []).append(rate)
    rows = [
        {"clients": clients, **{name: median(found[clients, name]) for name in ways}} for clients in (1, 8, 32)
    ]  # fmt: skip
    for row in rows:
        print(row)
    print(record.write("front", {"budget": budget, "together_at_most": TOGETHER, "threads": threads, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
