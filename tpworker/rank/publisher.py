"""Results leave the device without anybody's waiting for them but this thread.

    launch thread     compute ──done──► copies: ring row ─► pinned buffer ──copied──► publisher thread
    queues all this                                                                   sleeps on it, sends,
    and goes on                                                                       frees ring row, buffer

A ring row and its host buffer are rewritten only after they were sent (invariant 4). The scheduler keeps
at most lookahead + 1 plans unanswered and the ring has one row more, so a row is always free when a step
wants it; that is checked, not waited for. And each row carries its step's number, checked once more.

Every rank has a publisher, since each must know which of its steps are done (to reuse staging buffers,
and to say where it stands); only rank 0 copies and sends. The other ranks' rows are never read, and their
publishers may fall behind: no plan waits for them.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpworker.ipc.board import Field, Row, Span
from tpworker.ipc.channels import Channel
from tpworker.ipc.messages import MAX_TOLD, StepResult, StepTiming
from tpworker.ipc.trace import Kind, Teller
from tpworker.kernels.operands import LOGPROB_ROW, MOST_LOGPROBS, NO_TOKEN
from tpworker.rank.device import Device, Event
from tpworker.rank.runner import Launched
from tpworker.rank.staging import StagingPool

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Published:
    launched: Launched
    copied: Event
    buffer: Tensor | None  # int64 [n], the ring's row on the host; None on the ranks that do not send
    logprobs: Tensor | None = None  # float32 [n, LOGPROB_ROW] on the host; None: nobody asks for them
    prompt_logprobs: Tensor | None = None


class Publisher:
    """Sends each step's tokens once the device has computed and copied them.

    Args:
        generation: for the messages.
        device: whose copy stream is used.
        ring_rows, ring_length: shape of the token ring.
        num_rows: that a step samples at most.
        max_tokens: of a step.
        staging: gets the buffers back.
        row: of the status board.
        connect: makes the channel to the scheduler, on the publisher's own thread; None: do not send.
        fail: told of the exception when a step went wrong on the device; may not return.
        trace: told when each step ran and was sent; None: nobody is.
    """

    def __init__(
        self,
        generation: int,
        device: Device,
        ring_rows: int,
        ring_length: int,
        num_rows: int,
        max_tokens: int,
        staging: StagingPool,
        row: Row,
        connect: Callable[[], Channel] | None,
        fail: Callable[[BaseException], None],
        trace: Teller | None = None,
    ) -> None:
        self._generation = generation
        self._device = device
        self._staging = staging
        self._row = row
        self._connect = connect
        self._fail = fail
        self._trace = trace or Teller()
        self._rows_in_use = 0
        self._rows_freed = 0
        self._has_told_of_nan = False
        num_bytes = 8 * ring_rows * ring_length
        self._buffers = device.host_buffer(num_bytes).view(torch.int64).view(ring_rows, -1).unbind(0)
        num_told = num_rows + min(max_tokens, MAX_TOLD)
        logprobs = device.host_buffer(4 * ring_rows * num_told * LOGPROB_ROW).view(torch.float32)
        self._logprobs = logprobs.view(ring_rows, num_told, LOGPROB_ROW)
        self._num_rows = num_rows
        self._queue: queue.SimpleQueue[_Published | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def publish(self, launched: Launched) -> None:
        """Queues the copy of a step's tokens and their sending (launch thread; returns at once)."""
        buffer = logprobs = prompt_logprobs = None
        copied = launched.done
        if self._connect is not None:
            in_use = self._rows_in_use - self._rows_freed
            assert in_use < len(self._buffers), "a ring row would be rewritten before it was sent"
            self._rows_in_use += 1
            buffer = self._buffers[launched.step % len(self._buffers)][: len(launched.ring_row)]
            copies = self._device.copies
            copies.wait(launched.done)
            copies.run(lambda: _copy(buffer, launched.ring_row))
            logprobs = self._copy_logprobs(launched, launched.logprobs, 0)
            prompt_logprobs = self._copy_logprobs(launched, launched.prompt_logprobs, self._num_rows)
            copied = copies.record()
        self._queue.put(_Published(launched, copied, buffer, logprobs, prompt_logprobs))

    def _copy_logprobs(self, launched: Launched, source: Tensor | None, first: int) -> Tensor | None:
        """Queues the copy of logprob rows to those of the step's buffer from `first` on."""
        if source is None:
            return None
        buffer = self._logprobs[launched.step % len(self._logprobs), first : first + len(source)]
        self._device.copies.run(lambda: _copy(buffer, source))
        return buffer

    def close(self) -> None:
        """Publishes what is queued, then ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._device.adopt_thread()
            channel = None if self._connect is None else self._connect()
            while (item := self._queue.get()) is not None:
                item.copied.synchronize()
                self._trace.begin(item.launched.step)
                if channel is not None and item.buffer is not None:
                    result = self._result(item, item.buffer)
                    channel.send(result)
                    self._rows_freed += 1
                    self._row.took(Span.PUBLISH, time.monotonic_ns() - result.timing.ended)
                self._staging.give_back(item.launched.staging)
                self._row[Field.COMPLETED] = item.launched.step + 1
                self._tell(item.launched)
            if channel is not None:
                channel.close()
        except BaseException as error:
            self._fail(error)

    def _tell(self, launched: Launched) -> None:
        """Of a step that is done: to ask when it ran costs microseconds, but waits for nothing."""
        if self._trace.is_told:
            self._trace.end(Kind.PUBLISHED, launched.started.time_ns(), launched.done.time_ns())

    def _result(self, item: _Published, buffer: Tensor) -> StepResult:
        launched = item.launched
        timing = StepTiming(launched.launched_ns, launched.started.time_ns(), launched.done.time_ns())
        row = buffer.numpy()
        assert row[0] == launched.step, f"the ring row of step {launched.step} holds step {row[0]}"
        tokens, counts, proposed = row[1:], b"", row[:0]
        if launched.width > 1:
            by_slot = tokens.reshape(launched.num_sampled, launched.width + 1)
            tokens, proposed = by_slot[:, :-1].ravel(), by_slot[:, -1]
        is_taken = tokens != NO_TOKEN
        if launched.width > 1 or not is_taken.all():
            counts = _int32s(is_taken.reshape(launched.num_sampled, launched.width).sum(axis=1))
            tokens = tokens[is_taken]
        if (tokens < 0).any():  # ~token, see `sampling.sample`
            tokens = tokens ^ (tokens >> 63)
            self._tell_of_nan()
        return StepResult(
            self._generation,
            launched.step,
            _int32s(tokens),
            timing,
            _packed(item.logprobs, is_taken if counts else None),
            _packed(item.prompt_logprobs),
            counts,
            _int32s(proposed) if proposed.any() else b"",
        )

    def _tell_of_nan(self) -> None:
        if not self._has_told_of_nan:
            self._has_told_of_nan = True
            logger.warning(
                "logits are NaN, and tokens chosen by them mean nothing: weights that are broken do that, "
                "and a --dtype whose range is too small for the model (float16)"
            )


def _int32s(values: NDArray[np.int64]) -> bytes:
    return values.astype("<i4").tobytes()


def _packed(rows: Tensor | None, is_taken: NDArray[np.bool_] | None = None) -> bytes:
    """Logprob rows as they travel, all or those that are taken: the ids as int32."""
    if rows is None:
        return b""
    values = rows.numpy() if is_taken is None else rows.numpy()[is_taken]
    packed = np.empty(values.shape, np.dtype("<f4"))
    ids = 1 + MOST_LOGPROBS
    packed[:, :ids] = values[:, :ids]
    packed.view(np.dtype("<i4"))[:, ids:] = values[:, ids:]
    return packed.tobytes()


def _copy(buffer: Tensor, tokens: Tensor) -> None:
    buffer.copy_(tokens, non_blocking=True)
