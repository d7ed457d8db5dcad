"""Replicas as fakes."""

from __future__ import annotations

from dataclasses import replace

from tests.server.fake_runtime import FakeRuntime
from tpworker.integrations.relay import Ask, Outputs, ReplicaLost
from tpworker.integrations.replica import Told


def told_by(runtime: FakeRuntime, name: str) -> Told:
    """What a replica around a fake runtime tells of itself."""
    stats = replace(runtime.stats(), recent_steps=())
    return Told(name, runtime.health(), stats, "cpu", "float32", 257, 512, 64, 1600)


class DeadOnce:
    """Replicas of which the first is lost once, after so many outputs; -1: never.

    The fake runtime says the same wherever it is asked; what was delivered is left out here.
    """

    def __init__(self, runtimes: list[FakeRuntime], place: int) -> None:
        self.runtimes = runtimes
        self.place = place
        self.num_lost = 0
        self.asked: list[Ask] = []
        self.called: list[str] = []

    async def call_all(self, method: str) -> None:
        self.called.append(method)

    async def open(self, ask: Ask) -> Outputs:
        self.asked.append(ask)
        runtime = self.runtimes[len(self.asked) % len(self.runtimes)]
        number = 0
        outputs = runtime.generate(ask.prompt, ask.sampling, default_max_tokens=ask.default_max_tokens)
        try:
            async for output in outputs:
                if number == self.place:
                    self.place, self.num_lost = -1, self.num_lost + 1
                    raise ReplicaLost("it is dead")
                number += 1
                if output.num_output_tokens > len(ask.delivered):
                    yield output
        finally:
            await outputs.aclose()
