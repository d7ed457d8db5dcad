"""The choices of a request: as one consumer sees them, and through a runtime on real processes."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.test_requests import deliver_text, ids, step, with_text
from tests.runtime.test_runtime import MakeRuntime, collect, ids_only, rest_of, run, tokens_of
from tests.server.fake_runtime import byte_tokenizer
from tpworker import (
    InvalidRequest,
    QueueFull,
    RequestFailed,
    RequestOutput,
    Runtime,
    RuntimeFailed,
    RuntimeStopped,
    SamplingParams,
)
from tpworker.ipc.arrays import unpack_int32
from tpworker.ipc.messages import Abort, Failed, Submit
from tpworker.runtime.bell import Bell
from tpworker.runtime.choices import Choices
from tpworker.runtime.logprobs import LogprobRecord
from tpworker.runtime.requests import Requests
from tpworker.sampling_params import choice_seed

pytestmark = pytest.mark.usefixtures("nothing_left")


def open_choices(requests: Requests, request_id: str = "a", count: int = 1) -> Choices:
    bell = Bell()
    first = requests.open(request_id, bell=bell)
    return Choices([first, *(requests.open(request_id, first, i, bell) for i in range(1, count))], bell)


def by_index(outputs: list[RequestOutput]) -> dict[int, list[RequestOutput]]:
    found: dict[int, list[RequestOutput]] = defaultdict(list)
    for output in outputs:
        found[output.index].append(output)
    return dict(found)


# --------------------------------------------------------------------------------- their consumer


def test_a_consumer_is_woken_once_a_step_and_only_if_it_waits() -> None:
    async def main() -> list[tuple[int, ...]]:
        requests = Requests()
        choices = open_choices(requests)
        (a,) = choices.requests
        taken: list[tuple[int, ...]] = []

        async def consume() -> None:
            while not taken or taken[-1][-1] != 99:
                taken.append((await choices.take())[1].token_ids)

        consumer = asyncio.ensure_future(consume())
        await asyncio.sleep(0)
        requests.deliver(step((a, 0, 1)))
        requests.deliver(step((a, 1, 2)))  # before the consumer had a turn
        await asyncio.sleep(0)
        requests.deliver(step((a, 2, 99)))
        await consumer
        return taken

    assert asyncio.run(main()) == [(1, 2), (99,)]


def test_a_consumer_that_gave_up_waiting_does_not_disturb() -> None:
    async def main() -> tuple[int, ...]:
        requests = Requests()
        choices = open_choices(requests)
        waiting = asyncio.ensure_future(choices.take())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
        requests.deliver(step((choices.requests[0], 0, 1)))
        return (await choices.take())[1].token_ids

    assert asyncio.run(main()) == (1,)


def test_a_failure_comes_after_the_tokens_that_had_arrived() -> None:
    async def main() -> None:
        requests = Requests()
        a, b = open_choices(requests, "a", 3), open_choices(requests, "b")
        requests.deliver(step((a.requests[2], 0, 1), (a.requests[0], 0, 2), finished=[(1, "stop")]))
        waiting = asyncio.ensure_future(b.take())
        await asyncio.sleep(0)
        requests.fail_all(lambda: RuntimeFailed("rank 1 died"))
        got = {request.index: output.token_ids for request, output in [await a.take(), await a.take()]}
        assert got == {0: (2,), 2: (1,)}
        errors = []
        for consumer in (a.take(), waiting):
            with pytest.raises(RuntimeFailed, match="rank 1 died") as caught:
                await consumer
            errors.append(caught.value)
        assert errors[0] is not errors[1]  # each has a traceback of its own
        assert requests.num_waiting + requests.num_running == 0

    asyncio.run(main())


def test_nobody_waits_for_another_and_what_comes_late_comes_together() -> None:
    async def main() -> None:
        requests = Requests()
        choices = open_choices(requests, count=3)
        first, second, third = choices.requests
        requests.deliver(step((first, 0, 10), (third, 0, 30), started=[(first, 16), (third, 99)]))
        taken = [await choices.take()]
        requests.deliver(step((first, 1, 11), (second, 0, 20), finished=[(1, "length")]))
        requests.deliver(step((first, 2, 12), (third, 1, 31), finished=[(0, "stop")]))
        taken += [await choices.take() for _ in range(3)]
        assert choices.unended == [third]
        requests.deliver(step((third, 2, 32), finished=[(0, "length")]))
        taken.append(await choices.take())
        assert [(output.index, output.token_ids, output.finish_reason) for _, output in taken] == [
            (0, (10,), None), (2, (30, 31), None), (0, (11, 12), "stop"), (1, (20,), "length"),
            (2, (32,), "length"),
        ]  # fmt: skip
        assert {output.num_cached_tokens for _, output in taken} == {16}, "the first one's is everybody's"
        assert choices.unended == []

    asyncio.run(main())


def test_what_tells_of_the_prompt_comes_first() -> None:
    async def main() -> None:
        requests = Requests()
        choices = open_choices(requests, count=2)
        first, second = choices.requests
        first.logprobs = LogprobRecord(None, 0, [7])  # one token: nothing stands before it
        requests.deliver(step((second, 0, 20), started=[(second, 0)]))
        taking = asyncio.create_task(choices.take())
        await asyncio.sleep(0)
        assert not taking.done()
        requests.deliver(step((first, 0, 10), started=[(first, 0)]))
        taken = [await taking, await choices.take()]
        assert [(output.index, output.prompt_logprobs) for _, output in taken] == [(0, (None,)), (1, None)]

    asyncio.run(main())


def test_a_stop_string_ends_its_choice_alone() -> None:
    async def main() -> None:
        requests = Requests()
        choices = open_choices(requests, count=2)
        for request in choices.requests:
            with_text(request, "END")
        first, second = choices.requests
        deliver_text(requests, first, "some END and")
        deliver_text(requests, second, "other")
        _, output = await choices.take()
        assert (output.index, output.text, output.finish_reason) == (0, "some ", "stop")
        assert choices.unended == [second]
        requests.deliver(step((first, 12, ids("x")[0]), (second, 5, ids("s")[0]), finished=[(1, "length")]))
        _, output = await choices.take()
        assert (output.index, output.text, output.finish_reason) == (1, "others", "length")

    asyncio.run(main())


# ---------------------------------------------------------------------------------- the runtime


def test_all_choices_come_and_each_has_an_end(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            outputs = []
            async for output in runtime.generate([5, 6, 7], ids_only(8, n=3), request_id="mine"):
                outputs.append(output)
                assert runtime.stats().open == 3 - sum(o.finish_reason is not None for o in outputs)
            found = by_index(outputs)
            assert sorted(found) == [0, 1, 2]
            for of_choice in found.values():
                assert tokens_of(of_choice) == [5, 6, 7, 5, 6, 7, 5, 6]
                assert [output.num_output_tokens for output in of_choice][-1] == 8
                ends = [output.finish_reason for output in of_choice]
                assert ends == [None] * (len(ends) - 1) + ["length"]
                assert {(o.request_id, o.num_prompt_tokens) for o in of_choice} == {("mine", 3)}
            stats = runtime.stats()
            assert (stats.open, stats.running, stats.waiting) == (0, 0, 0)
            assert (stats.finished, stats.aborted, stats.output_tokens) == (3, 0, 24)

    run(main)


def test_a_slow_consumer_gets_everything_of_every_choice(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            async with aclosing(runtime.generate([5, 6], ids_only(200, n=3))) as outputs:
                slow = [await anext(outputs)]
                await collect(runtime, [7], ids_only(300))  # which takes longer than the others' rest
                slow += await rest_of(outputs)
            assert all(tokens_of(of_choice) == [5, 6] * 100 for of_choice in by_index(slow).values())
            assert len(slow) < 12

    run(main)


def test_text_and_stop_strings_of_every_choice(fake_runtime: MakeRuntime, model_folder: Path) -> None:
    byte_tokenizer()._backend.save(str(model_folder / "tokenizer.json"))

    async def main() -> None:
        async with fake_runtime() as runtime:
            outputs = await collect(runtime, "grüße! ", SamplingParams(max_tokens=100, stop=["e! gr"], n=4))
            found = by_index(outputs)
            assert ["".join(o.text for o in found[i]) for i in range(4)] == ["grüß"] * 4
            assert {found[i][-1].stop_reason for i in range(4)} == {"e! gr"}
            assert (runtime.stats().open, runtime.stats().finished) == (0, 4)
            await collect(runtime, [6], ids_only(3))
            assert runtime.stats().recent_steps[-1].num_decodes == 1  # the scheduler has heard of all ends

    run(main)


def sent_by(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What goes to the scheduler from now on."""
    assert runtime._processes is not None
    generation = runtime._processes.generation
    sent: list[Any] = []
    send: Callable[[Any], None] = generation.send
    monkeypatch.setattr(generation, "send", lambda message: (sent.append(message), send(message)))
    return sent


def test_each_choice_is_a_request_that_could_come_back_on_its_own(
    fake_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with fake_runtime(scheduling_policy="priority") as runtime:
            sent = sent_by(runtime, monkeypatch)
            params = ids_only(4, n=3, seed=7, priority=-5, cache_salt="salt")
            await collect(runtime, [5, 6], params)
            await collect(runtime, [5, 6], params.of_choice(2))
            await collect(runtime, [5, 6], ids_only(4, n=2))
            submits = [message for message in sent if isinstance(message, Submit)]
            numbers = [submit.request for submit in submits]
            assert len(set(numbers)) == 6
            assert [submit.group for submit in submits] == [
                numbers[0], numbers[0], numbers[0], None, numbers[4], numbers[4],
            ]  # fmt: skip
            assert [submit.sampling.seed for submit in submits[:4]] == [
                7, choice_seed(7, 1), choice_seed(7, 2), choice_seed(7, 2),
            ]  # fmt: skip
            drawn = [submit.sampling.seed for submit in submits[4:]]
            assert drawn[1] == choice_seed(drawn[0], 1)
            assert {(s.priority, s.salt) for s in submits} == {(-5, "salt"), (0, "")}
            assert all(list(unpack_int32(submit.tokens)) == [5, 6] for submit in submits)
            assert all(submit.num_delivered == 0 for submit in submits)

    run(main)


def test_abort_ends_every_choice(fake_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with fake_runtime(max_num_seqs=2, max_num_batched_tokens=2) as runtime:
            sent = sent_by(runtime, monkeypatch)
            outputs = []
            async for output in runtime.generate([5], ids_only(n=3), request_id="a"):
                if not outputs:
                    runtime.abort("a")
                outputs.append(output)
            found = by_index(outputs)  # one of them has waited all the time
            assert {found[i][-1].finish_reason for i in range(3)} == {"abort"}
            assert runtime.stats().aborted == 3
            assert sum(isinstance(message, Abort) for message in sent) == 3

    run(main)


def test_a_consumer_that_goes_away_aborts_those_that_have_not_ended(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime(max_num_seqs=1, max_num_batched_tokens=1) as runtime:
            async with aclosing(runtime.generate([5], ids_only(50, n=3))) as outputs:
                async for output in outputs:
                    if output.finish_reason is not None:
                        break
            stats = runtime.stats()
            assert (stats.open, stats.waiting, stats.finished, stats.aborted) == (0, 0, 1, 2)

    run(main)


def test_each_choice_takes_a_place_in_the_queue(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime(max_num_seqs=2, max_num_batched_tokens=2, max_queue=3) as runtime:
            async with aclosing(runtime.generate([5], ids_only(400, n=4))) as outputs:
                await anext(outputs)
                while runtime.stats().running < 2:
                    await anext(outputs)
                assert (runtime.stats().open, runtime.stats().waiting) == (4, 2)
                with pytest.raises(QueueFull, match="2 requests wait already, and this is 2 more"):
                    await collect(runtime, [5], ids_only(1, n=2))
            assert len(by_index(await collect(runtime, [5], ids_only(1, n=5)))) == 5
            with pytest.raises(InvalidRequest, match=r"6 choices are more than the 5 that can") as caught:
                await collect(runtime, [5], ids_only(1, n=6))
            assert caught.value.parameter == "n"

    run(main)


def test_drain_waits_for_every_choice_and_for_those_that_were_promised(fake_runtime: MakeRuntime) -> None:
    hold = threading.Event()

    def work() -> list[int]:
        hold.wait(20)
        return [6]

    async def main() -> None:
        async with fake_runtime(max_num_seqs=1, max_num_batched_tokens=1) as runtime:
            task = asyncio.ensure_future(collect(runtime, [5], ids_only(40, n=3)))
            preparing = asyncio.ensure_future(runtime.prepare(work, 2))
            while not runtime.stats().steps:
                await asyncio.sleep(0.001)
            draining = asyncio.ensure_future(runtime.drain(30))
            await asyncio.sleep(0)
            hold.set()
            prompt = await preparing
            with pytest.raises(RuntimeStopped):
                await collect(runtime, prompt, ids_only(1, n=3))  # more than were promised
            assert len(by_index(await collect(runtime, prompt, ids_only(1, n=2)))) == 2
            with pytest.raises(RuntimeStopped):
                await collect(runtime, prompt, ids_only(1))
            await draining
            assert task.done()
            assert len(tokens_of(await task)) == 120

    run(main)


def test_a_priority_where_nobody_looks_at_it_is_refused(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            words = (
                r"priority=-3: .*scheduling_policy=fcfs.*leave it out, or start with --scheduling-policy p"
            )
            with pytest.raises(InvalidRequest, match=words) as caught:
                await collect(runtime, [5], ids_only(1, priority=-3))
            assert caught.value.parameter == "priority"
            assert runtime.stats().open == 0

    run(main)


def test_a_request_that_cannot_go_on_fails_alone() -> None:
    async def main() -> None:
        requests = Requests()
        a, b = open_choices(requests, "a", 2), open_choices(requests, "b")
        requests.deliver(step((a.requests[1], 0, 7)))
        requests.fail(Failed(0, a.requests[1].number, "its grammar is too complex"))
        requests.fail(Failed(0, 10_000, "nobody knows of it"))
        assert (await a.take())[1].token_ids == (7,)
        with pytest.raises(RequestFailed, match="request 'a' failed: its grammar is too complex"):
            await a.take()
        assert a.requests[1] not in requests
        requests.deliver(step((b.requests[0], 0, 3), (a.requests[1], 1, 4), finished=[(0, "stop")]))
        assert (await b.take())[1].token_ids == (3,)

    asyncio.run(main())
