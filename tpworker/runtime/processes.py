"""The generations of a runtime's processes, one after the other.

    start ──► generation 0 ──► fault ──► all of it is killed, and reaped ──► generation 1 ──► …
                  │                          ▲                                  │ not ready: one more fault
                  └──► stop                  └──────────────────────────────────┘
                                             too many within the window: failed, for good

One path, whatever was lost. What makes it quick outlives a generation: standbys to fork its processes from,
and memory that is kept (weights on GPUs, keys and values, what blocks hold). What goes on in the meantime is
for its `Owner`. A generation may also be ended, and the next one begun, because somebody wants it (`suspend`,
`resume`; see sleeping.py): that is no fault, and no restart. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from tpworker.ipc.messages import Said
from tpworker.ipc.streams import open_standard_descriptors
from tpworker.observe.start import StartTimes
from tpworker.runtime.events import Events
from tpworker.runtime.faults import Fault, gpu_fault
from tpworker.runtime.generation import Generation, StartFailed
from tpworker.runtime.group import Group
from tpworker.runtime.joining import Joining
from tpworker.runtime.keeping import Keeping
from tpworker.runtime.loading import Progress
from tpworker.runtime.recovery import Restarts
from tpworker.runtime.requests import Requests
from tpworker.runtime.standbys import Standbys

logger = logging.getLogger(__name__)

T = TypeVar("T")

START_PATIENCE = 3.0
"""Times what the first start took, and it is a fault that a later one is not ready: there is less to do."""
SHORTEST_START_SECONDS = 20.0
"""But not less than this. `start_timeout` is the limit for all."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
"""After a start that failed, doubled each time."""


class Owner(Protocol):
    """Whom the processes serve."""

    def on_output(self, output: Said) -> None:
        """The scheduler says something."""

    def on_lost(self, fault: Fault) -> None:
        """The processes are gone, as far as anybody outside can tell."""

    def on_recovered(self, generation: Generation) -> int:
        """There are others. Returns how many requests go on."""

    def on_suspended(self) -> None:
        """They have been ended, since somebody wanted that; `on_recovered` tells of the next ones."""

    def on_failed(self, fault: Fault) -> None:
        """There will be no others."""


class Processes:
    """Starts the processes, and starts them anew after a fault. Make it in a running event loop.

    Args:
        group: what to start; its generation is that of the first.
        restarts: how often that may be.
        requests: the open ones.
        events: told of all of it, and `owner` before.
        owner: see above.
    """

    def __init__(
        self, group: Group, restarts: Restarts, requests: Requests, events: Events, owner: Owner
    ) -> None:
        self.restarts = restarts
        self.lost: Counter[str] = Counter()
        """Processes at fault, by kind."""
        self._num_wanted = 0  # generations that were started because somebody wanted it
        self.last_recovery_seconds: float | None = None
        self.group = group
        """What is started next."""
        self._requests = requests
        self._events = events
        self._owner = owner
        self._began = time.monotonic()
        self._faults: asyncio.Queue[tuple[Fault, int]] = asyncio.Queue()  # and when it was noticed
        self._is_over = False
        self._forfeits = False  # a start has failed: the next one is to find nothing of what was kept
        self._was_ready = False  # the first generation; before that, nothing is known of the next
        self._replacing: asyncio.Task[None] | None = None  # only while there is something to replace
        self._changes: set[asyncio.Task[Any]] = set()  # what somebody wants done with generations
        self._turn = asyncio.Lock()  # of who ends a generation, or begins one
        self._longest_start = 0.0  # seconds
        self.is_suspended = False
        """Whether there are none, and will be none before `resume`."""
        self.is_up = True
        """Whether the generation has not been lost."""
        self.is_over = False
        """Whether nothing is left of them, and there will be no others."""
        self._why = ""  # there will be no others, if they failed
        open_standard_descriptors()  # or what is kept could become one that was closed, and be written to
        self.keeping = Keeping(group.num_ranks, group.rank.device if restarts.are_allowed else "cpu")
        try:
            self._joining = _joining(group)
        except BaseException:
            self.keeping.close()
            raise
        self._standbys = Standbys(group.scheduler_module, group.rank_module, group.rank.device, self._joining)
        try:
            self.generation = self._begin(group)
            """The present one, or the last."""
        except BaseException:
            self._close()
            raise

    async def ready(self, progress: Progress) -> int:
        """Waits until the first generation is ready; returns its number of KV blocks. From then on faults
        have it replaced.

        Raises:
            StartFailed: it did not get ready.
        """
        try:
            num_blocks = await self.generation.ready(self.group.rank.start_timeout, progress)
        except StartFailed as failed:
            self._why = failed.fault.summary
            raise
        self._longest_start = time.monotonic() - self._began
        # As many blocks, however much memory is free then: what was taken must go on.
        self.group = replace(self.group, rank=replace(self.group.rank, num_kv_blocks=num_blocks))
        self._was_ready = True
        self._go_on()
        return num_blocks

    def _next_group(self, *, in_a_hurry: bool) -> Group:
        """What is started after the first generation; in a hurry: in as long as starts have taken so far."""
        group, number = self.group, self.generation.number + 1
        timeout = group.rank.start_timeout
        if in_a_hurry:
            timeout = min(timeout, max(SHORTEST_START_SECONDS, START_PATIENCE * self._longest_start))
        return replace(
            group,
            generation=number,
            rank=replace(group.rank, start_timeout=timeout),
            scheduler=replace(group.scheduler, start_timeout=timeout),
        )

    def blame_gpu(self, rank: int, summary: str) -> None:
        """A rank's GPU has failed, and what is in its memory with it. From any thread."""
        if self.is_suspended:
            self._forfeits = True
        self.generation.blame(gpu_fault(rank, summary))

    async def stop(self) -> None:
        """Ends the processes, see `Generation.stop`; there will be no others."""
        self._is_over = True
        under_way = {task for task in (self._replacing, *self._changes) if task is not None}
        under_way = {task for task in under_way if not task.get_loop().is_closed()}
        try:
            if under_way:
                for task in under_way:
                    task.cancel()
                try:
                    await asyncio.wait(under_way)
                except asyncio.CancelledError:
                    self.generation.kill()
                    raise
        finally:
            await self._stop_generation()

    async def _stop_generation(self) -> None:
        try:
            await self.generation.stop()
        finally:
            if self.generation.is_over:
                self._close()

    @property
    def joined_gpus(self) -> tuple[str, ...]:
        """By rank the UUID of its GPU, of ranks that have joined on GPUs."""
        return () if self._joining is None else self._joining.gpus()

    def _close(self) -> None:
        self.is_over = True
        self._standbys.close(self._why)
        self.keeping.close()

    @property
    def num_restarts(self) -> int:
        """How many generations were started because one was lost."""
        return self.generation.number - self._num_wanted

    def _begin(self, group: Group) -> Generation:
        return Generation(
            group,
            self._owner.on_output,
            self._on_fault,
            self._requests.any_submitted,
            self._standbys,
            self.keeping,
        )

    def _on_fault(self, fault: Fault) -> None:
        """Of a generation that was ready."""
        if self._is_over:  # somebody stops it
            logger.warning("while stopping: %s", fault.summary)
            return
        noticed_ns = time.monotonic_ns()
        self.is_up = False
        if self._note(fault):
            self._faults.put_nowait((fault, noticed_ns))
            self._go_on()

    def _note(self, fault: Fault, in_a_row: bool = False) -> bool:
        """Counts a fault, and says whether there is to be another generation. See `Restarts.allow`."""
        number = self.generation.number
        self.lost[_kind_of(fault.process)] += 1
        logger.error("%s", fault.failure())
        if not fault.is_final and self.restarts.allow(in_a_row):
            self._owner.on_lost(fault)
            self._events.add("lost", number, fault)
            return True
        why_not = "" if fault.is_final else f"; {self.restarts.why_not()}"
        last = replace(fault, summary=f"{fault.summary}{why_not}")
        self._is_over, self._why = True, last.summary
        self._owner.on_failed(last)
        self._events.add("lost", number, fault)
        self._events.add("given_up", number, last)
        return False

    def give_up(self, why: str) -> None:
        """Gives up for another reason than too many faults."""
        fault = Fault("tpworker-supervisor", f"the processes cannot be replaced: {why}")
        self._is_over, self._why = True, fault.summary
        self._owner.on_failed(fault)
        self._events.add("given_up", self.generation.number, fault)

    def _go_on(self) -> None:
        """Sees to it that what is lost is replaced."""
        is_busy = self._replacing is not None and not self._replacing.done()
        if self._was_ready and not is_busy and not self._faults.empty():
            self._replacing = asyncio.create_task(self._replace(), name="tpworker-recovery")

    async def _replace(self) -> None:
        try:
            async with self._turn:
                while not self._is_over and not self._faults.empty():
                    fault, noticed_ns = self._faults.get_nowait()
                    await self._bring_up(fault, noticed_ns)
        except asyncio.CancelledError:
            if not self._is_over:  # not by `stop`: by who cancels all tasks. Nobody shall wait for ever
                self.give_up("the task that was to do it was cancelled")
            raise
        except Exception as error:
            logger.exception("the processes cannot be replaced")
            self.give_up(f"{type(error).__name__}: {error}")

    async def _bring_up(self, fault: Fault, noticed_ns: int) -> None:
        """Starts generations until one is ready, or there have been too many."""
        pause = FIRST_PAUSE_SECONDS
        while not self._is_over and not await self._attempt(fault, noticed_ns):
            await asyncio.sleep(pause)  # what is wanted may not be free yet: a GPU's memory, say
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _attempt(self, fault: Fault, noticed_ns: int) -> bool:
        """One more generation after a fault. False: it did not get ready."""
        await self.generation.stop()
        number = self.generation.number + 1
        self._events.add("recovering", number, fault, requests=self._requests.num_told)
        self._forfeits |= fault.forfeits
        ended_ns = time.monotonic_ns()
        try:
            await self._next(in_a_hurry=True)
        except StartFailed as failed:
            self._note(failed.fault, in_a_row=True)
            return False
        if self._is_over or not self._faults.empty():
            return True  # it is lost already: nobody needs to know that it was there
        self.is_up, ready_ns, generation = True, time.monotonic_ns(), self.generation
        self.last_recovery_seconds = seconds = (ready_ns - noticed_ns) / 1e9
        times = StartTimes.of(generation.ranks, noticed_ns, ended_ns, ready_ns, "processes ended")
        num_requests = self._owner.on_recovered(generation)
        kept, listed = generation.num_kept_blocks, times.listed()
        logger.warning(
            "recovered in %.2f s: %d requests go on, %d KV blocks are kept (%s)",
            seconds, num_requests, kept, listed,
        )  # fmt: skip
        self._events.add("recovered", number, fault, seconds, num_requests)
        return True

    async def _next(self, *, in_a_hurry: bool) -> None:
        """The next generation, when nothing is left of the last. Raises StartFailed."""
        if self._forfeits or self.generation.leftovers:  # whose GPU may still write
            self.keeping.forget()
            self._forfeits = False
        began, group = time.monotonic(), self._next_group(in_a_hurry=in_a_hurry)
        self.generation = self._begin(group)
        self._num_wanted += not in_a_hurry
        try:
            await self.generation.ready(group.rank.start_timeout, _unseen)
        except StartFailed as failed:
            # Whatever it was: not once more with what it has found, as soon as its processes are gone.
            self._forfeits = failed.fault.forfeits or not failed.fault.is_external
            raise
        self._longest_start = max(self._longest_start, time.monotonic() - began)

    # ------------------------------------------------------------------- because somebody wants it

    def change(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Does what somebody wants done with generations, though they may leave. `stop` cancels it."""
        task = asyncio.create_task(work, name="tpworker-change")
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return task

    async def suspend(self) -> None:
        """Ends the generation in good order: no other begins before `resume`. If they are being replaced,
        when they have been. Nothing, if there is none."""
        async with self._turn:
            if self.is_suspended or self._is_over:
                return
            await self.generation.stop()
            self.is_suspended, self.is_up = True, False
            while not self._faults.empty():  # of the one that is gone
                fault, _ = self._faults.get_nowait()
                self._forfeits |= fault.forfeits
            self._forfeits |= not self.generation.was_orderly
            self._owner.on_suspended()

    async def resume(self, fall_back: Callable[[], None] | None = None) -> None:
        """Starts the next generation after `suspend`, and returns when there is one, or they have failed for
        good. A process that is lost meanwhile is a fault like any other.

        Args:
            fall_back: called if a process refuses what `group` says, before one more is tried; None: then
                nothing is.

        Raises:
            StartFailed: that was so. With `fall_back` there is a generation nevertheless; without they are
                suspended still.
        """
        async with self._turn:
            if not self.is_suspended or self._is_over:
                return
            noticed_ns = time.monotonic_ns()
            refusal = await self._try(noticed_ns, may_refuse=True)
            if refusal is not None:
                if fall_back is None:
                    raise refusal
                fall_back()
                await self._try(noticed_ns, may_refuse=False)
        while self._replacing is not None and not self._replacing.done():  # it was lost at once
            await asyncio.wait([self._replacing])
        if refusal is not None:
            raise refusal

    async def _try(self, noticed_ns: int, *, may_refuse: bool) -> StartFailed | None:
        """The next generation, of which it is no fault that it does not get ready if it refuses to."""
        try:
            await self._next(in_a_hurry=False)
        except StartFailed as failed:
            await self.generation.stop()
            if may_refuse and failed.fault.is_refusal:
                return failed
            self.is_suspended = False
            if self._note(failed.fault, in_a_row=True):
                self._faults.put_nowait((failed.fault, noticed_ns))
                self._go_on()
            return None
        self.is_suspended = False
        if self._faults.empty() and not self._is_over:
            self.is_up = True
            self._owner.on_recovered(self.generation)
        return None


def _joining(group: Group) -> Joining | None:
    """Where its ranks join, if they do."""
    if group.join_address is None:
        return None
    rank = group.rank
    return Joining(group.join_address, group.num_ranks, group.rank_module, rank.device, rank.start_timeout)


def _kind_of(process: str) -> str:
    """'rank' of 'tpworker-rank1', and of several of them."""
    name = process.partition(",")[0].removeprefix("tpworker-").rstrip("0123456789")
    return "standby" if name.endswith("standby") else name


def _unseen(text: str, fraction: float | None) -> None:
    pass
