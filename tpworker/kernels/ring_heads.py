"""The heads of new tokens for `ring_kernel`: queries, keys and values of a product, normed and rotated.

In Gluon. Imports Triton: import it on CUDA only.
"""

# Triton has no types, and is not installed where there is no GPU.
# mypy: disable-error-code="import-not-found, import-untyped, untyped-decorator, no-untyped-def"
# mypy: disable-error-code="no-untyped-call"
# Tuples grow in loops that are unrolled.
# mypy: disable-error-code="assignment, misc, unreachable, var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tpworker.kernels.pdl import wait


@gluon.jit
def to_row(
    row, NUM_HEADS: gl.constexpr, TOKENS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr
):  # fmt: skip
    """How far a row of queries is behind the first one, where a token has NUM_HEADS heads."""
    if TOKENS == 1:
        return row * HEAD_DIM
    return (row // GROUP * NUM_HEADS + row % GROUP) * HEAD_DIM


@gluon.jit
def new_heads(
    heads, query_norm, key_norm, cos, sin, eps, sequence, first, num_rows, kv_head, row, column,
    HAS_NORM: gl.constexpr, ROTARY_DIM: gl.constexpr, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr, TOKENS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Of the product: query heads [ROWS, HEAD_DIM] of the new tokens from `first` on, and of all new tokens a
    key and a value [HEAD_DIM] each, normed and rotated. Waits.
    """
    dtype: gl.constexpr = heads.dtype.element_ty
    num_heads: gl.constexpr = (GROUP + 2) * NUM_KV_HEADS
    rotated = column < ROTARY_DIM
    is_real = (row < num_rows)[:, None]
    cosines, sines = (), ()
    for token in gl.static_range(WIDTH):
        angle = (sequence * WIDTH + token) * ROTARY_DIM + column
        cosines += (gl.load(cos + angle, mask=rotated, other=1.0),)
        sines += (gl.load(sin + angle, mask=rotated, other=0.0),)
    if WIDTH == 1:
        query_cosine, query_sine = cosines[0][None, :], sines[0][None, :]
    else:
        angle = (sequence * WIDTH + first + row // GROUP)[:, None] * ROTARY_DIM + column[None, :]
        turns = is_real & rotated[None, :]
        query_cosine = gl.load(cos + angle, mask=turns, other=1.0)
        query_sine = gl.load(sin + angle, mask=turns, other=0.0)
    # The column that each column turns with.
    partner = gl.where(rotated, (column + ROTARY_DIM // 2) % ROTARY_DIM, column)
    if ROTARY_DIM % 16 == 0:
        partner = gl.max_contiguous(gl.multiple_of(partner, 8), 8)
    if HAS_NORM:
        query_weight = gl.load(query_norm + column).to(gl.float32)
        query_partner_weight = gl.load(query_norm + partner).to(gl.float32)
        key_weight = gl.load(key_norm + column).to(gl.float32)
        key_partner_weight = gl.load(key_norm + partner).to(gl.float32)
    in_query = to_row(row, num_heads, TOKENS, GROUP, HEAD_DIM)[:, None]
    from_query = heads + ((sequence * WIDTH + first) * num_heads + kv_head * GROUP) * HEAD_DIM
    from_key = from_query + (GROUP * (NUM_KV_HEADS - kv_head) + kv_head - first * num_heads) * HEAD_DIM
    wait(PDL)
    query = gl.load(from_query + (in_query + column[None, :]), mask=is_real, other=0.0)
    query_partner = gl.load(from_query + (in_query + partner[None, :]), mask=is_real, other=0.0)
    plain_keys, key_partners, new_values = (), (), ()
    for token in gl.static_range(WIDTH):
        from_token = from_key + token * (num_heads * HEAD_DIM)
        plain_keys += (gl.load(from_token + column),)
        key_partners += (gl.load(from_token + partner),)
        new_values += (gl.load(from_token + (NUM_KV_HEADS * HEAD_DIM + column)),)
    query, query_partner = query.to(gl.float32), query_partner.to(gl.float32)
    if HAS_NORM:
        inverse = gl.rsqrt(gl.sum(query * query, axis=1) / HEAD_DIM + eps)[:, None]
        query = (query * inverse * query_weight[None, :]).to(dtype).to(gl.float32)
        query_partner = (query_partner * inverse * query_partner_weight[None, :]).to(dtype).to(gl.float32)
    query = query * query_cosine + query_partner * query_sine
    new_keys = ()
    for token in gl.static_range(WIDTH):
        key, key_partner = plain_keys[token].to(gl.float32), key_partners[token].to(gl.float32)
        if HAS_NORM:
            inverse_of_key = gl.rsqrt(gl.sum(key * key, axis=0) / HEAD_DIM + eps)
            key = (key * inverse_of_key * key_weight).to(dtype).to(gl.float32)
            key_partner = (key_partner * inverse_of_key * key_partner_weight).to(dtype).to(gl.float32)
        new_keys += ((key * cosines[token] + key_partner * sines[token]).to(dtype),)
    return query.to(dtype), new_keys, new_values
