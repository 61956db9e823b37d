"""Every field of every file that is read, changed to something else: it is told, or refused by the file's name."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dymu.bench import results as bench_results
from dymu.bench.summary import summarise as summarise_bench
from dymu.bench.tables import page
from dymu.errors import DymuError
from dymu.evaluation.results import Results
from dymu.evaluation.summary import summarise
from dymu.evaluation.tables import accuracy_table, cost_table, provenance
from dymu.thresholds import Thresholds

ROOT = Path(__file__).parents[1]
GONE = object()
INSTEAD = (None, "x", -1, 0, 1e308, True, [], {}, [None], 10**400, GONE)


def bench_file() -> list[Any]:
    body = json.loads((ROOT / "benchmarks/results/bench-demo.json").read_text(encoding="utf-8"))
    body["cells"] = body["cells"][:1]
    for measured in body["cells"][0]["variants"].values():
        measured |= {name: value[:2] for name, value in measured.items() if isinstance(value, list)}
    return [body]


def evaluation_file() -> list[Any]:
    with (ROOT / "training/results/heldout.jsonl").open(encoding="utf-8") as stream:
        header, *lines = map(json.loads, stream)
    first = [line for line in lines if line["start"] == 0]
    return [header, *(line for line in first if "cost" not in line), next(line for line in first if "cost" in line)]


def thresholds_file() -> list[Any]:
    return [json.loads((ROOT / "models/demo/thresholds.json").read_text(encoding="utf-8"))]


def tell_bench(path: Path) -> None:
    bench = bench_results.load(path)
    page(bench)
    json.dumps(
        [dataclasses.asdict(cell) for cell in summarise_bench(bench)], default=msgspec.to_builtins, allow_nan=False
    )


def tell_evaluation(path: Path) -> None:
    results = Results.load(path)
    summaries = summarise(results)
    if summaries:
        accuracy_table(summaries, "untouched")
        cost_table(summaries)
    provenance(results)
    json.dumps(msgspec.to_builtins(summaries), allow_nan=False)


def tell_thresholds(path: Path) -> None:
    thresholds = Thresholds.load(path)
    thresholds.at(thresholds.budgets[0])
    thresholds.save(path)


def fields_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every field is; of a list the first two entries."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from fields_of(entry, (*path, key))


def changed(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    body = copy.deepcopy(body)
    *outer, last = path
    holder = body
    for key in outer:
        holder = holder[key]
    if value is GONE:
        del holder[last]
    else:
        holder[last] = value
    return body


@pytest.mark.parametrize(
    ("lines", "name", "tell"),
    [
        (bench_file, "a.json", tell_bench),
        (evaluation_file, "a.jsonl", tell_evaluation),
        (thresholds_file, "a.json", tell_thresholds),
    ],
    ids=["bench", "evaluation", "thresholds"],
)
def test_a_changed_field_is_told_or_refused(
    lines: Callable[[], list[Any]], name: str, tell: Callable[[Path], None], tmp_path: Path
):
    file, records, refused = tmp_path / name, lines(), 0

    def write(records: list[Any]) -> None:
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    write(records)
    tell(file)
    changes = [
        path
        for index in {0, 1, len(records) - 1} & {*range(len(records))}
        for path in fields_of(records[index], (index,))
    ]
    for path in changes:
        for value in INSTEAD:
            write(changed(records, path, value))
            try:
                tell(file)
            except DymuError as error:
                sentence = str(error)
            except Exception as error:
                raise AssertionError(f"{path} = {value!r}") from error
            else:
                continue
            refused += 1
            assert str(file) in sentence, (path, value)
    assert refused > len(changes) * len(INSTEAD) / 2
