"""What listeners of a fleet are told of a request: as of a runtime's, with times as the front saw them."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tpworker.outputs import RequestOutput, RequestRecord
from tpworker.runtime.listeners import Listeners
from tpworker.sampling_params import SamplingParams


@dataclass
class _Choice:
    last: RequestOutput | None = None
    first_token: float | None = None
    last_token: float | None = None


class Recorder:
    """One request; make it when it arrives.

    Args:
        listeners: are told of its tokens, and of the end of each choice.
        request_id, sampling: the request's.
    """

    def __init__(self, listeners: Listeners, request_id: str, sampling: SamplingParams) -> None:
        self._listeners = listeners
        self._request_id = request_id
        self._sampling = sampling
        self._arrived = time.monotonic()
        self._submitted: float | None = None
        self._open = {index: _Choice() for index in range(sampling.n)}

    def submit(self) -> None:
        """Its prompt is tokens, and replicas are asked."""
        self._submitted = time.monotonic()

    def add(self, output: RequestOutput, num_moves: int) -> None:
        """Some tokens of a choice, or its end, have come just now; so often it has gone on elsewhere."""
        choice = self._open[output.index]
        now, choice.last = time.monotonic(), output
        if output.token_ids:
            if choice.last_token is None:
                choice.first_token = now
            else:
                self._listeners.on_tokens([(len(output.token_ids), now - choice.last_token)])
            choice.last_token = now
        if output.finish_reason is not None:
            self._end(output.index, num_moves, None)

    def close(self, num_moves: int, error: BaseException | None) -> None:
        """Its consumer gets no more, because of an error, or because it has left. Of one that is refused
        before anything has come, nobody is told."""
        is_error = isinstance(error, Exception)
        told = str(error).partition("\n")[0] if is_error else None
        if told is None or any(choice.last is not None for choice in self._open.values()):
            for index in tuple(self._open):
                self._end(index, num_moves, told)

    def _end(self, index: int, num_moves: int, error: str | None) -> None:
        choice = self._open.pop(index)
        if self._submitted is None:
            return
        last = choice.last or RequestOutput(self._request_id, "", (), None, None, 0, 0, 0)
        self._listeners.on_request_end(
            RequestRecord(
                request_id=self._request_id,
                index=index,
                finish_reason=None if error is not None else last.finish_reason or "abort",
                error=error,
                num_prompt_tokens=last.num_prompt_tokens,
                num_cached_tokens=last.num_cached_tokens,
                num_output_tokens=last.num_output_tokens,
                num_draft_tokens=last.num_draft_tokens,
                num_accepted_tokens=last.num_accepted_tokens,
                num_resumed=num_moves,
                arrived=self._arrived,
                submitted=self._submitted,
                started=None,  # the replica's clock may be another machine's
                first_token=choice.first_token,
                last_token=choice.last_token,
                ended=time.monotonic(),
                sampling=self._sampling,
            )
        )
