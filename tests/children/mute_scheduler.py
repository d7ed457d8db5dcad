"""An echoing scheduler that gets ready, and does not say so."""

from __future__ import annotations

from tpworker.ipc.child import SchedulerBoot, run_child
from tpworker.ipc.messages import Message, SchedulerReady
from tpworker.testing.fake_scheduler import FakeScheduler


class MuteScheduler(FakeScheduler):
    def run(self) -> None:
        send = self.runtime.send

        def some(message: Message) -> None:
            if not isinstance(message, SchedulerReady):
                send(message)

        self.runtime.send = some  # type: ignore[method-assign]
        super().run()


if __name__ == "__main__":
    run_child(SchedulerBoot, lambda boot: MuteScheduler(boot).run())
