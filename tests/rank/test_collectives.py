from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from tpworker.ipc.barrier import Barrier, BarrierTimeout
from tpworker.kernels.operands import Product
from tpworker.model import composed_ops, layer_ops, torch_operations
from tpworker.model.linear import Linear
from tpworker.model.tp import Collectives, argmax_ranks
from tpworker.rank import collectives, cuda_collectives
from tpworker.rank.collectives import GlooCollectives, SharedMemoryCollectives, SoleRank

_distributed: Any = distributed


def gloo(size: int) -> Callable[[int], Collectives]:
    store = _distributed.HashStore()
    return lambda rank: GlooCollectives(store, rank, size, 30.0)


def shared_memory(size: int) -> Callable[[int], Collectives]:
    barrier = Barrier.create(size)
    fd = os.memfd_create("test")
    return lambda rank: SharedMemoryCollectives(barrier, fd, rank, size, lambda: 30.0)


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
    ranks = SharedMemoryCollectives(barrier, os.memfd_create("test"), 0, 2, lambda: 0.05)
    with pytest.raises(BarrierTimeout) as caught:
        ranks.all_reduce(torch.zeros(4))
    assert caught.value.missing == [1]
    assert str(caught.value) == "in a collective (exchange 0): waited 0.05 s for rank 1"


def test_alone() -> None:
    x = torch.arange(4.0)
    assert torch.equal(SoleRank().all_reduce(x), x)
    assert torch.equal(SoleRank().all_gather(x), x[None])


class Fusing(SoleRank):
    """Has a kernel of its own for sums of up to 4 rows; every choice is its own."""

    size = 2

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.mul_(2)

    def reduce_add_norm(self, x: Tensor, part: Tensor, weight: Tensor, eps: float) -> Tensor | None:
        return None if len(x) > 4 else torch.full_like(x, 7)

    def argmax(self, best: Tensor, token: Tensor) -> Tensor | None:
        return token + 1


def test_what_is_offered_in_one_kernel_is_taken_and_the_rest_goes_step_by_step() -> None:
    add_up = partial(composed_ops.reduce_add_norm, torch_operations)
    weight = torch.ones(8)
    for rows in (3, 5):
        x, part = torch.randn(rows, 8), torch.randn(rows, 8)
        expected = x + 2 * part
        normed = add_up(x, part, weight, 1e-6, Fusing())
        if rows <= 4:
            assert (normed == 7).all()
        else:
            assert torch.equal(x, expected)
            assert torch.equal(normed, layer_ops.norm(expected, weight, 1e-6))
    linear = Linear(torch.randn(8, 16))
    product = Product(linear, torch.randn(2, 16))
    assert (add_up(torch.randn(2, 8), product, weight, 1e-6, Fusing()) == 7).all()
    x = torch.randn(2, 8)
    normed = add_up(x, None, weight, 1e-6, Fusing())
    assert torch.equal(normed, layer_ops.norm(x, weight, 1e-6)), "there is nothing to exchange"
    token = torch.tensor([3, 4])
    assert argmax_ranks(torch.zeros(2), token, Fusing()).tolist() == [4, 5]
    assert argmax_ranks(torch.zeros(2), token, SoleRank()).tolist() == [3, 4]


def test_small_sums_go_in_one_shot_and_large_ones_through_nccl() -> None:
    for size in cuda_collectives.ONE_SHOT_BYTES:
        shots = [cuda_collectives.choose_shots(size, 1 << power) for power in range(10, 30)]
        assert shots[0] == 1
        assert shots[-1] == 0
        assert [one for one, _ in itertools.groupby(shots)] == ([1, 0] if size == 2 else [1, 2, 0])
