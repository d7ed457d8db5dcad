"""Requests held to grammars, of CUDA ranks: in captured graphs, in torch's sync debug mode 'error'."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_cuda_ranks import folder, gpus, prompts, start  # noqa: F401  # a fixture
from tests.integration.guided import EOS, KINDS, TOKENIZER, text_of
from tpworker import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

Answers = list[tuple[list[int], str | None]]


@pytest.fixture(scope="module")
def spelling(folder: Path) -> Path:  # noqa: F811
    """The model, with a tokenizer of characters; most of its logits are of no token."""
    TOKENIZER.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return folder


def asked() -> list[dict[str, Any]]:
    """What 15 requests ask for: three of four are held to a grammar."""
    kinds = [None, *(kind.outputs for kind in KINDS)]
    return [
        {
            "temperature": (0.0, 0.9, 1.4)[number % 3],
            "top_p": (1.0, 0.9)[number % 2],
            "logprobs": 2 if number % 5 == 0 else None,
            "repetition_penalty": 1.2 if number % 7 == 0 else 1.0,
            "seed": number,
            "max_tokens": 40,
            "structured_outputs": kinds[number % len(kinds)],
        }
        for number in range(15)
    ]


def answers(folder: Path, num_ranks: int, **options: Any) -> list[Answers]:  # noqa: F811
    """One by one, and all at once."""

    async def ask(runtime: Any, prompt: list[int], **sampling: Any) -> tuple[list[int], str | None]:
        tokens, reason = [], None
        async for output in runtime.generate(prompt, SamplingParams(detokenize=False, **sampling)):
            tokens += output.token_ids
            reason = output.finish_reason
        return tokens, reason

    async def main() -> list[Answers]:
        pairs = list(zip(prompts(15), asked(), strict=True))
        async with start(folder, num_ranks, prefix_caching=False, **options) as runtime:
            alone = [await ask(runtime, prompt, **sampling) for prompt, sampling in pairs]
            return [alone, list(await asyncio.gather(*(ask(runtime, p, **s) for p, s in pairs)))]

    return asyncio.run(asyncio.wait_for(main(), 120))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_outputs_fit_and_are_the_same_with_any_lookahead(spelling: Path, num_ranks: int) -> None:
    gpus(num_ranks)
    alone, together = answers(spelling, num_ranks, lookahead=2)
    plain, _ = answers(spelling, num_ranks, lookahead=0)
    assert alone == plain
    fits = {kind.outputs: kind.fits for kind in KINDS}
    num_ended = 0
    for sampling, *both in zip(asked(), alone, together, strict=True):
        for tokens, reason in both:
            if sampling["structured_outputs"] is not None and reason == "stop":
                num_ended += 1
                assert fits[sampling["structured_outputs"]](text_of(tokens)), text_of(tokens)
    assert num_ended > 8
