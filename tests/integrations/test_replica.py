"""What a replica answers: everything as what can be sent, and read back as what it was."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.server.fake_runtime import FakeRuntime
from tpworker import (
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    RequestFailed,
    Runtime,
    RuntimeConfig,
    RuntimeFailed,
    RuntimeStopped,
    SamplingParams,
)
from tpworker.integrations import replica as module
from tpworker.integrations.relay import Ask, ReplicaLost
from tpworker.integrations.replica import LOST, Item, Refusal, Replica, outputs_of
from tpworker.outputs import RequestOutput


class Told(FakeRuntime):
    """Takes what was delivered, and raises what it is told to."""

    error_to_raise: Exception | None = None

    async def generate(self, *args: Any, delivered: Any = (), **options: Any) -> Any:
        if self.error_to_raise is not None:
            raise self.error_to_raise
        async with aclosing(super().generate(*args, **options)) as outputs:
            async for output in outputs:
                if output.num_output_tokens > len(delivered):
                    yield output


def replica_of(runtime: FakeRuntime, items_per_second: float = 1e6) -> Replica:
    replica = Replica(RuntimeConfig(), "one", items_per_second)
    replica._runtime = cast(Runtime, runtime)
    return replica


async def answer(replica: Replica, delivered: tuple[int, ...] = ()) -> list[RequestOutput]:
    """What a front makes of what comes over the wire."""

    async def wire() -> AsyncIterator[Item]:
        async for item in replica.items(Ask((65, 66), SamplingParams(seed=1), None, delivered)):
            yield copy.deepcopy(item)  # by the same methods as pickling

    return [output async for output in outputs_of(wire())]


def test_outputs_come_as_they_are() -> None:
    runtime = Told()
    outputs = asyncio.run(answer(replica_of(runtime)))
    assert "".join(output.text for output in outputs) == "You said 'bc'."
    rest = asyncio.run(answer(replica_of(runtime), (1, 2, 3)))
    assert "".join(output.text for output in rest) == " said 'bc'."
    assert runtime.num_open == 0


def test_the_more_streams_the_longer_they_wait_to_send_more_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await asyncio.sleep(0)

    monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=sleep))
    replica = replica_of(Told(), items_per_second=100)
    outputs = asyncio.run(answer(replica))
    assert waits == [0.01] * (len(outputs) - 1), "not behind the last one"
    waits.clear()

    async def both() -> None:
        await asyncio.gather(answer(replica), answer(replica))

    asyncio.run(both())
    assert max(waits) == 0.02
    assert len(waits) == 2 * (len(outputs) - 1)


def test_what_a_front_has_asked_that_is_gone_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    runtime = Told()
    replica = replica_of(runtime)
    ask = Ask((65, 66), SamplingParams(seed=1), front="a")

    async def main() -> None:
        nonlocal now
        items = replica.items(ask)
        for _ in range(4):  # it is heard of, again and again
            assert isinstance(await anext(items), RequestOutput)
            now += 50
            replica.tell("a")
            replica.tell("b")
        await anext(items)
        now += 61
        replica.tell("b")
        assert await anext(items) == Refusal(LOST, "the front that asked for it is gone")
        assert await anext(items, None) is None
        assert runtime.num_open == 0
        assert len(runtime.aborted) == 1

    asyncio.run(main())


def test_what_nobody_asked_for_by_name_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a front nobody says again and again that it is there: whoever asked closes the stream."""
    now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    runtime = Told()
    replica = replica_of(runtime)

    async def main() -> None:
        nonlocal now
        found: list[Item] = []
        async for item in replica.items(Ask((65, 66), SamplingParams(seed=1))):
            found.append(item)
            now += 100
        assert all(isinstance(item, RequestOutput) for item in found)
        assert len(found) > 3
        items = replica.items(Ask((65, 66), SamplingParams(seed=1)))
        await anext(items)
        await items.aclose()
        assert (runtime.num_open, len(runtime.aborted)) == (0, 1)

    asyncio.run(main())


@pytest.mark.parametrize(
    "error",
    [InvalidRequest("no", "n"), PromptTooLong("long", "prompt"), QueueFull("full"), RequestFailed("so")],
)
def test_refusals_keep_what_they_are(error: Exception) -> None:
    runtime = Told()
    runtime.error_to_raise = error
    with pytest.raises(type(error)) as refused:
        asyncio.run(answer(replica_of(runtime)))
    assert str(refused.value) == str(error)
    assert getattr(refused.value, "parameter", None) == getattr(error, "parameter", None)


@pytest.mark.parametrize("error", [RuntimeFailed("rank 1", "rank1", "trace"), RuntimeStopped("stop")])
@pytest.mark.parametrize(("state", "was_taken"), [("ready", True), ("failed", False), ("stopped", False)])
def test_a_replica_that_ends_is_lost(error: Exception, state: Any, was_taken: bool) -> None:
    runtime = Told(state=state)
    runtime.error_to_raise = error
    with pytest.raises(ReplicaLost) as lost:
        asyncio.run(answer(replica_of(runtime)))
    assert (str(lost.value), lost.value.was_taken) == (str(error).partition("\n")[0], was_taken)


def test_it_is_healthy_while_it_recovers_and_not_once_it_has_failed() -> None:
    runtime = Told()
    replica = replica_of(runtime)
    replica.check()
    runtime.lose()
    replica.check()
    runtime.fail()
    with pytest.raises(RuntimeFailed, match="tpworker-rank1 was killed"):
        replica.check()
    runtime.state = "stopped"
    with pytest.raises(RuntimeStopped):
        replica.check()


def test_what_it_tells_can_be_sent() -> None:
    runtime = Told()
    told = copy.deepcopy(replica_of(runtime).tell())  # by the same methods as pickling
    assert told.stats == replace(runtime.stats(), recent_steps=())
    assert (told.name, told.vocab_size, told.max_model_len, told.kv_tokens) == ("one", 257, 512, 1600)
