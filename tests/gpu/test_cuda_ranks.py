"""CUDA ranks: whole runtimes, with a tiny random model in bfloat16, against transformers on the same GPU.

Except in the debug mode, every rank runs in torch's sync debug mode 'error' (invariant 3): decoding, and the
admission of requests while others decode, must nowhere wait for the device.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.gpu.runners import BLOCKS_PER_SLOT, NUM_SLOTS, TINY, cuda_runners
from tests.model.helpers import tiny_model
from tpworker import Runtime, RuntimeFailed, SamplingParams
from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.messages import Admission, BatchPlan, Chunk, Sampling
from tpworker.model.sampling import SamplingMode
from tpworker.observe.gpus import count_gpus
from tpworker.rank.cuda import CudaDevice
from tpworker.rank.graphs import TokenGraphs
from tpworker.rank.runner import Runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

VOCAB = 515  # no TP size divides it
MARGIN = 0.15  # of logits with a standard deviation of about 0.6: bfloat16 rounds 1 part in 256, a few times
STRICT = "tests.children.strict_rank"


def gpus(num_ranks: int) -> None:
    if count_gpus() < num_ranks:
        pytest.skip(f"{num_ranks} GPUs are needed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512}
    config = LlamaConfig(**TINY, **sizes, num_hidden_layers=3, num_attention_heads=4)
    tiny_model(folder, config, torch.bfloat16)
    return folder


def prompts(number: int) -> list[list[int]]:
    draw = random.Random(3)
    return [draw.choices(range(VOCAB), k=draw.randint(1, 120)) for _ in range(number)]


async def collect(runtime: Runtime, prompt: list[int], **sampling: Any) -> list[int]:
    params = SamplingParams(detokenize=False, ignore_eos=True, **sampling)
    return [token async for output in runtime.generate(prompt, params) for token in output.token_ids]


def start(folder: Path, num_ranks: int, **options: Any) -> Runtime:
    options = {"max_num_seqs": 12, "rank_module": STRICT, "max_num_batched_tokens": 64, **options}
    return Runtime(folder, device="cuda", tensor_parallel_size=num_ranks, **options)


def run(folder: Path, num_ranks: int, **options: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy outputs of requests one by one; and of 20 at once, which are admitted while others decode."""

    async def main() -> tuple[list[list[int]], list[list[int]]]:
        async with start(folder, num_ranks, **options) as runtime:
            alone = [await collect(runtime, prompt, temperature=0.0, max_tokens=60) for prompt in prompts(4)]
            together = await asyncio.gather(
                *(
                    collect(runtime, prompt, temperature=0.0, max_tokens=20 + 7 * number)
                    for number, prompt in enumerate(prompts(20))
                )
            )
            return alone, together

    return asyncio.run(asyncio.wait_for(main(), 120))


def assert_greedy(folder: Path, outputs: list[list[int]]) -> None:
    """Every token is the most likely one to transformers, or within a small margin of it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    same = total = 0
    for prompt, output in zip(prompts(len(outputs)), outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output[:-1]], device="cuda")).logits[0, len(prompt) - 1 :]
        logits = logits.float().cpu()
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert (logits.max(dim=1).values - chosen).max() < MARGIN
        same += int((logits.argmax(dim=1) == torch.tensor(output)).sum())
        total += len(output)
    assert same > 0.9 * total


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_greedy_tokens_are_those_of_transformers_and_of_any_lookahead(folder: Path, num_ranks: int) -> None:
    gpus(num_ranks)
    reference = None
    for lookahead in (2, 0, 1, 4) if num_ranks == 1 else (2, 0):
        # The batch must not change with what has been computed before: no prefix cache.
        alone, together = run(folder, num_ranks, lookahead=lookahead, prefix_caching=False)
        assert reference is None or alone == reference, f"lookahead {lookahead}"
        reference = alone
        assert_greedy(folder, alone)
        assert_greedy(folder, together)


def test_sampling_of_every_kind_waits_for_nothing(folder: Path) -> None:
    async def main() -> None:
        async with start(folder, 1) as runtime:
            kinds: list[dict[str, Any]] = [
                {"temperature": 0.8},
                {"temperature": 0.8, "top_p": 0.9},
                {"temperature": 1.2, "top_k": 7, "min_tokens": 5, "stop_token_ids": [3, 4]},
                {"temperature": 0.0},
            ]
            prompt = prompts(1)[0]
            for kind in kinds:
                wanted = {**kind, "seed": 5, "max_tokens": 40}
                first = await collect(runtime, prompt, **wanted)
                assert await collect(runtime, prompt, **wanted) == first
            await asyncio.gather(
                *(collect(runtime, prompt, **kind, seed=i, max_tokens=30 + i) for i, kind in enumerate(kinds))
            )

    asyncio.run(asyncio.wait_for(main(), 120))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_logits_that_are_nan_are_told_of(
    folder: Path, num_ranks: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By weights of the second half of the vocabulary, which is the last rank's."""
    gpus(num_ranks)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[300:] = torch.nan
    model.save_pretrained(tmp_path)

    async def main() -> None:
        async with start(tmp_path, num_ranks) as runtime:
            for kind in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 7}):
                assert await collect(runtime, [1, 2, 3], **kind, max_tokens=9) == [300] * 9

    asyncio.run(asyncio.wait_for(main(), 120))
    assert capfd.readouterr().err.count("logits are NaN") == 1


def mixed_plans(number: int) -> Iterator[BatchPlan]:
    """Requests come in chunks while others decode: slot after slot, two chunks each, of many lengths."""
    draw = random.Random(5)
    for slot in range(NUM_SLOTS):
        prompt = draw.choices(range(VOCAB), k=draw.randint(2, 90))
        blocks = pack_int32(range(BLOCKS_PER_SLOT * slot + 1, BLOCKS_PER_SLOT * (slot + 1) + 1))
        greedy = Sampling(0.0, 1.0, 0, 0, 9, 0, b"")
        cut = len(prompt) // 2
        step = 3 * slot
        admitted = (Admission(slot, pack_int32(prompt), len(prompt), 0, blocks, greedy),)
        first, second = Chunk(slot, 0, cut, False), Chunk(slot, cut, len(prompt) - cut, True)
        yield BatchPlan(0, step, admitted=admitted, chunks=(first,), decode=pack_int32(range(slot)))
        yield BatchPlan(0, step + 1, chunks=(second,))
        yield BatchPlan(0, step + 2, decode=pack_int32(range(slot + 1)))
        if slot == number:
            return


def test_captured_mixed_steps_give_what_eager_ones_give(folder: Path) -> None:
    captured, eager = cuda_runners(folder, CudaDevice(0), 2)
    captured.prepare(64)  # chunks of up to 45 tokens beside 11 that decode
    eager.prepare(64)
    assert captured.steps.forwards.size_for(60) == 64
    eager.steps.forwards = TokenGraphs()
    seen: list[Tensor] = []
    finish_step = eager.sampler.finish_step

    def remember(slots: Tensor, hidden: Tensor, mode: SamplingMode, width: int) -> tuple[Tensor, Tensor]:
        if len(slots):
            seen.append(hidden.clone())
        return finish_step(slots, hidden, mode, width)

    eager.sampler.finish_step = remember  # type: ignore[method-assign]
    same = total = 0
    for plan in mixed_plans(11):
        torch.cuda.set_sync_debug_mode("error")
        try:
            launched = [runner.launch(plan) for runner in (captured, eager)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        rows = []
        for step in launched:
            step.done.synchronize()
            rows.append(step.ring_row.tolist())
        for runner, step in zip((captured, eager), launched, strict=True):
            runner.staging.give_back(step.staging)
        assert rows[0][0] == rows[1][0] == plan.step
        same += sum(a == b for a, b in zip(*rows, strict=True))
        total += len(rows[0])
        with torch.inference_mode():
            assert torch.equal(captured._slots.state.position, eager._slots.state.position)
            assert captured._slots.state.position[-1] == 0
            if plan.chunks and launched[0].num_sampled:
                expected = seen[-1].float()
                error = (captured.steps._hidden[: len(expected)].float() - expected).abs().max()
                assert error < 0.05 * expected.abs().max()
            # One that differs would spread.
            captured._slots.state.last_token.copy_(eager._slots.state.last_token)
            ours = captured._cache.keys + captured._cache.values
            theirs = eager._cache.keys + eager._cache.values
            for mine, other in zip(ours, theirs, strict=True):
                assert mine.isfinite().all(), "padding has left something in the null block"
                mine.copy_(other)
    assert same > 0.9 * total


def sampled_plans() -> Iterator[BatchPlan]:
    """`mixed_plans`, behind which all go on together, drawing."""
    yield from mixed_plans(11)
    blocks = pack_int32(range(1, BLOCKS_PER_SLOT + 1))
    drawing = Sampling(0.8, 0.9, 20, 3, 9, 0, b"")
    admitted = (Admission(0, pack_int32([5, 6, 7]), 3, 0, blocks, drawing),)
    yield BatchPlan(0, 36, released=(0,), admitted=admitted, chunks=(Chunk(0, 0, 3, True),), decode=b"")
    yield BatchPlan(0, 37, decode=pack_int32(range(NUM_SLOTS)))
    for step in range(38, 50):
        yield BatchPlan(0, step)


def test_graphs_made_on_demand_give_what_those_made_beforehand_do(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two runners on one device, whose graphs share a pool: each runs all plans on its own. Which tokens
    are chosen is compared, and every key and value."""
    device = CudaDevice(0)
    late, beforehand = cuda_runners(folder, device, 2)
    capture_late, num_captured = device.capture_late, 0
    told: list[str] = []

    def count(work: Callable[[], None]) -> Callable[[], None]:
        nonlocal num_captured
        num_captured += 1
        return capture_late(work)

    device.capture_late = count  # type: ignore[method-assign]

    def run_all(runner: Runner, name: str) -> list[list[int]]:
        rows = []
        for number, plan in enumerate(sampled_plans()):
            before = num_captured
            started = time.perf_counter()
            torch.cuda.set_sync_debug_mode("error")
            try:
                launched = runner.launch(plan)
                launched_at = time.perf_counter()
                runner.catch_up()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            caught_up_at = time.perf_counter()
            launched.done.synchronize()
            done_at = time.perf_counter()
            rows.append(launched.ring_row.tolist())
            runner.staging.give_back(launched.staging)
            if number < 6:
                parts = (launched_at - started, caught_up_at - launched_at, done_at - started)
                launch_ms, capture_ms, all_ms = (f"{1e3 * part:.1f}" for part in parts)
                told.append(
                    f"{name}, step {number}: launched in {launch_ms} ms, {num_captured - before} captures in "
                    f"{capture_ms} ms, done after {all_ms} ms"
                )
        return rows

    started = time.perf_counter()
    late.prepare_late(64)
    told.append(f"prepare_late: {1e3 * (time.perf_counter() - started):.0f} ms")
    assert num_captured == 0
    rows = run_all(late, "on demand")
    assert 0 < num_captured < 20, "of more than forty kinds"
    started = time.perf_counter()
    beforehand.prepare(64)
    told.append(f"prepare: {1e3 * (time.perf_counter() - started):.0f} ms")
    expected = run_all(beforehand, "beforehand")
    with capsys.disabled():
        print("", *told, sep="\n")
    assert rows == expected
    ours, theirs = (runner._cache.keys + runner._cache.values for runner in (late, beforehand))
    assert all(torch.equal(mine[1:], other[1:]) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_agree_bit_by_bit(folder: Path, num_ranks: int) -> None:
    gpus(num_ranks)
    alone, together = run(folder, num_ranks, check_ranks_agree=True, rank_module="tpworker.rank")
    assert_greedy(folder, alone)
    assert_greedy(folder, together)


def test_a_rank_that_dies_in_a_collective_leaves_gpus_that_can_be_used_again(folder: Path) -> None:
    gpus(2)

    async def main() -> None:
        async with start(folder, 2) as runtime:
            endless = asyncio.create_task(collect(runtime, [1, 2, 3], temperature=0.0, max_tokens=500))
            while runtime.stats().steps < 50:
                await asyncio.sleep(0.001)
                assert not endless.done()
            victim = next(
                child
                for child in psutil.Process().children(recursive=True)
                if child.cmdline()[0] == "tpworker-rank1"
            )
            victim.kill()
            with pytest.raises(RuntimeFailed) as caught:
                await endless
            assert caught.value.process == "tpworker-rank1"
        async with start(folder, 2) as runtime:
            assert len(await collect(runtime, [1, 2, 3], temperature=0.0, max_tokens=30)) == 30

    asyncio.run(asyncio.wait_for(main(), 120))


def test_a_rank_without_flash_attention_serves_too(folder: Path) -> None:
    """float32 has no FlashAttention: the torch reference, which looks at lengths, and no graphs."""
    alone, _ = run(folder, 1, dtype="float32", rank_module="tpworker.rank")
    assert_greedy(folder, alone)
