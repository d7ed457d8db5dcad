"""/v1/completions and /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fastapi import FastAPI, Request
from starlette.responses import Response

from tpworker.server.chat_format import ChatFormat, SpokenFormat
from tpworker.server.completion_format import CompletionFormat
from tpworker.server.formats import Format
from tpworker.server.front import Front
from tpworker.server.leaving import unless_left
from tpworker.server.prompts import echoed_prompts, spoken_prompt
from tpworker.server.requests import ChatRequest, CompletionRequest, Prompt
from tpworker.server.shapes import GENERATES, ChatCompletion, Completion, documented


def add_generation(app: FastAPI, front: Front) -> None:
    """Adds them."""
    runtime = front.runtime

    @app.post("/v1/completions", responses=documented(*GENERATES, ok=Completion, streams=True))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        timing = front.admit(body.model)
        prompts: list[Prompt] = body.prompts
        if any(isinstance(prompt, str) for prompt in prompts):
            front.check_text("give the prompt as a list of token ids", "prompt")
        ids: list[list[int]] = []
        echo: list[str] | None = None
        if body.is_prepared:
            work = partial(echoed_prompts, runtime, body)
            count = len(prompts) * body.num_choices
            preparing = runtime.prepare(work, count, body.num_chars, body.blamed_for_many)
            ids, echo = await unless_left(request, preparing)
        reading = partial(body.sampling, runtime.has_tokenizer)
        if body.held is None:
            sampling = reading()
        else:  # a schema may be large
            sampling = await unless_left(request, runtime.prepare(reading, 0, body.num_chars))
        telling = replace(body.telling(front.force_usage), echo=echo)
        answer_format = CompletionFormat(front.model_names[0], telling, ids, front.tokenizer)
        return front.answer(body, ids or prompts, answer_format, timing, sampling)

    @app.post("/v1/chat/completions", responses=documented(*GENERATES, ok=ChatCompletion, streams=True))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, through the model's chat template."""
        timing = front.admit(body.model)
        front.check_text("use /v1/completions, with a list of token ids as the prompt", "messages")
        dialect = front.dialect
        variables = body.variables_for(dialect)
        # In a thread: a template is a program, and its text may be long.
        work = partial(spoken_prompt, runtime, body, body, dialect, variables)
        preparing = runtime.prepare(work, body.num_choices, body.num_chars, body.blamed_for_many)
        ids, speech, sampling = await unless_left(request, preparing)
        form: Callable[..., Format] = ChatFormat if speech.is_plain else partial(SpokenFormat, speech=speech)
        answer_format = form(front.model_names[0], body.telling(front.force_usage), [ids], front.tokenizer)
        return front.answer(body, [ids], answer_format, timing, sampling)
