"""Outputs that are taken when it suits, and consumers that are called."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from tests.runtime.test_requests import step
from tpworker import InvalidRequest, RequestFailed, Runtime, SamplingParams
from tpworker.ipc.messages import Failed
from tpworker.outputs import RequestOutput
from tpworker.runtime.bell import Bell, Turns
from tpworker.runtime.choices import Choices
from tpworker.runtime.collector import SELDOM, Collector, GeneratorCollector, RequestCollector
from tpworker.runtime.home_loop import HomeLoop
from tpworker.runtime.intake import Intake
from tpworker.runtime.requests import GapError, Request, Requests
from tpworker.testing.fake_process import FAKE_RANKS, fake_model

pytestmark = pytest.mark.usefixtures("nothing_left")


async def all_of(collector: Collector, *, is_whole: bool = False) -> tuple[list[RequestOutput], int]:
    """Its outputs, and how often its consumer was called."""
    news, calls, outputs = asyncio.Event(), 0, []

    def on_news() -> None:
        nonlocal calls
        calls += 1
        news.set()

    collector.listen(on_news, is_whole=is_whole)
    while outputs.extend(collector.take()) or not collector.is_over:
        await news.wait()
        news.clear()
    assert list(collector.take()) == [], "when it is over, nothing comes"
    await collector.aclose()
    return outputs, calls


# ------------------------------------------------------------------------------ of a runtime


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return fake_model(tmp_path / "model", step_seconds=0.001, vocab_size=50)


def test_it_gives_what_a_generator_gives(model: Path) -> None:
    async def main() -> None:
        async with Runtime(model, **FAKE_RANKS) as runtime:
            sampling = SamplingParams(max_tokens=200, n=3, detokenize=False)
            outputs, _ = await all_of(await runtime.collect([1, 2, 3], sampling))
            yielded = [output async for output in runtime.generate([1, 2, 3], sampling)]
            for got in (outputs, yielded):
                for index in range(3):
                    mine = [output for output in got if output.index == index]
                    assert sum(len(output.token_ids) for output in mine) == 200
                    assert [output.finish_reason for output in mine] == [None] * (len(mine) - 1) + ["length"]
            assert runtime.stats().open == 0

    asyncio.run(asyncio.wait_for(main(), 60))


def test_for_the_whole_it_is_called_seldom_unless_a_string_may_end_it(model: Path) -> None:
    async def main() -> None:
        async with Runtime(model, **FAKE_RANKS) as runtime:
            sampling = SamplingParams(max_tokens=4 * SELDOM, detokenize=False)
            outputs, calls = await all_of(await runtime.collect([1], sampling), is_whole=True)
            assert sum(len(output.token_ids) for output in outputs) == 4 * SELDOM
            assert calls <= 1 + 4 + 1, "the first token, each 64, and the end"

    asyncio.run(asyncio.wait_for(main(), 60))


def test_one_that_is_closed_is_aborted_and_what_is_refused_leaves_nothing_open(model: Path) -> None:
    async def main() -> None:
        async with Runtime(model, **FAKE_RANKS) as runtime:
            with pytest.raises(InvalidRequest):
                await runtime.collect([1, 2, 99], SamplingParams(detokenize=False))
            collector = await runtime.collect([1], SamplingParams(max_tokens=10_000, detokenize=False))
            news = asyncio.Event()
            collector.listen(news.set)
            await news.wait()
            assert collector.take()
            assert not collector.is_over
            await collector.aclose()
            stats = runtime.stats()
            assert (stats.open, stats.aborted) == (0, 1)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_an_abort_is_told_to_a_consumer_that_takes_at_once(model: Path) -> None:
    async def main() -> None:
        async with Runtime(model, **FAKE_RANKS) as runtime:
            sampling = SamplingParams(max_tokens=10_000, n=3, detokenize=False)
            collector = await runtime.collect([1], sampling, request_id="it")
            outputs: list[RequestOutput] = []
            collector.listen(lambda: outputs.extend(collector.take()))
            while len({output.index for output in outputs}) < 3:
                await asyncio.sleep(0.001)
            runtime.abort("it")
            await asyncio.sleep(0.01)
            assert collector.is_over
            ends = [output.index for output in outputs if output.finish_reason == "abort"]
            assert sorted(ends) == [0, 1, 2]
            await collector.aclose()

    asyncio.run(asyncio.wait_for(main(), 60))


class Home:
    """Any event loop."""

    def check(self) -> None: ...

    def call(self, function: Callable[[], None]) -> None:
        function()


@pytest.mark.parametrize("others", [0, 1])
def test_an_error_in_the_turn_of_other_outputs_is_told_behind_them(others: int) -> None:
    """Also that of one choice, while the other goes on."""

    async def main() -> list[str]:
        intake, bell, told = Intake(10, 0, "fcfs", 1), Bell(), []
        requests = [intake.requests.open("a", bell=bell)]
        requests += [intake.requests.open("a", requests[0], index, bell) for index in range(1, 1 + others)]
        choices = Choices(requests, bell)
        choices.sampling = SamplingParams(n=1 + others)
        collector = RequestCollector(cast(HomeLoop, Home()), intake, choices)

        def on_news() -> None:
            try:
                told.extend("token" for output in collector.take() if output.token_ids)
            except RequestFailed as error:
                told.append(str(error))

        collector.listen(on_news)
        intake.requests.deliver(step((requests[-1], 0, 5)))
        intake.requests.fail(Failed(0, requests[0].number, "poison"))
        for _ in range(5):
            await asyncio.sleep(0)
        return told

    token, *errors = asyncio.run(main())
    assert token == "token"
    assert len(errors) == 1
    assert "poison" in errors[0]


# --------------------------------------------------------------------------- bells and turns


def listening(requests: Requests, num_awaited: int = 1) -> tuple[Request, list[int]]:
    """A request, and how many of its tokens had come whenever its consumer was called."""
    bell = Bell()
    request = requests.open("a", bell=bell)
    calls: list[int] = []
    Choices([request], bell).listen(lambda: calls.append(request.num_received), num_awaited)
    return request, calls


def test_who_is_called_hears_of_a_step_once_with_its_end() -> None:
    requests = Requests()
    request, calls = listening(requests)
    requests.deliver(step((request, 0, 5), (request, 1, 6)))
    assert calls == [2]
    requests.deliver(step((request, 1, 6)))  # repeated
    assert calls == [2]
    ends: list[str | None] = []
    request.bell.on_ring = lambda: ends.append(request.finish)
    requests.deliver(step((request, 2, 7), finished=[(0, "stop")]))
    assert set(ends) == {"stop"}, "never of the last token without its end"


def test_who_awaits_many_hears_of_the_first_then_of_so_many() -> None:
    requests = Requests()
    request, calls = listening(requests, num_awaited=3)
    for position in range(8):
        before = len(calls)
        requests.deliver(step((request, position, 5)))
        if len(calls) > before:
            request.take()
    assert calls == [1, 4, 7]
    request.end("stop")
    assert calls == [1, 4, 7, 8]


def test_what_came_before_a_gap_is_told() -> None:
    requests = Requests()
    request, calls = listening(requests)
    with pytest.raises(GapError):
        requests.deliver(step((request, 0, 5), (request, 2, 6)))
    assert calls == [1]


def test_turns_call_each_once_and_all_though_one_raises(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> list[str]:
        turns, called = Turns(), []

        def first() -> None:
            called.append("first")
            turns.call(third)

        def second() -> None:
            raise ZeroDivisionError

        def third() -> None:
            called.append("third")

        for consumer in (first, second, first, third):
            turns.call(consumer)
        assert called == [], "not before its turn"
        await asyncio.sleep(0)
        assert called == ["first", "third"]
        await asyncio.sleep(0)
        return called

    assert asyncio.run(main()) == ["first", "third", "third"]
    assert "who must not" in caplog.text


# ---------------------------------------------------------------------------- of a generator


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


@pytest.mark.parametrize("text", ["abc", "", "ghij"])
def test_a_generator_gives_its_own_in_order(text: str) -> None:
    streams = Streams()

    async def main() -> list[RequestOutput]:
        stream = streams.of("s", text, lambda: asyncio.sleep(0.001))
        return (await all_of(GeneratorCollector(stream, Turns())))[0]

    outputs = asyncio.run(asyncio.wait_for(main(), 10))
    assert "".join(one.text for one in outputs) == text
    assert [token for one in outputs for token in one.token_ids] == list(map(ord, text))
    assert [one.finish_reason for one in outputs] == [None] * (len(outputs) - 1) + ["stop"]
    assert streams.closed == ["s"]


def test_what_a_generator_gave_meanwhile_is_one_output() -> None:
    async def main() -> tuple[list[RequestOutput], bool]:
        collector = GeneratorCollector(Streams().of("s", "abc"), Turns())
        await asyncio.sleep(0.01)  # a slow consumer, who does not even listen
        return list(collector.take()), collector.is_over

    (taken,), is_over = asyncio.run(main())
    assert (taken.text, taken.finish_reason, taken.token_ids) == ("abc", "stop", (97, 98, 99))
    assert is_over


def test_an_error_of_a_generator_comes_behind_what_it_gave_and_closes_it() -> None:
    streams = Streams()

    async def main() -> None:
        collector, news = GeneratorCollector(streams.of("bad", "a!"), Turns()), asyncio.Event()
        await asyncio.sleep(0.01)
        collector.listen(news.set)
        assert [one.text for one in collector.take()] == ["a"]
        assert not collector.is_over
        await asyncio.wait_for(news.wait(), 10)  # there is more to take, though nothing comes any more
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                collector.take()
        await collector.aclose()

    asyncio.run(main())
    assert streams.closed == ["bad"]


def test_closing_it_closes_the_generator() -> None:
    streams = Streams()

    async def main() -> None:
        forever = asyncio.Event().wait
        collector = GeneratorCollector(streams.of("s", "abc", forever), Turns())
        await asyncio.sleep(0.01)
        await collector.aclose()

    asyncio.run(asyncio.wait_for(main(), 10))
    assert streams.closed == ["s"]
