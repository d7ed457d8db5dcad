"""The GPUs of this machine and their links, as the driver's management library (NVML) tells of them.

No CUDA context is made: this may be asked before CUDA starts, and by processes that never use it. Every
question may go unanswered (virtual machines, containers, MIG and old drivers each refuse some): the answer is
None then.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

logger = logging.getLogger(__name__)

# Of nvml.h. The Python package gives one of them a wrong type (a tuple), others are missing in older ones.
_P2P_READ, _P2P_WRITE, _P2P_NVLINK = 0, 1, 2
_P2P_OK = 0
_AFFINITY_NODE = 0
_TEMPERATURE_GPU = 0
_CORRECTED, _UNCORRECTED = 0, 1
_SINCE_DRIVER_LOAD = 0
_ON = 1
_LIBRARY_NOT_FOUND = 12
_XID_EVENT = 0x8
_MOST_NVLINKS = 18
_WORD = 64  # bits of one element of a CPU or node set

_PATHS = {
    0: "one board",
    10: "one PCIe switch",
    20: "several PCIe switches",
    30: "a PCIe host bridge",
    40: "one NUMA node",
    50: "between NUMA nodes",
}
"""How two GPUs reach each other over PCIe, by nvmlGpuTopologyLevel_t."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. What the driver does not tell is None."""

    index: int
    """As CUDA numbers those that this process may use."""
    uuid: str
    name: str
    memory: int
    """Bytes in all."""
    free: int | None
    """Bytes that nobody uses."""
    capability: tuple[int, int] | None
    """CUDA compute capability."""
    pci: str | None
    """PCI bus id."""
    numa_node: int | None
    cpus: frozenset[int] | None
    """CPUs near it."""
    nvlinks: int | None
    """NVLinks that are up, to other GPUs or to a switch."""


@dataclass(frozen=True, slots=True)
class Link:
    """How one GPU reaches another."""

    peer_access: bool | None
    """Whether each may read and write the other's memory."""
    nvlink: bool | None
    """Whether that goes over NVLink."""
    path: str | None
    """Over PCIe, in words."""

    def __str__(self) -> str:
        if self.peer_access:
            return "NVLink" if self.nvlink else f"peer access over PCIe ({self.path or 'path unknown'})"
        return "unknown" if self.peer_access is None else f"no peer access ({self.path or 'path unknown'})"


@dataclass(frozen=True, slots=True)
class Reading:
    """How a GPU does at an instant."""

    temperature: int | None
    """°C."""
    power: float | None
    """W."""
    memory_used: int | None
    """Bytes, of all processes."""
    ecc_corrected: int | None
    """Memory errors since the driver was loaded."""
    ecc_uncorrected: int | None
    utilization: int | None = None
    """Percent of the last moments in which some kernel ran."""


@dataclass(frozen=True, slots=True)
class Found:
    """The GPUs that this process may use, in CUDA's order."""

    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None
    """Why there are fewer than one might think."""
    has_library: bool = True
    """Whether there is a library of the driver's to ask; a machine without NVIDIA GPUs has none."""


class NvmlUnavailable(Exception):
    """There is nothing to ask; says why."""

    def __init__(self, message: str, has_library: bool = True) -> None:
        super().__init__(message)
        self.has_library = has_library


class Nvml:
    """A connection to the driver. Use it as a context manager, or `close` it.

    Args:
        library: `pynvml`, or what behaves like it.

    Raises:
        NvmlUnavailable: no driver, or one that does not answer.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        try:
            library.nvmlInit()
        except Exception as error:
            has_library = getattr(error, "value", None) != _LIBRARY_NOT_FOUND
            raise NvmlUnavailable(f"the NVIDIA driver does not answer ({error})", has_library) from error

    @classmethod
    def connect(cls) -> Nvml:
        """To this machine's driver.

        Raises:
            NvmlUnavailable: there is none, or the package nvidia-ml-py is missing.
        """
        try:
            import pynvml
        except ImportError:
            raise NvmlUnavailable("the package nvidia-ml-py is not installed") from None
        return cls(pynvml)

    def close(self) -> None:
        """Ends it. GPUs may be asked nothing any more."""
        with contextlib.suppress(Exception):
            self._library.nvmlShutdown()

    def ask(self, function: str, *arguments: Any) -> Any:
        """What the NVML function of that name answers; None if it does not."""
        return self._call(function, *arguments)[1]

    def _call(self, function: str, *arguments: Any) -> tuple[bool, Any]:
        """Whether it worked, and what it returned.

        Whatever goes wrong is no answer. The bindings raise their own errors for what a driver refuses, and
        others where they are older than a function or meet text that they cannot decode; and looking at a GPU
        must never be what ends the one who uses it.
        """
        try:
            return True, getattr(self._library, function)(*arguments)
        except Exception as error:
            logger.debug("%s: %s", function, error)
            return False, None

    # ------------------------------------------------------------------------------- GPUs

    @cached_property
    def handles(self) -> dict[str, Any]:
        """NVML's handle of every GPU of the machine, by UUID, in the order of the PCI bus."""
        handles = {}
        for index in range(self.ask("nvmlDeviceGetCount") or 0):
            handle = self.ask("nvmlDeviceGetHandleByIndex", index)
            uuid = None if handle is None else self.ask("nvmlDeviceGetUUID", handle)
            if uuid is not None:
                handles[uuid] = handle
        return handles

    @property
    def driver(self) -> str | None:
        """The driver's version."""
        version = self.ask("nvmlSystemGetDriverVersion")
        return None if version is None else str(version)

    @property
    def cuda_version(self) -> tuple[int, int] | None:
        """The newest CUDA that the driver runs."""
        version = self.ask("nvmlSystemGetCudaDriverVersion")
        return None if version is None else (version // 1000, version % 1000 // 10)

    def gpu(self, uuid: str, index: int) -> Gpu:
        """One of `handles`, which CUDA calls `index`."""
        handle = self.handles[uuid]
        memory = self.ask("nvmlDeviceGetMemoryInfo", handle)
        pci = self.ask("nvmlDeviceGetPciInfo", handle)
        capability = self.ask("nvmlDeviceGetCudaComputeCapability", handle)
        nodes = self._set(self.ask("nvmlDeviceGetMemoryAffinity", handle, 16, _AFFINITY_NODE))
        states = [self.ask("nvmlDeviceGetNvLinkState", handle, link) for link in range(_MOST_NVLINKS)]
        links = [state for state in states if state is not None]
        return Gpu(
            index=index,
            uuid=uuid,
            name=self.ask("nvmlDeviceGetName", handle) or "unknown GPU",
            memory=0 if memory is None else memory.total,
            free=None if memory is None else memory.free,
            capability=None if capability is None else (capability[0], capability[1]),
            pci=None if pci is None else _text(pci.busId),
            numa_node=min(nodes) if nodes and len(nodes) == 1 else None,
            cpus=self._cpus(handle),
            nvlinks=sum(links) if links else None,
        )

    def _cpus(self, handle: Any) -> frozenset[int] | None:
        words = -(-(os.cpu_count() or 1) // _WORD)
        near = self._set(self.ask("nvmlDeviceGetCpuAffinityWithinScope", handle, words, _AFFINITY_NODE))
        return near or self._set(self.ask("nvmlDeviceGetCpuAffinity", handle, words)) or None

    @staticmethod
    def _set(words: Sequence[int] | None) -> frozenset[int] | None:
        if words is None:
            return None
        bits = enumerate(words)
        return frozenset(_WORD * at + bit for at, word in bits for bit in range(_WORD) if word >> bit & 1)

    def is_partitioned(self, uuid: str) -> bool:
        """Whether the GPU is in MIG mode: cut up into instances."""
        mode = self.ask("nvmlDeviceGetMigMode", self.handles[uuid])
        return mode is not None and mode[0] == _ON

    def link(self, first: Gpu, second: Gpu) -> Link:
        """How two different GPUs reach each other."""
        pair = self.handles[first.uuid], self.handles[second.uuid]
        reads, writes, nvlink = (
            self.ask("nvmlDeviceGetP2PStatus", *pair, what) for what in (_P2P_READ, _P2P_WRITE, _P2P_NVLINK)
        )
        level = self.ask("nvmlDeviceGetTopologyCommonAncestor", *pair)
        return Link(
            peer_access=None if reads is None or writes is None else reads == writes == _P2P_OK,
            nvlink=None if nvlink is None else nvlink == _P2P_OK,
            path=_PATHS.get(level),
        )

    def read(self, uuid: str) -> Reading:
        """How one of `handles` does now."""
        handle = self.handles[uuid]
        memory = self.ask("nvmlDeviceGetMemoryInfo", handle)
        milliwatts = self.ask("nvmlDeviceGetPowerUsage", handle)
        busy = self.ask("nvmlDeviceGetUtilizationRates", handle)
        corrected, uncorrected = (
            self.ask("nvmlDeviceGetTotalEccErrors", handle, kind, _SINCE_DRIVER_LOAD)
            for kind in (_CORRECTED, _UNCORRECTED)
        )
        return Reading(
            temperature=self.ask("nvmlDeviceGetTemperature", handle, _TEMPERATURE_GPU),
            power=None if milliwatts is None else milliwatts / 1000,
            memory_used=None if memory is None else memory.used,
            ecc_corrected=corrected,
            ecc_uncorrected=uncorrected,
            utilization=None if busy is None else int(busy.gpu),
        )

    def uncorrected_errors(self, uuid: str) -> int | None:
        """Memory errors of one of `handles` that could not be corrected, since the driver was loaded."""
        handle = self.handles[uuid]
        count = self.ask("nvmlDeviceGetTotalEccErrors", handle, _UNCORRECTED, _SINCE_DRIVER_LOAD)
        return None if count is None else int(count)

    # ------------------------------------------------------------------------------- events

    def watch_xids(self, uuids: Sequence[str]) -> Any:
        """A set of the critical errors (Xid) that these GPUs have from now on; None if none is told of."""
        events = self.ask("nvmlEventSetCreate")
        watched = [uuid for uuid in uuids if events is not None and self._watch(uuid, events)]
        if events is not None and not watched:
            self.ask("nvmlEventSetFree", events)
        return events if watched else None

    def _watch(self, uuid: str, events: Any) -> bool:
        handle = self.handles[uuid]
        types = self.ask("nvmlDeviceGetSupportedEventTypes", handle)
        if types is None or not types & _XID_EVENT:
            return False
        return self._call("nvmlDeviceRegisterEvents", handle, _XID_EVENT, events)[0]

    def next_xid(self, events: Any, milliseconds: int) -> tuple[str | None, int] | None:
        """UUID and number of the next critical error of a set; None: there was none in time.

        Sleeps in the kernel, without the GIL.
        """
        event = self.ask("nvmlEventSetWait", events, milliseconds)
        if event is None:
            return None
        uuid = self.ask("nvmlDeviceGetUUID", event.device)
        if uuid is None:  # a GPU that is lost does not answer
            uuid = next((uuid for uuid, handle in self.handles.items() if _same(handle, event.device)), None)
        return uuid, int(event.eventData)

    def free(self, events: Any) -> None:
        """Ends a set of `watch_xids`."""
        self.ask("nvmlEventSetFree", events)


def _same(first: Any, second: Any) -> bool:
    """Whether two of the library's handles, which are pointers, are of one GPU."""
    try:
        return first is second or bytes(first) == bytes(second)
    except TypeError:  # no pointers
        return False


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


# ------------------------------------------------------------------------- which of them are ours


def find_gpus(nvml: Nvml | None = None, environment: Mapping[str, str] | None = None) -> Found:
    """The GPUs that CUDA will show to a process with this environment, and how it will number them.

    Args:
        nvml: a connection; None: one is made, and ended again.
        environment: None: this process's own.
    """
    if nvml is None:
        try:
            with contextlib.closing(Nvml.connect()) as nvml:
                return find_gpus(nvml, environment)
        except NvmlUnavailable as error:
            return Found(problem=str(error), has_library=error.has_library)
    environment = os.environ if environment is None else environment
    uuids = list(nvml.handles)
    if not uuids:
        return Found(problem="the NVIDIA driver reports no GPU")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    problem = None
    if visible is not None:
        uuids, problem = _visible(visible, uuids)
    gpus = tuple(nvml.gpu(uuid, index) for index, uuid in enumerate(uuids))
    for gpu in gpus:
        if nvml.is_partitioned(gpu.uuid):
            # CUDA shows a process one instance of one such GPU, and then no other GPU.
            return Found(
                problem=f"GPU {gpu.index} ({gpu.name}, {gpu.uuid}) is in MIG mode, and a TP rank needs a "
                "whole GPU: end that mode (nvidia-smi -mig 0), or leave it out of CUDA_VISIBLE_DEVICES"
            )
    order = environment.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # which children of ours get, see children.py
    if order != "PCI_BUS_ID" and len({nvml.ask("nvmlDeviceGetName", h) for h in nvml.handles.values()}) > 1:
        return Found(
            problem=f"there are different models of GPU, and with CUDA_DEVICE_ORDER={order} nobody can tell "
            "before CUDA starts which rank would get which: leave it out, or set it to PCI_BUS_ID"
        )
    return Found(gpus, problem)


def _visible(value: str, uuids: list[str]) -> tuple[list[str], str | None]:
    """What CUDA makes of CUDA_VISIBLE_DEVICES: numbers, or UUIDs, whose ends may be missing. The list ends at
    the first entry that is none of them, and whatever occurs twice makes it empty."""
    told = f"CUDA_VISIBLE_DEVICES={value}"
    if value.strip() in ("", "-1"):
        return [], f"{told} hides all GPUs"
    chosen: list[str] = []
    for entry in (part.strip() for part in value.split(",")):
        if entry.startswith("MIG-"):
            return [], f"{told} names a MIG instance, and a TP rank needs a whole GPU: name GPUs instead"
        if entry.startswith("GPU-"):
            matches = [uuid for uuid in uuids if uuid.startswith(entry)]
        else:
            matches = uuids[int(entry) : int(entry) + 1] if entry.isdecimal() else []
        if len(matches) != 1:
            return chosen, f"{told}: {entry!r} is no GPU of the {len(uuids)} here, and ends the list"
        if matches[0] in chosen:
            return [], f"{told} names a GPU twice, for which CUDA shows none at all"
        chosen += matches
    return chosen, None


def links(nvml: Nvml, gpus: Sequence[Gpu]) -> Iterator[tuple[Gpu, Gpu, Link]]:
    """How each two of them reach each other, each pair once."""
    for at, first in enumerate(gpus):
        for second in gpus[at + 1 :]:
            yield first, second, nvml.link(first, second)
