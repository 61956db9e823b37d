"""transformers' own server, with DyMU applied to the model that it loads: chat over the OpenAI API.

Taken from it are what loads a model (`ModelManager`), what turns a chat into a prompt and an answer into JSON or a
stream (`ChatCompletionHandler`), and the thread that generates one request after the other.
"""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from openai.types.completion_usage import CompletionUsage
from starlette.exceptions import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState, Modality

import dymu
from dymu.errors import BadPrompt, DymuError
from dymu.families.resolve import resolve
from dymu.handle import Handle
from dymu.serving.asked import Asked, budget_of
from dymu.thresholds import Thresholds

LARGEST_BODY = 64 * 2**20
"""Bytes of a request."""
LEFT_OUT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("audio", "function_call", "functions", "prediction", "reasoning_effort", "verbosity"), ()),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto",),
    "top_logprobs": (0,),
    "web_search_options": (),
}
"""Fields that transformers' server leaves out in silence; with other values than these, or null, the answer would not
be what was asked for."""


@dataclass
class Served:
    """A model that is served.

    Attributes:
        name: which requests give as `model`.
        source: as transformers takes it, a branch or commit behind an @.
        options: of `dymu.apply`, with a budget.
    """

    name: str
    source: str
    thresholds: Thresholds
    options: dict[str, Any]
    device: str
    dtype: str
    manager: Manager = field(init=False)
    generation: GenerationState = field(init=False)

    def __post_init__(self) -> None:
        """Loads the model.

        Raises:
            DymuError: see `dymu.apply`.
        """
        self.manager = Manager(self)
        self.generation = GenerationState()


class Manager(ModelManager):
    """Loads one model, with DyMU applied."""

    handle: Handle

    def __init__(self, served: Served) -> None:
        self._served = served
        super().__init__(device=served.device, dtype=served.dtype, force_model=served.source)

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._load_model(*args, **kwargs).eval()
        self.handle = dymu.apply(model, self._served.thresholds, **self._served.options)
        return model

    @staticmethod
    def get_model_modality(*_: Any, **__: Any) -> Modality:
        return Modality.VLM


class Answering:
    """The model for one request: it generates with the request's budget, and counts the image tokens."""

    def __init__(self, model: Any, handle: Handle, budget: float | None, seed: int | None) -> None:
        self._model, self._handle, self._budget, self._seed = model, handle, budget, seed
        self.image_tokens: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **kwargs: Any) -> Any:
        """See transformers; runs in the one thread that generates."""
        self._fit(kwargs["input_ids"].shape[1], kwargs["generation_config"])
        if self._seed is not None:
            torch.manual_seed(self._seed)
        untouched = self._budget is None
        if not untouched:
            self._handle.set_budget(self._budget)
        original = int((kwargs["input_ids"] == resolve(self._model).placeholders["image"]).sum())

        def count() -> None:
            self.image_tokens = {"original": original, "kept": original if untouched else sum(self._handle.last.kept)}

        if (streamer := kwargs.get("streamer")) is not None:
            end = streamer.end

            def counted_end() -> None:  # what closes a stream says how many there were
                count()
                end()

            streamer.end = counted_end
        with self._handle.disabled() if untouched else contextlib.nullcontext():
            generated = self._model.generate(**kwargs)
        count()
        return generated

    def _fit(self, prompt: int, generation: Any) -> None:
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
        self._asked = Asked.of(body)
        for name, harmless in LEFT_OUT.items():
            if body.get(name) is not None and body[name] not in harmless:
                raise BadPrompt(f"this server cannot do what the field {name!r} asks for: leave it out.")
        if body.get("model", self._served.name) != self._served.name:
            raise BadPrompt(f"the model served here is {self._served.name!r}, not {body['model']!r}: name that.")
        body = {name: value for name, value in body.items() if name not in ("budget", "seed", "model", *LEFT_OUT)}
        if (most := body.pop("max_completion_tokens", None)) is not None:  # which older releases leave out
            body["max_tokens"] = most
        budget = self._served.options["budget"] if self._asked.budget is None else self._asked.budget
        self._budget = budget_of(budget, self._served.thresholds)
        self._images = iter(self._asked.images())
        return await self.handle_request(body, request_id)

    def get_processor_inputs_from_messages(self, messages: list[dict[str, Any]], modality: Modality) -> Any:
        parsed = ChatCompletionHandler.get_processor_inputs_from_messages(messages, modality)
        for message in parsed:
            message["content"] = [
                {"type": "image", "image": next(self._images)} if part["type"] == "image" else part
                for part in message["content"]
            ]
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
        size = request.headers.get("content-length", "0")
        if not size.isdecimal() or int(size) > LARGEST_BODY or "transfer-encoding" in request.headers:
            return _error(
                413, f"a request says its length, of at most {LARGEST_BODY // 2**20} MiB: send smaller images."
            )
        return await go_on(request)

    @app.exception_handler(DymuError)
    async def _refused(request: Request, error: DymuError) -> JSONResponse:
        return _error(400, " ".join(str(error).split()))

    @app.exception_handler(RequestValidationError)
    async def _no_json(request: Request, error: RequestValidationError) -> JSONResponse:
        return _error(400, "the body is no JSON object: send one, as the OpenAI API has it.")

    @app.exception_handler(HTTPException)
    async def _stock(request: Request, error: HTTPException) -> JSONResponse:
        return _error(400 if error.status_code == 422 else error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def _failed(request: Request, error: Exception) -> JSONResponse:
        return _error(500, f"the server failed ({type(error).__name__}); its log says more.", "server_error")

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: dict[str, Any]) -> Any:
        return await Chat(served).answer(body, f"chatcmpl-{uuid.uuid4().hex}")

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": served.name, "object": "model", "created": 0, "owned_by": "dymu"}]}

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok"}

    return app


def _error(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)
