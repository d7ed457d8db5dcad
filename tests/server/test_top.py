"""GET /top: what `tpworker top` shows of a server."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

from tests.observe.boards import busy_board
from tests.server.conftest import LiveServer
from tests.server.fake_runtime import FakeRuntime
from tpworker.observe.looking import look
from tpworker.observe.nvml import Gpu, Reading
from tpworker.observe.snapshot import from_json
from tpworker.observe.watch import GpuState

Start = Callable[..., LiveServer]


def test_it_tells_what_the_board_says_and_how_gpus_do(start: Start) -> None:
    gpu = Gpu(0, "GPU-a", "NVIDIA H200", 141 << 30, None, None, None, None, None, None)
    states = (GpuState(1, gpu, Reading(40, 300.5, 1 << 30, 0, 0, 97), 0),)
    with closing(busy_board()) as board:
        server = start(FakeRuntime(board=board, gpu_states=states), served_model_names=("alias",))
        told = from_json(server.get("/top").json())
        seen = look(board)
    assert told.model == "alias"
    assert (told.scheduler.running, told.scheduler.free_blocks) == (5, 60)
    assert [rank.barrier_seconds for rank in told.ranks] == [rank.barrier_seconds for rank in seen.ranks]
    assert [one.name for one in told.requests] == [one.name for one in seen.requests]
    assert told.runtime.cpu_seconds is not None
    first, second = told.ranks
    assert first.gpu is None
    assert second.gpu is not None
    assert (second.gpu.utilization, second.gpu.power, second.gpu.memory_total) == (97, 300.5, 141 << 30)


def test_it_tells_before_there_are_processes_and_while_there_are_none(start: Start) -> None:
    starting = from_json(start(FakeRuntime(state="starting", is_found=False)).get("/top").json())
    assert (starting.runtime.state, starting.model, starting.ranks) == ("starting", "", ())
    runtime = FakeRuntime()
    server = start(runtime)
    runtime.lose()
    recovering = from_json(server.get("/top").json())
    assert (recovering.runtime.state, recovering.model, recovering.ranks) == ("recovering", "fake-model", ())


def test_it_needs_the_key(start: Start) -> None:
    server = start(api_key="secret")
    assert server.get("/top").status_code == 401
    assert server.get("/top", headers={"Authorization": "Bearer secret"}).status_code == 200
