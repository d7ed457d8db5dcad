"""Shares of a level in processes of their own: one event loop reads some ten thousand tokens a second.

parent                                             worker (python -m tpworker.bench.worker)
  ├── a line of JSON: server, plan, level ────────►│
  │◄── a line: it is ready ────────────────────────┤
  ├── a line: when to begin (CLOCK_MONOTONIC) ────►│ … requests …
  │◄── a line of JSON: what it has measured ───────┘
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from typing import Any

from tpworker.bench.connection import Address
from tpworker.bench.load import Level, Measured, raise_limit, run_level
from tpworker.bench.plan import Plan
from tpworker.errors import TpworkerError

_LONGEST_LINE = 1 << 30
_HEAD_START = 0.05  # seconds, for all to have heard when to begin


class WorkerLost(TpworkerError):
    """A process of the client's has ended too early."""


async def run_processes(
    address: Address, api_key: str | None, plan: Plan, level: Level, num_processes: int
) -> list[Measured]:
    """Runs a level in as many processes, or in this one, and returns what each has measured."""
    raise_limit()
    if num_processes == 1:
        return [await run_level(address, api_key, plan, level)]
    job = {"address": dataclasses.asdict(address), "api_key": api_key, "plan": plan.to_json()}
    workers: list[_Worker] = []
    try:
        for _ in range(num_processes):
            workers.append(await _Worker.start())
        for share, worker in enumerate(workers):
            part = level.shared(share, num_processes)
            worker.send({**job, "level": dataclasses.asdict(part)})
        for worker in workers:
            await worker.receive()
        begin = time.monotonic() + _HEAD_START
        for worker in workers:
            worker.send(begin)
        told = [await worker.receive() for worker in workers]
    finally:
        for worker in workers:
            await worker.close()
    return [Measured.from_json(one) for one in told]


class _Worker:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls) -> _Worker:
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tpworker.bench.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LONGEST_LINE,
            )
        )

    def send(self, what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")

    async def receive(self) -> Any:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise WorkerLost(f"a process of the client's ended with status {await self._process.wait()}")
        return json.loads(line)

    async def close(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


def main() -> None:
    """What a worker does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    raise_limit()
    job = json.loads(sys.stdin.readline())
    address, plan = Address(**job["address"]), Plan.from_json(job["plan"])
    print("true", flush=True)
    begin = sys.stdin.readline()
    if not begin:
        return  # nobody is there any more
    threading.Thread(target=_end_with_parent, daemon=True).start()
    level = Level(**job["level"])
    measured = asyncio.run(run_level(address, job["api_key"], plan, level, float(begin)))
    print(json.dumps(measured.to_json()), flush=True)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
