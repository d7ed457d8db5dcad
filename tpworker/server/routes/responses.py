"""/v1/responses."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from tpworker.server.front import Front
from tpworker.server.leaving import unless_left
from tpworker.server.prompts import spoken_prompt
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
        variables = body.variables(dialect, body.chat_template_kwargs or {})
        work = partial(spoken_prompt, runtime, body, conversation, dialect, variables)
        preparing = runtime.prepare(work, num_chars=conversation.num_chars)
        ids, speech, sampling = await unless_left(request, preparing)
        answer_format = ResponsesFormat(front.model_names[0], _repeated(body), speech)
        return front.answer(body, [ids], answer_format, timing, sampling)


def _repeated(body: ResponsesRequest) -> dict[str, Any]:
    """Of the request, what the answer repeats."""
    repeated = {name: getattr(body, name) for name in _REPEATED}
    if body.tools:
        repeated["tools"] = [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": bool(tool.strict),
            }
            for tool in body.tools
        ]
        repeated["tool_choice"] = "auto" if body.tool_choice is None else body.tool_choice
    if body.parallel_tool_calls is not None:
        repeated["parallel_tool_calls"] = body.parallel_tool_calls
    if body.text is not None and body.text.format is not None:
        repeated["text"] = {"format": body.text.format}
    if body.reasoning is not None:
        repeated["reasoning"] = {"effort": body.reasoning.effort, "summary": None}
    return _as_json(repeated)


def _as_json(repeated: dict[str, Any]) -> dict[str, Any]:
    """The same, as JSON can have it: what changes nothing is not checked, and may be no text or number."""
    text = json.dumps(repeated, ensure_ascii=False).encode(errors="replace")
    told: dict[str, Any] = json.loads(text, parse_constant=lambda name: None)
    return told
