"""An echoing scheduler that raises whenever it has sent a certain token, whatever else it has sent."""

from __future__ import annotations

from tests.children.odd_scheduler import RAISE
from tpworker.ipc.arrays import unpack_int32
from tpworker.ipc.child import SchedulerBoot, run_child
from tpworker.ipc.messages import StepOutput
from tpworker.testing.fake_scheduler import FakeScheduler


class PoisonableScheduler(FakeScheduler):
    def send(self, output: StepOutput) -> None:
        if RAISE in unpack_int32(output.tokens):
            raise ValueError("the scheduler is at a loss")
        super().send(output)


if __name__ == "__main__":
    run_child(SchedulerBoot, lambda boot: PoisonableScheduler(boot).run())
