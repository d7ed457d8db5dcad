"""What SGLang's router asks of a server."""

from __future__ import annotations

from collections.abc import Callable

from tests.server.conftest import LiveServer
from tests.server.fake_runtime import FakeRuntime
from tpworker import RuntimeConfig

Start = Callable[..., LiveServer]


def test_what_is_served_is_told_under_both_names(start: Start) -> None:
    runtime = FakeRuntime(configured=RuntimeConfig(tensor_parallel_size=2, max_num_seqs=8, block_size=32))
    server = start(runtime, served_model_names=("one", "two"))
    model = server.get("/model_info").json()
    assert model == server.get("/get_model_info").json()
    assert (model["model_path"], model["is_generation"]) == ("/fake-model", True)
    assert model["architectures"] == ["LlamaForCausalLM"]
    told = server.get("/server_info").json()
    assert told == server.get("/get_server_info").json()
    assert (told["served_model_name"], told["tp_size"], told["dp_size"]) == ("one", 2, 1)
    assert (told["context_length"], told["max_running_requests"]) == (512, 8)
    assert told["max_total_num_tokens"] == 3200
    runtime.num_open = 3
    load = {"dp_rank": 0, "num_reqs": 3, "num_waiting_reqs": 0, "num_tokens": 320}
    assert server.get("/get_load").json() == [load]


def test_they_need_the_key(start: Start) -> None:
    server = start(api_key="secret")
    for path in ("/model_info", "/get_model_info", "/server_info", "/get_server_info", "/get_load"):
        assert server.get(path).status_code == 401
        assert server.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
