"""Sleeping in the kernel until a word of shared memory changes: Linux' futex(2), through ctypes.

Python has no binding for it. Of what Python does bind, nothing fits: an eventfd, a pipe or a semaphore
wakes as many as were counted in, so that a writer would have to know how many sleep; a futex wakes
whoever sleeps on that word, costs the writer one system call, and needs no descriptor.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Callable
from functools import partial

_SYS_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
# Not FUTEX_PRIVATE_FLAG: the word is shared between processes, and the kernel finds it by file and offset.
_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
_ALL = 2**31 - 1

# EAGAIN: the word has changed already. EINTR: a signal; its Python handler runs when we are back.
_WOKEN = (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT)

# The futex is 32 bits, the lower half of a 64-bit word.
LOW_HALF = 0 if sys.byteorder == "little" else 4


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _timespec(seconds: float) -> _Timespec:
    return _Timespec(*divmod(round(seconds * 1e9), 1_000_000_000))


# A sleeper lets go of the GIL (CDLL). A wake-up keeps it (PyDLL): it never blocks, and letting go could
# cost the caller a whole switch interval (5 ms) when another thread of its process is busy.
_sleep = ctypes.CDLL(None, use_errno=True).syscall
_sleep.restype = ctypes.c_long
_call = ctypes.PyDLL(None).syscall
_call.restype = ctypes.c_long


def _number() -> int:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _SYS_FUTEX:
        raise OSError(errno.ENOSYS, f"futex: {sys.platform} on {machine} is not known, only 64-bit Linux on "
                      + ", ".join(_SYS_FUTEX))  # fmt: skip
    return _SYS_FUTEX[machine]


def sleeper(address: int, longest: float) -> Callable[[int, float], None]:
    """A function `sleep(value, seconds)`: sleeps as long as the low half of the word at `address` is `value`.

    It returns when somebody wakes the word's sleepers, after `seconds`, after `longest` seconds, on a
    signal, for no reason, or at once if the half is not `value` any more, which the kernel finds out under
    the lock that a waker needs too: no wake-up is lost. In short, the caller looks at the word again.

    Args:
        address: of the 64-bit word, aligned to 8 bytes.
        longest: upper bound of one sleep, in seconds.
    """
    call = partial(_sleep, ctypes.c_long(_number()), ctypes.c_void_p(address + LOW_HALF),
                   ctypes.c_long(_FUTEX_WAIT))  # fmt: skip
    whole = ctypes.byref(_timespec(longest))

    def sleep(value: int, seconds: float) -> None:
        time = whole if seconds >= longest else ctypes.byref(_timespec(max(0.0, seconds)))
        if call(ctypes.c_uint32(value), time) == -1:
            error = ctypes.get_errno()
            if error not in _WOKEN:
                raise OSError(error, f"futex: {os.strerror(error)}")

    return sleep


def waker(address: int) -> Callable[[], int]:
    """A function that wakes everybody who sleeps on the low half of the 64-bit word at `address`.

    It returns how many it woke; it costs about half a microsecond when there are none.
    """
    return partial(_call, ctypes.c_long(_number()), ctypes.c_void_p(address + LOW_HALF),
                   ctypes.c_long(_FUTEX_WAKE), ctypes.c_long(_ALL))  # fmt: skip
