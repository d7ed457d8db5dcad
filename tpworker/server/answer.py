"""An answer in the making: from outputs of the runtime to HTTP, whole or streamed.

Nothing is sent before the first output has come, so that whatever is refused until then has its status. But a
stream of events does not stay silent, however long its outputs take: a queue, or a runtime that recovers, may
hold them up for longer than a proxy or a client waits for a byte.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tpworker.errors import InvalidRequest, RuntimeSleeping, RuntimeStopped
from tpworker.outputs import RequestOutput
from tpworker.server.errors import describe, internal_error
from tpworker.server.formats import Format
from tpworker.server.gate import HALF_CLOSED, OUTCOME
from tpworker.server.leaving import CUT, client_left
from tpworker.server.merge import Outputs, merge
from tpworker.server.timing import Timing

logger = logging.getLogger(__name__)

_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_COMMENT = b":\n\n"  # in a stream of events: of no meaning
FIRST_SILENCE_S = 15.0
"""After which a stream of events begins without its first output: what is refused, is refused long before."""
SILENCE_S = 5.0
"""After which a comment is sent in a stream that has begun; proxies cut what is silent for half a minute."""


class Answer(Response):
    """Sends what some streams of outputs give, one prompt each. A client that leaves ends them."""

    def __init__(
        self,
        streams: Sequence[Outputs],
        answer_format: Format,
        timing: Timing,
        *,
        stream: bool,
        reword: Callable[[InvalidRequest], InvalidRequest] = lambda error: error,
    ) -> None:
        """
        Args:
            streams: one a prompt, with all its choices.
            answer_format: how they are written.
            timing: is told when tokens come.
            stream: whether as events.
            reword: what a client is told of what the runtime refuses.
        """
        super().__init__()
        self._streams = streams
        self._format = answer_format
        self._timing = timing
        self._stream = stream
        self._reword = reword
        count = len(streams) * answer_format.num_generated
        keeps_tokens = not stream and answer_format.tells_tokens
        self._choices = [answer_format.choice(keeps_tokens) for _ in range(count)]
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

    def _book(self, index: int, output: RequestOutput) -> None:
        if output.finish_reason == "abort":
            raise RuntimeStopped(CUT)
        self._choices[index].add(output)
        self._timing.add(index, output)

    async def _send_whole(self, send: Send) -> None:
        texts: list[list[str]] = [[] for _ in self._choices]
        async with aclosing(merge(self._streams, self._format.num_generated)) as batches:
            async for batch in batches:
                for index, output in batch.items():
                    self._book(index, output)
                    texts[index].append(output.text)
        body = self._format.body(["".join(parts) for parts in texts], self._choices).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _send_events(self, scope: Scope, send: Send) -> None:
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    await self._send_part(event.encode(), send)
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

    async def _events(self) -> AsyncGenerator[str, None]:
        """The events of all choices; one string for what is there at once."""
        opened: set[int] = set()
        async with aclosing(merge(self._streams, self._format.num_generated)) as batches:
            async for batch in batches:
                events = []
                for index, output in batch.items():
                    self._book(index, output)
                    if index not in opened:
                        opened.add(index)
                        events.append(self._format.opening(index, self._choices))
                    events.append(self._format.event(index, output, self._choices))
                if text := "".join(events):
                    yield text
        yield self._format.closing(self._choices)
