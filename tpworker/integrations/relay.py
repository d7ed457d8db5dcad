"""One request on replicas that may be lost: it goes on where it was, on another one.

    Ask ──► replica 3 ── outputs ──► client          what has been delivered is kept, by choice
                 ✗ lost
    Ask(…, delivered) ──► replica 1 ── outputs ──► client        the same tokens, in fp32

What makes a request (prompt, parameters, seed, delivered tokens) is all here, so a replica that goes on needs
nothing of the one that was lost. Each choice that had not ended is a request of its own from then on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from tpworker.errors import QueueFull, RuntimeFailed
from tpworker.outputs import RequestOutput
from tpworker.sampling_params import SamplingParams

MOST_LOSSES = 3
"""Replicas in a row that may be lost under a request without a token of it: it may be what ends them."""
AGAIN_SECONDS = 0.25
"""After which a request that got nothing from a replica asks again: by then the engine may know which ones
are no more. Twice as long with each that was lost."""
MOST_SECONDS = 120.0
"""For which replicas may be asked, and none takes it. That there is none does not count: the engine waits."""

Outputs = AsyncGenerator[RequestOutput, None]


class ReplicaLost(Exception):
    """The replica that a request ran on is gone, or will be: nothing more comes from there.

    Args:
        message: why.
        was_taken: whether the request may have run there.
    """

    def __init__(self, message: str, was_taken: bool = True) -> None:
        super().__init__(message)
        self.was_taken = was_taken


@dataclass(frozen=True, slots=True)
class Ask:
    """All that a replica is told of a request. The first fields are the arguments of `Runtime.generate`."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    default_max_tokens: int | None = None
    delivered: tuple[int, ...] = ()
    front: str = ""
    """Who asks: a front that tells replicas again and again that it is there, or it is gone. Empty: none, and
    the request goes on until whoever asked closes the stream."""


Open = Callable[[Ask], Outputs]
"""Has some replica answer. Raises ReplicaLost, or what `Runtime.generate` does of a request."""


@dataclass
class _Choice:
    """One output, as far as it was delivered."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    has_ended: bool = False
    last: RequestOutput | None = None
    num_drafts: int = 0
    num_accepted: int = 0
    """Of replicas that were lost."""

    def add(self, output: RequestOutput) -> RequestOutput:
        """What the client is told of a replica's output."""
        self.token_ids += output.token_ids
        self.has_ended = output.finish_reason is not None
        self.last = output._replace(
            index=self.index,
            num_cached_tokens=output.num_cached_tokens if self.last is None else self.last.num_cached_tokens,
            num_draft_tokens=output.num_draft_tokens + self.num_drafts,
            num_accepted_tokens=output.num_accepted_tokens + self.num_accepted,
        )
        return self.last

    def lose(self) -> None:
        """The next output comes from another replica, which counts from 0."""
        if self.last is not None:
            self.num_drafts, self.num_accepted = self.last.num_draft_tokens, self.last.num_accepted_tokens

    def rest_of(self, ask: Ask) -> Ask:
        """What asks for the rest of it, as a request of its own."""
        sampling = ask.sampling
        if sampling.n > 1:
            told = sampling.prompt_logprobs if self.index == 0 else None
            sampling = replace(sampling.of_choice(self.index), prompt_logprobs=told)
        return replace(ask, sampling=sampling, delivered=tuple(self.token_ids))


class _Losses:
    """Of one choice, since it has last come further."""

    def __init__(self) -> None:
        self._num = 0
        self._since = time.monotonic()

    def add(self, error: ReplicaLost | QueueFull, came_further: bool) -> float:
        """One more. Returns after how many seconds another replica may be asked.

        Raises:
            RuntimeFailed: none is to be.
        """
        now = time.monotonic()
        if came_further:
            self._num, self._since = 1, now
            return 0.0
        if isinstance(error, ReplicaLost) and error.was_taken:
            self._num, self._since = self._num + 1, now
        if self._num == MOST_LOSSES:
            raise RuntimeFailed(
                f"{MOST_LOSSES} replicas in a row were lost while this request ran, and none brought it "
                f"further (the last one: {error}): do not send it again as it is"
            )
        if now - self._since > MOST_SECONDS:
            raise RuntimeFailed(f"no replica took this request for {MOST_SECONDS:g} s (the last: {error})")
        return AGAIN_SECONDS * float(2**self._num)


class Relay:
    """One request, from its first replica to its last.

    Args:
        open: has a replica answer; called again when it was lost.
    """

    def __init__(self, open: Open) -> None:
        self._open = open
        self.num_moves = 0
        """How often some of it went on elsewhere."""

    async def outputs(self, ask: Ask) -> Outputs:
        """As `Runtime.generate`'s.

        Args:
            ask: with a seed, or each replica would choose its own.

        Raises:
            RuntimeFailed: too many replicas were lost under it.
            RequestError: a replica refuses it, or has to end it.
        """
        assert ask.sampling.seed is not None, "a request that moves needs a seed"
        choices = [_Choice(index) for index in range(ask.sampling.n)]
        try:
            async with aclosing(self._open(ask)) as outputs:
                async for output in outputs:
                    yield choices[output.index].add(output)
        except ReplicaLost as lost:
            why = lost
        else:
            return
        unended = [choice for choice in choices if not choice.has_ended]
        if len(unended) == 1:
            rest = self._go_on(ask, unended[0], why)
        else:
            rest = _merged([self._go_on(ask, choice, why) for choice in unended])
        async with aclosing(rest) as outputs:
            async for output in outputs:
                yield output

    async def _go_on(self, ask: Ask, choice: _Choice, why: ReplicaLost) -> Outputs:
        """The rest of a choice, whose replica was lost."""
        losses = _Losses()
        wait = losses.add(why, bool(choice.token_ids))
        while not choice.has_ended:
            await asyncio.sleep(wait)
            choice.lose()
            known, has_begun = len(choice.token_ids), False
            try:
                async with aclosing(self._open(choice.rest_of(ask))) as outputs:
                    async for output in outputs:
                        self.num_moves += not has_begun
                        has_begun = True
                        yield choice.add(output)
            except (ReplicaLost, QueueFull) as error:
                wait = losses.add(error, len(choice.token_ids) > known)


async def _merged(streams: list[Outputs]) -> Outputs:
    """Outputs of several streams as they come. The first error of one ends all."""
    arrived: asyncio.Queue[RequestOutput | None] = asyncio.Queue()

    async def pump(stream: Outputs) -> None:
        try:
            async with aclosing(stream) as outputs:
                async for output in outputs:
                    arrived.put_nowait(output)
        finally:
            arrived.put_nowait(None)

    pumps = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        num_running = len(pumps)
        while num_running:
            output = await arrived.get()
            if output is not None:
                yield output
                continue
            num_running -= 1
            for task in [task for task in pumps if task.done()]:
                task.result()
        for task in pumps:
            await task
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
