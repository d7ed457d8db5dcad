"""The kernels over peer memory, without GPUs: in Triton's interpreter, ranks as processes, inboxes as memfds.

On GPUs: tests/gpu/test_collectives.py.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.absent_gpu import needs_triton

pytestmark = needs_triton

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60
ROW_BYTES = 1 << 19
"""Of an inbox: room for a few rows, so that some sums take two launches."""


@pytest.mark.parametrize(
    ("size", "num_ranks", "exchanges"), [(2, 2, 100), (4, 4, 20), (4, 2, 50), (8, 1, 50)]
)
def test_exchanges_of_ranks_that_dawdle(
    size: int, num_ranks: int, exchanges: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of changing number and width, one shot and two, choices in between: all right on all ranks.

    With fewer ranks than the group's size, each stands for several (benchmarks/steps/stand_ins.py).
    """
    from tpworker.kernels import symmetric_kernels

    monkeypatch.setattr(symmetric_kernels, "_ROW_BYTES", ROW_BYTES)
    fds = [os.memfd_create("inbox") for _ in range(num_ranks)]
    ranks: list[subprocess.Popen[bytes]] = []
    num_bytes = symmetric_kernels.inbox_bytes(size)
    try:
        for fd in fds:
            os.ftruncate(fd, num_bytes)
            symmetric_kernels.empty_inbox(torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8))
        for rank in range(num_ranks):
            job = json.dumps(
                {"fds": fds, "size": size, "row_bytes": ROW_BYTES, "rank": rank, "exchanges": exchanges}
            )
            command = [sys.executable, "-m", "tests.children.interpreted_rank", job]
            environment = {**os.environ, "TRITON_INTERPRET": "1"}
            ranks.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=fds, stdout=subprocess.PIPE)
            )
        answers = [json.loads(rank.communicate(timeout=SECONDS)[0] or "null") for rank in ranks]
        assert [answer and answer["wrong"] for answer in answers] == [[]] * num_ranks
        assert len({tuple(answer["uses"]) for answer in answers}) == 1
        for fd in fds:  # everything that came was taken out again
            memory = torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
            untouched = torch.empty_like(memory)
            symmetric_kernels.empty_inbox(untouched)
            assert torch.equal(memory, untouched)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for fd in fds:
            os.close(fd)
