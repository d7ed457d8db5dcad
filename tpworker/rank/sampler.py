"""The end of a step: tokens for where the slots stand, logprobs, and the rows that the publisher copies.

                 masks of guided slots, from the host
                           ▼
    hidden ─► logits ─► rules ─► token ─► slot table, for the next step
                 │                  └───► a row of the token ring
                 └─► logprobs of the logits as they were ─► a row of the logprob ring

Which row of a ring is chosen by a counter on the device, so that all of it can be captured in a graph.

A slot with drafts is sampled behind its last token and behind each draft: W rows. What is chosen is what
would be without drafts, since it depends on logits, seed and position; a draft is right where it is that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpworker.ipc.drafting import MOST_ROWS
from tpworker.ipc.messages import MAX_TOLD
from tpworker.kernels.operands import LOGPROB_ROW
from tpworker.model.decoder import Decoder
from tpworker.model.logprobs import logprob_rows
from tpworker.model.sampling import SamplingMode, sample
from tpworker.model.tp import Collectives
from tpworker.rank.slots import SlotTable

_PROMPT_ROWS = 256
"""Prompt tokens whose logits are computed at once: what bounds their memory."""


def most_rows(num_slots: int, num_drafts: int) -> int:
    """That a step samples: one a slot, or W of as many slots as may have drafts."""
    return max(num_slots, min(num_slots * (1 + num_drafts), MOST_ROWS))


def ring_length(num_slots: int, num_drafts: int) -> int:
    """Of a row of the token ring: the step, what is sampled, and how many drafts there were."""
    return 1 + most_rows(num_slots, num_drafts) + num_slots * (num_drafts > 0)


class RanksDisagree(RuntimeError):
    """Debug mode: the ranks computed something differently that they must compute alike."""


class Sampler:
    """See the module.

    Args:
        decoder: makes logits of hidden states.
        slots: the slot table.
        collectives: of the rank's group.
        ring_rows: rows of the rings, at least lookahead + 2.
        max_tokens: of a step.
        check_agreement: debug mode: after every step, compare hidden states and tokens of all ranks.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: SlotTable,
        collectives: Collectives,
        ring_rows: int,
        max_tokens: int,
        check_agreement: bool,
    ) -> None:
        device = slots.state.position.device
        self.check_agreement = check_agreement
        self._decoder = decoder
        self._slots = slots
        self._collectives = collectives
        num_drafts = slots.state.drafts.shape[1]
        self.most_rows = most_rows(slots.num_slots, num_drafts)
        """That a step samples."""
        length = ring_length(slots.num_slots, num_drafts)
        self.ring = torch.full((ring_rows, length), -1, device=device)
        self._rows = self.ring.unbind(0)  # a step takes one: 4 µs less than by indexing
        self.counter = torch.full((1,), -1, device=device)  # number of the step that runs
        self._logprobs = torch.zeros(ring_rows, self.most_rows, LOGPROB_ROW, device=device)
        self._places = torch.arange(1 + num_drafts, device=device)
        num_told = min(max_tokens, MAX_TOLD)
        self._prompt_logprobs = torch.zeros(ring_rows, num_told, LOGPROB_ROW, device=device)

    def begin(self) -> None:
        """As if there had been no step."""
        self.counter.fill_(-1)
        self.ring.fill_(-1)

    # ------------------------------------------------------------------- where results will be found

    def ring_row(self, step: int, num_sampled: int, width: int = 1) -> Tensor:
        """int64 [n], what `Operations.finish_step` writes for so many slots."""
        length = 1 + num_sampled * (width if width == 1 else width + 1)
        return self._rows[step % len(self._rows)][:length]

    def logprob_row(self, step: int, num_rows: int) -> Tensor:
        """float32 [num_rows, LOGPROB_ROW], of a step whose mode says so."""
        return self._logprobs[step % len(self._rows), :num_rows]

    def prompt_logprob_row(self, step: int, count: int) -> Tensor:
        """float32 [count, LOGPROB_ROW], what `tell_of_prompt` has left."""
        return self._prompt_logprobs[step % len(self._rows), :count]

    # ------------------------------------------------------------------------------ compute stream

    def finish_step(
        self, slots: Tensor, hidden: Tensor, mode: SamplingMode, width: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Tokens behind where the slots stand now, and the rings' rows.

        Args:
            slots: int64 [S]; none: chunks in the middle of their prompts.
            hidden: [R, D], R = S W.
            width: W, one more than drafts.

        Returns:
            int64 [R], the tokens as `sample` gives them; int64 [S], how many of them each slot got.
        """
        tokens, table = slots.new_empty(0), self._slots
        if not len(slots):
            return tokens, self._count_step(slots, tokens, width)
        decoder, operations = self._decoder, self._decoder.operations
        raw, start = decoder.logits(hidden), decoder.vocab_start
        rows = table.sampling_rows(slots, width, mode)
        logits = raw
        if mode.guided and table.masks is not None:
            operations.take_masks(slots, self.counter, table.rules.tables, table.masks)
        if mode.adjust:
            drafts = table.state.drafts[slots, : width - 1]
            logits = operations.adjust(raw, slots, rows.position, table.rules.tables, drafts)
        elif mode.logprobs and mode.suppress:  # which works in place
            logits = raw.clone()
        tokens = sample(operations, logits, rows, mode, start, self._collectives)
        if self.check_agreement:
            self._compare_ranks("hidden states", hidden)
            self._compare_ranks("sampled tokens", tokens)
        counts = self._count_step(slots, tokens, width)
        if mode.adjust:
            operations.count_tokens(
                self._rows_taken(slots, counts, width), tokens, rows.position, table.rules.tables
            )
        if mode.logprobs:
            found = logprob_rows(operations, raw, tokens, start, self._collectives)
            row = self.counter % len(self._logprobs)
            self._logprobs[:, : len(found)].index_copy_(0, row, found[None])
        return tokens, counts

    def _count_step(self, slots: Tensor, tokens: Tensor, width: int) -> Tensor:
        table = self._slots
        return table.operations.finish_step(slots, tokens, width, table.state, self.counter, self.ring)

    def _rows_taken(self, slots: Tensor, counts: Tensor, width: int) -> Tensor:
        """int64 [R]: the slot of each row; the null slot of those that are nobody's."""
        if width == 1:
            return slots
        is_taken = self._places[:width] < counts[:, None]
        return torch.where(is_taken, slots[:, None], self._slots.num_slots).flatten()

    def tell_of_prompt(self, step: int, hidden: Tensor, tokens: Tensor) -> None:
        """Logprobs of prompt tokens, for which the host says the row: such steps are not captured.

        Args:
            hidden: [n, D], of the tokens before them.
            tokens: int64 [n].
        """
        decoder = self._decoder
        target = self.prompt_logprob_row(step, len(tokens))
        for first in range(0, len(tokens), _PROMPT_ROWS):
            part = slice(first, first + _PROMPT_ROWS)
            logits = decoder.logits(hidden[part])
            target[part] = logprob_rows(
                decoder.operations, logits, tokens[part], decoder.vocab_start, self._collectives
            )

    def _compare_ranks(self, what: str, values: Tensor) -> None:
        """Raises RanksDisagree unless every rank has the same bits (which it looks at: no CUDA graph)."""
        everybody = self._collectives.all_gather(values.contiguous().view(torch.uint8).view(-1))
        different = [rank for rank, bits in enumerate(everybody) if not torch.equal(bits, everybody[0])]
        if different:
            raise RanksDisagree(
                f"step {int(self.counter) + 1}: {what} of ranks {different} are not, bit by bit, rank 0's"
            )
