"""What the scheduler is told of requests, whichever scheduler there is.

    Intake ─► submit ──► Submit ─► scheduler ─► StepOutput ─► deliver ─► Requests
                 │                    │ a fault
                 └── requests wait ◄──┴ interrupt … resume ─► those that are open are told again,
                     meanwhile                                with all that they have got so far

After crashes some run apart and the others wait, see recovery.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from tpworker.errors import RequestFailed
from tpworker.ipc.messages import Abort, Failed, ResetPrefixCache, Said, Vocabulary
from tpworker.runtime.faults import Fault
from tpworker.runtime.generation import Generation
from tpworker.runtime.recovery import Quarantine
from tpworker.runtime.requests import Request, Requests


class Dispatch:
    """Between the requests of a runtime and its schedulers, one after the other.

    Args:
        requests: the open ones.
        in_flight: tokens of a request at most that are on their way.
    """

    def __init__(self, requests: Requests, in_flight: int) -> None:
        self.requests = requests
        self.vocabulary: tuple[str, bytes] | None = None
        """The tokenizer, and the tokens that end outputs; needed before the first request with a grammar."""
        self._generation: Generation | None = None  # None: there are no processes, but there will be
        self._has_vocabulary: int | None = None  # the generation whose scheduler does
        self._quarantine = Quarantine(2 * in_flight + 1)
        self._num_resets = 0
        self._resets: dict[int, asyncio.Future[None]] = {}  # of the prefix cache, that are not answered

    def submit(self, request: Request) -> None:
        """Tells the scheduler of a request whose `submit` is known, or keeps it until that can be."""
        generation = self._generation
        if generation is None or not self._quarantine.admits(request):
            return
        submit = request.resubmit(generation.number)
        if submit.grammar is not None and self._has_vocabulary != generation.number:
            assert self.vocabulary is not None, "a grammar before the vocabulary"
            generation.send(Vocabulary(generation.number, *self.vocabulary))
            self._has_vocabulary = generation.number
        request.is_submitted = True
        generation.send(submit)

    def withdraw(self, request: Request) -> None:
        """Nobody wants its tokens any more."""
        if self.requests.close(request):
            if request.is_submitted and self._generation is not None:
                self._generation.send(Abort(self._generation.number, request.number))
            self._let_others_run()

    def reset_prefix_cache(self) -> asyncio.Future[None]:
        """Has the scheduler forget what was computed; done once that is so, whichever scheduler it is then.
        Whoever is submitted from now on finds nothing of it in any case."""
        number, self._num_resets = self._num_resets, self._num_resets + 1
        reset = self._resets[number] = asyncio.get_running_loop().create_future()
        self.requests.num_questions += 1
        reset.add_done_callback(partial(self._answered, number))
        if self._generation is not None:
            self._generation.send(ResetPrefixCache(self._generation.number, number))
        return reset

    def _answered(self, number: int, reset: asyncio.Future[None]) -> None:
        """Or its asker has left."""
        del self._resets[number]
        self.requests.num_questions -= 1

    def abandon(self, error: Callable[[], Exception]) -> None:
        """There will be no scheduler: whoever waits for it gets an error."""
        for reset in list(self._resets.values()):
            if not reset.done():
                reset.set_exception(error())

    def deliver(self, output: Said) -> None:
        """What the scheduler says. Raises GapError, see `Requests.deliver`."""
        if isinstance(output, ResetPrefixCache):
            reset = self._resets.get(output.number)
            if reset is not None and not reset.done():
                reset.set_result(None)
            return
        if isinstance(output, Failed):
            self.requests.fail(output)
        else:
            self.requests.deliver(output)
        self._let_others_run()

    def interrupt(self, fault: Fault) -> None:
        """The processes are gone. Whoever is found to have ended them fails; the others wait for `resume`."""
        known = self.requests.interrupt()
        self._generation = None
        if fault.is_external or not known:
            return
        poison = self._quarantine.crashed(known)
        if poison is not None:
            self.requests.close(poison)
            poison.fail(lambda: RequestFailed(_why_alone(poison, fault)))

    def suspend(self) -> None:
        """The processes have been ended, because somebody wanted it, and what they have computed is
        forgotten. All requests wait for `resume`."""
        self.requests.interrupt(is_fault=False)
        self._generation = None
        for reset in list(self._resets.values()):  # nothing is left that anybody could find
            if not reset.done():
                reset.set_result(None)

    def resume(self, generation: Generation) -> int:
        """There are processes again. Returns how many requests go on, now or when they may."""
        self._generation = generation
        for number in list(self._resets):  # first: it may have taken over what the one before has left
            generation.send(ResetPrefixCache(generation.number, number))
        self._submit_waiting()
        return self.requests.num_told

    def _let_others_run(self) -> None:
        """If those that run apart have come further, or ended."""
        if not self._quarantine.is_empty and self._quarantine.advance(self.requests.__contains__):
            self._submit_waiting()

    def _submit_waiting(self) -> None:
        for request in self.requests.unended():
            if request.submit is not None and not request.is_submitted:
                self.submit(request)


def _why_alone(request: Request, fault: Fault) -> str:
    """What to say to the client of a request that ends the processes whenever it runs."""
    return (
        f"request {request.request_id!r} failed: the model's processes ended by themselves "
        f"{request.num_crashes} times in a row while it ran, and the last time nothing else did "
        f"({fault.summary}). The others go on; do not send it again as it is"
    )
