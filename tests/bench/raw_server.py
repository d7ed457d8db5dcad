"""A server that answers what it is told to, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Piece = bytes | float | asyncio.Event | None
"""Of what is sent. A number is a pause in seconds, None the end of the connection; an event is waited for."""
Answer = Callable[["Asked"], Sequence[Piece]]


@dataclass
class Asked:
    """A request that has come."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class RawServer:
    """`answer` is asked for each request."""

    answer: Answer
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    num_connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                data = await reader.readexactly(int(headers["content-length"]))
                method, path, _ = head[0].split()
                asked = Asked(method, path, headers, json.loads(data) if data else None)
                self.asked.append(asked)
                for piece in self.answer(asked):
                    if piece is None:
                        writer.close()
                        return
                    if isinstance(piece, float):
                        await asyncio.sleep(piece)
                    elif isinstance(piece, asyncio.Event):
                        await piece.wait()
                    else:
                        writer.write(piece)
                        await writer.drain()
        writer.close()


@asynccontextmanager
async def raw_server(answer: Answer) -> AsyncIterator[RawServer]:
    raw = RawServer(answer)
    server = await asyncio.start_server(raw.serve, "127.0.0.1", 0)
    raw.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield raw
    finally:
        server.close()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
)
END = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def event(**fields: Any) -> bytes:
    return b"data: %s\n\n" % json.dumps(fields).encode()


def text(text: str, finish_reason: str | None = None) -> bytes:
    """A piece of a completion."""
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish_reason}], usage=None)


def delta(finish_reason: str | None = None, **fields: Any) -> bytes:
    """A piece of a chat."""
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": finish_reason}])


def usage(prompt: int, output: int, cached: int = 0) -> bytes:
    details = {"cached_tokens": cached}
    told = {"prompt_tokens": prompt, "completion_tokens": output, "prompt_tokens_details": details}
    return event(choices=[], usage=told)


def plain(body: Any, status: str = "200 OK", more: str = "") -> bytes:
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n{more}\r\n"
    return head.encode() + data


def stream(*events: bytes) -> list[bytes]:
    return [STREAM, *(chunk(one) for one in events), chunk(DONE) + END]
