"""Fewer ranks than a TP group has, each of which stands for several: what steps take where GPUs are missing.

Of a group of N ranks the first n run, each with its own shard of N. A rank's kernels are those of the whole
group, and so is what it sends and waits for: besides its own part of a sum, rank r sends the same part as
r + n, as r + 2 n and so on. So a sum has each part N / n times. What is computed means nothing, but it is the
same on all ranks, bit by bit.

What is not as in the whole group: of N - 1 parts that a rank sends, N / n - 1 stay on its own GPU; sums are
always made in one shot (see symmetric_kernels.py), and those that go through NCCL, of steps with prompts,
have n parts; n ranks agree sooner than N. On CPU ranks all sums have n parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tpworker.errors import ConfigError
from tpworker.ipc.child import RankBoot
from tpworker.model.families import ModelSpec
from tpworker.model.tp import Collectives, Shard
from tpworker.rank import process
from tpworker.rank.collectives import LIBRARY_SECONDS
from tpworker.rank.cuda_collectives import SymmetricCollectives, all_gather_single, reach_each_other
from tpworker.rank.device import Device

if TYPE_CHECKING:
    from tpworker.kernels.symmetric_kernels import Inboxes


def stand_in(size: int) -> None:
    """From now on, a rank of this process is one of a group of `size`, with fewer ranks to talk to."""
    patched: Any = process

    def shard_of(spec: ModelSpec, rank: int, num_ranks: int) -> Shard:
        return Shard.of(spec, rank, size)

    patched.meet = partial(meet, meet_all=process.meet, size=size)
    patched.Shard = SimpleNamespace(of=shard_of)


def meet(
    boot: RankBoot, device: Device, meet_all: Callable[[RankBoot, Device], Collectives], size: int
) -> Collectives:
    """In place of `process.meet`."""
    if device.torch_device.type == "cpu":
        return StandIns(meet_all(boot, device), size)
    device.adopt_thread()
    if not reach_each_other(boot.num_ranks):
        raise ConfigError("ranks can stand in only where GPUs reach each other's memory; these do not")
    here = device.torch_device
    return SymmetricStandIns(boot.store_fd, boot.rank, boot.num_ranks, LIBRARY_SECONDS, here, size)


def spread(inboxes: Inboxes, num_ranks: int) -> Inboxes:
    """The inboxes of a whole group, of which peer p is played by rank p % num_ranks.

    Args:
        inboxes: with the address of that rank's inbox for each peer.

    Returns:
        With addresses from which a rank's own entry, which it writes to, is that of the rank it stands for.
    """
    from tpworker.kernels.symmetric_kernels import WIDTH

    stood_for = [peer // num_ranks * num_ranks for peer in range(inboxes.size)]
    row, pair = WIDTH * torch.bfloat16.itemsize, torch.int64.itemsize
    return replace(
        inboxes,
        rows=tuple(address + by * row for address, by in zip(inboxes.rows, stood_for, strict=True)),
        pairs=tuple(address + by * pair for address, by in zip(inboxes.pairs, stood_for, strict=True)),
    )


def repeat(gathered: Tensor, size: int) -> Tensor:
    """What ranks have gathered, [num_ranks, ...], as a whole group would: [size, ...]."""
    return gathered.repeat(size // len(gathered), *[1] * (gathered.ndim - 1))


class StandIns(Collectives):
    """Of a group of `size`, by CPU ranks."""

    def __init__(self, ranks: Collectives, size: int) -> None:
        self._ranks = ranks
        self.rank = ranks.rank
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        """With each part once."""
        return self._ranks.all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape]"""
        return repeat(self._ranks.all_gather(x), self.size)


class SymmetricStandIns(SymmetricCollectives):
    """Of a group of `size`, by `num_ranks` GPUs that reach each other's memory."""

    def __init__(
        self, store_fd: int, rank: int, num_ranks: int, timeout: float, device: torch.device, size: int
    ) -> None:
        self._group_size = size
        super().__init__(store_fd, rank, num_ranks, timeout, device)
        self._num_ranks, self.size = num_ranks, size

    def _connect_inboxes(self) -> Inboxes:
        """Those of the whole group: each rank's, for every peer that it plays."""
        addresses = self._share_inboxes(self._group_size)
        num_ranks = len(addresses)
        of_peers = [addresses[peer % num_ranks] for peer in range(self._group_size)]
        return spread(self._kernels.Inboxes.of(of_peers, self.rank, self.device), num_ranks)

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape]"""
        gathered = x.new_empty(self._num_ranks, *x.shape)
        all_gather_single(gathered, x.contiguous())
        return repeat(gathered, self.size)

    def _shots(self, num_rows: int, rows: Tensor) -> int:
        return min(1, super()._shots(num_rows, rows))
