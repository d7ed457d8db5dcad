"""The contract of a kind of device: what a step computes besides plain torch, under one name each.

    model/torch_operations.py     the definitions, in torch: what is right, and the CPU's way
    kernels/cuda_operations.py    kernels of the same names

Which of them serves is decided once, where a rank is put together (model/operations.py); nothing that runs a
step asks where its tensors are. T tokens, R rows to sample, S sequences; D is the hidden size, H and K are
this rank's query and key-value heads. Where slots have drafts, they have W rows each ('width'), the last
token's and W - 1 drafts': row s * W + i is the i-th of the s-th slot.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tpworker.kernels.operands import (
    Fp8Weight,
    HostMasks,
    LogitTables,
    Matrix,
    Places,
    Routing,
    SamplingRows,
    SlotState,
    Stack,
)


class Operations(Protocol):
    """See the module. A module that has these functions is one."""

    # ------------------------------------------------------------------------- weights and layers

    def linear(self, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> Matrix:
        """A weight [out, in], made ready to be multiplied with; bias: [out].

        Products with weights in FP8 are those with what they stand for. Where rows are many, the input may be
        rounded to FP8 as well, each row by its greatest element.
        """
        ...

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """x += delta, in place, and the RMSNorm of the sum (Zhang and Sennrich, arXiv 1910.07467).

        Args:
            x: [T, D], the residual stream.
            delta: [T, D]; None: nothing is added.
            weight: [D].

        Returns:
            [T, D].
        """
        ...

    def places(
        self,
        positions: Tensor,
        sequence_of: Tensor,
        block_tables: Tensor,
        cos_table: Tensor,
        sin_table: Tensor,
        block_size: int,
    ) -> Places:
        """Look up where a step's tokens are.

        Args:
            positions, sequence_of, block_tables: see `Batch`.
            cos_table, sin_table: `rope_tables`, float32 [num_positions, rotary_dim].
            block_size: tokens of a KV block.
        """
        ...

    def norm_rotate_store(
        self,
        heads: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        places: Places,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """Norm and rotate query and key heads, and write keys and values to the cache.

        Args:
            heads: [T, H + 2 K, head_dim]: query heads, key heads, value heads.
            norms: weights [head_dim] of the RMSNorm of each query and each key head; None: no norm.
            keys, values: the layer's cache, [num_blocks, block_size, K, head_dim].

        Returns:
            The queries, [T, H, head_dim].
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 F], gate then up, to silu(gate) * up [T, F]."""
        ...

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 F], gate then up, to gelu(gate) * up [T, F], with the GELU that is written with tanh."""
        ...

    # ------------------------------------------------------------------------ mixtures of experts

    def route(self, x: Tensor, gate: Matrix, bias: Tensor | None, spec: Routing) -> tuple[Tensor, Tensor]:
        """Choose the experts of each token; a token's choice does not depend on the others, bit by bit.

        Args:
            x: [T, D].
            gate: [E, D]; logits are in float32.
            bias: float32 [E], the router's correction bias, or None.

        Returns:
            ids int32 [T, k + S], the best expert first, then the shared ones; weights float32 [T, k + S].
        """
        ...

    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate_up: Stack,
        down: Stack,
    ) -> Tensor:
        """The weighted sum of what each token's experts make of it.

        Args:
            x: [T, D].
            ids, weights: of `route`; no expert twice for one token.
            gate_up: [E + S, 2 F, D], or a matrix for each expert where `linear` packs them.
            down: [E + S, D, F], or so.

        Returns:
            [T, D], this rank's summand. Products are rounded to x's dtype, sums over experts are in float32.
        """
        ...

    # ----------------------------------------------------------------------------------- sampling

    def ready_logits(self, logits: Tensor) -> Tensor:
        """Logits [R, vocab_local] of the weights' dtype as the operations below take them."""
        ...

    def adjust(
        self, logits: Tensor, slots: Tensor, positions: Tensor, tables: LogitTables, drafts: Tensor
    ) -> Tensor:
        """What the slots' rules make of the logits, in this order.

            + bias; repetition penalty (divides what is above 0, multiplies the rest) of what is in prompt or
            output; - frequency * count - presence of what is in the output; -inf for what is not allowed, and
            for the last token of a barred word whose others are the last ones of the sequence

        Args:
            logits: [R, V] of a float dtype; stays as it is.
            slots: int64 [S], all different but for the null slot, with R / S rows each.
            positions: int64 [R], of the tokens to be chosen: of a slot's first row, those before are in the
                history.
            drafts: int64 [S, R / S - 1]. Row i of a slot is adjusted as if the first i drafts stood behind
                its sequence; where one is -1, it need not mean anything.

        Returns:
            float32 [R, V]; of a slot that uses no rule, the same values.
        """
        ...

    def take_masks(self, slots: Tensor, counter: Tensor, tables: LogitTables, masks: HostMasks) -> None:
        """Wait until the masks of this step are written, and put those of guided slots into `allowed`.

        Does not wait where no slot is guided.

        Args:
            slots: int64 [R], as `adjust`; the null slot is not guided.
            counter: int64 [1], the number of the step before.
            tables: `vocab_start` is a multiple of 8.
        """
        ...

    def count_tokens(self, slots: Tensor, tokens: Tensor, positions: Tensor, tables: LogitTables) -> None:
        """Put chosen tokens into `counts`, where they are this rank's, and into `history`.

        Args:
            slots: int64 [R]; the null slot's for those that are not to be counted.
            positions: int64 [R], where the tokens stand.
            tokens: int64 [R]; those below 0 are ~token.
        """
        ...

    def best_tokens(
        self, logits: Tensor, rows: SamplingRows, random: bool, vocab_start: int
    ) -> tuple[Tensor, Tensor]:
        """The best token of this rank's part of the vocabulary.

        Args:
            logits: [R, vocab_local]; computed with in float32.
            rows: looked at only if `random`: rows whose temperature says so are chosen with noise.
            vocab_start: token id of the first logit.

        Returns:
            float32 [R], its score, which includes the noise, or NaN if any is; int64 [R], the token, of equal
            ones the first, or ~token of the first NaN.
        """
        ...

    def sample_truncated(self, logits: Tensor, rows: SamplingRows, tokens: Tensor) -> None:
        """Replace, in place, the tokens of rows that have min-p, top-k or top-p.

        Args:
            logits: [R, V], of the whole vocabulary; -inf where it is padding.
            tokens: int64 [R], sampled from the whole vocabulary; those of other rows stay, and negative ones.
        """
        ...

    def logprob_parts(self, logits: Tensor, tokens: Tensor, vocab_start: int) -> Tensor:
        """What this rank's part of the vocabulary contributes to logprob rows.

        Args:
            logits: [R, V] of a float dtype; computed with in float32; stays as it is.
            tokens: int64 [R], of the whole vocabulary; those below 0 are ~token.
            vocab_start: token id of the first logit.

        Returns:
            float32 [R, 3 + 2 MOST_LOGPROBS]: the greatest logit; the sum of exp(logit - greatest), 0 where
            all are -inf; the logit of the token, -inf if another rank has it; the greatest logits, best
            first, of equal ones the lowest id first; their ids, -1 for a logit of -inf. Where a logit is
            NaN, the sum is, the rest is any.
        """
        ...

    # --------------------------------------------------------------------------------- slot table

    def begin_decode(
        self, slots: Tensor, width: int, state: SlotState
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The input of a decode step: the last token of each slot, and W - 1 drafts.

        Args:
            slots: int64 [S], all different but for the null slot.
            width: W.

        Returns:
            Token ids and positions int64 [R], R = S W (0 for a draft that is missing), lengths int32 [S], W
            tokens behind where the slots stand, block tables int32 [S, max_blocks].
        """
        ...

    def begin_mixed(
        self,
        slots: Tensor,
        counts: Tensor,
        moves: Tensor,
        starts: Tensor,
        tokens: Tensor,
        state: SlotState,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The input of a step with chunks. Slots that have chunks are moved on; they lose their drafts.

        Args:
            slots, counts, moves, starts, tokens: see `MixedInputs`.

        Returns:
            Token ids int64 [T], positions int64 [T] (of padding 0), lengths int32 [S], query starts int32
            [S + 1], block tables int32 [S, max_blocks].
        """
        ...

    def finish_step(
        self, slots: Tensor, tokens: Tensor, width: int, state: SlotState, counter: Tensor, ring: Tensor
    ) -> Tensor:
        """Count a step, move its slots on behind the tokens that they get, and write a row of the ring.

        A slot gets its first token, and one more for each draft that is what was chosen in its place, up to
        the first that is not; and none at `end` or behind it. Its drafts are gone then.

        Args:
            slots: int64 [S]; the null slot, which stays as it is, may be among them more than once.
            tokens: int64 [R], R = S W, chosen behind the tokens that `begin_decode` gives; those below 0 are
                ~token, see `sampling.sample`, and no draft's.
            counter: int64 [1], the number of the step before, which becomes this one's.
            ring: int64 [ring rows, n]; the row that the counter says gets the step's number, then of each
                slot its W tokens as they are, NO_TOKEN for those that are nobody's, and where W > 1 how many
                drafts it had.

        Returns:
            int64 [S], how many tokens each slot got.
        """
        ...

    def look_up(self, slots: Tensor, num_drafts: int, longest: int, shortest: int, state: SlotState) -> None:
        """Make drafts of what stood behind the last tokens of a sequence before (prompt look-up).

        Of the last n tokens of a sequence that stand in it a second time, earlier, the largest n; of several
        places with so many, the last. Drafts are what stands behind, and where that ends they go on with
        themselves.

        Args:
            slots: int64 [S], as `finish_step` left them.
            num_drafts: to make; the slot's `most_drafts`, if that is less.
            longest, shortest: bounds of n; where it is below, there are no drafts (-1).
        """
        ...
