"""A process that uses kept memory of GPU 0 as a rank does: `fd address bytes`. It says what it found.

Not a tpworker child: it has no boot message, and its parent kills it.
"""

from __future__ import annotations

import itertools
import json
import sys
import time

import torch

from tpworker.rank.cuda import CudaDevice
from tpworker.rank.kept_device import DeviceMemory, open_kept

LAYOUT = "layout"


def pattern(num_bytes: int, device: torch.device) -> torch.Tensor:
    """What is written: bytes with a period of a prime."""
    return torch.arange(num_bytes, device=device).remainder_(251).to(torch.uint8)


def main() -> None:
    fd, address, num_bytes = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    device = CudaDevice(0)
    seconds = [time.perf_counter()]
    memory = open_kept(fd, address, device.torch_device)
    assert isinstance(memory, DeviceMemory), "memory of this GPU cannot be shared"
    seconds.append(time.perf_counter())
    area = memory.find("kv", LAYOUT)
    is_found = area is not None
    seconds.append(time.perf_counter())
    with torch.inference_mode():
        if area is None:
            area = memory.make("kv", LAYOUT, num_bytes)
            assert not area.any()
            area[: num_bytes // 2].copy_(pattern(num_bytes // 2, area.device))
            seconds.append(time.perf_counter())
            if len(sys.argv) < 5:
                memory.finish("kv")
            area[num_bytes // 2 :].copy_(pattern(num_bytes - num_bytes // 2, area.device))  # and later
        half = num_bytes // 2
        is_same = all(
            bool((part == pattern(len(part), area.device)).all()) for part in (area[:half], area[half:])
        )
    device.synchronize()
    steps = [round(after - before, 4) for before, after in itertools.pairwise(seconds)]
    print(json.dumps({"found": is_found, "same": is_same, "seconds": steps}), flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
