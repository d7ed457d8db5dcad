"""Which experts a token goes to, on CUDA. Imports Triton: import it on CUDA only.

`route` does what the function of this name in `tpworker.model.moe` does, in two kernels that start early:

    _router_logits  the router's product, the hidden size cut into parts, so that all processors take part
    _choose         adds the parts up and picks a token's experts, one warp a token

Nothing is asked of the host, so both can be captured in a CUDA graph.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpworker.kernels import pdl
from tpworker.kernels.operands import Routing


@triton.jit(do_not_specialize=["num_tokens"])
def _router_logits(
    x, gate, partial, num_tokens, SIZE: tl.constexpr, EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program TOKENS tokens, BLOCK experts and STEPS times STEP of the hidden size."""
    pdl.start_next(PDL)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(2)
    token_exists = (token < num_tokens)[:, None]
    expert_exists = (expert < EXPERTS)[None, :]
    rows = x + token.to(tl.int64)[:, None] * SIZE
    weights = gate + expert[None, :] * SIZE
    column = part * (STEP * STEPS) + tl.arange(0, STEP)
    if STEPS == 1:  # the weight is there before the kernel that makes x has ended
        inside = column < SIZE
        weight = tl.load(weights + column[:, None], mask=expert_exists & inside[:, None], other=0.0)
        pdl.wait(PDL)
        value = tl.load(rows + column[None, :], mask=token_exists & inside[None, :], other=0.0)
        total = _add_logits(value, weight, tl.zeros([TOKENS, BLOCK], tl.float32))
    else:
        pdl.wait(PDL)
        total = tl.zeros([TOKENS, BLOCK], tl.float32)
        for _ in range(STEPS):
            inside = column < SIZE
            weight = tl.load(weights + column[:, None], mask=expert_exists & inside[:, None], other=0.0)
            value = tl.load(rows + column[None, :], mask=token_exists & inside[None, :], other=0.0)
            total = _add_logits(value, weight, total)
            column += STEP
    out = partial + (part * num_tokens + token[:, None]) * EXPERTS + expert[None, :]
    tl.store(out, total, mask=token_exists & expert_exists)


@triton.jit
def _add_logits(value, weight, total):
    """total + value @ weight, as exact as in float32, which the weight may be beside bfloat16 values."""
    if weight.dtype == tl.float32 and value.dtype == tl.bfloat16:
        # 24 bits are three times the 8 of bfloat16, whose products the matrix unit does not round.
        high = weight.to(tl.bfloat16)
        weight -= high.to(tl.float32)
        middle = weight.to(tl.bfloat16)
        low = (weight - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(value, low, total)
        total = tl.dot(value, middle, total)
        total = tl.dot(value, high, total)
    else:
        total = tl.dot(value.to(weight.dtype), weight, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _choose(
    partial, bias, ids, weights, num_tokens, norm_min, scale,
    EXPERTS: tl.constexpr, PARTS: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program, a single warp, a token: takes the best expert of those left, CHOSEN times.

    (Finding each expert's place by comparing all pairs was tried. Triton may compute a value twice when two
    layouts need it, and two sums need not come out alike: then places are no longer distinct.)
    """
    pdl.start_next(PDL)
    token = tl.program_id(0)
    expert = tl.arange(0, BLOCK)
    exists = expert < EXPERTS
    correction = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        correction = tl.load(bias + expert, mask=exists, other=0.0)
    pdl.wait(PDL)
    logits = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        logits += tl.load(partial + (part * num_tokens + token) * EXPERTS + expert, mask=exists, other=0.0)
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logits))
    else:
        logits = tl.where(exists, logits, float("-inf"))
        score = tl.exp(logits - tl.max(logits, axis=0))
        score = score / tl.sum(score, axis=0)
    # NaN comes last, but before what was taken (-inf): ids are valid and distinct whatever comes in.
    left = score + correction
    left = tl.where(left > -1e38, left, -1e38)
    left = tl.where(exists, left, float("-inf"))
    if GROUPS > 1:
        left = _best_groups(left, expert, EXPERTS // GROUPS, GROUPS, TOP_GROUPS)
    place = tl.full([BLOCK], -1, tl.int32)
    for turn in tl.static_range(CHOSEN):
        _, best = tl.max(left, axis=0, return_indices=True)  # of equal ones the first
        place = tl.where(expert == best, turn, place)
        left = tl.where(expert == best, float("-inf"), left)
    weight = tl.where(place >= 0, score, 0.0)
    if NORMALISE:
        weight = weight / tl.maximum(tl.sum(weight, axis=0), norm_min)
    out = token * (CHOSEN + SHARED)
    tl.store(ids + out + place, expert, mask=place >= 0)
    tl.store(weights + out + place, weight * scale, mask=place >= 0)
    if SHARED > 0:
        tl.store(ids + out + CHOSEN + expert, EXPERTS + expert, mask=expert < SHARED)
        tl.store(weights + out + CHOSEN + expert, tl.full([BLOCK], 1.0, tl.float32), mask=expert < SHARED)


@triton.jit
def _best_groups(ranked, expert, SIZE: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr):
    """-1e38 for experts outside of the groups of SIZE whose two best experts together have most."""
    of_group = tl.full(ranked.shape, float("-inf"), tl.float32)
    for group in tl.static_range(GROUPS):
        is_member = expert // SIZE == group
        first, where = tl.max(tl.where(is_member, ranked, float("-inf")), axis=0, return_indices=True)
        second = tl.max(tl.where(is_member & (expert != where), ranked, float("-inf")), axis=0)
        of_group = tl.where(is_member, first + second, of_group)
    kept = of_group != of_group  # none yet
    for _ in tl.static_range(TOP_GROUPS):
        _, best = tl.max(of_group, axis=0, return_indices=True)
        is_best = expert // SIZE == best // SIZE
        kept = kept | is_best
        of_group = tl.where(is_best, float("-inf"), of_group)
    return tl.where(kept | (ranked == float("-inf")), ranked, -1e38)


def route(x: Tensor, gate: Tensor, bias: Tensor | None, spec: Routing) -> tuple[Tensor, Tensor]:
    """See `moe.route`."""
    assert x.is_contiguous()
    assert gate.is_contiguous()
    num_tokens, size = x.shape
    chosen, shared = spec.experts_per_token, spec.num_shared
    is_wide = gate.dtype == torch.float32
    if is_wide and x.dtype != torch.bfloat16:  # without matrix units
        tokens, block, step, steps = 16, 16, 128, 1
    elif num_tokens <= 64:
        tokens, block, step, steps = 16, 32, 128 if is_wide else 256, 1
    elif num_tokens <= 256:
        tokens, block, step, steps = 64, 64, 128, 1
    else:
        tokens, block, step, steps = 64, 64, *((64, 8) if is_wide else (128, 4))
    num_parts = triton.cdiv(size, step * steps)
    partial = torch.empty(num_parts, num_tokens, spec.num_experts, dtype=torch.float32, device=x.device)
    ids = torch.empty(num_tokens, chosen + shared, dtype=torch.int32, device=x.device)
    weights = torch.empty(num_tokens, chosen + shared, dtype=torch.float32, device=x.device)
    _router_logits[(triton.cdiv(num_tokens, tokens), triton.cdiv(spec.num_experts, block), num_parts)](
        x,
        gate,
        partial,
        num_tokens,
        SIZE=size,
        EXPERTS=spec.num_experts,
        TOKENS=tokens,
        BLOCK=block,
        STEP=step,
        STEPS=steps,
        num_warps=4,
        **pdl.options(),
    )
    _choose[(num_tokens,)](
        partial,
        partial if bias is None else bias,
        ids,
        weights,
        num_tokens,
        spec.norm_min,
        spec.scale,
        EXPERTS=spec.num_experts,
        PARTS=num_parts,
        CHOSEN=chosen,
        SHARED=shared,
        SIGMOID=spec.score == "sigmoid",
        NORMALISE=spec.normalise,
        HAS_BIAS=bias is not None,
        GROUPS=spec.num_groups,
        TOP_GROUPS=spec.top_groups,
        BLOCK=triton.next_power_of_2(spec.num_experts),
        num_warps=1,
        **pdl.options(),
    )
    return ids, weights
