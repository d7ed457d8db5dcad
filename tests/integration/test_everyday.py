"""The everyday request: the default model, its whole vocabulary, the parameters that people send."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.integration.conftest import Server
from tpworker import Runtime, SamplingParams

pytestmark = pytest.mark.timeout(240)

PROMPT = "Once upon a time"
PARAMETERS: dict[str, float] = {"temperature": 0.7, "top_p": 0.9, "top_k": 40}
EVERYDAY: list[dict[str, Any]] = [
    dict(chosen)
    for size in range(1, len(PARAMETERS) + 1)
    for chosen in itertools.combinations(PARAMETERS.items(), size)
]
"""Each alone, each pair, and all; what is left out is as generation_config.json says."""

TOP_P_95: dict[str, Any] = {"max_tokens": 30, "temperature": 1.0, "top_p": 0.95, "seed": 1}
FIRST_TOKENS = [28, 347, 339, 4415, 3685, 28, 339, 761]
FIRST_TEXT = ", as I mentioned earlier, I had"


def test_in_a_runtime(real_model: Path) -> None:
    """All at once and one by one, with overlap and without: the same tokens, and every one of them comes."""

    async def tokens(runtime: Runtime, prompt: str, **parameters: Any) -> list[int]:
        params = SamplingParams(**{"max_tokens": 12, "seed": 5, "ignore_eos": True, **parameters})
        return [token async for output in runtime.generate(prompt, params) for token in output.token_ids]

    async def answers(lookahead: int, at_once: bool) -> list[list[int]]:
        async with Runtime(
            real_model, tensor_parallel_size=2, device="cpu", dtype="float32", lookahead=lookahead,
            max_model_len=128, max_num_seqs=16, max_num_batched_tokens=64,
        ) as runtime:  # fmt: skip
            works = [
                tokens(runtime, PROMPT, **TOP_P_95),
                tokens(runtime, PROMPT, **TOP_P_95, min_tokens=1),
                tokens(runtime, PROMPT, temperature=0.0),
                *(tokens(runtime, PROMPT, **everyday) for everyday in EVERYDAY),
            ]
            return list(await asyncio.gather(*works)) if at_once else [await work for work in works]

    together = asyncio.run(answers(2, at_once=True))
    assert together[0][:8] == FIRST_TOKENS
    assert together[1] == together[0]
    assert [len(ids) for ids in together] == [30, 30] + [12] * (1 + len(EVERYDAY))
    assert asyncio.run(answers(0, at_once=False)) == together


def test_over_http(start_server: Callable[..., Server], real_model: Path) -> None:
    """Each kind beside a greedy stream, forty requests at once, and greedy once more: none hurts another."""
    server = start_server("--device", "cpu", "--max-num-seqs", "16", "--max-model-len", "256")

    async def main() -> None:
        api = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=200)
        model = (await api.models.list()).data[0].id

        async def complete(**parameters: Any) -> str:
            extra = {name: parameters.pop(name) for name in ("top_k", "ignore_eos") if name in parameters}
            chunks = await api.completions.create(
                model=model, prompt=PROMPT, stream=True, extra_body=extra, **parameters
            )
            return "".join([chunk.choices[0].text async for chunk in chunks if chunk.choices])

        greedy = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
        alone = await complete(**greedy)
        beside, *texts = await asyncio.gather(
            complete(**greedy),
            complete(**TOP_P_95),
            *(complete(max_tokens=20, seed=n, **EVERYDAY[n % len(EVERYDAY)]) for n in range(40)),
        )
        assert beside[:8] == alone[:8]  # in bfloat16 a batch may round otherwise, some tokens later
        assert texts[0].startswith(FIRST_TEXT)
        assert len(set(texts)) > 30
        assert await complete(**greedy) == alone

    asyncio.run(main())
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.stop() == 0, server.stderr
