"""The scheduler of `bench drafts`: how many drafts a plan has, its requests' seeds say (imposed.py)."""

from __future__ import annotations

from typing import Any

from benchmarks.steps.imposed import AUTO, Order
from tpworker.ipc.child import SchedulerBoot, run_child
from tpworker.scheduler import process
from tpworker.scheduler.composer import Composer
from tpworker.scheduler.main import scheduler_main


class OrderedComposer(Composer):
    """Composes what is ordered."""

    def _choose_num_drafts(self) -> int:
        orders = {Order.of(request.sampling.seed).num_drafts for request in self.running} or {0}
        return super()._choose_num_drafts() if AUTO in orders else min(orders)


def main(boot: SchedulerBoot) -> None:
    """What the process does."""
    patched: Any = process
    patched.Composer = OrderedComposer
    scheduler_main(boot)


if __name__ == "__main__":
    run_child(SchedulerBoot, main)
