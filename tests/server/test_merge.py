"""Several outputs as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from tpworker.outputs import RequestOutput
from tpworker.server.merge import merge


def output(text: str, finish: Any = None) -> RequestOutput:
    return RequestOutput("r", text, tuple(map(ord, text)), finish, None, 1, 0, len(text))


class Streams:
    """Streams that say when they were closed."""

    def __init__(self) -> None:
        self.closed: list[str] = []

    async def of(
        self, name: str, texts: str, wait: Callable[[], Awaitable[object]] | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        try:
            for text in texts:
                if wait is not None:
                    await wait()
                if text == "!":
                    raise ZeroDivisionError(name)
                yield output(text)
            yield output("", "stop")
        finally:
            self.closed.append(name)


async def collected(*streams: AsyncGenerator[RequestOutput, None]) -> list[dict[int, RequestOutput]]:
    async with aclosing(merge(streams)) as batches:
        return [batch async for batch in batches]


@pytest.mark.parametrize("texts", [["abc"], ["abc", "de"], ["abc", "", "f", "ghij"]])
def test_each_gets_its_own_in_order(texts: list[str]) -> None:
    streams = Streams()
    batches = asyncio.run(collected(*(streams.of(text, text, lambda: asyncio.sleep(0)) for text in texts)))
    for index, text in enumerate(texts):
        mine = [batch[index] for batch in batches if index in batch]
        assert "".join(o.text for o in mine) == text
        assert [i for o in mine for i in o.token_ids] == list(map(ord, text))
        assert [o.finish_reason for o in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert sorted(streams.closed) == sorted(texts)


def test_what_has_come_meanwhile_is_one_output() -> None:
    async def run() -> list[dict[int, RequestOutput]]:
        streams = Streams()
        taken = []
        async with aclosing(merge([streams.of("a", "abc"), streams.of("b", "de")])) as batches:
            async for batch in batches:
                taken.append(batch)
                await asyncio.sleep(0.01)  # a slow consumer
        return taken

    (batch,) = asyncio.run(run())
    assert (batch[0].text, batch[0].finish_reason, batch[0].token_ids) == ("abc", "stop", (97, 98, 99))
    assert batch[1].text == "de"


@pytest.mark.parametrize("others", [0, 2])
def test_an_error_is_raised_and_closes_all(others: int) -> None:
    streams = Streams()
    forever = asyncio.Event().wait

    async def run() -> None:
        await collected(
            streams.of("bad", "a!"), *(streams.of("other", "xyz", forever) for _ in range(others))
        )

    with pytest.raises(ZeroDivisionError):
        asyncio.run(asyncio.wait_for(run(), 10))
    assert sorted(streams.closed) == ["bad", *["other"] * others]


@pytest.mark.parametrize("count", [1, 3])
def test_closing_it_closes_all(count: int) -> None:
    streams = Streams()

    async def run() -> None:
        async with aclosing(merge([streams.of("s", "abc") for _ in range(count)])) as batches:
            await anext(batches)

    asyncio.run(run())
    assert len(streams.closed) == count
