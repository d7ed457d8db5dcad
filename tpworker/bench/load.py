"""When requests are sent: so many at a time, or so many a second whatever becomes of them."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tpworker.bench.client import perform
from tpworker.bench.connection import Address, Pool
from tpworker.bench.plan import Plan
from tpworker.bench.records import Record

LAG_SECONDS = 0.005
"""How often it is looked how late the event loop is."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One load. Of several processes each has a share of it."""

    number: int
    """Requests of different levels are different."""
    concurrency: int | None = None
    """Conversations at a time; None: by `rate`."""
    rate: float | None = None
    """Requests a second, as many as chance has it (Poisson)."""
    num_requests: int | None = None
    seconds: float | None = None
    """For so long new ones are sent; None: until there were `num_requests`."""
    share: int = 0
    num_shares: int = 1
    """Which of how many shares this is."""
    timeout: float = 600.0
    """Seconds for a request."""

    def shared(self, share: int, num_shares: int) -> Level:
        """A share of it, for one of several processes."""
        return dataclasses.replace(
            self,
            share=share,
            num_shares=num_shares,
            concurrency=None if self.concurrency is None else _part(self.concurrency, share, num_shares),
            rate=None if self.rate is None else self.rate / num_shares,
        )


def _part(whole: int, share: int, num_shares: int) -> int:
    return whole // num_shares + (share < whole % num_shares)


@dataclass(slots=True)
class Measured:
    """What came of a level, or of a share of it; and what the client itself took."""

    records: list[Record]
    began: float
    ended: float
    cpu_seconds: float
    """Of this process meanwhile."""
    lags: list[float]
    """Seconds by which its event loop was late, now and then."""

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measured:
        """What `to_json` has made."""
        return cls(**{**data, "records": [Record.from_json(one) for one in data["records"]]})


def raise_limit() -> None:
    """As many connections as the system lets us have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def run_level(
    address: Address, api_key: str | None, plan: Plan, level: Level, start: float | None = None
) -> Measured:
    """Sends the requests of a level, and waits until all have ended.

    Args:
        address: of the server.
        api_key: what it wants to be sent; None: nothing.
        plan: what they say.
        level: when they are sent.
        start: time.monotonic() at which to begin; None: at once.
    """
    pool = Pool(address, api_key)
    sender = _Sender(pool, plan, level)
    if start is not None:
        await asyncio.sleep(max(0.0, start - time.monotonic()))
    with _meter() as (lags, cpu):
        began = time.monotonic()
        if level.concurrency is not None:
            await sender.keep_busy(level.concurrency, began)
        else:
            await sender.arrive(began)
        ended = max((record.ended for record in sender.records), default=time.monotonic())
        used = cpu()
    pool.close()
    return Measured(sender.records, began, ended, used, lags)


class _Sender:
    def __init__(self, pool: Pool, plan: Plan, level: Level) -> None:
        self._pool, self._plan, self._level = pool, plan, level
        self.records: list[Record] = []
        self._numbers = self._all_numbers()

    def _all_numbers(self) -> Iterator[int]:
        """Of the conversations that are this share's."""
        level, turns = self._level, self._plan.turns
        number = level.share
        while level.num_requests is None or number * turns < level.num_requests:
            yield number
            number += level.num_shares

    def _is_over(self, began: float) -> bool:
        seconds = self._level.seconds
        return seconds is not None and time.monotonic() - began >= seconds

    async def keep_busy(self, concurrency: int, began: float) -> None:
        """Of so many at a time: when one has ended the next begins."""

        async def work() -> None:
            for number in self._numbers:  # shared by all
                if self._is_over(began):
                    break
                await self._converse(number, time.monotonic(), began)

        await asyncio.gather(*(work() for _ in range(concurrency)))

    async def arrive(self, began: float) -> None:
        """One after the other, whatever becomes of them."""
        level, plan = self._level, self._plan
        assert level.rate is not None
        draw = random.Random(f"{plan.seed}/{level.number}/{level.share}/arrivals")
        due, under_way = began, set()
        for number in self._numbers:
            due += draw.expovariate(level.rate / plan.turns)
            if level.seconds is not None and due - began >= level.seconds:
                break
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self._converse(number, due, began))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        if under_way:
            await asyncio.wait(set(under_way))

    async def _converse(self, number: int, due: float, began: float) -> None:
        plan, level = self._plan, self._level
        conversation = plan.conversation(level.number, number)
        for turn in range(plan.turns):
            if turn and self._is_over(began):
                return
            body, wanted = conversation.next()
            record = Record(due, num_wanted=wanted)
            self.records.append(record)
            keeps_text = turn < plan.turns - 1
            text = await perform(self._pool, plan.path, body, record, level.timeout, keeps_text)
            if record.error is not None:
                return
            conversation.answered(text)
            due = time.monotonic()


@contextmanager
def _meter() -> Iterator[tuple[list[float], Any]]:
    """Measures this process meanwhile: lags as they come, and a function that tells its CPU time so far."""
    lags: list[float] = []
    handles: dict[int, asyncio.TimerHandle] = {}
    loop = asyncio.get_running_loop()
    cpu = time.process_time()

    def look(expected: float) -> None:
        now = loop.time()
        lags.append(max(0.0, now - expected))
        handles[0] = loop.call_at(now + LAG_SECONDS, look, now + LAG_SECONDS)

    handles[0] = loop.call_later(LAG_SECONDS, look, loop.time() + LAG_SECONDS)
    try:
        yield lags, lambda: time.process_time() - cpu
    finally:
        handles[0].cancel()
