"""Starts, watches and stops the processes of one generation: a scheduler and its TP ranks.

The processes are forked from standbys (standby.py). One thread does all of it. It sleeps on every child's
report pipe (EOF: the child is gone) and status socket, on the standbys' control sockets (EOF: the standby is
gone, and all children of its with it), and on a pipe through which other threads wake it.

    start ──► watch ──► one has ended, or `blame` ──► whose fault? ──► kill all ──► `on_fault` ──► reap all
                └─────► `stop` ──► all end by themselves, or are killed at the deadline ───────────────┘
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import selectors
import threading
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import replace

from tpworker.ipc.barrier import Barrier
from tpworker.ipc.board import Board, Phase
from tpworker.ipc.channels import new_address
from tpworker.ipc.child import RANK_NAME, RankBoot, SchedulerBoot, board_names
from tpworker.ipc.masks import MaskBoard
from tpworker.ipc.patience import Patience
from tpworker.logs import format_in_use
from tpworker.runtime.children import Child, is_stopped
from tpworker.runtime.faults import Ending, Fault, Kind, find_cause
from tpworker.runtime.group import Group, Wiring
from tpworker.runtime.joining import NotJoined
from tpworker.runtime.keeping import Keeping
from tpworker.runtime.standby import AnyStandby
from tpworker.runtime.standbys import Standbys
from tpworker.runtime.standing import explain, progress_of, standing_of

logger = logging.getLogger(__name__)

GRACE_SECONDS = {Kind.DIED: 0.1, Kind.RAISED: 0.1, Kind.ABORTED: 0.5, Kind.WAITED: 0.5, Kind.LOST: 0.5}
"""How long to wait for further endings after one of a kind: the less it tells, the longer."""
KILLED_SECONDS = 0.05
"""The same after a SIGKILL of a scheduler or a rank, which explains itself."""
STATUS_SECONDS = 2.0
"""How long a process that ended without a report may take to be reaped; its memory is freed before."""
ANSWER_SECONDS = 1.0
"""How long a standby may take to tell of a child that is gone: then the standby hangs, and is killed."""
WIDOWED_SECONDS = 1.0
"""How long the others may take to end by themselves when one has been lost, for which they may wait."""
JOIN_SECONDS = 1.0
"""How often it looks whether ranks that have joined are still there, while others are missing."""
REAP_SECONDS = 30.0
"""How long a killed process may take to end."""


class Supervisor:
    """Owner of the processes of one generation, which it starts at once.

    All methods may be called from any thread, `board` and `close` from one. It is done when `ended` is;
    then call `close`.

    Args:
        group: what to start.
        runtime_address: where the scheduler connects to; somebody is bound to it already.
        on_fault: called from the supervisor's thread, at most once, when a process has ended or was blamed;
            by then all have been sent SIGKILL.
        standbys: what the processes are forked from, which serve nobody else until it has `ended`; those that
            do not live are started. None: its own, which end with it.
        keeping: what outlives the ranks, which stays the caller's; None: nothing does.
    """

    def __init__(
        self,
        group: Group,
        runtime_address: str,
        on_fault: Callable[[Fault], None],
        standbys: Standbys | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        self.group = group
        self._standbys = standbys or Standbys(group.scheduler_module, group.rank_module, group.rank.device)
        self._owns_standbys, self._owns_keeping = standbys is None, keeping is None
        self._runtime_address = runtime_address
        self.ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.ended.set_running_or_notify_cancel()  # whoever waits for it cannot cancel it
        self._on_fault = on_fault
        self.leftovers: list[str] = []
        """Processes that were killed and have not ended, once it is done."""
        self.was_orderly = False
        """Whether all have ended by themselves, and well, once it is done."""
        self.waits_for = ""
        """Which ranks it waits for that are started from outside, in a line; '': for none."""
        self._children: list[Child] = []
        self._used: tuple[AnyStandby, ...] = ()
        self._over: list[Child | AnyStandby] = []  # in the order in which they were seen to end
        self._blamed: Fault | None = None
        self._stopping: Patience | None = None
        self._killed = self._closed = False
        self._lock = threading.Lock()  # of the wake-up pipe: a closed descriptor's number may be another's
        with contextlib.ExitStack() as undo:
            self.board = Board.create(board_names(group.num_ranks), group.about)
            undo.callback(self.board.close)
            self._barrier = Barrier.create(group.num_ranks)
            undo.callback(self._barrier.close)
            self._meeting = Barrier.create(group.num_ranks)
            undo.callback(self._meeting.close)
            self._masks = MaskBoard.create(group.scheduler.max_num_seqs, group.scheduler.vocab_size)
            undo.callback(self._masks.close)
            self._keeping = keeping or Keeping(group.num_ranks)
            undo.callback(self._close_keeping)
            self._wake_receiver, self._wake_sender = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            undo.callback(os.close, self._wake_receiver)
            undo.callback(os.close, self._wake_sender)
            self._selector = selectors.DefaultSelector()
            undo.callback(self._selector.close)
            self._selector.register(self._wake_receiver, selectors.EVENT_READ)
            self._thread = threading.Thread(target=self._run, name="tpworker-supervisor", daemon=True)
            self._thread.start()
            undo.pop_all()

    # ---------------------------------------------------------------------- for other threads

    def stop(self, timeout: float) -> None:
        """From now on the processes are expected to end by themselves; after `timeout` s they are killed."""
        self._stopping = Patience(timeout)
        self._wake()

    def kill(self) -> None:
        """Ends all processes at once, without an `on_fault`."""
        self._killed = True
        self._wake()

    def blame(self, fault: Fault) -> None:
        """Somebody else found a process at fault: all ends as if that process had died."""
        if self._blamed is None:
            self._blamed = fault
        self._wake()

    def stopped(self) -> str | None:
        """The name of a process that somebody has stopped; None: of none that is known."""
        processes = [(one.name, one.process.pid) for one in self._used]
        processes += [(child.name, child.pid) for child in self._children if child.pid is not None]
        return next((name for name, pid in processes if is_stopped(pid)), None)

    def close(self) -> None:
        """Frees the rest, once `ended` is done."""
        assert self.ended.done(), "the processes are not gone yet"
        self._thread.join()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._wake_receiver)
            os.close(self._wake_sender)
        self.board.close()

    def _wake(self) -> None:
        with self._lock:
            if not self._closed:
                with contextlib.suppress(BlockingIOError):  # full of wake-ups already
                    os.write(self._wake_sender, b"\0")

    # ----------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        fault: Fault | None = None
        try:
            fault = self._start() or self._watch()
        except Exception as error:
            logger.exception("the supervisor failed")
            fault = Fault("tpworker-supervisor", f"the supervisor failed: {type(error).__name__}: {error}")
        finally:
            self._end(fault)

    def _start(self) -> Fault | None:
        """Starts the scheduler, then the ranks. A fault: one could not be started."""
        store_fd = os.memfd_create("tpworker-store", os.MFD_CLOEXEC)
        try:
            standbys = self._await_standbys()
            if not isinstance(standbys, tuple):
                return standbys
            scheduler, *ranks = standbys
            gpus = tuple(one.gpu for one in ranks if one.gpu)
            self._used = *standbys, *self._keeping.start(gpus)
            for standby in self._used:
                self._selector.register(standby, selectors.EVENT_READ, standby)
            wiring = self._wiring(store_fd, gpus)
            self._fork(scheduler, wiring.scheduler_boot())
            for rank in range(self.group.num_ranks):
                # The standby does, until the rank enters the next.
                self.board.row(RANK_NAME.format(rank)).enter(Phase.IMPORTING)
                own = ranks[min(rank, len(ranks) - 1)]
                num_sharing = own.num_sharing(ranks) if len(ranks) > 1 else 0
                cpus = self.group.rank_cpus[rank] if rank < len(self.group.rank_cpus) else None
                self._fork(own, wiring.rank_boot(rank, self._keeping.fd(rank), num_sharing), cpus)
        except OSError as error:
            return Fault("tpworker-supervisor", f"a process could not be started: {error}")
        finally:
            os.close(store_fd)
        return None

    def _await_standbys(self) -> tuple[AnyStandby, ...] | Fault | None:
        """What the processes are forked from. Where ranks join from outside, it sleeps until all have, or one
        is a fault; None: nobody wants them any more."""
        joining, patience = self._standbys.joining, None
        try:
            while not self._killed and self._blamed is None:
                try:
                    return self._standbys.start()
                except NotJoined:
                    assert joining is not None
                if patience is None:
                    patience, joining.on_change = Patience(joining.timeout), self._wake
                if not (missing := joining.missing()):
                    continue
                if not patience.left():
                    return joining.fault(missing)
                if (line := joining.waits_for(missing)) != self.waits_for:
                    self.waits_for = line
                    if self.group.generation:  # of a first start its progress tells
                        logger.warning("%s", line)
                self._collect(min(patience.slice(), JOIN_SECONDS))
            return None
        finally:
            self.waits_for = ""
            if joining is not None:
                joining.on_change = None

    def _wiring(self, store_fd: int, gpus: tuple[str, ...]) -> Wiring:
        return Wiring(
            group=self.group,
            runtime_address=self._runtime_address,
            plan_addresses=tuple(new_address(f"plan{rank}") for rank in range(self.group.num_ranks)),
            result_address=new_address("result"),
            board_fd=self.board.fd,
            masks_fd=self._masks.fd,
            barrier_fd=self._barrier.fd,
            meeting_fd=self._meeting.fd,
            store_fd=store_fd,
            blocks_fd=self._keeping.blocks_fd,
            keeper_address=self._keeping.keeper_address,
            log_level=logging.getLogger("tpworker").getEffectiveLevel(),
            log_format=format_in_use(),
            rank_gpus=gpus,
        )

    def _fork(
        self, standby: AnyStandby, boot: SchedulerBoot | RankBoot, cpus: AbstractSet[int] | None = None
    ) -> None:
        child = standby.fork(boot, cpus)
        self._children.append(child)
        for fd in (child.report_fd, child.status_socket.fileno()):
            self._selector.register(fd, selectors.EVENT_READ, child)

    def _watch(self) -> Fault | None:
        """Sleeps until there is a reason to end everything. None: it was asked for."""
        grace: Patience | None = None
        while not self._killed and self._stopping is None:
            if self._blamed is not None:
                forfeits = self._blamed.forfeits or any(ending.forfeits for ending in self._endings())
                return self._explained(replace(self._blamed, forfeits=forfeits))
            all_over = all(child.over for child in self._children)
            if all_over or (grace is not None and not grace.left()):
                return self._cause()
            self._collect(None if grace is None else grace.slice())
            if self._over:
                seconds = min(_grace(one) for one in self._over)
                if grace is None or seconds < grace.left():
                    grace = Patience(seconds)
        self._watch_stopping()
        return None

    def _watch_stopping(self) -> None:
        """Waits until all have ended, to the deadline; a process that ends badly now is only logged."""
        answer = Patience(ANSWER_SECONDS)  # of standbys, once their children are gone
        is_short = False
        while not self._killed and self._stopping is not None:
            if all(child.has_ended for child in self._children):
                break
            is_lost = any(child.has_ended and child.status != 0 for child in self._children)
            if is_lost and not is_short:
                is_short, self._stopping = True, Patience(min(self._stopping.left(), WIDOWED_SECONDS))
            gone = [child for child in self._children if child.silent and not child.has_ended]
            if not gone:
                answer.restart()
            elif not answer.left():
                for child in gone:
                    child.kill_parent()
                answer.restart()
            if not self._stopping.left():
                late = [child.name for child in self._children if not child.has_ended]
                logger.warning("%s did not end in time and will be killed", ", ".join(late))
                return
            self._collect(min(self._stopping.slice(), answer.slice()))
        bad = [child for child in self._children if child.status != 0]
        self.was_orderly = not (bad or self._killed)
        for child in bad if not self._killed else ():
            logger.warning("while stopping, %s", child.ending.describe())

    def _collect(self, timeout: float | None) -> None:
        """Sleeps until something happens, at most so many seconds, and notes what has."""
        for key, _ in self._selector.select(timeout):
            one: Child | AnyStandby | None = key.data
            if one is None:
                os.read(self._wake_receiver, 1 << 16)
                continue
            one.read()
            if isinstance(one, Child) and key.fd != one.report_fd:
                nothing_comes = one.has_ended
            else:
                nothing_comes = one.silent
            if nothing_comes:
                self._selector.unregister(key.fd)
            if one.over and one not in self._over:
                self._over.append(one)

    # -------------------------------------------------------------------------- whose fault it is

    def _cause(self) -> Fault:
        standings = {child.name: standing_of(child, self.board) for child in self._children if not child.over}
        return self._explained(find_cause(self._endings(), standings))

    def _endings(self) -> list[Ending]:
        """Of all that have ended, with the status of those that have nothing else to say."""
        for one in self._over:
            if one.report is None:
                one.wait(STATUS_SECONDS)
        for standby in self._used:
            lost = any(child.is_lost and child.parent is standby for child in self._children)
            if lost and standby not in self._over and standby.wait(STATUS_SECONDS):
                self._over.append(standby)  # of a process that ends any descriptor may be the first to close
        # A standby takes its children along: their ends say nothing.
        return [self._ending(one) for one in self._over if not (isinstance(one, Child) and one.is_orphan)]

    def _ending(self, one: Child | AnyStandby) -> Ending:
        """How it ended, and where it stood."""
        return (
            replace(one.ending, progress=progress_of(one, self.board))
            if isinstance(one, Child)
            else one.ending
        )

    def _explained(self, fault: Fault) -> Fault:
        """See `explain`."""
        return explain(fault, self._children, self.board, self._collect) if fault.hung else fault

    # -------------------------------------------------------------------------------- the end

    def _end(self, fault: Fault | None) -> None:
        """Kills and reaps whoever is left, and frees all but the board."""
        self._barrier.abort()
        self._meeting.abort()
        for child in self._children:
            child.kill()
        if fault is not None:
            try:
                self._on_fault(fault)
            except Exception:
                logger.exception("on_fault raised")
        patience = Patience(REAP_SECONDS)
        self.leftovers = [child.name for child in self._children if not self._reap(child, patience)]
        for child in self._children:
            child.close()
        if self._owns_standbys:
            self._standbys.close()
        self._selector.close()
        self._barrier.close()
        self._meeting.close()
        self._masks.close()
        self._close_keeping()
        self.ended.set_result(None)

    def _reap(self, child: Child, patience: Patience) -> bool:
        """Waits until a child that was killed is gone, and its standby has told so. False: it stays."""
        answer = Patience(ANSWER_SECONDS)
        while not (child.wait(min(patience.slice(), answer.slice())) and child.is_gone):
            child.kill()
            if not patience.left():
                logger.error("%s (pid %s) was killed, but does not end", child.name, child.pid)
                return False
            if child.pid is not None and not child.is_gone:
                answer.restart()
                time.sleep(min(patience.slice(), 0.01))
            elif not answer.left():
                child.kill_parent()
                answer.restart()
        return True

    def _close_keeping(self) -> None:
        if self._owns_keeping:
            self._keeping.close()


def _grace(one: Child | AnyStandby) -> float:
    """How many seconds to wait for further endings behind this one's."""
    ending = one.ending
    return KILLED_SECONDS if isinstance(one, Child) and ending.was_killed else GRACE_SECONDS[ending.kind]
