"""What forms of unmerging change of a language model that was trained on text, from 576 to 7,290 image tokens.

`python -m experiments.forms_on_text` asks SmolLM2-135M (fetched as `training/assets.py` says)
about pictures of 27 x 27 or 24 x 24 tokens that are words: a picture is cut into regions, each the word of a thing, and
merged as a real photo was. Behind the pictures stands what there is to be seen and where. The measure is
KL(exact ‖ form) at the tokens of that text, and for the untouched model KL(untouched ‖ exact).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling

import dymu
from benchmarks.record import ROOT, write
from dymu.bench.replay import recorded
from dymu.hooks.attention import angles_of
from dymu.hooks.call import carry_items
from dymu.hooks.language import LanguageHooks
from dymu.item import Item
from dymu.measure.progress import Bar
from dymu.unmerging import near_far
from experiments import forms_on_demo
from training.vlm import base
from training.vlm.gguf import Gguf

SIZES = {576: (576, 1), 2916: (729, 4), 7290: (729, 10)}
"""Image tokens of a prompt: those of a picture, and pictures."""
SAMPLES = {576: 12, 2916: 6, 7290: 3}
KEPT = {576: (173, 89), 729: (182, 102)}
"""Recorded budgets of a picture of so many tokens."""

THINGS = (
    "sky", "grass", "tree", "house", "road", "river", "dog", "cat", "horse", "boat", "car", "wall", "table", "chair",
    "window", "door", "flower", "mountain", "bridge", "cloud", "person", "lamp", "fence", "bird",
)  # fmt: skip
REGIONS = 9
TEXT = (
    "\nThe picture shows a {0}, a {1} and a {2}. On the left there is a {3}, on the right there is a {4}, and the "
    "thing in the middle is a {5}. The largest thing is the {6}, and next to it there is a"
)
ASKED_AT = ((0.1, 0.5), (0.9, 0.5), (0.5, 0.5), (0.5, 0.05), (0.5, 0.95), (0.5, 0.5), (0.3, 0.3))
"""Row and column, as parts of the last picture, of the things that the text names."""

FORMS: dict[str, dict[str, Any]] = forms_on_demo.FORMS | {
    "representative, near and far": {"unmerge": "representative"},
    "compact, at mean positions": {"unmerge": "compact"},
}


@dataclass(frozen=True)
class Language:
    """A language model behind a tower that is never asked, and its tokenizer."""

    model: LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast


def language_model() -> Language:
    """SmolLM2."""
    file = Gguf.open(base.language_gguf())
    tokenizer = base.build_tokenizer(file.metadata)
    tower = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1, image_size=378, patch_size=14
    )
    image = tokenizer.convert_tokens_to_ids(base.IMAGE)
    language = base.language_config(file.metadata)
    config = LlavaConfig(vision_config=tower, text_config=language, image_token_index=image, image_seq_length=729)
    model = LlavaForConditionalGeneration(config).float().eval()
    missing = model.model.language_model.load_state_dict(base.language_weights(file), strict=False).missing_keys
    assert not missing, missing
    model.tie_weights()
    return Language(model, tokenizer)


@contextmanager
def at_mean_positions() -> Iterator[None]:
    """Within it, merged tokens stand at the mean of their group's positions, which is none of them."""
    turns = LanguageHooks._turns

    def mean(self: LanguageHooks, like: Tensor, positions: Tensor, new: Any, history: Any) -> Any:
        if new.plain:
            return turns(self, like, positions, new, history)
        return angles_of(self.parts, like, new.map.average(positions[..., None].float())[..., 0]), None

    LanguageHooks._turns = mean  # type: ignore[method-assign]
    try:
        yield
    finally:
        LanguageHooks._turns = turns  # type: ignore[method-assign]


@contextmanager
def near_far_from(tokens: int) -> Iterator[None]:
    """Within it, prompts from so many tokens on have near and far keys."""
    before, near_far.LONG = near_far.LONG, tokens
    try:
        yield
    finally:
        near_far.LONG = before


class Prompt:
    """Pictures of words, merged as photos were, and a text behind them.

    Args:
        number: of the sample; it says which photos, which regions and which things.
    """

    def __init__(self, lm: Language, size: int, budget: int, number: int):
        tokens, pictures = SIZES[size]
        merges, chance = recorded(tokens), torch.Generator().manual_seed(number)
        photos, side = len(merges.photos), round(tokens**0.5)
        place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flatten(0, 1)
        place = (place + 0.5) / side
        features, items, self.kept = list[Tensor](), list[Item](), 0
        for picture in range(pictures):
            merged = merges.merged(budget, (number * pictures + picture) % photos)
            middles = torch.rand(REGIONS, 2, generator=chance)
            things = [THINGS[index] for index in torch.randperm(len(THINGS), generator=chance)[:REGIONS]]
            region = torch.cdist(place, middles).argmin(1)
            words = torch.tensor([lm.tokenizer.encode(f" {thing}")[0] for thing in things])
            # A group is one thing: that of its first token.
            leaders = merged.first()[0][merged.group[0]]
            features.append(lm.model.get_input_embeddings()(words[region[leaders]]).detach())
            items.append(_item(leaders))
            self.kept += merged.width
        carry_items(features, items)
        self.shown = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        named = [things[region[(torch.tensor(at) - place).square().sum(1).argmin()]] for at in ASKED_AT]
        behind = lm.tokenizer.encode(TEXT.format(*named))
        self.behind, config = len(behind), lm.model.config
        self.ids = torch.tensor([[config.text_config.bos_token_id] + [config.image_token_id] * size + behind])

    def untouched(self) -> Any:
        """The same without what merged."""
        return {
            "image": BaseModelOutputWithPooling(pooler_output=[x.clone() for x in self.shown["image"].pooler_output])
        }


def _item(leaders: Tensor) -> Item:
    side = int(len(leaders) ** 0.5)
    at = torch.stack((torch.arange(len(leaders)) // side, torch.arange(len(leaders)) % side), 1).float()
    return Item(
        leaders, torch.ones_like(leaders, dtype=torch.bool), torch.zeros_like(leaders), at,
        torch.zeros(len(leaders), 3), torch.zeros(1, 3, side, side), video=False,
    )  # fmt: skip


@torch.inference_mode()
def log_probs(model: Any, prompt: Prompt, options: dict[str, Any] | None) -> Tensor:
    """[T, V], at each token of the text."""
    asked = {"input_ids": prompt.ids, "use_cache": False, "logits_to_keep": prompt.behind}
    if options is None:
        logits = model(**asked, mm_encoder_outputs=prompt.untouched()).logits
    else:
        with dymu.apply(model, merge=dymu.FixedMerge(keep=0.5), **options):
            logits = model(**asked, mm_encoder_outputs=prompt.shown).logits
    result: Tensor = logits[0].double().log_softmax(-1)
    return result


def divergence(of: Tensor, other: Tensor) -> float:
    """The mean KL of log-probabilities [T, V], in nats."""
    return float((of.exp() * (of - other)).sum(-1).mean())


def main(
    size: Annotated[int | None, typer.Option(help="Image tokens of a prompt; left out: all.")] = None,
    prompts: Annotated[int | None, typer.Option(help="Of each size and budget; left out: 12, 6 and 3.")] = None,
) -> None:
    """Compare all forms with `exact`."""
    lm = language_model()
    sizes = {tokens: prompts or count for tokens, count in SAMPLES.items() if size in (None, tokens)}
    rows = list[dict[str, Any]]()
    with Bar(True) as bar:
        todo = bar.add_task("", total=sum(sizes.values()) * 2 * (len(FORMS) + 2))
        for tokens, count in sizes.items():
            for budget in KEPT[SIZES[tokens][0]]:
                measured: dict[str, list[float]] = {form: [] for form in ("untouched", *FORMS)}
                left = list[int]()
                for number in range(count):
                    prompt = Prompt(lm, tokens, budget, number)
                    left.append(prompt.kept)
                    exact = log_probs(lm.model, prompt, {"unmerge": "exact"})
                    bar.advance(todo)
                    for form in measured:
                        bar.update(todo, description=f"{tokens} tokens, {budget}: {form}")
                        if (other := _of_form(lm.model, prompt, form, tokens)) is not None:
                            pair = (other, exact) if form == "untouched" else (exact, other)
                            measured[form].append(divergence(*pair))
                        bar.advance(todo)
                forms = {
                    form: {"mean": fmean(values), "least": min(values), "most": max(values)}
                    for form, values in measured.items()
                    if values
                }
                rows.append({"tokens": tokens, "kept": fmean(left), "prompts": count, "forms": forms})
                found = {"model": "SmolLM2-135M-Instruct, 4 bits", "rows": rows}
                write("forms_on_text", found, ROOT / "experiments" / "results")


def _of_form(model: Any, prompt: Prompt, form: str, tokens: int) -> Tensor | None:
    """What the model says in a form; None: it is another for prompts of so many tokens."""
    if form == "untouched":
        return log_probs(model, prompt, None)
    far = form.endswith("near and far")
    if far and tokens < near_far.LONG:
        return None
    with near_far_from(near_far.LONG if far else 2 * tokens):
        if form.endswith("mean positions"):
            with at_mean_positions():
                return log_probs(model, prompt, FORMS[form])
        return log_probs(model, prompt, FORMS[form])


if __name__ == "__main__":
    typer.run(main)
