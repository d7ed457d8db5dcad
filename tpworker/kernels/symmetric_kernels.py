"""Sums over CUDA ranks in one kernel with what follows them. Imports Triton: import it on CUDA only.

Every rank has an inbox in symmetric memory, into which the others write over NVLink:

    [2 turns][rows][source rank][width]      a row of a sum, or a (score, token) pair of a row

An entry that nothing has come to holds a value that is never sent: -0.0, which the sender turns into 0.0. So
the data is its own signal, and what a rank waits for is one way through the link: no flag, no fence, no read
of remote memory. (The idea is that of TensorRT-LLM's all-reduce with Lamport's flags.) The reader empties the
entry again, and the next use of the same row takes the other turn.

Why two turns are enough, even if a graph is replayed over and over and the ranks drift apart: a rank writes
to a row for the k-th time after its use k - 1 of the row has ended, so after every rank has at least begun
its own use k - 1, and has ended use k - 2, in which it emptied the entries that are written to now. The turn
is the parity of a counter of the row on the device, which agrees on all ranks, since all launch the same
kernels in the same order. Programs of different rows share nothing.

A rank whose peer never comes spins for ever, and is killed with the group. Programs start in the order of
their rows, so the first row that is unfinished runs, or can start, on every rank: many rows cannot deadlock.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpworker.kernels import pdl
from tpworker.kernels.pdl import start_next, wait

WIDTH = 8192
"""Most elements of a row."""

MAX_PAIRS = 1024
"""Most rows of `argmax`."""

_ROW_BYTES = 64 << 20  # of an inbox, for rows of sums; whatever the number of ranks
_ELEMENTS = 8  # of a row, of one thread: 16 bytes at a time
_PAIRS_BLOCK = 128  # rows of one program of `argmax`

EMPTY_BITS = -32768
"""As int16, the bits of -0.0 in float16 and bfloat16; int64 entries are empty at -2**63."""


@dataclass(frozen=True, slots=True)
class Inboxes:
    """The inboxes of all ranks, and what this rank has used of them.

    Args:
        rank, size: of the group.
        rows: addresses, as this rank sees them, of each rank's inbox for rows of sums.
        pairs: the same of the inboxes for pairs.
        row_uses: int32 [rows_of(size)], zeros at first.
        pair_uses: int32 [MAX_PAIRS], zeros at first.
    """

    rank: int
    size: int
    rows: tuple[int, ...]
    pairs: tuple[int, ...]
    row_uses: Tensor
    pair_uses: Tensor

    @classmethod
    def of(cls, addresses: list[int], rank: int, device: torch.device) -> Inboxes:
        """In memory of `inbox_bytes` at each rank's address, which `empty_inbox` has been applied to."""
        size = len(addresses)
        zeros = torch.zeros(rows_of(size) + MAX_PAIRS, dtype=torch.int32, device=device)
        return cls(
            rank=rank,
            size=size,
            rows=tuple(addresses),
            pairs=tuple(address + _ROW_BYTES for address in addresses),
            row_uses=zeros[:-MAX_PAIRS],
            pair_uses=zeros[-MAX_PAIRS:],
        )

    @staticmethod
    def takes(rows: Tensor) -> bool:
        """Whether sums of such rows can be made: [any, D] of 16-bit floats."""
        return (
            rows.ndim == 2
            and rows.dtype in (torch.bfloat16, torch.float16)
            and rows.is_contiguous()
            and rows.shape[1] <= WIDTH
            and rows.shape[1] % 8 == 0
        )


def rows_of(size: int) -> int:
    """Most rows of one launch, with `size` ranks; larger sums take several."""
    return _ROW_BYTES // (2 * size * WIDTH * 2)


def inbox_bytes(size: int) -> int:
    """Of one rank's symmetric memory."""
    return _ROW_BYTES + 2 * MAX_PAIRS * size * 8


def empty_inbox(memory: Tensor) -> None:
    """Makes all entries of uint8 [inbox_bytes] empty. Before any rank may write to it."""
    memory[:_ROW_BYTES].view(torch.int16).fill_(EMPTY_BITS)
    memory[_ROW_BYTES:].view(torch.int64).fill_(-(1 << 63))


# -------------------------------------------------------------------------------------------------- sums


@triton.jit
def _await_row(entry, expected):
    """The values at `entry`, as soon as all that are expected have come; others are 0.

    The condition is one of the whole program: when it holds, all its threads have read what they will read.
    """
    value = tl.load(entry, mask=expected, other=0.0, volatile=True)
    while tl.max(tl.where(value.to(tl.int16, bitcast=True) == -32768, 1, 0)) > 0:
        value = tl.load(entry, mask=expected, other=0.0, volatile=True)
    return value


@triton.jit(do_not_specialize=["vocab_start", "vocab_size"])
def _reduce_add_norm(
    x, part, weight, out, tokens, vocab_start, vocab_size, inboxes, uses, eps,
    RANK: tl.constexpr, SIZE: tl.constexpr, TWO_SHOT: tl.constexpr, HAS_NORM: tl.constexpr,
    IS_LOOKUP: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row: out = the sum over ranks, or x += sum and out = RMSNorm(x) * weight.

    A lookup: a rank's part is the token's row of its part of a table, or zeros.

    One shot: every rank sends its part to all, and adds up all parts. Two shots: to the row's owner, who adds
    up and sends the sum to all. The sum is made in float32, in the order of the ranks, and rounded once.
    """
    start_next(PDL)
    dtype = part.dtype.element_ty
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    if HAS_NORM:
        scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    here = row.to(tl.int64) * COLUMNS + column
    use = tl.load(uses + row)
    if IS_LOOKUP:
        entry = tl.load(tokens + row) - vocab_start
        is_here = (entry >= 0) & (entry < vocab_size)
        mine = tl.load(part + entry * COLUMNS + column, mask=inside & is_here, other=0.0)
    else:
        mine = tl.load(part + here, mask=inside, other=0.0)
    mine = tl.where(mine == 0.0, tl.zeros_like(mine), mine)  # -0.0 is not sent
    entries = ((use % 2) * ROWS + row) * (SIZE * WIDTH) + column
    owner = row % SIZE
    for step in tl.static_range(1, SIZE):
        there = inboxes[(RANK + step) % SIZE].to(tl.pointer_type(dtype))
        there = tl.multiple_of(there, 16) + RANK * WIDTH + entries
        if TWO_SHOT:
            tl.store(there, mine, mask=inside & (owner == (RANK + step) % SIZE))
        else:
            tl.store(there, mine, mask=inside)
    if HAS_NORM:  # meanwhile
        value = tl.load(x + here, mask=inside, other=0.0)
    inbox = tl.multiple_of(inboxes[RANK].to(tl.pointer_type(dtype)), 16)
    source = tl.arange(0, SIZE)[:, None]
    expected = (source != RANK) & inside[None, :]
    if TWO_SHOT:
        expected = expected & ((owner == RANK) | (source == owner))
    arrived = _await_row(inbox + source * WIDTH + entries[None, :], expected)
    summands = arrived.to(tl.float32)
    if TWO_SHOT:
        # Of a row that is another's, the sum has come, and zeros from everybody else.
        is_mine = (source == RANK) & (owner == RANK)
        summands = tl.where(is_mine, mine.to(tl.float32)[None, :], summands)
    else:
        summands = tl.where(source == RANK, mine.to(tl.float32)[None, :], summands)
    total = tl.sum(summands, axis=0).to(dtype)
    if TWO_SHOT:
        total = tl.where(total == 0.0, tl.zeros_like(total), total)
        for step in tl.static_range(1, SIZE):
            there = inboxes[(RANK + step) % SIZE].to(tl.pointer_type(dtype))
            there = tl.multiple_of(there, 16) + RANK * WIDTH + entries
            tl.store(there, total, mask=inside & (owner == RANK))
    if HAS_NORM:
        value = (value.to(tl.float32) + total.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + here, value, mask=inside)
        wide = value.to(tl.float32)
        wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / COLUMNS + eps)
        tl.store(out + here, (wide * scale).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + here, total, mask=inside)
    nothing = tl.full([SIZE, BLOCK], -32768, tl.int16).to(dtype, bitcast=True)
    tl.store(inbox + source * WIDTH + entries[None, :], nothing, mask=expected)
    tl.store(uses + row, use + 1)


def reduce_add_norm(
    x: Tensor, part: Tensor, weight: Tensor, eps: float, inboxes: Inboxes, two_shot: bool
) -> Tensor:
    """See `tpworker.model.composed_ops.reduce_add_norm`; `inboxes.takes`."""
    assert x.is_contiguous()
    assert x.shape == part.shape
    assert x.dtype == part.dtype
    return _launch(part, inboxes, two_shot, len(part), x=x, weight=weight, eps=eps)


def all_reduce(part: Tensor, inboxes: Inboxes, two_shot: bool) -> Tensor:
    """The sum over ranks, a new tensor; `inboxes.takes`."""
    return _launch(part, inboxes, two_shot, len(part))


def look_up(token_ids: Tensor, table: Tensor, vocab_start: int, inboxes: Inboxes, two_shot: bool) -> Tensor:
    """See `tpworker.model.tp.embed`; vocab_start: token of the first row of this rank's table."""
    assert token_ids.is_contiguous()
    assert table.is_contiguous()
    return _launch(table, inboxes, two_shot, len(token_ids), tokens=token_ids, vocab_start=vocab_start)


def _launch(
    part: Tensor,
    inboxes: Inboxes,
    two_shot: bool,
    num_rows: int,
    *,
    x: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
    tokens: Tensor | None = None,
    vocab_start: int = 0,
) -> Tensor:
    columns = part.shape[1]
    out = part.new_empty(num_rows, columns)
    block = triton.next_power_of_2(columns)
    most = len(inboxes.row_uses)
    for start in range(0, num_rows, most):
        end = min(start + most, num_rows)
        _reduce_add_norm[(end - start,)](
            part if x is None else x[start:end],
            part if tokens is not None else part[start:end],
            part if weight is None else weight,
            out[start:end],
            inboxes.row_uses if tokens is None else tokens[start:end],
            vocab_start,
            len(part),
            inboxes.rows,
            inboxes.row_uses,
            eps,
            RANK=inboxes.rank,
            SIZE=inboxes.size,
            TWO_SHOT=two_shot,
            HAS_NORM=x is not None,
            IS_LOOKUP=tokens is not None,
            COLUMNS=columns,
            BLOCK=block,
            ROWS=most,
            WIDTH=WIDTH,
            num_warps=min(16, max(1, block // (32 * _ELEMENTS))),
            **pdl.options(),
        )
    return out


# ------------------------------------------------------------------------------------------------- pairs


@triton.jit(do_not_specialize=["num_rows"])
def _argmax(
    best, token, out, inboxes, uses, num_rows,
    RANK: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program BLOCK rows: each rank sends its pairs to all, all take the highest.

    A pair is one int64, written in one piece, and such that the highest has the highest score, and of equal
    scores the lowest token: the score's bits, made to order like integers, above 2**32 - 1 - token. A token
    below 0 is ~token of a row whose logits are NaN: it is above all scores, and is taken as it is.
    """
    start_next(PDL)
    wait(PDL)
    block = tl.program_id(0)
    row = block * BLOCK + tl.arange(0, BLOCK)
    exists = row < num_rows
    use = tl.load(uses + block)
    score = tl.load(best + row, mask=exists, other=0.0)
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 is no lower than 0.0
    bits = score.to(tl.int32, bitcast=True)
    chosen = tl.load(token + row, mask=exists, other=0)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(chosen < 0, 0x7FFFFFFF, ordered).to(tl.int64)
    mine = ordered * 4294967296 + (4294967295 - (chosen ^ (chosen >> 63)))
    entries = ((use % 2) * ROWS + row) * SIZE
    for step in tl.static_range(1, SIZE):
        there = inboxes[(RANK + step) % SIZE].to(tl.pointer_type(tl.int64))
        tl.store(there + entries + RANK, mine, mask=exists)
    source = tl.arange(0, SIZE)[:, None]
    expected = (source != RANK) & exists[None, :]
    entry = inboxes[RANK].to(tl.pointer_type(tl.int64)) + entries[None, :] + source
    pair = tl.load(entry, mask=expected, other=0, volatile=True)
    while tl.max(tl.where(expected & (pair == -9223372036854775808), 1, 0)) > 0:
        pair = tl.load(entry, mask=expected, other=0, volatile=True)
    winner = tl.max(tl.where(source == RANK, mine[None, :], pair), axis=0)
    chosen = 4294967295 - (winner & 4294967295)
    tl.store(out + row, tl.where(winner >> 32 == 0x7FFFFFFF, ~chosen, chosen), mask=exists)
    tl.store(entry, tl.full([SIZE, BLOCK], -9223372036854775808, tl.int64), mask=expected)
    tl.store(uses + block, use + 1)


def argmax(best: Tensor, token: Tensor, inboxes: Inboxes) -> Tensor:
    """See `tpworker.model.tp.argmax_ranks`; at most MAX_PAIRS rows."""
    num_rows = len(best)
    assert num_rows <= MAX_PAIRS
    assert best.is_contiguous()
    assert token.is_contiguous()
    out = torch.empty_like(token)
    if num_rows == 0:
        return out
    _argmax[(triton.cdiv(num_rows, _PAIRS_BLOCK),)](
        best,
        token,
        out,
        inboxes.pairs,
        inboxes.pair_uses,
        num_rows,
        RANK=inboxes.rank,
        SIZE=inboxes.size,
        ROWS=MAX_PAIRS,
        BLOCK=_PAIRS_BLOCK,
        num_warps=4,
        **pdl.options(),
    )
    return out
