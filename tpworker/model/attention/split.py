"""Paged attention for decode steps on any CUDA GPU: one kernel of our own a layer.

Each sequence is cut into as many parts as fill the GPU, and the part that is done last puts them together
within the same kernel. It takes little more time than the keys and values need: one H200, µs a layer, with
norms, rotation and storage of heads, beside their bytes at 4.3 TB/s and, where it was timed, FlashAttention 3
with a kernel before it; contexts of 650 tokens. Qwen3-0.6B (16 heads on 8), batch 1: 4.3 (0.6), 16: 13.2
(10), 64: 41 (40), 256: 157 (159; 222). Qwen3-8B (32 on 8), 16: 13.5 (10), 64: 42 (40; 64); at TP 2, 16: 8.3
(5), 64: 23 (20). GLM-4.5-Air at TP 2 (48 on 4), 4: 6.0 (1.2; 12.3), 64: 24 (20; 37). Batches with chunks of
prompts go to another backend.

Two kernels: `ring_kernel` for what is served, which also norms, rotates and stores the newest heads, and
`split_kernel` for the rest. Lengths and block tables are read on the device; both can be captured in a CUDA
graph. Of sequences with drafts, `ring_kernel` takes all new tokens at once while their queries are few, or in
two turns; for more of them FlashAttention 3 is better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tpworker.kernels.gluon import has_gluon
from tpworker.kernels.operands import Cut, NewTokens, Partial
from tpworker.model.batch import Batch

if TYPE_CHECKING:
    from tpworker.model.attention.backend import Attention

_MAX_PARTS = 32
_MAX_WIDE_PARTS = 16  # the same for more than 8 query heads a key-value head: there is more to put together
_WIDE = 2  # programs of four warps and three tiles of 64 tokens that a processor's shared memory holds
_NARROW = 4  # of two warps and tiles of 32
_RING_ROWS = 16  # queries of a sequence and key-value head that a program of `ring_kernel` takes
_MOST_TURNS = 2  # each reads keys and values again, though from the second-level cache


@dataclass(frozen=True, slots=True)
class _SplitPlan:
    block_tables: Tensor  # int32 [S, max_blocks]
    lengths: Tensor  # int32 [S]
    cut: Cut
    partial: Partial


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
        if batch.num_decodes < count or not self._takes(batch.width, block_size):
            return self.others.prepare(batch, block_size)
        cut = self.choose_cut(count, batch.block_tables.shape[1] * block_size, batch.width)
        # `ring_kernel` takes tokens of a sequence together, `split_kernel` each for itself: as many rows, and
        # one more where turns are not alike.
        width = -(-batch.width // cut.turns) * cut.turns
        pairs, group = count * width * self.num_kv_heads, self.num_heads // self.num_kv_heads
        device = batch.lengths.device
        sums = torch.empty(pairs, cut.num_parts, group, self.head_dim, device=device)
        maxima, totals = (torch.empty(pairs, cut.num_parts, group, device=device) for _ in range(2))
        # This kernel is launched plainly, between what makes lengths and tables and the first layer. Without
        # it, kernels that start early could not read these before they wait.
        arrived = torch.zeros(pairs, dtype=torch.int32, device=device)
        return _SplitPlan(batch.block_tables, batch.lengths, cut, (sums, maxima, totals, arrived))

    def choose_cut(self, count: int, longest: int, width: int = 1) -> Cut:
        """For `count` sequences of at most `longest` tokens, `width` of them new."""
        turns = self._turns(width)
        pairs = count * turns * self.num_kv_heads
        is_wide_group = self.num_heads * -(-width // turns) > 8 * self.num_kv_heads
        wide = _WIDE * self._num_processors // pairs
        narrow = _NARROW * self._num_processors // pairs
        if not wide or (2 < narrow < 6 and not is_wide_group):
            # A whole step of Qwen3-0.6B with 16 requests, narrow and wide: 0.896 and 0.924 ms.
            cut = Cut(max(narrow, 1), warps=2)
        else:
            cut = Cut(min(wide, _MAX_WIDE_PARTS if is_wide_group else _MAX_PARTS), warps=4)
        most = max(1, -(-longest // cut.shortest))
        return replace(cut, num_parts=min(cut.num_parts, most), turns=turns)

    def _turns(self, width: int) -> int:
        """That `ring_kernel` takes so many new tokens in."""
        tokens = max(1, _RING_ROWS * self.num_kv_heads // self.num_heads)
        return -(-width // tokens)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, plan: Any) -> Tensor:
        """See `Attention`."""
        if not isinstance(plan, _SplitPlan):
            return self.others(queries, keys, values, plan)
        from tpworker.kernels import split_kernel

        tables, lengths, partial, cut = plan.block_tables, plan.lengths, plan.partial, plan.cut
        return split_kernel.attend(queries, keys, values, tables, lengths, partial, cut.num_parts).flatten(1)

    def store_and_attend(
        self, heads: Tensor, keys: Tensor, values: Tensor, plan: Any, tokens: NewTokens
    ) -> Tensor | None:
        """Norm, rotate and store the newest tokens, and attend, in one kernel: heads [T, H + 2 K, head_dim].

        Returns:
            As `__call__`; None if a kernel each must do it.
        """
        if not isinstance(plan, _SplitPlan) or not self._takes_ring(keys, len(heads) // len(plan.lengths)):
            return None
        from tpworker.kernels import ring_kernel

        tables, lengths, partial, cut = plan.block_tables, plan.lengths, plan.partial, plan.cut
        return ring_kernel.attend(heads, keys, values, tables, lengths, partial, cut, tokens).flatten(1)

    def _takes(self, width: int, block_size: int) -> bool:
        """Whether decoding sequences of so many new tokens each are for the kernels here."""
        # One that cannot be captured is no alternative.
        return width == 1 or self.others.reads_lengths or self._fits_ring(width, block_size)

    def _takes_ring(self, keys: Tensor, width: int) -> bool:
        """Whether `ring_kernel` takes this cache."""
        return (
            keys.dtype in (torch.bfloat16, torch.float16)
            and torch.cuda.get_device_capability(keys.device) >= (8, 0)
            and self._fits_ring(width, keys.shape[1])
        )

    def _fits_ring(self, width: int, block_size: int) -> bool:
        """Whether it takes such heads and blocks, where it takes the type and the GPU."""
        return (
            self.head_dim in (64, 128)
            and self.num_heads <= _RING_ROWS * self.num_kv_heads
            and self._turns(width) <= _MOST_TURNS
            and block_size % 16 == 0
            and has_gluon("tpworker.kernels.ring_kernel")
        )
