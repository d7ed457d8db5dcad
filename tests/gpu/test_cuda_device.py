"""CUDA as a device: what its streams may not do to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tpworker.rank.cuda import CudaDevice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    # A device makes its compute stream the current one.
    with torch.cuda.stream(torch.cuda.current_stream()):
        yield CudaDevice(0)


@pytest.mark.parametrize("num_bytes", [4096, 1 << 20, 5 << 20])
def test_an_upload_buffer_is_not_memory_that_a_running_step_has_given_back(
    device: CudaDevice, num_bytes: int
) -> None:
    """On the host the step's scratch is free as soon as it is launched; on the GPU it is still to be read."""
    sums = torch.zeros(8, dtype=torch.int64, device=device.torch_device)

    def step() -> None:
        for place in range(len(sums)):
            scratch = torch.ones(num_bytes, dtype=torch.uint8, device=device.torch_device)
            if place == 0:
                torch.cuda._sleep(200_000_000)  # cycles: 0.1 s
            sums[place : place + 1].copy_(scratch.sum(dtype=torch.int64))

    device.compute.run(step)  # loads the kernels
    torch.cuda.synchronize()
    device.compute.run(step)
    assert not device.compute.record().event.query(), "the step is over before anything is uploaded"
    buffers = [device.upload_buffer(num_bytes) for _ in range(8)]

    def upload() -> None:
        for buffer in buffers:
            buffer.fill_(7)

    device.uploads.run(upload)
    device.uploads.record().synchronize()
    torch.cuda.synchronize()
    assert sums.tolist() == [num_bytes] * 8


def raises() -> None:
    raise RuntimeError("this is how it ends")


def waits() -> None:
    torch.cuda.current_stream().synchronize()


@pytest.mark.parametrize("breaks", [raises, waits])
def test_a_rehearsal_that_breaks_off_leaves_nothing(
    device: CudaDevice, breaks: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Captures work afterwards; memory that two streams have used can be used again."""
    x = torch.ones(1024, device=device.torch_device)

    def work() -> None:
        torch.empty(1 << 20, device=device.torch_device).zero_()
        breaks()

    device.compile_ahead(work)
    assert "kernels are compiled only when they are needed" in caplog.text
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    for _ in range(16):
        shared = torch.empty(32 << 20, dtype=torch.uint8, device=device.torch_device)
        shared.record_stream(device.copies.stream)
        del shared
        torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() - reserved <= 64 << 20

    def double() -> None:
        x.mul_(torch.full_like(x, 2.0))

    replay = device.capture(double)
    replay()
    torch.cuda.synchronize()
    assert (x == 4).all(), "once to load the kernels, and once in the graph"
