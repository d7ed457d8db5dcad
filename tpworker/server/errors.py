"""Every refusal and failure as the OpenAI API writes them: a status and {"error": {...}}."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from tpworker.errors import InvalidRequest, PromptTooLong, QueueFull, RuntimeFailed, RuntimeStopped
from tpworker.server.requests.fields import UNSUPPORTED
from tpworker.server.requests.unsupported import REMEDIES

RETRY = {"Retry-After": "1"}


@dataclass(frozen=True)
class ApiError:
    """An error as a client gets it."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> str:
        """In ASCII, and of bounded length: what it quotes of a request may be no Unicode, and long."""
        param = None if self.param is None else _cut(self.param, 200)
        error = {"message": _cut(self.message, 2000), "type": self.type, "param": param, "code": self.code}
        return json.dumps({"error": error})

    def as_response(self) -> Response:
        return Response(self.as_json(), self.status, self.headers, "application/json")


class ModelNotFound(InvalidRequest):
    """The request names another model than the one that is served."""


def describe(error: Exception) -> ApiError | None:
    """What a client is told of an error, or None of one that is a bug. No traceback leaves the server."""
    match error:
        case ModelNotFound():
            return ApiError(404, str(error), param="model", code="model_not_found")
        case PromptTooLong():
            return ApiError(400, str(error), param=error.parameter, code="context_length_exceeded")
        case InvalidRequest():
            return ApiError(400, str(error), param=error.parameter)
        case QueueFull():
            return ApiError(429, str(error), "rate_limit_error", code="queue_full", headers=RETRY)
        case RuntimeStopped():
            return ApiError(503, str(error), "service_unavailable", code="unavailable", headers=RETRY)
        case RuntimeFailed():
            return ApiError(503, error.summary, "server_error", code="runtime_failed")
    return None


def internal_error() -> ApiError:
    """For a bug: the log says more."""
    return ApiError(500, "internal error; the server's log says more", "server_error", code="internal_error")


def describe_validation(errors: Sequence[Any]) -> ApiError:
    """What pydantic found in a body: all parameters that are not supported, or else the first error, with the
    field's name and its value."""
    if refused := [error for error in errors if error["type"] == UNSUPPORTED]:
        return _unsupported([_place(error["loc"]) for error in refused])
    error = errors[0]
    cause = error.get("ctx", {}).get("error")
    place = _place(error["loc"])
    if isinstance(cause, InvalidRequest):
        inner = cause.parameter
        return ApiError(400, str(cause), param=f"{place}.{inner}" if place and inner else inner)
    if error["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not valid JSON: {cause} at character {error['loc'][-1]}", code="bad_json"
        )
    if not place:
        return ApiError(
            400,
            "the body must be a JSON object, with the header Content-Type: application/json",
            code="bad_json",
        )
    if error["type"] == "missing":
        return ApiError(400, f"{place} is missing", param=place)
    reason = (
        str(cause) if isinstance(cause, ValueError) else error["msg"].replace("Input should", "it should")
    )
    return ApiError(400, f"{place}={_shortened(error['input'])}: {reason}", param=place)


def _unsupported(names: Sequence[str]) -> ApiError:
    """All parameters that are not supported, in one error; `param` is the first."""
    if len(names) == 1:
        message = f"{names[0]} is not supported: leave it out"
    else:
        message = f"{', '.join(names[:-1])} and {names[-1]} are not supported: leave them out"
    for name in names:
        if remedy := REMEDIES.get(name):
            message += f"; instead of {name}: {remedy}"
    return ApiError(400, message, param=names[0])


def _place(loc: Sequence[int | str]) -> str:
    """('body', 'messages', 0, 'content') → 'messages[0].content'."""
    place = ""
    for part in loc[1:]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else part
    return place


def _shortened(value: object) -> str:
    return _cut(repr(value), 80)


def _cut(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."
