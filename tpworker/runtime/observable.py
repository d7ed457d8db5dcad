"""What a runtime's owner may see of how it does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress

from tpworker.config import RuntimeConfig
from tpworker.errors import RuntimeSleeping, RuntimeStopped
from tpworker.ipc.board import Board
from tpworker.ipc.trace import Teller
from tpworker.observe.looking import look, without_processes
from tpworker.observe.snapshot import Snapshot
from tpworker.observe.tracing import MAX_BYTES, Tracing
from tpworker.observe.watch import GpuState, GpuWatch
from tpworker.outputs import Health, Listener, RuntimeEvent, RuntimeState, Stats, TraceSummary
from tpworker.runtime.events import Events
from tpworker.runtime.facts import Facts
from tpworker.runtime.faults import Fault
from tpworker.runtime.home_loop import HomeLoop
from tpworker.runtime.intake import Intake
from tpworker.runtime.listeners import EventListener, Listeners
from tpworker.runtime.loading import in_daemon_thread
from tpworker.runtime.processes import Processes
from tpworker.runtime.sleeping import Sleeping
from tpworker.runtime.statistics import stats_of, whole_of
from tpworker.runtime.steps import Steps
from tpworker.runtime.telling import Telling


class Observable(Facts):
    """Its state, what has happened to it, and what it has done, for any thread. `Runtime` brings that about.

    Args:
        config: see `Facts`.
        on_event: called on the event loop with each event.
    """

    def __init__(self, config: RuntimeConfig, on_event: Callable[[RuntimeEvent], None] | None) -> None:
        super().__init__(config)
        self._home = HomeLoop()
        self._state: RuntimeState = "stopped"
        self._fault: Fault | None = None  # once it has failed, and while it recovers
        self._listeners = Listeners()
        if on_event is not None:
            self._listeners.add(EventListener(on_event))
        self._events = Events(self._listeners)
        in_flight = (config.lookahead + 1) * (1 + self.speculation.num_drafts)
        self._intake = Intake(
            config.max_queue, config.seed, config.scheduling_policy, in_flight, self._listeners
        )
        self._steps = Steps()
        self._num_resumed = 0
        self._processes: Processes | None = None  # once they were started
        self._sleeping: Sleeping | None = None  # once it was ready
        self._gpu_watch: GpuWatch | None = None  # if there are GPUs
        self._telling = Telling(self._intake, self._board, lambda: self.health().state, self._restarts)
        self._tracing = Tracing(config.tensor_parallel_size)
        self._trace = Teller()  # of the event loop's thread
        self._is_over = False  # nothing will be traced any more

    def _board(self) -> Board | None:
        """The status board, while there are processes."""
        return None if self._processes is None else self._processes.generation.board

    def _restarts(self) -> tuple[int, int]:
        """How many there were, and requests that went on after them."""
        return 0 if self._processes is None else self._processes.num_restarts, self._num_resumed

    def health(self) -> Health:
        """Whether it can serve. Costs nothing; for readiness and liveness probes."""
        lost = self._home.lost()
        if lost is not None:
            return Health("stopped", str(lost))
        state = self._state
        if state == "ready" and self._fault is not None:
            state = "recovering"
        elif state == "ready" and self._sleeping is not None:
            state = self._sleeping.state or state
        return Health(state, None if self._fault is None else str(self._fault.failure()))

    @property
    def events(self) -> tuple[RuntimeEvent, ...]:
        """The last ones, at most 64, oldest first."""
        return tuple(self._events.recent)

    def add_listener(self, listener: Listener) -> None:
        """Tells somebody of tokens, requests, steps and events from now on."""
        self._listeners.add(listener)

    def remove_listener(self, listener: Listener) -> None:
        """Not any more. Unknown ones are ignored."""
        self._listeners.remove(listener)

    def start_trace(self, path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> None:
        """Writes a timeline from now on, for Perfetto (https://ui.perfetto.dev): what scheduler, ranks,
        devices and requests do, and when. Costs each process some microseconds a step. May be called before
        `start`.

        Args:
            path: of the file, JSON trace events; one that is there is written over.
            max_bytes: of the file, 1 MiB or more: then the trace ends.

        Raises:
            ConfigError: the file cannot be written, or another one is being written.
            RuntimeStopped: the runtime was stopped, or this is a fork of its process.
        """
        self._home.check_process()
        if self._is_over:
            raise RuntimeStopped("the runtime was stopped: there is nothing to be traced")
        self._tracing.start(path, max_bytes)
        self._listeners.remove(self._tracing)  # if it had come to its limit
        self._listeners.add(self._tracing)

    async def stop_trace(self) -> TraceSummary | None:
        """Ends the file, which takes some hundredths of a second; a runtime that stops does so too. Returns
        what has become of the last trace, also of one that had come to its limit; None: there was none."""
        self._home.check_process()
        self._cut_trace()
        return await in_daemon_thread(self._tracing.stop)

    def _cut_trace(self) -> None:
        """Those that are open are on it, too."""
        self._listeners.remove(self._tracing)
        if self._tracing.is_on:
            for record in self._intake.open_records():
                self._tracing.cut(record)

    async def _close_trace(self) -> None:
        """There are no processes any more."""
        self._is_over = True
        self._cut_trace()
        self._trace = Teller()
        await in_daemon_thread(self._tracing.close)

    @property
    def is_tracing(self) -> bool:
        """Whether a timeline is being written, and is not full."""
        return self._tracing.is_on

    def trace_span(
        self, group: str, name: str, begun_ns: int, ended_ns: int, args: Mapping[str, object] | None = None
    ) -> None:
        """Puts something of the caller's on the timeline, if one is being written. From any thread.

        Args:
            group: where it stands there, as 'HTTP'.
            name: of the span.
            begun_ns, ended_ns: time.monotonic_ns().
            args: what else is to be said, as JSON can say it.
        """
        self._tracing.span(group, name, begun_ns, ended_ns, args or {})

    def stats(self) -> Stats:
        """How busy it is, and what it has done so far. From any thread: figures may be of two moments.

        Raises:
            RuntimeStopped: this is a fork of its process, where nothing goes on.
        """
        self._home.check_process()
        total_blocks = 0 if self._served is None else self._served.total_blocks
        return stats_of(self._intake, self._steps, self._processes, total_blocks, self._num_resumed)

    def snapshot(self) -> Snapshot:
        """What its processes do at this instant, as `tpworker top` shows it. Costs some microseconds for
        each; what they have used, and how GPUs do, is added by `observe.looking.with_usage`, in milliseconds.
        From any thread: in another one than the event loop's, what it says of the runtime and of requests may
        be a quarter of a second old.

        Raises:
            RuntimeStopped: as `stats`.
        """
        self._home.check_process()  # the board is its parent's too, and would be told what is so here
        board = self._board()
        if board is not None:
            if self._home.astray() is None:  # one thread writes there
                self._telling.tell()
            with suppress(ValueError):  # the board has just been taken away
                return look(board)
        return without_processes(self._about, whole_of(self.stats(), self.health().state))

    def gpus(self) -> tuple[GpuState, ...]:
        """How the ranks' GPUs do, at most a second old; none on the CPU, and before the start.

        Raises:
            RuntimeStopped: as `stats`.
        """
        self._home.check_process()
        return () if self._gpu_watch is None else self._gpu_watch.states()

    def _check_not_failed(self) -> None:
        """Raises RuntimeFailed: it has."""
        if self._state == "failed" and self._fault is not None:
            raise self._fault.failure()

    def _check_taking(self, num_choices: int | None = None) -> None:
        """Whether requests are taken now: raises RuntimeFailed or RuntimeStopped.

        Args:
            num_choices: of a request that may have been promised; None: none was.
        """
        self._home.check_process()
        self._check_not_failed()
        self._home.check()
        is_promised = self._state == "draining" and num_choices and self._intake.take_promise(num_choices)
        if self._state != "ready" and not is_promised:
            raise RuntimeStopped(f"the runtime takes no requests: it is {self._state}")
        if self.health().state == "sleeping":
            raise RuntimeSleeping("the runtime sleeps, and takes no requests: wake it up first (wake_up)")
