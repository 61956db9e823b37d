"""How far forms of unmerging are from `exact` on the demo model: KL(exact ‖ form) at each token of exact's answer.

`python -m experiments.forms_on_demo heldout/heldout` asks the held-out questions that `training/README.md` makes. One
encoding of a batch serves all forms, and KL(untouched ‖ exact), at the tokens of the untouched answer, says what there
is to lose at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu
from benchmarks.record import ROOT, write
from dymu.evaluation.divergence import divergence
from dymu.evaluation.rows import encoded
from dymu.evaluation.tasks.folder import Folder
from dymu.measure.progress import Bar
from dymu.prompting import Answer, answers, inputs_for, logits_of

MODEL, BUDGETS, BATCH = "models/demo", (0.5, 0.3, 0.15, 0.08), 20
FORMS: dict[str, dict[str, Any]] = {
    "representative": {"unmerge": "representative"},
    "representative, two of each group": {"unmerge": "representative", "representatives": 2},
    "compact": {"unmerge": "compact"},
    "original": {"unmerge": "original"},
    "restore": {"unmerge": "restore"},
    "none": {"unmerge": "none"},
}


def main(
    questions: Annotated[str, typer.Argument(help="A folder of questions.")],
    thresholds: Annotated[str, typer.Option(help="With all of the budgets.")],
    limit: int = 827,
) -> None:
    """Compare all forms with `exact`."""
    model, processor = (kind.from_pretrained(ROOT / MODEL) for kind in (AutoModelForImageTextToText, AutoProcessor))
    task = Folder(questions)
    limit = min(limit, len(task))
    measured = {budget: {form: list[float]() for form in ("untouched", *FORMS)} for budget in BUDGETS}
    with Bar(True) as bar:
        todo = bar.add_task("questions", total=limit)
        for start in range(0, limit, BATCH):
            examples = [task[index] for index in range(start, min(start + BATCH, limit))]
            inputs = inputs_for(model, processor, [(example.images, example.question) for example in examples])
            untouched = answers(model, processor, inputs, task.max_new_tokens)
            for budget, forms in measured.items():
                options: dict[str, Any] = {"thresholds": thresholds, "budget": budget}
                with dymu.apply(model, **options):
                    shown = encoded(model, inputs)
                    exact = answers(model, processor, shown, task.max_new_tokens)
                    forms["untouched"] += _apart(untouched, model, shown)
                for form, how in FORMS.items():
                    with dymu.apply(model, **options, **how):
                        forms[form] += _apart(exact, model, shown)
            bar.advance(todo, len(examples))
    rows = [
        {"budget": budget, "forms": {form: _summary(values) for form, values in forms.items()}}
        for budget, forms in measured.items()
    ]
    found = {"model": MODEL, "questions": limit, "rows": rows}
    print(write("forms_on_demo", found, ROOT / "experiments" / "results"))


def _apart(said: Sequence[Answer], model: Any, inputs: dict[str, Any]) -> list[float]:
    """KL(said ‖ model) for each prompt, in nats per token of what was said."""
    logits = logits_of(model, inputs, [answer.tokens for answer in said])
    apart = [divergence(answer.logits, other) for answer, other in zip(said, logits, strict=True)]
    return [value for value in apart if value is not None]


def _summary(values: list[float]) -> dict[str, float]:
    """The mean, and its bootstrap interval of 95 %."""
    chance = np.random.default_rng(0)
    means = chance.choice(values, (2000, len(values))).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": fmean(values), "low": float(low), "high": float(high), "n": len(values)}


if __name__ == "__main__":
    typer.run(main)
