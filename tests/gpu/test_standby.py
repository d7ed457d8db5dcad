"""A standby of CUDA ranks on a machine with GPUs: it must not have looked at one, or its children cannot."""

from __future__ import annotations

import os

import pytest
import torch

from tests.conftest import eventually
from tests.runtime.test_standby import Forks, status_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.usefixtures("nothing_left"),
]

ON_THE_GPU = """
import torch
from tpworker.kernels import cuda_operations
from tpworker.model import torch_operations
from tpworker.rank.context import open_early
was_opened = torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork()
open_early(0).join()
x = torch.randn(4, 512, device="cuda")
y = cuda_operations.silu_mul(x)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    z = cuda_operations.silu_mul(x)
graph.replay()
is_right = torch.allclose(y, torch_operations.silu_mul(x), atol=1e-5) and torch.equal(y, z)
say(boot, was_opened, is_right)
"""


def test_children_of_a_standby_use_the_gpu_one_after_the_other_and_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOLD_TO", "import all")
    forks = Forks(device="cuda")
    standby = forks.standby
    eventually(lambda: standby.read() or standby.is_ready)  # type: ignore[func-returns-value]
    pid = standby.process.pid
    assert len(os.listdir(f"/proc/{pid}/task")) == 1
    assert not any("nvidia" in os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
    for num in (1, 2):
        children = [forks.fork(ON_THE_GPU) for _ in range(num)]
        assert [child.wait(120) and child.status for child in children] == [0] * num
    assert forks.said(3) == ["False True"] * 3
    assert status_of(forks.fork("pass")) == 0
    forks.close()
