"""Each schema of the suite once, by the default model at temperature 1: what ends is valid, the rest is cut.

A thousand outputs of them: scripts/bench schemas.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.serving.schema_suite import SUITE, Entry, read_suite
from tpworker import Runtime, SamplingParams, StructuredOutputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
MAX_TOKENS = 48


@pytest.mark.parametrize(("num_ranks", "lookahead"), [(1, 0), (2, 2)])
def test_every_schema(real_model: Path, num_ranks: int, lookahead: int) -> None:
    async def ask(runtime: Runtime, entry: Entry, seed: int) -> tuple[str, int, str | None]:
        sampling = SamplingParams(
            temperature=1.0,
            seed=seed,
            max_tokens=MAX_TOKENS,
            structured_outputs=StructuredOutputs(json=entry.schema),
        )
        text, num_tokens, reason = "", 0, None
        async for output in runtime.generate(f"An example of {entry.name}, as JSON:\n", sampling):
            text, num_tokens, reason = text + output.text, output.num_output_tokens, output.finish_reason
        return text, num_tokens, reason

    async def main() -> list[tuple[str, int, str | None]]:
        async with Runtime(
            real_model, device="cpu", tensor_parallel_size=num_ranks, lookahead=lookahead, max_num_seqs=25
        ) as runtime:
            return await asyncio.gather(*(ask(runtime, entry, seed) for seed, entry in enumerate(entries)))

    entries = read_suite(SUITE)
    num_ended = 0
    for entry, (text, num_tokens, reason) in zip(entries, asyncio.run(main()), strict=True):
        if reason == "length":
            assert num_tokens == MAX_TOKENS
        else:
            assert (reason, entry.why_invalid(text)) == ("stop", ""), f"{entry.name}: {text!r}"
            num_ended += 1
    assert num_ended > len(entries) // 3
