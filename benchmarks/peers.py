"""The tables of every method under every form of unmerging, from result files of `dymu evaluate`."""

from __future__ import annotations

import msgspec
import numpy as np

from benchmarks.record import RESULTS, ROOT, made_by, read
from dymu.evaluation.methods import METHODS, UNTOUCHED, Row
from dymu.evaluation.results import Answers, Examples, Results
from dymu.evaluation.summary import SHARE, Share, share
from dymu.evaluation.tables import points, provenance, series
from dymu.measure.markdown import markdown

FOLDER = ROOT / "training" / "results"
FORMS = ("none", "original", "compact", "exact")
REFERENCE = "dtome"
"""What the others are told from."""
BESIDE = (REFERENCE, "mm-tok", "random", "downscale")
"""What methods within the language model stand beside."""


class Compared:
    """The questions of a result file that every row has answered.

    Args:
        name: of the file.
        kind: of the questions; None: all.
    """

    def __init__(self, name: str, kind: str | None = None) -> None:
        self.path = FOLDER / f"{name}.jsonl"
        self.results = Results.load(self.path)
        rows = self.results.header.rows
        answered = [self.results.answers.get(row.key, {}).keys() for row in rows]
        self.batches = sorted(set.intersection(*map(set, answered)))
        examples: list[Examples] = [self.results.examples[batch] for batch in self.batches]
        kinds = [each for batch in examples for each in batch.kind]
        self._asked = np.array([kind in (None, each) for each in kinds])

    def of(self, row: Row, field: str) -> np.ndarray:
        """A number of each question's answer."""
        answers: list[Answers] = [self.results.answers[row.key][batch] for batch in self.batches]
        values = [value for batch in answers for value in getattr(batch, field)]
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)[self._asked]

    def less(self, field: str, row: Row, other: Row) -> Share:
        """That of a row less that of another, on each question."""
        return share(self.of(row, field) - self.of(other, field), (-1, 1) if field == "scores" else (-np.inf, np.inf))

    def methods(self, within: bool = False) -> list[dict[str, Row]]:
        """For each method, in order, its row of each form; those of single tokens equal `exact` in most.

        Args:
            within: those within the language model, and some to tell them from; else all others.
        """
        found = dict[tuple[str, str], dict[str, Row]]()
        for row in self.results.header.rows:
            group = METHODS[row.method].group
            if group and (group == "L" or row.method in BESIDE if within else group != "L"):
                found.setdefault((row.method, row.options), {})[row.unmerge] = row
        return list(found.values())

    def made_by(self, asked: str = "") -> str:
        """Where the numbers come from."""
        asked = asked or f"{int(self._asked.sum())} questions"
        return f"\n\n<sub>`{self.path.relative_to(ROOT)}`, {asked}: {provenance(self.results)}</sub>"


def _forms(name: str, within: bool = False) -> str:
    """Right answers in every form, what exact unmerging adds, and how far that is from the untouched model."""
    compared = Compared(name)
    rows = compared.methods(within)
    reference = next(forms["exact"] for forms in rows if forms["exact"].method == REFERENCE)
    lines = []
    for forms in sorted(rows, key=lambda forms: compared.of(_most(forms), "kl").mean()):
        most = _most(forms)
        accuracy = [f"{100 * compared.of(forms[way], 'scores').mean():.1f}" if way in forms else "" for way in FORMS]
        divergences = [f"{compared.of(forms[way], 'kl').mean():.3g}" if way in forms else "" for way in FORMS]
        exact = "exact" in forms
        lines.append(
            [
                series(msgspec.structs.replace(forms["none"], unmerge="none")),
                f"{compared.of(most, 'kept').mean():.0f}",
                *accuracy,
                points(compared.less("scores", most, UNTOUCHED)),
                points(compared.less("scores", most, forms["none"])) if exact else "",
                points(compared.less("scores", most, forms["original"])) if "original" in forms else "",
                "; ".join(filter(None, divergences)),
                points(compared.less("scores", most, reference)) if most != reference else "",
                _nats(compared.less("kl", most, reference)) if most != reference else "",
            ]
        )
    full = 100 * compared.of(UNTOUCHED, "scores").mean()
    header = [
        f"right, %; untouched {full:.1f}", "tokens", *FORMS, "exact less untouched", "exact less none",
        "exact less original", f"KL: {'; '.join(FORMS)}", f"exact less {METHODS[REFERENCE].label}'s", "the same in KL",
    ]  # fmt: skip
    return markdown(header, lines) + compared.made_by()


def _most(forms: dict[str, Row]) -> Row:
    """The row that is nearest to the untouched model by how it attends."""
    return next(forms[way] for way in reversed(FORMS) if way in forms)


def _nats(difference: Share) -> str:
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def _where(name: str) -> str:
    """The same of questions for a place."""
    compared = Compared(name, "where")
    lines = []
    for forms in sorted(compared.methods(), key=lambda forms: -compared.of(_most(forms), "scores").mean()):
        cells = [_percent(share(compared.of(forms[way], "scores"), SHARE)) if way in forms else "" for way in FORMS]
        lines.append([series(msgspec.structs.replace(forms["none"], unmerge="none")), *cells])
    full = _percent(share(compared.of(UNTOUCHED, "scores"), SHARE))
    return markdown([f"where is …, right, %; untouched {full}", *FORMS], lines) + compared.made_by()


def _percent(part: Share) -> str:
    return f"{100 * part.mean:.0f} [{100 * part.low:.0f}, {100 * part.high:.0f}]"


def _times(name: str) -> str:
    """Times of a prompt by itself, in parts of the untouched model's, of the same prompts."""
    compared = Compared(name)
    costs = compared.results.costs
    prompts = sorted(set.intersection(*(set(costs.get(row.key, {})) for row in compared.results.header.rows)))

    def part(row: Row, field: str) -> float:
        return float(
            np.median([getattr(costs[row.key][prompt], field) for prompt in prompts])
            / np.median([getattr(costs[UNTOUCHED.key][prompt], field) for prompt in prompts])
        )

    lines = []
    for forms in [*compared.methods(), *(rows for rows in compared.methods(within=True) if _group(rows) == "L")]:
        encoder = float(np.median([part(row, "encoder_ms") for row in forms.values()]))
        prefill = [f"{part(forms[way], 'prefill_ms'):.2f}" if way in forms else "" for way in FORMS]
        lines.append([series(msgspec.structs.replace(forms["none"], unmerge="none")), f"{encoder:.2f}", *prefill])
    lines.sort(key=lambda line: float(line[1]))
    header = ["parts of the untouched model's", "encoder, choosing within", *(f"prefill, {way}" for way in FORMS)]
    return markdown(header, lines) + compared.made_by(f"{len(prompts)} prompts by themselves")


def _group(forms: dict[str, Row]) -> str:
    return METHODS[next(iter(forms.values())).method].group


def peers_50() -> str:
    """Of a mean of 50 %."""
    return _forms("peers-50")


def peers_30() -> str:
    """Of a mean of 30 %."""
    return _forms("peers-30")


def peers_15() -> str:
    """Of a mean of 15 %."""
    return _forms("peers-15")


def peers_8() -> str:
    """Of a mean of 8 %."""
    return _forms("peers-8")


def layers_50() -> str:
    """Of a mean over layers of 50 %."""
    return _forms("peers-50", within=True)


def layers_30() -> str:
    """Of a mean over layers of 30 %."""
    return _forms("peers-30", within=True)


def peers_vlm() -> str:
    """Of a mean of 30 %, of the strong model."""
    return _forms("peers-vlm-30")


def layers_vlm() -> str:
    """Of a mean over layers of 30 %, of the strong model."""
    return _forms("peers-vlm-30", within=True)


def places_30() -> str:
    """Of a mean of 30 %."""
    return _where("peers-30")


def places_15() -> str:
    """Of a mean of 15 %."""
    return _where("peers-15")


def peers_times() -> str:
    """Of a mean of 30 %."""
    return _times("peers-times")


def selection() -> str:
    """How long a method takes for one image, on one thread and on a GPU."""
    result, on_gpu = read(RESULTS / "methods.json"), read(RESULTS / "methods_gpu.json")
    there = {row["method"]: f"{row['ms']:.1f}" for row in on_gpu["rows"]}
    rows = sorted(result["rows"], key=lambda row: float(row["ms"]))
    cells = [[row["label"], f"{row['ms']:.1f}", there.get(row["method"], "")] for row in rows]
    return markdown(["milliseconds", "CPU", on_gpu["device"]], cells) + made_by(result) + made_by(on_gpu)


FUNCTIONS = (
    peers_50, peers_30, peers_15, peers_8, layers_50, layers_30, peers_vlm, layers_vlm, places_30, places_15,
    peers_times, selection,
)  # fmt: skip
