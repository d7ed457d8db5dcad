"""Real ranks that are killed while requests of every kind run: outputs are those without a fault, in fp32."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.children.poisonable_rank import POISON
from tests.integration.conftest import VOCAB
from tests.integration.guided import EOS, TOKENIZER
from tpworker import RequestFailed, RequestOutput, Runtime, SamplingParams

pytestmark = pytest.mark.usefixtures("nothing_left")

LENGTH = 80
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 1},
    {"temperature": 1.2, "seed": 2, "top_p": 0.8, "top_k": 30, "min_p": 0.01},
    {"temperature": 0.8, "seed": 3, "n": 3},
    {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 0.7, "seed": 4, "repetition_penalty": 1.3, "presence_penalty": 0.6},
    {"temperature": 0.7, "seed": 5, "frequency_penalty": 0.9, "logprobs": 0},
    {"temperature": 0.0, "logit_bias": {3: 4.0, 17: -9.0}},
    {"temperature": 1.0, "seed": 6, "allowed_token_ids": list(range(5, 60))},
    {
        "temperature": 1.0,
        "seed": 7,
        "stop_token_ids": list(range(9, 12)),
        "min_tokens": 40,
        "ignore_eos": False,
    },
    {"temperature": 0.6, "seed": 8, "cache_salt": "mine"},
]
RUNTIMES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "drafts": {"speculative_method": "ngram", "num_speculative_tokens": 3},
    "no prefix cache": {"prefix_caching": False},
    "few blocks": {"num_kv_blocks": 40},
    "no lookahead": {"lookahead": 0},
}


def prompt_of(number: int) -> list[int]:
    draw = random.Random(number)
    return [draw.randrange(VOCAB) for _ in range(draw.choice([5, 30, 45]))]


async def ask(runtime: Runtime, number: int) -> dict[int, list[RequestOutput]]:
    """The outputs of one request, by choice."""
    params = SamplingParams(max_tokens=LENGTH, detokenize=False, **{"ignore_eos": True, **KINDS[number]})
    found: dict[int, list[RequestOutput]] = {}
    async for output in runtime.generate(prompt_of(number), params):
        found.setdefault(output.index, []).append(output)
    return found


def summed(outputs: list[RequestOutput]) -> tuple[list[int], str | None, int | str | None, int]:
    tokens = [token for output in outputs for token in output.token_ids]
    last = outputs[-1]
    assert last.num_output_tokens == len(tokens)
    return tokens, last.finish_reason, last.stop_reason, last.num_prompt_tokens


def logprobs(outputs: list[RequestOutput]) -> list[float]:
    """Of all tokens, prompt and output, and the likeliest there."""
    rows = [row for output in outputs for row in (output.prompt_logprobs or ()) if row is not None]
    rows += [row for output in outputs for row in output.logprobs or ()]
    return [value for row in rows for value in (row.logprob, *(one for _, one in row.top))]


async def all_of(runtime: Runtime) -> list[dict[int, list[RequestOutput]]]:
    return await asyncio.gather(*(ask(runtime, number) for number in range(len(KINDS))))


async def disturb(runtime: Runtime, seed: int, times: int) -> None:
    """Kills somebody now and then, while requests run and when some may have ended."""
    draw = random.Random(seed)
    for number in range(1, times + 1):
        before = runtime.stats().output_tokens
        while runtime.stats().open and runtime.stats().output_tokens < before + draw.randint(20, 150):
            await asyncio.sleep(0.002)
        names = ["tpworker-rank0", "tpworker-rank1", "tpworker-scheduler"]
        found = {child.name(): child for child in psutil.Process().children(recursive=True)}
        found[draw.choice(names)].send_signal(signal.SIGKILL)
        async with asyncio.timeout(60):
            while runtime.stats().restarts < number or runtime.health().state != "ready":
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("name", RUNTIMES)
def test_outputs_are_those_without_a_fault(folder: Path, name: str) -> None:
    options = {"max_num_seqs": 6, "max_num_batched_tokens": 64, "max_model_len": 128, "num_kv_blocks": 200}
    options |= {"dtype": "float32", "block_size": 8, "max_restarts": 100, **RUNTIMES[name]}

    async def main() -> None:
        async with Runtime(folder, tensor_parallel_size=2, **options) as runtime:
            expected = await all_of(runtime)
            found, _ = await asyncio.gather(all_of(runtime), disturb(runtime, len(name), 3))
            for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
                assert {i: summed(mine[i]) for i in mine} == {i: summed(theirs[i]) for i in theirs}, number
                for index in mine:
                    assert logprobs(mine[index]) == pytest.approx(logprobs(theirs[index]), abs=1e-4), number
            stats = runtime.stats()
            assert (stats.open, stats.running, stats.waiting) == (0, 0, 0)
            assert stats.restarts == 3
            assert stats.resumed_requests > 0
            await ask(runtime, 0)  # the load is as of a step
            assert runtime.stats().free_blocks == runtime.stats().total_blocks

    asyncio.run(asyncio.wait_for(main(), 200))


def test_a_resumed_request_computes_its_prompt_no_second_time(folder: Path) -> None:
    """What was computed is found, by the steps: at most a block, and what was in flight."""
    options: dict[str, Any] = {"max_num_batched_tokens": 32, "max_model_len": 128, "block_size": 8}

    async def main() -> None:
        async with Runtime(
            folder, tensor_parallel_size=2, dtype="float32", num_kv_blocks=100, **options
        ) as runtime:
            params = SamplingParams(max_tokens=50, temperature=0.0, detokenize=False, ignore_eos=True)
            outputs = runtime.generate([number % VOCAB for number in range(70)], params)
            got = [await anext(outputs) for _ in range(20)]
            first = runtime.stats().steps
            found = {child.name(): child for child in psutil.Process().children(recursive=True)}
            found["tpworker-rank1"].send_signal(signal.SIGKILL)
            got += [output async for output in outputs]
            assert sum(len(output.token_ids) for output in got) == 50
            again = [step for step in runtime.stats().recent_steps[first:] if step.num_prefill_tokens]
            assert sum(step.num_prefill_tokens for step in again) <= 8 + 3
            assert runtime.stats().restarts == 1

    asyncio.run(asyncio.wait_for(main(), 120))


def slow_schema(number: int) -> dict[str, Any]:
    """One of many that are unlike, each of which takes a tenth of a second to compile."""

    def part(name: str) -> dict[str, Any]:
        return {"type": "object", "properties": {name: {"type": "string"}}, "required": [name]}

    return {"allOf": [{"anyOf": [part(f"k{number}_{i}_{j}") for j in range(4)]} for i in range(5)]}


@pytest.mark.parametrize("victim", ["tpworker-rank0", "tpworker-scheduler"])
def test_grammars_that_are_being_compiled_are_again(folder: Path, tmp_path: Path, victim: str) -> None:
    """The scheduler compiles one at a time: when the first answer begins, others have not come to that."""
    model = shutil.copytree(folder, tmp_path / "model")
    TOKENIZER.save(str(model / "tokenizer.json"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))

    async def main() -> None:
        begun = asyncio.Event()
        async with Runtime(model, dtype="float32", num_kv_blocks=200) as runtime:

            async def text(number: int) -> str:
                params = SamplingParams(
                    max_tokens=12, temperature=0.0, structured_outputs={"json": slow_schema(number)}
                )
                got = ""
                async for output in runtime.generate([number, 5, 7], params):
                    begun.set()
                    got += output.text
                return got

            async def all_texts() -> list[str]:
                return await asyncio.gather(*(text(number) for number in range(5)))

            asking = asyncio.ensure_future(all_texts())
            await begun.wait()
            assert runtime.stats().running < 5
            found = {child.name(): child for child in psutil.Process().children(recursive=True)}
            found[victim].send_signal(signal.SIGKILL)
            texts = await asking
            stats = runtime.stats()
            assert (stats.open, stats.restarts, stats.aborted) == (0, 1, 0)
            assert texts == await all_texts(), "they are known now, and nobody is killed"
            assert all(text.startswith("{") for text in texts)

    asyncio.run(asyncio.wait_for(main(), 120))


def test_a_request_that_makes_ranks_raise_fails_alone(folder: Path) -> None:
    async def main() -> None:
        async with Runtime(
            folder, tensor_parallel_size=2, dtype="float32", num_kv_blocks=200, max_restarts=20,
            rank_module="tests.children.poisonable_rank",
        ) as runtime:  # fmt: skip
            params = SamplingParams(max_tokens=100, temperature=0.0, detokenize=False, ignore_eos=True)

            async def tokens(prompt: list[int]) -> list[int]:
                return [one async for out in runtime.generate(prompt, params) for one in out.token_ids]

            prompts = [[number, 5, 7] for number in range(9)]
            expected = await asyncio.gather(*map(tokens, prompts))
            good = [asyncio.ensure_future(tokens(prompt)) for prompt in prompts]
            await asyncio.sleep(0.05)
            with pytest.raises(RequestFailed, match="no sample of this can be taken"):
                await tokens([POISON, 5, 7])
            assert await asyncio.gather(*good) == expected
            assert runtime.health().state == "ready"
            assert runtime.stats().restarts <= 5
            assert dict(runtime.stats().lost) == {"rank": runtime.stats().restarts}

    asyncio.run(asyncio.wait_for(main(), 120))
