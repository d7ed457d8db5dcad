"""What schedulers are told of requests, where one takes the place of another."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.runtime.test_requests import step
from tpworker import RequestFailed
from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.messages import Abort, Message, ResetPrefixCache, Sampling, Submit, Vocabulary
from tpworker.runtime.dispatch import Dispatch
from tpworker.runtime.faults import Fault
from tpworker.runtime.requests import Request, Requests

KILLED = Fault("tpworker-rank0", "tpworker-rank0 was killed by SIGKILL", is_external=True)
CRASHED = Fault("tpworker-rank0", "tpworker-rank0 was killed by SIGSEGV", forfeits=True)


class FakeGeneration:
    def __init__(self, number: int) -> None:
        self.number = number
        self.sent: list[Message] = []

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def submitted(self) -> list[int]:
        return [message.request for message in self.sent if isinstance(message, Submit)]


class World:
    def __init__(self) -> None:
        self.requests = Requests()
        self.dispatch = Dispatch(self.requests, in_flight=2)
        self.number = -1
        self.resume()

    def resume(self) -> None:
        self.number += 1
        self.generation: Any = FakeGeneration(self.number)
        self.dispatch.resume(self.generation)

    def submit(self, grammar: str | None = None) -> Request:
        request = self.requests.open(f"r{self.requests._next_number}")
        sampling = Sampling(1.0, 1.0, 0, 0, 9, 0, b"")
        request.submit = Submit(0, request.number, pack_int32([5, 6]), 0, sampling, grammar=grammar)
        self.dispatch.submit(request)
        return request


@pytest.fixture
def world() -> World:
    return World()


def test_who_ran_waits_until_the_next_scheduler_has_started_it(world: World) -> None:
    request, other = world.submit(), world.submit()
    world.dispatch.deliver(step((request, 0, 7), started=[(request, 0)]))
    assert (world.requests.num_running, world.requests.num_waiting) == (1, 1)
    world.dispatch.interrupt(KILLED)
    assert (world.requests.num_running, world.requests.num_waiting) == (0, 2)
    assert not world.requests.any_submitted()
    world.resume()
    assert world.generation.submitted() == [request.number, other.number]
    assert (world.requests.num_running, world.requests.num_waiting) == (0, 2)
    world.dispatch.deliver(step((request, 1, 8), started=[(request, 2)]))
    assert (world.requests.num_running, world.requests.num_waiting) == (1, 1)
    assert (request.num_cached, list(request.received)) == (0, [7, 8])


@pytest.mark.parametrize("fault", [KILLED, CRASHED])
def test_crashes_are_held_against_those_that_ran_and_kills_are_not(world: World, fault: Fault) -> None:
    request, other = world.submit(), world.submit()
    for _ in range(2):
        world.dispatch.interrupt(fault)
        world.resume()
    if fault is KILLED:
        assert world.generation.submitted() == [request.number, other.number]
        return
    assert world.generation.submitted() == [request.number], "both are suspected, and run apart"
    late = world.submit()
    assert world.generation.submitted() == [request.number], "nobody else runs meanwhile"
    world.dispatch.interrupt(fault)
    assert isinstance(request.error and request.error(), RequestFailed)
    world.resume()
    assert world.generation.submitted() == [other.number, late.number]


def test_a_suspect_that_is_aborted_has_the_next_ones_run(world: World) -> None:
    request, other = world.submit(), world.submit()
    for _ in range(2):
        world.dispatch.interrupt(CRASHED)
        world.resume()
    world.dispatch.withdraw(request)
    assert world.generation.sent[1] == Abort(world.number, request.number)
    assert world.generation.submitted() == [request.number, other.number]


def test_each_scheduler_is_told_the_vocabulary_before_the_first_grammar(world: World) -> None:
    world.dispatch.vocabulary = ("{}", b"")
    world.submit("start: /a/")
    world.submit("start: /b/")
    for _ in range(2):
        kinds = [type(message) for message in world.generation.sent]
        assert kinds == [Vocabulary, Submit, Submit]
        assert {message.generation for message in world.generation.sent} == {world.number}
        world.dispatch.interrupt(KILLED)
        world.resume()


def test_a_reset_is_answered_by_whichever_scheduler_there_is_before_it_is_told_of_requests(
    world: World,
) -> None:
    async def main() -> None:
        request = world.submit()
        reset, left = (world.dispatch.reset_prefix_cache() for _ in range(2))
        assert world.generation.sent[-2:] == [ResetPrefixCache(0, 0), ResetPrefixCache(0, 1)]
        left.cancel()  # its asker is gone
        world.dispatch.interrupt(KILLED)
        waiting = world.dispatch.reset_prefix_cache()
        await asyncio.sleep(0)
        world.dispatch.deliver(ResetPrefixCache(0, 1))
        assert not reset.done()
        assert world.requests.any_submitted(), "the next scheduler is watched"
        world.resume()
        *resets, submit = world.generation.sent
        assert resets == [ResetPrefixCache(1, 0), ResetPrefixCache(1, 2)]
        assert submit.request == request.number
        for message in resets:
            world.dispatch.deliver(message)
        await asyncio.gather(reset, waiting)
        late = world.dispatch.reset_prefix_cache()
        world.dispatch.abandon(lambda: RequestFailed("over"))
        with pytest.raises(RequestFailed, match="over"):
            await late
        await asyncio.sleep(0)
        assert world.requests.num_questions == 0

    asyncio.run(main())
