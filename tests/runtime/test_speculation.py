"""Steps of several tokens, from a scheduler that echoes: consumers get the same, and drafts are counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.test_runtime import MakeRuntime, collect, ids_only, run, tokens_of
from tests.server.fake_runtime import byte_tokenizer
from tpworker import RequestOutput, Runtime, SamplingParams, SyncRuntime

pytestmark = pytest.mark.usefixtures("nothing_left")

DRAFTS = {"speculative_method": "ngram", "num_speculative_tokens": 3}


async def whole(runtime: Runtime, prompt: list[int] | str, params: SamplingParams) -> list[RequestOutput]:
    """All of each choice as one output, by index, without its name."""
    outputs = await collect(runtime, prompt, params, request_id="mine")
    return [_joined([one for one in outputs if one.index == index]) for index in range(params.n)]


def _joined(outputs: list[RequestOutput]) -> RequestOutput:
    logprobs = tuple(one for output in outputs for one in output.logprobs or ())
    return outputs[-1]._replace(
        text="".join(output.text for output in outputs),
        token_ids=tuple(tokens_of(outputs)),
        logprobs=None if outputs[-1].logprobs is None else logprobs,
        prompt_logprobs=next((o.prompt_logprobs for o in outputs if o.prompt_logprobs), None),
    )


def test_what_comes_is_the_same(fake_runtime: MakeRuntime, model_folder: Path) -> None:
    byte_tokenizer()._backend.save(str(model_folder / "tokenizer.json"))
    cases: list[tuple[list[int] | str, SamplingParams]] = [
        ([5, 6, 7, 8, 9], params)
        for params in (
            ids_only(1),
            ids_only(2),
            ids_only(23),
            ids_only(23, n=3),
            ids_only(23, logprobs=2, prompt_logprobs=1),
            ids_only(23, n=2, logprobs=0),
            ids_only(23, stop_token_ids=[9]),
            ids_only(23, stop_token_ids=[9], ignore_eos=True, logprobs=1),
            ids_only(0, prompt_logprobs=1),
        )
    ]
    for stop in (["World"], ["or", "World"], ["d!"], ["!H", "nothing"], ["nothing"]):
        cases.append(("Hello World!", SamplingParams(max_tokens=40, stop=stop, logprobs=0)))
        cases.append(("Hello World!", SamplingParams(max_tokens=40, stop=stop, min_tokens=10, n=2)))

    async def main(**options: object) -> list[list[RequestOutput]]:
        async with fake_runtime(**options) as runtime:
            return [await whole(runtime, prompt, params) for prompt, params in cases]

    plain, drafted = run(main), run(lambda: main(**DRAFTS))
    without = [[one._replace(num_draft_tokens=0, num_accepted_tokens=0) for one in case] for case in drafted]
    assert without == plain
    assert all(one[-2:] == (0, 0) for case in plain for one in case)
    assert sum(one.num_accepted_tokens > 0 for case in drafted for one in case) > 20
    assert {one.finish_reason for case in plain for one in case} == {"stop", "length"}


def test_drafts_are_counted(fake_runtime: MakeRuntime) -> None:
    """The scheduler's steps yield 1, 2, 3, 4, 1, 2 … tokens; the first of a request has no drafts."""

    async def main() -> None:
        async with fake_runtime(**DRAFTS) as runtime:
            assert str(runtime.speculation).startswith("up to 3 drafts a step by look-up")
            assert runtime.stats().draft_tokens == ()
            outputs = await collect(runtime, [5, 6, 7], ids_only(21))
            assert tokens_of(outputs) == [5, 6, 7] * 7
            assert outputs[-1][-2:] == (3 * 8, 12)  # 1 | 2 3 4 1 2 3 4 1: eight steps with drafts
            counted = [output[-2:] for output in outputs]
            assert counted == sorted(counted)
            stats = runtime.stats()
            assert (stats.draft_tokens, stats.accepted_tokens) == ((8, 8, 8), (6, 4, 2))
            assert stats.output_tokens == 21
            assert [step.num_drafts for step in stats.recent_steps] == [3] * 9

    run(main)


def test_a_completion_has_the_counts(model_folder: Path) -> None:
    modules = {
        "rank_module": "tests.children.idle_rank",
        "scheduler_module": "tpworker.testing.fake_scheduler",
    }
    with SyncRuntime(model_folder, **modules, **DRAFTS) as runtime:
        first, second = runtime.complete([[5, 6, 7]], ids_only(21, n=2))
    assert first.token_ids == second.token_ids == (5, 6, 7) * 7
    assert (first.num_draft_tokens, first.num_accepted_tokens) == (24, 12)
