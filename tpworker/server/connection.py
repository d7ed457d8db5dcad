"""One client's connection: how long it may take over what, what half of it may be closed, and what gives way
when there are too many.

    made ──► request ──► headers ──► body ──► answer ──┬──► request …
              HEADERS_S or keep-alive  the gate's  no limit └──► rest (of a body that nobody wanted), REST_S

uvicorn's own protocol waits for ever for whatever a client has begun to send, accepts until the process has
no descriptors left, and takes a client that has closed its sending side for one that has left.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tpworker.server.errors import SOON, ApiError
from tpworker.server.gate import HALF_CLOSED, PROBES
from tpworker.server.request_ids import RequestIds, own_header
from tpworker.server.request_log import RequestLog

HEADERS_S = 20.0
"""From a connection's begin, or from a request's first byte, to the end of its headers: one segment, which a
client sends at once. What is slower holds a descriptor for nothing."""
KEEP_ALIVE_S = 75
"""Between two requests: clients and load balancers drop idle connections after a minute, not before them."""
REST_S = 30.0
"""For the rest of a body whose request is answered already: refused, that is. It is thrown away, so that the
client comes to read why."""
STALLED_S = 600.0
"""For a client that takes not one byte of what it is sent. Slow readers take some, in any such time."""
PROBE_S = 1.0
"""How long after a client has closed its sending side something is sent, to see whether it has left."""
LINGER_S = 2.0
"""For a client to read that what it sends is no HTTP, while it sends more: a connection that is closed with
bytes unread is reset, and the answer is lost."""
_LOOK_S = 0.25  # how often such a connection is looked at
NUM_SURPLUS = 64
"""Connections beyond the most that there may be: they get probes answered, and everything else refused."""

WRITER = "tpworker.writer"
"""An extension of a request's scope: its `BodyWriter`."""

_TCP_CLOSE = 7  # the state of a socket whose peer has reset it: the first byte of Linux' tcp_info


class Crowd:
    """The connections of one server.

    Args:
        max_open: most of them; beyond, the one for whose client the server waits the longest is closed.
    """

    def __init__(self, max_open: int) -> None:
        self.max_open = max_open
        self._waiting: dict[Connection, None] = {}  # those whose client has to send something, longest first

    def wait_for(self, connection: Connection, is_waiting: bool) -> None:
        """A connection has begun to wait for its client, or has ended that."""
        self._waiting.pop(connection, None)
        if is_waiting:
            self._waiting[connection] = None

    def make_room(self) -> bool:
        """Close one connection. False: none of their clients is waited for."""
        for connection in self._waiting:
            if connection.give_way():
                del self._waiting[connection]
                return True
        return False


class BodyWriter:
    """Sends more of the body of an answer that has begun, past the layers of the app."""

    def __init__(self, connection: Connection) -> None:
        """
        Args:
            connection: whose request has just begun.
        """
        self._cycle, self._transport = connection.cycle, connection.transport
        # Else the body ends with the connection, and is sent as it is.
        self._is_chunked = connection.cycle.scope["http_version"] == "1.1"

    @property
    def is_free(self) -> bool:
        """Of an answer that has begun and has not ended: whether its client is there, and has read enough for
        more to be sent."""
        cycle = self._cycle
        return not (cycle.flow.write_paused or cycle.disconnected or self._transport.is_closing())

    def write(self, part: bytes) -> None:
        """Sends more of a body whose length has not been told; `is_free` must hold."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(part), part) if self._is_chunked else part)


class Connection(H11Protocol):
    """A connection to the HTTP server. Make it with `functools.partial(Connection, crowd=…)`."""

    def __init__(self, *arguments: Any, crowd: Crowd, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._crowd = crowd
        self._phase = ""
        self._deadline: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._got_eof = False

    # ------------------------------------------------------------------- from made to lost

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _ask_if_alive(transport.get_extra_info("socket"))
        num_more = len(self.connections) - self._crowd.max_open
        if num_more > 0 and not self._crowd.make_room():
            if num_more > NUM_SURPLUS:
                transport.abort()
                return
            self.app = _only_probes(self.app)
        self._enter("first")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._crowd.wait_for(self, False)
        for timer in (self._deadline, self._stall, self._look):
            if timer is not None:
                timer.cancel()

    def give_way(self) -> bool:
        """Close, for there are too many. False: it has an answer to send still."""
        if self.transport.get_write_buffer_size():
            return False
        self.transport.abort()
        return True

    def close_behind_answer(self) -> None:
        """Of what is asked for already, if it is; later answers have the server's own headers."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.default_headers = self.server_state.default_headers
            self.cycle.keep_alive = False  # if its headers have been sent

    # ---------------------------------------------------- what is waited for, and how long

    def data_received(self, data: bytes) -> None:
        if self._phase != "lingering":
            super().data_received(data)
            self._see_phase()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._got_eof and self.cycle.response_complete:  # no other request lay behind this one
            self.transport.close()
        self._see_phase()

    def _see_phase(self) -> None:
        if self._phase == "lingering":
            return
        their = self.conn.their_state
        if self.cycle is not None and not self.cycle.response_complete:
            phase = "body" if their is h11.SEND_BODY else "answer"
        elif their is h11.SEND_BODY:
            phase = "rest"
        elif self.conn.trailing_data[0]:
            phase = "headers"
        else:
            phase = "request" if self.cycle is not None else "first"
        if phase != self._phase or phase == "request":
            self._enter(phase)

    def _enter(self, phase: str) -> None:
        self._phase = phase
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        is_open = not self.transport.is_closing()
        self._crowd.wait_for(self, is_open and phase != "answer")
        # The time between requests is uvicorn's, that of a body the gate's.
        seconds = {"first": HEADERS_S, "headers": HEADERS_S, "rest": REST_S, "lingering": LINGER_S}.get(phase)
        if is_open and seconds is not None:
            self._deadline = self.loop.call_later(seconds, self._too_late)

    def _too_late(self) -> None:
        if self._phase == "headers":
            self._refuse(
                ApiError(408, f"the request's headers did not come within {HEADERS_S:.0f} s", code="timeout")
            )
        else:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_for_stall(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _watch_for_stall(self, size: int) -> None:
        """In a while the client must have taken some of the `size` bytes that wait for it."""

        def look() -> None:
            left = self.transport.get_write_buffer_size()
            if left >= size:
                self.transport.abort()
            else:
                self._watch_for_stall(left)

        self._stall = self.loop.call_later(STALLED_S, look)

    # --------------------------------------------------------------- what cannot be parsed

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is no HTTP."""
        self._refuse(ApiError(400, "this is no HTTP request that can be read", code="bad_http"))

    def _refuse(self, error: ApiError) -> None:
        """Answer in place of the app, if nothing is answered yet, and close."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # so that the app's own answer goes nowhere
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = error.as_json().encode()
            headers = [
                *self.server_state.default_headers,
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
                own_header(),
            ]
            reason = HTTPStatus(error.status).phrase
            for event in (
                h11.Response(status_code=error.status, headers=headers, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
            if self.transport.can_write_eof():
                self.transport.write_eof()
                self._enter("lingering")
            else:  # TLS has no half that could be closed
                self.transport.close()
        else:
            self.transport.close()

    # ----------------------------------------------------------- clients that close a half

    def handle_events(self) -> None:
        before = self.scope
        super().handle_events()
        if self.scope is not before:  # a request has begun, and the app has not run yet
            extensions = cast("dict[str, Any]", self.scope).setdefault("extensions", {})
            extensions[HALF_CLOSED] = asyncio.Event()
            extensions[WRITER] = BodyWriter(self)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client will send no more. True: it gets its answer all the same.

        One that has left altogether looks alike, until it is sent something: then it resets the connection.
        """
        is_asked = self.cycle is not None and not self.cycle.response_complete
        is_whole = not self.transport.can_write_eof()  # under TLS the other half is closed by now
        if is_whole or not is_asked or self.conn.their_state is h11.SEND_BODY:
            return False
        self._got_eof = True
        self._look = self.loop.call_later(_LOOK_S, self._see_if_left, self.loop.time() + PROBE_S)
        return True

    def _see_if_left(self, probe_at: float) -> None:
        """Nothing wakes who does not read: look again and again, until the answer is sent."""
        if self.transport.is_closing():
            return
        peer = self.transport.get_extra_info("socket")
        if peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
            self.transport.abort()
            return
        if self.loop.time() >= probe_at:
            self._probe()
            probe_at = float("inf")
        self._look = self.loop.call_later(_LOOK_S, self._see_if_left, probe_at)

    def _probe(self) -> None:
        """Sends what means nothing. Before an answer to HTTP/1.0 nothing does: see `_ask_if_alive`."""
        if self.cycle.response_started:
            cast("dict[str, Any]", self.cycle.scope)["extensions"][HALF_CLOSED].set()
        elif self.cycle.scope["http_version"] != "1.0":
            # Of the interim responses the one that all clients know to skip.
            event = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self.transport.write(self.conn.send(event) or b"")


def _ask_if_alive(peer: Any) -> None:
    """Has the kernel ask an idle peer whether it is there: a host that vanished sends nothing, not even an
    end, and one that has closed both halves answers no more after a minute."""
    try:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6)):
            peer.setsockopt(socket.IPPROTO_TCP, option, value)
    except OSError:
        pass  # it has left already, or is no TCP socket


def _only_probes(app: Callable[..., Any]) -> ASGIApp:
    """The app of a connection that is one too many: it answers probes, refuses the rest, and closes."""

    async def refusing(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        if scope["path"] in PROBES:
            await app(scope, receive, send_last)
            return
        error = ApiError(
            503,
            "there are as many connections as the server can hold, and none is idle: try again later, or "
            "raise the limit of open files (ulimit -n)",
            "service_unavailable",
            code="too_many_connections",
            headers=SOON,
        )
        await RequestLog().around(RequestIds(error.as_response()))(scope, receive, send_last)

    return refusing
