"""Calibration, captions and evaluation over the workers of a Ray cluster, or of one that is started here."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from dymu.calibration.images import share
from dymu.captioning import Row, Source
from dymu.errors import DymuError
from dymu.thresholds import Thresholds

LOCAL = "local"


@contextlib.contextmanager
def started(address: str) -> Iterator[None]:
    """A cluster to work on: that at an address, or, for `local`, one of this machine that ends with the context.

    Raises:
        DymuError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise DymuError("Ray is not installed: `pip install 'dymu[ray]'`.") from error
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    where = {"include_dashboard": False} if address == LOCAL else {"address": address}
    try:
        ray.init(**where, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except Exception as error:  # Ray raises its own, and those of what it stands on
        raise DymuError(f"no Ray cluster answers at {address} ({error}): start one, or take --ray local.") from error
    try:
        yield
    finally:
        ray.shutdown()


def workers_for(asked: int | None) -> tuple[int, dict[str, float]]:
    """How many workers, and what each needs: a GPU where the cluster has any, else one of the CPUs.

    Raises:
        DymuError: the cluster has fewer.
    """
    import ray

    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") else "CPU"
    there = int(resources.get(kind, 1))
    if asked is not None and asked > there:
        raise DymuError(f"the Ray cluster has {there} {kind}s, fewer than {asked} workers: take --workers {there}.")
    return asked or there, {"num_gpus": 1.0, "num_cpus": 0.0} if kind == "GPU" else {"num_cpus": 1.0}


class _Exchange:
    """An actor by which the workers of a calibration tell each other, round after round."""

    def __init__(self, workers: int) -> None:
        self._workers, self._rounds, self._changed = workers, dict[int, dict[int, Any]](), asyncio.Condition()

    async def tell(self, number: int, worker: int, value: Any) -> list[Any]:
        """What every worker said in a round, in the order of the workers, once all have."""
        async with self._changed:
            said = self._rounds.setdefault(number, {})
            said[worker] = value
            self._changed.notify_all()
            await self._changed.wait_for(lambda: len(said) == self._workers)
            self._rounds.pop(number - 1, None)
        return [said[worker] for worker in range(self._workers)]


class _Told:
    """See `dymu.calibration.quantile.Together`."""

    def __init__(self, exchange: Any, worker: int) -> None:
        self._exchange, self._worker, self._number = exchange, worker, 0

    def _tell(self, value: Any) -> list[Any]:
        import ray

        self._number += 1
        said: list[Any] = ray.get(self._exchange.tell.remote(self._number, self._worker, value))
        return said

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(sum(self._tell(numbers.numpy())))

    def gather(self, values: Sequence[Any]) -> list[Any]:
        return [value for said in self._tell(list(values)) for value in said]


class _Calibrating:
    """An actor that holds the hidden states of its own images."""

    def __init__(self, load: Callable[[], tuple[Any, Any]], threads: int) -> None:
        torch.set_num_threads(threads)
        self._model, self._processor = load()

    def share(self, images: list[Any], budgets: Any, exchange: Any, worker: int, options: dict[str, Any]) -> Any:
        told = _Told(exchange, worker)
        return share(self._model, self._processor, images, budgets, told, progress=False, **options)


def calibrate(
    load: Callable[[], tuple[Any, Any]],
    images: Sequence[Any],
    budgets: Sequence[int | float],
    workers: int | None = None,
    *,
    batch_size: int = 8,
    **options: Any,
) -> tuple[Thresholds, list[str]]:
    """`dymu.calibrate` over the workers of the running cluster, with the same thresholds.

    Args:
        load: gives each worker the model and its processor.
        images: as one process would take them; each worker gets whole batches, and keeps their hidden states.
        options: see `dymu.calibrate`.

    Raises:
        DymuError: see `dymu.calibrate` and `workers_for`.
    """
    import ray

    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    count, needs = workers_for(workers)
    count = max(min(count, len(batches)), 1)
    exchange = ray.remote(num_cpus=0)(_Exchange).remote(count)
    actor = ray.remote(**needs)(_Calibrating)
    threads = max((os.cpu_count() or 1) // count, 1)
    actors = [actor.remote(load, threads) for _ in range(count)]
    with _own_errors():
        found = ray.get(
            [
                one.share.remote(
                    [image for batch in batches[worker::count] for image in batch],
                    list(budgets),
                    exchange,
                    worker,
                    {**options, "batch_size": batch_size},
                )
                for worker, one in enumerate(actors)
            ]
        )
    return found[0][0], [folder for _, left_out in found for folder in left_out]


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """An error of ours within a worker, as it was."""
    from ray.exceptions import RayActorError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, DymuError) else error from None
    except RayActorError as error:
        raise DymuError(
            "a worker of the Ray cluster died, as where memory ran out, and the hidden states of its images with it: "
            "take fewer workers, and run it again."
        ) from error


class _Captioning:
    """What a worker of Ray Data holds."""

    def __init__(self, build: Callable[[], Any], threads: int) -> None:
        torch.set_num_threads(threads)
        self._captioner = build()

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        return {"rows": [self._captioner(list(batch)) for batch in block["batch"]]}


def captioned(
    build: Callable[[], Any], workers: int | None = None
) -> Callable[[Iterable[Sequence[Source]]], Iterator[Sequence[Row]]]:
    """What captions batches over the workers of the running cluster, in any order, see `dymu.captioning.caption`.

    A batch whose worker is killed is captioned by another.
    """

    def run(batches: Iterable[Sequence[Source]]) -> Iterator[Sequence[Row]]:
        import ray.data

        count, needs = workers_for(workers)
        items = [{"batch": list(batch)} for batch in batches]
        if not items:
            return
        ray.data.DataContext.get_current().enable_progress_bars = False
        threads = max((os.cpu_count() or 1) // count, 1)
        blocks = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Captioning, fn_constructor_args=(build, threads), batch_size=1, concurrency=min(count, len(items)), **needs
        )
        for row in blocks.iter_rows():
            yield row["rows"]

    return run
