"""dymu as a model of lmms-eval (0.7 and newer): `lmms_eval --model dymu --model_args pretrained=...,budget=96 ...`.

docs/lmms-eval.md says how to use it. It is a *simple* model in lmms-eval's words, since only simple models get
log-likelihood requests.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from dymu.choices import Unmerge
from dymu.errors import BadBudget, BadPrompt, DymuError
from dymu.evaluation.methods import METHODS, Row, applying, attending
from dymu.families.resolve import resolve
from dymu.files import expanded
from dymu.handle import Handle, apply
from dymu.prompting import adds_special_tokens, logits_of, placeholder_of, processed
from dymu.thresholds import beside

_MAX_NEW_TOKENS = 1024
_KNOWN_SETTINGS = frozenset(vars(GenerationConfig()))


class Dymu(lmms):
    """A vision-language model that merges image tokens, or the untouched one to compare with.

    Args:
        pretrained: folder or hub name of a model of a described family (`dymu families`).
        thresholds: a thresholds file; without it, `thresholds.json` in the model's folder.
        budget: average of image tokens, in tokens or as a fraction. With neither a budget nor thresholds nor
            a method, the model is untouched.
        method: see `dymu methods`, with further arguments if wanted: `holo-v:stretches=8`; without it, `dtome`. Others
            take a budget, and no thresholds.
        unmerge: see `dymu.apply`.
        device: `cpu`, `cuda:1`, ...; without it, the accelerator of this process if there is one.
        dtype: as in transformers; without it, the checkpoint's on an accelerator and `float32` on a CPU.
        batch_size: prompts at a time.
        max_length: tokens of a prompt and its answer together, at most; without it, what the language model allows.
        chat_template: a file with a Jinja chat template, instead of the processor's.

    Raises:
        BadThresholds, BadBudget, UnsupportedModel: see `dymu.apply`.
        BadPrompt: the model has no chat template and none is given.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        thresholds: str | None = None,
        budget: int | float | None = None,
        method: str | None = None,
        unmerge: Unmerge = "exact",
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__()
        self.device = _device(device)
        self.batch_size = int(batch_size)
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=False)
        if chat_template is not None:
            self.processor.chat_template = expanded(chat_template).read_text(encoding="utf-8")
        if self.processor.chat_template is None:
            raise BadPrompt(f"{pretrained} has no chat template; name a Jinja file of one with chat_template=FILE.")
        self.tokenizer = self.processor.tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        dtype = dtype or ("float32" if self.device.type == "cpu" else "auto")
        model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=dtype, trust_remote_code=False)
        self.model = model.to(self.device).eval()
        self.max_length = max_length or model.config.get_text_config().max_position_embeddings
        self.handle = _applied(model, pretrained, thresholds, budget, method, unmerge)
        self._kept: list[float] = []
        self._original: list[int] = []
        self._seconds, self._new_tokens = 0.0, 0

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The model's answer to each request, cut at the first of the task's `until` strings."""
        answers = [""] * len(requests)
        for batch in self._batches(requests, lambda args: repr(sorted(args[1].items()))):
            inputs = self._inputs([self._prompt(args[0], *args[2:]) for args in batch.values()])
            width = inputs["input_ids"].shape[1]
            self._check_length(width + 1)
            settings, until = _settings(next(iter(batch.values()))[1])
            settings["max_new_tokens"] = min(settings["max_new_tokens"], self.max_length - width)
            if until:
                settings["stopping_criteria"] = [functools.partial(self._ended, width, until)]
            start = time.perf_counter()
            output = self.model.generate(**inputs, **settings, pad_token_id=self.tokenizer.pad_token_id)
            new = output[:, width:]
            self._count(time.perf_counter() - start, int((new != self.tokenizer.pad_token_id).sum()))
            for index, text in zip(batch, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                for stop in until:
                    text = text.split(stop, 1)[0]
                answers[index] = text
        return answers

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """For each request, minus the sum of the continuation's log-probabilities, and whether it is the greedy one.

        *Minus*: lmms-eval takes the choice with the smallest number, since its own models return losses. The pair comes
        wrapped, since lmms-eval from 0.7 on turns a bare pair of numbers into a string.
        """
        results: list[Any] = [None] * len(requests)
        for batch in self._batches(requests, lambda args: ""):
            prompts, lengths = [], []
            for context, continuation, *where in batch.values():
                if callable(continuation):
                    continuation = continuation(self._document(*where[1:]))
                text, images = self._prompt(context, *where)
                prompts.append((text + continuation, images))
                lengths.append(self._tokens_added(text, continuation))
            inputs = self._inputs(prompts)
            self._check_length(inputs["input_ids"].shape[1])
            asked, said = self._apart(inputs, lengths)
            start = time.perf_counter()
            logits = logits_of(self.model, asked, said)
            self._count(time.perf_counter() - start, 0)
            for index, answer, predicted in zip(batch, said, logits, strict=True):
                log_probs = predicted.float().log_softmax(-1)
                loss = -float(log_probs.gather(-1, answer[:, None]).sum())
                greedy = bool((log_probs.argmax(-1) == answer).all())
                results[index] = GenerationResult(text=(loss, greedy))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Demanded by lmms-eval's base class; a limit that docs/lmms-eval.md names."""
        raise NotImplementedError(
            "dymu's plug-in answers one question at a time, so it cannot run tasks of several rounds yet; "
            "leave them out of --tasks."
        )

    def clean(self) -> None:
        """Say what was kept of the images, which lmms-eval also writes into its results, and let go of the model."""
        more: dict[str, Any] = {}
        if self._kept:
            more["images"] = len(self._kept)
            more["image_tokens_kept"] = sum(self._kept) / len(self._kept)
            more["image_tokens_full"] = sum(self._original) / len(self._original)
        speed = self._new_tokens / self._seconds if self._seconds else 0.0
        log_metrics(self._seconds, self._new_tokens, speed, more)
        self.handle = None
        super().clean()

    def _batches(self, requests: Sequence[Any], kind: Callable[[Any], str]) -> Iterator[dict[int, Any]]:
        """Arguments of the requests by index, those of one kind together, long ones first, under a progress bar."""
        groups: dict[str, list[int]] = {}
        for index in sorted(range(len(requests)), key=lambda index: -len(requests[index].args[0])):
            groups.setdefault(kind(requests[index].args), []).append(index)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="dymu") as bar:
            for group in groups.values():
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    yield {index: requests[index].args for index in batch}
                    bar.update(len(batch))

    def _document(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _prompt(
        self, context: str, doc_to_visual: Callable[[Any], Any] | None = None, *where: Any
    ) -> tuple[str, list[Image.Image]]:
        """One question in the words of the chat template, and its images.

        The images come first, unless the question says itself, with one placeholder for each, where they stand.
        """
        images = list(doc_to_visual(self._document(*where)) or []) if doc_to_visual is not None else []
        for image in images:
            if not isinstance(image, Image.Image):
                raise DymuError(
                    f"the task {where[1]} shows a {type(image).__name__} where an image was expected: video and sound "
                    "are not supported by dymu's plug-in yet; leave this task out of --tasks."
                )
        placeholder = placeholder_of(self.processor)
        placed = context.count(placeholder) == len(images)
        text = context if placed else context.replace(placeholder, "")
        content = [{"type": "image"}] * (0 if placed else len(images)) + [{"type": "text", "text": text}]
        turn = [{"role": "user", "content": content}]
        prompt: str = self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return prompt, [image.convert("RGB") for image in images]

    def _inputs(self, prompts: Sequence[tuple[str, list[Image.Image]]]) -> dict[str, Any]:
        texts = [text for text, _ in prompts]
        images = [image for _, shown in prompts for image in shown]
        return processed(self.model, self.processor, texts, images=images or None)

    def _apart(self, inputs: dict[str, Any], lengths: Sequence[int]) -> tuple[dict[str, Any], list[Tensor]]:
        """Prompts by themselves, and the tokens of their continuations, of so many at the end of each: what reads a
        prompt, to choose image tokens, must not read an answer."""
        ids = inputs["input_ids"]
        places = torch.arange(min(lengths), ids.shape[1]) - torch.tensor(lengths)[:, None]
        places, before = places.clamp(min=0).to(ids.device), (places < 0).to(ids.device)
        prompts = {
            name: value.gather(1, places).masked_fill(before, self.tokenizer.pad_token_id if value is ids else 0)
            if isinstance(value, Tensor) and value.shape == ids.shape
            else value
            for name, value in inputs.items()
        }
        return prompts, [row[len(row) - length :] for row, length in zip(ids, lengths, strict=True)]

    def _tokens_added(self, text: str, continuation: str) -> int:
        """How many tokens at the end of the whole are the continuation's; one that holds a piece of both is."""
        special = adds_special_tokens(self.tokenizer, text)
        alone, whole = (
            self.tokenizer(part, add_special_tokens=special)["input_ids"] for part in (text, text + continuation)
        )
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(alone, whole, strict=False))
        return len(whole) - sum(1 for _ in shared)

    def _ended(self, width: int, until: Sequence[str], ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Which rows hold a string to end at. (`stop_strings` refuses those that the vocabulary cannot spell.)"""
        texts = self.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
        ended = [any(stop in text for stop in until) for text in texts]
        return torch.tensor(ended, device=ids.device)

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise BadPrompt(
                f"a prompt with its answer needs {length} tokens, and max_length is {self.max_length}; "
                "raise max_length if the model can, or leave this task out of --tasks."
            )

    def _count(self, seconds: float, new_tokens: int) -> None:
        self._seconds += seconds
        self._new_tokens += new_tokens
        if self.handle is not None:
            report = self.handle.last
            if report.ran:  # of each prompt that shows something, the mean over its layers
                self._kept += [sum(layers) / len(layers) for layers in report.ran if any(layers)]
            else:
                self._kept += report.kept
            self._original += report.original


def _device(named: str | None) -> torch.device:
    """The named device, or the accelerator of this process: `accelerate launch` and `torchrun` start several."""
    if named is not None:
        return torch.device(named)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu" if accelerator is None else f"{accelerator.type}:{os.environ.get('LOCAL_RANK', 0)}")


def _applied(
    model: Any,
    pretrained: str,
    thresholds: str | None,
    budget: int | float | None,
    method: str | None,
    unmerge: Unmerge,
) -> Handle | None:
    method = method and method.strip("'\"")  # lmms-eval leaves those that keep commas together
    name, _, options = (method or "dtome").partition(":")
    if name != "dtome":
        if thresholds is not None or budget is None:
            raise BadBudget("a method takes a budget, and no thresholds: give it with budget=, without thresholds=.")
        return apply(model, **applying(str(method), budget, unmerge, len(resolve(model).decoder_layers)))
    METHODS[name].check_options(options)
    if method is None and thresholds is None and budget is None:
        if unmerge != "exact":
            raise BadBudget(f"unmerge={unmerge} needs something merged; give a budget as well.")
        return None
    attends = attending(Row(name, 1, unmerge, options=options))
    return apply(model, thresholds or beside(pretrained, "thresholds=FILE"), budget=budget, **attends)


def _settings(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A task's generation settings that transformers knows, and the strings to end at."""
    known = {"max_new_tokens": _MAX_NEW_TOKENS} | {key: options[key] for key in options if key in _KNOWN_SETTINGS}
    temperature = options.get("temperature")
    if options.get("do_sample", temperature) and temperature != 0:
        known["do_sample"] = True
    else:
        known |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    until = options.get("until") or []
    return known, [stop for stop in ([until] if isinstance(until, str) else until) if stop]
