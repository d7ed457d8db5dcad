"""One request: HTTP in all its forms, what counts as a piece of output, and what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bench.raw_server import (
    DONE,
    END,
    STREAM,
    Asked,
    RawServer,
    chunk,
    delta,
    event,
    plain,
    raw_server,
    stream,
    text,
    usage,
)  # fmt: skip
from tpworker.bench.client import CHAT, COMPLETIONS, AnswerReader, fetch, perform
from tpworker.bench.connection import Address, Connection, Pool
from tpworker.bench.records import Record
from tpworker.errors import ConfigError

UNTIL_THE_END = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
OUTPUT = (text("a"), text("b"), text("", "stop"), usage(7, 3, 2))


def ask(
    *pieces: bytes | float | None, path: str = COMPLETIONS, times: int = 1, timeout: float = 5.0
) -> tuple[Record, str, RawServer]:
    """Sends requests, one after the other, which are answered by these pieces; returns the last one."""

    async def main() -> tuple[Record, str, RawServer]:
        async with raw_server(lambda asked: pieces) as raw:
            pool = Pool(Address.of(raw.url), "key")
            for _ in range(times):
                record = Record(0.0)
                said = await perform(pool, path, b"{}", record, timeout, keeps_text=True)
            pool.close()
            return record, said, raw

    return asyncio.run(main())


def check(record: Record, said: str) -> None:
    assert record.error is None
    assert (said, record.num_prompt, record.num_output, record.num_cached) == ("ab", 7, 3, 2)
    assert record.first is not None
    assert record.last is not None
    assert record.sent <= record.first <= record.last <= record.ended
    assert record.intervals == [record.last - record.first]


def test_a_stream_over_a_connection_that_is_kept() -> None:
    record, said, raw = ask(*stream(*OUTPUT), times=3)
    check(record, said)
    assert raw.num_connections == 1
    asked = raw.asked[-1]
    assert (asked.method, asked.path) == ("POST", COMPLETIONS)
    assert asked.headers["authorization"] == "bearer key"
    assert asked.headers["host"] in raw.url


ANSWERS = {
    "one piece": [STREAM + b"".join(map(chunk, OUTPUT)) + END],
    "100 Continue before it": [b"HTTP/1.1 100 Continue\r\n\r\n", *stream(*OUTPUT)],
    "several events in a chunk": [STREAM, chunk(b"".join(OUTPUT) + DONE), END],
    "comments": stream(b": ping\n\n", OUTPUT[0], b"event: x\n" + OUTPUT[1], *OUTPUT[2:]),
    "CRLF": [STREAM, chunk(b"".join(OUTPUT).replace(b"\n", b"\r\n")), END],
    "a length": [
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n",
        b"content-length: %d\r\n\r\n" % len(b"".join(OUTPUT)),
        *OUTPUT,
    ],
    "until the end": [b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", *OUTPUT, None],
    "trailers": [STREAM, *map(chunk, OUTPUT), b"0\r\nX-A: b\r\n\r\n"],
}  # fmt: skip


@pytest.mark.parametrize("pieces", ANSWERS.values(), ids=ANSWERS)
def test_http_in_all_its_forms(pieces: Sequence[bytes | None]) -> None:
    record, said, _ = ask(*pieces, times=2)
    check(record, said)


@settings(max_examples=50)
@given(st.sampled_from(sorted(ANSWERS)), st.lists(st.integers(0, 2000), max_size=8))
def test_wherever_it_is_cut(name: str, cuts: list[int]) -> None:
    data = b"".join(piece for piece in ANSWERS[name] if piece is not None)
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]

    async def main() -> tuple[AnswerReader, Record]:
        record, connection = Record(0.0), Connection()
        reader = AnswerReader(record, keeps_text=True)
        connection._done = done = asyncio.get_running_loop().create_future()
        connection._on_event = reader.on_event
        for start, end in pairwise(edges):
            if start < end:
                connection.data_received(data[start:end])
        if name == "until the end":
            connection.connection_lost(None)
        reader.close(await done)
        return reader, record

    reader, record = asyncio.run(main())
    assert (reader.text, record.error, record.num_output, len(record.intervals)) == ("ab", None, 3, 1)


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([plain({"error": {}}, "429 Too Many Requests")], "status 429"),
        ([plain({"choices": []})], "answer that is no stream"),
        ([None], "no answer"),
        ([STREAM, chunk(text("a")), None], "connection closed"),
        ([STREAM, chunk(text("a")), 2.0], "timeout"),
        (stream(event(error={"code": 500, "message": "x"})), "error in the stream: 500"),
        (stream(b"data: {\n\n"), "event that is not OpenAI's"),
        (stream(event(choices=7)), "event that is not OpenAI's"),
        ([b"SSH-2.0\r\n\r\n"], "bad HTTP: no status line"),
        ([STREAM, b"xyz\r\n"], "bad HTTP: no size of a chunk"),
        ([STREAM, b"-5\r\n12345"], "bad HTTP: no size of a chunk"),
        ([STREAM, b"1" * 5000], "bad HTTP: a line without an end"),
        ([STREAM, chunk(b"data: " + b"x" * (17 << 20))], "bad HTTP: an event without an end"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: -7\r\n\r\n"], "bad HTTP: no length of a body"),
        (stream(b"data: " + b"[" * 200_000 + b"\n\n"), "event that is not OpenAI's"),
        (stream(event(error={"code": "\x1b[2J\n"})), "error in the stream: ?[2J?"),
        ([STREAM, chunk(text("a") + text("b")), END], "stream that ends before its output does"),
        ([UNTIL_THE_END, text("a"), None], "stream that ends before its output does"),
        (stream(), "stream without output"),
        (stream(usage(7, 3)), "stream without output"),
        (stream(text("a"), event(choices=[], usage=[1])), "usage that is no numbers"),
        (stream(text("a"), usage(7, "3")), "usage that is no numbers"),  # type: ignore[arg-type]
        (stream(text("a"), usage(7, float("nan"))), "usage that is no numbers"),  # type: ignore[arg-type]
        (stream(text("a"), usage(7, -3)), "usage that is no numbers"),
        (stream(text("a"), usage(10**400, 3)), "usage that is no numbers"),
        (
            stream(text("a"), event(choices=[], usage={"prompt_tokens_details": [1]})),
            "usage that is no numbers",
        ),
    ],
)
def test_what_goes_wrong_has_a_kind(pieces: Sequence[bytes | float | None], error: str) -> None:
    record, _, _ = ask(*pieces, timeout=0.5)
    assert (record.error or "").startswith(error)
    assert record.ended >= record.sent


def test_a_kept_connection_that_was_closed_meanwhile_is_no_error() -> None:
    async def main() -> None:
        async with raw_server(lambda asked: [*stream(*OUTPUT), None]) as raw:
            pool = Pool(Address.of(raw.url))
            for _ in range(3):
                record = Record(0.0)
                await perform(pool, COMPLETIONS, b"{}", record, 5.0)
                assert record.error is None
            assert raw.num_connections == 3

    asyncio.run(main())


def test_a_connection_that_the_server_is_about_to_close_is_not_used_again() -> None:
    async def main() -> None:
        async with raw_server(lambda asked: [plain({}, more="Connection: close\r\n")]) as raw:
            pool = Pool(Address.of(raw.url))
            for number in range(1, 3):
                assert await fetch(pool, "GET", "/") == (200, {})
                assert raw.num_connections == number
            pool.close()

    asyncio.run(main())


def test_no_server() -> None:
    async def main() -> None:
        async with raw_server(lambda asked: []) as raw:
            address = Address.of(raw.url)
        record = Record(0.0)
        await perform(Pool(address), COMPLETIONS, b"{}", record, 5.0)
        assert "no connection" in (record.error or "")

    asyncio.run(main())


def test_what_counts_as_output_of_a_chat() -> None:
    record, said, _ = ask(
        *stream(
            delta(role="assistant", content=""),
            delta(reasoning_content="hm"),
            delta(content="ab"),
            delta(tool_calls=[{}]),
            delta("stop"),
        ),
        path=CHAT,
    )
    assert (said, record.num_output, record.is_counted) == ("ab", 3, False)
    assert len(record.intervals) == 2


def test_outputs_without_text() -> None:
    """Of a server without a tokenizer; and one whose only token is its end."""
    record, _, _ = ask(*stream(text(""), text(""), text("", "length"), usage(1, 3)))
    assert (len(record.intervals), record.num_output) == (1, 3)
    record, _, _ = ask(*stream(text("", "stop"), usage(1, 1)))
    assert record.first is not None
    assert record.tpot is None


def test_fetch() -> None:
    async def main() -> None:
        def answer(asked: Asked) -> list[bytes]:
            nothing = b"HTTP/1.1 204 No\r\nContent-Length: 0\r\n\r\n"
            return [plain({"told": asked.body})] if asked.path == "/json" else [nothing]

        async with raw_server(answer) as raw:
            pool = Pool(Address.of(raw.url + "/v1"))
            assert await fetch(pool, "POST", "/json", [1]) == (200, {"told": [1]})
            assert await fetch(pool, "GET", "/none") == (204, None)
            assert raw.num_connections == 1
            pool.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "url",
    [
        "h:8000",
        "ftp://h",
        "http://",
        "http://h:0",
        "http://h:99999",
        "http://[::1",
        "http://.h",
        f"http://{'a' * 64}",
    ],
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ConfigError, match="no URL of a server"):
        Address.of(url)


def test_urls() -> None:
    assert Address.of("http://[::1]:80/llm/v1/") == Address("::1", 80, False, "/llm", "[::1]:80")
    assert Address.of("http://ü:1/ü €") == Address("xn--tda", 1, False, "/%C3%BC%20%E2%82%AC", "xn--tda:1")
    assert Address.of("https://user@h") == Address("h", 443, True, "", "h")
