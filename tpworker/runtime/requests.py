"""The requests that are open in a runtime, and how the scheduler's tokens get to their consumers.

                 ┌────────────────────── Requests (by number) ─────────────────────┐
    StepOutput ──┤ position known already? drop. a gap? fault. next? append, ring  ├──► Request ──► take()
                 └─────────────────────────────────────────────────────────────────┘

Delivering a token costs an append and, once a step, telling the consumer. Everything else, detokenising
above all, is done in `take`, when the consumer comes to fetch what has arrived.

Each choice of a client's request (`SamplingParams.n`) is a request here, in all counts too; `Choices` puts
them together for their consumer.

All of this belongs to one event loop's thread.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tpworker.errors import RequestFailed
from tpworker.ipc.arrays import pack_int32, unpack_int32, unpack_int64, unpack_logprobs
from tpworker.ipc.messages import Failed, StepOutput, Submit
from tpworker.outputs import FinishReason, RequestOutput
from tpworker.runtime.bell import Bell
from tpworker.runtime.listeners import Listeners
from tpworker.runtime.logprobs import LogprobRecord
from tpworker.runtime.times import Times

if TYPE_CHECKING:
    from tpworker.text.stream import TextStream


class GapError(Exception):
    """A token came that is not the next one of its request: one was lost."""


class Request:
    """One choice of a request, from before it is tokenised until its consumer has its last output.

    Args:
        number: its name towards the scheduler; never used again.
        request_id: its client's name for it; that of all choices.
        first: the choice with index 0; None: it is that.
        index: which choice it is.
        bell: rung whenever there is something new.
    """

    __slots__ = (
        "bell",
        "error",
        "finish",
        "first",
        "index",
        "is_running",
        "is_submitted",
        "logprobs",
        "num_accepted",
        "num_at_crash",
        "num_awaited",
        "num_cached",
        "num_crashes",
        "num_drafts",
        "num_looked_at",
        "num_prompt",
        "num_resumed",
        "num_taken",
        "number",
        "own_stop_ids",
        "received",
        "request_id",
        "submit",
        "text",
        "times",
        "wants_tokens",
        "was_running",
    )

    def __init__(
        self,
        number: int,
        request_id: str,
        first: Request | None = None,
        index: int = 0,
        bell: Bell | None = None,
    ) -> None:
        self.number = number
        self.request_id = request_id
        self.first = first or self
        self.index = index
        self.times = Times()
        self.num_prompt = 0
        self.num_cached = 0
        self.received = array("i")
        """Tokens that came from the scheduler."""
        self.submit: Submit | None = None
        """What the scheduler was told of it, or is to be, once there is one."""
        self.num_drafts = 0
        self.num_accepted = 0
        """Drafts that steps had for it, and those that came of them as tokens."""
        self.is_submitted = False
        """Whether the scheduler knows of it."""
        self.is_running = False
        """Whether it has got a slot."""
        self.was_running = False
        """Whether it has ever got one, of this scheduler or of one before it."""
        self.num_crashes = 0
        """In a row, in which it was there."""
        self.num_at_crash = 0
        """How many tokens it had at the last of these."""
        self.num_resumed = 0
        """Restarts that it went through."""
        self.finish: FinishReason | None = None
        """Why no more tokens will come."""
        self.error: Callable[[], Exception] | None = None
        """Makes the exception that its consumer gets after the tokens that have arrived."""
        self.text: TextStream | None = None
        self.own_stop_ids: frozenset[int] = frozenset()
        """Those of its stop_token_ids that do not end every request."""
        self.logprobs: LogprobRecord | None = None
        """What has come of logprobs; None: not asked for."""
        self.wants_tokens = True
        """False: max_tokens is 0. A step yields a token at least; that one is nobody's."""
        self.num_awaited = 1
        """After its first token, its consumer wants to hear of so many at a time."""
        self.num_looked_at = 0  # of the received
        self.num_taken = 0
        """Of the tokens: its consumer has got so many. Those that do not count are not among them."""
        self.bell = bell or Bell()

    @property
    def num_received(self) -> int:
        """How many tokens came from the scheduler: the position of the next."""
        return len(self.received)

    def resubmit(self, generation: int) -> Submit:
        """What tells the scheduler of that generation all of it, `submit` being known."""
        assert self.submit is not None
        return replace(
            self.submit,
            generation=generation,
            tokens=self.submit.tokens + pack_int32(self.received) if self.received else self.submit.tokens,
            num_delivered=self.num_received,
            is_resumed=self.was_running,
        )

    def end(self, finish: FinishReason) -> None:
        """No more tokens will come. The first reason counts."""
        if self.finish is None:
            self.finish = finish
        self.bell.ring()

    def fail(self, error: Callable[[], Exception]) -> None:
        """No more tokens will come, because of an error."""
        self.error = error
        self.bell.ring()

    def has_arrived(self) -> bool:
        """Whether there is something to take."""
        return self.finish is not None or len(self.received) > self.num_looked_at

    def take(self) -> RequestOutput:
        """All that has arrived, as one output. A stop string in it ends the request, at its position."""
        tokens = self.received[self.num_looked_at :].tolist()
        self.num_looked_at = len(self.received)
        if not self.wants_tokens and tokens:
            tokens, self.finish = [], "length"
        finish = self.finish
        stop_reason: int | str | None = None
        text = ""
        if finish == "stop" and tokens and tokens[-1] in self.own_stop_ids:
            stop_reason = tokens[-1]
        if self.text is not None:
            text, stopped, num_tokens = self.text.push(tokens)
            if stopped is not None:  # what came after it does not count: neither tokens nor how they ended
                del tokens[num_tokens:]
                finish = self.finish = "stop"
                stop_reason = stopped
            elif finish is not None:
                text += self.text.finish()
        self.num_taken += len(tokens)
        logprobs, prompt_logprobs = (None, None) if self.logprobs is None else self.logprobs.take(len(tokens))
        return RequestOutput(
            self.request_id,
            text,
            tuple(tokens),
            finish,
            stop_reason,
            self.num_prompt,
            self.first.num_cached,
            self.num_taken,
            self.index,
            logprobs,
            prompt_logprobs,
            self.num_drafts,
            self.num_accepted,
        )


class Requests:
    """The open requests of a runtime, and counts of them.

    A request is `waiting` until it gets its first slot, then `running`; it is removed when the scheduler
    ends it, or the runtime aborts it.

    Args:
        listeners: told of the tokens; None: nobody is.
    """

    def __init__(self, listeners: Listeners | None = None) -> None:
        self._listeners = Listeners() if listeners is None else listeners
        self.num_waiting = 0
        self.num_running = 0
        self.num_output_tokens = 0
        self.num_questions = 0
        """What the scheduler was asked besides, and has not answered."""
        self._by_number: dict[int, Request] = {}
        self._next_number = 0

    def any_submitted(self) -> bool:
        """Whether the scheduler has work; what is tokenised still, it knows nothing of."""
        return self.num_questions > 0 or any(request.is_submitted for request in self._by_number.values())

    def __contains__(self, request: Request) -> bool:
        return request.number in self._by_number

    def open(
        self, request_id: str, first: Request | None = None, index: int = 0, bell: Bell | None = None
    ) -> Request:
        """A new request, waiting. The arguments are those of `Request`."""
        request = Request(self._next_number, request_id, first, index, bell)
        self._next_number += 1
        self._by_number[request.number] = request
        self.num_waiting += 1
        return request

    def close(self, request: Request) -> bool:
        """Nothing is delivered to it any more. False: so it was already."""
        if self._by_number.pop(request.number, None) is None:
            return False
        if request.is_running:
            self.num_running -= 1
        else:
            self.num_waiting -= 1
        return True

    @property
    def num_told(self) -> int:
        """Those of which a scheduler has been told, or is to be: not those that are tokenised still."""
        return sum(request.submit is not None for request in self._by_number.values())

    def unended(self) -> list[Request]:
        """All of them, in the order in which they came."""
        return list(self._by_number.values())

    def interrupt(self, *, is_fault: bool = True) -> list[Request]:
        """The scheduler is gone: it knows of none any more, and all wait. Returns those that it knew of."""
        known = [request for request in self._by_number.values() if request.is_submitted]
        for request in known:
            request.is_submitted = False
            request.num_resumed += is_fault
            if request.is_running:
                request.is_running = False
                self.num_running -= 1
                self.num_waiting += 1
        return known

    def fail_all(self, error: Callable[[], Exception]) -> None:
        """Ends all with an error; `error` makes one for each, as an exception is raised once only."""
        for request in list(self._by_number.values()):
            self.close(request)
            request.fail(error)

    def fail(self, failed: Failed) -> None:
        """Ends one with an error of its own."""
        request = self._by_number.get(failed.request)
        if request is not None:
            self.close(request)
            request.fail(lambda: RequestFailed(f"request {request.request_id!r} failed: {failed.reason}"))

    def deliver(self, output: StepOutput) -> None:
        """Hands a step's tokens out, each once and in order, whatever is repeated (invariant 6).

        Raises:
            GapError: a token is missing.
        """
        by_number = self._by_number
        for started in output.started:
            self._start(started.request, started.num_cached, output.timing.launched / 1e9)
        for told in output.prompt_logprobs:
            if (request := by_number.get(told.request)) is not None and request.logprobs is not None:
                request.logprobs.extend_prompt(told.position, unpack_logprobs(told.rows))
        numbers = unpack_int64(output.requests)
        triples: Iterable[tuple[int, int, int]] = zip(
            numbers, unpack_int32(output.positions), unpack_int32(output.tokens), strict=True
        )
        if output.logprobs_of or output.proposed:
            triples = list(triples)
            self._deliver_logprobs(output, triples)
            self._count_drafts(output, triples)
        bells: dict[Bell, None] = {}
        try:
            self._append(triples, output.step, bells)
            for finish in output.finished:
                request = by_number.get(numbers[finish.index])
                if request is not None:
                    self.close(request)
                    request.end("stop" if finish.reason == "stop" else "length")
        finally:
            for bell in bells:
                bell.ring()

    def _append(self, triples: Iterable[tuple[int, int, int]], step: int, bells: dict[Bell, None]) -> None:
        """Each token (number, position, token) to its request. `bells` are then those to ring, once all has
        been told: nobody is to hear of a token before the end that comes with it."""
        by_number = self._by_number
        now, is_told = time.monotonic(), bool(self._listeners)
        waits: list[float] = []  # of those who get their first
        behind: list[tuple[Request, int, float]] = []  # of the others
        delivered = 0
        for number, position, token in triples:
            request = by_number.get(number)
            if request is None:
                continue  # aborted, and the scheduler did not know yet
            expected = len(request.received)
            if position == expected:
                times = request.times
                if times.last_token != now:
                    if times.last_token is None:
                        times.first_token = now
                        waits.append(now - times.arrived)
                        bells[request.bell] = None
                    elif is_told:
                        behind.append((request, expected, now - times.last_token))
                    times.last_token = now
                    if expected - request.num_looked_at >= request.num_awaited - 1:
                        bells[request.bell] = None
                request.received.append(token)
                delivered += 1
            elif position > expected:
                raise GapError(
                    f"request {request.request_id!r}: the token at position {position} came, "
                    f"but that at {expected} never did (step {step})"
                )
        self.num_output_tokens += delivered
        if waits and is_told:
            self._listeners.on_first_tokens(waits)
        if behind:
            self._listeners.on_tokens([(len(r.received) - before, seconds) for r, before, seconds in behind])

    def _deliver_logprobs(self, output: StepOutput, triples: Sequence[tuple[int, int, int]]) -> None:
        """Of those of a step's tokens (number, position, token) that will be delivered."""
        told = zip(unpack_int32(output.logprobs_of), unpack_logprobs(output.logprobs), strict=True)
        for index, row in told:
            number, position, token = triples[index]
            request = self._by_number.get(number)
            if request is None or request.logprobs is None:
                continue
            if position == request.logprobs.num_received:
                request.logprobs.append(token, row)

    def _count_drafts(self, output: StepOutput, triples: Sequence[tuple[int, int, int]]) -> None:
        """Those of the requests to which a step's tokens (number, position, token) will be delivered."""
        for index, drafts in enumerate(unpack_int32(output.proposed)):
            number, position, _ = triples[index]
            request = self._by_number.get(number) if drafts else None
            if request is not None and position == request.num_received:
                request.num_drafts += drafts
                behind = index + 1
                while behind < len(triples) and triples[behind][0] == number:
                    behind += 1
                request.num_accepted += behind - index - 1

    def _start(self, number: int, num_cached: int, launched: float) -> None:
        request = self._by_number.get(number)
        if request is not None and not request.is_running:
            request.is_running = True
            if not request.was_running:
                request.was_running = True
                request.times.started = launched
                request.num_cached = num_cached
            self.num_waiting -= 1
            self.num_running += 1
