"""Heads for multi-token prediction on CUDA, eager and captured, against the CPU's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Ernie4_5_MoeConfig, Glm4MoeConfig, Qwen3Config

from tests.gpu.test_kernels import DEVICE, batch_to, captured, near
from tests.model.helpers import CPU, Work, make_batch, shuffled_tables
from tests.model.mtp_reference import make_checkpoint
from tpworker.checkpoint.weights import load_weights
from tpworker.model.batch import Batch
from tpworker.model.decoder import Decoder, KVCache
from tpworker.model.families import read_spec
from tpworker.model.mtp import MtpHead
from tpworker.model.tp import Shard
from tpworker.rank.collectives import SoleRank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
VOCAB = 1031
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 520,
    "num_hidden_layers": 2,
    "head_dim": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
EXPERTS: dict[str, Any] = BASE | {"moe_intermediate_size": 96}
CONFIGS: dict[str, Callable[[], Any]] = {
    "glm": lambda: Glm4MoeConfig(
        **EXPERTS, n_routed_experts=32, num_experts_per_tok=6, attention_bias=True, use_qk_norm=True
    ),
    "ernie": lambda: Ernie4_5_MoeConfig(**EXPERTS, moe_num_experts=16, moe_k=4),
    "qwen3": lambda: Qwen3Config(**BASE),
}
TABLES = shuffled_tables(2, 60, 16, 64)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@dataclasses.dataclass
class Side:
    """A model with its head on one device."""

    decoder: Decoder
    head: MtpHead
    cache: KVCache

    @classmethod
    def make(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> Side:
        spec = read_spec(folder)
        shard = Shard.of(spec, 0, 1)
        weights = load_weights(folder, spec, shard, dtype, device, with_mtp=True)
        decoder = Decoder(spec, weights, shard, SoleRank(), 256)
        assert weights.mtp is not None
        cache = KVCache(spec, shard, 64, 16, dtype, device, spec.num_layers + 1)
        return cls(decoder, MtpHead(decoder, weights.mtp), cache)

    def draft(self, batch: Batch, behind: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the drafts, and of the drafts behind those, which a further step makes of the first."""
        hidden = self.decoder.forward(batch, self.cache)
        out = self.head.forward(batch, hidden, behind, self.cache)
        logits = self.head.logits(out)
        on = dataclasses.replace(batch, positions=batch.positions + 1, lengths=batch.lengths + 1)
        return logits, self.head.logits(self.head.forward(on, out, behind, self.cache))

    def keep(self, batch: Batch, behind: Tensor) -> None:
        self.head.keep(batch, self.decoder.forward(batch, self.cache), behind, self.cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CONFIGS)
def test_drafts_are_the_cpus(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Prompts whose keys and values are kept, then drafts, by a captured graph in bfloat16.

    In bfloat16 rounding turns nearly even choices of experts: a mixture's are compared with its own, launched
    kernel by kernel, and bit by bit.
    """
    make_checkpoint(tmp_path, CONFIGS[name]())
    ids = torch.randint(0, VOCAB, (2, 60), generator=torch.Generator().manual_seed(0))
    side = Side.make(tmp_path, DEVICE, dtype)
    other = Side.make(tmp_path, CPU, torch.float32)
    compared = dtype == torch.float32 or name == "qwen3"
    tolerance = 0.04 if dtype == torch.bfloat16 else 1e-4

    def batch(*plan: Work) -> tuple[Batch, Tensor]:
        behind = [ids[w.sequence, w.start + 1 : w.start + 1 + len(w.tokens)] for w in plan]
        return make_batch(plan, TABLES, 16), torch.cat(behind)

    def on_gpu(made: tuple[Batch, Tensor]) -> tuple[Batch, Tensor]:
        return batch_to(made[0], DEVICE), made[1].to(DEVICE)

    for plan in (
        [Work(0, 0, ids[0, :30].tolist())],
        [Work(0, 30, [int(ids[0, 30])], True), Work(1, 0, ids[1, :31].tolist())],
    ):
        side.keep(*on_gpu(batch(*plan)))
        other.keep(*batch(*plan))

    def decode(position: int) -> tuple[Batch, Tensor]:
        return batch(*(Work(s, position, [int(ids[s, position])], True) for s in (0, 1)))

    state, behind = on_gpu(decode(31))
    graph: torch.cuda.CUDAGraph | None = None
    drafts: tuple[Tensor, ...] = ()
    if dtype == torch.bfloat16:
        graph, drafts = captured(lambda: side.draft(state, behind))
    for position in range(31, 50):
        made = decode(position)
        eager = side.draft(*on_gpu(made))
        expected = other.draft(*made)
        if graph is not None:
            state.token_ids.copy_(made[0].token_ids)
            state.positions.copy_(made[0].positions)
            state.lengths.copy_(made[0].lengths)
            behind.copy_(made[1])
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(drafts, eager, strict=True))
        if compared:
            for found, reference in zip(eager, expected, strict=True):
                near(found.float()[:, :VOCAB], reference[:, :VOCAB], tolerance)
