"""Products of a weight with up to 64 rows, on Hopper. Imports Triton: import it on CUDA only.

Such a product is the reading of its weight, and between short kernels a memory that idles is what costs. So
this is written in Gluon, Triton's lower level, where it can be said when memory is asked for: each program
asks for the first stages of its part of the weight before the kernel before it has ended (see pdl.py); they
take shared memory and no registers. With the matrices of small models that is all of the weight.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tpworker.kernels import pdl
from tpworker.kernels.few_rows import FewRows, counters, most_stages, num_processors, padded
from tpworker.kernels.operands import Fp8Weight, Normed
from tpworker.kernels.pdl import start_next, wait

_REGISTERS = 64 << 10
"""Of a processor."""


@gluon.constexpr_function
def _layout(outputs: int, rows: int, warps: int) -> gl.BlockedLayout:
    """Of a tile [outputs, rows]: a thread has up to eight outputs side by side of a row."""
    each = max(1, min(8, outputs * rows // (32 * warps)))
    threads = min(32, outputs // each)
    across = min(warps, outputs // (each * threads))
    return gl.BlockedLayout([each, 1], [threads, 32 // threads], [across, warps // across], [0, 1])


@gluon.jit(do_not_specialize=["num_rows", "steps_of_split", "num_squares"])
def _few_rows(
    x, weight, scales, squares, bias, out, next_norm, next_scaled, next_squares, partial, counts, eps,
    num_rows, size_in, size_out, steps_of_split, num_squares, NUM_SQUARES: gl.constexpr,
    BLOCK_ROWS: gl.constexpr, BLOCK_COLUMNS: gl.constexpr, HAS_BIAS: gl.constexpr, GATED: gl.constexpr,
    ADDS: gl.constexpr, ROWS: gl.constexpr, OUTPUTS: gl.constexpr, STEP: gl.constexpr, SPLITS: gl.constexpr,
    STAGES: gl.constexpr, PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program OUTPUTS rows of the weight, or some steps of each; sums in float32. x and weight are tensor
    descriptors; what of a tile does not exist is read as zeros.

    The product is computed transposed, out.T = weight @ x.T: the matrix units take 64 rows at a time of what
    stands left, and that is the weight. SPLITS programs that share a tile add up their sums for some of the
    rows each, in the same order always.

    BLOCK_ROWS > 0: the weight is FP8, and so many rows of it have a scale in common, of BLOCK_COLUMNS inputs
    or, if that is 0, all of them. It becomes 16 bits wide in registers, exactly; scales are applied to sums.

    GATED: the weight's first half is gate and its second half up, and the result is silu(gate) * up: a tile
    has OUTPUTS / 2 rows of gate and then the same ones of up.

    NUM_SQUARES > 0: x is what a norm's weight was multiplied to, and `squares` has the sums of squares of
    `num_squares` parts of each row from before that: the norm's other factor is applied to the result. ADDS:
    the result is added to `out`; stored are also the sum times next_norm, and the sums of squares of OUTPUTS
    columns.
    """
    start_next(PDL)
    dtype: gl.constexpr = x.dtype
    tile = gl.program_id(0)
    split = gl.program_id(1)
    begin = split * steps_of_split
    num_steps = gl.minimum(steps_of_split, gl.cdiv(size_in, STEP) - begin)
    half = size_out // 2
    first = tile * (OUTPUTS // 2 if GATED else OUTPUTS)
    weights = gl.allocate_shared_memory(weight.dtype, [STAGES, OUTPUTS, STEP], weight.layout)
    inputs = gl.allocate_shared_memory(dtype, [STAGES, ROWS, STEP], x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for early in gl.static_range(STAGES):
        mbarrier.init(ready.index(early), count=1)
    for early in gl.static_range(STAGES):
        _ask_for_weight(
            weight, weights.index(early), ready.index(early), inputs.index(early), first, half,
            (begin + early) * STEP, early < num_steps, GATED,
        )  # fmt: skip
    # What the end of this program will be about: the tile's outputs, and rows of its own.
    PART: gl.constexpr = ROWS // SPLITS
    OUT: gl.constexpr = _layout(OUTPUTS, PART, num_warps)
    output = _outputs(first, half, size_out, GATED, OUTPUTS, OUT)
    row = split * PART + gl.arange(0, PART, gl.SliceLayout(0, OUT))
    is_real = (output < size_out)[:, None] & (row < num_rows)[None, :]
    target = row[None, :] * size_out + output[:, None]
    if ADDS:
        scale = gl.load(next_norm + output, mask=output < size_out, other=0.0)
    if HAS_BIAS:
        added = gl.load(bias + output, mask=output < size_out, other=0.0)
    if BLOCK_ROWS > 0 and BLOCK_COLUMNS == 0:
        scale_of_row = gl.load(scales + output // BLOCK_ROWS, mask=output < size_out, other=0.0)
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, ROWS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    INPUTS: gl.constexpr = _inputs_of_sum(STEP, BLOCK_ROWS, BLOCK_COLUMNS)
    if BLOCK_COLUMNS > 0:
        of_sum = _outputs(first, half, size_out, GATED, OUTPUTS, PRODUCT)
        coming_scale = _scale(scales, of_sum, begin * STEP, size_in, size_out, BLOCK_ROWS, BLOCK_COLUMNS)
    wait(PDL)
    for early in gl.static_range(STAGES):
        _ask_for_input(x, inputs.index(early), ready.index(early), (begin + early) * STEP, early < num_steps)
    if ADDS:
        before = gl.load(out + target, mask=is_real, other=0.0)
    if NUM_SQUARES > 0:
        wide: gl.constexpr = min(PART, 32)
        SQUARES: gl.constexpr = gl.BlockedLayout([1, 1], [32 // wide, wide], [num_warps, 1], [1, 0])
        which = gl.arange(0, NUM_SQUARES, gl.SliceLayout(1, SQUARES))[:, None]
        of_row = split * PART + gl.arange(0, PART, gl.SliceLayout(0, SQUARES))[None, :]
        has_square = (which < num_squares) & (of_row < num_rows)
        square = gl.load(squares + which * num_rows + of_row, mask=has_square, other=0.0)

    product = warpgroup_mma_init(gl.zeros([OUTPUTS, ROWS], gl.float32, PRODUCT))
    total = gl.zeros([OUTPUTS, ROWS], gl.float32, PRODUCT)
    for step in range(num_steps):
        slot = step % STAGES
        mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
        for part in gl.static_range(STEP // INPUTS):
            left = weights.index(slot).slice(part * INPUTS, INPUTS, dim=1)
            right = inputs.index(slot).slice(part * INPUTS, INPUTS, dim=1).permute((1, 0))
            if BLOCK_ROWS > 0:
                left = _widened(left.load(LEFT), dtype)
            else:
                product = warpgroup_mma_wait(0, deps=[product])
            if part == 0 and step > 0:  # what the last step was computed from is free
                coming = step - 1 + STAGES
                free = coming % STAGES
                column = (begin + coming) * STEP
                _ask_for_weight(
                    weight, weights.index(free), ready.index(free), inputs.index(free), first, half, column,
                    coming < num_steps, GATED,
                )  # fmt: skip
                _ask_for_input(x, inputs.index(free), ready.index(free), column, coming < num_steps)
            if BLOCK_ROWS == 0:
                product = warpgroup_mma(left, right, product, is_async=True)
            elif BLOCK_COLUMNS == 0:
                total = warpgroup_mma(left, right, total)
            else:
                sum_scale = coming_scale
                column = (begin + step) * STEP + (part + 1) * INPUTS
                coming_scale = _scale(scales, of_sum, column, size_in, size_out, BLOCK_ROWS, BLOCK_COLUMNS)
                nothing = gl.zeros([OUTPUTS, ROWS], gl.float32, PRODUCT)
                total += warpgroup_mma(left, right, nothing, use_acc=False) * sum_scale[:, None]
    if BLOCK_ROWS == 0:
        total = warpgroup_mma_wait(0, deps=[product])

    ALL: gl.constexpr = _layout(OUTPUTS, ROWS, num_warps)
    total = gl.convert_layout(total, ALL)
    if SPLITS > 1:
        of_all = _outputs(first, half, size_out, GATED, OUTPUTS, ALL)
        every = gl.arange(0, ROWS, gl.SliceLayout(0, ALL))
        place = every[None, :] * size_out + of_all[:, None]
        exists = (of_all < size_out)[:, None] & (every < num_rows)[None, :]
        gl.store(partial + split * (num_rows * size_out) + place, total, mask=exists)
        # All of the program's threads have written before one of them says so.
        tl.debug_barrier()
        arrived = gl.atomic_add(counts + 2 * tile, 1, sem="acq_rel") + 1
        while arrived < SPLITS:  # all programs are there at the same time: see `multiply_few`
            arrived = gl.atomic_add(counts + 2 * tile, 0, sem="acquire")
        total = gl.zeros([OUTPUTS, PART], gl.float32, OUT)
        for other in gl.static_range(SPLITS):
            source = partial + other * (num_rows * size_out) + target
            total += gl.load(source, mask=is_real, other=0.0, cache_modifier=".cg")
        if gl.atomic_add(counts + 2 * tile + 1, 1, sem="relaxed") == SPLITS - 1:
            gl.store(counts + 2 * tile, 0)  # for the next product
            gl.store(counts + 2 * tile + 1, 0)
    if BLOCK_ROWS > 0 and BLOCK_COLUMNS == 0:
        total *= scale_of_row[:, None]
    if NUM_SQUARES > 0:
        factor = gl.rsqrt(gl.sum(square, axis=0) / size_in + eps)
        total *= gl.convert_layout(factor, gl.SliceLayout(0, OUT))[None, :]
    if HAS_BIAS:
        total += added.to(gl.float32)[:, None]
    result = total.to(dtype)
    if GATED:
        HALF: gl.constexpr = _layout(OUTPUTS // 2, PART, num_warps)
        both = gl.allocate_shared_memory(
            dtype, [OUTPUTS, PART], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]), result
        )
        gate = both.slice(0, OUTPUTS // 2).load(HALF).to(gl.float32)
        up = both.slice(OUTPUTS // 2, OUTPUTS // 2).load(HALF).to(gl.float32)
        value = (gate / (1 + gl.exp(-gate)) * up).to(dtype)
        wanted = first + gl.arange(0, OUTPUTS // 2, gl.SliceLayout(1, HALF))
        of_half = split * PART + gl.arange(0, PART, gl.SliceLayout(0, HALF))
        is_wanted = (wanted < half)[:, None] & (of_half < num_rows)[None, :]
        gl.store(out + of_half[None, :] * half + wanted[:, None], value, mask=is_wanted)
    else:
        if ADDS:  # rounded as `kernels.add_norm` does it
            result = (before.to(gl.float32) + result.to(gl.float32)).to(dtype)
            exact = gl.where(is_real, result.to(gl.float32), 0.0)
            sums = gl.sum(exact * exact, axis=0)
            gl.store(next_squares + tile * num_rows + row, sums, mask=row < num_rows)
            gl.store(next_scaled + target, (exact * scale.to(gl.float32)[:, None]).to(dtype), mask=is_real)
        gl.store(out + target, result, mask=is_real)


@gluon.jit
def _outputs(first, half, size_out, GATED: gl.constexpr, OUTPUTS: gl.constexpr, LAYOUT: gl.constexpr):
    """The rows of the weight that a tile has; those that do not exist are size_out or more."""
    output = first + gl.arange(0, OUTPUTS, gl.SliceLayout(1, LAYOUT))
    if GATED:
        is_up = output >= first + OUTPUTS // 2
        output -= gl.where(is_up, OUTPUTS // 2, 0)
        output = gl.where(output < half, output + gl.where(is_up, half, 0), size_out)
    return output


@gluon.constexpr_function
def _inputs_of_sum(step: int, block_rows: int, block_columns: int) -> int:
    """How many inputs are summed up at a time: of FP8 no more than have a scale, or than registers hold."""
    if block_rows == 0:
        return step
    return min(step, 128, block_columns or step)


@gluon.jit
def _widened(values, dtype: gl.constexpr):
    """FP8 to 16 bits, exactly. By way of float32, which has fast instructions; what turns float16 to bfloat16
    at once does a quarter as many."""
    if dtype == gl.float16:
        return values.to(gl.float16)
    return values.to(gl.float16).to(gl.float32).to(dtype)


@gluon.jit
def _scale(scales, output, column, size_in, size_out, BLOCK_ROWS: gl.constexpr, BLOCK_COLUMNS: gl.constexpr):
    """The scales of these outputs for the block of inputs that this column is in."""
    per_row = gl.cdiv(size_in, BLOCK_COLUMNS)
    source = scales + output // BLOCK_ROWS * per_row + column // BLOCK_COLUMNS
    return gl.load(source, mask=(output < size_out) & (column < size_in), other=0.0)


@gluon.jit
def _ask_for_input(x, to, ready, column, exists):
    """A step of the input."""
    tma.async_copy_global_to_shared(x, [0, column], ready, to, pred=exists)


@gluon.jit
def _ask_for_weight(weight, to, ready, inputs, first, half, column, exists, GATED: gl.constexpr):
    """A step of the weight; `ready` waits for it and for the input that belongs to it."""
    num_bytes: gl.constexpr = (
        to.shape[0] * to.shape[1] * to.dtype.primitive_bitwidth // 8 + 2 * inputs.shape[0] * inputs.shape[1]
    )
    mbarrier.expect(ready, num_bytes, pred=exists)
    if GATED:
        count: gl.constexpr = to.shape[0] // 2
        tma.async_copy_global_to_shared(weight, [first, column], ready, to.slice(0, count), pred=exists)
        tma.async_copy_global_to_shared(
            weight, [half + first, column], ready, to.slice(count, count), pred=exists
        )
    else:
        tma.async_copy_global_to_shared(weight, [first, column], ready, to, pred=exists)


def multiply_few(
    x: Tensor | Normed,
    weight: Tensor | Fp8Weight,
    bias: Tensor | None,
    rule: FewRows,
    gated: bool,
    target: Normed | None,
) -> Tensor:
    """See `skinny_kernel.multiply`. target: its x is what the product is added to; the rest is filled in."""
    squares = x.squares if isinstance(x, Normed) else None
    eps = x.eps if isinstance(x, Normed) else 0.0
    if isinstance(x, Normed):
        assert x.scaled is not None
        x = x.scaled
    scales, block = x, (0, 0)
    if isinstance(weight, Fp8Weight):
        scales, block = weight.scales, weight.block
        weight = weight.values
        assert scales.is_contiguous()
    assert x.is_contiguous()
    assert weight.is_contiguous()
    size_out, size_in = weight.shape
    num_rows = len(x)
    rows = padded(num_rows)
    assert rows % rule.splits == 0, (rule, num_rows)
    num_tiles = triton.cdiv(size_out, rule.outputs)
    steps_of_split = triton.cdiv(triton.cdiv(size_in, rule.step), rule.splits)
    if target is None:
        out = torch.empty(num_rows, size_out // 2 if gated else size_out, dtype=x.dtype, device=x.device)
        next_norm = next_scaled = next_squares = out
    else:
        assert target.x.shape == (num_rows, size_out)
        out, next_norm, next_scaled = target.x, target.weight, torch.empty_like(target.x)
        next_squares = torch.empty(num_tiles, num_rows, dtype=torch.float32, device=x.device)
        target.scaled, target.squares = next_scaled, next_squares
    partial = counts = x
    if rule.splits > 1:
        # Programs wait for each other, which ends only if a GPU holds them all at the same time: there are no
        # more than its processors have room for, and one stream alone has such products.
        assert num_tiles * rule.splits <= rule.share * num_processors(x.device), (rule, size_out)
        assert rule.stages <= most_stages(rule.stage_bytes(num_rows, weight.element_size()), rule.share), rule
        partial = torch.empty(rule.splits, num_rows, size_out, dtype=torch.float32, device=x.device)
        counts = counters(x.device)
    _few_rows[(num_tiles, rule.splits)](
        _blocks(x, rows, rule.step),
        _blocks(weight, rule.outputs // 2 if gated else rule.outputs, rule.step),
        scales,
        x if squares is None else squares,
        x if bias is None else bias,
        out,
        next_norm,
        next_scaled,
        next_squares,
        partial,
        counts,
        eps,
        num_rows,
        size_in,
        size_out,
        steps_of_split,
        0 if squares is None else len(squares),
        NUM_SQUARES=0 if squares is None else triton.next_power_of_2(len(squares)),
        BLOCK_ROWS=block[0],
        BLOCK_COLUMNS=block[1] if block[1] < size_in else 0,
        HAS_BIAS=bias is not None,
        GATED=gated,
        ADDS=target is not None,
        ROWS=rows,
        OUTPUTS=rule.outputs,
        STEP=rule.step,
        SPLITS=rule.splits,
        STAGES=rule.stages,
        num_warps=rule.warps,
        **({"maxnreg": _REGISTERS // (32 * rule.warps * rule.share) // 8 * 8} if rule.share > 1 else {}),
        **pdl.options(),
    )
    return out


def _blocks(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A matrix as the copies take it, rows x columns at a time."""
    size = tensor.element_size()
    layout = gl.NVMMASharedLayout(min(128, size * columns), element_bitwidth=8 * size, rank=2)
    return TensorDescriptor.from_tensor(tensor, [rows, columns], layout)
