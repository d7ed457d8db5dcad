"""Paged attention in plain torch: what the CPU uses, and the reference for the kernels of other devices.

It reads lengths on the host, so it cannot be captured in a CUDA graph.

Decoding sequences are taken in groups of similar length, so that little is padded and a group's gathered
keys stay in a core's cache. Per group and layer: gather the keys, scores, softmax, and the weighted sum of
values as an `embedding_bag`, which reads the values where they are. A prompt's chunk goes through torch's
fused attention, one sequence at a time, but where scores are capped. With a window, what no token of the step
sees is not gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tpworker.model.attention.backend import Scores
from tpworker.model.batch import Batch
from tpworker.model.kv_cache import FP8, take

_GROUP_BYTES = 1024 * 1024  # of a group's gathered keys: about what a core's second-level cache holds
_SCORES = 1 << 21  # of capped chunks, so many at a time
_ALIGNMENT = 16  # gathered lengths are multiples of it: no odd tail for vector units


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Tokens s of decoding sequences that see about as many positions, with L gathered ones each."""

    rows: slice  # of the ordered queries
    keys: Tensor  # int64 [s * K * L], rows of the cache seen as [blocks * block_size * K, head_dim]
    values: Tensor  # int64 [s * H, L], the same for each query head
    mask: Tensor  # float32 [s * K, 1, L], 0 or -inf


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive tokens q of one sequence, of which they see the last L positions."""

    rows: slice  # of the queries
    slots: Tensor  # int64 [L], rows of the cache seen as [blocks * block_size, K, head_dim]
    mask: Tensor | None  # [q, L], 0 or -inf; None: the whole sequence is in the chunk, plainly causal


@dataclass(frozen=True, slots=True)
class _Plan:
    num_rows: int  # of decoding sequences
    order: Tensor | None  # int64 [num_rows], these by what they see; None: as they are
    groups: list[_DecodeGroup]
    chunks: list[_Chunk]


class PagedAttention:
    """See the module. Scores and softmax are float32 for decoding sequences.

    Args:
        num_heads, num_kv_heads: query heads H and key-value heads K of this rank; H is a multiple of K.
        head_dim: size of a head.
        dtype: of queries, and of keys and values unless these are in FP8.
        scores: None: plain ones.
    """

    reads_lengths = True

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        scores: Scores | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.scores = scores or Scores.plain(head_dim)

    def prepare(self, batch: Batch, block_size: int) -> _Plan:
        """Group the decoding sequences and find where everything lies. Reads lengths on the host."""
        # A sequence of length 0 only pads the batch. One that decodes attends to the null block and harms
        # nobody; a chunk is left out.
        real_lengths: list[int] = batch.lengths.tolist()
        starts: list[int] = batch.query_starts.tolist()
        num_decodes, width = batch.num_decodes, batch.width
        # Each token of a decoding sequence is taken for the last one of a sequence of its own.
        ends = range(1 - width, 1)
        lengths = [max(1, length + end) for length in real_lengths[:num_decodes] for end in ends]
        tables = batch.block_tables[:num_decodes].to(torch.int64).repeat_interleave(width, dim=0)
        seen = [self._seen(length, 1) for length in lengths]
        order = sorted(range(len(seen)), key=lambda row: seen[row])
        in_order = order == list(range(len(seen)))
        order_tensor = None if in_order else torch.tensor(order, device=batch.lengths.device)
        if order_tensor is not None:
            tables = tables.index_select(0, order_tensor)
        groups = [
            self._decode_group(
                rows,
                tables[rows],
                [lengths[row] for row in order[rows]],
                [seen[row] for row in order[rows]],
                block_size,
            )
            for rows in self._partition([seen[row] for row in order])
        ]
        chunks = [
            self._chunk(batch.block_tables[s], slice(starts[s], starts[s + 1]), real_lengths[s], block_size)
            for s in range(num_decodes, len(real_lengths))
            if real_lengths[s] and starts[s + 1] > starts[s]
        ]
        return _Plan(len(seen), order_tensor, groups, chunks)

    def _seen(self, length: int, num_queries: int) -> int:
        """So many of the last positions the last `num_queries` tokens of a sequence see."""
        window = self.scores.window
        return length if window is None else min(length, window + num_queries - 1)

    def _partition(self, lengths: list[int]) -> list[slice]:
        """Cut ascending lengths into runs that pad to at most twice their length and fit in the cache."""
        token_bytes = self.num_kv_heads * self.head_dim * self.dtype.itemsize
        runs: list[slice] = []
        start = 0
        for end in range(1, len(lengths) + 1):
            if end == len(lengths) or (
                lengths[end] > 2 * lengths[start] + _ALIGNMENT
                or (end + 1 - start) * lengths[end] * token_bytes > _GROUP_BYTES
            ):
                runs.append(slice(start, end))
                start = end
        return runs

    def _decode_group(
        self, rows: slice, tables: Tensor, lengths: list[int], seen: list[int], block_size: int
    ) -> _DecodeGroup:
        device = tables.device
        longest = -(-max(seen) // _ALIGNMENT) * _ALIGNMENT
        number = torch.arange(longest, device=device)
        starts = [length - count for length, count in zip(lengths, seen, strict=True)]
        position = torch.tensor(starts, device=device)[:, None] + number  # [s, L]
        columns = (position // block_size).clamp_(max=tables.shape[1] - 1)
        slots = tables.gather(1, columns) * block_size + position % block_size
        is_padding = number >= torch.tensor(seen, device=device)[:, None]
        # Padding reads a token that the sequence sees: another's value could be NaN, and 0 * NaN is NaN.
        slots = torch.where(is_padding, slots[:, :1], slots)
        heads = torch.arange(self.num_kv_heads, device=device)[None, :, None]
        keys = slots[:, None, :] * self.num_kv_heads + heads  # [s, K, L]
        values = keys.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        mask = torch.zeros(is_padding.shape, device=device).masked_fill_(is_padding, float("-inf"))
        return _DecodeGroup(
            rows=rows,
            keys=keys.flatten(),
            values=values.flatten(0, 1),
            mask=mask.repeat_interleave(self.num_kv_heads, dim=0)[:, None, :],
        )

    def _chunk(self, table: Tensor, rows: slice, length: int, block_size: int) -> _Chunk:
        num_queries = rows.stop - rows.start
        seen, window = self._seen(length, num_queries), self.scores.window
        position = torch.arange(length - seen, length, device=table.device)
        slots = table.to(torch.int64)[position // block_size] * block_size + position % block_size
        is_plain = self.scores.softcap is None and (window is None or length <= window)
        if num_queries == length and is_plain:
            return _Chunk(rows, slots, None)
        mask = torch.full((num_queries, seen), float("-inf"), dtype=self.dtype, device=table.device)
        mask.triu_(diagonal=seen - num_queries + 1)
        if window is not None:
            hidden = torch.ones_like(mask, dtype=torch.bool).tril_(diagonal=seen - num_queries - window)
            mask.masked_fill_(hidden, float("-inf"))
        return _Chunk(rows, slots, mask)

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, plan: _Plan) -> Tensor:
        """See `Attention`."""
        out = torch.zeros_like(queries)  # of padding it stays so
        if plan.groups:
            decodes = queries[: plan.num_rows]
            if plan.order is None:
                self._decode(decodes, keys, values, plan.groups, out)
            else:
                ordered = torch.empty_like(decodes)
                self._decode(decodes.index_select(0, plan.order), keys, values, plan.groups, ordered)
                out.index_copy_(0, plan.order, ordered)
        for chunk in plan.chunks:
            out[chunk.rows] = self._attend_chunk(queries[chunk.rows], keys, values, chunk)
        return out.flatten(1)

    def _decode(
        self, queries: Tensor, keys: Tensor, values: Tensor, groups: list[_DecodeGroup], out: Tensor
    ) -> None:
        key_rows = keys.view(-1, self.head_dim)
        value_rows = values.view(-1, self.head_dim)
        group_size = self.num_heads // self.num_kv_heads
        queries = queries.float()
        for group in groups:
            batch, _, length = group.mask.shape  # s * K, 1, L
            q = queries[group.rows].reshape(batch, group_size, self.head_dim)
            k = take(key_rows, group.keys, torch.float32).view(batch, length, self.head_dim).float()
            weights = torch.softmax(self._score(q, k, group.mask), dim=-1)
            if value_rows.dtype == FP8:
                v = take(value_rows, group.keys, self.dtype).view(batch, length, self.head_dim)
                sums = torch.bmm(weights.to(self.dtype), v)
            else:
                weights = weights.to(value_rows.dtype).view(-1, length)
                sums = F.embedding_bag(group.values, value_rows, per_sample_weights=weights, mode="sum")
            out[group.rows] = sums.view(-1, self.num_heads, self.head_dim)

    def _score(self, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Masked scores [n, q, L], float32, of queries [n, q, head_dim] and keys [n, L, head_dim]."""
        scale, softcap = self.scores.scale, self.scores.softcap
        if softcap is None:
            return torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=scale)
        scores = torch.bmm(queries, keys.transpose(1, 2))
        return scores.mul_(scale / softcap).tanh_().mul_(softcap).add_(mask)

    def _attend_capped(self, queries: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """A chunk without fused attention: queries [q, H, head_dim], k, v [K, L, head_dim], mask [q, L]."""
        length, group_size = k.shape[1], self.num_heads // self.num_kv_heads
        step = max(1, _SCORES // (self.num_heads * length))
        keys, out = k.float(), torch.empty_like(queries)
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            q = part.view(len(part), self.num_kv_heads, group_size, self.head_dim).permute(1, 2, 0, 3)
            q = q.reshape(self.num_kv_heads, -1, self.head_dim).float()  # [K, H / K * q, head_dim]
            rows = mask[start : start + step].float().repeat(group_size, 1)
            weights = torch.softmax(self._score(q, keys, rows), dim=-1).to(v.dtype)
            sums = torch.bmm(weights, v).view(self.num_kv_heads, group_size, len(part), self.head_dim)
            out[start : start + step] = sums.permute(2, 0, 1, 3).flatten(1, 2)
        return out

    def _attend_chunk(self, queries: Tensor, keys: Tensor, values: Tensor, chunk: _Chunk) -> Tensor:
        k = take(keys.flatten(0, 1), chunk.slots, self.dtype).transpose(0, 1)[None]  # [1, K, L, head_dim]
        v = take(values.flatten(0, 1), chunk.slots, self.dtype).transpose(0, 1)[None]
        if self.scores.softcap is not None:
            assert chunk.mask is not None
            return self._attend_capped(queries, k[0], v[0], chunk.mask)
        attended = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            k,
            v,
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            scale=self.scores.scale,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return attended[0].transpose(0, 1)
