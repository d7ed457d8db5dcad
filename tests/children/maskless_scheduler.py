"""A real scheduler that stops writing masks at step 5, in the way that FAULT names: and its loop goes on."""

from __future__ import annotations

import os

from tpworker.ipc.child import SchedulerBoot, run_child

FIRST = 5


def main(boot: SchedulerBoot) -> None:
    from tpworker.ipc.masks import MaskBoard
    from tpworker.ipc.messages import MAX_STEP
    from tpworker.scheduler.guides import Guides
    from tpworker.scheduler.inflight import InFlight
    from tpworker.scheduler.main import scheduler_main

    publish, write, all_known = MaskBoard.publish, Guides._write_masks, Guides._all_known

    def forgetful_publish(self: MaskBoard, step: int) -> None:
        if step < FIRST or step == MAX_STEP:
            publish(self, step)

    def forgetful_write(self: Guides, plan: InFlight) -> None:
        if plan.step < FIRST:
            write(self, plan)

    def faulty_write(self: Guides, plan: InFlight) -> None:
        if plan.step >= FIRST:
            raise ValueError("a mask is at a loss")
        write(self, plan)

    match os.environ["FAULT"]:
        case "not told":
            MaskBoard.publish = forgetful_publish  # type: ignore[method-assign]
        case "not written":
            Guides._write_masks = forgetful_write  # type: ignore[method-assign]
        case "never due":
            Guides._all_known = staticmethod(  # type: ignore[method-assign]
                lambda plan: plan.step < FIRST and all_known(plan)
            )
        case "raises":
            Guides._write_masks = faulty_write  # type: ignore[method-assign]
    scheduler_main(boot)


if __name__ == "__main__":
    run_child(SchedulerBoot, main)
