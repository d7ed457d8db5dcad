"""A real rank that goes wrong at step 5, if it is the middle one, in the way that FAULT names.

STEP_SECONDS makes the steps of all ranks slow.
"""

from __future__ import annotations

import os
import time

from tpworker.ipc.child import RankBoot, run_child


def main(boot: RankBoot) -> None:
    from tpworker.ipc.messages import BatchPlan
    from tpworker.rank import loop, runner
    from tpworker.rank.process import rank_main

    receive, run = loop.RankLoop.receive, runner.Runner._run

    def faulty_receive(self: loop.RankLoop) -> tuple[BatchPlan, int] | None:
        received = receive(self)
        if received is None or received[0].step != 5:
            return received
        match os.environ["FAULT"]:
            case "raises":
                raise ValueError("a fault of this rank's own")
            case "diverges":
                return received[0], received[1] ^ 1
            case "hangs":
                time.sleep(3600)
        return received

    def faulty_run(self: runner.Runner, step: runner._Step) -> None:
        if step.number == 5:
            match os.environ["FAULT"]:
                case "device":
                    raise RuntimeError("a bad kernel")
                case "stalls":
                    time.sleep(3600)
        run(self, step)

    def slow_run(self: runner.Runner, step: runner._Step) -> None:
        time.sleep(float(os.environ["STEP_SECONDS"]))
        (faulty_run if boot.rank == victim else run)(self, step)

    victim = boot.num_ranks // 2
    if "STEP_SECONDS" in os.environ:
        runner.Runner._run = slow_run  # type: ignore[method-assign]
    elif boot.rank == victim:
        loop.RankLoop.receive = faulty_receive  # type: ignore[method-assign]
        runner.Runner._run = faulty_run  # type: ignore[method-assign]
    rank_main(boot)


if __name__ == "__main__":
    run_child(RankBoot, main)
