"""`tpworker doctor`: what is there, what is missing, and the exit status that follows."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import TINY_CONFIG
from tests.observe.fake_nvml import GIB, FakeGpu, FakeNvml
from tests.server.fake_runtime import byte_tokenizer
from tpworker.checkpoint import default_model
from tpworker.config import RuntimeConfig
from tpworker.doctor import doctor, gpu_checks, libraries, machine, model_check
from tpworker.doctor.check import Check
from tpworker.observe import gpus
from tpworker.observe.nvml import find_gpus

ROOT = Path(__file__).parents[2]
QWEN = ROOT / "benchmarks" / "configs" / "qwen3-8b"


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A machine of four GPUs, with all that goes with them."""
    library = FakeNvml([f"GPU-{number}" for number in range(4)])
    monkeypatch.setitem(sys.modules, "pynvml", library)
    for module in (gpu_checks, gpus):
        monkeypatch.setattr(module, "torch_cuda", lambda: (13, 0))
    found = importlib.util.find_spec
    here = ("triton", "flash_attn_interface")
    monkeypatch.setattr(
        libraries.importlib.util, "find_spec", lambda name: SimpleNamespace() if name in here else found(name)
    )
    monkeypatch.setattr(machine, "usable_cores", lambda: 64)
    return library


def examine(**options: Any) -> dict[str, Any]:
    return doctor.examine(RuntimeConfig(**options))


def checks(report: dict[str, Any], subject: str) -> list[Check]:
    return [check for check in report["checks"] if check.subject == subject]


def states(report: dict[str, Any], subject: str) -> list[str]:
    return [check.state for check in checks(report, subject)]


# ---------------------------------------------------------------------------------- this machine


def test_this_machine_would_start_a_group_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(driver=False))
    report = examine(tensor_parallel_size=2)
    assert report["device"] == "cpu"
    assert report["would_start"], [check for check in report["checks"] if check.state == "missing"]


def test_without_a_gpu_cuda_is_missing_and_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(driver=False))
    report = examine(tensor_parallel_size=2, device="cuda")
    assert not report["would_start"]
    (gpus,) = checks(report, "GPUs")
    assert gpus == Check(
        "GPUs", "missing", "0 of 2: the NVIDIA driver does not answer (Driver Not Loaded)", "use --device cpu"
    )


def test_the_exit_status_and_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(driver=False))
    out = io.StringIO()
    assert doctor.run_doctor(RuntimeConfig(tensor_parallel_size=2, device="cpu"), False, out) == 0
    assert out.getvalue().endswith("\nA TP group of 2 ranks on the CPU would start.\n")
    out = io.StringIO()
    assert doctor.run_doctor(RuntimeConfig(device="cuda"), False, out) == 1
    text = out.getvalue()
    assert re.search(r"^missing +GPUs +0 of 1: .*\n +→ use --device cpu$", text, re.MULTILINE)
    assert re.search(r"\nA TP group of 1 rank on GPUs would not start: \d missing\.\n$", text)
    assert "\033" not in text, "colours are for terminals"


def test_json_is_the_same(monkeypatch: pytest.MonkeyPatch, gpu_machine: FakeNvml) -> None:
    out = io.StringIO()
    assert doctor.run_doctor(RuntimeConfig(tensor_parallel_size=2), True, out) == 0
    report = json.loads(out.getvalue())
    assert (report["tensor_parallel_size"], report["device"], report["would_start"]) == (2, "cuda", True)
    assert report["driver"] == "580.159.04"
    assert [gpu["uuid"] for gpu in report["gpus"]] == ["GPU-0", "GPU-1", "GPU-2", "GPU-3"]
    assert report["gpus"][0]["cpus"] == [0, 1, 2, 3]
    assert report["links"] == [
        {"gpus": [0, 1], "peer_access": True, "nvlink": True, "path": "between NUMA nodes"}
    ]
    assert {check["state"] for check in report["checks"]} <= {"ok", "warning"}


def test_it_imports_nothing_that_takes_long() -> None:
    program = (
        "import sys; from tpworker.cli import main\n"
        "main(['doctor', '-tp', '2', '--device', 'cpu', '--json'])\n"
        "unwanted = 'torch', 'transformers', 'numpy', 'zmq', 'fastapi'\n"
        "print([name for name in unwanted if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == "[]", done.stderr
    assert json.loads(done.stdout)["tensor_parallel_size"] == 2


def test_it_runs_where_next_to_nothing_is_installed() -> None:
    program = (
        "import sys, importlib.metadata\n"
        "def version(name): raise importlib.metadata.PackageNotFoundError(name)\n"
        "importlib.metadata.version = version\n"
        "names = 'torch numpy zmq msgpack pynvml setproctitle transformers tokenizers llguidance rich'\n"
        "for name in names.split():\n"
        "    sys.modules[name] = None\n"
        "from tpworker.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["doctor", "-tp", "2", "--model", str(QWEN), "--load-format", "dummy", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1, done.stderr
    assert not done.stderr
    found = {check["subject"]: check for check in json.loads(done.stdout)["checks"]}
    assert {package.name for package in libraries.REQUIRED} <= {
        name for name, check in found.items() if check["state"] == "missing"
    }
    assert found["fastapi"]["state"] == "warning"
    assert found["model"]["found"].startswith("not looked at: ")


# ------------------------------------------------------------------------------------------ GPUs


def test_a_machine_with_gpus(gpu_machine: FakeNvml) -> None:
    report = examine(tensor_parallel_size=4)
    assert report["device"] == "cuda"
    assert report["would_start"]
    (gpu,) = checks(report, "GPU 3")
    assert gpu.found == (
        "NVIDIA H200, 141.0 GiB (140.0 free), compute capability 9.0, 18 NVLinks, NUMA node 0, CPUs 0-3, "
        "00000000:18:00.0"
    )
    (links,) = checks(report, "links")
    assert (links.state, links.found) == ("ok", "NVLink: 0-1, 0-2, 0-3, 1-2, 1-3, 2-3")
    assert gpu_machine.num_open == 0


def test_too_few_gpus(gpu_machine: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,9")
    (check,) = checks(examine(tensor_parallel_size=4, device="cuda"), "GPUs")
    assert (check.state, check.remedy) == (
        "missing", "correct CUDA_VISIBLE_DEVICES, or use -tp 2, or --device cpu",
    )  # fmt: skip
    assert "2 of 4: CUDA_VISIBLE_DEVICES=0,1,9: '9' is no GPU of the 4 here" in check.found
    report = examine(tensor_parallel_size=4)
    assert (report["device"], report["would_start"]) == ("cpu", True), "what serving would do"
    (check,) = checks(report, "GPUs")
    assert (check.state, check.found[:32]) == ("warning", "2 found, but not used: tensor_pa")
    (check,) = checks(examine(tensor_parallel_size=2), "GPUs")
    assert (check.state, check.remedy) == ("warning", "correct CUDA_VISIBLE_DEVICES")


def test_gpus_that_are_all_hidden(gpu_machine: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    report = examine(tensor_parallel_size=2)
    assert (report["device"], report["would_start"]) == ("cpu", True)
    (check,) = checks(report, "GPUs")
    assert check == Check("GPUs", "warning", "none can be used: CUDA_VISIBLE_DEVICES=-1 hides all GPUs", None)
    assert not checks(examine(device="cpu"), "GPUs")


def test_what_is_wrong_with_a_gpu(gpu_machine: FakeNvml) -> None:
    gpu_machine.gpus = [
        FakeGpu("GPU-0", used=40 * GIB),
        FakeGpu("GPU-1", ecc=(0, 2)),
        FakeGpu("GPU-2", name="Tesla V100", capability=(7, 0)),
    ]
    report = examine(tensor_parallel_size=3, device="cuda")
    assert not report["would_start"]
    assert [states(report, f"GPU {number}") for number in range(3)] == [
        ["ok", "warning"], ["ok", "warning"], ["ok", "missing"],
    ]  # fmt: skip
    found = [checks(report, f"GPU {number}")[1].found for number in range(3)]
    assert found[0] == "40.0 of 141.0 GiB are in use by others"
    assert found[1].startswith("2 uncorrectable memory errors")
    assert found[2] == "compute capability 7.0; 8.0 is needed"


def test_links_that_are_slow_or_none(gpu_machine: FakeNvml) -> None:
    for pair in (("GPU-0", "GPU-1"), ("GPU-0", "GPU-2")):
        gpu_machine.p2p[*pair, 2] = 5
    gpu_machine.p2p["GPU-0", "GPU-2", 0] = 5
    report = examine(tensor_parallel_size=3)
    assert [(check.state, check.found) for check in checks(report, "links")] == [
        ("warning", "peer access over PCIe (between NUMA nodes): 0-1"),
        ("warning", "no peer access (between NUMA nodes): 0-2"),
        ("ok", "NVLink: 1-2"),
    ]
    assert report["would_start"]


@pytest.mark.parametrize(
    ("built_for", "driver", "state"),
    [
        (None, (13, 0), "missing"),
        ((13, 0), (13, 0), "ok"),
        ((12, 8), (13, 0), "ok"),
        ((13, 0), (12, 8), "missing"),
        ((12, 8), (12, 4), "warning"),
        ((13, 0), None, "warning"),
    ],
)
def test_the_driver_must_run_torchs_cuda(built_for: Any, driver: Any, state: str) -> None:
    assert libraries.check_cuda_versions(built_for, driver).state == state


def test_flash_attention_is_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in libraries.check_flash_attention((9, 0)).found
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: SimpleNamespace())
    assert libraries.check_flash_attention((9, 0)).state == "ok"
    assert "made for compute capability 9.0" in libraries.check_flash_attention((10, 0)).found


def test_what_torch_was_built_for_is_read_without_importing_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: spec)
    assert gpus.torch_cuda() is None
    for text, version in (
        ("cuda: Optional[str] = '13.0'", (13, 0)),
        ('cuda = "12.8"', (12, 8)),
        ("cuda: Optional[str] = None", None),
    ):
        (tmp_path / "version.py").write_text(f"__version__ = '2.11.0'\n{text}\nhip = None\n")
        assert gpus.torch_cuda() == version
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: None)
    assert gpus.torch_cuda() is None


# ------------------------------------------------------------------------------------- libraries


def test_the_requirements_are_those_of_the_project() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    said = {
        "install_requires": libraries.REQUIRED,
        "server": libraries.SERVER,
        "metrics": libraries.METRICS,
        "default-model": libraries.DEFAULT_MODEL,
        "otlp": libraries.OTLP,
        "ray": libraries.RAY,
    }
    assert {*said, "cuda", "dev"} == {"install_requires", *setup["options.extras_require"]}
    for key, packages in said.items():
        section = "options" if key == "install_requires" else "options.extras_require"
        wanted = [line for line in setup[section][key].split("\n") if line]
        assert sorted(map(libraries._requirement, packages)) == sorted(wanted)


@pytest.mark.parametrize(
    ("name", "version", "state", "words"),
    [
        ("torch", None, "missing", "not installed"),
        ("torch", "2.9.1+cu130", "missing", "2.9.1+cu130 is too old, 2.11 is needed"),
        ("pyzmq", "26.0.0rc1", None, ""),
        ("fastapi", None, "warning", "not installed: no HTTP server without it"),
        ("gguf", None, "warning", "the default model"),
        ("ray", "2.9.3", "warning", "2.9.3 is too old, 2.60 is needed: no tpworker.integrations.ray without"),
    ],
)
def test_packages_that_are_missing_or_too_old(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str | None, state: str | None, words: str
) -> None:
    real = importlib.metadata.version

    def fake(asked: str) -> str:
        if asked != name:
            return real(asked)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(asked)
        return version

    monkeypatch.setattr(libraries.importlib.metadata, "version", fake)
    found = {check.subject: check for check in libraries.check_libraries("cpu", is_default_model=True)}
    assert found["libraries"].state == "ok"
    if state is None:
        assert set(found) == {"libraries"}
        return
    assert found[name].state == state
    assert words in found[name].found
    assert str(found[name].remedy).startswith("pip install")


# --------------------------------------------------------------------------------------- machine


@pytest.mark.parametrize(
    ("limit", "state"), [(65536, "ok"), (resource.RLIM_INFINITY, "ok"), (1024, "warning"), (100, "missing")]
)
def test_open_files(monkeypatch: pytest.MonkeyPatch, limit: int, state: str) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda what: (limit, 4096))
    check = machine._descriptors(2)
    assert check.state == state
    if state != "ok":
        assert str(check.remedy).startswith("ulimit -n 2048")


@pytest.mark.parametrize(
    ("device", "ranks", "cores", "state"),
    [("cpu", 2, 2, "ok"), ("cpu", 4, 2, "warning"), ("cuda", 4, 10, "ok"), ("cuda", 4, 9, "warning")],
)
def test_cores(device: str, ranks: int, cores: int, state: str) -> None:
    assert machine._cores(device, ranks, cores).state == state
    assert machine._cores("cpu", 1, 2).found == "2 for 1 rank"


def test_a_containers_cpu_limit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    monkeypatch.setattr(machine, "cpu_quota", lambda: 2.5)
    (check,) = [check for check in machine.check_machine("cpu", 4) if check.subject == "cores"]
    assert check == Check(
        "cores",
        "warning",
        "2 for 4 ranks (the container's CPU limit is 2.5): they take turns, and get slower",
        "use fewer ranks: -tp 2, or raise the limit",
    )
    assert machine._cores("cpu", 2, 2, 64.0).found == "2 for 2 ranks", "taskset, not the container"


def test_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, state in ((64 << 20, "warning"), (1 << 30, "ok")):
        monkeypatch.setattr(
            machine.os, "statvfs", lambda path, free=free: SimpleNamespace(f_bavail=free >> 12, f_frsize=4096)
        )
        assert machine._shm(2).state == state
    assert "/dev/shm" not in {check.subject for check in machine.check_machine("cuda", 1)}


def test_what_a_sandbox_forbids(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    monkeypatch.setattr(os, "pidfd_open", forbidden)
    monkeypatch.setattr(machine, "sleeper", forbidden)
    monkeypatch.setattr(socket.socket, "bind", forbidden)
    found = {check.subject: check.state for check in machine.check_machine("cpu", 1)}
    assert (found["futex"], found["shared memory"], found["abstract sockets"], found["pidfd"]) == (
        "missing", "missing", "missing", "warning",
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- model


def model_checks(device: str = "cuda", free: int = 140 * GIB, **options: Any) -> dict[str, Check]:
    config = RuntimeConfig(**{"model": str(QWEN), "load_format": "dummy", **options})
    gpus = find_gpus(_nvml(FakeGpu("GPU-1", used=141 * GIB - free), "GPU-2"), {}).gpus
    return {check.subject: check for check in model_check.check_model(config, device, gpus)}


def _nvml(*gpus: str | FakeGpu) -> Any:
    from tpworker.observe.nvml import Nvml

    return Nvml(FakeNvml(gpus))


def test_a_model_that_fits() -> None:
    found = model_checks(tensor_parallel_size=2)
    assert found["model"] == Check("model", "ok", "Qwen3ForCausalLM, 36 layers, up to 40960 tokens a request")
    assert found["memory"].state == "ok"
    # 36 layers, keys and values, 4 heads of 128 a rank, 2 bytes: 72 KiB a token.
    room = (140 * GIB - (1 << 30) - 8192e6) * 0.9 / (72 << 10)
    tokens = int(re.search(r"KV blocks for (\d+) tokens", found["memory"].found)[1])  # type: ignore[index]
    assert tokens == pytest.approx(room, rel=0.01)
    assert "7.63 GiB of weights" in found["memory"].found
    assert "72.0 KiB a token" in found["memory"].found
    found = model_checks(tensor_parallel_size=2, quantization="fp8")
    assert "4.40 GiB of weights" in found["memory"].found


def test_no_more_blocks_than_the_slots_can_use() -> None:
    found = model_checks(max_num_seqs=2, max_model_len=1000, block_size=32)["memory"].found
    assert f"KV blocks for {2 * 1024} tokens" in found


def test_a_model_that_does_not_fit() -> None:
    assert model_checks(free=16 * GIB)["memory"].state == "missing"
    few = model_checks(free=18 * GIB, tensor_parallel_size=1)["memory"]
    assert few.state == "warning"
    assert "fewer than one request may have (40960)" in few.found
    assert "--max-model-len" in str(few.remedy)
    assert model_checks(free=18 * GIB, max_model_len=512)["memory"].state == "ok"


def test_a_model_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import tpworker.ipc.limits

    for available, state in ((64 * GIB, "ok"), (15 * GIB, "missing")):
        monkeypatch.setattr(tpworker.ipc.limits, "available_bytes", lambda available=available: available)
        check = model_checks("cpu", tensor_parallel_size=2)["memory"]
        assert check.state == state
        assert "TP ranks" not in str(check.remedy), "they would share the same memory"


def test_a_model_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = model_checks(load_format="auto")["weights"]
    assert (weights.state, "has neither model.safetensors nor" in weights.found) == ("missing", True)
    assert model_checks()["tokenizer"].state == "warning"
    assert "config.json is missing" in model_checks(model=str(tmp_path))["model"].found
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_checks(model="somebody/something")["model"] == Check(
        "model", "warning", "somebody/something is not in the hub's cache", "the first start will fetch it"
    )
    for model in ("no:such/thing/here", "nonsense"):
        assert "neither a folder" in model_checks(model=model)["model"].found
    assert "is a file, and a model is a folder" in model_checks(model=str(ROOT / "README.md"))["model"].found
    assert "max_model_len=99999" in model_checks(max_model_len=99999)["model"].found


def test_the_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def check() -> Check:
        (found,) = checks(examine(device="cpu"), "model")
        return found

    name = default_model.NAME
    assert check() == Check(
        "model", "warning", f"{name} is not in the cache", "the first start will fetch it"
    )
    assert not (tmp_path / "cache").exists(), "the doctor changes nothing"
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
        assert check().state == "missing"
        assert "10 MB are free. It needs 0.5 GB there" in check().found
    folder = default_model.default_model_folder()
    folder.mkdir(parents=True)
    for file in default_model._FILES:
        (folder / file).touch()
    assert check() == Check("model", "ok", f"{name}, in {folder}")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert check().state == "missing"
    assert "cannot be stored in /proc/nowhere/tpworker/models" in check().found


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder that serving takes."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from tpworker.checkpoint.weights import shard_bytes
    from tpworker.model.families import read_spec
    from tpworker.model.tp import Shard

    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    tensors: dict[str, Any] = {}

    def note(out: Any, name: str, dim: int, split: Any) -> None:
        tensors[name] = torch.ones([split.full if at == dim else n for at, n in enumerate(out.shape)])

    spec = read_spec(folder)
    shard_bytes(spec, Shard.of(spec, 0, 1), torch.float32, look_up=note)
    names = sorted(tensors)
    files = {name: f"model-{names.index(name) % 2}.safetensors" for name in names}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    byte_tokenizer()._backend.save(str(folder / "tokenizer.json"))
    return folder


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _fewer_layers_than_the_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1})
    )


@pytest.mark.parametrize(
    ("damage", "subject", "words"),
    [
        (lambda folder: None, "", ""),
        (lambda folder: _cut(folder / "model-0.safetensors"), "weights", "is truncated"),
        (lambda folder: (folder / "model-1.safetensors").unlink(), "weights", "is missing, although"),
        (
            lambda folder: (folder / "model.safetensors.index.json").unlink(),
            "weights",
            "has neither model.safetensors nor",
        ),
        (_fewer_layers_than_the_config, "weights", "the checkpoint has no tensor"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer", "cannot be read"),
    ],
)
def test_what_serving_would_refuse(tiny: Path, damage: Any, subject: str, words: str) -> None:
    damage(tiny)
    found = model_checks("cpu", model=str(tiny), load_format="auto")
    assert {name for name, check in found.items() if check.state == "missing"} == ({subject} - {""})
    assert not subject or words in found[subject].found
    assert set(found) == {"model", "weights", "tokenizer", "memory"}


def test_what_the_first_start_fetches_is_no_obstacle(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpworker.checkpoint.resolve.cached_folder", lambda name: tiny)
    hub = {"model": "some/model", "load_format": "auto"}
    assert {check.state for check in model_checks("cpu", **hub).values()} == {"ok"}
    (tiny / "model-1.safetensors").unlink()
    (tiny / "tokenizer.json").unlink()
    found = model_checks("cpu", **hub)
    assert found["weights"] == Check(
        "weights", "warning", "model-1.safetensors not in the hub's cache", "the first start will fetch them"
    )
    assert found["tokenizer"].state == "warning"
    (tiny / "model.safetensors.index.json").unlink()
    assert model_checks("cpu", **hub)["weights"].found == "model.safetensors not in the hub's cache"
