"""What stands in the place of pynvml: a driver with some GPUs, which refuses what it is told to refuse."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

GIB = 1 << 30


@dataclass
class FakeGpu:
    """One GPU; also the handle that the library gives for it."""

    uuid: str
    name: str = "NVIDIA H200"
    total: int = 141 * GIB
    used: int = 1 * GIB
    capability: tuple[int, int] = (9, 0)
    bus_id: str | bytes = "00000000:18:00.0"
    cpus: tuple[int, ...] = (0b1111,)
    nodes: tuple[int, ...] = (0b1, 0)
    nvlinks: tuple[int, ...] = (1,) * 18
    is_mig: bool = False
    temperature: int = 34
    milliwatts: int = 75_500
    ecc: tuple[int, int] = (3, 0)
    utilization: int = 55


class FakeNvml:
    """The functions of pynvml that are used, for GPUs in the order of their bus.

    Args:
        gpus: UUIDs, or `FakeGpu`s.
        refused: names of functions that raise NVMLError, as a driver in a virtual machine does.
        broken: names that raise what no binding should.
        driver: whether there is one.
    """

    class NVMLError(Exception):
        pass

    def __init__(
        self,
        gpus: Sequence[str | FakeGpu] = (),
        refused: Sequence[str] = (),
        broken: Sequence[str] = (),
        driver: bool = True,
    ) -> None:
        self.gpus = [FakeGpu(gpu) if isinstance(gpu, str) else gpu for gpu in gpus]
        self.refused, self.broken, self.driver = set(refused), set(broken), driver
        self.num_open = 0
        self.p2p: dict[tuple[str, str, int], int] = {}
        """Status of a pair and an index of nvmlDeviceGetP2PStatus, 0 (OK) unless told otherwise."""
        self.level = 50
        self.registered: list[str] = []
        self.events: list[tuple[FakeGpu, int]] = []
        self.freed = 0
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml"):
            self.calls.append(name)
            if name in self.broken:
                raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no text")
            if name in self.refused or not (self.num_open or name == "nvmlInit"):
                raise self.NVMLError("Not Supported")
        return super().__getattribute__(name)

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.159.04"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 13000

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str:
        return gpu.name

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> Any:
        return SimpleNamespace(total=gpu.total, used=gpu.used, free=gpu.total - gpu.used)

    def nvmlDeviceGetCudaComputeCapability(self, gpu: FakeGpu) -> tuple[int, int]:
        return gpu.capability

    def nvmlDeviceGetPciInfo(self, gpu: FakeGpu) -> Any:
        return SimpleNamespace(busId=gpu.bus_id)

    def nvmlDeviceGetMemoryAffinity(self, gpu: FakeGpu, size: int, scope: int) -> tuple[int, ...]:
        return gpu.nodes

    def nvmlDeviceGetCpuAffinityWithinScope(self, gpu: FakeGpu, size: int, scope: int) -> tuple[int, ...]:
        return gpu.cpus

    def nvmlDeviceGetCpuAffinity(self, gpu: FakeGpu, size: int) -> tuple[int, ...]:
        return gpu.cpus

    def nvmlDeviceGetNvLinkState(self, gpu: FakeGpu, link: int) -> int:
        if link >= len(gpu.nvlinks):
            raise self.NVMLError("Invalid Argument")
        return gpu.nvlinks[link]

    def nvmlDeviceGetMigMode(self, gpu: FakeGpu) -> list[int]:
        return [int(gpu.is_mig), int(gpu.is_mig)]

    def nvmlDeviceGetP2PStatus(self, first: FakeGpu, second: FakeGpu, what: int) -> int:
        return self.p2p.get((first.uuid, second.uuid, what), 0)

    def nvmlDeviceGetTopologyCommonAncestor(self, first: FakeGpu, second: FakeGpu) -> int:
        return self.level

    def nvmlDeviceGetTemperature(self, gpu: FakeGpu, sensor: int) -> int:
        return gpu.temperature

    def nvmlDeviceGetPowerUsage(self, gpu: FakeGpu) -> int:
        return gpu.milliwatts

    def nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu) -> Any:
        return SimpleNamespace(gpu=gpu.utilization, memory=1)

    def nvmlDeviceGetTotalEccErrors(self, gpu: FakeGpu, kind: int, counter: int) -> int:
        return gpu.ecc[kind]

    def nvmlEventSetCreate(self) -> object:
        return self.registered

    def nvmlDeviceGetSupportedEventTypes(self, gpu: FakeGpu) -> int:
        return 0xF

    def nvmlDeviceRegisterEvents(self, gpu: FakeGpu, types: int, events: object) -> None:
        assert types == 0x8
        assert events is self.registered
        self.registered.append(gpu.uuid)

    def nvmlEventSetWait(self, events: object, milliseconds: int) -> Any:
        if not self.events:
            time.sleep(min(milliseconds, 5) / 1000)
            raise self.NVMLError("Timeout")
        gpu, xid = self.events.pop(0)
        return SimpleNamespace(device=gpu, eventData=xid)

    def nvmlEventSetFree(self, events: object) -> None:
        self.freed += 1
