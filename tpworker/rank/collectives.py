"""Collectives between the ranks. What the model sees of them is `tpworker.model.tp.Collectives`.

They are queued on the compute stream as part of a forward, and no rank queues those of step N before all
have admitted N. A peer that is gone makes them raise here in the end; the runtime as a whole is told so by
the peer's report pipe, much sooner.
"""

from __future__ import annotations

import logging
import mmap
import os
import platform
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from tpworker.ipc.barrier import Barrier, BarrierTimeout
from tpworker.model.tp import Collectives

_gloo: Any = distributed  # typed without its process groups and stores

logger = logging.getLogger(__name__)

LIBRARY_SECONDS = 86400.0
"""The timeout that gloo and NCCL are given: their clocks go on where nobody runs, and would blame a rank.
A step that does not end in them is the scheduler's to see, a start that does not is start_timeout's."""

EXCHANGE_BYTES = 1 << 20
"""A rank's part of the shared memory of `SharedMemoryCollectives`; larger tensors go through in pieces."""


class SoleRank(Collectives):
    """TP 1: nobody to talk to."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)


class SharedMemoryCollectives(Collectives):
    """CPU ranks of one host: each writes to its own place, all meet at a barrier, each reads them all.

        half 0   │ rank 0 │ rank 1 │ …        exchange 0, 2, 4 …
        half 1   │ rank 0 │ rank 1 │ …        exchange 1, 3, 5 …

    One meeting an exchange is enough: who writes to a half again has met the others in the exchange in
    between, which they came to only after they had read it. Sums are added up in rank order by every rank,
    so they are the same bits on all.

    A plain store must not be seen before the data that was stored ahead of it: true on x86-64 only, so it is
    used only there (see `connect`). It takes tens of microseconds where gloo, with its threads and sockets,
    takes hundreds, or tens of milliseconds when there are fewer cores than ranks.

    Args:
        barrier: one that serves nothing else.
        fd: of an empty memfd, the same for all ranks.
        rank, size: of the TP group.
        deadline: after how many seconds an exchange that a peer does not join raises BarrierTimeout; asked
            anew for each.
    """

    def __init__(
        self, barrier: Barrier, fd: int, rank: int, size: int, deadline: Callable[[], float]
    ) -> None:
        self.rank = rank
        self.size = size
        self._barrier = barrier
        self._deadline = deadline
        self._exchanges = 0
        num_bytes = 2 * size * EXCHANGE_BYTES
        os.ftruncate(fd, num_bytes)  # to the same size by every rank
        memory = torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
        self._halves = memory.view(2, size, EXCHANGE_BYTES).unbind(0)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums over the ranks, in place; bitwise the same on all of them. Any shape; returns x."""
        for part in _parts(x.view(-1)):
            everybody = self._exchange(part)
            torch.add(everybody[0], everybody[1], out=part)
            for other in everybody[2:]:
                part += other
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape], in rank order."""
        flat = x.contiguous().view(-1)
        gathered = torch.empty(self.size, flat.numel(), dtype=x.dtype)
        for part, place in zip(_parts(flat), _parts(gathered), strict=True):
            place.copy_(self._exchange(part))
        return gathered.view(self.size, *x.shape)

    def _exchange(self, part: Tensor) -> Tensor:
        """From each rank's [n] to [size, n], valid until the exchange after the next."""
        half = self._halves[self._exchanges % 2][:, : part.nbytes].view(part.dtype)
        half[self.rank].copy_(part)
        try:
            self._barrier.wait(self.rank, self._exchanges, 0, self._deadline())
        except BarrierTimeout as error:  # which speaks of steps
            waited, missing = f"waited {error.seconds:.3g} s", error.missing
            ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            raise BarrierTimeout(
                f"in a collective (exchange {self._exchanges}): {waited} for {ranks}", missing, error.seconds
            ) from None
        self._exchanges += 1
        return half


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """Slices of the last dimension that fit into a rank's place."""
    return torch.split(x, EXCHANGE_BYTES // x.element_size(), dim=-1)


class GlooCollectives(Collectives):
    """CPU ranks. A process group of its own, not torch's global one: several can live in one process.

    Args:
        store: where the ranks find each other, the same for all.
        rank, size: of the TP group.
        timeout: seconds after which a collective that a peer does not join raises RuntimeError.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self.rank = rank
        self.size = size
        options = _gloo.ProcessGroupGloo._Options()
        options._devices = [_gloo.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._threads = 1
        options._timeout = timedelta(seconds=timeout)
        self._group = _gloo.ProcessGroupGloo(store, rank, size, options)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums over the ranks, in place; bitwise the same on all of them. Any shape; returns x."""
        self._group.allreduce([x]).wait()
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape], in rank order."""
        gathered = torch.empty(self.size * x.numel(), dtype=x.dtype)
        self._group._allgather_base(gathered, x.contiguous().view(-1)).wait()
        return gathered.view(self.size, *x.shape)


def connect(
    meeting_fd: int, store_fd: int, rank: int, size: int, deadline: Callable[[], float]
) -> Collectives:
    """The collectives of CPU ranks, over memory and files that they have inherited: nothing is left behind.

    Args:
        meeting_fd: a `Barrier` for nothing else.
        store_fd: an empty memfd.
        rank, size: see the classes.
        deadline: of `SharedMemoryCollectives`.
    """
    if size == 1:
        return SoleRank()
    if platform.machine() == "x86_64":
        barrier = Barrier.attach(meeting_fd, size)
        return SharedMemoryCollectives(barrier, store_fd, rank, size, deadline)
    logger.info("%s orders memory weakly: collectives through gloo", platform.machine())
    store = _gloo.FileStore(f"/proc/self/fd/{store_fd}", size)
    return GlooCollectives(store, rank, size, LIBRARY_SECONDS)
