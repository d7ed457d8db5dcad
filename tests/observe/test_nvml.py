"""What a driver tells, what it refuses to tell, and which of its GPUs are ours."""

from __future__ import annotations

import sys
from contextlib import closing

import pytest

from tests.observe.fake_nvml import GIB, FakeGpu, FakeNvml
from tpworker.observe.nvml import Found, Link, Nvml, NvmlUnavailable, Reading, find_gpus, links

FUNCTIONS = [name for name in vars(FakeNvml) if name.startswith("nvml") and name != "nvmlInit"]
UUIDS = ["GPU-aaaa1", "GPU-aaab2", "GPU-cccc3"]


def found(visible: str | None = None, *gpus: str | FakeGpu, **environment: str) -> Found:
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    return find_gpus(Nvml(FakeNvml(gpus or UUIDS)), environment)


def uuids(result: Found) -> list[str]:
    return [gpu.uuid for gpu in result.gpus]


def test_a_gpu_is_told_of() -> None:
    gpu = FakeGpu("GPU-1", bus_id=b"00000000:18:00.0", cpus=(1 << 63 | 1, 0b10), nodes=(0b10,))
    (told,) = found(None, gpu).gpus
    assert (told.index, told.uuid, told.name) == (0, "GPU-1", "NVIDIA H200")
    assert (told.memory, told.free, told.capability) == (141 * GIB, 140 * GIB, (9, 0))
    assert (told.pci, told.numa_node, told.nvlinks) == ("00000000:18:00.0", 1, 18)
    assert told.cpus == {0, 63, 65}


def test_how_a_gpu_does() -> None:
    nvml = Nvml(FakeNvml(UUIDS))
    assert nvml.read(UUIDS[1]) == Reading(34, 75.5, 1 * GIB, 3, 0, 55)
    assert (nvml.driver, nvml.cuda_version) == ("580.159.04", (13, 0))


@pytest.mark.parametrize("manner", ["refused", "broken"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_whatever_a_driver_does_not_answer_is_none(function: str, manner: str) -> None:
    names = [function]
    if function == "nvmlDeviceGetCpuAffinity":  # it is asked where the other one does not answer
        names.append("nvmlDeviceGetCpuAffinityWithinScope")
    library = FakeNvml(UUIDS, **{manner: names})
    with closing(Nvml(library)) as nvml:
        result = find_gpus(nvml, {})
        nvml.driver  # noqa: B018
        nvml.cuda_version  # noqa: B018
        for gpu in result.gpus:
            nvml.read(gpu.uuid)
        assert len(list(links(nvml, result.gpus))) == (3 if result.gpus else 0)
        events = nvml.watch_xids(uuids(result))
        if events is not None:
            nvml.next_xid(events, 1)
            nvml.free(events)
    assert function in library.calls


def test_nothing_but_names_is_enough() -> None:
    answered = {"nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID", "nvmlShutdown"}
    nvml = Nvml(FakeNvml(UUIDS, refused=[name for name in FUNCTIONS if name not in answered]))
    result = find_gpus(nvml, {})
    assert uuids(result) == UUIDS
    gpu = result.gpus[0]
    assert (gpu.name, gpu.memory) == ("unknown GPU", 0)
    assert {gpu.free, gpu.capability, gpu.pci, gpu.numa_node, gpu.cpus, gpu.nvlinks} == {None}
    assert nvml.read(gpu.uuid) == Reading(None, None, None, None, None)
    assert nvml.link(*result.gpus[:2]) == Link(None, None, None)
    assert str(nvml.link(*result.gpus[:2])) == "unknown"
    assert nvml.watch_xids(UUIDS) is None


def test_an_old_package_lacks_functions() -> None:
    class Old(FakeNvml):
        nvmlDeviceGetCpuAffinityWithinScope = property()  # type: ignore[assignment]

    assert find_gpus(Nvml(Old(["GPU-1"])), {}).gpus[0].cpus == {0, 1, 2, 3}


def test_without_a_driver_there_are_no_gpus_and_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NvmlUnavailable, match="Driver Not Loaded"):
        Nvml(FakeNvml(UUIDS, driver=False))
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(UUIDS, driver=False))
    assert find_gpus() == Found(problem="the NVIDIA driver does not answer (Driver Not Loaded)")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_gpus() == Found(problem="the package nvidia-ml-py is not installed")
    empty = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", empty)
    assert find_gpus() == Found(problem="the NVIDIA driver reports no GPU")
    assert empty.num_open == 0


def test_a_connection_of_its_own_is_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    library = FakeNvml(UUIDS)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert uuids(find_gpus()) == UUIDS
    assert library.num_open == 0


@pytest.mark.parametrize(
    ("visible", "indices", "why"),
    [
        (None, [0, 1, 2], None),
        ("2,0", [2, 0], None),
        (" 1 , 2", [1, 2], None),
        ("GPU-cccc3,GPU-aaaa1", [2, 0], None),
        ("GPU-c,1", [2, 1], None),
        ("GPU-aaa", [], "'GPU-aaa' is no GPU of the 3 here"),  # two begin so
        ("1,7,0", [1], "'7' is no GPU of the 3 here, and ends the list"),
        ("0,-1,1", [0], "'-1' is no GPU"),
        ("0,x", [0], "'x' is no GPU"),
        ("0,GPU-aaaa1", [], "names a GPU twice"),
        ("", [], "hides all GPUs"),
        ("-1", [], "hides all GPUs"),
        ("MIG-4b2c", [], "names a MIG instance"),
    ],
)
def test_cuda_visible_devices_chooses_and_orders(
    visible: str | None, indices: list[int], why: str | None
) -> None:
    result = found(visible)
    assert uuids(result) == [UUIDS[index] for index in indices]
    assert [gpu.index for gpu in result.gpus] == list(range(len(indices))), "as CUDA numbers them then"
    assert (result.problem is None) if why is None else (why in str(result.problem))


def test_mig_is_refused_by_name_where_it_would_be_used() -> None:
    gpus = ["GPU-1", FakeGpu("GPU-2", name="NVIDIA H100", is_mig=True)]
    result = found(None, *gpus)
    assert not result.gpus
    assert "GPU 1 (NVIDIA H100, GPU-2) is in MIG mode" in str(result.problem)
    assert uuids(found("0", *gpus)) == ["GPU-1"]


def test_different_models_in_an_order_of_cudas_own_are_refused() -> None:
    gpus = ["GPU-1", FakeGpu("GPU-2", name="NVIDIA L4")]
    for order in ({}, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}):
        assert uuids(found(None, *gpus, **order)) == ["GPU-1", "GPU-2"]
    assert uuids(found(None, CUDA_DEVICE_ORDER="FASTEST_FIRST")) == UUIDS, "all alike"
    for visible in (None, "1"):  # which one is number 1 depends on the order too
        result = found(visible, *gpus, CUDA_DEVICE_ORDER="FASTEST_FIRST")
        assert not result.gpus
        assert "CUDA_DEVICE_ORDER=FASTEST_FIRST nobody can tell" in str(result.problem)


def test_links() -> None:
    library = FakeNvml(UUIDS)
    library.p2p = {
        ("GPU-aaaa1", "GPU-cccc3", 2): 5,
        ("GPU-aaab2", "GPU-cccc3", 1): 1,
        ("GPU-aaab2", "GPU-cccc3", 2): 5,
    }
    nvml = Nvml(library)
    told = {(one.index, two.index): link for one, two, link in links(nvml, find_gpus(nvml, {}).gpus)}
    assert told == {
        (0, 1): Link(True, True, "between NUMA nodes"),
        (0, 2): Link(True, False, "between NUMA nodes"),
        (1, 2): Link(False, False, "between NUMA nodes"),
    }
    assert [str(link) for link in told.values()] == [
        "NVLink",
        "peer access over PCIe (between NUMA nodes)",
        "no peer access (between NUMA nodes)",
    ]


def test_errors_of_the_gpus_that_are_watched() -> None:
    library = FakeNvml(UUIDS)
    nvml = Nvml(library)
    events = nvml.watch_xids(UUIDS[:2])
    assert library.registered == UUIDS[:2]
    library.events = [(library.gpus[1], 79)]
    assert nvml.next_xid(events, 1) == ("GPU-aaab2", 79)
    assert nvml.next_xid(events, 1) is None
    nvml.free(events)
    assert library.freed == 1


def test_a_set_that_watches_nothing_is_freed() -> None:
    library = FakeNvml(UUIDS, refused=["nvmlDeviceRegisterEvents"])
    assert Nvml(library).watch_xids(UUIDS) is None
    assert library.freed == 1
