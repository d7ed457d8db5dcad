"""The default model, real weights, on CUDA ranks: the same answers as on the CPU, and through the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.integration.conftest import Server
from tpworker import Runtime, SamplingParams
from tpworker.observe.gpus import count_gpus
from tpworker.text.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.timeout(300),
]

QUESTIONS = (
    "Name the first five prime numbers.",
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "How does a bicycle stay upright?",
)
PRIMES = "2, 3, 5, 7, and 11"
MARGIN = 0.5  # of logits between 10 and 25: one bfloat16 there is 0.06 to 0.13 wide


def answers(folder: Path, device: str, num_ranks: int) -> list[list[int]]:
    """Greedy answers to all questions at once, in bfloat16."""

    async def main() -> list[list[int]]:
        async with Runtime(
            folder, device=device, tensor_parallel_size=num_ranks, dtype="bfloat16"
        ) as runtime:

            async def ask(question: str) -> list[int]:
                params = SamplingParams(temperature=0.0, max_tokens=60)
                outputs = runtime.generate(chat(folder, question), params)
                return [token async for output in outputs for token in output.token_ids]

            return list(await asyncio.gather(*(ask(question) for question in QUESTIONS)))

    return asyncio.run(asyncio.wait_for(main(), 240))


def chat(folder: Path, question: str) -> list[int]:
    tokenizer = Tokenizer.load(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}])
    return tokenizer.encode(text, add_special_tokens=False)


def gap_of(folder: Path, prompt: list[int], one: int, other: int) -> float:
    """How far apart two next tokens are in the float32 model's logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt], device="cuda")).logits[0, -1]
    return abs(float(logits[one] - logits[other]))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_answers_are_those_of_cpu_ranks(real_model: Path, num_ranks: int) -> None:
    """Where they part, the two tokens are nearly equally likely."""
    if count_gpus() < num_ranks:
        pytest.skip(f"{num_ranks} GPUs are needed")
    expected, found = answers(real_model, "cpu", 2), answers(real_model, "cuda", num_ranks)
    assert found[0] == expected[0], "the one that is certain of every token"
    for question, one, other in zip(QUESTIONS, expected, found, strict=True):
        first = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
        if first is None:
            assert len(one) == len(other)
            continue
        context = chat(real_model, question) + one[:first]
        assert gap_of(real_model, context, one[first], other[first]) < MARGIN


def test_the_server_on_cuda_ranks(start_server: Callable[..., Server], real_model: Path) -> None:
    server = start_server("--device", "cuda", "--tensor-parallel-size", str(min(2, count_gpus())))

    def ask(number: int) -> str:
        body = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0, "seed": number}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        content: str = answer.json()["choices"][0]["message"]["content"]
        return content

    assert PRIMES in ask(0)
    with ThreadPoolExecutor(32) as pool:
        assert all(PRIMES in answer for answer in pool.map(ask, range(64)))
    lines = {"prompt": "Once", "max_tokens": 5, "stream": True, "temperature": 0}
    streamed = httpx.post(f"{server.url}/v1/completions", json=lines, timeout=60).text
    assert streamed.rstrip().endswith("data: [DONE]")
    assert "tpworker_" in httpx.get(f"{server.url}/metrics").text
    assert server.stop() == 0, server.stderr
