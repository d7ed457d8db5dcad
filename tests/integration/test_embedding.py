"""What embedding programs do to a runtime: fork, leave it behind, are killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.embedder import Embedder

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


def test_a_stopped_runtime_does_not_keep_the_interpreter_from_ending(tmp_path: Path) -> None:
    """Nor does one that is left behind: though a prompt is still being tokenised, for ever."""
    code = (
        COMMON
        + """
    class Tokenizer:
        def encode(self, text):
            print("tokenising")
            begun.set()
            threading.Event().wait()

    begun = threading.Event()

    async def left(stop):
        runtime = Runtime(model, **FAKE_RANKS)
        await runtime.start()
        runtime._tokenizer = Tokenizer()
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
