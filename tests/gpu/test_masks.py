"""Masks that the host writes while a step runs: the kernel waits for them, and takes what is defined."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from tests.gpu.test_kernels import captured
from tests.gpu.test_logit_kernels import WIDTHS, make_tables, on_device, same
from tpworker.ipc.masks import TURNS, MaskBoard
from tpworker.kernels.operands import GUIDED, MASKED, HostMasks, LogitTables
from tpworker.model import logit_rules

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
NUM_SLOTS = 32
VOCAB = 151_936


@pytest.fixture(scope="module")
def board() -> Iterator[MaskBoard]:
    """Random masks, in memory that the GPU can read."""
    from tpworker.rank.cuda import CudaDevice

    made = MaskBoard.create(NUM_SLOTS, VOCAB)
    rows = torch.frombuffer(made.memory, dtype=torch.int32)
    rows.copy_(torch.randint(-(2**31), 2**31 - 1, rows.shape, dtype=torch.int32))
    CudaDevice(0).map_host(made.address, made.num_bytes)
    yield made
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(made.address)


def host_masks(board: MaskBoard) -> HostMasks:
    rows = torch.frombuffer(board.memory, dtype=torch.int32).view(TURNS, NUM_SLOTS, board.num_words)
    return HostMasks(board.written_address, rows, partial(board.wait, timeout=30.0))


def guided_tables(start: int, width: int) -> LogitTables:
    """On the CPU, of this part of the vocabulary; every other slot is guided."""
    tables = make_tables(width, start, WIDTHS["few"])
    tables.uses[:NUM_SLOTS:2] |= GUIDED | MASKED
    return tables


@pytest.fixture
def take() -> Any:
    from tpworker.kernels.mask_kernel import take_masks

    return take_masks


@pytest.mark.parametrize("step", [0, 1, 6])
@pytest.mark.parametrize(
    ("start", "width"), [(0, VOCAB), (0, 75_968), (75_968, 75_968), (18_992 * 7, 18_992), (8, 1000)]
)
def test_every_part_of_a_vocabulary(board: MaskBoard, take: Any, step: int, start: int, width: int) -> None:
    tables, masks = guided_tables(start, width), host_masks(board)
    there = on_device(tables)
    slots = torch.cat([torch.randperm(NUM_SLOTS), torch.full((3,), NUM_SLOTS)])
    counter = torch.tensor([step - 1])
    board.publish(step)
    logit_rules.take_masks(slots, counter, tables, masks)
    take(slots.cuda(), counter.cuda(), there, masks)
    words, bits = divmod(width, 32)
    same(there.allowed[:, :words], tables.allowed[:, :words])
    rest = (1 << bits) - 1  # what is behind the last token is nobody's
    if bits:
        same(there.allowed[:, words] & rest, tables.allowed[:, words] & rest)


def test_it_waits_in_a_graph_until_the_masks_are_written(board: MaskBoard, take: Any) -> None:
    tables, masks = guided_tables(0, VOCAB), host_masks(board)
    there, counter = on_device(tables), torch.tensor([-1], device="cuda")
    slots = torch.arange(NUM_SLOTS)
    slots_there = slots.cuda()
    board.publish(100)
    graph, _ = captured(lambda: take(slots_there, counter, there, masks))
    board.publish(-1)  # none is written, as at the start
    for step in range(6):
        counter.fill_(step - 1)
        torch.cuda.synchronize()
        there.allowed.zero_()
        graph.replay()
        done = torch.cuda.Event()
        done.record()
        time.sleep(0.02)
        assert not done.query(), "it did not wait"
        fresh = torch.randint(-(2**31), 2**31 - 1, masks.rows[step % TURNS].shape, dtype=torch.int32)

        def write(step: int = step, fresh: torch.Tensor = fresh) -> None:
            masks.rows[step % TURNS].copy_(fresh)
            board.publish(step)

        writer = threading.Thread(target=write)
        writer.start()
        done.synchronize()
        writer.join()
        logit_rules.take_masks(slots, torch.tensor([step - 1]), tables, masks)
        same(there.allowed[:NUM_SLOTS:2], tables.allowed[:NUM_SLOTS:2])


def test_who_is_not_guided_does_not_wait(board: MaskBoard, take: Any) -> None:
    tables, masks = guided_tables(0, VOCAB), host_masks(board)
    there = on_device(tables)
    before = tables.allowed.clone()
    take(torch.arange(1, NUM_SLOTS, 2).cuda(), torch.tensor([10_000], device="cuda"), there, masks)
    torch.cuda.synchronize()
    same(there.allowed, before)
