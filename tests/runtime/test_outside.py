"""Processes that are started from outside and join a runtime; and a runtime whose ranks are such."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.conftest import eventually, is_gone
from tests.runtime.test_joining import new_name
from tpworker import Runtime, RuntimeEvent, RuntimeFailed, RuntimeStopped, SamplingParams
from tpworker.ipc.joining import BYE, LEFT, Accepted, pack_answer, socket_address, unpack_hello
from tpworker.version import version

pytestmark = pytest.mark.usefixtures("nothing_left")

MakeRuntime = Callable[..., Runtime]


class Outside:
    """`tpworker rank` as a process, which a test plays the runtime of."""

    def __init__(self, *options: str, shell: bool = False) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.name = new_name()
        self.listener.bind(socket_address(self.name))
        self.listener.listen()
        self.listener.settimeout(20)
        command = [sys.executable, "-m", "tpworker", "rank", "--join", self.name, *options]
        if shell:  # another process between, which waits
            command = ["sh", "-c", '"$@"; true', "sh", *command]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.connection, _ = self.listener.accept()
        self.connection.settimeout(20)
        self.hello = unpack_hello(self.connection.recv(1 << 16), version())

    def accept(self) -> None:
        accepted = Accepted(1, "tpworker-rank1-standby", "tests.children.idle_rank", "cpu", "text", 20)
        self.connection.send(pack_answer(accepted))
        assert self.connection.recv(1 << 16) == b"ready"

    def ended(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=20)
        self.connection.close()
        self.listener.close()
        return self.process.returncode, said.strip()


def test_it_ends_with_the_runtime() -> None:
    """0 where that was stopped; 1, and a reason, where it failed or is gone."""
    for last, status, said in (
        (BYE, 0, ""),
        (BYE + b"rank 0 crashed", 1, "ERROR the runtime has failed: rank 0 crashed"),
        (b"", 1, "ERROR the runtime is gone: the connection to it is closed"),
    ):
        outside = Outside()
        outside.accept()
        if last:
            outside.connection.send(last)
        else:
            outside.connection.close()
        ended, words = outside.ended()
        assert (ended, words[-len(said) :]) == (status, said)


def test_sigterm_means_to_leave() -> None:
    outside = Outside("--rank", "1")
    assert (outside.hello.pid, outside.hello.rank) == (outside.process.pid, 1)
    assert outside.hello.cpus == tuple(sorted(os.sched_getaffinity(0)))
    outside.accept()
    outside.process.send_signal(signal.SIGTERM)
    assert outside.connection.recv(1000) == LEFT + b"it was sent SIGTERM"
    status, said = outside.ended()
    assert status == 0
    assert said.endswith("leaves: it was sent SIGTERM")


def test_it_ends_with_its_launcher() -> None:
    outside = Outside(shell=True)
    outside.accept()
    outside.process.kill()
    assert outside.connection.recv(1000) == (
        LEFT + f"pid {outside.process.pid}, which started it, has ended".encode()
    )
    outside.ended()
    eventually(lambda: is_gone(outside.hello.pid))


def test_who_is_refused_says_why_and_ends() -> None:
    outside = Outside()
    outside.connection.send(pack_answer("you are late"))
    assert outside.ended() == (2, "tpworker: error: the runtime refuses this process: you are late")


def test_without_a_runtime_it_waits_for_its_timeout() -> None:
    name = new_name()
    command = [sys.executable, "-m", "tpworker", "rank", "--join", name, "--timeout", "0.3"]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert f"no runtime has been at '{name}' within 0.3 s (--timeout)" in ended.stderr


# ------------------------------------------------------------------------------------- a runtime


class Ranks:
    """Processes from outside that join a runtime."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tpworker", "rank", "--join", self.name],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.processes.append(process)
        return process

    def statuses(self) -> list[int]:
        for process in self.processes:
            process.communicate(timeout=20)
        return [process.returncode for process in self.processes]


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(new_name())
    yield ranks
    for process in ranks.processes:
        process.kill()
        process.communicate()


def test_requests_go_on_when_a_rank_or_the_process_behind_it_is_lost(
    fake_runtime: MakeRuntime, ranks: Ranks
) -> None:
    told: list[str] = []
    events: list[RuntimeEvent] = []
    first, second = ranks.start(RANK="1", WORLD_SIZE="2"), ranks.start()
    runtime = fake_runtime(
        tensor_parallel_size=2,
        device="cpu",
        join_address=ranks.name,
        progress=lambda text, fraction: told.append(text),
        on_event=events.append,
    )

    async def ask() -> list[int]:
        greedy = SamplingParams(max_tokens=3, detokenize=False)
        return [token async for output in runtime.generate([5, 6, 7], greedy) for token in output.token_ids]

    async def until(kind: str, generation: int) -> None:
        while (kind, generation) not in [(event.kind, event.generation) for event in events]:
            await asyncio.sleep(0.02)

    async def live() -> None:
        async with runtime:
            expected = await ask()
            (rank1,) = psutil.Process(first.pid).children()
            rank1.kill()
            await until("recovered", 1)
            assert await ask() == expected
            assert first.poll() is None
            first.kill()
            await until("lost", 1)
            waiting = asyncio.create_task(ask())
            ranks.start()
            assert await waiting == expected

    asyncio.run(live())
    assert any(text.startswith("waiting for ") for text in told)
    assert "tpworker-rank1-standby" in {event.process for event in events}
    assert ranks.statuses() == [-9, 0, 0]
    assert second.returncode == 0


def test_they_end_well_when_the_runtime_is_stopped_while_they_import(
    fake_runtime: MakeRuntime, ranks: Ranks
) -> None:
    ranks.start()
    ranks.start()
    runtime = fake_runtime(tensor_parallel_size=2, device="cpu", join_address=ranks.name)

    async def live() -> None:
        start = asyncio.create_task(runtime.start())
        while runtime._processes is None or runtime._processes._joining.missing():  # type: ignore[union-attr]
            await asyncio.sleep(0.001)
        await runtime.stop()
        with pytest.raises(RuntimeStopped):
            await start

    asyncio.run(live())
    assert ranks.statuses() == [0, 0]


def test_who_does_not_come_is_named(fake_runtime: MakeRuntime, ranks: Ranks) -> None:
    process = ranks.start(RANK="0")
    assert process.stderr is not None
    assert "waiting for a runtime whose join address is" in process.stderr.readline()
    runtime = fake_runtime(tensor_parallel_size=2, device="cpu", join_address=ranks.name, start_timeout=2)
    with pytest.raises(RuntimeFailed) as caught:
        asyncio.run(runtime.start())
    assert str(caught.value).startswith(
        f"rank 1 of 2 has not joined '{ranks.name}' within 2 s (--start-timeout): start `tpworker rank "
        f"--join {ranks.name} --rank 1`"
    )
    assert caught.value.process == "tpworker-rank1"
    assert ranks.statuses() == [1]


def test_a_lost_process_that_nobody_replaces_is_the_end(fake_runtime: MakeRuntime, ranks: Ranks) -> None:
    process = ranks.start()
    events: list[RuntimeEvent] = []
    runtime = fake_runtime(device="cpu", join_address=ranks.name, on_event=events.append)

    async def live() -> None:
        async with runtime:
            runtime._processes._joining.timeout = 0.5  # type: ignore[union-attr]
            process.kill()
            while runtime.health().state != "failed":
                await asyncio.sleep(0.02)

    asyncio.run(live())
    kinds = [event.kind for event in events]
    assert kinds == ["lost", "recovering", "lost", "given_up"], "another generation would wait for the same"
    assert "rank 0 of 1 has not joined" in str(events[-1].summary)
