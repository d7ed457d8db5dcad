"""Where one request's output stands in its grammar."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tpworker.grammar.compiler import MAX_MASK_SECONDS

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from tpworker.grammar.bits import Masks


MAX_SLOW = 3
"""Masks of one request that take longer than a mask may; then it ends."""

_TOO_SLOW = (
    "its grammar is too complex: a mask took more than "
    f"{1000 * MAX_MASK_SECONDS:g} ms of processor time, the limit, {MAX_SLOW} times: write rules that match "
    "a text in one way, e.g. item* in place of s: s s"
)


class Guide:
    """The grammar of a request, and what of its output has been taken.

    Args:
        matcher: at its beginning.
        late_ids: what ends the output, and may not before `min_tokens`.
        min_tokens: that the output has, as far as the grammar has so many to say.
    """

    __slots__ = (
        "_late_ids",
        "_min_tokens",
        "_num_consumed",
        "_num_slow",
        "error",
        "forced",
        "has_ended",
        "matcher",
    )

    def __init__(self, matcher: LLMatcher, late_ids: Sequence[int], min_tokens: int) -> None:
        self.matcher = matcher
        self._late_ids = late_ids
        self._min_tokens = min_tokens
        self._num_consumed = 0
        self._num_slow = 0
        self.forced: deque[int] = deque()
        """Tokens that were consumed before they were committed: there is no other in their place."""
        self.has_ended = False
        """Nothing may follow what has been consumed."""
        self.error = ""
        """Why it cannot go on."""

    def knows(self, index: int) -> bool:
        """Whether all tokens before the output's token `index` are known."""
        return self._num_consumed >= index

    def commit(self, token: int) -> bool:
        """Consumes the next token of the output. False: the output ends with it, or is at fault (`error`)."""
        if self.error:
            return False
        if self.forced:
            if token != (forced := self.forced.popleft()):
                self.error = f"token {token} was chosen, where its grammar leaves {forced} alone"
        else:
            self._consume(token)
        return not (self.error or (self.has_ended and not self.forced))

    def _consume(self, token: int) -> None:
        self._num_consumed += 1
        if not self.matcher.consume_token(token):  # a mask may be wrong where the tokenizer lacks some bytes
            self.error = f"its grammar does not take token {token}: {_first_line(self.matcher.get_error())}"
        self.has_ended = self.matcher.is_stopped()

    def settle(self, masks: Masks, row: int, is_slow: bool) -> None:
        """After its matcher has filled a mask, slowly or not: what else there is to say of it."""
        self._num_slow += is_slow
        if self._num_consumed < self._min_tokens:
            masks.remove(row, self._late_ids)
        only = masks.only(row)
        if self.matcher.is_error():
            self.error = f"its grammar is too complex: {_first_line(self.matcher.get_error())}"
        elif self._num_slow == MAX_SLOW:
            self.error = _TOO_SLOW
        elif only == -1:
            self.error = "its grammar leaves no token that could come next"
        elif only is not None:
            self.forced.append(only)
            self._consume(only)
        if self.error:
            masks.allow_all(row)  # nobody wants the token, but there has to be one


def _first_line(text: str) -> str:
    return text.partition("\n")[0][:500]
