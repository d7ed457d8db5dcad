"""The outputs of one open request, for who does not want a task that waits for each of them.

    step ─► Requests.deliver ─► Bell ─► Turns ─► on_news ─► take     in no task
                                                              └─ RequestFailed, …: behind what had come

`Runtime.generate` is the same as a generator, and every output wakes the task that waits there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from itertools import chain
from typing import Protocol

from tpworker.outputs import RequestOutput
from tpworker.runtime.bell import Turns
from tpworker.runtime.choices import Choices
from tpworker.runtime.home_loop import HomeLoop
from tpworker.runtime.intake import Intake

SELDOM = 64
"""Tokens after which is told of those that nobody waits for: it bounds what is decoded at once."""


class Collector(Protocol):
    """One request. What it is asked for belongs to the event loop that it was made on."""

    def listen(self, on_news: Callable[[], None], *, is_whole: bool = False) -> None:
        """From now on `on_news` is called soon after something may have come. It must not raise.

        Args:
            is_whole: only the whole is of interest: it need not be called for each token.
        """

    def take(self) -> Sequence[RequestOutput]:
        """What has come, of each choice as one output. Empty: nothing has since the last time.

        Raises:
            Exception: what `Runtime.generate` raises, when all that came before it has been taken; of that,
                too, it is told.
        """

    @property
    def is_over(self) -> bool:
        """Whether the last output of all has been taken."""

    async def aclose(self) -> None:
        """Nobody wants more of it. If it is not over, it is aborted."""


class RequestCollector:
    """Of a request in this process."""

    def __init__(self, home: HomeLoop, intake: Intake, choices: Choices) -> None:
        """
        Args:
            home: the loop that it belongs to.
            intake: where it is open.
            choices: of the request; it is of no use before they have been submitted.
        """
        self._home = home
        self._intake = intake
        self._choices = choices

    def listen(self, on_news: Callable[[], None], *, is_whole: bool = False) -> None:
        asked = self._choices.sampling
        assert asked is not None, "before it was submitted"
        is_seldom = is_whole and not asked.stop  # a stop string ends it
        self._choices.listen(partial(self._intake.turns.call, on_news), SELDOM if is_seldom else 1)

    def take(self) -> Sequence[RequestOutput]:
        choices, taken = self._choices, []
        for request in choices.arrived() if choices.unended else ():
            output = choices.take_from(request)
            if output.finish_reason is not None:
                self._intake.ended(choices, request)
            taken.append(output)
        if taken and choices.has_failed():
            choices.ring()  # an error is not taken yet, and nothing else may come
        return taken

    async def next(self) -> RequestOutput:
        """The next output, as soon as there is one; it must not be over. Errors as in `take`."""
        self._home.check()
        return await self._intake.take(self._choices)

    @property
    def is_over(self) -> bool:
        return not self._choices.unended

    def close(self) -> None:
        """See `aclose`."""
        self._home.call(partial(self._intake.close, self._choices))

    async def aclose(self) -> None:
        self.close()


class GeneratorCollector:
    """Of a request whose outputs a generator yields, in a task that waits for them."""

    def __init__(self, outputs: AsyncGenerator[RequestOutput, None], turns: Turns) -> None:
        """
        Args:
            outputs: is closed in the end.
            turns: in which consumers are called.
        """
        self._turns = turns
        self._ready: dict[int, list[RequestOutput]] = {}  # by choice
        self._on_news: Callable[[], None] | None = None
        self._pumping = asyncio.create_task(self._pump(outputs))

    def listen(self, on_news: Callable[[], None], *, is_whole: bool = False) -> None:
        self._on_news = on_news

    def take(self) -> Sequence[RequestOutput]:
        if not self._ready and self._pumping.done():
            self._pumping.result()  # raises what has ended it
        if self._pumping.done():
            self._tell()  # what has ended it is not taken yet, and nothing else will come
        ready, self._ready = self._ready, {}
        return [_joined(outputs) for outputs in ready.values()]

    @property
    def is_over(self) -> bool:
        return self._pumping.done() and not self._ready and self._pumping.exception() is None

    async def aclose(self) -> None:
        self._pumping.cancel()
        with suppress(asyncio.CancelledError, Exception):  # taken already, or of no interest any more
            await self._pumping

    async def _pump(self, outputs: AsyncGenerator[RequestOutput, None]) -> None:
        try:
            async with aclosing(outputs) as stream:
                async for output in stream:
                    self._ready.setdefault(output.index, []).append(output)
                    self._tell()
        finally:
            asyncio.get_running_loop().call_soon(self._tell)  # once this task is done

    def _tell(self) -> None:
        if self._on_news is not None:
            self._turns.call(self._on_news)


def _joined(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Of one choice, as one."""
    *_, last = outputs
    if len(outputs) == 1:
        return last
    return last._replace(
        text="".join(one.text for one in outputs),
        token_ids=tuple(chain.from_iterable(one.token_ids for one in outputs)),
        logprobs=None
        if last.logprobs is None
        else tuple(chain.from_iterable(one.logprobs or () for one in outputs)),
        prompt_logprobs=next((one.prompt_logprobs for one in outputs if one.prompt_logprobs), None),
    )
