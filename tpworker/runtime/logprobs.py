"""The logprobs of a request: what has come of them, until its consumer takes it."""

from __future__ import annotations

from collections.abc import Iterable

from tpworker.outputs import TokenLogprobs

LogprobRow = tuple[float, list[tuple[int, float]]]
"""See `unpack_logprobs`."""


class LogprobRecord:
    """Of one choice.

    Args:
        num_top: of the likeliest, how many a token; None: tokens' logprobs are not asked for.
        num_prompt_top: the same for the prompt's tokens.
        prompt: its token ids; not needed unless its tokens' are asked for.
    """

    def __init__(self, num_top: int | None, num_prompt_top: int | None, prompt: Iterable[int] = ()) -> None:
        self._num_top = num_top
        self._num_prompt_top = num_prompt_top
        self._prompt = tuple(prompt)
        self._arrived: list[TokenLogprobs] = []
        self._of_prompt: list[TokenLogprobs | None] = [None]
        self.num_received = 0
        """Tokens whose logprobs have come."""
        self.is_prompt_told = num_prompt_top is None
        """Whether there is nothing more to tell of the prompt."""

    def go_on_behind(self, num_told: int) -> None:
        """Those of so many tokens have been told, and those of the prompt before them."""
        self.num_received, self.is_prompt_told = num_told, True

    def append(self, token: int, row: LogprobRow) -> None:
        """Of the next token."""
        assert self._num_top is not None
        self._arrived.append(_of(token, row, self._num_top))
        self.num_received += 1

    def extend_prompt(self, position: int, rows: Iterable[LogprobRow]) -> None:
        """Of the prompt's tokens from `position` on; what is known already is dropped."""
        assert self._num_prompt_top is not None
        for place, row in enumerate(rows, position):
            if place == len(self._of_prompt):
                self._of_prompt.append(_of(self._prompt[place], row, self._num_prompt_top))

    def take(
        self, count: int
    ) -> tuple[tuple[TokenLogprobs, ...] | None, tuple[TokenLogprobs | None, ...] | None]:
        """Of the tokens that have arrived, of which `count` are delivered; and once those of the prompt."""
        arrived, self._arrived = self._arrived, []
        told = None
        if not self.is_prompt_told and len(self._of_prompt) == len(self._prompt):
            self.is_prompt_told, told = True, tuple(self._of_prompt)
        return None if self._num_top is None else tuple(arrived[:count]), told


def _of(token: int, row: LogprobRow, num_top: int) -> TokenLogprobs:
    own, top = row
    return TokenLogprobs(token, own, tuple(top[:num_top]))
