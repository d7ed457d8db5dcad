"""Collectives of CUDA ranks on one host: NCCL, and kernels over peer memory for what a decode step sends.

Both are launched on the compute stream and can be captured in graphs. NVLink multicast is not used.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from itertools import permutations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from tpworker.model.tp import Collectives
from tpworker.rank.collectives import SoleRank

if TYPE_CHECKING:
    from tpworker.kernels.symmetric_kernels import Inboxes

_distributed: Any = distributed  # typed without its stores

all_gather_single: Any = getattr(_distributed, "all_gather_single", _distributed.all_gather_into_tensor)
"""torch's, which before 2.13 has the other name, and from then on warns of it."""

logger = logging.getLogger(__name__)

ONE_SHOT_BYTES = {2: 16 << 20, 4: 3 << 17, 8: 1 << 17}
"""By TP size, the largest sum of which each rank sends its part to all others; for these sizes alone.

2 ranks: as far as was measured (two H200, 4096 columns of bfloat16, with residual and norm, µs):

    rows                1    16    64   256   512  1024  2048
    one shot          2.9   3.2   4.5   9.0  14.7  26.5  55.0
    two shots         4.6   4.9   5.8   9.8  16.5  28.0  54.7
    NCCL, then norm   8.1   8.8  11.5  28.9  34.8  53.9  92.1

4 and 8 ranks are reckoned from these: 330 GB/s to the others, 1.6 µs for the second shot."""

TWO_SHOT_BYTES = {2: 16 << 20, 4: 8 << 20, 8: 8 << 20}
"""The largest one whose rows are added up by one rank each; what is larger goes through NCCL.

(Four H200, NCCL alone: 34 µs for 256 rows of 4096, 101 for 2048.)"""


class NcclCollectives(Collectives):
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
        all_gather_single(gathered, flat)
        return gathered.view(self.size, *x.shape)


class SymmetricCollectives(NcclCollectives):
    """Small sums in one kernel over peer memory, with the norm that follows them; the rest by NCCL.

    The ranks meet in the kernel: one whose peer never comes spins for ever, and is killed with the group.
    """

    def __init__(self, store_fd: int, rank: int, size: int, timeout: float, device: torch.device) -> None:
        super().__init__(store_fd, rank, size, timeout, device)
        from tpworker.kernels import symmetric_kernels

        self._kernels = symmetric_kernels
        self.inboxes = self._connect_inboxes()
        torch.cuda.synchronize(device)  # its counters are zeros, for streams that wait for nothing

    def _connect_inboxes(self) -> Inboxes:
        """Those of the whole group, as seen here."""
        return self._kernels.Inboxes.of(self._share_inboxes(self.size), self.rank, self.device)

    def _share_inboxes(self, size: int) -> list[int]:
        """Every rank makes one, with room for `size` ranks' messages. Returns all addresses, as seen here."""
        import torch.distributed._symmetric_memory as symmetric_memory

        memory: Any = symmetric_memory
        # As `memory.empty`, which imports sympy to work out the stride: two seconds of the start.
        inbox: Tensor = memory._SymmetricMemory.empty_strided_p2p(
            (self._kernels.inbox_bytes(size),), (1,), torch.uint8, self.device
        )
        self._kernels.empty_inbox(inbox)
        torch.cuda.synchronize(self.device)
        # Here the ranks learn each other's addresses, so nobody writes before all have emptied theirs.
        handle = memory.rendezvous(inbox, _distributed.group.WORLD.group_name)
        self._shared = inbox, handle  # are kept
        inboxes = [handle.get_buffer(peer, inbox.shape, torch.uint8) for peer in range(self.size)]
        addresses = [one.data_ptr() for one in inboxes]
        assert addresses[self.rank] == inbox.data_ptr()
        return addresses

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums over the ranks; bitwise the same on all of them. Any shape; x, or a new tensor."""
        shots = self._shots(len(x), x) if x.ndim == 2 else 0
        if not shots:
            return super().all_reduce(x)
        return self._kernels.all_reduce(x, self.inboxes, two_shot=shots == 2)

    def reduce_add_norm(self, x: Tensor, part: Tensor, weight: Tensor, eps: float) -> Tensor | None:
        shots = self._shots(len(part), part)
        if not shots:
            return None
        return self._kernels.reduce_add_norm(x, part, weight, eps, self.inboxes, two_shot=shots == 2)

    def look_up(self, token_ids: Tensor, table: Tensor, vocab_start: int) -> Tensor | None:
        shots = self._shots(len(token_ids), table)
        if not shots:
            return None
        return self._kernels.look_up(token_ids, table, vocab_start, self.inboxes, two_shot=shots == 2)

    def argmax(self, best: Tensor, token: Tensor) -> Tensor | None:
        if len(best) > self._kernels.MAX_PAIRS:
            return None
        return self._kernels.argmax(best, token, self.inboxes)

    def _shots(self, num_rows: int, rows: Tensor) -> int:
        """See `choose_shots`, of a sum of so many rows like those of `rows`."""
        if not self.inboxes.takes(rows):
            return 0
        return choose_shots(self.size, num_rows * rows.shape[1] * rows.element_size())


def choose_shots(size: int, num_bytes: int) -> int:
    """How a sum of so many bytes is made by `size` ranks: in one shot, in two, or 0: through NCCL."""
    if num_bytes > TWO_SHOT_BYTES[size]:
        return 0
    return 1 if num_bytes <= ONE_SHOT_BYTES[size] else 2


def reach_each_other(num_gpus: int) -> bool:
    """Whether the first `num_gpus` GPUs can read and write each other's memory.

    All pairs, and not this rank's alone: every rank must come to the same answer.
    """
    return all(torch.cuda.can_device_access_peer(*pair) for pair in permutations(range(num_gpus), 2))


def connect_cuda(store_fd: int, rank: int, size: int, timeout: float, device: torch.device) -> Collectives:
    """The collectives of CUDA ranks, one GPU each: by symmetric memory where the GPUs reach each other's.

    Args:
        store_fd, rank, size, timeout, device: see `NcclCollectives`. GPUs 0 to size - 1 are the group's.
    """
    if size == 1:
        return SoleRank()
    reach = reach_each_other(size)
    if size in ONE_SHOT_BYTES and reach:
        return SymmetricCollectives(store_fd, rank, size, timeout, device)
    logger.info("collectives through NCCL alone: %d ranks, peer access %s", size, "yes" if reach else "no")
    return NcclCollectives(store_fd, rank, size, timeout, device)
