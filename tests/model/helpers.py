"""What the model tests share: ranks as threads, tiny models of transformers, and hand-made batches."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from tpworker.checkpoint.weights import load_weights
from tpworker.model.decoder import Batch, Decoder, KVCache
from tpworker.model.families import ModelSpec, RopeSpec, read_spec
from tpworker.model.tp import Collectives, Shard

R = TypeVar("R")
CPU = torch.device("cpu")

SPEC = ModelSpec(
    family="llama",
    architecture="LlamaForCausalLM",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_model_len=128,
    rms_norm_eps=1e-5,
    rope=RopeSpec(theta=10000.0),
    dtype="float32",
)


class ThreadGroup:
    """The meeting point of `size` ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.items: list[Tensor] = [torch.empty(0)] * size


class ThreadCollectives(Collectives):
    """`Collectives` for a thread. Sums in the order of the ranks, so that all get the same bits."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self.group = group
        self.rank = rank
        self.size = len(group.items)
        self.gathered_bytes = 0

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.group.items[self.rank] = x
        self.group.barrier.wait()
        items = [item.clone() for item in self.group.items]
        self.group.barrier.wait()
        assert all(item.shape == x.shape and item.dtype == x.dtype for item in items)
        return items

    def all_reduce(self, x: Tensor) -> Tensor:
        assert x.is_contiguous()
        items = self._exchange(x)
        x.copy_(items[0])
        for item in items[1:]:
            x += item
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = torch.stack(self._exchange(x))
        self.gathered_bytes += gathered.nbytes
        return gathered


def run_ranks(size: int, main: Callable[[Collectives], R]) -> list[R]:
    """Run `main` on `size` ranks at once; returns their results in order, or raises the first error."""
    group = ThreadGroup(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def rank_main(rank: int) -> None:
        try:
            with torch.inference_mode():
                results[rank] = main(ThreadCollectives(group, rank))
        except BaseException as error:
            errors.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not errors, errors
    return results


def tiny_model(folder: Path, config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Make a random model of transformers from its config, save it to `folder`, and return it.

    Weights, norms and biases are all random, and large enough that a mistake anywhere changes the logits;
    correction biases of routers change some choices, and not all of them.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        buffers = [item for item in model.named_buffers() if "e_score_correction_bias" in item[0]]
        for name, parameter in [*model.named_parameters(), *buffers]:
            if "e_score_correction_bias" in name:
                parameter.normal_(0, 0.1)
            elif name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 0.6 / parameter.shape[-1] ** 0.5 if "embed" not in name else 1.0)
    model.to(dtype).save_pretrained(folder)
    return model


def edit_config(folder: Path, change: dict[str, Any], name: str = "config.json") -> None:
    """Change keys of a JSON file of the folder; None takes them out."""
    path = folder / name
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@dataclasses.dataclass
class Rank:
    """One rank with a cache; `steps` computes plans of the form the tests use."""

    decoder: Decoder
    cache: KVCache
    collectives: Collectives

    @classmethod
    def load(
        cls,
        folder: Path,
        collectives: Collectives,
        *,
        dtype: torch.dtype = torch.float32,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 256,
        with_mtp: bool = False,
    ) -> Rank:
        spec = read_spec(folder)
        shard = Shard.of(spec, collectives.rank, collectives.size)
        weights = load_weights(folder, spec, shard, dtype, CPU, with_mtp=with_mtp)
        decoder = Decoder(spec, weights, shard, collectives, max_model_len)
        num_layers = spec.num_layers + with_mtp
        cache = KVCache(spec, shard, num_blocks, block_size, dtype, CPU, num_layers)
        return cls(decoder, cache, collectives)

    def step(self, plan: StepPlan, tables: Sequence[Sequence[int]]) -> Tensor:
        """Full logits [R, vocab_size] of one step."""
        batch = make_batch(plan, tables, self.cache.block_size)
        return self.logits(self.decoder.forward(batch, self.cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """Full logits [R, vocab_size] of hidden [R, D]."""
        local = self.decoder.logits(hidden)
        gathered = self.collectives.all_gather(local).transpose(0, 1).flatten(1)
        vocab_size = self.decoder.spec.vocab_size
        assert torch.equal(gathered[:, vocab_size:], torch.full_like(gathered[:, vocab_size:], -torch.inf))
        return gathered[:, :vocab_size]


@dataclasses.dataclass(frozen=True)
class Work:
    """Some tokens of one sequence: `tokens`, the first at `start`. `decode`: it is a decode row."""

    sequence: int
    start: int
    tokens: Sequence[int]
    decode: bool = False


StepPlan = Sequence[Work]


def make_batch(
    plan: StepPlan,
    tables: Sequence[Sequence[int]],
    block_size: int,
    sample_rows: Sequence[int] | None = None,
) -> Batch:
    """A batch of the plan's work, in its order (decode rows must come first)."""
    decodes = [work.decode for work in plan]
    assert decodes == sorted(decodes, reverse=True)
    width = max(len(tables[work.sequence]) for work in plan)
    starts = [0]
    for work in plan:
        starts.append(starts[-1] + len(work.tokens))
    return Batch(
        token_ids=torch.tensor([token for work in plan for token in work.tokens]),
        positions=torch.tensor([work.start + i for work in plan for i in range(len(work.tokens))]),
        sequence_of=torch.tensor([row for row, work in enumerate(plan) for _ in work.tokens]),
        block_tables=torch.tensor(
            [list(tables[work.sequence]) + [0] * (width - len(tables[work.sequence])) for work in plan],
            dtype=torch.int32,
        ),
        lengths=torch.tensor([work.start + len(work.tokens) for work in plan], dtype=torch.int32),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        num_decodes=sum(decodes),
        max_query=max(len(work.tokens) for work in plan),
        sample_rows=None if sample_rows is None else torch.tensor(sample_rows),
    )


def shuffled_tables(num_sequences: int, length: int, block_size: int, num_blocks: int) -> list[list[int]]:
    """Block tables of physically shuffled blocks, none of them the null block."""
    per_sequence = -(-length // block_size)
    generator = torch.Generator().manual_seed(7)
    blocks = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    assert num_sequences * per_sequence <= len(blocks)
    return [blocks[i * per_sequence : (i + 1) * per_sequence] for i in range(num_sequences)]


Step = list[tuple[int, int, int, bool]]  # (sequence, from, to, decode row) of each work

STEPS: list[Step] = [
    [(0, 0, 9, False)],  # a whole prompt
    [(1, 0, 13, False), (2, 0, 1, False)],  # two chunks, one of them a single token
    [(0, 9, 10, True), (1, 13, 26, False)],  # a decode row beside a chunk in the middle of its prompt
    [(1, 26, 27, True), (0, 10, 11, True), (2, 1, 30, False)],  # decode rows of different lengths
    [(2, 30, 31, True), (0, 11, 12, True), (1, 27, 28, True)],  # pure decode
    [(1, 28, 29, True), (2, 31, 32, True), (0, 12, 13, True)],
    [(0, 13, 40, False), (1, 29, 40, False), (2, 32, 40, False)],  # chunks with a context
]
"""Three sequences of 40 tokens in every kind of step."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model in a folder, token ids [3, 40], and transformers' logits of them, [3, 40, vocab]."""

    folder: Path
    ids: Tensor
    logits: Tensor

    @classmethod
    def make(cls, folder: Path, config: Any) -> Reference:
        return cls._of(folder, tiny_model(folder, config))

    @classmethod
    def of_folder(cls, folder: Path) -> Reference:
        """What transformers makes of the folder's files as they are."""
        from transformers import AutoModelForCausalLM

        return cls._of(
            folder, AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        )

    @classmethod
    def _of(cls, folder: Path, model: Any) -> Reference:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, model.config.vocab_size, (3, 40), generator=generator)
        with torch.inference_mode():
            return cls(folder, ids, model(ids).logits)

    def compute(self, rank: Rank) -> list[Tensor]:
        """The logits of each of STEPS, on one rank."""
        cache = rank.cache.keys[0]
        tables = shuffled_tables(3, 40, cache.shape[1], cache.shape[0])
        return [
            rank.step(
                [Work(s, start, self.ids[s, start:end].tolist(), decode) for s, start, end, decode in step],
                tables,
            )
            for step in STEPS
        ]

    def compute_on(self, size: int, **options: Any) -> list[list[Tensor]]:
        """The same on each rank of a group of `size`; options are those of `Rank.load`."""
        return run_ranks(
            size, lambda collectives: self.compute(Rank.load(self.folder, collectives, **options))
        )

    def expected(self) -> list[Tensor]:
        """transformers' logits of each of STEPS."""
        return [torch.cat([self.logits[s, start:end] for s, start, end, _ in step]) for step in STEPS]

    def check(self, size: int, **options: Any) -> None:
        """Every rank of a group of `size` computes the same logits, which are transformers'."""
        results = self.compute_on(size, **options)
        for step, reference in enumerate(self.expected()):
            for result in results:
                assert torch.equal(result[step], results[0][step])
            torch.testing.assert_close(
                results[0][step], reference, rtol=1e-4, atol=2e-5 * float(self.logits.abs().max())
            )

    def check_independence(self, dtype: torch.dtype) -> None:
        """What a sequence gets does not depend on the batch: bit by bit, alone or with others, in any order,
        beside a chunk, on packed weights.
        """

        def main(collectives: Collectives) -> None:
            rank = Rank.load(self.folder, collectives, dtype=dtype, block_size=4, num_blocks=64)
            if not rank.decoder.weights.lm_head.is_packed:
                pytest.skip(f"this CPU has no packed {dtype} weights")
            tables = shuffled_tables(3, 40, 4, 64)
            lengths = (33, 7, 17)
            for s, length in enumerate(lengths):
                rank.step([Work(s, 0, self.ids[s, :length].tolist())], tables)

            def decode(s: int) -> Work:
                return Work(s, lengths[s], [int(self.ids[s, lengths[s]])], decode=True)

            alone = [rank.step([decode(s)], tables)[0] for s in range(3)]
            for order in ((0, 1), (1, 0), (2, 1, 0), (0, 2, 1)):
                together = rank.step([decode(s) for s in order], tables)
                assert all(torch.equal(row, alone[s]) for row, s in zip(together, order, strict=True))
            mixed = rank.step([decode(0), Work(1, 0, self.ids[1, :7].tolist())], tables)
            assert torch.equal(mixed[0], alone[0])

        run_ranks(1, main)
        run_ranks(2, main)


Models = Callable[[str], Reference]
"""The reference of a configuration, by its name."""


def references(configs: Mapping[str, Callable[[], Any]], make_folder: Callable[[str], Path]) -> Models:
    """Each is made once, when it is asked for, in a folder that `make_folder` makes for its name."""
    return functools.cache(lambda name: Reference.make(make_folder(name), configs[name]()))
