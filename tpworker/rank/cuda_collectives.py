"""Collectives of CUDA ranks on one host: NCCL, and torch's symmetric memory for what a decode step sends.

Both are launched on the compute stream and can be captured in graphs. NVLink multicast is not used.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from tpworker.model.tp import Collectives
from tpworker.rank.collectives import SoleRank

_distributed: Any = distributed  # typed without its stores
_ops: Any = torch.ops

logger = logging.getLogger(__name__)

SYMMETRIC_BYTES = {2: 2 << 20, 4: 1 << 19, 8: 1 << 18}
"""By TP size, the largest tensor for which reading all the others' memory in one kernel beats NCCL. (H200, 2
ranks, 64 and 256 rows of 4096 bfloat16: 9.6 and 18.7 µs against 9.9 and 26.7.) The kernel sums in the order
of the ranks, bitwise alike on all of them, for these sizes of a group only."""

_ALIGNMENT = 16  # bytes that it loads at a time


class NcclCollectives:
    """The torch process group of this process, which has no other.

    Args:
        store_fd: an empty memfd, the same for all ranks.
        rank, size: of the TP group.
        timeout: seconds after which NCCL gives up a collective that a peer does not join.
        device: this rank's.
    """

    def __init__(self, store_fd: int, rank: int, size: int, timeout: float, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        store = _distributed.FileStore(f"/proc/self/fd/{store_fd}", size)
        _distributed.init_process_group(
            "nccl",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
            device_id=device,
        )
        self.device = device

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums over the ranks, in place; bitwise the same on all of them. Any shape; returns x."""
        _distributed.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape], in rank order."""
        flat = x.contiguous().view(-1)
        gathered = torch.empty(self.size * flat.numel(), dtype=x.dtype, device=x.device)
        _distributed.all_gather_into_tensor(gathered, flat)
        return gathered.view(self.size, *x.shape)


class SymmetricCollectives(NcclCollectives):
    """Small sums in one kernel over peer memory, the rest by NCCL. The sum is a new tensor.

    The ranks meet in the kernel: one whose peer never comes spins for ever, and is killed with the group.
    """

    def __init__(self, store_fd: int, rank: int, size: int, timeout: float, device: torch.device) -> None:
        super().__init__(store_fd, rank, size, timeout, device)
        import torch.distributed._symmetric_memory as symmetric_memory

        memory: Any = symmetric_memory
        self._group: str = _distributed.group.WORLD.group_name
        self._buffer: Tensor = memory.empty(SYMMETRIC_BYTES[size], dtype=torch.uint8, device=device)
        memory.rendezvous(self._buffer, self._group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums over the ranks; bitwise the same on all of them. Any shape; x, or a new tensor."""
        if (
            x.nbytes > self._buffer.nbytes
            or x.nbytes % _ALIGNMENT
            or x.dtype not in (torch.bfloat16, torch.float32)
        ):
            return super().all_reduce(x)
        flat = x.view(-1)
        place = self._buffer.view(x.dtype)[: flat.numel()]
        total: Tensor = _ops.symm_mem.one_shot_all_reduce_copy(place, flat, "sum", self._group)
        return total.view(x.shape)


def connect_cuda(store_fd: int, rank: int, size: int, timeout: float, device: torch.device) -> Collectives:
    """The collectives of CUDA ranks, one GPU each: by symmetric memory where the GPUs reach each other's.

    Args:
        store_fd, rank, size, timeout, device: see `NcclCollectives`. GPUs 0 to size - 1 are the group's.
    """
    if size == 1:
        return SoleRank()
    others = [other for other in range(size) if other != rank]
    reach = all(torch.cuda.can_device_access_peer(device, other) for other in others)
    if size in SYMMETRIC_BYTES and reach:
        return SymmetricCollectives(store_fd, rank, size, timeout, device)
    logger.info("collectives through NCCL alone: %d ranks, peer access %s", size, "yes" if reach else "no")
    return NcclCollectives(store_fd, rank, size, timeout, device)
