"""The scheduler of `bench acceptance`: how many drafts a plan has, its requests' cache_salt says."""

from __future__ import annotations

from typing import Any

from tpworker.ipc.child import SchedulerBoot, run_child
from tpworker.scheduler import process
from tpworker.scheduler.composer import Composer
from tpworker.scheduler.main import scheduler_main

AUTO = "auto"
"""A salt: the scheduler chooses."""


class SaltedComposer(Composer):
    """Composes what is ordered."""

    def _choose_num_drafts(self) -> int:
        requests = self.running or ([self.waiting.first()] if self.waiting else [])
        salts = {request.salt for request in requests} or {"0"}
        return super()._choose_num_drafts() if AUTO in salts else min(int(salt) for salt in salts)


def main(boot: SchedulerBoot) -> None:
    """What the process does."""
    patched: Any = process
    patched.Composer = SaltedComposer
    scheduler_main(boot)


if __name__ == "__main__":
    run_child(SchedulerBoot, main)
