"""transformers' own server, with DyMU applied to the model that it loads: chat over the OpenAI API.

Taken from it are what loads a model (`ModelManager`), what turns a chat into a prompt and an answer into JSON or a
stream (`ChatCompletionHandler`), and the thread that generates one request after the other.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from openai.types.completion_usage import CompletionUsage
from starlette.exceptions import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState, Modality

import dymu
from dymu.choices import UNTOUCHED, Counting
from dymu.counts import Count
from dymu.errors import BadPrompt, DymuError
from dymu.families.resolve import resolve
from dymu.handle import Handle
from dymu.prompting import check_question
from dymu.serving.asked import Asked, count_of
from dymu.thresholds import Thresholds

TAKEN = ("messages", "max_tokens", "temperature", "top_p", "frequency_penalty", "stop", "stream", "logit_bias")
"""Fields of a request that transformers reads."""
LARGEST_BODY = 64 * 2**20
"""Bytes of a request."""
MOST_WAITING = 64
"""Requests at a time; more are asked to come again."""
BUSY = f"{MOST_WAITING} requests are waiting already: try again."
_ERROR = 'data: {"error": "'
"""How transformers' streams begin an error, whose text is as it comes."""


@dataclass
class Served:
    """A model that is served.

    Attributes:
        name: which requests give as `model`.
        source: as transformers takes it, a branch or commit behind an @.
        budget: where a request has none.
        counting: what a budget says.
        options: of `dymu.apply`.
    """

    name: str
    source: str
    thresholds: Thresholds
    budget: float | None
    counting: Counting
    options: dict[str, Any]
    device: str
    dtype: str
    manager: Manager = field(init=False)
    generation: GenerationState = field(init=False)
    waiting: int = field(init=False, default=0)
    """Requests that are not answered yet."""

    def __post_init__(self) -> None:
        """Loads the model.

        Raises:
            DymuError: see `dymu.apply`.
        """
        self.manager = Manager(self)
        self.generation = GenerationState()
        if self.processor.chat_template is None:
            raise BadPrompt(f"{self.name} has no chat template, by which a chat becomes a prompt: give it one.")

    @property
    def processor(self) -> Any:
        """The model's."""
        return next(iter(self.manager.loaded_models.values())).processor


class Manager(ModelManager):
    """Loads one model, with DyMU applied."""

    handle: Handle

    def __init__(self, served: Served) -> None:
        self._served = served
        super().__init__(device=served.device, dtype=served.dtype, force_model=served.source)

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._load_model(*args, **kwargs).eval()
        served = self._served
        count = Count.of(served.counting, served.budget)
        self.handle = dymu.apply(
            model,
            served.thresholds,
            budget=count.budget,
            at_most=count.at_most,
            exactly=count.exactly,
            **served.options,
        )
        return model

    @staticmethod
    def get_model_modality(*_: Any, **__: Any) -> Modality:
        return Modality.VLM


class Answering:
    """The model for one request: it generates with the request's budget, and counts the image tokens."""

    def __init__(self, model: Any, handle: Handle, budget: Any, seed: int | None) -> None:
        self._model, self._handle, self._budget, self._seed = model, handle, budget, seed
        self.image_tokens: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **kwargs: Any) -> Any:
        """See transformers; runs in the one thread that generates."""
        kwargs["tokenizer"] = kwargs["tokenizer"].tokenizer  # by which strings that end an answer are found
        if self._seed is not None:
            torch.manual_seed(self._seed)
        untouched = self._budget == UNTOUCHED
        original = int((kwargs["input_ids"] == resolve(self._model).placeholders["image"]).sum())

        def count() -> None:
            self.image_tokens = {"original": original, "kept": original if untouched else sum(self._handle.last.kept)}

        if (streamer := kwargs.get("streamer")) is not None:
            end = streamer.end

            def counted_end() -> None:  # what closes a stream says how many there were
                count()
                end()

            streamer.end = counted_end
        with self._handle.disabled() if untouched else self._handle.at(self._budget):
            generated = self._model.generate(**kwargs)
        count()
        return generated

    def fit(self, prompt: int, generation: Any) -> None:
        """Leave as many new tokens as the language model has positions for.

        Raises:
            BadPrompt: there are none.
        """
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if limit is None:
            return
        if prompt >= limit:
            raise BadPrompt(
                f"the prompt has {prompt:,} tokens, and the language model was made for {limit:,} with its answer: "
                "send less text, or fewer or smaller images."
            )
        generation.max_new_tokens = min(generation.max_new_tokens, limit - prompt)


class Chat(ChatCompletionHandler):
    """Answers one chat request."""

    def __init__(self, served: Served) -> None:
        super().__init__(served.manager, served.generation)
        self._served = served

    async def answer(self, body: dict[str, Any], request_id: str) -> Any:
        """A JSON response, or a stream of events.

        Raises:
            DymuError, HTTPException: the request cannot be answered as it is.
        """
        self._asked = asked = Asked.of(body)
        if asked.model not in (None, self._served.name):
            raise BadPrompt(f"the model served here is {self._served.name!r}, not {asked.model!r}: name that.")
        for text in (*asked.texts, *([asked.stop] if isinstance(asked.stop, str) else asked.stop or ())):
            check_question(self._served.processor, text)
        words = len(self._served.processor.tokenizer)
        if beyond := [number for number in asked.logit_bias or () if int(number) >= words]:
            raise BadPrompt(f"logit_bias names the token {beyond[0]}, and the model has {words:,}: leave it out.")
        # Nothing else that transformers knows goes on to it: a template's arguments may name files and addresses.
        known = {name: body[name] for name in TAKEN if body.get(name) not in (None, {})}
        if asked.logit_bias:  # of which transformers takes no whole numbers
            known["logit_bias"] = {number: float(bias) for number, bias in asked.logit_bias.items()}
        if asked.max_completion_tokens is not None:  # which older releases leave out
            known["max_tokens"] = asked.max_completion_tokens
        self._budget = asked.budget
        for budget in asked.budget if isinstance(asked.budget, list) else [asked.budget]:
            if budget is not None:
                count_of(budget, self._served.thresholds, self._served.counting)
        images = await asyncio.to_thread(asked.images)
        if isinstance(asked.budget, list) and len(asked.budget) != len(images):
            raise BadPrompt(
                f"{len(asked.budget)} budgets were given for {len(images)} images: give one for each, or one for all."
            )
        self._images = iter(images)
        return await self.handle_request(known, request_id)

    def _streaming(
        self, request_id: str, model: Any, processor: Any, name: str, inputs: Any, *args: Any, **kw: Any
    ) -> Any:
        self._begin(model, inputs, args[0])
        return super()._streaming(request_id, model, processor, name, inputs, *args, **kw)

    async def _non_streaming(
        self, request_id: str, model: Any, processor: Any, name: str, inputs: Any, *args: Any, **kw: Any
    ) -> Any:
        self._begin(model, inputs, args[0])
        return await super()._non_streaming(request_id, model, processor, name, inputs, *args, **kw)

    def _begin(self, model: Answering, inputs: Any, generation: Any) -> None:
        """Once the images are pixels: let go of them, since the answer may have to wait."""
        model.fit(inputs["input_ids"].shape[1], generation)
        self._parsed.clear()

    def get_processor_inputs_from_messages(self, messages: list[dict[str, Any]], modality: Modality) -> Any:
        parsed = ChatCompletionHandler.get_processor_inputs_from_messages(messages, modality)
        for message in parsed:
            message["content"] = [
                {"type": "image", "image": next(self._images)} if part["type"] == "image" else part
                for part in message["content"]
            ]
        if next(self._images, None) is not None:
            raise BadPrompt("an image stands where transformers reads none: send it in a message of its own.")
        self._parsed = parsed
        return parsed

    def _resolve_model(self, body: dict[str, Any]) -> Any:
        _, model, processor = super()._resolve_model(body)
        self._answering = Answering(model, self._served.manager.handle, self._budget, self._asked.seed)
        return self._served.name, self._answering, processor

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        generation = super()._build_generation_config(body, *args, **kwargs)
        if self._asked.temperature or (self._asked.top_p is not None and self._asked.temperature is None):
            generation.do_sample = True
        return generation

    def _build_completion(self, *args: Any, usage: Any, **kwargs: Any) -> Any:
        return super()._build_completion(*args, usage=self._counted(usage), **kwargs)

    def _build_chunk_sse(self, *args: Any, usage: Any = None, **kwargs: Any) -> str:
        chunk: str = super()._build_chunk_sse(*args, usage=usage and self._counted(usage), **kwargs)
        return chunk

    def _counted(self, usage: CompletionUsage) -> CompletionUsage:
        return CompletionUsage.model_validate({**usage.model_dump(), "image_tokens": self._answering.image_tokens})


def app_of(served: Served) -> FastAPI:
    """`POST /v1/chat/completions`, `GET /v1/models` and `GET /health`; errors as the OpenAI API has them."""
    app = FastAPI(title="dymu serve", openapi_url=None)

    @app.middleware("http")
    async def _bounded(request: Request, go_on: Any) -> Any:
        if served.waiting >= MOST_WAITING and request.method == "POST":
            return _error(503, BUSY, "server_error")
        size = request.headers.get("content-length", "0")
        if not size.isdecimal() or int(size) > LARGEST_BODY or "transfer-encoding" in request.headers:
            return _error(
                413, f"a request says its length, of at most {LARGEST_BODY // 2**20} MiB: send smaller images."
            )
        return await go_on(request)

    @app.exception_handler(DymuError)
    async def _refused(request: Request, error: DymuError) -> JSONResponse:
        return _error(400, " ".join(str(error).split()))

    @app.exception_handler(TemplateError)
    async def _template(request: Request, error: TemplateError) -> JSONResponse:
        return _error(400, f"the model's chat template does not take this chat ({error}): send another.")

    @app.exception_handler(RequestValidationError)
    async def _no_json(request: Request, error: RequestValidationError) -> JSONResponse:
        return _error(400, "the body is no JSON object, or its content type is not application/json: send one.")

    @app.exception_handler(HTTPException)
    async def _stock(request: Request, error: HTTPException) -> JSONResponse:
        return _error(400 if error.status_code == 422 else error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def _failed(request: Request, error: Exception) -> JSONResponse:
        return _error(500, f"the server failed ({type(error).__name__}); its log says more.", "server_error")

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: dict[str, Any]) -> Any:
        if served.waiting >= MOST_WAITING:
            return _error(503, BUSY, "server_error")
        served.waiting += 1
        try:
            answer = await Chat(served).answer(body, f"chatcmpl-{uuid.uuid4().hex}")
        except BaseException:
            served.waiting -= 1
            raise
        if isinstance(answer, StreamingResponse):
            answer.body_iterator = _counted_down(served, answer.body_iterator)
        else:
            served.waiting -= 1
        return answer

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": served.name, "object": "model", "created": 0, "owned_by": "dymu"}]}

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok"}

    return app


async def _counted_down(served: Served, events: Any) -> AsyncIterator[Any]:
    """The events, errors as the OpenAI API has them, and what closes a stream."""
    try:
        async for event in events:
            before, found, error = str(event).partition(_ERROR)
            yield before
            if found:
                told = json.dumps(_told(error.strip().removesuffix('"}')))
                yield f"data: {told}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        served.waiting -= 1


def _error(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
    return JSONResponse(_told(message, kind), status)


def _told(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
