"""`tpworker`, with a runtime that is told what to say: what --model names is how it behaves.

python -m tests.server.fake_cli serve --model MANNER …
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import tpworker.runtime.runtime
from tests.server.fake_runtime import FakeRuntime, byte_tokenizer
from tpworker.__main__ import run
from tpworker.cli import main
from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError, ModelError, RuntimeFailed

START_ERRORS: dict[str | None, Exception] = {
    "bad-config": ConfigError("tensor_parallel_size=64 is more than there are"),
    "bad-model": ModelError("config.json names an architecture that nobody knows"),
    "bad-start": RuntimeFailed("tpworker-rank1 raised OSError", "tpworker-rank1", "Traceback: its lines"),
}


class TalkingRuntime(FakeRuntime):
    """Reports progress, and behaves as its model's name says."""

    def __init__(self, *, config: RuntimeConfig, progress: Any, needs_tokenizer: bool = False) -> None:
        super().__init__(
            state="stopped",
            start_error=START_ERRORS.get(config.model),
            before=self._before,
            the_tokenizer=byte_tokenizer(None) if config.model == "plain" else byte_tokenizer(),
            configured=config,
        )
        self._progress = progress
        if config.model == "slow-start":
            self.start_gate = asyncio.Event()

    async def start(self) -> None:
        self._progress("loading the fake", None)
        self._progress("loading the fake", 0.5)
        await super().start()

    async def stop(self) -> None:
        await super().stop()
        if self.config.model in ("clinging", "endless-clinging"):
            await asyncio.Event().wait()
        print("the runtime was stopped", file=sys.stderr, flush=True)

    async def drain(self, timeout: float | None = None) -> None:
        # For ever, so that a test that should not wait for it cannot pass.
        await super().drain(timeout if self.config.model == "hasty" else None)

    async def _before(self, position: int) -> None:
        if position == 3:
            if self.config.model in ("endless", "hasty", "endless-clinging"):
                await asyncio.Event().wait()
            if self.config.model == "held":  # until SIGUSR1, which the last of them gets
                go = asyncio.Event()
                asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, go.set)
                print("it holds on", file=sys.stderr, flush=True)
                await go.wait()
            if self.config.model == "lazy":
                await asyncio.sleep(1)
            if self.config.model == "mortal":
                self.fail()


if __name__ == "__main__":
    tpworker.runtime.runtime.Runtime = TalkingRuntime  # type: ignore[assignment, misc]

    def command() -> int:
        status = main()
        server_packages = {"fastapi", "uvicorn", "starlette", "prometheus_client"} & set(sys.modules)
        print(f"server packages: {sorted(server_packages)}", file=sys.stderr)
        return status

    run(command)
