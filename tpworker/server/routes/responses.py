"""/v1/responses."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI, Request
from starlette.responses import Response

from tpworker.server.front import Front
from tpworker.server.leaving import unless_left
from tpworker.server.prompts import chat_prompt
from tpworker.server.requests import ResponsesRequest
from tpworker.server.responses import ResponsesFormat
from tpworker.server.shapes import GENERATES, ResponseShape, documented

_REPEATED = ("instructions", "max_output_tokens", "temperature", "top_p")


def add_responses(app: FastAPI, front: Front) -> None:
    """Adds it."""
    runtime = front.runtime

    @app.post("/v1/responses", responses=documented(*GENERATES, ok=ResponseShape, streams=True))
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, through the model's chat template. Nothing is stored."""
        timing = front.admit(body.model)
        front.check_text("use /v1/completions, with a list of token ids as the prompt", "input")
        conversation = body.conversation()
        dialect = front.dialect
        variables = conversation.variables_for(dialect)
        work = partial(chat_prompt, runtime, body, conversation, dialect, variables)
        ids, _ = await unless_left(request, runtime.prepare(work, num_chars=conversation.num_chars))
        asked = {name: getattr(body, name) for name in _REPEATED}
        return front.answer(body, [ids], ResponsesFormat(front.model_names[0], asked), timing)
