"""One generation of processes, as the runtime's event loop sees it.

The supervisor (a thread) owns the processes; this owns the channel to their scheduler and a watchdog. Both
tell of a fault in one way: `on_fault`, on the event loop, once. Then everything has been killed already.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import math
import traceback
from collections.abc import Callable

from tpworker.ipc.board import Board, Field, Phase, Row
from tpworker.ipc.channels import Channel, ChannelError, new_address
from tpworker.ipc.child import SCHEDULER_NAME
from tpworker.ipc.codec import MessageError
from tpworker.ipc.deadlines import step_deadline
from tpworker.ipc.messages import Message, Said, SchedulerReady, Stop
from tpworker.ipc.patience import Patience
from tpworker.ipc.streams import open_standard_descriptors
from tpworker.runtime.faults import Fault
from tpworker.runtime.group import Group
from tpworker.runtime.keeping import Keeping
from tpworker.runtime.loading import Progress
from tpworker.runtime.standbys import Standbys
from tpworker.runtime.supervisor import Supervisor

logger = logging.getLogger(__name__)

STOP_SECONDS = 15.0
"""How long the processes may take to leave in good order."""
KILL_SECONDS = 5.0
"""How long a cancelled `stop` blocks the event loop, at most, to see the processes end."""
START_MARGIN_SECONDS = 5.0
"""The processes watch the start themselves; when they have failed to for so much longer, we step in."""
BEAT_SECONDS = 1.0
"""A scheduler that has work beats at least as often."""
STANDSTILL = 1.5
"""Times a step's deadline, and BEAT_SECONDS more, for which its loop may stand still: to its own deadline, a
little sooner, it sees itself."""
STOPPED_SECONDS = 4.0
"""How long a process may be stopped by somebody while others wait for its generation: after a restart."""
POLL_SECONDS = 0.2
"""How often the start's progress is looked at."""

_PHASES = {
    Phase.STARTING: "starting processes",
    Phase.IMPORTING: "importing torch",
    Phase.OPENING: "opening devices",
    Phase.LOADING: "loading the model",
    Phase.MEETING: "connecting the ranks",
    Phase.ALLOCATING: "allocating KV blocks",
    Phase.WARMING_UP: "warming up",
    Phase.CAPTURING: "capturing graphs",
}


class StartFailed(Exception):
    """The processes did not get ready."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.summary)
        self.fault = fault


class Generation:
    """The processes of one generation, from start to end. Belongs to the event loop that makes it.

    Args:
        group: what to start.
        on_output: given every StepOutput, and every request that failed, in order.
        on_fault: called once if, after `ready`, the processes had to be ended.
        is_busy: whether the scheduler has work; only then is it watched.
        standbys: see `Supervisor`.
        keeping: see `Supervisor`.
    """

    def __init__(
        self,
        group: Group,
        on_output: Callable[[Said], None],
        on_fault: Callable[[Fault], None],
        is_busy: Callable[[], bool],
        standbys: Standbys | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        self.number = group.generation
        self._step_timeout = group.scheduler.step_timeout
        self._patience = Patience(math.inf)
        self._on_output = on_output
        self._on_fault = on_fault
        self._is_busy = is_busy
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[int] = self._loop.create_future()
        self.num_kept_blocks = 0
        """KV blocks whose contents an earlier generation has computed; known when it is ready."""
        self._is_greeted = False
        self._is_draining = False
        self._is_stopping = False
        self._fault: Fault | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self._beat = 0
        # A daemon may have closed them. Somebody writes to them nevertheless, which shall not be our memory.
        open_standard_descriptors()
        self._channel: Channel | None = Channel.bind(new_address("runtime"))
        try:
            self._supervisor = Supervisor(
                group, self._channel.address, self._fault_from_thread, standbys, keeping
            )
        except BaseException:
            self._channel.close()
            raise
        self._loop.add_reader(self._channel.fileno(), self._drain)
        self._drain()

    async def ready(self, timeout: float, progress: Progress) -> int:
        """Waits until requests may come; returns the number of KV blocks, the null block included.

        Raises:
            StartFailed: they did not all get ready within `timeout` seconds and a few.
        """
        patience, standing = Patience(timeout + START_MARGIN_SECONDS), Patience(STOPPED_SECONDS)
        shown: tuple[str, float | None] | None = None
        while not self._ready.done():
            now = self._progress()
            if now != shown:
                progress(*now)
                shown = now
            if self._supervisor.waits_for:
                patience.restart()  # nothing has been started yet: the supervisor has a deadline for that
            elif not patience.left():
                self._blame_late_starter(timeout)
                patience = Patience(math.inf)
            stopped = self._supervisor.stopped() if self.number else None
            if stopped is None:
                standing.restart()
            elif not standing.left():
                summary = f"{stopped} is stopped (SIGSTOP or a debugger), and does not get ready"
                self.blame(Fault(stopped, summary, is_external=True))
            await asyncio.wait([self._ready], timeout=min(patience.slice(), POLL_SECONDS))
        return self._ready.result()

    @property
    def board(self) -> Board | None:
        """The status board; None: it is over."""
        return None if self._channel is None else self._supervisor.board

    @property
    def ranks(self) -> list[Row]:
        """The ranks' rows of the status board. Only until `stop`."""
        return self._supervisor.board.rows()[1:]

    @property
    def leftovers(self) -> list[str]:
        """Processes that do not end, though they were killed: known when it is over."""
        return self._supervisor.leftovers

    @property
    def was_orderly(self) -> bool:
        """Whether its processes have ended by themselves, and well: known when it is over."""
        return self._supervisor.was_orderly

    @property
    def is_over(self) -> bool:
        """Whether it has been stopped, and nothing is left of it."""
        return self._channel is None

    def blame(self, fault: Fault) -> None:
        """Somebody else found a process at fault: all ends as if that had died. From any thread."""
        self._supervisor.blame(fault)

    def send(self, message: Message) -> None:
        """Sends to the scheduler; nothing happens once the generation has failed or is stopping."""
        if self._channel is None or self._fault is not None or self._is_stopping:
            return
        try:
            self._channel.send(message)
        except ChannelError:
            return  # the scheduler is gone, as the supervisor is about to find out
        # ZeroMQ's descriptor is signalled by edge: a message that came while we sent would go unnoticed.
        self._drain()
        if self._watchdog is None:
            self._beat = -1
            self._tick()

    def kill(self) -> None:
        """Ends the processes at once; to be awaited by `stop`."""
        self._supervisor.kill()

    async def stop(self) -> None:
        """Ends the processes, in good order if they are in one, and waits until they are gone.

        When it is cancelled it kills them, and they are gone nevertheless. On another event loop it may be
        awaited only when its own has been closed; then it kills them too.
        """
        if self._loop.is_closed():
            self._supervisor.kill()
        elif self._ready.done() and self._fault is None and not self._is_stopping:
            self._supervisor.stop(STOP_SECONDS)  # first: whatever becomes of the message, they will end
            try:
                self.send(Stop(self.number))
            except Exception:
                logger.exception("the processes cannot be told to stop: they are killed")
                self._supervisor.kill()
        elif not self._ready.done():
            self._supervisor.kill()
        self._is_stopping = True
        try:
            await asyncio.wrap_future(self._supervisor.ended)
        except asyncio.CancelledError:
            self._supervisor.kill()
            with contextlib.suppress(concurrent.futures.TimeoutError):
                self._supervisor.ended.result(KILL_SECONDS)
            raise
        finally:
            if self._supervisor.ended.done():
                self._close()

    def _close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self._channel is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._channel.fileno())
            self._channel.close()
            self._channel = None
            self._supervisor.close()
        if not self._ready.done() and not self._loop.is_closed():
            self._ready.set_exception(StartFailed(Fault(SCHEDULER_NAME, "stopped while it was starting")))
            self._ready.exception()  # as in `_failed`

    # ----------------------------------------------------------------------------- messages

    def _drain(self) -> None:
        """Takes every message that is here."""
        if self._is_draining or self._channel is None:
            return  # a message's handler has sent something: the loop below goes on after it
        self._is_draining = True
        try:
            while (message := self._channel.receive_now()) is not None:
                self._take(message)
        except Exception as error:
            # Of whatever class: the messages behind this one stay unread, and no edge would tell of them.
            summary = f"{SCHEDULER_NAME} sent what it must not: {type(error).__name__}: {error}"
            self._supervisor.blame(Fault(SCHEDULER_NAME, summary, traceback=traceback.format_exc()))
        finally:
            self._is_draining = False

    def _take(self, message: Message) -> None:
        if not self._is_greeted:
            Channel.check_hello(message, SCHEDULER_NAME, self.number)
            self._is_greeted = True
        elif message.generation != self.number:
            pass  # from before a restart
        elif isinstance(message, Said):
            if self._fault is None:
                self._on_output(message)
        elif isinstance(message, SchedulerReady):
            self.num_kept_blocks = message.num_kept_blocks
            if not self._ready.done():
                self._ready.set_result(message.num_kv_blocks)
        else:
            raise MessageError(f"not for the runtime: {message}")

    # ------------------------------------------------------------------------------- faults

    def _fault_from_thread(self, fault: Fault) -> None:
        try:
            self._loop.call_soon_threadsafe(self._failed, fault)
        except RuntimeError:  # the event loop has been closed over a runtime that was not stopped
            logger.error("%s", fault.summary)

    def _failed(self, fault: Fault) -> None:
        if self._is_stopping:
            logger.warning("while stopping: %s", fault.summary)
            return
        self._fault = fault
        if not self._ready.done():
            self._ready.set_exception(StartFailed(fault))
            self._ready.exception()  # somebody who was cancelled may never ask
        else:
            self._on_fault(fault)

    def _tick(self) -> None:
        """The watchdog: while there is work, the scheduler's loop must turn."""
        self._watchdog = None
        if self._fault is not None or self._is_stopping or not self._is_busy():
            return
        row = self._supervisor.board.row(SCHEDULER_NAME)
        if row[Field.BEAT] != self._beat:
            self._beat = row[Field.BEAT]
            self._patience = Patience(STANDSTILL * step_deadline(row, self._step_timeout) + BEAT_SECONDS)
        if not self._patience.left():
            summary = (
                f"{SCHEDULER_NAME} hangs: there are requests, but its loop has not turned for "
                f"{self._patience.seconds:.3g} s ({STANDSTILL:g} times a step's deadline, and a second)"
            )
            self._supervisor.blame(Fault(SCHEDULER_NAME, summary, hung=True))
            return
        self._watchdog = self._loop.call_later(self._patience.slice(), self._tick)

    def _blame_late_starter(self, timeout: float) -> None:
        rows = self._supervisor.board.rows()
        late = min(reversed(rows), key=lambda row: row[Field.PHASE])  # of equals a rank, not the scheduler
        name, phase = late.name, Phase(late[Field.PHASE])
        if phase < Phase.READY:
            summary = f"{name} is not ready after {timeout:g} s (--start-timeout); it is {phase.name.lower()}"
        else:
            name = SCHEDULER_NAME
            summary = (
                f"{name} has not been heard within {timeout:g} s (--start-timeout), though all processes are "
                "ready: its messages do not come through to this one"
            )
        self._supervisor.blame(Fault(name, summary, hung=True))

    def _progress(self) -> tuple[str, float | None]:
        """What the slowest rank does, and how far all are with it."""
        if waits_for := self._supervisor.waits_for:
            return waits_for, None
        phase = min(row[Field.PHASE] for row in self.ranks)
        here = [row for row in self.ranks if row[Field.PHASE] == phase]
        total = sum(row[Field.PROGRESS_TOTAL] for row in here)
        done = sum(row[Field.PROGRESS_DONE] for row in here)
        text = _PHASES.get(Phase(phase), "waiting for the scheduler")
        return text, done / total if total else None
