"""Before any request is looked at: what it asks for, is it counted, is the key right, is the body sane."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpworker.server import journal
from tpworker.server.bodies import BODY_BYTES, BODY_BYTES_PER_TOKEN, Bodies, Body, Disconnected, Refused
from tpworker.server.errors import ApiError
from tpworker.server.ignored import HEADER, Ignored, current
from tpworker.server.journal import outcome_of

OUTCOME = "tpworker.outcome"
"""Key in an ASGI scope: how a request ended that its status does not tell of."""
HALF_CLOSED = "tpworker.half_closed"
"""Among an ASGI scope's extensions: an Event, set when a client that has closed its sending side should be
sent something, however little. What that meets shows whether it reads on."""

PROBES = frozenset(["/health", "/ready", "/ping", "/metrics"])
"""What those ask who look after the server, again and again."""
_OF_TEXT = ("/tokenize", "/detokenize", "/tokenizer_info")
_OF_OPERATORS = ("/reset_prefix_cache", "/top", "/start_profile", "/stop_profile")
_OF_SGLANG = ("/model_info", "/get_model_info", "/server_info", "/get_server_info", "/get_load")
_OF_TRAINERS = ("/sleep", "/wake_up", "/is_sleeping", "/update_weights_from_disk")
GUARDED = frozenset([*_OF_TEXT, *_OF_OPERATORS, *_OF_SGLANG, *_OF_TRAINERS])
"""What needs the key, and has its bodies bounded, besides /v1/…."""


class Gate:
    """ASGI middleware around the whole app. Only /v1/… and GUARDED are counted, and need the key.

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
        self._keys = [] if api_key is None else _encodings(api_key)
        self._max_model_len = max_model_len
        self._bodies = Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = _plain(scope)
        if not (scope["type"] == "http" and is_guarded(_route_path(scope))):
            await self._app(scope, receive, send)
            return
        status = 0
        ignored = Ignored()
        current.set(ignored)  # this task is the request's own

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if names := ignored.header():
                    header = (HEADER.lower().encode(), names.encode())
                    message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        try:
            await self._pass(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            outcome = scope.get(OUTCOME) or outcome_of(status)
            if (entry := journal.current.get()) is not None:
                entry.outcome = outcome
            if scope["method"] == "POST":
                self._count(outcome)

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
        if _header(scope, b"content-length") is not None and _header(scope, b"transfer-encoding") is not None:
            error = ApiError(  # what a proxy may take for two requests (RFC 9112, 6.1)
                400,
                "the request has both Content-Length and Transfer-Encoding: send one of them",
                code="bad_http",
                headers={"Connection": "close"},
            )
            await error.as_response()(scope, receive, send)
            return
        coding = _header(scope, b"content-encoding")
        if coding not in (None, b"", b"identity"):
            error = ApiError(
                415,
                "the body has a Content-Encoding, as of compression: send it as it is, without that header",
                code="unsupported_encoding",
            )
            await error.as_response()(scope, receive, send)
            return
        limit = BODY_BYTES + BODY_BYTES_PER_TOKEN * self._max_model_len()
        with Body(self._bodies) as held:
            try:
                unread = [await self._bodies.read(held, receive, limit)]
            except Disconnected:
                scope[OUTCOME] = "disconnected"
                return
            except Refused as refused:
                await refused.error.as_response()(scope, receive, send)
                return

            async def replayed() -> Message:
                if unread:
                    return {"type": "http.request", "body": unread.pop(), "more_body": False}
                return await receive()

            await self._app(scope, replayed, send)

    def _has_key(self, scope: Scope) -> bool:
        if not self._keys:
            return True
        scheme, _, sent = (_header(scope, b"authorization") or b"").partition(b" ")
        is_right = [hmac.compare_digest(sent.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(is_right)


def is_guarded(path: str) -> bool:
    """Whether what is at a path needs the key."""
    return path.startswith("/v1/") or path in GUARDED


def route_path(scope: Scope) -> str:
    """The path as the routes know it, of a scope as it came."""
    return _route_path(_plain(scope))


def _route_path(scope: Scope) -> str:
    """The path as the routes see it: without what is before them, as starlette takes it off."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path


def _header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of this name."""
    return next((value for key, value in scope["headers"] if key == name), None)


def _encodings(key: str) -> list[bytes]:
    """As the headers of different clients have it: which encoding that is, nothing says."""
    return list({key.encode(), key.encode("latin-1", "ignore")})


def _plain(scope: Scope) -> Scope:
    """The scope as the routes know it: with no host in its path, as requests to proxies have it, no slash at
    its end, and GET for HEAD, of which the server sends the headers only."""
    path: str = scope["path"]
    scheme, found, rest = path.partition("://")
    if found and scheme.lower() in ("http", "https"):
        path = "/" + rest.partition("/")[2]
    path = path.rstrip("/") or "/"
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    if path == scope["path"] and method == scope["method"]:
        return scope
    return {**scope, "path": path, "method": method}
