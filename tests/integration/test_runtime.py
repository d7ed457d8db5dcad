"""The embedding API over real schedulers and ranks, as processes, on a model of random weights."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tpworker import RequestOutput, Runtime, RuntimeFailed, SamplingParams, Stats, SyncRuntime

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.timeout(180)]

GREEDY = SamplingParams(temperature=0, max_tokens=20, detokenize=False, ignore_eos=True)
PROMPTS = [[1, 5, 9], list(range(3, 60)), [7] * 20]


def options(**changes: Any) -> dict[str, Any]:
    """One fault is the end: what is told of it is looked at."""
    fixed = {
        "device": "cpu",
        "load_format": "dummy",
        "dtype": "float32",
        "num_kv_blocks": 64,
        "max_restarts": 0,
    }
    return {**fixed, **changes}


async def collect(runtime: Runtime, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    tokens: list[int] = []
    async for output in runtime.generate(prompt, params):
        tokens += output.token_ids
    return tokens


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_same_tokens_with_and_without_overlap(model_folder: Path, num_ranks: int) -> None:
    async def run(lookahead: int) -> list[list[int]]:
        config = options(tensor_parallel_size=num_ranks, lookahead=lookahead, check_ranks_agree=True)
        async with Runtime(model_folder, **config) as runtime:
            return await asyncio.gather(*(collect(runtime, prompt) for prompt in PROMPTS))

    plain, overlapped = asyncio.run(run(0)), asyncio.run(run(2))
    assert plain == overlapped
    assert [len(tokens) for tokens in plain] == [20, 20, 20]


def test_drafts_change_no_token_and_are_counted(model_folder: Path) -> None:
    """By n-gram look-up, as many as pay: outputs that repeat themselves, and one that does not."""
    few: dict[str, Any] = {"max_tokens": 90, "detokenize": False, "ignore_eos": True}
    asked = [
        (PROMPTS[0], SamplingParams(temperature=0, allowed_token_ids=[5], **few)),
        (PROMPTS[1], SamplingParams(temperature=1.0, seed=3, allowed_token_ids=[5, 6], logprobs=1, **few)),
        (PROMPTS[2], SamplingParams(temperature=0.8, seed=4, top_p=0.9, n=2, **few)),
    ]

    async def one(runtime: Runtime, prompt: list[int], params: SamplingParams) -> list[RequestOutput]:
        return [output async for output in runtime.generate(prompt, params)]

    async def run(**changes: Any) -> tuple[list[list[RequestOutput]], Stats]:
        async with Runtime(model_folder, **options(tensor_parallel_size=2, **changes)) as runtime:
            outputs = await asyncio.gather(*(one(runtime, *request) for request in asked))
            return outputs, runtime.stats()

    def tokens_of(outputs: list[list[RequestOutput]]) -> list[list[int]]:
        return [
            [token for output in of_request if output.index == index for token in output.token_ids]
            for of_request, (_, params) in zip(outputs, asked, strict=True)
            for index in range(params.n)
        ]

    (plain, before), (drafted, stats) = (
        asyncio.run(run(**changes))
        for changes in ({}, {"speculative_method": "ngram", "num_speculative_tokens": 3})
    )
    assert tokens_of(drafted) == tokens_of(plain)
    assert [len(tokens) for tokens in tokens_of(drafted)] == [90] * 4
    told = [one.token_id for output in drafted[1] for one in output.logprobs or ()]
    assert told == tokens_of(drafted)[1]
    assert (before.draft_tokens, len(stats.draft_tokens)) == ((), 3)
    ends = [output for of_request in drafted for output in of_request if output.finish_reason]
    accepted = [output.num_accepted_tokens for output in ends]
    assert accepted[0] > 0, "its tokens are all the same"
    assert sum(accepted) <= sum(stats.accepted_tokens) <= sum(stats.draft_tokens)
    assert len({step.num_drafts for step in stats.recent_steps}) > 1


def test_two_runtimes_in_one_process_and_one_after_the_other(model_folder: Path) -> None:
    async def main() -> None:
        async with Runtime(model_folder, **options()) as first, Runtime(model_folder, **options()) as second:
            tokens = await asyncio.gather(collect(first, PROMPTS[0]), collect(second, PROMPTS[0]))
            assert tokens[0] == tokens[1]
        async with Runtime(model_folder, **options()) as third:
            assert await collect(third, PROMPTS[0]) == tokens[0]

    asyncio.run(main())


def test_the_blocking_form(model_folder: Path) -> None:
    with SyncRuntime(model_folder, **options(tensor_parallel_size=2)) as runtime:
        completions = runtime.complete(PROMPTS, GREEDY)
        streamed = [t for output in runtime.generate(PROMPTS[1], GREEDY) for t in output.token_ids]
    assert list(completions[1].token_ids) == streamed


def test_idle_costs_nothing(model_folder: Path) -> None:
    """Invariant 10, as CPU time: 2 s after the last request, all processes together."""

    def cpu_seconds(processes: list[psutil.Process]) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    async def main() -> float:
        async with Runtime(model_folder, **options(tensor_parallel_size=2)) as runtime:
            await collect(runtime, PROMPTS[0])
            me = psutil.Process()
            processes = [me, *me.children(recursive=True)]
            assert len(processes) == 6  # two standbys are among them
            await asyncio.sleep(2)
            before, start = cpu_seconds(processes), time.monotonic()
            await asyncio.sleep(5)
            return (cpu_seconds(processes) - before) / (time.monotonic() - start)

    assert asyncio.run(main()) < 0.02


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("raises", "ValueError: a fault of this rank's own"),
        ("diverges", "digest"),
        ("hangs", "step 5"),
        ("device", "RuntimeError: a bad kernel"),
        ("stalls", "tpworker-rank1"),
    ],
)
def test_a_faulty_rank_is_named(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str, says: str
) -> None:
    monkeypatch.setenv("FAULT", fault)

    async def main() -> None:
        config = options(tensor_parallel_size=3, step_timeout=1.5, rank_module="tests.children.faulty_rank")
        async with Runtime(model_folder, **config) as runtime:
            with pytest.raises(RuntimeFailed) as caught:
                await collect(runtime, PROMPTS[0])
            assert caught.value.process == "tpworker-rank1", caught.value
            assert says in str(caught.value)
            assert runtime.health().state == "failed"
            with pytest.raises(RuntimeFailed):
                await collect(runtime, PROMPTS[0])

    asyncio.run(main())


@pytest.mark.parametrize(("num_ranks", "victim"), [(1, "tpworker-rank0"), (2, "tpworker-rank1")])
def test_a_rank_that_stalls_is_named_with_its_stacks_also_when_steps_are_slow(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int, victim: str
) -> None:
    """With lookahead, all ranks have launched as much; who does not join a collective is the one."""
    monkeypatch.setenv("FAULT", "stalls")
    monkeypatch.setenv("STEP_SECONDS", "0.3")

    async def main() -> None:
        config = options(
            tensor_parallel_size=num_ranks, step_timeout=1.0, rank_module="tests.children.faulty_rank"
        )
        async with Runtime(model_folder, **config) as runtime:
            with pytest.raises(RuntimeFailed, match="in faulty_run") as caught:
                await collect(runtime, PROMPTS[0])
            assert caught.value.process == victim, caught.value

    asyncio.run(main())


def test_slow_steps_are_no_fault_however_many_are_queued(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's time begins when it is the next to be answered, not when it was streamed."""
    monkeypatch.setenv("FAULT", "none")
    monkeypatch.setenv("STEP_SECONDS", "0.5")

    async def main() -> None:
        config = options(lookahead=4, step_timeout=1.0, rank_module="tests.children.faulty_rank")
        async with Runtime(model_folder, **config) as runtime:
            params = SamplingParams(temperature=0, max_tokens=6, detokenize=False, ignore_eos=True)
            assert len(await collect(runtime, PROMPTS[0], params)) == 6

    asyncio.run(main())
