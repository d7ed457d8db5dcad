"""What NVML says of the GPUs, against what CUDA says; and a runtime on them, as seen from outside."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY_CONFIG
from tpworker import Runtime
from tpworker.config import RuntimeConfig
from tpworker.doctor import doctor
from tpworker.observe.gpus import count_gpus
from tpworker.observe.nvml import Nvml, find_gpus, links

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

CUDA_TELLS = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([[f"GPU-{gpu.uuid}", gpu.name, [gpu.major, gpu.minor]] for gpu in gpus]))
"""


@pytest.mark.parametrize("order", ["all", "reversed", "by uuid"])
def test_gpus_are_numbered_as_cuda_does(order: str) -> None:
    environment = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    here = find_gpus(environment=environment).gpus
    if order == "reversed":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.uuid for gpu in reversed(here))
    elif order == "by uuid":
        environment["CUDA_VISIBLE_DEVICES"] = here[-1].uuid[:13]
    found = find_gpus(environment=environment).gpus
    output = subprocess.check_output([sys.executable, "-c", CUDA_TELLS], env=environment, text=True)
    expected = [[gpu.uuid, gpu.name, list(gpu.capability or ())] for gpu in found]
    assert expected == json.loads(output)


def test_memory_and_peer_access_are_what_cuda_sees() -> None:
    with closing(Nvml.connect()) as nvml:
        found = find_gpus(nvml).gpus
        for gpu in found:
            assert gpu.memory == pytest.approx(torch.cuda.mem_get_info(gpu.index)[1], rel=0.02)
        for first, second, link in links(nvml, found):
            assert link.peer_access == torch.cuda.can_device_access_peer(first.index, second.index)


def test_the_doctor_finds_nothing_missing_here() -> None:
    report = doctor.examine(RuntimeConfig(tensor_parallel_size=count_gpus(), device="cuda"))
    assert report["would_start"], [check for check in report["checks"] if check.state == "missing"]


def test_a_runtime_tells_of_its_gpus_and_of_its_start(tmp_path: Path) -> None:
    num_ranks = min(2, count_gpus())
    config = {**TINY_CONFIG, "hidden_size": 256, "intermediate_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))

    async def main() -> None:
        async with Runtime(
            tmp_path, device="cuda", tensor_parallel_size=num_ranks, load_format="dummy", dtype="bfloat16"
        ) as runtime:
            states = runtime.gpus()
            assert [state.rank for state in states] == list(range(num_ranks))
            for state in states:
                assert 0 < (state.reading.temperature or 0) < 110
                assert (state.reading.power or 0) > 0
                assert 0 < (state.reading.memory_used or 0) <= state.gpu.memory
                assert state.num_xids == 0
            assert runtime.start_times is not None
            names = [stage.name for stage in runtime.start_times.stages]
            assert {"torch imported", "kernels warmed up", "graphs captured"} <= set(names)
            assert runtime._processes is not None
            for child, cpus in zip(
                runtime._processes.generation._supervisor._children[1:],
                runtime._processes.generation._supervisor.group.rank_cpus,
                strict=True,
            ):
                allowed = os.sched_getaffinity(0) if cpus is None else cpus
                assert os.sched_getaffinity(child.pid or 0) == allowed

    asyncio.run(main())
