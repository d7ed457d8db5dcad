"""What requests can ask of sampling, and logprobs, of CUDA ranks: in captured graphs, waiting for nothing.

Every rank runs in torch's sync debug mode 'error'; see test_cuda_ranks.py.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.gpu.test_cuda_ranks import MARGIN, folder, gpus, prompts, start  # noqa: F401  # a fixture
from tpworker import Runtime, SamplingParams
from tpworker.outputs import TokenLogprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0.0},
    "random": {"temperature": 0.9},
    "min_p": {"temperature": 1.2, "min_p": 0.2},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.5, "presence_penalty": 1.0},
    "frequency": {"temperature": 0.7, "frequency_penalty": 0.8, "top_k": 20},
    "bias": {"temperature": 0.0, "logit_bias": {3: 9.0, 500: 9.0, 7: -100.0}},
    "allowed": {"temperature": 1.0, "allowed_token_ids": range(100, 200), "top_p": 0.9},
    "suppressed": {"temperature": 0.0, "min_tokens": 9, "stop_token_ids": [5, 6]},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
    "prompt": {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 0},
    "none": {"prompt_logprobs": 0, "max_tokens": 0},
}

Answer = tuple[list[int], list[TokenLogprobs], list[TokenLogprobs | None]]


async def ask(runtime: Runtime, prompt: list[int], **sampling: Any) -> Answer:
    params = SamplingParams(detokenize=False, ignore_eos=True, **{"max_tokens": 24, "seed": 3, **sampling})
    tokens, logprobs, of_prompt = [], [], []
    async for output in runtime.generate(prompt, params):
        tokens += output.token_ids
        logprobs += output.logprobs or ()
        of_prompt += output.prompt_logprobs or ()
    return tokens, logprobs, of_prompt


def answers(folder: Path, num_ranks: int, **options: Any) -> list[dict[str, Answer]]:  # noqa: F811
    """Of each feature, one by one; and of all at once, with others that come and go."""

    async def main() -> list[dict[str, Answer]]:
        async with start(folder, num_ranks, prefix_caching=False, **options) as runtime:
            alone = {name: await ask(runtime, PROMPT, **asked) for name, asked in FEATURES.items()}
            wanted = [ask(runtime, PROMPT, **asked) for asked in FEATURES.values()]
            others = [ask(runtime, prompt, temperature=0.0, max_tokens=40) for prompt in prompts(9)]
            together = await asyncio.gather(*others, *wanted)
            return [alone, dict(zip(FEATURES, together[9:], strict=True))]

    return asyncio.run(asyncio.wait_for(main(), 120))


PROMPT = prompts(3)[2] + prompts(2)[1]  # of more tokens than a step has


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_features_are_the_same_with_any_lookahead(folder: Path, num_ranks: int) -> None:  # noqa: F811
    gpus(num_ranks)
    overlapped, mixed = answers(folder, num_ranks, lookahead=2)
    plain, _ = answers(folder, num_ranks, lookahead=0)
    assert overlapped == plain
    for name, asked in FEATURES.items():
        tokens, logprobs, of_prompt = overlapped[name]
        assert len(tokens) == len(mixed[name][0]) or name == "suppressed"
        assert len(logprobs) == (len(tokens) if "logprobs" in asked else 0)
        assert len(of_prompt) == (len(PROMPT) if "prompt_logprobs" in asked else 0)
    assert overlapped["none"][0] == []
    assert set(overlapped["allowed"][0]) <= set(range(100, 200))
    assert set(overlapped["bias"][0]) <= {3, 500}
    assert len(set(overlapped["penalties"][0])) > len(set(overlapped["plain"][0]))
    for name in ("random", "min_p", "frequency"):
        assert overlapped[name][0] != overlapped["plain"][0]


def test_logprobs_are_those_of_transformers(folder: Path) -> None:  # noqa: F811
    found, _ = answers(folder, 1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    tokens, logprobs, of_prompt = found["prompt"]
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + tokens], device="cuda")).logits[0].float().cpu()
    expected = logits.log_softmax(dim=-1)
    told = [*of_prompt[1:], *logprobs]
    assert [one.token_id for one in told if one is not None] == (PROMPT + tokens)[1:]
    for place, one in enumerate(told):
        assert one is not None
        assert abs(one.logprob - float(expected[place, one.token_id])) < MARGIN
        assert [logprob for _, logprob in one.top] == sorted((p for _, p in one.top), reverse=True)
        for token, logprob in one.top:
            assert abs(logprob - float(expected[place, token])) < MARGIN
    for one in found["logprobs"][1]:
        assert len(one.top) == 5
        assert one.top[0] == (one.token_id, one.logprob), "the likeliest is what greedy chooses"
