"""Calibration, captions and evaluation over the workers of a Ray cluster, or of one that is started here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from dymu.calibration.images import share
from dymu.captioning import Row, Source
from dymu.errors import DymuError
from dymu.evaluation.results import Header, Line
from dymu.evaluation.run import Answering, Job, Workers
from dymu.thresholds import Thresholds

LOCAL = "local"
READY_S = 900
"""Until a worker has loaded its model, at most."""
ATTEMPTS = 3
"""At a calibration whose workers die."""


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
    _check_answers(address)
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


def _check_answers(address: str) -> None:
    """Ray itself would wait for minutes.

    Raises:
        DymuError: nothing listens at an address with a port.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise DymuError(f"no Ray cluster answers at {address} ({error}): start one, or take --ray local.") from error


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

    async def add(self, number: int, worker: int, numbers: Any) -> Any:
        """The same, added up."""
        return sum(await self.tell(number, worker, numbers))

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

    def _said(self, method: Any, value: Any) -> Any:
        import ray

        self._number += 1
        return ray.get(method.remote(self._number, self._worker, value))

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._said(self._exchange.add, numbers.numpy()))

    def gather(self, values: Sequence[Any]) -> list[Any]:
        return [value for said in self._said(self._exchange.tell, list(values)) for value in said]


class _Calibrating:
    """An actor that holds the hidden states of its own images."""

    def __init__(self, load: Callable[[], tuple[Any, Any]]) -> None:
        torch.set_num_threads(1)  # each has one CPU
        self._load = load

    def ready(self) -> None:
        """Loads the model."""
        self._model, self._processor = self._load()

    def share(self, images: list[Any], budgets: Any, exchange: Any, worker: int, options: dict[str, Any]) -> Any:
        told = _Told(exchange, worker)
        return share(self._model, self._processor, images, budgets, told, progress=False, **options)


def calibrate(
    load: Callable[[], tuple[Any, Any]],
    images: Sequence[Any],
    budgets: Sequence[int | float] | None,
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
        DymuError: see `dymu.calibrate` and `workers_for`; or workers died several times over.
    """
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(_Died):
            return _calibrated(load, images, budgets, workers, batch_size, options)
    return _calibrated(load, images, budgets, workers, batch_size, options)


class _Died(DymuError):
    """A worker died, and the hidden states of its images with it."""


def _calibrated(
    load: Callable[[], tuple[Any, Any]],
    images: Sequence[Any],
    budgets: Sequence[int | float] | None,
    workers: int | None,
    batch_size: int,
    options: dict[str, Any],
) -> tuple[Thresholds, list[str]]:
    import ray

    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    count, needs = workers_for(workers)
    count = max(min(count, len(batches)), 1)
    exchange = ray.remote(num_cpus=0)(_Exchange).remote(count)
    actor = ray.remote(**needs)(_Calibrating)
    actors = [actor.remote(load) for _ in range(count)]
    options = {**options, "batch_size": batch_size}
    shares = [[image for batch in batches[worker::count] for image in batch] for worker in range(count)]
    try:
        with _own_errors():
            _wait([one.ready.remote() for one in actors])
            found = ray.get(
                [
                    one.share.remote(own, None if budgets is None else list(budgets), exchange, worker, options)
                    for worker, (one, own) in enumerate(zip(actors, shares, strict=True))
                ]
            )
    finally:
        for one in (*actors, exchange):  # where one failed, the others wait for what it has to tell
            ray.kill(one)
    return found[0][0], [folder for _, left_out in found for folder in left_out]


def _wait(ready: list[Any]) -> None:
    """Until all workers are there, since those that are would wait for the others.

    Raises:
        DymuError: the cluster has no room for them.
    """
    import ray

    there, missing = ray.wait(ready, num_returns=len(ready), timeout=READY_S)
    ray.get(there)
    if missing:
        raise DymuError(
            f"{len(missing)} of {len(ready)} workers did not start within {READY_S} s, as where others use the "
            "cluster: take fewer with --workers."
        )


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """An error of ours within a worker, as it was."""
    from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, DymuError) else error from None
    except GetTimeoutError as error:
        raise DymuError(
            f"no worker started within {READY_S} s, as where others use the cluster: take fewer with --workers."
        ) from error
    except RayActorError as error:
        raise _Died(
            "workers of the Ray cluster died again and again, as where memory runs out: take fewer of them."
        ) from error


def evaluating(build: Callable[[], dict[str, Any]], workers: int | None = None) -> Workers:
    """What answers the batches of `dymu.evaluate` over the workers of the running cluster, in any order.

    Args:
        build: gives each worker the model, its processor, the tasks and the thresholds, as `Answering` takes them.
    """

    def run(header: Header, jobs: Sequence[Job]) -> Iterator[tuple[Job, Sequence[Line]]]:
        yield from _over_workers(lambda: Answering(**build(), header=header), jobs, workers)

    return run


def _over_workers(build: Callable[[], Any], jobs: Sequence[Any], workers: int | None) -> Iterator[tuple[Any, Any]]:
    """Each job, and what a worker that `build` makes gives for it, as they are done; one whose worker dies is done by
    another."""
    import ray.data

    if not jobs:
        return
    count, needs = workers_for(workers)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    context.wait_for_min_actors_s = READY_S
    blocks = ray.data.from_items([{"job": pickle.dumps(job)} for job in jobs], override_num_blocks=len(jobs))
    done = blocks.map_batches(
        _Worker, fn_constructor_args=(build,), batch_size=1, concurrency=min(count, len(jobs)), **needs
    )
    with _own_errors():
        for row in done.iter_rows():
            yield pickle.loads(row["job"]), pickle.loads(row["done"])


class _Worker:
    """What a worker of Ray Data holds. Jobs and what is done travel pickled, within the cluster."""

    def __init__(self, build: Callable[[], Any]) -> None:
        torch.set_num_threads(1)  # each has one CPU
        self._build = build

    @cached_property
    def _work(self) -> Callable[[Any], Any]:
        """Made with the first job, so that what fails is an error of a job."""
        work: Callable[[Any], Any] = self._build()
        return work

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        done = [pickle.dumps(self._work(pickle.loads(job))) for job in block["job"]]
        return {"job": block["job"], "done": done}


def captioned(
    build: Callable[[], Any], workers: int | None = None
) -> Callable[[Iterable[Sequence[Source]]], Iterator[Sequence[Row]]]:
    """What captions batches over the workers of the running cluster, in any order, see `dymu.captioning.caption`.

    A batch whose worker is killed is captioned by another.
    """

    def run(batches: Iterable[Sequence[Source]]) -> Iterator[Sequence[Row]]:
        for _, rows in _over_workers(build, list(batches), workers):
            yield rows

    return run
