"""Masks from the host, as they come. Imports Triton: on CUDA only.

The only wait of a step for the host: for a word that the scheduler sets when the masks of guided slots are
written (ipc/masks.py), which nearly always happens long before the forward has ended. Word and masks are read
where they are, in the host's memory: a copy engine, or a stream that waits for memory, would have to be told
by somebody, and would take longer (28 µs from store to go, where a load takes one or two).

It spins as long as it takes. Who is late is known to the host: the scheduler has a deadline for every step,
the runtime one for the scheduler, and either ends the group.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tpworker.kernels import operands, pdl
from tpworker.kernels.operands import HostMasks, LogitTables
from tpworker.kernels.pdl import start_next, wait

_WORDS = 1024  # of a mask, that a program copies
_GUIDED = tl.constexpr(operands.GUIDED)


@triton.jit
def _written(address):
    """How many steps have their masks. What was stored before it, on the host, can be read after it."""
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.u64 $0, [$1];", "=l,l", [address], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["slots"])
def _await_masks(slots, uses_of, counter, written, num_rows, ROWS: tl.constexpr, PDL: tl.constexpr):
    """One program, of one warp: each look goes to the host, and many at once get in each other's way."""
    wait(PDL)
    start_next(PDL)
    row = tl.arange(0, ROWS)
    slot = tl.load(slots + row, mask=row < num_rows, other=0)
    uses = tl.load(uses_of + slot, mask=row < num_rows, other=0)
    if tl.max(uses & _GUIDED) != 0:
        step = tl.load(counter) + 1
        while _written(written) <= step:
            pass


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _copy_masks(
    slots, uses_of, counter, masks, allowed, num_slots, num_words, num_allowed, first,
    TURNS: tl.constexpr, SHIFT: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row and WORDS words of its mask. first: word of the rank's first bit, its bit SHIFT."""
    wait(PDL)
    start_next(PDL)
    slot = tl.load(slots + tl.program_id(0))
    if (tl.load(uses_of + slot) & _GUIDED) != 0:
        step = tl.load(counter) + 1
        word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
        exists = word < num_allowed
        row = masks.to(tl.pointer_type(tl.int32)) + ((step % TURNS) * num_slots + slot) * num_words + first
        bits = tl.load(row + word, mask=exists, other=0)
        if SHIFT:
            following = tl.load(row + word + 1, mask=exists, other=0)
            low = bits.to(tl.uint32, bitcast=True) >> SHIFT
            bits = low.to(tl.int32, bitcast=True) | (following << (32 - SHIFT))
        tl.store(allowed + slot * num_allowed + word, bits, mask=exists)


def take_masks(slots: Tensor, counter: Tensor, tables: LogitTables, masks: HostMasks) -> None:
    """See `Operations.take_masks`."""
    if len(slots) == 0:
        return
    turns, num_slots, num_words = masks.rows.shape
    num_allowed = tables.allowed.shape[1]
    first, shift = divmod(tables.vocab_start, 32)
    assert first + num_allowed < num_words, "a part of the vocabulary ends beyond the masks"
    assert tables.allowed.is_contiguous()
    _await_masks[(1,)](
        slots,
        tables.uses,
        counter,
        masks.written,
        len(slots),
        ROWS=triton.next_power_of_2(len(slots)),
        num_warps=1,
        **pdl.options(),
    )
    _copy_masks[(len(slots), triton.cdiv(num_allowed, _WORDS))](
        slots,
        tables.uses,
        counter,
        masks.rows.data_ptr(),
        tables.allowed,
        num_slots,
        num_words,
        num_allowed,
        first,
        TURNS=turns,
        SHIFT=shift,
        WORDS=_WORDS,
        num_warps=4,
        **pdl.options(),
    )
