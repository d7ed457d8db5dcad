"""One process of the benchmark of several hosts: a scheduler, or a rank."""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import zmq

from tpworker.ipc.barrier import Barrier, default_spin

TIMEOUT = 60.0
DIGEST = 0x5EED5EED
WARM_UP = 50  # steps that are not counted


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process is told."""

    task: str  # 'schedule', 'answer' or 'meet'
    steps: int
    rank: int = 0
    num_ranks: int = 1  # of this host, for 'meet'
    addresses: tuple[str, ...] = ()  # of plans: of 'schedule' all ranks', of 'answer' its own
    plan_bytes: int = 0
    keys: tuple[str, str, str] | None = None  # CURVE: own public, own secret, the scheduler's public
    fds: tuple[int, ...] = ()  # of barriers: before the exchange, and behind it
    listen: str = ""  # host:port of the exchange, at the host that waits for the other
    connect: str = ""

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


def new_socket(job: Job) -> zmq.Socket[bytes]:
    """As the project's channels are, but for what TCP needs besides."""
    one = zmq.Context.instance().socket(zmq.PAIR)
    one.set(zmq.LINGER, 10_000)  # ms: what is sent last must leave
    if job.keys is not None:
        public, secret, server = (key.encode() for key in job.keys)
        one.set(zmq.CURVE_PUBLICKEY, public)
        one.set(zmq.CURVE_SECRETKEY, secret)
        if job.task == "schedule":
            one.set(zmq.CURVE_SERVER, 1)
        else:
            one.set(zmq.CURVE_SERVERKEY, server)
    return one


def schedule(job: Job) -> dict[str, Any]:
    """Sends plans to all ranks, and waits for the answers of all: µs of each."""
    plan, ranks = bytes(job.plan_bytes), [new_socket(job) for _ in job.addresses]
    for one, address in zip(ranks, job.addresses, strict=True):
        one.bind(address)
    for one in ranks:
        one.recv()  # hello
    took = []
    for _ in range(job.steps + WARM_UP):
        began = time.monotonic_ns()
        for one in ranks:
            one.send(plan, zmq.DONTWAIT)
        for one in ranks:
            one.recv()
        took.append((time.monotonic_ns() - began) / 1e3)
    for one in ranks:
        one.send(b"stop")
    zmq.Context.instance().destroy()
    return {"took": took[WARM_UP:]}


def answer(job: Job) -> dict[str, Any]:
    """Answers each plan."""
    one = new_socket(job)
    one.connect(job.addresses[0])
    one.send(b"hello")
    while one.recv() != b"stop":
        one.send(b"thirty bytes of tokens, or so..", zmq.DONTWAIT)
    return {}


def exchange(job: Job) -> Callable[[int], None]:
    """A function that tells the other host of a step, and waits until it has told of the same."""
    host, _, port = (job.listen or job.connect).partition(":")
    if job.listen:
        listener = socket.create_server((host, int(port)))
        peer, _ = listener.accept()
    else:
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                peer = socket.create_connection((host, int(port)))
                break
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    spin = default_spin(2 * job.num_ranks)

    def meet(step: int) -> None:
        word = (step << 32 | DIGEST).to_bytes(8, "little")
        peer.send(word)
        until, theirs = time.monotonic() + spin, b""
        while not theirs and time.monotonic() < until:
            with suppress(BlockingIOError):
                theirs = peer.recv(8, socket.MSG_DONTWAIT)
        while len(theirs) < 8:
            theirs += peer.recv(8 - len(theirs))
        assert theirs == word

    return meet


def meet(job: Job) -> dict[str, Any]:
    """Comes to the barrier as fast as it can: when it came, and when it left."""
    before, behind = (Barrier.attach(fd, job.num_ranks) for fd in job.fds)
    tell = exchange(job) if job.listen or job.connect else None
    is_two_level = len(job.fds) == 2 and job.fds[0] != job.fds[1]
    came, left = [], []
    for step in range(job.steps + WARM_UP):
        came.append(time.monotonic_ns())
        before.wait(job.rank, step, DIGEST, TIMEOUT)
        if is_two_level:
            if tell is not None:
                tell(step)
            behind.wait(job.rank, step, DIGEST, TIMEOUT)
        left.append(time.monotonic_ns())
    return {"came": came[WARM_UP:], "left": left[WARM_UP:]}


def main() -> None:
    """What the process does."""
    said: dict[str, Any] = json.loads(sys.argv[1])
    job = Job(**{name: tuple(value) if isinstance(value, list) else value for name, value in said.items()})
    gc.disable()
    done = {"schedule": schedule, "answer": answer, "meet": meet}[job.task](job)
    print(json.dumps(done), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
