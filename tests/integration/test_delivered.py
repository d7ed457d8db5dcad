"""Outputs that go on in another runtime than they began in: they are those without the change, in fp32."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.integration.guided import KINDS as GRAMMARS
from tests.integration.guided import TOKENIZER
from tests.integration.test_recovery import KINDS, logprobs, prompt_of
from tpworker import InvalidRequest, RequestOutput, Runtime, SamplingParams
from tpworker.sampling_params import choice_seed
from tpworker.text.stream import TextStream

pytestmark = pytest.mark.usefixtures("nothing_left")

LENGTH = 40
ALL: list[dict[str, Any]] = [
    *({"ignore_eos": True, **kind} for kind in KINDS),
    {"temperature": 1.0, "seed": 11, "stop": ["e", "ab", "q~", "the"], "min_tokens": 9},
    {"temperature": 1.0, "seed": 12, "stop": ["!!!", "S"], "include_stop_str_in_output": True},
    {"temperature": 1.0, "seed": 13, "structured_outputs": GRAMMARS[1].outputs},
    {"temperature": 1.0, "seed": 14, "structured_outputs": GRAMMARS[0].outputs, "min_tokens": 12},
]


async def outputs_of(
    runtime: Runtime, number: int, params: SamplingParams, delivered: Sequence[int] = ()
) -> list[RequestOutput]:
    return [output async for output in runtime.generate(prompt_of(number), params, delivered=delivered)]


def seen(outputs: Sequence[RequestOutput]) -> tuple[list[int], str]:
    return [i for output in outputs for i in output.token_ids], "".join(output.text for output in outputs)


async def check(runtime: Runtime, number: int, params: SamplingParams) -> int:
    """Cuts one output at three places, and has the rest come anew. Returns how many tokens it had."""
    whole = await outputs_of(runtime, number, params)
    tokens, text = seen(whole)
    rows = [row for output in whole for row in output.logprobs or ()]
    for place in {1, len(tokens) // 2, len(tokens) - 1} - {0, len(tokens)}:
        stream = TextStream(
            runtime.tokenizer,
            params.stop,
            min_tokens=params.min_tokens,
            prompt=prompt_of(number),
            include_stop=params.include_stop_str_in_output,
        )
        shown = stream.push(tokens[:place]).text
        rest = await outputs_of(runtime, number, params, tokens[:place])
        assert seen(rest) == (tokens[place:], text[len(shown) :]), (number, place)
        assert rest[0].num_output_tokens == place + len(rest[0].token_ids)
        told = "num_prompt_tokens", "num_output_tokens", "finish_reason", "stop_reason", "index"
        assert [getattr(rest[-1], name) for name in told] == [getattr(whole[-1], name) for name in told]
        expected = whole[-1]._replace(logprobs=tuple(rows[place:]), prompt_logprobs=None)
        assert logprobs(rest) == pytest.approx(logprobs([expected]), abs=1e-4), number
    return len(tokens)


def test_an_output_goes_on_behind_what_was_delivered(folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    TOKENIZER.save(str(model / "tokenizer.json"))
    options: dict[str, Any] = {"max_num_batched_tokens": 64, "max_model_len": 128, "block_size": 8}

    async def main() -> None:
        async with Runtime(model, tensor_parallel_size=1, dtype="float32", **options) as runtime:
            checks = []
            for number, kind in enumerate(ALL):
                params = SamplingParams(max_tokens=LENGTH, **kind)
                alone = [params] if params.n == 1 else [params.of_choice(i) for i in range(params.n)]
                checks += [check(runtime, number % len(KINDS), one) for one in alone]
            lengths = await asyncio.gather(*checks)
            assert min(lengths) > 1, "nothing was cut"
            assert runtime.stats().open == 0
            several = SamplingParams(n=2, seed=3, max_tokens=LENGTH, temperature=1.0, ignore_eos=True)
            choices: dict[int, list[int]] = {0: [], 1: []}
            async for output in runtime.generate(prompt_of(1), several):
                choices[output.index] += output.token_ids
            second = await outputs_of(runtime, 1, several.of_choice(1), choices[1][:9])
            assert seen(second)[0] == choices[1][9:]
            assert several.of_choice(1).seed == choice_seed(3, 1)
            await refusals(runtime)

    asyncio.run(asyncio.wait_for(main(), 120))


async def refusals(runtime: Runtime) -> None:
    """What nothing can come behind, or what is no output of the model's."""
    stop = SamplingParams(max_tokens=3, stop_token_ids=[7], stop=["%&"])
    cases: list[tuple[Sequence[Any], SamplingParams, str]] = [
        ([1, 2, 3], stop, "has 3 at most"),
        ([1], SamplingParams(max_tokens=0), "has 0 at most"),
        ([1, 7], stop, "delivered holds 7, a token that ends"),
        ([5, 6], stop, "the stop string '%&'"),
        ([1, 97], stop, "delivered holds 97; token ids are integers from 0 to 96"),
        ([-1], stop, "delivered holds -1"),
        ([True], stop, "delivered holds True"),
        (["1"], stop, "delivered holds '1'"),
        ([1], SamplingParams(n=2), "of one output, and n=2"),
    ]
    for delivered, params, message in cases:
        with pytest.raises(InvalidRequest, match=message) as refused:
            await outputs_of(runtime, 0, params, delivered)
        assert refused.value.parameter == "delivered"
    assert runtime.stats().open == 0
