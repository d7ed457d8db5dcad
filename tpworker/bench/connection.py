"""As much of an HTTP/1.1 client as a benchmark needs, and no more: it must not be what is measured.

One request at a time goes over a connection, which is kept for the next one where the server allows that. Of
a stream of events each is handed on as it arrives, with the time at which it did.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tpworker.values import server_url

_MAX_HEAD = 1 << 16
_MAX_BODY = 1 << 24  # of what is no stream of events, and of one event
_MAX_LINE = 1 << 12  # of what tells how long a chunk is, and of what may follow the last one

_HEX, _DIGITS = re.compile(rb"[0-9A-Fa-f]{1,15}"), re.compile("[0-9]{1,18}")

OnEvent = Callable[[bytes, float], None]
"""Told the lines of an event, and when it came: time.monotonic()."""


class RequestLost(Exception):
    """There is no answer, or not all of it. Its text is the kind of error, for counting."""


class Unused(RequestLost):
    """A connection that was kept has been closed by the server before it saw the request: another will do."""


@dataclass
class Response:
    """An answer, once it is whole."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    """Of a stream of events what follows the last one."""
    is_stream: bool = False
    """Whether it is a stream of events."""


class Connection(asyncio.Protocol):
    """One connection. `ask`, and when that is done perhaps again."""

    def __init__(self) -> None:
        self.is_reusable = False
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._response = Response()
        self._done: asyncio.Future[Response] | None = None
        self._on_event: OnEvent | None = None
        self._parse: Callable[[], bool] = self._parse_head
        self._left = 0  # bytes of the body, or of its chunk
        self._num_asked = 0
        self._now = 0.0

    async def ask(self, head: bytes, body: bytes, on_event: OnEvent) -> Response:
        """Sends a request, and waits for all of the answer.

        Raises:
            RequestLost: there will not be one.
        """
        if self._transport is None or self._transport.is_closing():
            raise Unused("connection closed")
        self._response, self._on_event = Response(), on_event
        self._parse, self.is_reusable = self._parse_head, False
        self._num_asked += 1
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(head + body)
        try:
            return await self._done
        finally:
            self._done = None

    def close(self) -> None:
        """Closes it."""
        if self._transport is not None:
            self._transport.abort()

    # -------------------------------------------------------------------------- for asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        try:
            if not self._buffer and self._parse == self._parse_chunk_size and self._is_one_event(data):
                return
            self._buffer += data
            while self._parse():
                pass
        except ValueError as error:
            self._fail(RequestLost(f"bad HTTP: {error}"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_reusable = False
        if self._parse == self._parse_to_the_end and error is None:
            self._finish()
        elif self._num_asked > 1 and not self._response.status and not self._buffer:
            self._fail(Unused("connection closed"))
        else:
            self._fail(RequestLost("connection closed" if self._response.status else "no answer"))

    def _fail(self, error: RequestLost) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(self._response)

    # ------------------------------------------------------- parsers: whether there is more to do

    def _parse_head(self) -> bool:
        if self._done is None:
            raise ValueError("an answer that nobody asked for")
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_HEAD:
                raise ValueError("headers without an end")
            return False
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        protocol, _, rest = first.partition(" ")
        if not protocol.startswith("HTTP/1") or not rest[:3].isdecimal():
            raise ValueError("no status line")
        if rest[:1] == "1":  # 100 Continue, as a sign of life
            return True
        pairs = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self._response.status, self._response.headers = int(rest[:3]), headers
        is_of_events = headers.get("content-type", "").startswith("text/event-stream")
        self._response.is_stream = self._response.status == 200 and is_of_events
        self.is_reusable = protocol != "HTTP/1.0" and headers.get("connection", "").lower() != "close"
        if headers.get("transfer-encoding", "").lower() == "chunked":
            self._parse = self._parse_chunk_size
        elif "content-length" in headers:
            self._left, self._parse = _body_length(headers["content-length"]), self._parse_body
        else:
            self.is_reusable, self._parse = False, self._parse_to_the_end
        return True

    def _is_one_event(self, data: bytes) -> bool:
        """Whether these are one event in one chunk, as mostly; then it is handed on, in half the time."""
        response, at = self._response, data.find(b"\r\n")
        if at < 1 or not response.is_stream or response.body or not data.endswith(b"\n\n\r\n"):
            return False
        if data.find(b"\n\n") != len(data) - 4 or _chunk_size(data[:at]) != len(data) - at - 4:
            return False
        assert self._on_event is not None
        self._on_event(data[at + 2 : -4], self._now)
        return True

    def _parse_body(self) -> bool:
        self._take()
        if self._left:
            return False
        self._end()
        return bool(self._buffer)

    def _parse_to_the_end(self) -> bool:
        self._left = len(self._buffer)
        self._take()
        return False

    def _parse_chunk_size(self) -> bool:
        end = self._end_of_line()
        if end < 0:
            return False
        self._left = _chunk_size(self._buffer[:end])
        del self._buffer[: end + 2]
        self._parse = self._parse_chunk if self._left else self._parse_trailer
        return True

    def _parse_chunk(self) -> bool:
        self._take()
        if self._left or len(self._buffer) < 2:
            return False
        del self._buffer[:2]
        self._parse = self._parse_chunk_size
        return True

    def _parse_trailer(self) -> bool:
        end = self._end_of_line()
        if end < 0:
            return False
        del self._buffer[: end + 2]
        if end:
            return True
        self._end()
        return bool(self._buffer)

    def _end_of_line(self) -> int:
        """Where it is; -1: not here yet."""
        end = self._buffer.find(b"\r\n", 0, _MAX_LINE)
        if end < 0 and len(self._buffer) >= _MAX_LINE:
            raise ValueError("a line without an end")
        return end

    def _end(self) -> None:
        self._parse = self._parse_head
        self._finish()

    def _take(self) -> None:
        """What is here of the body, as far as it goes."""
        response, buffer = self._response, self._buffer
        body = response.body
        unseen = max(0, len(body) - 3)  # from where on there may be the end of an event
        body += buffer[: self._left]
        taken = min(self._left, len(buffer))
        del buffer[:taken]
        self._left -= taken
        if not response.is_stream:
            if len(body) > _MAX_BODY:
                raise ValueError("an answer without an end")
            return
        if body.find(b"\r", unseen) >= 0:
            body[:] = body.replace(b"\r\n", b"\n")
        assert self._on_event is not None
        while (end := body.find(b"\n\n", unseen)) >= 0:
            unseen, event = 0, bytes(body[:end])
            del body[: end + 2]
            self._on_event(event, self._now)
        if len(body) > _MAX_BODY:
            raise ValueError("an event without an end")


def _chunk_size(line: bytes | bytearray) -> int:
    digits = line.partition(b";")[0].strip()
    if not _HEX.fullmatch(digits):
        raise ValueError("no size of a chunk")
    return int(digits, 16)


def _body_length(told: str) -> int:
    if not _DIGITS.fullmatch(told):
        raise ValueError("no length of a body")
    return int(told)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is."""

    host: str
    port: int
    is_tls: bool
    path: str
    """What stands before /v1; '' mostly."""
    authority: str
    """As the header Host has it."""

    @classmethod
    def of(cls, url: str) -> Address:
        """Raises ConfigError: it is no URL of a server."""
        found = server_url(url)
        return cls(found.host, found.port, found.scheme == "https", found.path, found.authority)


class Pool:
    """Connections to a server, opened as they are needed, and kept while they may be.

    Args:
        address: of the server.
        api_key: what it wants to be sent; None: nothing.
    """

    def __init__(self, address: Address, api_key: str | None = None) -> None:
        self.address = address
        self._key = "" if api_key is None else f"Authorization: Bearer {api_key}\r\n"
        self._idle: list[Connection] = []
        self._context = ssl.create_default_context() if address.is_tls else None

    async def ask(self, method: str, path: str, body: bytes, on_event: OnEvent) -> Response:
        """Sends a request, and waits for all of the answer.

        Raises:
            RequestLost: there will not be one.
        """
        head = (
            f"{method} {self.address.path}{path} HTTP/1.1\r\nHost: {self.address.authority}\r\n{self._key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode("latin-1")
        while True:
            is_kept = bool(self._idle)
            connection = self._idle.pop() if is_kept else await self._open()
            try:
                response = await connection.ask(head, body, on_event)
            except Unused:
                if not is_kept:
                    raise
                continue
            except BaseException:
                connection.close()
                raise
            if connection.is_reusable:
                self._idle.append(connection)
            else:
                connection.close()
            return response

    async def _open(self) -> Connection:
        address = self.address
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                Connection, address.host, address.port, ssl=self._context
            )
        except ssl.SSLCertVerificationError as error:
            raise RequestLost(f"certificate not trusted: {error.verify_message}") from None
        except OSError as error:
            raise RequestLost(f"no connection: {error.strerror or error}") from None
        return connection

    def close(self) -> None:
        """Closes those that are idle."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
