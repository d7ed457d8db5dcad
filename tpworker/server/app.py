"""The OpenAI-compatible HTTP app around a runtime."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from tpworker.errors import InvalidRequest, RuntimeFailed, RuntimeStopped, TpworkerError
from tpworker.runtime.loading import in_daemon_thread
from tpworker.server.answer import Answer, client_left
from tpworker.server.errors import ApiError, ModelNotFound, describe, describe_validation, internal_error
from tpworker.server.formats import ChatFormat, CompletionFormat, Format
from tpworker.server.gate import OUTCOME, Gate
from tpworker.server.ignored import HEADER
from tpworker.server.metrics import Metrics, Timing
from tpworker.server.requests import ChatRequest, CompletionRequest, GenerationRequest, Prompt

if TYPE_CHECKING:
    from tpworker.runtime.runtime import Runtime

logger = logging.getLogger(__name__)

T = TypeVar("T")


def create_app(
    runtime: Runtime,
    served_model_name: str | None = None,
    api_key: str | None = None,
    allowed_origins: Sequence[str] = (),
) -> FastAPI:
    """The app that serves a runtime. It neither starts nor stops it: whoever made it does.

    Until the runtime is ready, requests are answered with 503; /health and /ready tell the two apart.

    Args:
        runtime: may be starting still.
        served_model_name: what clients call the model; None: what the runtime calls it.
        api_key: what they must send as a Bearer token, for /v1/…; None: nothing.
        allowed_origins: of web pages that browsers may let use the API, as https://host; "*": all.
    """
    metrics = Metrics(runtime, served_model_name)
    front = _Front(runtime, served_model_name, metrics)
    app = FastAPI(
        title="tpworker",
        description="OpenAI-compatible API of a tensor-parallel runtime.",
        redirect_slashes=False,  # to where the Host header says: anywhere
    )
    app.add_middleware(
        Gate,
        count=lambda outcome: metrics.requests.labels(outcome).inc(),
        api_key=api_key,
        max_model_len=front.max_model_len,
    )
    if allowed_origins:  # around the gate: browsers ask without the key, and read its refusals
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", HEADER],
        )
    _add_error_handlers(app)
    _add_generation(app, front)
    _add_models(app, front)
    _add_probes(app, runtime, metrics)
    return app


class _Front:
    """From a request's body to the streams that answer it."""

    def __init__(self, runtime: Runtime, name: str | None, metrics: Metrics) -> None:
        self.runtime = runtime
        self._name = name
        self._metrics = metrics

    @property
    def model_name(self) -> str:
        """Raises RuntimeStopped while it is not known yet."""
        return self._name or self.runtime.served_name

    def max_model_len(self) -> int:
        """0 while it is not known yet: then nothing is generated."""
        try:
            return self.runtime.max_model_len
        except RuntimeStopped:
            return 0

    def check_model(self, name: str) -> None:
        """Raises ModelNotFound unless this is the model that is served."""
        if name != self.model_name:
            raise ModelNotFound(f"the model {name!r} is not served here; {self.model_name!r} is", "model")

    def admit(self, body: GenerationRequest) -> Timing:
        """Raises ModelNotFound, or RuntimeStopped or RuntimeFailed when nothing can be generated."""
        timing = Timing(self._metrics)
        health = self.runtime.health()
        if health.state == "failed":
            raise RuntimeFailed(_first_line(health.error))
        if health.state != "ready":
            raise RuntimeStopped(f"the server is not ready, it is {health.state}: try again later")
        if body.model is not None:
            self.check_model(body.model)
        return timing

    def check_text(self, remedy: str, parameter: str) -> None:
        """Raises InvalidRequest if the model has no tokenizer: then there are token ids, and no text."""
        if not self.runtime.has_tokenizer:
            raise InvalidRequest(f"this model has no tokenizer: {remedy}", parameter)

    def answer(
        self,
        body: CompletionRequest | ChatRequest,
        prompts: Sequence[Prompt],
        kind: type[Format],
        timing: Timing,
    ) -> Answer:
        sampling = body.sampling(detokenize=self.runtime.has_tokenizer)
        answer_format = kind(self.model_name, body.include_usage)
        name = answer_format.request_id
        ids = [name] if len(prompts) == 1 else [f"{name}-{index}" for index in range(len(prompts))]
        streams = [
            self.runtime.generate(
                prompt, sampling, request_id=request_id, default_max_tokens=body.default_max_tokens
            )
            for prompt, request_id in zip(prompts, ids, strict=True)
        ]
        return Answer(streams, answer_format, timing, stream=bool(body.stream))


def _add_generation(app: FastAPI, front: _Front) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        timing = front.admit(body)
        prompts = body.prompts
        if any(isinstance(prompt, str) for prompt in prompts):
            front.check_text("give the prompt as a list of token ids", "prompt")
        if len(prompts) > 1:
            # All of them before any is begun: one that is too long refuses the request with its status.
            encode_all = partial(_encode_all, front.runtime, prompts)
            num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
            prompts = await _unless_left(request, front.runtime.prepare(encode_all, len(prompts), num_chars))
        return front.answer(body, prompts, CompletionFormat, timing)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, through the model's chat template."""
        timing = front.admit(body)
        front.check_text("use /v1/completions, with a list of token ids as the prompt", "messages")
        # In a thread: a template is a program, and its text may be long.
        work = partial(_chat_prompt, front.runtime, body)
        prompt = await _unless_left(request, front.runtime.prepare(work, num_chars=body.num_chars))
        return front.answer(body, [prompt], ChatFormat, timing)


class _ClientLeft(Exception):
    """Nobody waits for the answer any more."""


async def _unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. A client that leaves cancels it, so that what has not begun is not done.

    Raises:
        _ClientLeft: it has left.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(client_left(request.receive))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            request.scope[OUTCOME] = "disconnected"
            raise _ClientLeft
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _chat_prompt(runtime: Runtime, body: ChatRequest) -> list[int]:
    tokenizer = runtime.tokenizer
    text = tokenizer.apply_chat_template(
        [message.for_template() for message in body.messages], **(body.chat_template_kwargs or {})
    )
    try:
        return runtime.encode(text, add_special_tokens=False)
    except InvalidRequest as error:
        raise type(error)(str(error), "messages") from error


def _encode_all(runtime: Runtime, prompts: Sequence[Prompt]) -> list[Prompt]:
    return [runtime.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def _add_models(app: FastAPI, front: _Front) -> None:
    created = int(time.time())

    def entry() -> dict[str, object]:
        return {
            "id": front.model_name,
            "object": "model",
            "created": created,
            "owned_by": "tpworker",
            "max_model_len": front.runtime.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        """The one model that is served."""
        return {"object": "list", "data": [entry()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, object]:
        """The model, if this is its name."""
        front.check_model(model)
        return entry()


def _add_probes(app: FastAPI, runtime: Runtime, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while the server lives, also while it loads or drains; 503 when it cannot recover."""
        return probe({"starting", "ready", "draining"})

    @app.get("/ready")
    async def ready() -> Response:
        """200 while requests are taken, else 503."""
        return probe({"ready"})

    @app.get("/metrics")
    async def metrics_page() -> Response:
        """For Prometheus."""
        await in_daemon_thread(runtime.gpus)  # asking takes milliseconds, which no stream shall wait for
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def probe(good: set[str]) -> Response:
        health = runtime.health()
        body = {"status": health.state} | ({"error": _first_line(health.error)} if health.error else {})
        return JSONResponse(body, 200 if health.state in good else 503)


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return describe_validation(error.errors()).as_response()

    @app.exception_handler(_ClientLeft)
    async def left(request: Request, error: _ClientLeft) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(TpworkerError)
    async def refused(request: Request, error: TpworkerError) -> Response:
        described = describe(error)
        if described is None:
            raise error
        return described.as_response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            message = f"there is no {request.scope['path']} here: see /docs for what there is"
        elif error.status_code == 405:
            message = f"{request.method} is not for {request.scope['path']}: see /docs"
        elif error.status_code == 400:
            message = (
                "the body is not valid JSON that can be read: not UTF-8, nested too deeply, or with a number "
                f"of more than {sys.get_int_max_str_digits()} digits"
            )
        else:
            message = str(error.detail)
        return ApiError(error.status_code, message, headers=error.headers or {}).as_response()

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return internal_error().as_response()  # starlette raises it again, so that it is logged
