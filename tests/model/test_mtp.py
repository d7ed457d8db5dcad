"""The head for multi-token prediction against its published definition, in every kind of batch."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.model.helpers import STEPS, Rank, Work, make_batch, run_ranks, shuffled_tables
from tests.model.mtp_reference import ReferenceHead, make_checkpoint
from tpworker.model.batch import Batch
from tpworker.model.mtp import MtpHead
from tpworker.model.tp import Collectives

BASE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
GLM: dict[str, Any] = BASE | {
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "attention_bias": True,
    "routed_scaling_factor": 1.5,
}
ERNIE: dict[str, Any] = BASE | {
    "num_attention_heads": 10,  # padded where they are shared out
    "moe_intermediate_size": 40,
    "moe_num_experts": 8,
    "moe_k": 3,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "glm": lambda: Glm4MoeConfig(**GLM),
    "glm-qk-norm": lambda: Glm4MoeConfig(**GLM, use_qk_norm=True, n_shared_experts=2),
    "ernie": lambda: Ernie4_5_MoeConfig(**ERNIE),
    "ernie-with-experts": lambda: Ernie4_5_MoeConfig(**ERNIE, moe_layer_start_index=0),
    "ernie-dense": lambda: Ernie4_5Config(**BASE),
    "ernie-biased": lambda: Ernie4_5Config(**BASE, use_bias=True, tie_word_embeddings=False),
    "llama": lambda: LlamaConfig(
        **BASE | {"num_attention_heads": 9, "num_key_value_heads": 3}, tie_word_embeddings=True
    ),
    "qwen2": lambda: Qwen2Config(**BASE),
    "qwen3": lambda: Qwen3Config(**BASE),
    "mistral-with-a-window": lambda: MistralConfig(**BASE, sliding_window=8),
}


@dataclasses.dataclass(frozen=True)
class Drafts:
    """A model with a head, ids [3, 41], and what is drafted of each but the last: logits [3, 40, vocab]."""

    folder: Path
    head: ReferenceHead
    ids: Tensor
    states: Tensor
    logits: Tensor

    @classmethod
    def make(cls, folder: Path, config: Any) -> Drafts:
        model = make_checkpoint(folder, config)
        ids = torch.randint(0, 131, (3, 41), generator=torch.Generator().manual_seed(1))
        head = ReferenceHead.load(folder)
        states = head.takes(model, ids[:, :40])
        logits = [
            head(list(of_one), tokens)[1] for of_one, tokens in zip(states, ids[:, 1:].tolist(), strict=True)
        ]
        return cls(folder, head, ids, states, torch.stack(logits))

    def batch(self, works: list[tuple[int, int, int, bool]]) -> tuple[Batch, Tensor]:
        """Of (sequence, from, to, decode row), and the tokens behind its tokens."""
        plan = [Work(s, start, self.ids[s, start:end].tolist(), decode) for s, start, end, decode in works]
        behind = torch.cat([self.ids[s, start + 1 : end + 1] for s, start, end, _ in works])
        return make_batch(plan, TABLES, BLOCK_SIZE), behind

    def expected(self, works: list[tuple[int, int, int, bool]]) -> Tensor:
        return torch.cat([self.logits[s, start:end] for s, start, end, _ in works])

    def check(self, found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=4e-5 * float(self.logits.abs().max()))


BLOCK_SIZE = 4
TABLES = shuffled_tables(3, 48, BLOCK_SIZE, 64)
Models = Callable[[str], Drafts]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return functools.cache(lambda name: Drafts.make(tmp_path_factory.mktemp(name), CONFIGS[name]()))


@dataclasses.dataclass
class Group:
    """One rank with its head."""

    rank: Rank
    head: MtpHead

    @classmethod
    def load(cls, folder: Path, collectives: Collectives, **options: Any) -> Group:
        rank = Rank.load(folder, collectives, with_mtp=True, block_size=BLOCK_SIZE, **options)
        assert rank.decoder.weights.mtp is not None
        return cls(rank, MtpHead(rank.decoder, rank.decoder.weights.mtp))

    def draft(self, batch: Batch, behind: Tensor) -> tuple[Tensor, Tensor]:
        """A step of model and head: what the head returns, and full logits of it."""
        hidden = self.rank.decoder.forward(batch, self.rank.cache)
        again = hidden.clone()
        out = self.head.forward(batch, hidden, behind, self.rank.cache)
        assert torch.equal(hidden, again)  # others read it, too
        return out, self.rank.logits(out)

    def keep(self, batch: Batch, behind: Tensor) -> None:
        hidden = self.rank.decoder.forward(batch, self.rank.cache)
        self.head.keep(batch, hidden, behind, self.rank.cache)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_drafts_are_those_of_the_definition(models: Models, name: str, size: int) -> None:
    """Whole prompts, chunks, decode rows beside them and alone."""
    model = models(name)

    def main(collectives: Collectives) -> list[Tensor]:
        group = Group.load(model.folder, collectives)
        return [group.draft(*model.batch(step))[1] for step in STEPS]

    results = run_ranks(size, main)
    for number, step in enumerate(STEPS):
        assert all(torch.equal(result[number], results[0][number]) for result in results)
        model.check(results[0][number], model.expected(step))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ["glm", "ernie", "qwen3"])
def test_what_was_kept_is_what_a_draft_would_have_left(models: Models, name: str, size: int) -> None:
    model = models(name)

    def main(collectives: Collectives) -> list[Tensor]:
        drafting, keeping = (Group.load(model.folder, collectives) for _ in range(2))
        for step in STEPS[:-2]:
            drafting.draft(*model.batch(step))
            keeping.keep(*model.batch(step))
        left, kept = drafting.rank.cache, keeping.rank.cache
        for one, other in ((left.keys, kept.keys), (left.values, kept.values)):
            assert one[-1].any()
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        return [keeping.draft(*model.batch(step))[1] for step in STEPS[-2:]]

    for result in run_ranks(size, main):
        for found, step in zip(result, STEPS[-2:], strict=True):
            model.check(found, model.expected(step))


PROMPTS = (9, 17, 4)
FURTHER = 3


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ["glm", "ernie", "ernie-with-experts", "llama"])
def test_further_drafts_come_of_the_heads_own_output(models: Models, name: str, size: int) -> None:
    """And are overwritten by the steps that come after them."""
    model = models(name)

    def main(collectives: Collectives) -> list[Tensor]:
        group = Group.load(model.folder, collectives)
        group.keep(*model.batch([(s, 0, length, False) for s, length in enumerate(PROMPTS)]))
        found = []
        batch, behind = model.batch([(s, length, length + 1, True) for s, length in enumerate(PROMPTS)])
        out, logits = group.draft(batch, behind)
        found.append(logits)
        for _ in range(FURTHER):
            batch = dataclasses.replace(batch, positions=batch.positions + 1, lengths=batch.lengths + 1)
            out = group.head.forward(batch, out, logits.argmax(dim=-1), group.rank.cache)
            logits = group.rank.logits(out)
            found.append(logits)
        for step in range(1, 1 + FURTHER):
            works = [(s, length + step, length + step + 1, True) for s, length in enumerate(PROMPTS)]
            found.append(group.draft(*model.batch(works))[1])
        return found

    results = run_ranks(size, main)
    expected = torch.stack([torch.stack(_further(model, s, length)) for s, length in enumerate(PROMPTS)], 1)
    later = [model.logits[range(3), [length + step for length in PROMPTS]] for step in range(1, 1 + FURTHER)]
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
        for found, of_reference in zip(result, [*expected, *later], strict=True):
            model.check(found, of_reference)


def _further(model: Drafts, sequence: int, length: int) -> list[Tensor]:
    """The logits of a draft behind position `length` and of those that follow it, by the reference."""
    states = list(model.states[sequence, : length + 1])
    tokens = model.ids[sequence, 1 : length + 2].tolist()
    found = []
    for _ in range(1 + FURTHER):
        outputs, logits = model.head(states, tokens)
        found.append(logits[-1])
        states.append(outputs[-1])
        tokens.append(int(logits[-1].argmax()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["glm", "ernie", "llama"])
def test_a_draft_does_not_depend_on_the_batch(models: Models, name: str, dtype: torch.dtype) -> None:
    """Bit by bit: alone, beside others, and beside rows that only pad the batch."""
    model = models(name)

    def main(collectives: Collectives) -> None:
        group = Group.load(model.folder, collectives, dtype=dtype)
        if not group.rank.decoder.weights.lm_head.is_packed:
            pytest.skip(f"this CPU has no packed {dtype} weights")
        group.keep(*model.batch([(s, 0, length, False) for s, length in enumerate(PROMPTS)]))
        works = [(s, length, length + 1, True) for s, length in enumerate(PROMPTS)]
        alone = [group.draft(*model.batch([work]))[0][0] for work in works]
        for order in ((0, 1, 2), (2, 0), (1, 2, 0)):
            together, _ = group.draft(*model.batch([works[s] for s in order]))
            assert all(torch.equal(row, alone[s]) for row, s in zip(together, order, strict=True))
        for length in (0, 1):
            padded, _ = group.draft(*_padded(model, works, length))
            assert torch.equal(padded[:3], torch.stack(alone))
            assert padded.isfinite().all()
            group.keep(*_padded(model, works, length))
        again = [group.draft(*model.batch([work]))[0][0] for work in works]
        assert torch.equal(torch.stack(again), torch.stack(alone))

    run_ranks(1, main)
    run_ranks(2, main)


def _padded(model: Drafts, works: list[tuple[int, int, int, bool]], length: int) -> tuple[Batch, Tensor]:
    """With three rows of the null slot, of this length in the cache."""
    plan = [Work(s, start, model.ids[s, start:end].tolist(), True) for s, start, end, _ in works]
    null = [Work(3, 0, [0], True)] * 3
    batch = make_batch([*plan, *null], [*TABLES, [0] * len(TABLES[0])], BLOCK_SIZE)
    batch.lengths[len(plan) :] = length
    return batch, torch.cat((model.batch(works)[1], torch.zeros(3, dtype=torch.int64)))


def test_an_excerpt_of_the_decoder_has_the_whole_head(models: Models) -> None:
    model = models("glm")

    def main(collectives: Collectives) -> None:
        group = Group.load(model.folder, collectives)
        excerpt = group.rank.decoder.excerpt()
        assert excerpt.weights.mtp is group.rank.decoder.weights.mtp
        assert excerpt.weights.mtp is not None
        batch, behind = model.batch(STEPS[0])
        hidden = group.rank.decoder.forward(batch, group.rank.cache)
        outputs = [
            MtpHead(decoder, excerpt.weights.mtp).forward(batch, hidden, behind, group.rank.cache)
            for decoder in (group.rank.decoder, excerpt)
        ]
        assert torch.equal(*outputs)

    run_ranks(1, main)


def test_the_head_changes_nothing_of_the_model(models: Models, tmp_path: Path) -> None:
    """Its logits are, bit by bit, those without a head; which is then not read."""
    model = models("mistral-with-a-window")
    shutil.copytree(model.folder, tmp_path, dirs_exist_ok=True)

    def main(collectives: Collectives) -> None:
        plain = Rank.load(tmp_path, collectives, block_size=BLOCK_SIZE)
        assert plain.decoder.weights.mtp is None
        assert len(plain.cache.keys) == plain.decoder.spec.num_layers
        group = Group.load(model.folder, collectives)
        for step in STEPS:
            batch, behind = model.batch(step)
            hidden = group.rank.decoder.forward(batch, group.rank.cache)
            group.head.forward(batch, hidden, behind, group.rank.cache)
            assert torch.equal(plain.decoder.forward(batch, plain.cache), hidden)

    run_ranks(2, main)
