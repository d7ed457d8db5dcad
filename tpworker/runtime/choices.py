"""The choices of one request, as their one consumer sees them.

    StepOutput ─► Request, index 0 ─┐
                  Request, index 1 ─┼─► Choices.take ─► one output after the other, each of one choice
                  Request, index 2 ─┘

A round goes over all that have something, so none waits for another; what comes for one that has been
taken already waits for the next round, and comes together then.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from tpworker.outputs import RequestOutput, RequestRecord
from tpworker.runtime.bell import Bell
from tpworker.runtime.requests import Request
from tpworker.sampling_params import SamplingParams


class Choices:
    """One request of a client: its choices, by index, each of which is a `Request` with a number of its own.

    Args:
        requests: all of the same bell.
    """

    def __init__(self, requests: list[Request], bell: Bell) -> None:
        self.requests = tuple(requests)
        self.request_id = requests[0].request_id
        self.unended = list(requests)
        """Those whose last output has not been taken."""
        self.sampling: SamplingParams | None = None
        """How its tokens are chosen, once that has been checked."""
        self._round: deque[Request] = deque()  # of those, who had something at the last look
        self._bell = bell

    async def take(self) -> tuple[Request, RequestOutput]:
        """Waits until something has come, and takes it; there must be a choice that has not ended.

        Raises:
            Exception: what `Request.fail` was told, once all that had arrived is taken.
        """
        while not self._round:
            self._round += self.arrived()
            if not self._round:
                await self._bell.listen()
        request = self._round.popleft()
        return request, self.take_from(request)

    def arrived(self) -> list[Request]:
        """Those of which something has come; what the first tells of the prompt comes before all else. Errors
        as in `take`, if there are none."""
        found = [request for request in self.unended if request.has_arrived()]
        if found and found[0].index and self._first_is_awaited():
            found = []
        if not found:
            self._check()
        return found

    def take_from(self, request: Request) -> RequestOutput:
        """What has come of one of these."""
        output = request.take()
        if output.finish_reason is not None:
            self.unended.remove(request)
        return output

    def listen(self, on_news: Callable[[], None], num_awaited: int) -> None:
        """From now on `on_news` is called when something has come: for a choice's first token, then whenever
        so many have not been taken, and for its end."""
        for request in self.requests:
            request.num_awaited = num_awaited
        self._bell.on_ring = on_news

    def has_failed(self) -> bool:
        """Whether one that has not ended has an error."""
        return any(request.error is not None for request in self.unended)

    def ring(self) -> None:
        """Has their consumer look again."""
        self._bell.ring()

    def record(self, request: Request) -> RequestRecord:
        """Of one of them, which was submitted and has ended now."""
        times = request.times
        assert self.sampling is not None
        assert times.submitted is not None
        error = None if request.error is None else str(request.error()).partition("\n")[0]
        return RequestRecord(
            request_id=request.request_id,
            index=request.index,
            finish_reason=None if error is not None else request.finish or "abort",
            error=error,
            num_prompt_tokens=request.num_prompt,
            num_cached_tokens=request.first.num_cached,
            num_output_tokens=request.num_taken,
            num_draft_tokens=request.num_drafts,
            num_accepted_tokens=request.num_accepted,
            num_resumed=request.num_resumed,
            arrived=times.arrived,
            submitted=times.submitted,
            started=times.started,
            first_token=times.first_token,
            last_token=times.last_token,
            ended=time.monotonic(),
            sampling=self.sampling,
        )

    def _first_is_awaited(self) -> bool:
        """Whether the first has to tell of the prompt still."""
        first = self.requests[0]
        return first.logprobs is not None and not first.logprobs.is_prompt_told and first in self.unended

    def _check(self) -> None:
        """Raises why no more will come, if that is known."""
        for request in self.unended:
            if request.error is not None:
                raise request.error()
