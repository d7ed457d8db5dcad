"""An echoing scheduler that sends every step twice, and before it something of another generation."""

from __future__ import annotations

from dataclasses import replace

from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.child import SchedulerBoot, run_child
from tpworker.ipc.messages import StepOutput
from tpworker.testing.fake_scheduler import FakeScheduler


class RepeatingScheduler(FakeScheduler):
    def send(self, output: StepOutput) -> None:
        other = pack_int32([1] * (len(output.tokens) // 4))
        super().send(replace(output, generation=output.generation + 1, tokens=other))
        super().send(output)
        super().send(output)


run_child(SchedulerBoot, lambda boot: RepeatingScheduler(boot).run())
