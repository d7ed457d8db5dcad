"""The end of a step: tokens for where the slots stand, logprobs, and the rows that the publisher copies.

                 masks of guided slots, from the host
                           ▼
    hidden ─► logits ─► rules ─► token ─► slot table, for the next step
                 │                  └───► a row of the token ring
                 └─► logprobs of the logits as they were ─► a row of the logprob ring

Which row of a ring is chosen by a counter on the device, so that all of it can be captured in a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpworker.ipc.messages import MAX_TOLD
from tpworker.kernels.operands import LOGPROB_ROW
from tpworker.model.decoder import Decoder
from tpworker.model.logprobs import logprob_rows
from tpworker.model.sampling import SamplingMode, sample
from tpworker.model.tp import Collectives
from tpworker.rank.slots import SlotTable

_PROMPT_ROWS = 256
"""Prompt tokens whose logits are computed at once: what bounds their memory."""


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
        device = slots.position.device
        self.check_agreement = check_agreement
        self._decoder = decoder
        self._slots = slots
        self._collectives = collectives
        self.ring = torch.full((ring_rows, 1 + slots.num_slots), -1, device=device)
        self._rows = self.ring.unbind(0)  # a step takes one: 4 µs less than by indexing
        self.counter = torch.full((1,), -1, device=device)  # number of the step that runs
        self._logprobs = torch.zeros(ring_rows, slots.num_slots, LOGPROB_ROW, device=device)
        num_told = min(max_tokens, MAX_TOLD)
        self._prompt_logprobs = torch.zeros(ring_rows, num_told, LOGPROB_ROW, device=device)

    def begin(self) -> None:
        """As if there had been no step."""
        self.counter.fill_(-1)
        self.ring.fill_(-1)

    # ------------------------------------------------------------------- where results will be found

    def ring_row(self, step: int, num_sampled: int) -> Tensor:
        """int64 [1 + num_sampled]: the step's number, and its tokens as `sample` gives them."""
        return self._rows[step % len(self._rows)][: 1 + num_sampled]

    def logprob_row(self, step: int, num_sampled: int) -> Tensor:
        """float32 [num_sampled, LOGPROB_ROW], of a step whose mode says so."""
        return self._logprobs[step % len(self._rows), :num_sampled]

    def prompt_logprob_row(self, step: int, count: int) -> Tensor:
        """float32 [count, LOGPROB_ROW], what `tell_of_prompt` has left."""
        return self._prompt_logprobs[step % len(self._rows), :count]

    # ------------------------------------------------------------------------------ compute stream

    def finish_step(self, slots: Tensor, hidden: Tensor, mode: SamplingMode) -> None:
        """Tokens for where the slots stand now, and the rings' rows.

        Args:
            slots: int64 [R]; none: chunks in the middle of their prompts.
            hidden: [R, D].
        """
        tokens, table = slots.new_empty(0), self._slots
        if not len(slots):
            table.finish_step(slots, tokens, self.counter, self.ring)
            return
        decoder, operations = self._decoder, self._decoder.operations
        raw, start = decoder.logits(hidden), decoder.vocab_start
        rows = table.sampling_rows(slots, mode)
        logits = raw
        if mode.guided and table.masks is not None:
            operations.take_masks(slots, self.counter, table.rules.tables, table.masks)
        if mode.adjust:
            logits = operations.adjust(raw, slots, rows.position, table.rules.tables)
        elif mode.logprobs and mode.suppress:  # which works in place
            logits = raw.clone()
        tokens = sample(operations, logits, rows, mode, start, self._collectives)
        if self.check_agreement:
            self._compare_ranks("hidden states", hidden)
            self._compare_ranks("sampled tokens", tokens)
        if mode.adjust:
            operations.count_tokens(slots, tokens, rows.position, table.rules.tables)
        table.finish_step(slots, tokens, self.counter, self.ring)
        if mode.logprobs:
            found = logprob_rows(operations, raw, tokens, start, self._collectives)
            row = self.counter % len(self._logprobs)
            self._logprobs[:, : len(found)].index_copy_(0, row, found[None])

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
