"""Collectives between the ranks. What the model sees of them is `tpworker.model.tp.Collectives`.

They are queued on the compute stream as part of a forward, and no rank queues those of step N before all
have admitted N. A peer that is gone makes them raise here; the runtime as a whole is told so by the
peer's report pipe, much sooner.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

_gloo: Any = distributed  # typed without its process groups and stores


class SoleRank:
    """TP 1: nobody to talk to."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)


class GlooCollectives:
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


def connect(store_fd: int, rank: int, size: int, timeout: float) -> SoleRank | GlooCollectives:
    """Meets the other CPU ranks through a store in an inherited file, which leaves nothing behind."""
    if size == 1:
        return SoleRank()
    return GlooCollectives(_gloo.FileStore(f"/proc/self/fd/{store_fd}", size), rank, size, timeout)
