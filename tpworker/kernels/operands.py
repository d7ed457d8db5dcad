"""What kernels and the model hand to each other: operands that are not computed yet, and how work is cut.

Sums and norms are left to the products around them, so that they need no kernel of their own:

    x += W a; y = V RMSNorm(x)        the first product adds to x as it stores, the second norms as it reads

What cannot be done so is done one kernel after the other (`tensor_of` in model/composed_ops.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_SHORTEST_PART = 128  # tokens: more parts cost more to put together than they save


@dataclass(slots=True)
class Normed:
    """RMSNorm(x) * weight, not computed yet; x stays as it is until it is."""

    x: Tensor  # [T, D]
    weight: Tensor  # [D]
    eps: float
    scaled: Tensor | None = None  # [T, D], x * weight, rounded
    squares: Tensor | None = None  # float32 [n, T], each row's sum of squares in n parts; with `scaled`


@dataclass(frozen=True, slots=True)
class Gated:
    """silu(gate) * up, [T, F], not computed yet."""

    x: Tensor  # [T, 2 F], gate then up


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight in FP8 (E4M3): element [i, j] stands for values[i, j] * scales[i // rows, j // columns].

    A scale is a block's of `block` = (rows, columns): (1, in) where each output channel has one, (128, 128)
    where blocks have, and less where ranks' parts do not end with those: powers of two that divide both.
    """

    values: Tensor  # float8_e4m3fn [..., out, in]
    scales: Tensor  # float32 [..., ceil(out / rows), ceil(in / columns)]
    block: tuple[int, int]
    dtype: torch.dtype  # of what it is multiplied with, and of the product

    def of(self, number: int) -> Fp8Weight:
        """One of several."""
        return Fp8Weight(self.values[number], self.scales[number], self.block, self.dtype)

    def tensors(self) -> Iterator[Tensor]:
        """Both."""
        yield self.values
        yield self.scales


class Matrix(Protocol):
    """A weight [out, in] and its bias that can be multiplied with, in the layout that is fastest there."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor | Normed | Gated) -> Tensor:
        """[T, in] to [T, out]."""
        ...

    def gated(self, x: Tensor | Normed) -> Tensor | Gated:
        """silu(gate) * up, [T, F], of a product [T, 2 F], gate then up."""
        ...

    def add_to(self, residual: Tensor, x: Tensor | Gated, norm_weight: Tensor, eps: float) -> Normed | None:
        """See `Product.add_to`."""
        ...

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that it holds."""
        ...


Stack = Tensor | Fp8Weight | Sequence[Matrix]
"""Weights of all experts: [n, out, in], or a matrix for each."""


@dataclass(frozen=True, slots=True)
class Product:
    """A product that is not computed yet."""

    linear: Matrix
    x: Tensor | Gated  # [T, in]

    def add_to(self, residual: Tensor, weight: Tensor, eps: float) -> Normed | None:
        """Add it to residual [T, out], in place; None if a kernel each must do it, and nothing was done.

        Returns:
            The norm of the sum, with this weight.
        """
        return self.linear.add_to(residual, self.x, weight, eps)


@dataclass(frozen=True, slots=True)
class Cut:
    """How the work of a layer is cut."""

    num_parts: int  # of each sequence, at most
    warps: int  # of a program; each takes 16 tokens of a tile
    stages: int = 3  # tiles in shared memory, all but one of them on their way
    shortest: int = _SHORTEST_PART  # tokens of a part, if there are several
    turns: int = 1  # that the new tokens of a sequence are taken in


Partial = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of each pair of sequence and key-value head: float32 sums [S K, parts, q, head_dim], maxima and totals
[S K, parts, q], and int32 [S K], how many parts are done; q queries, H / K of each new token."""


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What it takes to norm, rotate and store heads; see `Operations.norm_rotate_store`."""

    norms: tuple[Tensor, Tensor] | None  # of queries and keys, [head_dim] each
    eps: float
    cos: Tensor  # float32 [T, 1, rotary_dim]
    sin: Tensor
    rows: Tensor  # int64 [T], of the cache


class Places(NamedTuple):
    """Where the T tokens of a step are in their sequences and in the cache. The same for all layers."""

    cos: Tensor  # float32 [T, 1, rotary_dim], rows of `rope_tables`
    sin: Tensor  # float32 [T, 1, rotary_dim]
    rows: Tensor  # int64 [T], block * block_size + offset in the block


GREEDY_BELOW = 1e-5  # a lower temperature is greedy: its quotients would overflow before they meant anything


@dataclass(slots=True)
class SamplingRows:
    """Sampling parameters on the device, one row a sampled token; empty what the mode does not need."""

    temperature: Tensor  # float32 [R]; below GREEDY_BELOW: greedy
    top_p: Tensor  # float32 [R], above 0; 1 or more: all
    top_k: Tensor  # int64 [R]; 0: all
    seed: Tensor  # int64 [R]
    position: Tensor  # int64 [R], of the token being sampled, in its sequence
    min_length: Tensor  # int64 [R], stop ids are suppressed while position < min_length
    stop_ids: Tensor  # int64 [R, K], -1: none
    log_min_p: Tensor  # float32 [R], at most 0; less likely than the likeliest by more: out; -inf: none

    def select(self, rows: Tensor) -> SamplingRows:
        """Some of the rows (int64 [n]), in that order; what is empty stays so."""
        columns = (getattr(self, field.name) for field in fields(self))
        return SamplingRows(*(column[rows] if len(column) else column for column in columns))


MOST_LOGPROBS = 20
"""The likeliest tokens that a logprob row tells of."""

LOGPROB_ROW = 1 + 2 * MOST_LOGPROBS
"""float32 values of a logprob row: the token's own, those of the likeliest, best first, and the ids of these
(exact below 2**24; -1 and a logprob of -inf: there is none)."""

PENALISED, MASKED, BIASED, WORDS_BARRED, GUIDED = 1, 2, 4, 8, 16
"""Bits of `LogitTables.uses`. GUIDED, with MASKED: each step takes the mask from the host, see
`HostMasks`."""

IN_PROMPT = 1 << 30
"""Added to a token's count where the prompt holds it."""


@dataclass(frozen=True, slots=True)
class LogitTables:
    """What changes logits before a token is chosen: N slots, the null slot the last; this rank's V tokens.

    A slot that uses none of it has 0 in `uses`, and whatever it is in the rest.
    """

    vocab_start: int  # token id of the first column of `counts`, and of bit 0 of `allowed`
    uses: Tensor  # int32 [N], bits: see PENALISED
    penalties: Tensor  # float32 [N, 3]: repetition (above 0; 1: none), presence, frequency (0: none)
    counts: Tensor  # int32 [N, V]: how often a token is in the output, and IN_PROMPT if it is in the prompt
    allowed: Tensor  # int32 [N, ceil(V / 32)]: bit i % 32 of word i // 32, whether column i may be chosen
    bias_ids: Tensor  # int32 [N, B], all different; -1: none
    bias: Tensor  # float32 [N, B]
    barred: Tensor  # int32 [N, W, L]: words of up to L tokens, filled up with -1 in front; all -1: none
    history: Tensor  # int32 [N, H], H a power of two above L: the token at position p of a sequence, at p % H


@dataclass(frozen=True, slots=True)
class HostMasks:
    """Masks that the host writes while a step runs, in memory that the device can read (ipc/masks.py)."""

    written: int  # address of an int64: of steps below it all masks are written
    rows: Tensor  # int32 [turns, slots, words], of the whole vocabulary; step N takes turn N % turns
    wait: Callable[[int], None]  # for the host: returns when a step's masks are written


NO_TOKEN = -(2**62)
"""In a row of the token ring: the slot did not get this one."""


@dataclass(frozen=True, slots=True)
class SlotState:
    """Where sequences stand: N slots, the null slot the last; at most k drafts a slot (k may be 0)."""

    last_token: Tensor  # int64 [N], the last token of the sequence, which no step has been fed yet
    position: Tensor  # int64 [N], where that stands: KV of so many tokens is computed
    end: Tensor  # int64 [N], the length at which the sequence ends
    most_drafts: Tensor  # int64 [N], how many may be made for it; 0 of the null slot
    drafts: Tensor  # int64 [N, k], guesses at the tokens behind the last one; -1: none, and none behind it
    history: (
        Tensor  # int32 [N, L], the token at each position up to `position`; L is 0 where none looks it up
    )
    block_table: Tensor  # int32 [N, B]; with drafts 0, the null block, beyond what is granted


class Routing(Protocol):
    """How a mixture's router chooses; `model.families.MoeSpec` says what each means."""

    @property
    def num_experts(self) -> int: ...
    @property
    def num_shared(self) -> int: ...
    @property
    def experts_per_token(self) -> int: ...
    @property
    def score(self) -> str: ...
    @property
    def normalise(self) -> bool: ...
    @property
    def norm_min(self) -> float: ...
    @property
    def scale(self) -> float: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def top_groups(self) -> int: ...
