"""Attention that loads keys and values before the kernel ahead has ended: they must be of earlier steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.test_kernels import (
    DEVICE,
    SHAPES,
    attention_case,
    batch_to,
    differing_replays,
    on_hopper,
    randn,
    split_attention,
)
from tpworker.kernels.operands import NewTokens
from tpworker.model.families import RopeSpec
from tpworker.model.rope import rope_tables

pytestmark = pytest.mark.gpu
STEPS = 6
BLOCK_SIZE = 16


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@on_hopper
@pytest.mark.parametrize("name", ["qwen3-8b-tp2", "qwen3-0.6b", "smollm2"])
@pytest.mark.parametrize("lengths", [[3], [1, 40, 62, 63, 64, 200], [650], [20] * 64])
def test_a_step_attends_to_what_the_step_before_has_stored(
    name: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps with nothing between them but what `prepare` does; the cache is as at first in each replay."""
    from tpworker.kernels import triton_kernels

    shape = SHAPES[name]
    batch, _, keys, values = attention_case(shape, BLOCK_SIZE, lengths, [])
    attention = split_attention(shape)
    cos, sin = (
        table.to(DEVICE)
        for table in rope_tables(RopeSpec(theta=1e4), shape.head_dim, 1024, torch.device("cpu"))
    )
    here = (keys.to(DEVICE), values.to(DEVICE))
    cache = tuple(torch.empty_like(one) for one in here)
    norm = (randn(shape.head_dim).to(DEVICE), randn(shape.head_dim).to(DEVICE))
    steps: list[tuple[Any, Tensor, NewTokens]] = []
    for step in range(STEPS):
        now = dataclasses.replace(
            batch_to(batch, DEVICE),
            positions=batch.positions.to(DEVICE) + step,
            lengths=batch.lengths.to(DEVICE) + step,
        )
        places = triton_kernels.places(now.positions, now.sequence_of, now.block_tables, cos, sin, BLOCK_SIZE)
        heads = randn(len(lengths), shape.heads + 2 * shape.kv_heads, shape.head_dim).to(DEVICE)
        norms = norm if shape.has_norm else None
        steps.append((now, heads, NewTokens(norms, 1e-6, places.cos, places.sin, places.rows)))

    def work() -> Tensor:
        for one, source in zip(cache, here, strict=True):
            one.copy_(source)
        out = []
        for now, heads, tokens in steps:
            attended = attention.store_and_attend(heads, *cache, attention.prepare(now, BLOCK_SIZE), tokens)
            assert attended is not None
            out.append(attended)
        return torch.stack(out)

    assert differing_replays(work, monkeypatch, 300) == 0
