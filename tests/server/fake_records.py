"""What a fake runtime tells its listeners of its requests."""

from __future__ import annotations

import time
from collections.abc import Iterable

from tpworker.outputs import FinishReason, Listener, RequestOutput, RequestRecord
from tpworker.sampling_params import SamplingParams


class Record:
    """One request, each choice of which is told of when it has ended."""

    def __init__(self, request_id: str, num_prompt: int, sampling: SamplingParams) -> None:
        self._request_id = request_id
        self._num_prompt = num_prompt
        self._sampling = sampling
        self._arrived = time.monotonic()
        self._tokens: dict[int, tuple[int, float, float]] = {}  # how many, the first's time, the last's
        self._open = set(range(sampling.n))

    def add(self, listeners: Iterable[Listener], output: RequestOutput) -> None:
        """An output goes to the consumer."""
        now = time.monotonic()
        if output.token_ids:
            _, first, _ = self._tokens.get(output.index, (0, now, now))
            self._tokens[output.index] = output.num_output_tokens, first, now
        if output.finish_reason is not None:
            self._tell(listeners, output.index, output.finish_reason, None)

    def end(self, listeners: Iterable[Listener], error: BaseException | None) -> None:
        """Nothing more will come."""
        for index in list(self._open):
            left = not isinstance(error, Exception)
            self._tell(listeners, index, "abort" if left else None, None if left else str(error))

    def _tell(
        self, listeners: Iterable[Listener], index: int, finish: FinishReason | None, error: str | None
    ) -> None:
        self._open.discard(index)
        count, first, last = self._tokens.get(index, (0, None, None))
        record = RequestRecord(
            request_id=self._request_id,
            index=index,
            finish_reason=finish,
            error=error,
            num_prompt_tokens=self._num_prompt,
            num_cached_tokens=self._num_prompt // 2,
            num_output_tokens=count,
            num_draft_tokens=2 * count,
            num_accepted_tokens=count,
            num_resumed=index,
            arrived=self._arrived,
            submitted=self._arrived,
            started=None if first is None else self._arrived + (first - self._arrived) / 2,
            first_token=first,
            last_token=last,
            ended=time.monotonic(),
            sampling=self._sampling,
        )
        for listener in listeners:
            listener.on_request_end(record)
