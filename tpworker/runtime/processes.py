"""The generations of a runtime's processes, one after the other.

    start ──► generation 0 ──► fault ──► all of it is killed, and reaped ──► generation 1 ──► …
                  │                          ▲                                  │ not ready: one more fault
                  └──► stop                  └──────────────────────────────────┘
                                             too many within the window: failed, for good

One path, whatever was lost. What makes it quick outlives a generation: standbys to fork its processes from,
and memory that is kept (weights on GPUs, keys and values, what blocks hold). What goes on in the meantime is
for its `Owner`. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from dataclasses import replace
from typing import Protocol

from tpworker.ipc.messages import Said
from tpworker.ipc.streams import open_standard_descriptors
from tpworker.observe.start import StartTimes
from tpworker.runtime.events import Events
from tpworker.runtime.faults import Fault, gpu_fault
from tpworker.runtime.generation import Generation, StartFailed
from tpworker.runtime.group import Group
from tpworker.runtime.keeping import Keeping
from tpworker.runtime.loading import Progress
from tpworker.runtime.recovery import Restarts
from tpworker.runtime.requests import Requests
from tpworker.runtime.standby import Standbys

logger = logging.getLogger(__name__)

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
        self.last_recovery_seconds: float | None = None
        self._group = group
        self._requests = requests
        self._events = events
        self._owner = owner
        self._began = time.monotonic()
        self._faults: asyncio.Queue[tuple[Fault, int]] = asyncio.Queue()  # and when it was noticed
        self._is_over = False
        self._forfeits = False  # a start has failed: the next one is to find nothing of what was kept
        self._was_ready = False  # the first generation; before that, nothing is known of the next
        self._replacing: asyncio.Task[None] | None = None  # only while there is something to replace
        self.is_up = True
        """Whether the generation has not been lost."""
        open_standard_descriptors()  # or what is kept could become one that was closed, and be written to
        self._standbys = Standbys(group.scheduler_module, group.rank_module, group.rank.device)
        self._keeping = Keeping(group.num_ranks, group.rank.device if restarts.are_allowed else "cpu")
        try:
            self.generation = self._begin(group.generation)
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
        num_blocks = await self.generation.ready(self._group.rank.start_timeout, progress)
        self._group = self._next_group(num_blocks, time.monotonic() - self._began)
        self._was_ready = True
        self._go_on()
        return num_blocks

    def _next_group(self, num_blocks: int, seconds: float) -> Group:
        """What is started after the first generation, which took so long."""
        group = self._group
        timeout = min(group.rank.start_timeout, max(SHORTEST_START_SECONDS, START_PATIENCE * seconds))
        return replace(
            group,
            # As many blocks, however much memory is free then: what was taken must go on.
            rank=replace(group.rank, num_kv_blocks=num_blocks, start_timeout=timeout),
            scheduler=replace(group.scheduler, start_timeout=timeout),
        )

    def blame_gpu(self, rank: int, summary: str) -> None:
        """A rank's GPU has failed, and what is in its memory with it. From any thread."""
        self.generation.blame(gpu_fault(rank, summary))

    async def stop(self) -> None:
        """Ends the processes, see `Generation.stop`; there will be no others."""
        self._is_over = True
        replacing = self._replacing
        try:
            if replacing is not None and not replacing.get_loop().is_closed():
                replacing.cancel()
                try:
                    await asyncio.wait([replacing])
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

    def _close(self) -> None:
        self._standbys.close()
        self._keeping.close()

    @property
    def is_over(self) -> bool:
        """Whether nothing is left of them."""
        return self.generation.is_over

    def _begin(self, number: int) -> Generation:
        group = replace(self._group, generation=number)
        return Generation(
            group,
            self._owner.on_output,
            self._on_fault,
            self._requests.any_submitted,
            self._standbys,
            self._keeping,
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
        if self.restarts.allow(in_a_row):
            self._owner.on_lost(fault)
            self._events.add("lost", number, fault)
            return True
        last = replace(fault, summary=f"{fault.summary}; {self.restarts.why_not()}")
        self._is_over = True
        self._owner.on_failed(last)
        self._events.add("lost", number, fault)
        self._events.add("given_up", number, last)
        return False

    def _cannot(self, why: str) -> None:
        """Gives up for another reason than too many faults."""
        fault = Fault("tpworker-supervisor", f"the processes cannot be replaced: {why}")
        self._is_over = True
        self._owner.on_failed(fault)
        self._events.add("given_up", self.generation.number, fault)

    def _go_on(self) -> None:
        """Sees to it that what is lost is replaced."""
        is_busy = self._replacing is not None and not self._replacing.done()
        if self._was_ready and not is_busy and not self._faults.empty():
            self._replacing = asyncio.create_task(self._replace(), name="tpworker-recovery")

    async def _replace(self) -> None:
        try:
            while not self._is_over and not self._faults.empty():
                fault, noticed_ns = self._faults.get_nowait()
                pause = FIRST_PAUSE_SECONDS
                while not self._is_over and not await self._attempt(fault, noticed_ns):
                    await asyncio.sleep(pause)  # what is wanted may not be free yet: a GPU's memory, say
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        except asyncio.CancelledError:
            if not self._is_over:  # not by `stop`: by who cancels all tasks. Nobody shall wait for ever
                self._cannot("the task that was to do it was cancelled")
            raise
        except Exception as error:
            logger.exception("the processes cannot be replaced")
            self._cannot(f"{type(error).__name__}: {error}")

    async def _attempt(self, fault: Fault, noticed_ns: int) -> bool:
        """One more generation. False: it did not get ready."""
        await self.generation.stop()
        number = self.generation.number + 1
        self._events.add("recovering", number, fault, requests=self._requests.num_told)
        ended_ns = time.monotonic_ns()
        if fault.forfeits or self._forfeits or self.generation.leftovers:  # whose GPU may still write
            self._keeping.forget()
            self._forfeits = False
        self.generation = generation = self._begin(number)
        try:
            await generation.ready(self._group.rank.start_timeout, _unseen)
        except StartFailed as failed:
            # Whatever it was: not once more with what it has found, as soon as its processes are gone.
            self._forfeits = failed.fault.forfeits or not failed.fault.is_external
            self._note(failed.fault, in_a_row=True)
            return False
        if self._is_over or not self._faults.empty():
            return True  # it is lost already: nobody needs to know that it was there
        self.is_up, ready_ns = True, time.monotonic_ns()
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


def _kind_of(process: str) -> str:
    """'rank' of 'tpworker-rank1', and of several of them."""
    name = process.partition(",")[0].removeprefix("tpworker-").rstrip("0123456789")
    return "standby" if name.endswith("standby") else name


def _unseen(text: str, fraction: float | None) -> None:
    pass
