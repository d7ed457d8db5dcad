from __future__ import annotations

import numpy as np
import pytest
import torch

from tpworker.rank.device import CpuDevice
from tpworker.rank.staging import StagingPool


@pytest.fixture
def pool() -> StagingPool:
    return StagingPool(CpuDevice())


def test_arrays_come_out_as_they_went_in(pool: StagingPool) -> None:
    buffer = pool.take()
    arrays = [
        np.arange(7, dtype=np.int32),
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.array([0.5, -1.0], np.float32),
        np.zeros(0, np.int64),
    ]
    places = [buffer.put(array) for array in arrays]
    buffer.send()
    for array, place in zip(arrays, places, strict=True):
        assert torch.equal(place.get(), torch.from_numpy(array))
        assert place.get().data_ptr() % 16 == 0 or not array.size


def test_a_buffer_grows_and_keeps_what_it_has(pool: StagingPool) -> None:
    buffer = pool.take()
    first = buffer.put(np.arange(100))
    large = buffer.put(np.arange(300_000))
    buffer.send()
    assert torch.equal(first.get(), torch.arange(100))
    assert torch.equal(large.get(), torch.arange(300_000))


def test_a_read_before_the_copy_is_an_error(pool: StagingPool) -> None:
    place = pool.take().put(np.arange(3))
    with pytest.raises(AssertionError, match="before it was sent"):
        place.get()


def test_a_buffer_in_use_is_not_given_out(pool: StagingPool) -> None:
    first, second = pool.take(), pool.take()
    assert first is not second
    pool.give_back(first)
    assert pool.take() is first
    assert pool.take() is not second
