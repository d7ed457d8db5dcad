"""What one forward pass is about, as tensors on the device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Batch:
    """T tokens of S sequences: the decoding sequences first, W tokens each, then chunks of prompts.

    In a pure decode step (`num_decodes` == S, W S == T, `sample_rows` None) no size depends on device values.
    Token i of a decoding sequence stands at its length - W + i; W is above 1 where drafts are fed.
    """

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], in the token's sequence
    sequence_of: Tensor  # int64 [T], the row of block_tables of each token
    block_tables: Tensor  # int32 [S, max_blocks], entries beyond a sequence's blocks: any valid block
    lengths: Tensor  # int32 [S], tokens of each sequence that are in the cache after this step
    query_starts: Tensor  # int32 [S + 1], first token of each sequence in this batch, and T
    num_decodes: int  # so many sequences have W tokens each
    max_query: int  # most tokens of one sequence in this batch, or more
    sample_rows: Tensor | None = None  # int64 [R], which tokens get logits; None: all, in order
    width: int = 1  # W
