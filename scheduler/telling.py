"""What the scheduler tells on its row of the status board: how busy it is, and what it has done so far.

Counted with each step, written a few times a second, and when there is nothing to do any more: so what stands
there while nobody writes is true. An idle scheduler does nothing for it.
"""

from __future__ import annotations

import time

from tpworker.ipc.board import Field, Row
from tpworker.ipc.messages import StepTiming
from tpworker.outputs import step_gap
from tpworker.scheduler.composer import Composer
from tpworker.scheduler.drafting import Drafting
from tpworker.scheduler.inflight import InFlight

INTERVAL_NS = 100_000_000
"""At most so often."""


class Telling:
    """Counts, and writes.

    Args:
        row: the scheduler's.
        composer, drafting: whose counts are told.
    """

    def __init__(self, row: Row, composer: Composer, drafting: Drafting) -> None:
        self._row = row
        self._composer = composer
        self._chances = drafting.chances
        self._num_prefilled = self._num_output = 0
        self._num_gaps = self._gaps = self._busy = 0
        self._last_ended = 0
        self._next_ns = 0
        row[Field.TOTAL_BLOCKS] = composer.pool.num_usable
        row[Field.FREE_BLOCKS] = composer.pool.num_free

    def answered(self, plan: InFlight, timing: StepTiming, num_tokens: int) -> None:
        """A step has been answered, and has yielded so many tokens that count."""
        self._num_prefilled += plan.num_prefill_tokens
        self._num_output += num_tokens
        if (gap := step_gap(plan.num_decodes, timing.started, self._last_ended)) is not None:
            self._num_gaps += 1
            self._gaps += gap
        self._busy += max(0, timing.ended - timing.started)
        self._last_ended = timing.ended

    def tell(self, num_compiling: int, is_idle: bool) -> None:
        """Writes, if it is time.

        Args:
            num_compiling: requests that wait for their grammars.
            is_idle: whether nothing is on its way, so that nobody may come by again for long.
        """
        now = time.monotonic_ns()
        if now < self._next_ns and not is_idle:
            return
        self._next_ns = now + INTERVAL_NS
        row, composer = self._row, self._composer
        row[Field.RUNNING] = len(composer.running)
        row[Field.WAITING] = len(composer.waiting) + num_compiling
        row[Field.FREE_BLOCKS] = composer.pool.num_free
        row[Field.PROMPT_TOKENS] = composer.num_prompt_tokens
        row[Field.CACHED_TOKENS] = composer.num_cached_tokens
        row[Field.PREFILLED_TOKENS] = self._num_prefilled
        row[Field.OUTPUT_TOKENS] = self._num_output
        row[Field.PREEMPTIONS] = composer.num_preemptions
        row[Field.DRAFTS] = sum(self._chances.num_drafts)
        row[Field.ACCEPTED] = sum(self._chances.num_accepted)
        row[Field.NUM_GAPS] = self._num_gaps
        row[Field.GAPS] = self._gaps
        row[Field.BUSY] = self._busy
