"""Before any request is looked at: is it counted, is the key right, is the body of a sane size."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpworker.server.errors import ApiError

BODY_BYTES = 1 << 20
BODY_BYTES_PER_TOKEN = 16
"""A body may have BODY_BYTES, and so many for each token of max_model_len: room for a prompt that fits, with
escapes, and for what is around it. Not more, for parsing holds up every other request, by 50 ms a MB of token
ids, and so it would in a thread: it keeps the interpreter lock."""
OUTCOME = "tpworker.outcome"
"""Key in an ASGI scope: how a request ended that its status does not tell of."""

_OUTCOMES = {2: "ok", 4: "invalid", 5: "failed", 429: "busy", 503: "unavailable"}


class Gate:
    """ASGI middleware around the whole app. Only /v1/… is counted, and needs the key.

    Args:
        app: what to guard.
        count: told the outcome of each request to generate.
        api_key: what clients must send as `Authorization: Bearer …`; None: nothing.
        max_model_len: tells it, as what bounds a body; a longer one is refused, and not kept.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        count: Callable[[str], None],
        api_key: str | None,
        max_model_len: Callable[[], int],
    ) -> None:
        self._app = app
        self._count = count
        self._key = api_key.encode() if api_key is not None else None
        self._max_model_len = max_model_len

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        if not path.startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            if scope["method"] == "POST":
                outcome = scope.get(OUTCOME) or _OUTCOMES.get(status) or _OUTCOMES.get(status // 100)
                self._count(outcome or "disconnected")

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._has_key(scope):
            error = ApiError(
                401,
                "the API key is missing or wrong: send the header Authorization: Bearer KEY, "
                "with the KEY that the server was started with (--api-key)",
                "authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.as_response()(scope, receive, send)
            return
        limit = BODY_BYTES + BODY_BYTES_PER_TOKEN * self._max_model_len()
        body = await _read_body(receive, limit)
        if body is None:
            scope[OUTCOME] = "disconnected"
            return
        if len(body) > limit:
            error = ApiError(
                413,
                f"the body is longer than {limit} bytes ({BODY_BYTES}, and {BODY_BYTES_PER_TOKEN} for each "
                "token of max_model_len): shorten the prompt, or spread several prompts over several "
                "requests",
                code="body_too_large",
            )
            await error.as_response()(scope, receive, send)
            return
        unread = [body]

        async def replayed() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        await self._app(scope, replayed, send)

    def _has_key(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, key = value.partition(b" ")
                return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)
        return False


async def _read_body(receive: Receive, limit: int) -> bytes | None:
    """The body, or a little more than `limit` bytes of it; None if the client leaves before its end.

    What is too long is read to its end, or to eight times the limit: a client that cannot send its body
    would not read why.
    """
    parts: list[bytes] = []
    num_read = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part: bytes = message.get("body", b"")
        if num_read <= limit:
            parts.append(part)
        num_read += len(part)
        if not message.get("more_body", False) or num_read > 8 * limit:
            return b"".join(parts)
