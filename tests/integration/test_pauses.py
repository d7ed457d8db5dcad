"""Time in which nobody ran counts for nobody: `docker pause`, a laptop that sleeps, Ctrl-Z."""

from __future__ import annotations

import re
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.embedder import Embedder
from tpworker.ipc.deadlines import SHORTEST_SECONDS

pytestmark = pytest.mark.timeout(240)

STEP_TIMEOUT = 3.0
PAUSE = 5.0  # longer than any of the deadlines that this step timeout makes

GENERATE = """
    async def main():
        model = fake_model(__import__("pathlib").Path(sys.argv[1]), step_seconds=0.05)
        seconds = float(sys.argv[2]) or None
        options = {**FAKE_RANKS, "tensor_parallel_size": 2, "step_timeout": seconds, "max_restarts": 0}
        async with Runtime(model, **options) as runtime:
            params = SamplingParams(max_tokens=16000, detokenize=False)
            async for output in runtime.generate([1, 2, 3], params):
                print("tokens", output.num_output_tokens)

    asyncio.run(main())
"""


def test_a_pause_of_all_processes_is_nobodys_fault(tmp_path: Path) -> None:
    """Rank 1 stops a little before the others, and goes on a little after them: so all of them wait."""
    with Embedder(GENERATE, str(tmp_path / "model"), str(STEP_TIMEOUT)) as embedder:
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


@pytest.mark.parametrize("step_timeout", [STEP_TIMEOUT, 0.0], ids=["given", "chosen"])
def test_a_rank_that_alone_stands_still_is_named(tmp_path: Path, step_timeout: float) -> None:
    with Embedder(GENERATE, str(tmp_path / "model"), str(step_timeout)) as embedder:
        embedder.wait_for("tokens", after=10)  # some steps were seen
        embedder.children()["tpworker-rank1"].suspend()
        assert embedder.wait() == 1
        assert "RuntimeFailed: tpworker-rank1 is stopped" in embedder.output
        seconds = step_timeout or SHORTEST_SECONDS["cpu"]
        assert re.search(rf"waited {seconds:g} s|not answered within {seconds:g} s", embedder.output)
        assert re.search(r"; tpworker-rank1 was .* step \d+", embedder.output)
