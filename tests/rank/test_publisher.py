"""Invariant 4: a ring row and a host buffer are rewritten only after they were copied and sent."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from tpworker.ipc.arrays import unpack_int32
from tpworker.ipc.board import Board, Field, Span
from tpworker.ipc.channels import Channel, new_address
from tpworker.ipc.messages import LOGPROB_ROW_BYTES, StepResult
from tpworker.kernels.operands import LOGPROB_ROW, MOST_LOGPROBS, NO_TOKEN
from tpworker.rank.device import CpuDevice
from tpworker.rank.publisher import Publisher
from tpworker.rank.runner import Launched
from tpworker.rank.staging import StagingPool

ROWS = 3


class Rig:
    """A publisher with its device, a ring, and the scheduler's end of the channel."""

    def __init__(self, sends: bool = True) -> None:
        self.device = CpuDevice()
        self.ring = torch.zeros(ROWS, 5, dtype=torch.int64)
        self.pool = StagingPool(self.device)
        self.board = Board.create(["rank"])
        self.errors: list[BaseException] = []
        address = new_address("test")
        self.results = Channel.bind(address)
        self.publisher = Publisher(
            0, self.device, ROWS, 5, 4, 8, self.pool, self.board.row("rank"),
            (lambda: Channel.connect(address, "rank", 0)) if sends else None, self.errors.append,
        )  # fmt: skip
        if sends:
            self.results.accept("rank", 0, 10)

    def launch(
        self, step: int, tokens: list[int], written_step: int | None = None, **logprobs: torch.Tensor
    ) -> Launched:
        """As a runner does: the device writes the step's row of the ring."""
        row = self.ring[step % ROWS, : 1 + len(tokens)]
        values = torch.tensor([step if written_step is None else written_step, *tokens])
        started = self.device.compute.record()
        self.device.compute.run(lambda: (row.copy_(values), None)[1])
        done = self.device.compute.record()
        launched_ns, staging = time.monotonic_ns(), self.pool.take()
        return Launched(step, len(tokens), row, started, done, launched_ns, staging, **logprobs)

    def close(self) -> None:
        self.publisher.close()
        self.device.close()
        self.results.close()
        self.board.close()


@pytest.fixture
def rig():  # type: ignore[no-untyped-def]
    rig = Rig()
    yield rig
    rig.close()


def test_tokens_arrive_with_their_times(rig: Rig) -> None:
    for step in range(20):
        rig.publisher.publish(rig.launch(step, [step, 7]))
        result = rig.results.receive(10)
        assert isinstance(result, StepResult)
        assert (result.step, unpack_int32(result.tokens).tolist()) == (step, [step, 7])
        assert 0 < result.timing.launched <= result.timing.ended
        assert result.timing.started <= result.timing.ended
    assert not rig.errors


@pytest.mark.parametrize("num_sampled", [0, 1])
def test_a_step_with_drafts_may_sample_nobody(rig: Rig, num_sampled: int) -> None:
    """As one that has a part of a long prompt alone."""
    launched = rig.launch(0, [5, NO_TOKEN, 1][: 3 * num_sampled])
    rig.publisher.publish(replace(launched, num_sampled=num_sampled, width=2))
    result = rig.results.receive(10)
    assert isinstance(result, StepResult)
    assert unpack_int32(result.tokens).tolist() == [5][:num_sampled]
    assert unpack_int32(result.counts).tolist() == unpack_int32(result.proposed).tolist() == [1][:num_sampled]
    assert not rig.errors


def test_tokens_by_logits_that_are_nan_are_told_of_once(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for step, tokens in enumerate(([3, 4], [3, ~4], [~0, 5], [])):
        rig.publisher.publish(rig.launch(step, tokens))
        result = rig.results.receive(10)
        assert isinstance(result, StepResult)
        assert unpack_int32(result.tokens).tolist() == ([3, 4], [3, 4], [0, 5], [])[step]
        assert len(caplog.records) == (step > 0)
    assert "logits are NaN" in caplog.text


@pytest.mark.parametrize(
    ("width", "row", "tokens", "counts", "proposed"),
    [
        (3, [7, 8, NO_TOKEN, 2], [7, 8], [2], [2]),
        (3, [7, ~8, 9, 2], [7, 8, 9], [3], [2]),
        (1, [7, NO_TOKEN], [7], [1, 0], []),
        (3, [NO_TOKEN] * 3 + [0], [], [0], []),
        (3, [], [], [], []),  # chunks alone, in the middle of their prompts
    ],
)
def test_a_slot_may_have_any_number_of_tokens(
    rig: Rig, width: int, row: list[int], tokens: list[int], counts: list[int], proposed: list[int]
) -> None:
    num_sampled = len(row) // (width + (width > 1))
    launched = replace(rig.launch(0, row), width=width, num_sampled=num_sampled)
    rig.publisher.publish(launched)
    result = rig.results.receive(10)
    assert not rig.errors
    assert isinstance(result, StepResult)
    found = [unpack_int32(each).tolist() for each in (result.tokens, result.counts, result.proposed)]
    assert found == [tokens, counts, proposed]


def some_logprobs(count: int, seed: int) -> torch.Tensor:
    """Rows as `logprob_rows` makes them: [count, LOGPROB_ROW]."""
    rows = torch.randn(count, LOGPROB_ROW, generator=torch.Generator().manual_seed(seed)).abs_().neg_()
    ids = torch.arange(count * MOST_LOGPROBS).view(count, MOST_LOGPROBS) + (1 << 24) - count * MOST_LOGPROBS
    rows[:, 1 + MOST_LOGPROBS :] = ids
    return rows


def test_logprobs_leave_with_their_tokens(rig: Rig) -> None:
    """Of tokens and of prompts, either, both or none; values bit by bit, NaN too, and ids as integers."""
    for step, (num_rows, num_of_prompt) in enumerate([(2, 0), (0, 8), (4, 5), (0, 0), (1, 1)]):
        rows, of_prompt = some_logprobs(num_rows, step), some_logprobs(num_of_prompt, 50 + step)
        for values in (rows, of_prompt):
            values[-1:, 0] = torch.nan
            values[-1:, 1 + MOST_LOGPROBS - 1] = -torch.inf
            values[-1:, -1] = -1
        given = {"logprobs": rows, "prompt_logprobs": of_prompt}
        given = {name: values for name, values in given.items() if len(values)}
        rig.publisher.publish(rig.launch(step, [7] * num_rows, **given))
        result = rig.results.receive(10)
        assert isinstance(result, StepResult)
        for packed, values in ((result.logprobs, rows), (result.prompt_logprobs, of_prompt)):
            assert len(packed) == len(values) * LOGPROB_ROW_BYTES
            found = np.frombuffer(packed, "<f4").reshape(len(values), LOGPROB_ROW)
            assert found[:, : 1 + MOST_LOGPROBS].tobytes() == values[:, : 1 + MOST_LOGPROBS].numpy().tobytes()
            ids = np.ascontiguousarray(found[:, 1 + MOST_LOGPROBS :]).view("<i4")
            assert ids.tolist() == values[:, 1 + MOST_LOGPROBS :].long().tolist()
    assert not rig.errors


def test_logprobs_are_copied_before_their_row_is_rewritten(rig: Rig) -> None:
    """As many steps as the ring has rows are published before anything is sent: each has its own."""
    gate = threading.Event()
    rig.device.copies.run(lambda: gate.wait(10) and None)
    sent = [some_logprobs(2, step) for step in range(ROWS)]
    for step, rows in enumerate(sent):
        rig.publisher.publish(rig.launch(step, [1, 2], logprobs=rows))
    gate.set()
    for rows in sent:
        result = rig.results.receive(10)
        assert isinstance(result, StepResult)
        found = np.frombuffer(result.logprobs, "<f4").reshape(2, LOGPROB_ROW)
        assert found[:, 0].tolist() == rows[:, 0].tolist()


def test_publishing_waits_for_nothing(rig: Rig) -> None:
    gate = threading.Event()
    rig.device.compute.run(lambda: gate.wait(10) and None)
    for step in range(ROWS):
        rig.publisher.publish(rig.launch(step, [step]))
    assert rig.results.receive(0.05) is None
    gate.set()
    for step in range(ROWS):
        result = rig.results.receive(10)
        assert isinstance(result, StepResult)
        assert unpack_int32(result.tokens).tolist() == [step]


def test_a_row_more_than_there_are_is_caught(rig: Rig) -> None:
    gate = threading.Event()
    rig.device.compute.run(lambda: gate.wait(10) and None)
    for step in range(ROWS):
        rig.publisher.publish(rig.launch(step, [step]))
    with pytest.raises(AssertionError, match="a ring row would be rewritten before it was sent"):
        rig.publisher.publish(rig.launch(ROWS, [9]))
    gate.set()


def test_a_row_that_was_rewritten_is_caught(rig: Rig) -> None:
    rig.publisher.publish(rig.launch(0, [1], written_step=3))
    assert rig.results.receive(0.2) is None
    assert "the ring row of step 0 holds step 3" in str(rig.errors[0])


def test_a_staging_buffer_comes_back_when_its_step_is_done(rig: Rig) -> None:
    gate = threading.Event()
    rig.device.compute.run(lambda: gate.wait(10) and None)
    launched = rig.launch(0, [1])
    rig.publisher.publish(launched)
    assert rig.pool.take() is not launched.staging
    gate.set()
    rig.results.receive(10)
    deadline = time.monotonic() + 10
    while rig.board.row("rank")[Field.COMPLETED] < 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert rig.pool.take() is launched.staging


def test_an_error_on_the_device_is_told(rig: Rig) -> None:
    rig.device.compute.run(lambda: [][0])
    rig.publisher.publish(rig.launch(0, [1]))
    deadline = time.monotonic() + 10
    while not rig.errors and time.monotonic() < deadline:
        time.sleep(0.001)
    assert "IndexError" in str(rig.errors[0])


def test_the_other_ranks_keep_count_without_sending() -> None:
    rig = Rig(sends=False)
    for step in range(10):  # as many as it likes: a late publisher of theirs must not stop anybody
        rig.publisher.publish(rig.launch(step, [step]))
    deadline = time.monotonic() + 10
    while rig.board.row("rank")[Field.COMPLETED] < 10 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert rig.board.row("rank")[Field.COMPLETED] == 10
    assert not any(rig.board.row("rank").times(Span.PUBLISH).counts)
    assert not rig.errors
    rig.close()


def test_how_long_results_took_from_the_device_is_on_the_board(rig: Rig) -> None:
    row = rig.board.row("rank")
    for step in range(3):
        rig.publisher.publish(rig.launch(step, [step]))
        rig.results.receive(10)
        deadline = time.monotonic() + 10
        while row[Field.COMPLETED] <= step and time.monotonic() < deadline:
            time.sleep(0.001)
    times = row.times(Span.PUBLISH)
    assert sum(times.counts) == 3
    assert 0 < times.total_ns < 10e9, "since the end of the step, not since the machine was started"
