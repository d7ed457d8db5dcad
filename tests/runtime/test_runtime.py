"""The runtime on real processes: a scheduler that echoes the prompt, and ranks that wait."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest

from tests.children import odd_scheduler
from tests.conftest import eventually, is_gone
from tests.server.fake_runtime import byte_tokenizer
from tpworker import (
    ConfigError,
    InvalidRequest,
    ModelError,
    PromptTooLong,
    QueueFull,
    RequestOutput,
    Runtime,
    RuntimeConfig,
    RuntimeFailed,
    RuntimeStopped,
    SamplingParams,
)
from tpworker.chat import renderer
from tpworker.ipc.messages import Abort
from tpworker.runtime.tokenisers import NUM_LONG, SHORT_CHARS

pytestmark = pytest.mark.usefixtures("nothing_left")

MakeRuntime = Callable[..., Runtime]
T = TypeVar("T")


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return asyncio.run(asyncio.wait_for(main(), 60))


def ids_only(max_tokens: int | None = None, **params: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, detokenize=False, **params)


async def collect(
    runtime: Runtime, prompt: Any, params: SamplingParams, **options: Any
) -> list[RequestOutput]:
    return [output async for output in runtime.generate(prompt, params, **options)]


async def rest_of(outputs: AsyncGenerator[RequestOutput, None]) -> list[RequestOutput]:
    return [output async for output in outputs]


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def children(name: str) -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if name in child.name()]


# ------------------------------------------------------------------------------------ generating


def test_tokens_come_as_they_are_made_and_the_last_output_says_why_it_ended(
    fake_runtime: MakeRuntime,
) -> None:
    async def main() -> None:
        async with fake_runtime(tensor_parallel_size=2) as runtime:
            assert runtime.health().state == "ready"
            outputs = await collect(runtime, [5, 6, 7], ids_only(8), request_id="mine")
            assert tokens_of(outputs) == [5, 6, 7, 5, 6, 7, 5, 6]
            assert [output.finish_reason for output in outputs][:-1] == [None] * (len(outputs) - 1)
            last = outputs[-1]
            assert (last.finish_reason, last.num_prompt_tokens, last.num_output_tokens) == ("length", 3, 8)
            assert {output.request_id for output in outputs} == {"mine"}
        assert runtime.health().state == "stopped"

    run(main)


def test_many_requests_at_once_each_get_their_own(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime(max_num_seqs=8) as runtime:
            prompts = [[10 + i, 20 + i, 30 + i] for i in range(30)]
            all_outputs = await asyncio.gather(*(collect(runtime, p, ids_only(9)) for p in prompts))
            for prompt, outputs in zip(prompts, all_outputs, strict=True):
                assert tokens_of(outputs) == prompt * 3
            stats = runtime.stats()
            assert (stats.open, stats.running, stats.waiting) == (0, 0, 0)
            assert (stats.finished, stats.aborted, stats.output_tokens) == (30, 0, 270)
            assert stats.total_blocks == 128
            assert stats.steps == len(stats.recent_steps) >= 9
            assert [record.step for record in stats.recent_steps] == list(range(stats.steps))

    run(main)


def test_no_message_is_overlooked_while_we_send(fake_runtime: MakeRuntime) -> None:
    """ZeroMQ's descriptor is signalled by edge: what comes while we send must be looked for."""

    async def main() -> None:
        async with fake_runtime() as runtime:
            assert runtime._processes is not None
            task = asyncio.ensure_future(collect(runtime, [5], ids_only(1)))
            await asyncio.sleep(0)  # it is submitted
            time.sleep(0.2)  # the answer has come, and the event loop has not seen it
            runtime._processes.generation.send(Abort(0, 999))
            await asyncio.wait_for(task, 20)

    run(main)


def test_a_token_that_is_sent_twice_is_delivered_once(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime(scheduler_module="tests.children.repeating_scheduler") as runtime:
            both = await asyncio.gather(*(collect(runtime, [5 + i, 6], ids_only(20)) for i in range(2)))
            assert [tokens_of(outputs) for outputs in both] == [[5, 6] * 10, [6, 6] * 10]

    run(main)


def test_a_slow_consumer_gets_everything_in_few_outputs(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime, aclosing(runtime.generate([5, 6], ids_only(200))) as outputs:
            slow = [await anext(outputs)]
            await collect(runtime, [7], ids_only(300))  # which takes longer than the other's rest
            slow += [output async for output in outputs]
            assert tokens_of(slow) == [5, 6] * 100
            assert len(slow) < 5

    run(main)


def test_text_goes_in_and_comes_out(fake_runtime: MakeRuntime, model_folder: Path) -> None:
    byte_tokenizer()._backend.save(str(model_folder / "tokenizer.json"))

    async def main() -> None:
        async with fake_runtime() as runtime:
            outputs = await collect(runtime, "grüße! ", SamplingParams(max_tokens=18))
            assert "".join(output.text for output in outputs) == "grüße! grüße! "
            outputs = await collect(runtime, "grüße! ", SamplingParams(max_tokens=100, stop=["e! gr"]))
            assert "".join(output.text for output in outputs) == "grüß"
            assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "e! gr")
            params = SamplingParams(max_tokens=100, stop=["e! gr"], include_stop_str_in_output=True)
            outputs = await collect(runtime, "grüße! ", params)
            assert "".join(output.text for output in outputs) == "grüße! gr"
            eventually(lambda: runtime.stats().running == 0)

    run(main)


def test_stop_strings_name_special_tokens_and_wait_for_min_tokens(
    fake_runtime: MakeRuntime, model_folder: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer._backend.save(str(model_folder / "tokenizer.json"))
    prompt = [*tokenizer.encode("abc"), tokenizer.special["<end>"]]

    async def main() -> None:
        async with fake_runtime() as runtime:
            for min_tokens, expected in ((0, ("abc", 4)), (4, ("abcabc", 8))):
                for stop in (["<end>"], [*(f"no{i}" for i in range(15)), "<end>"]):  # as many as there may be
                    params = SamplingParams(
                        max_tokens=20, stop=stop, min_tokens=min_tokens, stop_token_ids=range(100, 115)
                    )
                    outputs = await collect(runtime, prompt, params)
                    text = "".join(output.text for output in outputs)
                    assert (text, outputs[-1].num_output_tokens) == expected
                    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "<end>")
            outputs = await collect(runtime, prompt, SamplingParams(max_tokens=9, stop=["b"], min_tokens=4))
            assert ("".join(output.text for output in outputs), outputs[-1].num_output_tokens) == ("abca", 6)

    run(main)


@pytest.mark.parametrize(
    ("skip_special_tokens", "include_stop", "text"),
    [(True, False, "ab"), (False, False, "<end>ab"), (True, True, "abc"), (False, True, "<end>abc")],
)
def test_special_tokens_and_the_token_that_ends_it_may_be_text(
    fake_runtime: MakeRuntime, model_folder: Path, skip_special_tokens: bool, include_stop: bool, text: str
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer._backend.save(str(model_folder / "tokenizer.json"))
    prompt = [tokenizer.special["<end>"], *tokenizer.encode("abc")]  # and so its echo
    params = SamplingParams(
        max_tokens=20,
        ignore_eos=True,
        stop_token_ids=tokenizer.encode("c"),
        skip_special_tokens=skip_special_tokens,
        include_stop_str_in_output=include_stop,
    )

    async def main() -> None:
        async with fake_runtime() as runtime:
            outputs = await collect(runtime, prompt, params)
            assert "".join(output.text for output in outputs) == text

    run(main)


@pytest.mark.parametrize("name", ["skip_special_tokens", "include_stop_str_in_output"])
def test_what_is_about_text_needs_text(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}=.*: must be left out when detokenize is false"):
        ids_only(**{name: name != "skip_special_tokens"})
    with pytest.raises(InvalidRequest, match=f"{name}='yes': must be true or false"):
        SamplingParams(**{name: "yes"})  # type: ignore[arg-type]


def test_stopping_ends_a_chat_template_that_does_not(
    fake_runtime: MakeRuntime, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renderer, "MAX_SECONDS", 600.0)
    byte_tokenizer()._backend.save(str(model_folder / "tokenizer.json"))
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (model_folder / "chat_template.jinja").write_text(loop)

    async def main() -> None:
        async with fake_runtime() as runtime:
            message = {"role": "user", "content": "Hi"}
            rendering = [
                asyncio.ensure_future(
                    runtime.prepare(lambda: runtime.tokenizer.apply_chat_template([message]))
                )
                for _ in range(4)  # in every thread
            ]
            await asyncio.to_thread(
                eventually, lambda: any(c.cpu_times().user > 0.3 for c in children("tpworker-template"))
            )
        for failed in await asyncio.gather(*rendering, return_exceptions=True):
            assert isinstance(failed, RuntimeStopped)

    run(main)


def test_stop_tokens_end_it(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            outputs = await collect(runtime, [5, 6, 2], ids_only(9))  # 2 is the model's own
            assert (tokens_of(outputs), outputs[-1].finish_reason) == ([5, 6, 2], "stop")
            assert outputs[-1].stop_reason is None
            outputs = await collect(runtime, [5, 6, 2], ids_only(9, ignore_eos=True, stop_token_ids=[6]))
            assert (tokens_of(outputs), outputs[-1].stop_reason) == ([5, 6], 6)

    run(main)


def test_without_max_tokens_it_goes_on_as_long_as_fits(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime(max_model_len=50) as runtime:
            assert runtime.max_model_len == 50
            assert len(tokens_of(await collect(runtime, [5] * 40, ids_only()))) == 10
        async with fake_runtime(num_kv_blocks=4, block_size=16) as runtime:
            assert len(tokens_of(await collect(runtime, [5] * 40, ids_only()))) == 8  # 3 blocks: one is null

    run(main)


def test_a_default_of_max_tokens_is_no_demand(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime(max_model_len=50) as runtime:

            async def count(num_prompt: int, params: SamplingParams) -> int:
                outputs = await collect(runtime, [5] * num_prompt, params, default_max_tokens=16)
                return len(tokens_of(outputs))

            assert await count(10, ids_only()) == 16
            assert await count(45, ids_only()) == 5
            assert await count(10, ids_only(min_tokens=20)) == 20
            assert await count(10, ids_only(30)) == 30
            with pytest.raises(InvalidRequest, match="min_tokens=20: only 5"):
                await count(45, ids_only(min_tokens=20))
            outputs = await collect(runtime, [5], ids_only(), default_max_tokens=np.int64(3))
            assert len(tokens_of(outputs)) == 3
            for name, wrong in (("default_max_tokens", 0), ("default_max_tokens", 1.5), ("request_id", 5)):
                with pytest.raises(InvalidRequest, match=f"{name}={wrong}: must be"):
                    await collect(runtime, [5], ids_only(), **{name: wrong})
            assert runtime.stats().open == 0

    run(main)


def test_what_clients_call_the_model(
    fake_runtime: MakeRuntime, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def name(model: Path | str) -> str:
        async with fake_runtime(model=model) as runtime:
            return runtime.served_name

    assert run(lambda: name(model_folder)) == "model"
    monkeypatch.chdir(model_folder)
    assert run(lambda: name(".")) == run(lambda: name("../model/")) == "model"
    monkeypatch.setattr("tpworker.checkpoint.resolve._from_hub", lambda *_: model_folder)
    assert run(lambda: name("org/name-1B")) == "org/name-1B"


# ------------------------------------------------------------------------------------- refusing


def test_what_cannot_be_is_refused_and_the_rest_goes_on(
    fake_runtime: MakeRuntime, model_folder: Path
) -> None:
    async def main() -> None:
        async with fake_runtime(max_model_len=50) as runtime:
            for prompt, params, error in (
                ([], ids_only(1), InvalidRequest),
                ([1000], ids_only(1), InvalidRequest),
                (b"bytes", ids_only(1), InvalidRequest),
                ([5] * 50, ids_only(), PromptTooLong),
                ([5] * 40, ids_only(11), PromptTooLong),
                ([5], ids_only(1, stop_token_ids=[1000]), InvalidRequest),
                ("text", ids_only(1), InvalidRequest),  # the model has no tokenizer
                ([5], SamplingParams(max_tokens=1), InvalidRequest),  # neither for the output
            ):
                with pytest.raises(error):
                    await collect(runtime, prompt, params)
            assert runtime.stats().open == runtime.stats().waiting == 0
            assert tokens_of(await collect(runtime, [5], ids_only(2))) == [5, 5]
            assert runtime.stats().steps == 2  # none of the others got as far as the scheduler

    run(main)


def test_half_a_surrogate_pair_is_refused(fake_runtime: MakeRuntime, model_folder: Path) -> None:
    byte_tokenizer()._backend.save(str(model_folder / "tokenizer.json"))

    async def main() -> None:
        async with fake_runtime() as runtime:
            with pytest.raises(InvalidRequest, match="surrogate"):
                await collect(runtime, "\ud800", SamplingParams())

    run(main)


def test_an_id_that_is_open_is_refused(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with (
            fake_runtime() as runtime,
            aclosing(runtime.generate([5], ids_only(400), request_id="a")) as a,
        ):
            await anext(a)
            with pytest.raises(InvalidRequest, match="'a' is that of another"):
                await collect(runtime, [5], ids_only(1), request_id="a")
            await a.aclose()
            assert await collect(runtime, [5], ids_only(1), request_id="a")

    run(main)


def test_one_more_than_max_queue_is_refused_at_once(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime(max_num_seqs=2, max_num_batched_tokens=2, max_queue=3) as runtime:
            requests = [runtime.generate([5], ids_only(400), request_id=str(i)) for i in range(5)]
            tasks = [asyncio.ensure_future(anext(request)) for request in requests]
            await asyncio.wait(tasks[:2])
            assert (runtime.stats().running, runtime.stats().waiting) == (2, 3)
            with pytest.raises(QueueFull, match="3 requests wait already; max_queue is 3"):
                await collect(runtime, [5], ids_only(1))
            await requests[0].aclose()  # one moves up
            await asyncio.wait(tasks[:3])
            assert await collect(runtime, [5], ids_only(1))
            for task in tasks:
                task.cancel()

    run(main)


def test_what_is_prepared_counts_as_waiting(fake_runtime: MakeRuntime) -> None:
    hold = threading.Event()

    def work() -> str:
        hold.wait(20)
        return threading.current_thread().name

    async def main() -> None:
        async with fake_runtime(max_num_seqs=2, max_num_batched_tokens=2, max_queue=1) as runtime:
            two = asyncio.ensure_future(runtime.prepare(work, 2))
            one = asyncio.ensure_future(runtime.prepare(work))
            await asyncio.sleep(0)
            assert (runtime.stats().open, runtime.stats().waiting) == (3, 3)
            with pytest.raises(QueueFull, match="3 requests wait already; max_queue is 1"):
                await runtime.prepare(lambda: pytest.fail("done without room"))
            with pytest.raises(QueueFull):
                await collect(runtime, [5], ids_only(1))
            hold.set()
            assert {(await one)[:-1], (await two)[:-1]} == {"tpworker-tokenise_"}
            with pytest.raises(ZeroDivisionError):
                await runtime.prepare(lambda: 1 / 0, 3)
            assert runtime.stats().waiting == 0
            with pytest.raises(InvalidRequest, match=r"4 prompts are more than the 3 .* max_queue=1"):
                await runtime.prepare(work, 4)
        with pytest.raises(RuntimeStopped):
            await runtime.prepare(work)

    run(main)


def test_what_is_too_long_for_certain_is_not_tokenised(
    fake_runtime: MakeRuntime, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_tokenizer()._backend.save(str(model_folder / "tokenizer.json"))

    async def main() -> None:
        async with fake_runtime() as runtime:
            monkeypatch.setattr(runtime.tokenizer, "encode", lambda *_: pytest.fail("it was tokenised"))
            text = "7" * 1_000_000
            words = r"1000000 characters, which are \d+ tokens at least, but the model was made for"
            with pytest.raises(PromptTooLong, match=words) as caught:
                await collect(runtime, text, SamplingParams())
            assert caught.value.parameter == "prompt"
            with pytest.raises(PromptTooLong, match=words):
                await runtime.prepare(lambda: runtime.encode(text), num_chars=len(text))
            assert (runtime.stats().open, runtime.stats().waiting) == (0, 0)

    run(main)


def test_short_prompts_do_not_wait_for_long_ones(
    fake_runtime: MakeRuntime, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_tokenizer()._backend.save(str(model_folder / "tokenizer.json"))
    hold = threading.Event()
    busy: list[str] = []

    async def main() -> None:
        async with fake_runtime() as runtime:
            encode = runtime.tokenizer.encode

            def slow_if_long(text: str, add_special_tokens: bool = True) -> list[int]:
                if len(text) > SHORT_CHARS:
                    busy.append(threading.current_thread().name)
                    hold.wait(60)
                return encode(text, add_special_tokens)

            monkeypatch.setattr(runtime.tokenizer, "encode", slow_if_long)
            monkeypatch.setattr(runtime.tokenizer, "at_least", lambda *_: 0)  # as where nothing is proved
            text = "7" * (SHORT_CHARS + 1)
            long = [asyncio.ensure_future(collect(runtime, text, SamplingParams())) for _ in range(10)]
            work = partial(runtime.encode, text)
            long += [asyncio.ensure_future(runtime.prepare(work, num_chars=len(text))) for _ in range(10)]
            while len(busy) < NUM_LONG:
                await asyncio.sleep(0.01)
            for _ in range(20):
                outputs = await collect(runtime, "short", SamplingParams(max_tokens=5))
                assert "".join(output.text for output in outputs) == "short"
                assert await runtime.prepare(partial(runtime.encode, "a"), num_chars=1) == encode("a")
            assert len(busy) == NUM_LONG, "so many long ones are tokenised at once"
            long[5].cancel()
            hold.set()
            await asyncio.wait(long)
            assert len(busy) == len(long) - 1, "who leaves before its turn is not tokenised"

    run(main)


def test_requests_are_taken_only_while_it_is_ready(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        runtime = fake_runtime()
        with pytest.raises(RuntimeStopped, match="stopped"):
            await collect(runtime, [5], ids_only(1))
        with pytest.raises(RuntimeStopped, match="has not been started"):
            runtime.spec  # noqa: B018
        async with runtime:
            pass
        with pytest.raises(RuntimeStopped):
            await collect(runtime, [5], ids_only(1))
        with pytest.raises(RuntimeStopped, match="starts once"):
            await runtime.start()

    run(main)


# ------------------------------------------------------------------------- abort, drain and stop


def test_abort_ends_a_request_with_an_output_that_says_so(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            outputs = []
            async for output in runtime.generate([5], ids_only(), request_id="a"):
                outputs.append(output)
                runtime.abort("a")
                runtime.abort("unknown")
            assert outputs[-1].finish_reason == "abort"
            assert runtime.stats().aborted == 1
            await collect(runtime, [6], ids_only(3))
            assert runtime.stats().recent_steps[-1].num_decodes == 1  # the scheduler has heard of it

    run(main)


def test_abort_while_it_is_still_tokenised(
    fake_runtime: MakeRuntime, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_tokenizer()._backend.save(str(model_folder / "tokenizer.json"))

    async def main() -> None:
        async with fake_runtime() as runtime:
            hold = threading.Event()
            monkeypatch.setattr(runtime.tokenizer, "encode", lambda text: hold.wait(20) and [5])
            task = asyncio.ensure_future(collect(runtime, "x", SamplingParams(), request_id="a"))
            await asyncio.sleep(0)
            runtime.abort("a")
            hold.set()
            outputs = await task
            assert [output.finish_reason for output in outputs] == ["abort"]
            await collect(runtime, [6], ids_only(3))
            assert runtime.stats().recent_steps[-1].num_decodes == 1  # the scheduler never heard of it

    run(main)


@pytest.mark.parametrize("how", ["close", "cancel", "leave"])
def test_a_consumer_that_goes_away_aborts_its_request(fake_runtime: MakeRuntime, how: str) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            if how == "close":
                outputs = runtime.generate([5], ids_only())
                await anext(outputs)
                await outputs.aclose()
            elif how == "cancel":
                task = asyncio.ensure_future(collect(runtime, [5], ids_only()))
                while not runtime.stats().steps:
                    await asyncio.sleep(0.001)
                task.cancel()
                await asyncio.wait([task])
            else:
                async for _ in runtime.generate([5], ids_only()):
                    break
                while runtime.stats().open:  # until it is collected, and then closed
                    await asyncio.sleep(0.001)
            assert (runtime.stats().open, runtime.stats().running, runtime.stats().aborted) == (0, 0, 1)
            await collect(runtime, [6], ids_only(3))
            assert runtime.stats().recent_steps[-1].num_decodes == 1

    run(main)


def test_drain_refuses_new_requests_and_waits_for_open_ones(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            task = asyncio.ensure_future(collect(runtime, [5], ids_only(100)))
            while not runtime.stats().steps:
                await asyncio.sleep(0.001)
            draining = asyncio.ensure_future(runtime.drain(30))
            await asyncio.sleep(0)
            assert runtime.health().state == "draining"
            with pytest.raises(RuntimeStopped, match="draining"):
                await collect(runtime, [5], ids_only(1))
            await draining
            assert len(tokens_of(await task)) == 100
            await runtime.drain()  # nothing is open: at once

    run(main)


def test_drain_gives_up_when_told_to(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime, aclosing(runtime.generate([5], ids_only())) as outputs:
            await anext(outputs)
            with pytest.raises(TimeoutError, match=r"1 requests are still open after 0.05 s"):
                await runtime.drain(0.05)

    run(main)


def test_stop_ends_open_requests(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        runtime = fake_runtime()
        async with runtime:
            outputs = runtime.generate([5], ids_only())
            await anext(outputs)
        with pytest.raises(RuntimeStopped, match="was stopped"):
            await rest_of(outputs)
        await asyncio.gather(runtime.stop(), runtime.stop())

    run(main)


def test_leaving_by_an_exception_stops_it(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        with pytest.raises(KeyError):
            async with fake_runtime():
                raise KeyError("the user's own")

    run(main)


def test_stop_when_cancelled_kills(fake_runtime: MakeRuntime, model_folder: Path) -> None:
    (model_folder / "tpworker-rank0").write_text("time.sleep(1000)")  # it will not hear of Stop

    async def main() -> None:
        async with asyncio.timeout(0.3):
            async with fake_runtime():
                pass

    with pytest.raises(TimeoutError):
        run(main)


# ----------------------------------------------------------------------------------------- start


def test_a_model_that_is_none_is_refused_before_a_process_is_started(
    fake_runtime: MakeRuntime, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))

    async def start(**options: Any) -> None:
        await fake_runtime(**options).start()

    with pytest.raises(ModelError, match="neither a folder"):
        run(lambda: start(model=tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="max_model_len=513"):
        run(lambda: start(max_model_len=513))
    with pytest.raises(ModelError, match=r"there is no tokenizer in .*, and text needs one"):
        run(lambda: start(needs_tokenizer=True))
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=9 .*: use --device cpu"):
        run(lambda: start(device="cuda", tensor_parallel_size=9))
    (model_folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json"):
        run(start)


def test_a_start_that_failed_is_not_repeated(
    fake_runtime: MakeRuntime, model_folder: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        runtime = fake_runtime(model=tmp_path / "later")
        with pytest.raises(ModelError):
            await runtime.start()
        model_folder.rename(tmp_path / "later")
        stopped = fake_runtime(model=tmp_path / "later")
        await stopped.stop()
        for used in (runtime, stopped):
            with pytest.raises(RuntimeStopped, match="starts once"):
                await used.start()

    run(main)


def test_options_are_checked_when_it_is_made(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="lookahead=99"):
        Runtime(model_folder, lookahead=99)
    with pytest.raises(TypeError, match="lookahed"):
        Runtime(model_folder, lookahed=1)
    runtime = Runtime(model_folder, config=RuntimeConfig(lookahead=3, block_size=8), block_size=32)
    assert (runtime.config.lookahead, runtime.config.block_size) == (3, 32)
    assert runtime.config.model == str(model_folder)


def test_a_model_error_of_a_rank_is_raised_as_one(fake_runtime: MakeRuntime, model_folder: Path) -> None:
    (model_folder / "tpworker-rank1.early").write_text("fail(ModelError('model.safetensors is truncated'))")

    async def main() -> None:
        runtime = fake_runtime(tensor_parallel_size=2)
        with pytest.raises(ModelError, match=r"^model.safetensors is truncated$") as caught:
            await runtime.start()
        assert isinstance(caught.value.__cause__, RuntimeFailed)
        assert caught.value.__cause__.process == "tpworker-rank1"
        assert runtime.health().state == "stopped"

    run(main)


def test_another_error_of_a_rank_while_starting_is_a_failure(
    fake_runtime: MakeRuntime, model_folder: Path
) -> None:
    (model_folder / "tpworker-rank0.early").write_text("fail(KeyError('oh'))")

    async def main() -> None:
        with pytest.raises(RuntimeFailed, match="tpworker-rank0 raised KeyError") as caught:
            await fake_runtime().start()
        assert caught.value.traceback is not None
        assert "idle_rank.py" in caught.value.traceback

    run(main)


def test_a_broken_tokenizer_is_a_model_error(fake_runtime: MakeRuntime, model_folder: Path) -> None:
    (model_folder / "tokenizer.json").write_text("{}")

    async def main() -> None:
        with pytest.raises(ModelError, match="tokenizer"):
            await fake_runtime().start()

    run(main)


def test_a_rank_that_never_gets_ready_is_named(
    fake_runtime: MakeRuntime, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpworker.runtime.generation.START_MARGIN_SECONDS", -19.0)
    (model_folder / "tpworker-rank1.early").write_text("time.sleep(1000)")

    async def main() -> None:
        with pytest.raises(RuntimeFailed, match="tpworker-rank1 is not ready after 20 s") as caught:
            await fake_runtime(tensor_parallel_size=2, start_timeout=20).start()
        assert caught.value.traceback is not None
        assert "Stacks of tpworker-rank1" in caught.value.traceback

    run(main)


def test_a_scheduler_that_is_ready_and_does_not_say_so_is_named(
    fake_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its messages do not come through: it may not be said that somebody is not ready who is."""
    monkeypatch.setattr("tpworker.runtime.generation.START_MARGIN_SECONDS", -15.0)

    async def main() -> None:
        runtime = fake_runtime(start_timeout=20, scheduler_module="tests.children.mute_scheduler")
        with pytest.raises(RuntimeFailed) as caught:
            await runtime.start()
        assert caught.value.process == "tpworker-scheduler"
        assert "has not been heard within 20 s (--start-timeout), though all" in caught.value.summary

    run(main)


@pytest.mark.parametrize("how", ["cancel", "stop"])
def test_a_start_can_be_called_off(fake_runtime: MakeRuntime, model_folder: Path, how: str) -> None:
    (model_folder / "tpworker-rank0.early").write_text("time.sleep(1000)")

    async def main() -> None:
        runtime = fake_runtime()
        task = asyncio.ensure_future(runtime.start())
        while len(children("")) < 2:
            await asyncio.sleep(0.01)
        if how == "cancel":
            task.cancel()
        else:
            await runtime.stop()
        with pytest.raises((asyncio.CancelledError, RuntimeStopped)) as caught:
            await task
        assert caught.type is (asyncio.CancelledError if how == "cancel" else RuntimeStopped)
        assert not children("")

    run(main)


def test_a_start_can_be_called_off_before_there_are_processes(
    fake_runtime: MakeRuntime, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = threading.Event()
    monkeypatch.setattr(
        "tpworker.checkpoint.resolve.resolve_model", lambda *_, **__: hold.wait(20) and model_folder
    )
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))

    async def main() -> None:
        runtime = fake_runtime()
        task = asyncio.ensure_future(runtime.start())
        await asyncio.sleep(0.1)
        await runtime.stop()
        hold.set()
        with pytest.raises(RuntimeStopped, match="while it started"):
            await task

    run(main)


def test_a_download_that_was_called_off_does_not_keep_the_process(model_folder: Path) -> None:
    program = """
import asyncio, time
from tpworker import Runtime
from tpworker.checkpoint import resolve
resolve.resolve_model = lambda *_, **__: time.sleep(1000)
async def main():
    async with asyncio.timeout(0.1):
        await Runtime().start()
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, timeout=60)
    assert b"TimeoutError" in done.stderr


def test_progress_is_told_of(fake_runtime: MakeRuntime, model_folder: Path) -> None:
    (model_folder / "tpworker-rank0.early").write_text(
        "row.__setitem__(Field.PROGRESS_DONE, 3) or row.__setitem__(Field.PROGRESS_TOTAL, 4) or time.sleep(1)"
    )
    told: list[tuple[str, float | None]] = []

    async def main() -> None:
        async with fake_runtime(progress=lambda *what: told.append(what)):
            pass

    run(main)
    assert told[0] == ("starting processes", None)
    assert ("loading the model", 0.75) in told


# ---------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("name", ["tpworker-scheduler", "tpworker-rank0", "tpworker-rank1"])
def test_open_requests_fail_when_a_process_dies(fake_runtime: MakeRuntime, name: str) -> None:
    async def main() -> None:
        async with fake_runtime(tensor_parallel_size=2, max_restarts=0) as runtime:
            requests = [runtime.generate([5], ids_only()) for _ in range(3)]
            for request in requests:
                await anext(request)
            next(child for child in children(name) if child.name() == name).send_signal(signal.SIGKILL)
            for request in requests:
                with pytest.raises(RuntimeFailed, match=f"{name} was killed by SIGKILL") as caught:
                    async for _ in request:
                        pass
                assert caught.value.process == name
            assert runtime.health().state == "failed"
            assert name in (runtime.health().error or "")
            with pytest.raises(RuntimeFailed, match=name):
                await collect(runtime, [5], ids_only(1))
            with pytest.raises(RuntimeFailed, match=name):
                await runtime.drain()
        assert runtime.health().state == "failed"  # which is more than 'stopped'

    run(main)


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (odd_scheduler.GAP, "sent what it must not: GapError: request 'a': the token at position 5"),
        (odd_scheduler.NONSENSE, "sent what it must not: MessageError: not for the runtime: RankReady"),
        (odd_scheduler.RAISE, "raised ValueError: the scheduler is at a loss"),
        (odd_scheduler.STOP, "hangs: there are requests, but its loop has not turned"),
        (odd_scheduler.HANG, "hangs: there are requests, but its loop has not turned"),
    ],
)
def test_a_scheduler_that_goes_astray_is_named(fake_runtime: MakeRuntime, token: int, words: str) -> None:
    async def main() -> None:
        options = {"scheduler_module": "tests.children.odd_scheduler", "step_timeout": 0.5}
        async with fake_runtime(**options, max_restarts=0) as runtime:
            with pytest.raises(RuntimeFailed) as caught:
                await collect(runtime, [token, 100], ids_only(), request_id="a")
            assert caught.value.process == "tpworker-scheduler"
            assert words in caught.value.summary
            if token == odd_scheduler.HANG:
                assert "odd_scheduler.py" in (caught.value.traceback or "")

    run(main)


def test_a_scheduler_that_works_is_not_taken_for_hung(
    fake_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpworker.runtime.generation.BEAT_SECONDS", 0.1)

    async def main() -> None:
        async with fake_runtime(step_timeout=0.1) as runtime:
            assert len(tokens_of(await collect(runtime, [5], ids_only(500)))) == 500
            await asyncio.sleep(0.3)  # nor one that has nothing to do
            assert runtime.health().state == "ready"

    run(main)


def test_a_scheduler_that_has_nothing_to_do_yet_is_not_taken_for_hung(
    fake_runtime: MakeRuntime, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_tokenizer()._backend.save(str(model_folder / "tokenizer.json"))
    monkeypatch.setattr("tpworker.runtime.generation.BEAT_SECONDS", 0.1)

    async def main() -> None:
        async with fake_runtime(step_timeout=0.1) as runtime:
            encode = runtime.tokenizer.encode

            def slow(text: str) -> list[int]:
                time.sleep(1)
                return encode(text)

            monkeypatch.setattr(runtime.tokenizer, "encode", slow)
            text = asyncio.ensure_future(collect(runtime, "text", ids_only(4)))
            await asyncio.sleep(0)
            await collect(runtime, [5], ids_only(1))  # which sets the watchdog off
            assert len(tokens_of(await text)) == 4

    run(main)


@pytest.mark.parametrize("kind", [TypeError, LookupError])
def test_an_error_of_any_kind_over_a_message_ends_the_runtime(
    fake_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def broken(*_: object) -> None:
        raise kind("out of the blue")

    async def main() -> None:
        async with fake_runtime(max_restarts=0) as runtime:
            monkeypatch.setattr(runtime._intake.requests, "deliver", broken)
            with pytest.raises(RuntimeFailed, match="out of the blue") as caught:
                await asyncio.wait_for(collect(runtime, [5], ids_only(3)), 10)
            assert "in broken" in (caught.value.traceback or "")

    run(main)


def test_the_processes_end_also_when_they_cannot_be_told(
    fake_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("the socket is gone")

    async def main() -> None:
        async with fake_runtime() as runtime:
            assert runtime._processes is not None
            monkeypatch.setattr(runtime._processes.generation._channel, "send", broken)
            await asyncio.wait_for(runtime.stop(), 10)
            assert not children("")

    run(main)


def test_all_ends_when_the_parent_is_killed(model_folder: Path) -> None:
    program = """
import asyncio, psutil, sys
from tpworker import Runtime
async def main():
    modules = dict(rank_module="tests.children.idle_rank", scheduler_module="tpworker.testing.fake_scheduler")
    async with Runtime(sys.argv[1], tensor_parallel_size=3, **modules):
        print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
        await asyncio.sleep(1000)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", program, str(model_folder)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 6  # and two standbys
    parent.kill()
    parent.wait()
    parent.stdout.close()
    eventually(lambda: all(is_gone(pid) for pid in pids))
    # Of a killed process the main thread is a zombie before its other threads have let go of the sockets.
    eventually(lambda: f"@tpworker-{parent.pid}-" not in Path("/proc/net/unix").read_text())


def test_a_runtime_that_is_never_stopped_does_not_keep_its_process(model_folder: Path) -> None:
    program = """
import asyncio, psutil, sys
from tpworker import Runtime
async def main():
    modules = dict(rank_module="tests.children.idle_rank", scheduler_module="tpworker.testing.fake_scheduler")
    await Runtime(sys.argv[1], **modules).start()
    print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
asyncio.run(main())
"""
    command = [sys.executable, "-c", program, str(model_folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=60, check=True)
    eventually(lambda: all(is_gone(int(pid)) for pid in done.stdout.split()))


# --------------------------------------------------------------------------------- where it lives


def test_two_runtimes_in_one_process(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as one, fake_runtime(tensor_parallel_size=2, max_restarts=0) as two:
            both = await asyncio.gather(collect(one, [5], ids_only(50)), collect(two, [6], ids_only(50)))
            assert [tokens_of(outputs) for outputs in both] == [[5] * 50, [6] * 50]
            for child in children("rank1"):  # the other one's
                child.kill()
            with pytest.raises(RuntimeFailed):
                await collect(two, [6], ids_only())
            assert tokens_of(await collect(one, [5], ids_only(3))) == [5] * 3

    run(main)


def test_on_the_event_loop_of_another_thread(fake_runtime: MakeRuntime) -> None:
    results: list[list[int]] = []

    async def main() -> None:
        async with fake_runtime() as runtime:
            results.append(tokens_of(await collect(runtime, [5, 6], ids_only(4))))

    thread = threading.Thread(target=run, args=(main,))
    thread.start()
    thread.join()
    assert results == [[5, 6, 5, 6]]


def test_it_leaves_signal_handlers_alone(fake_runtime: MakeRuntime) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]

    async def main() -> None:
        inside = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
        async with fake_runtime() as runtime:
            await collect(runtime, [5], ids_only(2))
            now = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
            assert now == inside

    run(main)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == before


def test_modules_of_the_users_with_our_names_do_not_matter(model_folder: Path, tmp_path: Path) -> None:
    for name in ("scheduler", "ipc", "messages", "child", "logging", "select"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('imported {name}.py of the user')")
    (tmp_path / "tpworker").mkdir()
    program = f"""
import sys
own = [path for path in sys.path if path not in ("", {str(tmp_path)!r})]
sys.path[:] = [{str(Path(__file__).parents[2])!r}, *own]
import asyncio
from tpworker import Runtime, SamplingParams
async def main():
    modules = dict(rank_module="tests.children.idle_rank", scheduler_module="tpworker.testing.fake_scheduler")
    async with Runtime(sys.argv[1], **modules) as runtime:
        async for output in runtime.generate([5], SamplingParams(max_tokens=3, detokenize=False)):
            pass
        print(output.num_output_tokens)
if __name__ == "__main__":
    sys.path.insert(0, "")  # now they would be found
    asyncio.run(main())
"""
    (tmp_path / "main.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": "::"}  # empty entries would mean the working folder
    done = subprocess.run(
        [sys.executable, "-P", "main.py", str(model_folder)], cwd=tmp_path, env=environment, timeout=60,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "3\n")


# --------------------------------------------------------------------------------- event loops


async def everything(runtime: Runtime) -> dict[str, str]:
    """What each coroutine, called here, says; '' for those that say nothing."""

    async def abort() -> None:
        runtime.abort("nobody")

    calls = {
        "generate": lambda: collect(runtime, [5], ids_only(3)),
        "prepare": lambda: runtime.prepare(lambda: 1),
        "abort": abort,
        "drain": lambda: runtime.drain(1.0),
        "reset_prefix_cache": runtime.reset_prefix_cache,
        "stop": runtime.stop,
    }
    said = {}
    for name, call in calls.items():
        try:
            await asyncio.wait_for(call(), 20)
            said[name] = ""
        except RuntimeStopped as error:
            said[name] = str(error)
    return said


def test_on_another_event_loop_it_says_so_at_once(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            said = await asyncio.to_thread(lambda: asyncio.run(everything(runtime)))
            for name, words in said.items():
                assert words.startswith("this runtime was started on another event loop"), (name, words)
                assert "SyncRuntime" in words
            with pytest.raises(RuntimeStopped, match="another event loop"):  # nor from no loop at all
                await asyncio.to_thread(runtime.abort, "nobody")
            assert tokens_of(await collect(runtime, [5], ids_only(3))) == [5, 5, 5], "it goes on where it is"

    run(main)


def test_a_request_goes_on_where_it_began_or_says_so(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            outputs = runtime.generate([5], ids_only())
            await anext(outputs)

            async def elsewhere() -> None:
                await asyncio.wait_for(rest_of(outputs), 20)

            with pytest.raises(RuntimeStopped, match="another event loop"):
                await asyncio.to_thread(lambda: asyncio.run(elsewhere()))
            while runtime.stats().running:  # it has been withdrawn, here
                await asyncio.sleep(0.01)
            assert runtime.stats().open == 0

    run(main)


def test_when_its_event_loop_has_been_closed_it_says_so_and_can_be_ended(fake_runtime: MakeRuntime) -> None:
    async def first() -> Runtime:
        runtime = fake_runtime()
        await runtime.start()
        await collect(runtime, [5], ids_only(3))
        return runtime

    runtime = asyncio.run(first())
    said = asyncio.run(everything(runtime))
    for name, words in said.items():
        assert words.startswith("the event loop that this runtime was started on has been closed"), name
        assert "within one asyncio.run" in words
    assert not children("")
    asyncio.run(runtime.stop())  # once more does no harm, here neither
    with pytest.raises(RuntimeStopped, match="it is stopped"):
        asyncio.run(collect(runtime, [5], ids_only(3)))


# ---------------------------------------------------------------------------- prompts under way


def test_drain_waits_for_what_is_being_prepared_and_lets_it_in(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            gate = threading.Event()
            preparing = asyncio.ensure_future(runtime.prepare(lambda: gate.wait(60), 2))
            await asyncio.sleep(0)
            draining = asyncio.ensure_future(runtime.drain())
            await asyncio.sleep(0.1)
            assert not draining.done()
            for call in (collect(runtime, [5], ids_only(3)), runtime.prepare(lambda: None)):
                with pytest.raises(RuntimeStopped, match="it is draining"):
                    await call
            gate.set()
            await preparing
            both = await asyncio.gather(*(collect(runtime, [5], ids_only(3)) for _ in range(2)))
            assert [tokens_of(outputs) for outputs in both] == [[5, 5, 5]] * 2
            with pytest.raises(RuntimeStopped, match="it is draining"):
                await collect(runtime, [5], ids_only(3))
            await asyncio.wait_for(draining, 20)

    run(main)


def test_drain_does_not_wait_for_ever_for_what_was_prepared_and_never_came(fake_runtime: MakeRuntime) -> None:
    async def main() -> None:
        async with fake_runtime() as runtime:
            preparing = asyncio.ensure_future(runtime.prepare(lambda: time.sleep(0.2)))
            await asyncio.sleep(0)
            await asyncio.wait_for(runtime.drain(), 20)
            assert preparing.done()
            with pytest.raises(RuntimeStopped, match="it is draining"):
                await collect(runtime, [5], ids_only(3))

    run(main)


def test_who_waits_for_a_prompt_to_be_tokenised_is_told_at_once(
    fake_runtime: MakeRuntime, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both that it was stopped and that it failed; the threads are done when they are done."""
    byte_tokenizer()._backend.save(str(model_folder / "tokenizer.json"))
    done = threading.Event()

    async def main(fails: bool) -> None:
        async with fake_runtime(max_restarts=0) as runtime:
            begun = asyncio.Event()
            loop = asyncio.get_running_loop()

            def endless(text: str) -> list[int]:
                loop.call_soon_threadsafe(begun.set)
                done.wait(60)
                return [1]

            monkeypatch.setattr(runtime.tokenizer, "encode", endless)
            texts = [asyncio.ensure_future(collect(runtime, "text", ids_only(4))) for _ in range(6)]
            preparing = asyncio.ensure_future(runtime.prepare(lambda: endless("")))
            await begun.wait()
            if fails:
                children("tpworker-rank0")[0].kill()
            else:
                await runtime.stop()
            for task in (*texts, preparing):
                with pytest.raises(RuntimeFailed if fails else RuntimeStopped):
                    await asyncio.wait_for(task, 20)

    for fails in (False, True):
        run(lambda fails=fails: main(fails))
    done.set()
