"""An answer in the making: from outputs of the runtime to HTTP, whole or streamed.

Nothing is sent before the first output has come, so that whatever is refused until then has its status. But a
stream of events does not stay silent, however long its outputs take: a queue, or a runtime that recovers, may
hold them up for longer than a proxy or a client waits for a byte.

    step ─► on_news ─┬─ begun, and the client reads: take, write, past the layers of the app
                     └─ else: the task is woken ─► take, send

So a token of a stream wakes no task and goes through no layer: what those see are begin and end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tpworker.errors import InvalidRequest, RuntimeSleeping, RuntimeStopped
from tpworker.outputs import RequestOutput
from tpworker.runtime.collector import Collector
from tpworker.server.connection import WRITER, BodyWriter
from tpworker.server.errors import describe, internal_error
from tpworker.server.formats import Format
from tpworker.server.gate import HALF_CLOSED, OUTCOME
from tpworker.server.leaving import CUT, client_left
from tpworker.server.timing import Timing

logger = logging.getLogger(__name__)

_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_COMMENT = b":\n\n"  # in a stream of events: of no meaning
FIRST_SILENCE_S = 15.0
"""After which a stream of events begins without its first output: what is refused, is refused long before."""
SILENCE_S = 5.0
"""After which a comment is sent in a stream that has begun; proxies cut what is silent for half a minute."""


class Answer(Response):
    """Sends what comes of some requests, one prompt each. A client that leaves ends them."""

    def __init__(
        self,
        asks: Sequence[Callable[[], Awaitable[Collector]]],
        answer_format: Format,
        timing: Timing,
        *,
        stream: bool,
        reword: Callable[[InvalidRequest], InvalidRequest] = lambda error: error,
    ) -> None:
        """
        Args:
            asks: submit one each, with all its choices.
            answer_format: how they are written.
            timing: is told when tokens come.
            stream: whether as events.
            reword: what a client is told of what the runtime refuses.
        """
        super().__init__()
        self._asks = asks
        self._format = answer_format
        self._timing = timing
        self._stream = stream
        self._reword = reword
        count = len(asks) * answer_format.num_generated
        keeps_tokens = not stream and answer_format.tells_tokens
        self._choices = [answer_format.choice(keeps_tokens) for _ in range(count)]
        # Those that are not over, with the number of the first choice of each.
        self._collectors: list[tuple[int, Collector]] = []
        self._opened: set[int] = set()  # choices of which events have told
        self._news: asyncio.Future[None] | None = None  # what the task waits for
        self._failure: Exception | None = None  # came behind what had to be sent first
        self._writer: BodyWriter | None = None
        self._is_begun = False  # as a stream of events
        self._is_over = False  # nothing is to be sent any more
        self._sent_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(
            self._send_events(scope, send) if self._stream else self._send_whole(send)
        )
        leaving = asyncio.create_task(client_left(receive))
        keeping = asyncio.create_task(self._keep_open(scope, send)) if self._stream else None
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                scope[OUTCOME] = "disconnected"
                return
            await answering
        except (InvalidRequest, RuntimeStopped) as error:
            raise self._told(error) from error
        finally:
            answering.cancel()
            leaving.cancel()
            if keeping is not None:
                keeping.cancel()
            with suppress(asyncio.CancelledError, Exception):  # raised above, or of no interest any more
                await answering

    async def _send_whole(self, send: Send) -> None:
        texts: list[list[str]] = [[] for _ in self._choices]
        async with self._collecting():
            while self._collectors:
                for index, output in self._taken():
                    texts[index].append(output.text)
                if self._expects_more():
                    await self._wait()
        body = self._format.body(["".join(parts) for parts in texts], self._choices).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _send_events(self, scope: Scope, send: Send) -> None:
        self._writer = scope.get("extensions", {}).get(WRITER)
        try:
            async with self._collecting():
                while self._collectors or self._failure is not None:
                    if part := self._events():
                        await self._send_part(part, send)
                    elif self._expects_more():
                        await self._wait()
            await self._send_part(self._format.closing(self._choices).encode(), send)
        except Exception as error:
            if not self._is_begun:
                self._is_over = True  # it has a status, and no comment may take that away now
                raise
            scope[OUTCOME] = "failed"
            described = describe(self._told(error))
            if described is None:
                logger.exception("while answering %s", self._format.request_id)
            told = described or internal_error()
            told.note()
            event = self._format.failing(told)
            await self._send_part(event.encode(), send)
        self._is_over = True
        await send({"type": "http.response.body", "body": b""})

    async def _send_part(self, part: bytes, send: Send) -> None:
        """Of a stream of events, which begins with the first. Two tasks send: where one has to wait for the
        client to read, the other waits behind it."""
        self._sent_at = time.monotonic()
        if not self._is_begun:
            self._is_begun = True
            await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
        await send({"type": "http.response.body", "body": part, "more_body": True})

    async def _keep_open(self, scope: Scope, send: Send) -> None:
        """Sends a comment whenever a stream of events has been silent for a while; and once more when it is
        time to see who reads it."""
        half_closed = scope.get("extensions", {}).get(HALF_CLOSED) or asyncio.Event()
        while not self._is_over:
            silence = SILENCE_S if self._is_begun else FIRST_SILENCE_S
            try:
                async with asyncio.timeout(self._sent_at + silence - time.monotonic()):
                    await half_closed.wait()
                half_closed = asyncio.Event()  # it is set once
            except TimeoutError:
                if time.monotonic() < self._sent_at + silence:
                    continue  # something was sent meanwhile
            if not self._is_over:
                await self._send_part(_COMMENT, send)

    def _told(self, error: Exception) -> Exception:
        """What a client is told of an error of the runtime."""
        if isinstance(error, InvalidRequest):
            return self._reword(error)
        is_over = isinstance(error, RuntimeStopped) and not isinstance(error, RuntimeSleeping)
        return RuntimeStopped(CUT) if is_over else error

    # ------------------------------------------------------------------------ what comes

    @asynccontextmanager
    async def _collecting(self) -> AsyncIterator[None]:
        """Submits all requests, and ends them."""
        async with AsyncExitStack() as stack:
            for number, ask in enumerate(self._asks):
                collector = await stack.enter_async_context(aclosing(await ask()))
                self._collectors.append((number * self._format.num_generated, collector))
                collector.listen(self._on_news, is_whole=not self._stream)
            yield

    def _on_news(self) -> None:
        """Sends what has come, if that can be done here; else the task does."""
        if self._news is None or self._news.done():
            return  # it does not wait: it will look by itself
        if self._is_begun and self._writer is not None and self._writer.is_free:
            try:
                if part := self._events():
                    self._sent_at = time.monotonic()
                    self._writer.write(part)
                if self._expects_more():
                    return
            except Exception as error:
                self._failure = error
        self._news.set_result(None)

    async def _wait(self) -> None:
        """Until the task has something to do. All that has come has been taken just before."""
        self._news = asyncio.get_running_loop().create_future()
        await self._news

    def _expects_more(self) -> bool:
        """Whether something has to come before the task has more to do; else all has been taken, or an error
        waits to be raised."""
        return bool(self._collectors) and self._failure is None

    def _events(self) -> bytes:
        """The events of all that has come."""
        events = []
        for index, output in self._taken():
            if index not in self._opened:
                self._opened.add(index)
                events.append(self._format.opening(index, self._choices))
            events.append(self._format.event(index, output, self._choices))
        return "".join(events).encode()

    def _taken(self) -> list[tuple[int, RequestOutput]]:
        """What has come, each with the number of its choice. Once a stream has begun, an error that comes
        behind something is raised the next time."""
        if self._failure is not None:
            raise self._failure
        taken: list[tuple[int, RequestOutput]] = []
        is_any_over = False
        try:
            for first, collector in self._collectors:
                for output in collector.take():
                    index = first + output.index
                    if output.finish_reason == "abort":
                        raise RuntimeStopped(CUT)
                    self._choices[index].add(output)
                    self._timing.add(index, output)
                    taken.append((index, output))
                is_any_over |= collector.is_over
        except Exception as error:
            if not (taken and self._is_begun):
                raise
            self._failure = error
        if is_any_over:
            self._collectors = [one for one in self._collectors if not one[1].is_over]
        return taken
