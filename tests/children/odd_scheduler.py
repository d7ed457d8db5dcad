"""An echoing scheduler that does what a request's first token says, once that request has its first token."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

from tpworker.ipc.arrays import pack_int32, unpack_int32
from tpworker.ipc.child import SchedulerBoot, run_child
from tpworker.ipc.messages import RankReady, StepOutput
from tpworker.testing.fake_scheduler import FakeScheduler

GAP, STOP, HANG, NONSENSE, RAISE = 10, 11, 12, 13, 14


class OddScheduler(FakeScheduler):
    def send(self, output: StepOutput) -> None:
        super().send(output)
        match unpack_int32(output.tokens).tolist():
            case [10]:
                ahead = pack_int32([position + 5 for position in unpack_int32(output.positions)])
                super().send(replace(output, positions=ahead))
            case [11]:
                os.kill(os.getpid(), signal.SIGSTOP)
            case [12]:
                time.sleep(1000)
            case [13]:
                self.runtime.send(RankReady(self.boot.generation, 0))
            case [14]:
                raise ValueError("the scheduler is at a loss")
            case _:
                pass


if __name__ == "__main__":
    run_child(SchedulerBoot, lambda boot: OddScheduler(boot).run())
