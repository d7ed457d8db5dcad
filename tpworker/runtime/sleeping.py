"""What a runtime's owner wants done with all of its processes: sleep, wake up, serve other weights.

    sleep ───► the generation ends in good order ──► memory is given back ─► nothing runs, nothing is held
    wake_up ─► the next generation ──► requests that were open go on
    update ──► the new weights are looked at ──► the generation ends ──► the next one, with these weights
                  no good: an error, nothing was touched                  no good: the next, with the old ones

Each is an end of one generation and the start of another (processes.py), as after a fault, but no fault. So
there is nothing in a rank that sleeps, or changes its weights: what a process has, it has had from its start.
What requests have computed is forgotten in each case: they bring prompt and tokens to the next generation.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar, get_args

from tpworker.errors import InvalidRequest, RuntimeStopped, shown
from tpworker.outputs import RuntimeState, SleepLevel, WakeTag
from tpworker.runtime.events import Events
from tpworker.runtime.generation import StartFailed
from tpworker.runtime.group import Group
from tpworker.runtime.intake import Intake
from tpworker.runtime.loading import in_daemon_thread
from tpworker.runtime.processes import Processes
from tpworker.runtime.start import start_error
from tpworker.runtime.weight_source import WeightSource, name_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

TAGS: tuple[WakeTag, ...] = get_args(WakeTag)


class Sleeping:
    """Ends generations and begins them for their owner, one thing after the other.

    Args:
        processes: which are up, or are being replaced.
        intake: whose open requests wait meanwhile, or are ended.
        events: told of all of it.
        weights: where ranks have them from.
    """

    def __init__(self, processes: Processes, intake: Intake, events: Events, weights: WeightSource) -> None:
        self.level: SleepLevel | None = None
        """How deep it sleeps; None: it is awake. From the moment when that is asked for."""
        self._is_updating = False
        self._awake: set[WakeTag] = set()  # what has been woken up, while the rest sleeps
        self._processes = processes
        self._intake = intake
        self._events = events
        self._weights = weights
        self._turn = asyncio.Lock()

    def close(self) -> None:
        """When there are no processes any more."""
        self._weights.close()

    @property
    def weights_number(self) -> int:
        """Of the weights that are served."""
        return self._weights.number

    @property
    def state(self) -> RuntimeState | None:
        """What to call it instead of 'ready'; None: nothing of the kind."""
        if self.level is not None:
            return "sleeping"
        return "updating" if self._is_updating else None

    # ------------------------------------------------------------------------------- sleep

    async def sleep(self, level: int, *, abort: bool) -> None:
        """See `Runtime.sleep`."""
        if type(level) is not int or level not in (1, 2):
            raise InvalidRequest(
                f"level={shown(level)}: must be 1 (tensors of update_weights are kept) or 2 (dropped)",
                "level",
            )
        await self._run(self._sleep(2 if level == 2 else 1, abort))

    async def _sleep(self, level: SleepLevel, abort: bool) -> None:
        async with self._turn:
            before, began = self.level, time.monotonic()
            self.level = level = 2 if before == 2 else level
            self._awake.clear()
            if abort:
                self._intake.abort_all()
            try:
                await self._processes.suspend()
            except BaseException:
                self.level = before
                raise
            if not self._processes.is_suspended:  # they have failed, or are stopped
                self.level = before
                return
            await _in_thread(self._processes.keeping.give_back)
            if level == 2:
                self._weights.drop()
            if level != before:
                self._tell("sleeping", f"level {level}", time.monotonic() - began)

    async def wake_up(self, tags: Collection[str] | None) -> None:
        """See `Runtime.wake_up`."""
        wanted = list(TAGS) if tags is None else [tags] if isinstance(tags, str) else list(tags)
        for tag in wanted:
            if tag not in TAGS:
                raise InvalidRequest(f"tags: {shown(tag)} is none: give {' or '.join(TAGS)}, or none", "tags")
        await self._run(self._wake_up({tag for tag in TAGS if tag in wanted}))

    async def _wake_up(self, tags: set[WakeTag]) -> None:
        async with self._turn:
            if self.level is None:
                return
            began = time.monotonic()
            self._awake |= tags
            if not self._awake.issuperset(TAGS):
                return
            self._check_weights()
            try:
                await self._processes.resume()
            except StartFailed as failed:
                self._awake.clear()
                raise start_error(failed.fault) from None
            self.level = None
            self._awake.clear()
            if self._processes.is_up:
                self._tell("woken", "", time.monotonic() - began)

    def _check_weights(self) -> None:
        if self._weights.is_dropped:
            raise RuntimeStopped(
                "the weights came from tensors, and sleep(level=2) has dropped them: call update_weights "
                "before they are woken up"
            )

    # ------------------------------------------------------------------------------ weights

    async def update_weights(self, source: object, *, abort: bool) -> int:
        """See `Runtime.update_weights`."""
        return await self._run(self._update(source, abort))

    async def _update(self, source: object, abort: bool) -> int:
        async with self._turn:
            began = time.monotonic()
            async with self._weights.take(source, self._processes.group) as new:
                old = self._processes.group
                if self.level is None:
                    async with self._updating(new):
                        if abort:
                            self._intake.abort_all()
                        await self._processes.suspend()
                        self._processes.keeping.forget_contents()
                        await self._begin(new, old)
                else:
                    await _in_thread(self._processes.keeping.give_back)
                    self._processes.group = new
            number = new.weights_number
            if self.level is not None or self._processes.is_up:
                self._tell("updated", name_of(new), time.monotonic() - began)
            return number

    @asynccontextmanager
    async def _updating(self, new: Group) -> AsyncGenerator[None, None]:
        self._is_updating = True
        self._tell("updating", name_of(new))
        try:
            yield
        finally:
            self._is_updating = False

    async def _begin(self, new: Group, old: Group) -> None:
        """The next generation; if the ranks refuse its weights, the old one anew. Raises what they say."""

        def fall_back() -> None:
            self._processes.group = old

        self._processes.group = new
        try:
            await self._processes.resume(fall_back)
        except StartFailed as failed:
            self._tell("woken", "the weights are those of before")
            raise start_error(failed.fault) from None
        except OSError as error:  # no descriptors, say: requests wait, and nothing would come of it
            self._processes.give_up(f"{type(error).__name__}: {error}")

    # --------------------------------------------------------------------------------- both

    def _tell(self, kind: Any, summary: str, seconds: float | None = None) -> None:
        number, num_requests = self._processes.generation.number, self._intake.requests.num_told
        took = "" if seconds is None else f" in {seconds:.2f} s"
        logger.info(
            "%s%s%s; %d requests are open", kind, f" ({summary})" if summary else "", took, num_requests
        )
        self._events.add(kind, number, summary, seconds, num_requests)

    async def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Does it to its end, though whoever waits is cancelled; unless the runtime is stopped."""
        task = self._processes.change(work)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # somebody may have left
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise RuntimeStopped("the runtime was stopped meanwhile") from None
            raise


async def _in_thread(work: Callable[[], None]) -> None:
    """Does what takes its time in a thread, and never leaves it half done."""
    doing = in_daemon_thread(work)
    try:
        await asyncio.shield(doing)
    except asyncio.CancelledError:
        await asyncio.wait([doing])
        raise
