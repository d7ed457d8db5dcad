"""CUDA's driver, through ctypes: memory of a GPU that one process owns and others of this host map.

No torch, since the process that owns the memory needs none of it (rank/keeper.py).
"""

from __future__ import annotations

import ctypes
from typing import Any

HANDLE_BYTES = 64
"""Of what `export` returns."""

_LIBRARY = "libcuda.so.1"
_COMPUTE_MODE = 20  # CU_DEVICE_ATTRIBUTE_COMPUTE_MODE
_MAP_FLAGS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, which there is no call without
_ROUND = 2 << 20  # less would lie in one allocation with others, which are exported and freed together


class DriverError(Exception):
    """A call of the driver has failed, or there is no driver."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class Driver:
    """The driver of this process. Addresses are those of GPU memory, as this process sees them.

    Raises:
        DriverError: there is none; as every method does whose call fails.
    """

    def __init__(self) -> None:
        try:
            self._library: Any = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise DriverError(f"there is no driver of CUDA's: {error}") from None
        self._call("cuInit", 0)
        self._contexts: dict[int, ctypes.c_void_p] = {}

    def enter(self, index: int) -> None:
        """Makes the GPU's context, if it is not there, and has this thread use it.

        Args:
            index: as CUDA numbers the GPUs that this process may use.
        """
        if index not in self._contexts:
            device, context, mode = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
            self._call("cuDeviceGet", ctypes.byref(device), index)
            self._call("cuDeviceGetAttribute", ctypes.byref(mode), _COMPUTE_MODE, device)
            if mode.value:
                raise DriverError(
                    "one process alone may use this GPU (nvidia-smi --compute-mode=DEFAULT lets more)"
                )
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._contexts[index] = context
        self._call("cuCtxSetCurrent", self._contexts[index])

    def allocate(self, num_bytes: int) -> int:
        """The address of new memory, which holds anything."""
        address = ctypes.c_uint64()
        rounded = -(-num_bytes // _ROUND) * _ROUND
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(rounded))
        return address.value

    def free(self, address: int) -> None:
        """Gives back what was allocated, which nobody has mapped any more."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def export(self, address: int) -> bytes:
        """A handle by which other processes can map what was allocated."""
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(memoryview(handle).cast("B"))

    def map(self, handle: bytes) -> int:
        """The address here of another process's memory; not twice for the same."""
        address = ctypes.c_uint64()
        value = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), value, ctypes.c_uint(_MAP_FLAGS))
        return address.value

    def unmap(self, address: int) -> None:
        """Ends a mapping, which no work uses any more."""
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(text))
            raise DriverError(f"{name} failed: {(text.value or b'unknown').decode()} ({status})")
