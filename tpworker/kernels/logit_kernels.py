"""What changes logits before a token is chosen, and the counts that it needs. Imports Triton: on CUDA only.

What `logit_rules` defines, in two kernels:

    1. a program a row and block of the vocabulary: widened, penalised, masked
    2. a program a row: the few columns of its bias, computed again from the logit as it was, since bias comes
       before penalties; then those of barred words

The second needs the first one's result only to be overwritten, so it looks everything up while that one runs.
A slot with drafts has a row for each and one before them; a row sees the drafts before it as tokens.
Sums and products are rounded one by one, as the definition does it: none is fused.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpworker.kernels import operands, pdl
from tpworker.kernels.operands import LogitTables
from tpworker.kernels.pdl import start_next, wait

_WORDS = 64  # of 32 logits each, that a program takes
_ROWS = 128  # whose tokens a program counts: one a thread
_PENALISED = tl.constexpr(operands.PENALISED)
_MASKED = tl.constexpr(operands.MASKED)
_BIASED = tl.constexpr(operands.BIASED)
_WORDS_BARRED = tl.constexpr(operands.WORDS_BARRED)
_OF_OUTPUT = tl.constexpr(operands.IN_PROMPT - 1)  # the bits of a count that tell of the output
_VIEWS = ["slots", "positions", "tokens"]  # parts of what a step brings: no variant may depend on their place


@triton.jit
def _penalise(value, count, penalties):
    """`logit_rules._penalise`; penalties: of the slot."""
    repetition = tl.load(penalties)
    presence = tl.load(penalties + 1)
    frequency = tl.load(penalties + 2)
    divided = tl.div_rn(value, tl.zeros_like(value) + repetition)
    repeated = tl.where(value > 0, divided, value * repetition)
    value = tl.where(count > 0, repeated, value)
    of_output = count & _OF_OUTPUT
    value = value - of_output.to(tl.float32) * frequency
    return value - tl.where(of_output > 0, presence, 0.0)


@triton.jit
def _count_drafts(count, token, drafts, row, WIDTH: tl.constexpr):
    """`count`, of tokens [..., 1 token each], and how often each of them is a draft before this row."""
    for number in tl.static_range(WIDTH - 1):
        draft = tl.load(drafts + row // WIDTH * (WIDTH - 1) + number)
        count += ((token == draft) & (draft >= 0) & (row % WIDTH > number)).to(tl.int32)
    return count


@triton.jit(do_not_specialize_on_alignment=_VIEWS[:1])
def _adjust_blocks(
    logits, slots, drafts, uses_of, penalties, counts, allowed, out, size, stride, num_words, vocab_start,
    WIDTH: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row and 32 * WORDS of its logits."""
    wait(PDL)
    start_next(PDL)  # in this order: the next kernel reads what this one does not write without waiting
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)[:, None]
    bit = tl.arange(0, 32)[None, :]
    column = word * 32 + bit
    exists = column < size
    value = tl.load(logits + row * stride + column, mask=exists, other=0.0).to(tl.float32)
    slot = tl.load(slots + row // WIDTH)
    uses = tl.load(uses_of + slot)
    if (uses & _PENALISED) != 0:
        count = tl.load(counts + slot * size + column, mask=exists, other=0)
        count = _count_drafts(count, column + vocab_start, drafts, row, WIDTH)
        value = _penalise(value, count, penalties + slot * 3)
    if (uses & _MASKED) != 0:
        bits = tl.load(allowed + slot * num_words + word, mask=word < num_words, other=0)
        value = tl.where(((bits >> bit) & 1) == 0, float("-inf"), value)
    tl.store(out + row * size + column, value, mask=exists)


@triton.jit(do_not_specialize_on_alignment=_VIEWS[:2])
def _adjust_listed(
    logits, slots, positions, drafts, uses_of, penalties, counts, allowed, bias_ids, bias, barred, history,
    out, size, stride, num_words, vocab_start,
    WIDTH: tl.constexpr, NUM_BIAS: tl.constexpr, NUM_BARRED: tl.constexpr, LENGTH: tl.constexpr,
    HISTORY: tl.constexpr, BIAS: tl.constexpr, BARRED: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row: columns that have a bias, then those of barred words.

    BIAS, BARRED, TOKENS: the next powers of two of NUM_BIAS, NUM_BARRED and LENGTH.
    """
    start_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row // WIDTH)
    uses = tl.load(uses_of + slot)
    entry = tl.arange(0, BIAS)
    is_biased = ((uses & _BIASED) != 0) & (entry < NUM_BIAS)
    token = tl.load(bias_ids + slot * NUM_BIAS + entry, mask=is_biased, other=-1)
    column = token - vocab_start
    is_here = (token >= 0) & (column >= 0) & (column < size)
    value = tl.load(logits + row * stride + column, mask=is_here, other=0.0).to(tl.float32)
    value = value + tl.load(bias + slot * NUM_BIAS + entry, mask=is_here, other=0.0)
    if (uses & _PENALISED) != 0:
        count = tl.load(counts + slot * size + column, mask=is_here, other=0)
        count = _count_drafts(count, token, drafts, row, WIDTH)
        value = _penalise(value, count, penalties + slot * 3)
    if (uses & _MASKED) != 0:
        bits = tl.load(allowed + slot * num_words + column // 32, mask=is_here, other=0)
        value = tl.where(((bits >> (column & 31)) & 1) == 0, float("-inf"), value)

    is_barring = (uses & _WORDS_BARRED) != 0
    word = tl.arange(0, BARRED)
    last = tl.load(
        barred + (slot * NUM_BARRED + word) * LENGTH + LENGTH - 1,
        mask=is_barring & (word < NUM_BARRED),
        other=-1,
    )
    is_next = _is_next(
        barred, history + slot * HISTORY, slot * NUM_BARRED, tl.load(positions + row), is_barring, drafts,
        row, WIDTH, NUM_BARRED, LENGTH, HISTORY, BARRED, TOKENS,
    )  # fmt: skip
    barred_column = last - vocab_start
    is_barred = is_next & (last >= 0) & (barred_column >= 0) & (barred_column < size)

    wait(PDL)  # for the first kernel's stores
    tl.store(out + row * size + column, value, mask=is_here)
    tl.debug_barrier()  # a barred word's column may have a bias that another thread has stored
    found = tl.load(out + row * size + barred_column, mask=is_barred, other=0.0)
    tl.debug_barrier()  # two words may have one column: nobody stores before all have read
    tl.store(out + row * size + barred_column, tl.where(found == found, float("-inf"), found), mask=is_barred)


@triton.jit
def _is_next(
    barred, history, first_word, position, is_barring, drafts, row, WIDTH: tl.constexpr,
    NUM_BARRED: tl.constexpr, LENGTH: tl.constexpr, HISTORY: tl.constexpr, BARRED: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Of each word, whether all but its last token are the last ones before `position`.

    The last ones of all are the drafts before this row.
    """
    word = tl.arange(0, BARRED)[:, None]
    token = tl.arange(0, TOKENS)
    begins = token < LENGTH - 1
    place = position - (LENGTH - 1) + token
    # Before the first token of a sequence stands what is in no word.
    recent = tl.load(history + (place & (HISTORY - 1)), mask=is_barring & begins & (place >= 0), other=-2)
    if WIDTH > 1:
        its_drafts = drafts + row // WIDTH * (WIDTH - 1)
        num_before = tl.zeros([], tl.int32)
        for number in tl.static_range(WIDTH - 1):
            is_before = (tl.load(its_drafts + number) >= 0) & (row % WIDTH > number)
            num_before += is_before.to(tl.int32)
        number = num_before - (LENGTH - 1) + token
        is_draft = begins & (number >= 0) & (place >= 0)
        recent = tl.where(is_draft, tl.load(its_drafts + number, mask=is_draft, other=0).to(tl.int32), recent)
    words = tl.load(
        barred + (first_word + word) * LENGTH + token[None, :],
        mask=is_barring & (word < NUM_BARRED) & begins[None, :],
        other=-1,
    )
    is_alike = (words == recent[None, :]) | (words < 0)
    return tl.min(is_alike.to(tl.int32), axis=1) == 1


def adjust(logits: Tensor, slots: Tensor, positions: Tensor, tables: LogitTables, drafts: Tensor) -> Tensor:
    """See `Operations.adjust`."""
    (num_rows, size), width = logits.shape, 1 + drafts.shape[1]
    out = torch.empty(num_rows, size, dtype=torch.float32, device=logits.device)
    if num_rows == 0:
        return out
    num_words, num_bias = tables.allowed.shape[1], tables.bias_ids.shape[1]
    num_barred, length = tables.barred.shape[1:]
    history = tables.history.shape[1]
    assert num_rows == len(slots) * width
    assert logits.stride(1) == 1
    assert drafts.is_contiguous()
    assert tables.counts.shape[1] == size
    assert history & (history - 1) == 0
    # Of `tables`: what both kernels read.
    dense = (tables.penalties, tables.counts, tables.allowed)
    listed = (tables.bias_ids, tables.bias, tables.barred, tables.history)
    assert all(table.is_contiguous() for table in (tables.uses, *dense, *listed))
    _adjust_blocks[(num_rows, triton.cdiv(size, 32 * _WORDS))](
        logits,
        slots,
        drafts,
        tables.uses,
        *dense,
        out,
        size,
        logits.stride(0),
        num_words,
        tables.vocab_start,
        WIDTH=width,
        WORDS=_WORDS,
        num_warps=8,
        enable_fp_fusion=False,
        **pdl.options(),
    )
    _adjust_listed[(num_rows,)](
        logits,
        slots,
        positions,
        drafts,
        tables.uses,
        *dense,
        *listed,
        out,
        size,
        logits.stride(0),
        num_words,
        tables.vocab_start,
        WIDTH=width,
        NUM_BIAS=num_bias,
        NUM_BARRED=num_barred,
        LENGTH=length,
        HISTORY=history,
        BIAS=triton.next_power_of_2(num_bias),
        BARRED=triton.next_power_of_2(num_barred),
        TOKENS=triton.next_power_of_2(length),
        num_warps=4,
        enable_fp_fusion=False,
        **pdl.options(),
    )
    return out


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=_VIEWS)
def _count_tokens(
    slots, tokens, positions, counts, history, num_rows, size, vocab_start,
    HISTORY: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program ROWS rows. A slot may have several, of one token too."""
    start_next(PDL)
    wait(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    slot = tl.load(slots + row, mask=exists, other=0)
    token = tl.load(tokens + row, mask=exists, other=0)
    token = token ^ (token >> 63)  # ~token, if it is below 0
    position = tl.load(positions + row, mask=exists, other=0)
    tl.store(history + slot * HISTORY + (position & (HISTORY - 1)), token.to(tl.int32), mask=exists)
    column = token - vocab_start
    is_here = exists & (column >= 0) & (column < size)
    tl.atomic_add(counts + slot * size + column, 1, mask=is_here, sem="relaxed")


def count_tokens(slots: Tensor, tokens: Tensor, positions: Tensor, tables: LogitTables) -> None:
    """See `Operations.count_tokens`."""
    num_rows, (_, size), (_, history) = len(slots), tables.counts.shape, tables.history.shape
    if num_rows == 0:
        return
    assert tables.counts.is_contiguous()
    assert tables.history.is_contiguous()
    assert history & (history - 1) == 0
    _count_tokens[(triton.cdiv(num_rows, _ROWS),)](
        slots,
        tokens,
        positions,
        tables.counts,
        tables.history,
        num_rows,
        size,
        tables.vocab_start,
        HISTORY=history,
        ROWS=_ROWS,
        num_warps=4,
        **pdl.options(),
    )
