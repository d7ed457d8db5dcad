"""Host buffers through which a plan's deltas reach the device.

A buffer belongs to one step from the moment it is filled until the device has run that step: the copy out
of it is asynchronous. `StagingPool.take` therefore never waits: it hands out a buffer that was given back,
or makes one more. Steps in flight are bounded, so their number is too.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpworker.rank.device import Device

_ALIGNMENT = 16
_INITIAL_BYTES = 1 << 18
_TORCH_DTYPE = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}


class StagingBuffer:
    """Arrays for one step, put one behind the other and sent to the device in one copy."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._host = device.host_buffer(_INITIAL_BYTES)
        self._on_device = device.upload_buffer(_INITIAL_BYTES)
        self._used = 0
        self._sent = False

    def clear(self) -> None:
        """Empties it, for the next step."""
        self._used = 0
        self._sent = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to send."""
        return not self._used

    def put(self, array: NDArray[np.generic]) -> StagedArray:
        """Adds an array (int64, int32 or float32); it can be read on the device after `send`."""
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        end = start + array.nbytes
        if end > self._host.numel():
            larger = self._device.host_buffer(max(end, 2 * self._host.numel()))
            larger.numpy()[: self._used] = self._host.numpy()[: self._used]
            self._host = larger
            self._on_device = self._device.upload_buffer(larger.numel())
        self._host.numpy()[start:end] = np.frombuffer(array.tobytes(), np.uint8)
        self._used = end
        return StagedArray(self, start, end, _TORCH_DTYPE[array.dtype], array.shape)

    def send(self) -> None:
        """Copies everything to the device: work of the upload stream, which the step waits for."""
        self._on_device[: self._used].copy_(self._host[: self._used], non_blocking=True)
        self._sent = True

    def view(self, start: int, end: int) -> Tensor:
        assert self._sent, "read before it was sent"
        return self._on_device[start:end]


class StagedArray:
    """Where an array lies in a `StagingBuffer`."""

    __slots__ = ("_buffer", "_dtype", "_end", "_shape", "_start")

    def __init__(
        self, buffer: StagingBuffer, start: int, end: int, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        self._buffer, self._start, self._end, self._dtype, self._shape = buffer, start, end, dtype, shape

    def get(self) -> Tensor:
        """The array on the device, of the shape and dtype it was put with."""
        return self._buffer.view(self._start, self._end).view(self._dtype).view(self._shape)


class StagingPool:
    """Buffers that are not in use. `take` is the launch thread's, `give_back` the publisher's.

    Args:
        device: where they lead to.
        count: how many to make beforehand: it takes long where the memory is pinned.
    """

    def __init__(self, device: Device, count: int = 0) -> None:
        self._device = device
        self._free = deque(StagingBuffer(device) for _ in range(count))  # its append and pop are atomic

    def take(self) -> StagingBuffer:
        """An empty buffer."""
        try:
            buffer = self._free.pop()
        except IndexError:
            return StagingBuffer(self._device)
        buffer.clear()
        return buffer

    def give_back(self, buffer: StagingBuffer) -> None:
        """The device has run the step that used it."""
        self._free.append(buffer)
