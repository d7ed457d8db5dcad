from __future__ import annotations

import copy
import gc
import os
import pickle  # noqa: TID251  # embedders do
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import eventually
from tests.server.fake_runtime import byte_tokenizer
from tpworker import (
    InvalidRequest,
    Listener,
    ModelError,
    Runtime,
    RuntimeFailed,
    RuntimeSleeping,
    RuntimeStopped,
    SamplingParams,
    StepRecord,
    SyncRuntime,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

IDS_ONLY = SamplingParams(max_tokens=6, detokenize=False)


def sync_runtime(model: Path, **options: Any) -> SyncRuntime:
    modules: dict[str, Any] = {
        "rank_module": "tests.children.idle_rank",
        "scheduler_module": "tpworker.testing.fake_scheduler",
    }
    return SyncRuntime(model, **modules, **options)


@pytest.fixture
def runtime(model_folder: Path) -> Iterator[SyncRuntime]:
    with sync_runtime(model_folder) as runtime:
        yield runtime


def test_outputs_come_one_after_the_other(runtime: SyncRuntime) -> None:
    outputs = list(runtime.generate([5, 6], IDS_ONLY, request_id="a"))
    assert [token for output in outputs for token in output.token_ids] == [5, 6] * 3
    assert outputs[-1].finish_reason == "length"
    assert runtime.stats().finished == 1
    assert runtime.health().state == "ready"
    assert runtime.gpus() == ()
    seen = runtime.snapshot()
    assert (seen.runtime.state, seen.runtime.finished, seen.runtime.output_tokens) == ("ready", 1, 6)
    assert (seen.model, seen.requests, len(seen.ranks)) == ("model", (), 1)
    assert runtime.start_times is not None
    assert runtime.start_times.total > 0


def test_many_prompts_at_once(model_folder: Path) -> None:
    byte_tokenizer()._backend.save(str(model_folder / "tokenizer.json"))
    with sync_runtime(model_folder, max_num_seqs=2, max_num_batched_tokens=4, max_queue=1) as runtime:
        texts = [f"text {i} " for i in range(9)]
        completions = runtime.complete(texts, SamplingParams(max_tokens=14))
        assert [completion.text for completion in completions] == [text * 2 for text in texts]
        assert all(completion.num_output_tokens == 14 for completion in completions)
        assert len(runtime.spec.eos_ids) == 1
        assert runtime.tokenizer.decode([]) == ""


def test_choices_come_prompt_by_prompt(model_folder: Path) -> None:
    with sync_runtime(model_folder, max_num_seqs=2, max_num_batched_tokens=4, max_queue=1) as runtime:
        params = SamplingParams(max_tokens=4, detokenize=False, n=3)  # more than there are slots
        completions = runtime.complete([[5], [6]], params)
        assert [(c.token_ids[0], c.index, c.num_output_tokens) for c in completions] == [
            (token, index, 4) for token in (5, 6) for index in range(3)
        ]
        ids = [completion.request_id for completion in completions]
        assert ids == [ids[0]] * 3 + [ids[3]] * 3
        indices = {output.index for output in runtime.generate([5], params)}
        assert indices == {0, 1, 2}
        assert runtime.stats().finished == 9


@pytest.mark.parametrize("wrong", [{"max_tokens": 1}, {}, "", 0, SamplingParams])
def test_parameters_are_sampling_params(runtime: SyncRuntime, wrong: Any) -> None:
    """And what is empty is not the defaults."""
    with pytest.raises(TypeError, match=r"is dict|is str|is int|is type.*: give SamplingParams\("):
        runtime.complete([[5]], wrong)
    with pytest.raises(TypeError, match="give SamplingParams"):
        next(iter(runtime.generate([5], wrong)))


def test_one_prompt_is_no_list(runtime: SyncRuntime) -> None:
    with pytest.raises(TypeError, match="list of prompts"):
        runtime.complete("prompt")


def test_an_error_of_one_ends_all(runtime: SyncRuntime) -> None:
    with pytest.raises(InvalidRequest):
        runtime.complete([[5], [], [6]], SamplingParams(detokenize=False))
    assert runtime.stats().open == 0


def test_leaving_the_loop_aborts(runtime: SyncRuntime) -> None:
    outputs = runtime.generate([5], SamplingParams(detokenize=False))
    next(outputs)
    outputs.close()
    assert (runtime.stats().open, runtime.stats().aborted) == (0, 1)


def test_a_generator_may_be_collected_on_the_runtimes_own_thread(runtime: SyncRuntime) -> None:
    outputs = runtime.generate([5], SamplingParams(detokenize=False))
    next(outputs)
    cycle: list[object] = [outputs]
    cycle.append(cycle)
    gc.disable()  # not here
    try:
        del outputs, cycle
        assert runtime._loop is not None
        runtime._loop.call_soon_threadsafe(gc.collect)
        eventually(lambda: runtime.runtime.stats().aborted == 1)
    finally:
        gc.enable()
    assert list(runtime.generate([5], IDS_ONLY))[-1].finish_reason == "length"


def test_a_second_start_is_refused_and_the_first_goes_on(runtime: SyncRuntime) -> None:
    with pytest.raises(RuntimeStopped, match="starts once"):
        runtime.start()
    assert list(runtime.generate([5], IDS_ONLY))[-1].finish_reason == "length"


def test_abort_from_another_thread(runtime: SyncRuntime) -> None:
    outputs = runtime.generate([5], SamplingParams(detokenize=False), request_id="a")
    next(outputs)
    thread = threading.Thread(target=runtime.abort, args=("a",))
    thread.start()
    assert list(outputs)[-1].finish_reason == "abort"
    thread.join()


def test_an_interrupt_leaves_the_runtime_usable(runtime: SyncRuntime, model_folder: Path) -> None:
    def interrupt() -> None:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    outputs = runtime.generate([5], SamplingParams(detokenize=False))
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        list(outputs)
    outputs.close()
    assert runtime.stats().aborted == 1
    assert list(runtime.generate([5], IDS_ONLY))[-1].finish_reason == "length"


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError), sync_runtime(tmp_path / "nowhere"):
        pass


def test_a_failure_is_raised_where_it_is_waited_for(model_folder: Path) -> None:
    with sync_runtime(model_folder, max_restarts=0) as runtime:
        outputs = runtime.generate([5], SamplingParams(detokenize=False))
        next(outputs)
        next(child for child in psutil.Process().children(recursive=True) if "rank0" in child.name()).kill()
        with pytest.raises(RuntimeFailed, match="tpworker-rank0"):
            list(outputs)
        assert runtime.health().state == "failed"


def test_drain_and_stop(runtime: SyncRuntime) -> None:
    runtime.drain(5)
    with pytest.raises(RuntimeStopped):
        list(runtime.generate([5], IDS_ONLY))
    runtime.stop()
    runtime.stop()
    with pytest.raises(RuntimeStopped, match="not running"):
        list(runtime.generate([5], IDS_ONLY))


def test_it_is_not_running_before_it_is_started(model_folder: Path) -> None:
    runtime = sync_runtime(model_folder)
    with pytest.raises(RuntimeStopped, match="not running"):
        list(runtime.generate([5], IDS_ONLY))
    runtime.stop()


def test_a_call_on_its_own_thread_would_wait_for_itself(model_folder: Path) -> None:
    said: list[str] = []

    class Asks(Listener):
        def on_step(self, step: StepRecord) -> None:
            for call in (runtime.stats, runtime.stop, runtime.start, lambda: runtime.complete([[5]])):
                with pytest.raises(RuntimeStopped) as error:
                    call()
                said.append(str(error.value))
            runtime.remove_listener(self)

    with sync_runtime(model_folder) as runtime:
        runtime.add_listener(Asks())
        assert list(runtime.generate([5], IDS_ONLY))[-1].finish_reason == "length"
        assert len(said) == 4
        assert all("the thread of the runtime itself" in words for words in said)
        assert runtime.events == ()


def test_threads_that_call_while_others_stop_it_are_told(model_folder: Path) -> None:
    with sync_runtime(model_folder, max_num_seqs=4) as runtime:
        ends: list[str] = []
        begun = threading.Semaphore(0)

        def ask() -> None:
            try:
                while True:
                    runtime.complete([[5]], IDS_ONLY)
                    begun.release()
            except RuntimeStopped:
                ends.append("told")

        def stop() -> None:
            runtime.stop()
            ends.append("stopped")

        threads = [threading.Thread(target=work, daemon=True) for work in [ask] * 4 + [stop] * 3]
        for thread in threads[:4]:
            thread.start()
        assert all(begun.acquire(timeout=20) for _ in range(8))
        for thread in threads[4:]:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sorted(ends) == ["stopped"] * 3 + ["told"] * 4


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("kind", [SyncRuntime, Runtime])
def test_it_cannot_be_copied_but_what_it_is_made_of_can(kind: type, copied: Callable[[Any], Any]) -> None:
    runtime = kind("somewhere")
    with pytest.raises(TypeError, match="send its RuntimeConfig, make one there"):
        copied(runtime)
    for plain in (runtime.config, SamplingParams(logit_bias={5: 1.0}, stop=["a"])):
        assert pickle.loads(pickle.dumps(plain)) == plain


def test_it_sleeps_wakes_up_and_refuses_other_weights(runtime: SyncRuntime, tmp_path: Path) -> None:
    runtime.sleep(level=2)
    assert (runtime.is_sleeping, runtime.health().state) == (True, "sleeping")
    with pytest.raises(RuntimeSleeping):
        next(runtime.generate([5, 6], IDS_ONLY))
    runtime.wake_up(["weights"])
    assert runtime.is_sleeping
    runtime.wake_up()
    assert runtime.health().state == "ready"
    assert len([token for out in runtime.generate([5, 6], IDS_ONLY) for token in out.token_ids]) == 6
    with pytest.raises(ModelError, match="there is no such folder"):
        runtime.update_weights(tmp_path / "nothing")
    with pytest.raises(InvalidRequest, match="no source of weights"):
        runtime.update_weights(7)  # type: ignore[arg-type]
    assert (runtime.weights_number, runtime.stats().restarts) == (0, 0)
