"""A rank: the rank's half of the six verbs.

    3 admit   ipc/barrier.py      4 launch   runner.py      5 publish   publisher.py

The loop sleeps in the kernel until there is a plan; nothing in it waits for the device.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import Protocol

from tpworker.ipc.barrier import Barrier
from tpworker.ipc.board import Field, Row, Span
from tpworker.ipc.channels import Channel
from tpworker.ipc.messages import BatchPlan, Stop
from tpworker.ipc.trace import Kind, Teller
from tpworker.ipc.wire import decode, expect
from tpworker.rank.publisher import Publisher
from tpworker.rank.runner import Launched


class PlanOutOfOrder(Exception):
    """A plan that is not the next one: a gap or a repeat is an error, never skipped."""


class StepRunner(Protocol):
    """What the loop needs of `Runner`."""

    def launch(self, plan: BatchPlan) -> Launched:
        """Queues a step on the device and returns at once."""

    def catch_up(self) -> None:
        """Does what can wait until a step has been launched and published, the same on all ranks."""


class RankLoop:
    """Executes plans in step order until told to stop.

    Args:
        rank: of the TP group.
        generation: plans of another one are refused.
        plans: channel from the scheduler.
        barrier: where the ranks meet before every step.
        row: of the status board.
        runner, publisher: launch and publish.
        deadline: how many seconds to wait for the other ranks, asked anew at each step.
        trace: told what each step took; None: nobody is.
    """

    def __init__(
        self,
        rank: int,
        generation: int,
        plans: Channel,
        barrier: Barrier,
        row: Row,
        runner: StepRunner,
        publisher: Publisher,
        deadline: Callable[[], float],
        trace: Teller | None = None,
    ) -> None:
        self.rank = rank
        self.generation = generation
        self.next_step = 0
        self._plans = plans
        self._barrier = barrier
        self._row = row
        self._runner = runner
        self._publisher = publisher
        self._deadline = deadline
        self._trace = trace or Teller()

    def run(self) -> None:
        """Until the scheduler says Stop."""
        while (received := self.receive()) is not None:
            plan, digest = received
            self.admit(plan, digest)  # 3 admit
            launched = self._runner.launch(plan)  # 4 launch
            self._row[Field.LAUNCHED] = plan.step + 1
            self._publisher.publish(launched)  # 5 publish
            self._trace.end(Kind.LAUNCHED)
            self._runner.catch_up()

    def receive(self) -> tuple[BatchPlan, int] | None:
        """The next plan and the digest of its bytes; None for Stop."""
        data = self._plans.receive_encoded(None)
        assert data is not None
        message = decode(data)
        if isinstance(message, Stop):
            return None
        plan = expect(message, BatchPlan)
        if plan.generation != self.generation or plan.step != self.next_step:
            raise PlanOutOfOrder(
                f"plan of step {plan.step}, generation {plan.generation}; the next one is step "
                f"{self.next_step} of generation {self.generation}"
            )
        self._trace.begin(plan.step)
        self.next_step += 1
        self._row[Field.RECEIVED] = self.next_step
        return plan, zlib.crc32(data)

    def admit(self, plan: BatchPlan, digest: int) -> None:
        """Waits until every rank has the same plan: only then may any of them launch its collectives."""
        came = time.monotonic_ns()
        is_last = self._barrier.wait(self.rank, plan.step, digest, self._deadline())
        self._row[Field.ADMITTED] = plan.step + 1
        self._row.took(Span.BARRIER, time.monotonic_ns() - came)
        if is_last:
            self._row[Field.LAST_ARRIVALS] += 1
        self._trace.mark()
