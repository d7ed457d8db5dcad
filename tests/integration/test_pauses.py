"""Time in which nobody ran counts for nobody: `docker pause`, a laptop that sleeps, Ctrl-Z."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from tests.integration.embedder import Embedder

pytestmark = pytest.mark.timeout(240)

STEP_TIMEOUT = 3.0
PAUSE = 5.0  # longer than any of the deadlines that this step timeout makes

GENERATE = f"""
    async def main():
        model = fake_model(__import__("pathlib").Path(sys.argv[1]), step_seconds=0.05)
        options = {{**FAKE_RANKS, "tensor_parallel_size": 2, "step_timeout": {STEP_TIMEOUT}}}
        async with Runtime(model, **options) as runtime:
            params = SamplingParams(max_tokens=16000, detokenize=False)
            async for output in runtime.generate([1, 2, 3], params):
                print("tokens", output.num_output_tokens)

    asyncio.run(main())
"""


def test_a_pause_of_all_processes_is_nobodys_fault(tmp_path: Path) -> None:
    """Rank 1 stops a little before the others, and goes on a little after them: so all of them wait."""
    with Embedder(GENERATE, str(tmp_path / "model")) as embedder:
        embedder.wait_for("tokens")
        children = embedder.children()
        rank1 = children["tpworker-rank1"]
        others = [
            psutil.Process(embedder.process.pid),
            children["tpworker-scheduler"],
            children["tpworker-rank0"],
            children["tpworker-scheduler-standby"],
            children["tpworker-rank-standby"],
        ]
        for _ in range(2):
            rank1.suspend()
            time.sleep(0.1)
            for process in others:
                process.suspend()
            time.sleep(PAUSE)
            for process in others:
                process.resume()
            time.sleep(0.3)
            rank1.resume()
            embedder.wait_for("tokens", after=len(embedder.lines) + 20)
        assert embedder.process.poll() is None
        assert set(embedder.children()) == set(children)


def test_a_rank_that_alone_stands_still_is_named(tmp_path: Path) -> None:
    with Embedder(GENERATE, str(tmp_path / "model")) as embedder:
        embedder.wait_for("tokens")
        embedder.children()["tpworker-rank1"].suspend()
        assert embedder.wait() == 1
        assert "RuntimeFailed: tpworker-rank1 is stopped" in embedder.output
