"""What two hosts would cost a step, between two network namespaces on this machine (needs root, and `ip`).

plan      to all ranks and the answers of all back: over ipc on one host; over TCP with half of the ranks on
          the other; the same with CURVE keys
barrier   from the last rank's coming to the last rank's leaving, all coming as fast as they can: in shared
          memory on one host; on two, within each, then one exchange over TCP, then within each again

All times in µs. 'rounds' is the lowest and the highest median of a round. A pair of virtual interfaces has
the kernel's TCP, and neither wire nor network card.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq
from rich.console import Console
from rich.table import Table

from benchmarks.common.options import positive
from benchmarks.common.report import Summary, machine, save
from benchmarks.hosts.peer import Job
from tpworker.ipc.barrier import Barrier
from tpworker.ipc.channels import new_address

ROOT = Path(__file__).resolve().parents[2]
NEAR, FAR = "10.213.77.1", "10.213.77.2"
PORT = 7700
PLANS, BARRIERS = ("ipc", "tcp", "tcp + CURVE"), ("one host", "two hosts")


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark's options."""
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2, 4], help="even; default: 2 4")
    parser.add_argument("--rounds", type=positive, default=5, help="of each kind, in turns; default: 5")
    parser.add_argument("--steps", type=positive, default=1000, help="of a round; default: 1000")
    parser.add_argument("--plan-bytes", type=positive, default=64, help="of a plan; default: 64")


def run(options: argparse.Namespace) -> int:
    """Measures, prints a table, writes the JSON file."""
    if odd := [n for n in options.ranks if n % 2]:
        raise SystemExit(f"--ranks {odd[0]} cannot be halved")
    if os.geteuid() != 0:
        raise SystemExit("network namespaces need root")
    where, results = machine(), {}
    for num_ranks in options.ranks:
        rounds: dict[tuple[str, str], list[list[float]]] = {}
        for _ in range(options.rounds):
            for kind in PLANS:
                with two_hosts() as far:
                    rounds.setdefault(("plan", kind), []).append(plans(kind, num_ranks, options, far))
            for kind in BARRIERS:
                with two_hosts() as far:
                    rounds.setdefault(("barrier", kind), []).append(barriers(kind, num_ranks, options, far))
        results[num_ranks] = {key: Summary.of(samples) for key, samples in rounds.items()}
        print(f"{num_ranks} ranks measured", file=sys.stderr)
    _print(results, options, where)
    told = {n: {": ".join(key): one for key, one in by.items()} for n, by in results.items()}
    save(options.json, {"machine": where, "options": vars(options), "microseconds": told})
    return 0


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[list[str], list[str]]]:
    """Two network namespaces with a pair of interfaces between them. Yields what to begin a command with, to
    run it in the near one and in the far one."""
    names = [f"tpworker-{os.getpid()}-{side}" for side in ("near", "far")]
    links = [f"tpw{os.getpid() % 10**8}{side}" for side in ("n", "f")]
    made: list[str] = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        _ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", links[1], "netns", names[1])
        for name, link, address in zip(names, links, (NEAR, FAR), strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        near, far = (["ip", "netns", "exec", name] for name in names)
        yield near, far
    finally:
        for name in made:
            _ip("netns", "delete", name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def plans(
    kind: str, num_ranks: int, options: argparse.Namespace, hosts: tuple[list[str], list[str]]
) -> list[float]:
    """One round: the times of its steps, in µs."""
    near, far = hosts
    if kind == "ipc":
        addresses = [new_address(f"plan{rank}") for rank in range(num_ranks)]
    else:
        addresses = [f"tcp://{NEAR}:{PORT + rank}" for rank in range(num_ranks)]
    server = _keys() if "CURVE" in kind else None
    common: dict[str, Any] = {"steps": options.steps, "plan_bytes": options.plan_bytes}
    keys = None if server is None else (*server, server[0])
    commands = [(near, Job(task="schedule", addresses=tuple(addresses), keys=keys, **common))]
    for rank, address in enumerate(addresses):
        where = far if kind != "ipc" and rank >= num_ranks // 2 else near
        keys = None if server is None else (*_keys(), server[0])
        commands.append((where, Job(task="answer", addresses=(address,), keys=keys, **common)))
    took: list[float] = _run(commands)[0]["took"]
    return took


def _keys() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def barriers(
    kind: str, num_ranks: int, options: argparse.Namespace, hosts: tuple[list[str], list[str]]
) -> list[float]:
    """One round, as `plans`."""
    near, far = hosts
    with contextlib.ExitStack() as stack:

        def barrier(size: int) -> int:
            made = Barrier.create(size)
            stack.callback(made.close)
            return made.fd

        if kind == "one host":
            fd = barrier(num_ranks)
            commands = [
                (near, Job(task="meet", steps=options.steps, rank=rank, num_ranks=num_ranks, fds=(fd, fd)))
                for rank in range(num_ranks)
            ]
        else:
            size, commands = num_ranks // 2, []
            for where, side in ((near, "listen"), (far, "connect")):
                fds = barrier(size), barrier(size)
                for rank in range(size):
                    peer: dict[str, Any] = {side: f"{NEAR}:{PORT}"} if rank == 0 else {}
                    job = Job(task="meet", steps=options.steps, rank=rank, num_ranks=size, fds=fds, **peer)
                    commands.append((where, job))
        answers = _run(commands)
    came = zip(*(answer["came"] for answer in answers), strict=True)
    left = zip(*(answer["left"] for answer in answers), strict=True)
    return [(max(out) - max(into)) / 1e3 for into, out in zip(came, left, strict=True)]


def _run(commands: list[tuple[list[str], Job]]) -> list[dict[str, Any]]:
    """What each process has found out."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for where, job in commands:
            command = [*where, sys.executable, "-m", "benchmarks.hosts.peer", job.to_json()]
            started.append(subprocess.Popen(command, cwd=ROOT, pass_fds=set(job.fds), stdout=subprocess.PIPE))
        answers = [json.loads(process.communicate(timeout=120)[0] or "null") for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    if None in answers:
        raise SystemExit(f"{commands[answers.index(None)][1].task} failed")
    return answers


def _print(
    results: dict[int, dict[tuple[str, str], Summary]], options: argparse.Namespace, where: dict[str, Any]
) -> None:
    table = Table("ranks", "what", "how", "median", "p99", "rounds")
    for column in table.columns[3:]:
        column.justify = "right"
    for num_ranks, by_kind in results.items():
        for (what, how), s in by_kind.items():
            cells = f"{s.median:.1f}", f"{s.p99:.0f}", f"{s.low:.1f} … {s.high:.1f}"
            table.add_row(str(num_ranks), what, how, *cells, end_section=how in (PLANS[-1], BARRIERS[-1]))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"{where['cpu']}, {where['cores']} cores, load {where['load']:.1f} before; Linux {where['kernel']}, "
        f"Python {where['python']}, ZeroMQ {zmq.zmq_version()}; plans of {options.plan_bytes} bytes, "
        f"{options.rounds} rounds in turns, {options.steps} steps each\n{where['command']}",
        highlight=False,
    )
