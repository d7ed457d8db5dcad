"""An answer in the making: from outputs of the runtime to HTTP, whole or streamed.

Nothing is sent before the first output has come, so that whatever is refused until then has its status.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tpworker.errors import InvalidRequest, RuntimeStopped
from tpworker.outputs import RequestOutput
from tpworker.server.errors import describe, internal_error
from tpworker.server.formats import Format
from tpworker.server.gate import HALF_CLOSED, OUTCOME
from tpworker.server.leaving import client_left
from tpworker.server.merge import Outputs, merge
from tpworker.server.metrics import Timing

logger = logging.getLogger(__name__)

_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_COMMENT = b":\n\n"  # in a stream of events: of no meaning


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
        self._is_sent = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(
            self._send_events(scope, send) if self._stream else self._send_whole(send)
        )
        leaving = asyncio.create_task(client_left(receive))
        probing = asyncio.create_task(self._probe(scope, send))
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                scope[OUTCOME] = "disconnected"
                return
            await answering
        except InvalidRequest as error:
            raise self._reword(error) from error
        finally:
            answering.cancel()
            leaving.cancel()
            probing.cancel()
            with suppress(asyncio.CancelledError, Exception):  # raised above, or of no interest any more
                await answering

    def _book(self, index: int, output: RequestOutput) -> None:
        if output.finish_reason == "abort":
            raise RuntimeStopped("the request was aborted: the server is shutting down")
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
        started = False
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
                        started = True
                    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        except Exception as error:
            if not started:
                raise
            scope[OUTCOME] = "failed"
            described = describe(error)
            if described is None:
                logger.exception("while answering %s", self._format.request_id)
            event = self._format.failing(described or internal_error())
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        self._is_sent = True
        await send({"type": "http.response.body", "body": b""})

    async def _probe(self, scope: Scope, send: Send) -> None:
        """Sends a comment into a stream of events that has begun, when it is time to see who reads it."""
        half_closed = scope.get("extensions", {}).get(HALF_CLOSED)
        if half_closed is not None and self._stream:
            await half_closed.wait()
            if not self._is_sent:
                await send({"type": "http.response.body", "body": _COMMENT, "more_body": True})

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
