from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from tpworker.ipc.barrier import Barrier, BarrierTimeout
from tpworker.model.tp import Collectives
from tpworker.rank import collectives
from tpworker.rank.collectives import GlooCollectives, SharedMemoryCollectives, SoleRank

_distributed: Any = distributed


def gloo(size: int) -> Callable[[int], Collectives]:
    store = _distributed.HashStore()
    return lambda rank: GlooCollectives(store, rank, size, 30.0)


def shared_memory(size: int) -> Callable[[int], Collectives]:
    barrier = Barrier.create(size)
    fd = os.memfd_create("test")
    return lambda rank: SharedMemoryCollectives(barrier, fd, rank, size, 30.0)


def run(make: Callable[[int], Collectives], size: int, work: Callable[[Collectives], Any]) -> list[Any]:
    results: list[Any] = [None] * size
    threads = [
        threading.Thread(target=lambda r=rank: results.__setitem__(r, work(make(r)))) for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("kind", [gloo, shared_memory])
@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_sums_and_gathers(kind: Any, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(size, 5, 7) * 8).to(dtype)

    def work(ranks: Collectives) -> tuple[Tensor, Tensor]:
        mine = inputs[ranks.rank]
        gathered = ranks.all_gather(mine)
        return gathered, ranks.all_reduce(mine.clone())

    results = run(kind(size), size, work)
    for gathered, summed in results:
        assert torch.equal(gathered, inputs)
        assert torch.equal(summed, results[0][1]), "not the same bits on all ranks"
        torch.testing.assert_close(summed, inputs.sum(0, dtype=dtype), rtol=0.02, atol=0.1)


def test_a_tensor_larger_than_the_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "EXCHANGE_BYTES", 64)

    def work(ranks: Collectives) -> tuple[Tensor, Tensor]:
        x = torch.arange(300.0).view(3, 100) + ranks.rank
        return ranks.all_gather(x), ranks.all_reduce(x.clone())

    base = torch.arange(300.0).view(3, 100)
    for gathered, summed in run(shared_memory(2), 2, work):
        assert torch.equal(gathered, torch.stack([base, base + 1]))
        assert torch.equal(summed, 2 * base + 1)


def test_a_half_is_not_overwritten_while_it_is_read() -> None:
    """Many exchanges in a row, with ranks that dawdle: every sum is the one of its own exchange."""

    def work(ranks: Collectives) -> bool:
        wait = threading.Event()
        good = True
        for exchange in range(2000):
            if (exchange + ranks.rank) % 97 == 0:
                wait.wait(0.001)
            x = torch.full((64,), exchange * 10 + ranks.rank)
            good &= bool((ranks.all_reduce(x) == exchange * 30 + 3).all())
        return good

    assert run(shared_memory(3), 3, work) == [True] * 3


def test_a_peer_that_does_not_come_is_named() -> None:
    barrier = Barrier.create(2)
    ranks = SharedMemoryCollectives(barrier, os.memfd_create("test"), 0, 2, 0.05)
    with pytest.raises(BarrierTimeout) as caught:
        ranks.all_reduce(torch.zeros(4))
    assert caught.value.missing == [1]


def test_alone() -> None:
    x = torch.arange(4.0)
    assert torch.equal(SoleRank().all_reduce(x), x)
    assert torch.equal(SoleRank().all_gather(x), x[None])
