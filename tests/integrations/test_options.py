"""What a deployment is told, by name: for the runtimes, the front, and the engine."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests.observe.fake_nvml import FakeNvml
from tpworker import ConfigError, RuntimeConfig
from tpworker.integrations.autoscaling import OPEN, by_open_choices
from tpworker.integrations.options import POLICY, Options
from tpworker.observe.gpus import resolve_gpus


def test_options_go_to_whom_they_are_for() -> None:
    given = {"model": "m", "tensor_parallel_size": 2, "num_replicas": 3, "served_model_names": ["a", "b"]}
    config, front, options = Options.parted(given | {"max_queue": 7, "api_key": "k", "allowed_origins": "*"})
    assert (config.model, config.tensor_parallel_size, config.max_queue) == ("m", 2, 7)
    assert (front.served_model_names, front.api_key, front.allowed_origins) == (("a", "b"), "k", ("*",))
    assert options == Options(num_replicas=3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tensor_paralel_size": 2}, "no option tensor_paralel_size: did you mean tensor_parallel_size"),
        ({"zzz": 2}, "no option zzz: there are allowed_origins, api_key"),
        ({"trace": "t.json"}, "no option trace"),
        ({"enable_sleep_mode": True}, "no option enable_sleep_mode"),
        ({"join_address": "a"}, "no option join_address"),
        ({"num_replicas": 0}, "num_replicas=0: must be an integer from 1 on"),
        ({"num_fronts": True}, "num_fronts=True"),
        ({"max_items_per_second": 0}, "max_items_per_second=0: must be from 1 to 1000000"),
        ({"num_cpus": float("nan")}, "num_cpus=nan: must be a number"),
        ({"num_cpus": -1}, "num_cpus=-1: must be a number from 0 on"),
        ({"shutdown_timeout": "9"}, "shutdown_timeout='9'"),
        ({"num_replicas": 2, "autoscaling": {}}, "num_replicas=2 has no effect with autoscaling"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options.parted(wrong)


def test_a_replica_asks_for_the_gpus_or_the_cores_of_its_ranks() -> None:
    config = RuntimeConfig(tensor_parallel_size=4)
    options = Options(resources_of_node={"fast": 1})
    on_gpus, on_cpu = options.on_device(config, 4.0), options.on_device(config, 3.0)
    assert (on_gpus.device, on_cpu.device) == ("cuda", "cpu"), "no GPUs that are not its own"
    assert options.resources(on_gpus) == {"num_cpus": 1, "num_gpus": 4, "resources": {"fast": 1}}
    assert Options().resources(on_cpu) == {"num_cpus": 4}
    assert Options(num_cpus=0.5).resources(on_cpu) == {"num_cpus": 0.5}
    asked = RuntimeConfig(device="cuda")
    assert options.on_device(asked, 0.0) is asked, "nodes with GPUs may come when they are asked for"


def test_ranks_see_the_gpus_that_ray_shows_their_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray writes CUDA_VISIBLE_DEVICES: numbers of the node, in any order."""
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([f"GPU-{number}" for number in range(8)]))
    monkeypatch.setattr("tpworker.observe.gpus.torch_cuda", lambda: (13, 0))
    for shown, seen in (("6,7", [6, 7]), ("3,0", [3, 0])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        gpus = resolve_gpus(RuntimeConfig(tensor_parallel_size=2, device="cuda"))
        assert [gpu.uuid for gpu in gpus] == [f"GPU-{number}" for number in seen]
    with pytest.raises(ConfigError, match="needs as many GPUs"):
        resolve_gpus(RuntimeConfig(tensor_parallel_size=3, device="cuda"))


def test_there_are_as_many_replicas_as_have_room_for_all_choices() -> None:
    scale = Options(autoscaling={"min_replicas": 1, "max_replicas": 4}).autoscaling_config(64)
    assert scale == {
        "target_ongoing_requests": 64,
        "policy": {"policy_function": POLICY},
        "min_replicas": 1,
        "max_replicas": 4,
    }
    module, _, name = POLICY.partition(":")
    assert (module, name) == (by_open_choices.__module__, by_open_choices.__name__)
    context = SimpleNamespace(
        aggregated_metrics={OPEN: {"a": 64.0, "b": 40.0}},
        total_queued_requests=24.0,
        config=SimpleNamespace(target_ongoing_requests=64),
    )
    assert by_open_choices(context) == (2.0, {})
    context.aggregated_metrics, context.total_queued_requests = None, None
    assert by_open_choices(context) == (0.0, {})
