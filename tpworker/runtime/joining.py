"""Ranks that are started from outside: by torchrun, Slurm, a Ray placement group, or by hand.

    tpworker rank --join NAME ──► Joining: same user? same version? is that rank missing? its GPU its own?
                                     └──► OutsideStandby, one a rank; each generation's rank is forked from it

What joins is a standby as any other (standby.py), for one rank, that connects instead of being started. So a
rank that is lost is forked again from its own; where the outside process itself is lost, the next generation
waits until another has joined in its place. A thread of its own answers whoever comes, for as long as the
runtime lives.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable

from tpworker.errors import ConfigError
from tpworker.ipc.child import RANK_NAME
from tpworker.ipc.codec import MessageError
from tpworker.ipc.forks import GUARD, close_in_forks
from tpworker.ipc.joining import (
    ANY,
    MAX_HELLO_BYTES,
    Accepted,
    AnotherVersion,
    Hello,
    pack_answer,
    peer_of,
    socket_address,
    unpack_hello,
)
from tpworker.logs import format_in_use
from tpworker.runtime.faults import Fault
from tpworker.runtime.outside import OutsideStandby
from tpworker.runtime.standby import KILL_SECONDS
from tpworker.version import version

logger = logging.getLogger(__name__)

HELLO_SECONDS = 10.0
"""How long who has connected may take to say who it is."""

_BACKLOG = 64
_NO_DESCRIPTORS_SECONDS = 0.1  # after which it is looked whether some are free


class NotJoined(Exception):
    """Ranks that are started from outside are not there."""


class Joining:
    """Where ranks join: listens from its making on. `close` it. Methods may be called from any thread.

    Args:
        name: of the address.
        num_ranks: how many are wanted.
        module: what they are to run (`python -m`).
        device: 'cpu' or 'cuda'.
        timeout: seconds for which missing ones are waited for, by whoever waits.

    Raises:
        ConfigError: another runtime listens there.
    """

    def __init__(self, name: str, num_ranks: int, module: str, device: str, timeout: float) -> None:
        self.name = name
        self.num_ranks = num_ranks
        self.timeout = timeout
        self.on_change: Callable[[], None] | None = None
        """Called, from a thread of its own, when one has joined."""
        self._module = module
        self._device = device
        self._joined: dict[int, OutsideStandby] = {}
        self._replaced: list[OutsideStandby] = []  # have ended
        self._silent: dict[int, tuple[socket.socket, float]] = {}  # have not said hello, and since when
        self._others: set[int] = set()  # users who must not join, and tried
        self._lock = threading.Lock()
        self._is_closed = False
        with GUARD, contextlib.ExitStack() as undo:
            self._listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            try:
                self._listener.bind(socket_address(name))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                raise ConfigError(
                    f"join_address={name!r}: another runtime of yours waits for ranks there: give this one "
                    "another name, or stop that one"
                ) from None
            self._listener.listen(_BACKLOG)
            self._listener.setblocking(False)
            self._stop_reader, self._stop_writer = os.pipe2(os.O_CLOEXEC)
            undo.pop_all()
        close_in_forks(self)
        self._thread = threading.Thread(target=self._answer_all, name="tpworker-joining", daemon=True)
        self._thread.start()

    def leave_to_parent(self) -> None:
        """See `forks.Holder`."""
        self._listener.close()
        for connection, _ in self._silent.values():
            connection.close()
        numbers = self._stop_reader, self._stop_writer
        self._stop_reader = self._stop_writer = -1  # first: in a fork the numbers may soon be others'
        for fd in numbers:
            if fd >= 0:
                os.close(fd)

    def missing(self) -> list[int]:
        """Ranks that are not here."""
        with self._lock:
            return [rank for rank in range(self.num_ranks) if not self._is_here(rank)]

    def standbys(self) -> tuple[OutsideStandby, ...]:
        """Those of all ranks, in their order. One that stands still is killed, and missing. To be called when
        no generation lives: what they were before is freed.

        Raises:
            NotJoined: some are missing.
        """
        with self._lock:
            for rank, standby in list(self._joined.items()):
                if standby.is_alive and standby.stands_still():
                    standby.kill()
                    standby.wait(KILL_SECONDS)
                if not self._is_here(rank):
                    self._replaced.append(self._joined.pop(rank))
            while self._replaced:
                self._replaced.pop().close()
            if len(self._joined) < self.num_ranks:
                raise NotJoined
            return tuple(self._joined[rank] for rank in range(self.num_ranks))

    def gpus(self) -> tuple[str, ...]:
        """By rank the UUID of its GPU, as far as they are here; none on the CPU."""
        with self._lock:
            return tuple(standby.gpu for _, standby in sorted(self._joined.items()) if standby.gpu)

    def waits_for(self, missing: list[int]) -> str:
        """What is waited for, in a line."""
        here = self.num_ranks - len(missing)
        is_here = f"{here} of {self.num_ranks} {'is' if here == 1 else 'are'} here"
        return f"waiting for {_listed(missing)} to join {self.name!r}: {is_here}"

    def fault(self, missing: list[int]) -> Fault:
        """That these have not joined in time."""
        have = "has" if len(missing) == 1 else "have"
        option = f" --rank {missing[0]}" if len(missing) == 1 else ""
        return Fault(
            ", ".join(RANK_NAME.format(rank) for rank in missing),
            f"{_listed(missing)} of {self.num_ranks} {have} not joined {self.name!r} within "
            f"{self.timeout:g} s (--start-timeout): start `tpworker rank --join {self.name}{option}` on this "
            "machine, as this user",
            is_external=True,
            is_final=True,
        )

    def close(self, why: str) -> None:
        """Ends all that have joined, and waits until they are gone. Once more does no harm.

        Args:
            why: the runtime has failed, which they are told; '': it has not.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        os.write(self._stop_writer, b"\0")
        self._thread.join()
        self.leave_to_parent()
        for standby in self._joined.values():
            standby.dismiss(why)
        for standby in (*self._joined.values(), *self._replaced):
            standby.close()
        self._joined.clear()
        self._replaced.clear()

    def _is_here(self, rank: int) -> bool:
        standby = self._joined.get(rank)
        return standby is not None and standby.is_alive

    # ----------------------------------------------------------------------------- the thread

    def _answer_all(self) -> None:
        """Answers whoever comes, until `close`."""
        poll = select.poll()
        for fd in (self._listener.fileno(), self._stop_reader):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(1000 if self._silent else None)}
            if self._stop_reader in ready:
                break
            if self._listener.fileno() in ready and (connection := self._accept()) is not None:
                poll.register(connection, select.POLLIN)
            for fd, (connection, since) in list(self._silent.items()):
                is_late = time.monotonic() - since > HELLO_SECONDS
                if fd in ready or is_late:
                    poll.unregister(fd)
                    self._greet(connection)
                    del self._silent[fd]  # by now it is closed, or a standby's

    def _accept(self) -> socket.socket | None:
        try:
            with GUARD:
                connection, _ = self._listener.accept()
                self._silent[connection.fileno()] = connection, time.monotonic()
        except OSError as error:  # it has left already; or no descriptors are free
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(_NO_DESCRIPTORS_SECONDS)  # it waits, and would be found again and again
            return None
        connection.setblocking(False)
        _, uid = peer_of(connection)
        if uid == os.getuid():
            return connection
        if uid not in self._others:  # each is told of once: they could come at will
            self._others.add(uid)
            logger.warning(
                "a process of user %d is not let in at %r: ranks must be of user %d",
                uid,
                self.name,
                os.getuid(),
            )
        del self._silent[connection.fileno()]
        connection.close()
        return None

    def _greet(self, connection: socket.socket) -> None:
        """Takes who has connected as a rank, or says why not."""
        answer: Accepted | str
        pid, _ = peer_of(connection)
        try:
            hello = unpack_hello(connection.recv(MAX_HELLO_BYTES), version())
            answer = self._why_not(hello, pid) or self._take(hello, connection)
        except AnotherVersion as other:
            answer = (
                f"it is tpworker {other}, and the runtime {version()}: start it with the same installation"
            )
        except (OSError, MessageError) as error:
            answer = f"it did not say who it is ({error})"
        if isinstance(answer, Accepted):
            if (tell := self.on_change) is not None:
                tell()
            return
        logger.warning("a process that wants to join %r is refused (pid %d): %s", self.name, pid, answer)
        with contextlib.suppress(OSError):
            connection.send(pack_answer(answer))
        connection.close()

    def _why_not(self, hello: Hello, pid: int) -> str:
        """Why this process can be no rank at all; '': it can."""
        if pid != hello.pid:
            return (
                f"it says it is pid {hello.pid}, and is {pid or 'not to be seen'} from here: ranks must be "
                "in the PID namespace (container) of the runtime"
            )
        if hello.num_ranks not in (0, self.num_ranks):
            return (
                f"its launcher has started {hello.num_ranks} processes, and tensor_parallel_size is "
                f"{self.num_ranks}: start as many, or set the other"
            )
        if hello.rank >= self.num_ranks:
            last = self.num_ranks - 1
            return f"{hello.told_by}, and tensor_parallel_size is {self.num_ranks}: ranks are 0 to {last}"
        return ""

    def _take(self, hello: Hello, connection: socket.socket) -> Accepted | str:
        """Puts it in the place of a missing rank; or says why not."""
        with self._lock:
            missing = [rank for rank in range(self.num_ranks) if not self._is_here(rank)]
            if hello.rank == ANY and not missing:
                return f"all {self.num_ranks} ranks are here"
            rank = missing[0] if hello.rank == ANY else hello.rank
            if rank not in missing:
                told = f" ({hello.told_by})" if hello.told_by else ""
                return f"rank {rank}{told} is here already: pid {self._joined[rank].process.pid}"
            gpu = ""
            if self._device == "cuda":
                gpu, obstacle = self._gpu_of(rank, hello)
                if obstacle:
                    return obstacle
            standby = OutsideStandby(rank, hello, gpu, connection)
            level = logging.getLogger("tpworker").getEffectiveLevel()
            accepted = Accepted(rank, standby.name, self._module, self._device, format_in_use(), level)
            try:
                connection.send(pack_answer(accepted))
            except OSError:  # it did not wait for that: nothing can be forked from it, though it may live
                standby.leave_to_parent()
                raise
            if (before := self._joined.pop(rank, None)) is not None:
                self._replaced.append(before)  # a generation may end that is forked of it
            self._joined[rank] = standby
        logger.info(
            "rank %d has joined: pid %d, on %s", rank, hello.pid, gpu or f"{len(hello.cpus)} CPUs"
        )  # fmt: skip
        return accepted

    def _gpu_of(self, rank: int, hello: Hello) -> tuple[str, str]:
        """The UUID of its GPU, and why that cannot be used ('': it can)."""
        seen = len(hello.gpus)
        if not seen:
            return "", f"it sees no GPU ({hello.no_gpu or 'there is none'}): ranks run on GPUs (--device)"
        index = 0 if seen == 1 else rank if hello.gpu == ANY else hello.gpu
        if index >= seen:
            return (
                "",
                f"it is to have GPU {index}, and sees {seen} (CUDA_VISIBLE_DEVICES, the launcher's GPUs)",
            )
        gpu = hello.gpus[index]
        for other, standby in self._joined.items():
            if other == rank or not standby.is_alive:
                continue
            if standby.gpu == gpu:
                return "", f"its GPU {gpu} is rank {other}'s already: give each process one of its own"
            if standby.gpu not in hello.reachable or gpu not in standby.reachable:
                return "", (
                    f"it and rank {other} may not both open GPUs {gpu} and {standby.gpu}, as ranks must to "
                    "reach each other's memory: let each process open all GPUs of the group (Slurm, where "
                    "ConstrainDevices is set: --gpus-per-node and --gpu-bind=none, not --gpus-per-task)"
                )
        return gpu, ""


def _listed(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
