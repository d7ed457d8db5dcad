"""Every refusal and failure as the OpenAI API writes them: a status and {"error": {...}}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tpworker.errors import (
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    RequestFailed,
    RuntimeFailed,
    RuntimeSleeping,
    RuntimeStopped,
)
from tpworker.server.journal import note_error

SOON = {"Retry-After": "1"}
"""For what may be over at any moment: a full queue, a recovery."""
LATER = {"Retry-After": "5"}
"""For what takes a start: this server's, or that of whoever takes its place."""


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
        param = None if self.param is None else cut(self.param, 200)
        error = {"message": cut(self.message, 2000), "type": self.type, "param": param, "code": self.code}
        return json.dumps({"error": error})

    def as_response(self) -> Response:
        return _Refusal(self)

    def note(self) -> None:
        """The current request's client is told this: so is the log."""
        note_error(self.code or self.type, self.param)


class _Refusal(Response):
    """An error as an answer, which the log is told of when it is sent."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.as_json(), error.status, error.headers, "application/json")
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._error.note()
        await super().__call__(scope, receive, send)


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
            return ApiError(429, str(error), "rate_limit_error", code="queue_full", headers=SOON)
        case RequestFailed():  # for a reason of its own: not to be tried again
            return ApiError(400, str(error), code="request_failed")
        case RuntimeSleeping():
            return ApiError(503, str(error), "service_unavailable", code="sleeping", headers=LATER)
        case RuntimeStopped():
            return ApiError(503, str(error), "service_unavailable", code="unavailable", headers=LATER)
        case RuntimeFailed():
            return ApiError(503, error.summary, "server_error", code="runtime_failed", headers=LATER)
    return None


def internal_error() -> ApiError:
    """For a bug: the log says more."""
    return ApiError(500, "internal error; the server's log says more", "server_error", code="internal_error")


def cut(text: str, max_chars: int) -> str:
    """A text shortened to so many characters."""
    return text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."
