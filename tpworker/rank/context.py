"""CUDA's context, made in a thread while Python imports torch: half a second beside three.

This comes before torch, so the driver is asked through ctypes. torch finds the context there and takes it.
"""

from __future__ import annotations

import ctypes
import os
import threading

_LIBRARY = "libcuda.so.1"


def show_gpus(uuids: tuple[str, ...]) -> None:
    """Has CUDA show this process these GPUs, of all ranks, in rank order: what started it may show it its own
    alone. It must not have looked for one yet. None: it sees what it sees."""
    if uuids:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(uuids)


def open_early(index: int) -> threading.Thread:
    """Begins to make the context of a GPU, and returns at once.

    What goes wrong is not told: torch will make the context itself then, or say what is wrong.

    Args:
        index: as CUDA numbers the GPUs that this process may use.
    """
    thread = threading.Thread(target=_retain, args=(index,), name="tpworker-context", daemon=True)
    thread.start()
    return thread


def _retain(index: int) -> bool:
    """Makes the GPU's primary context, or takes one more reference to it. Whether it worked."""
    try:
        driver = ctypes.CDLL(_LIBRARY)  # which lets go of the GIL in each call
    except OSError:
        return False
    device, context = ctypes.c_int(), ctypes.c_void_p()
    return bool(
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), index) == 0
        and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    )
