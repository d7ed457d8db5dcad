"""Paged attention for decode steps on any CUDA GPU: one kernel of our own a layer.

Each sequence is cut into as many parts as fill the GPU, and the part that is done last puts them together
within the same kernel. FlashAttention 3 takes two kernels and 10 µs a layer, however short the sequences, and
with few query heads a key-value head it is behind at large batches, too. One H200, contexts of 650 tokens, µs
a layer, split / FlashAttention 3: Qwen3-0.6B (16 heads on 8), batch 1: 6.7 / 9.3, 16: 19 / 20, 64: 51 / 63,
256: 178 / 250; Qwen3-8B (32 on 8), batch 1: 7.9 / 9.9, 16: 21 / 20, 64: 47 / 64. At 64 x 2300 tokens:
157 / 156 and 141 / 156. The norms, rotation and storage of heads included, batch 16, in one kernel / in two
with FlashAttention 3: 17.8 / 21.6 and 18.0 / 22.6; Qwen3-8B at TP 2: 13.4 / 15.9. Batches with chunks of
prompts go to another backend.

Lengths and block tables are read on the device; it can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tpworker.model.batch import Batch

if TYPE_CHECKING:
    from tpworker.model.attention import Attention

_TILE = 64  # tokens that a program takes at a time, and the shortest part
_SHORT_TILE = 32  # the same for few query heads a key-value head and long parts: 51 instead of 59 µs
_MAX_PARTS = 32
_MAX_SUMS = 16384  # elements that the last part has in registers when it puts the parts together
_PROGRAMS_PER_PROCESSOR = 3
_MOST_FUSED = 4
"""Programs a processor up to which heads are normed, rotated and stored by the kernel that attends. Each
begins with that, and with more of them it costs more than a kernel (256 sequences: 0.7 ms of 6.3 a step)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How the work of a layer is cut."""

    num_parts: int  # of each sequence, at most
    tile: int  # tokens that a program takes at a time, and the shortest part
    warps: int = 4
    stages: int = 3  # tiles that are on their way
    early: bool = True  # where heads are stored by the same kernel, their first tile is loaded before


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What it takes to norm, rotate and store heads; see `kernels.norm_rotate_store`."""

    norms: tuple[Tensor, Tensor] | None  # of queries and keys, [head_dim] each
    eps: float
    cos: Tensor  # float32 [S, 1, rotary_dim]
    sin: Tensor
    rows: Tensor  # int64 [S], of the cache


@dataclass(frozen=True, slots=True)
class _SplitPlan:
    block_tables: Tensor  # int32 [S, W]
    lengths: Tensor  # int32 [S]
    cut: Cut
    partial: tuple[Tensor, Tensor, Tensor, Tensor]
    """Of each pair of sequence and key-value head: float32 sums [S K, parts, H / K, head_dim], maxima and
    totals [S K, parts, H / K], and int32 [S K], how many parts are done."""


class SplitAttention:
    """See the module.

    Args:
        num_heads, num_kv_heads: query heads and key-value heads of this rank.
        head_dim: size of a head; scores are scaled by its square root.
        others: the backend of batches with chunks of prompts.
        num_processors: of the GPU.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        others: Attention,
        num_processors: int,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.others = others
        self._num_processors = num_processors

    @property
    def reads_lengths(self) -> bool:
        """See `Attention`."""
        return self.others.reads_lengths

    def prepare(self, batch: Batch, block_size: int) -> Any:
        """See `Attention`."""
        count = len(batch.lengths)
        if batch.num_decodes < count:
            return self.others.prepare(batch, block_size)
        cut = self.choose_cut(count, batch.block_tables.shape[1] * block_size)
        pairs, group = count * self.num_kv_heads, self.num_heads // self.num_kv_heads
        device = batch.lengths.device
        sums = torch.empty(pairs, cut.num_parts, group, self.head_dim, device=device)
        maxima, totals = torch.empty(2, pairs, cut.num_parts, group, device=device)
        arrived = torch.zeros(pairs, dtype=torch.int32, device=device)
        return _SplitPlan(batch.block_tables, batch.lengths, cut, (sums, maxima, totals, arrived))

    def choose_cut(self, count: int, longest: int) -> Cut:
        """For `count` sequences of at most `longest` tokens."""
        most = min(_MAX_PARTS, self.most_parts(), -(-longest // _TILE))
        wanted = round(_PROGRAMS_PER_PROCESSOR * self._num_processors / (count * self.num_kv_heads))
        if wanted == 3 and most > 1 and count <= 16:
            # Two of twice the warps instead: 18.0 and not 19.7 µs (Qwen3-8B, 16 x 650).
            return Cut(2, _TILE, warps=8, stages=5)
        num_parts = max(1, min(wanted, most))
        if self.num_heads // self.num_kv_heads < 4 and num_parts <= 2:
            return Cut(num_parts, _SHORT_TILE)
        # A tile that is loaded early takes registers: then three programs fit a processor, and not four.
        programs = count * self.num_kv_heads * num_parts
        return Cut(num_parts, _TILE, early=programs <= 3 * self._num_processors)

    def most_parts(self) -> int:
        """More do not fit into the registers of the program that puts them together."""
        group = self.num_heads // self.num_kv_heads
        return max(1, _MAX_SUMS // (_power_of_2(group) * _power_of_2(self.head_dim)))

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, plan: Any) -> Tensor:
        """See `Attention`."""
        if not isinstance(plan, _SplitPlan):
            return self.others(queries, keys, values, plan)
        return self._attend(queries, keys, values, plan, None)

    def store_and_attend(
        self, heads: Tensor, keys: Tensor, values: Tensor, plan: Any, tokens: NewTokens
    ) -> Tensor | None:
        """Norm, rotate and store the newest tokens, and attend, in one kernel: heads [S, H + 2 K, head_dim].

        Returns:
            As `__call__`; None if a kernel each must do it.
        """
        if not isinstance(plan, _SplitPlan):
            return None
        if len(heads) * self.num_kv_heads * plan.cut.num_parts > _MOST_FUSED * self._num_processors:
            return None
        return self._attend(heads, keys, values, plan, tokens)

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, plan: _SplitPlan, tokens: NewTokens | None
    ) -> Tensor:
        from tpworker.model.attention.split_kernel import attend

        tables, lengths, partial = plan.block_tables, plan.lengths, plan.partial
        return attend(queries, keys, values, tables, lengths, partial, plan.cut, tokens).flatten(1)


def _power_of_2(value: int) -> int:
    """The smallest that is not below `value`."""
    return 1 << (value - 1).bit_length()
