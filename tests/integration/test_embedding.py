"""What embedding programs do to a runtime: fork, leave it behind, are killed."""

from __future__ import annotations

import inspect
import os
import re
import signal
from pathlib import Path

import psutil
import pytest

from tests.integration.embedder import Embedder
from tpworker import Runtime

pytestmark = pytest.mark.timeout(240)

COMMON = """
    model = fake_model(__import__("pathlib").Path(sys.argv[1]))
    params = SamplingParams(max_tokens=5, detokenize=False)

    async def main(name):
        async with Runtime(model, **FAKE_RANKS, start_timeout=60) as runtime:
            outputs = [output async for output in runtime.generate([1, 2, 3], params)]
            print(name, outputs[-1].num_output_tokens)
"""


def test_a_forked_process_can_have_a_runtime_of_its_own(tmp_path: Path) -> None:
    """After its parent has had one, and while its parent has one; the parent's goes on."""
    code = (
        COMMON
        + """
    def fork(name):
        pid = os.fork()
        if pid == 0:
            try:
                asyncio.run(main(name))
            except BaseException as error:
                print(name, repr(error))
            os._exit(0)
        os.waitpid(pid, 0)

    asyncio.run(main("parent"))
    fork("child")
    with SyncRuntime(model, **FAKE_RANKS) as runtime:
        fork("second child")
        print("parent again", len(runtime.complete([[1, 2, 3]], params)[0].token_ids))
    """
    )
    with Embedder(code, str(tmp_path / "model")) as embedder:
        assert embedder.wait() == 0, embedder.output
        assert embedder.output.splitlines() == ["parent 5", "child 5", "second child 5", "parent again 5"]


HARMLESS_IN_FORKS = {"health", "encode", "add_listener", "remove_listener", "trace_span"}
"""What needs neither threads nor processes, or does nothing there."""


def test_a_running_runtime_says_so_in_a_fork_which_leaves_it_alone(tmp_path: Path) -> None:
    """However the fork ends: it collects what it has inherited, and runs the interpreter's exit handlers."""
    code = (
        COMMON
        + """
    import multiprocessing

    def said(what, call):
        try:
            print(what, call())
        except RuntimeStopped as error:
            print(what, "this is process" in str(error))

    def use(runtime, outputs):
        inner = runtime.runtime
        for name in ("start", "stop", "drain", "stats", "gpus", "reset_prefix_cache", "stop_trace"):
            said(name, getattr(runtime, name))
        said("complete", lambda: runtime.complete([[1]], params))
        said("generate", lambda: next(runtime.generate([1], params)))
        said("abort", lambda: runtime.abort("a"))
        said("next", lambda: next(outputs))
        print(runtime.health().state, "this is process" in runtime.health().error)
        arguments = {"generate": [[1]], "collect": [[1]], "prepare": [int], "abort": ["a"]}
        arguments |= {"start_trace": ["/nowhere/trace"], "update_weights": ["/nowhere"]}
        for name in sys.argv[2:]:
            said("inner " + name, lambda: asyncio.run(call(getattr(inner, name), *arguments.get(name, ()))))
        with os.scandir("/proc/self/fd") as folder:
            links = [os.readlink(entry.path) for entry in folder]
        print("kept", [link for link in links if "tpworker-kept" in link or "tpworker-blocks" in link])
        for standby in inner._processes._standbys._standbys.values():
            standby.close()
        for child in inner._processes.generation._supervisor._children:
            child.kill()
            child.close()
        gc.collect()

    async def call(function, *arguments):
        result = function(*arguments)
        result = anext(result) if hasattr(result, "__anext__") else result
        return await result if hasattr(result, "__await__") else result

    with SyncRuntime(model, **FAKE_RANKS) as runtime:
        outputs = runtime.generate([1], SamplingParams(max_tokens=900, detokenize=False))
        next(outputs)
        pid = os.fork()
        if pid == 0:
            use(runtime, outputs)
            sys.exit()  # through the `with`, and all exit handlers
        os.waitpid(pid, 0)
        process = multiprocessing.get_context("fork").Process(target=said, args=("process", runtime.stats))
        process.start()
        process.join()
        *_, last = outputs
        print(last.num_output_tokens, len(runtime.complete([[1, 2, 3]], params)[0].token_ids), runtime.events)
    """
    )
    methods = [name for name, _ in inspect.getmembers(Runtime, inspect.isfunction)]
    methods = [
        name for name in methods if not name.startswith(("_", "on_")) and name not in HARMLESS_IN_FORKS
    ]
    assert len(methods) > 10
    with Embedder(code, str(tmp_path / "model"), *methods) as embedder:
        assert embedder.wait() == 0, embedder.output
    lines = embedder.output.splitlines()
    blocking = ["start", "stop", "drain", "stats", "gpus", "reset_prefix_cache", "stop_trace"]
    assert lines == [
        *(f"{name} True" for name in [*blocking, "complete", "generate", "abort", "next"]),
        "stopped True",
        *(f"inner {name} True" for name in methods),
        "kept []",
        "process True",
        "900 5 ()",
    ]


def test_a_stopped_runtime_does_not_keep_the_interpreter_from_ending(tmp_path: Path) -> None:
    """Nor does one that is left behind: though a prompt is still being tokenised, for ever."""
    code = (
        COMMON
        + """
    from dataclasses import replace

    class Tokenizer:
        def encode(self, text):
            print("tokenising")
            begun.set()
            threading.Event().wait()

        def close(self):
            pass

    begun = threading.Event()

    async def left(stop):
        runtime = Runtime(model, **FAKE_RANKS)
        await runtime.start()
        runtime._served = replace(runtime._served, tokenizer=Tokenizer())
        runtime._intake.serve(runtime._served)
        request = asyncio.ensure_future(anext(runtime.generate("text", params)))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        begun.clear()
        if stop:
            await runtime.stop()
            try:
                await request
            except RuntimeStopped as error:
                print(error)

    asyncio.run(left(True))
    asyncio.run(left(False))
    print("the end")
    """
    )
    with Embedder(code, str(tmp_path / "model")) as embedder:
        assert embedder.wait() == 0, embedder.output
        assert embedder.output.splitlines() == [
            "tokenising", "the runtime was stopped", "tokenising", "the end",
        ]  # fmt: skip


SERVING = (
    COMMON
    + """
    async def serve(then):
        model = fake_model(__import__("pathlib").Path(sys.argv[1]), step_seconds=0.01)
        params = SamplingParams(max_tokens=16000, detokenize=False)
        async with Runtime(model, **FAKE_RANKS, tensor_parallel_size=2, max_restarts=0) as runtime:
            async for output in runtime.generate([1, 2, 3], params):
                if output.num_output_tokens >= 20 and then:  # several tokens may come at once
                    print("serving")
                    then = then()

    def kill_children():
        from tpworker.runtime import supervisor
        from tpworker.runtime.faults import Kind

        supervisor.GRACE_SECONDS[Kind.DIED] = supervisor.KILLED_SECONDS = 60.0  # on a busy machine too
        for child in __import__("psutil").Process().children(recursive=sys.argv[2] == "all of them"):
            child.kill()

    logging.basicConfig(level=logging.INFO)
    """
)


def test_when_its_owner_is_killed_all_end_without_a_word(tmp_path: Path) -> None:
    code = SERVING + "asyncio.run(serve(lambda: None))"
    with Embedder(code, str(tmp_path / "model")) as embedder:
        number = embedder.wait_for("serving")
        children = embedder.children()
        assert len(children) == 5
        embedder.process.kill()
        assert embedder.wait() == -signal.SIGKILL  # which waits until nobody has its stdout any more
        assert embedder.lines[number + 1 :] == []
        _, alive = psutil.wait_procs(list(children.values()), 30)
        assert not alive


@pytest.mark.parametrize("whom", ["its children", "all of them"])
def test_who_kills_all_of_them_is_not_taken_for_want_of_memory(tmp_path: Path, whom: str) -> None:
    """As `ray.kill` does, before it ends their owner."""
    code = SERVING + "asyncio.run(serve(kill_children))"
    with Embedder(code, str(tmp_path / "model"), whom) as embedder:
        assert embedder.wait() == 1
        last = embedder.output.splitlines()[-1]
    names = set(re.findall("tpworker-[a-z0-9-]+", last))
    assert {"tpworker-scheduler-standby", "tpworker-rank-standby"} <= names
    assert "were killed by SIGKILL at once" in last
    if "oom_kill " in Path("/proc/vmstat").read_text():
        assert "by another program or by hand, not by the kernel for want of memory" in last


@pytest.mark.parametrize("when", ["before it began", "later"])
def test_with_descriptors_closed_its_processes_have_dev_null(
    tmp_path: Path, model_folder: Path, when: str
) -> None:
    """And none of what is opened meanwhile, to which their logs would be written; nor do we have it."""
    links = "[os.readlink(f'/proc/self/fd/{i}') for i in range(3)]"
    go = tmp_path / "go"  # or the rank might fail before the runtime is there
    waiting = f"[time.sleep(0.01) for _ in iter(lambda: os.path.exists({str(go)!r}), True)]"
    (model_folder / "tpworker-rank0").write_text(f"{waiting} and None or fail(ValueError({links}))")
    code = f"""
    async def main():
        if sys.argv[2] == "later":
            os.close(0)
            os.close(2)
        ranks, scheduler = "tests.children.idle_rank", "tpworker.testing.fake_scheduler"
        modules = dict(rank_module=ranks, scheduler_module=scheduler)
        async with Runtime(sys.argv[1], **modules, max_restarts=0) as runtime:
            print(any("memfd" in link or "socket" in link for link in {links}))
            open({str(go)!r}, "w").close()
            async for _ in runtime.generate([5], SamplingParams(max_tokens=400, detokenize=False)):
                pass

    try:
        asyncio.run(main())
    except RuntimeFailed as error:
        print(error.summary)
    """
    options = {"preexec_fn": lambda: [os.close(fd) for fd in (0, 2)]} if when != "later" else {}
    with Embedder(code, str(model_folder), when, **options) as embedder:
        assert embedder.wait() == 0, embedder.output
    ours, theirs = embedder.output.splitlines()
    assert theirs.startswith("tpworker-rank0 raised ValueError: ['/dev/null', '/dev/null', '/dev/null'];")
    if when == "later":  # else asyncio's own were opened before ours
        assert ours == "False"
