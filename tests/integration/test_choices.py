"""n choices of one request are, token for token, n requests of their own with the choices' seeds.

fp32, a tiny random model; first scheduler and ranks as threads of this process, then as processes, through
`Runtime` and `SyncRuntime`.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import VOCAB
from tpworker import Runtime, SamplingParams, SyncRuntime
from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.messages import Abort, Sampling, Submit
from tpworker.sampling_params import choice_seed
from tpworker.testing.in_process import InProcessGroup

COUNT = 3
BLOCK = 8
LENGTHS = [5, 16, 29, 61]
"""Of the prompts: shorter than a block; whole blocks; more than one; and more than a step's budget."""

Outputs = dict[int, tuple[list[int], str | None]]


def requests() -> list[list[Submit]]:
    """Several requests of three choices each, as the runtime sends them."""
    draw = random.Random(3)
    groups = []
    for first, length in zip(range(0, 100, 10), LENGTHS, strict=False):
        prompt = pack_int32([draw.randrange(VOCAB) for _ in range(length)])
        stops = pack_int32(draw.sample(range(VOCAB), 3))
        seed = draw.randrange(2**40)
        groups.append(
            [
                Submit(
                    0, first + i, prompt, 0, Sampling(1.0, 1.0, 0, choice_seed(seed, i), 30, 0, stops), first
                )
                for i in range(COUNT)
            ]
        )  # fmt: skip
    return groups


def alone(submit: Submit) -> Submit:
    return Submit(0, submit.request, submit.tokens, 0, submit.sampling)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Outputs:
    """Each choice as a single request, one after the other."""
    found: Outputs = {}
    with InProcessGroup(folder, lookahead=0, prefix_caching=False) as group:
        for submit in (submit for choices in requests() for submit in choices):
            output = group.run([alone(submit)])[submit.request]
            found[submit.request] = (output.tokens, output.finish_reason)
    assert {reason for _, reason in found.values()} == {"stop", "length"}
    assert len({tuple(tokens) for tokens, _ in found.values()}) == len(found)
    return found


def outputs(group: InProcessGroup) -> Outputs:
    group.scheduler.composer.check_integrity()
    return {number: (output.tokens, output.finish_reason) for number, output in group.outputs.items()}


def prefilled(group: InProcessGroup) -> int:
    return sum(step.num_prefill_tokens for step in group.steps)


DUE = sum(length + (COUNT - 1) * (length - (length - 1) // BLOCK * BLOCK) for length in LENGTHS)
"""Tokens of all prompts, computed once, and what is left of each for the other choices."""


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("lookahead", [0, 2])
def test_choices_are_requests_with_their_seeds_but_for_one_prefill(
    folder: Path, oracle: Outputs, num_ranks: int, lookahead: int, caching: bool
) -> None:
    with InProcessGroup(
        folder, num_ranks, lookahead=lookahead, prefix_caching=caching, check_agreement=True
    ) as group:
        group.run([submit for choices in requests() for submit in choices])
        assert outputs(group) == oracle
        assert prefilled(group) == DUE


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(("num_ranks", "lookahead"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_with_preemption(
    folder: Path, oracle: Outputs, num_ranks: int, lookahead: int, caching: bool
) -> None:
    with InProcessGroup(
        folder, num_ranks, num_kv_blocks=16, lookahead=lookahead, prefix_caching=caching
    ) as group:
        group.run([submit for choices in requests() for submit in choices])
        assert outputs(group) == oracle
        assert group.scheduler.composer.num_preemptions > 0


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("lookahead", [0, 2])
def test_with_a_prefix_hit(folder: Path, oracle: Outputs, num_ranks: int, lookahead: int) -> None:
    with InProcessGroup(folder, num_ranks, lookahead=lookahead) as group:
        first = [alone(choices[0]) for choices in requests()]
        group.run([Submit(0, 1000 + one.request, one.tokens, 0, one.sampling) for one in first])
        before = prefilled(group)
        for one in first:
            del group.outputs[1000 + one.request]
        group.run([submit for choices in requests() for submit in choices])
        assert outputs(group) == oracle
        rest = sum(COUNT * (length - (length - 1) // BLOCK * BLOCK) for length in LENGTHS)
        assert prefilled(group) - before == rest, "nothing that was cached is computed again"


@pytest.mark.parametrize("prepare", [False, True])
def test_with_few_slots_and_delays_of_steps_and_copies(folder: Path, oracle: Outputs, prepare: bool) -> None:
    draw = random.Random(1)
    with InProcessGroup(
        folder,
        2,
        lookahead=3,
        jitter=lambda: draw.choice([0, 0, 0.002, 0.01]),
        max_num_seqs=4,
        max_num_batched_tokens=9,
        prepare=prepare,
    ) as group:
        group.run([submit for choices in requests() for submit in choices])
        assert outputs(group) == oracle


def test_what_is_left_of_a_group_after_an_abort_and_after_a_restart(folder: Path, oracle: Outputs) -> None:
    groups = requests()
    with InProcessGroup(folder, 2, lookahead=2, max_num_batched_tokens=16) as group:
        for choices in groups:
            for submit in choices:
                group.send(submit)
        group.send(Abort(0, groups[3][0].request))  # while it computes their prompt, or before
        group.step(60)
        group.outputs[groups[3][0].request].finish_reason = "abort"
        group.wait()
        gone = group.outputs.pop(groups[3][0].request).tokens
        rest = {number: whole for number, whole in oracle.items() if number != groups[3][0].request}
        assert gone == oracle[groups[3][0].request][0][: len(gone)]
        assert outputs(group) == rest
    with InProcessGroup(folder, 2, lookahead=2) as group:  # the first choices had ended before the restart
        for choices in groups:
            for submit in choices[1:]:
                whole = oracle[submit.request][0]
                delivered = whole[: min(submit.request % 10 * 3, len(whole) - 1)]
                tokens = submit.tokens + pack_int32(delivered)
                group.send(Submit(0, submit.request, tokens, len(delivered), submit.sampling, submit.group))
                group.outputs[submit.request].tokens = list(delivered)
        group.wait()
        assert outputs(group) == {number: whole for number, whole in oracle.items() if number % 10}


# ---------------------------------------------------------------------------------- as processes

PROMPTS = [list(range(3, 60)), [7] * 20]
PARAMS = SamplingParams(
    temperature=1.0, seed=11, n=COUNT, max_tokens=24, detokenize=False, stop_token_ids=range(5, 15)
)


def options(**changes: Any) -> dict[str, Any]:
    return {"device": "cpu", "load_format": "dummy", "dtype": "float32", "num_kv_blocks": 64, **changes}


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("caching", [True, False])
def test_through_the_runtime(model_folder: Path, caching: bool) -> None:
    async def main() -> None:
        config = options(tensor_parallel_size=2, prefix_caching=caching, max_num_batched_tokens=64)
        async with Runtime(model_folder, **config) as runtime:

            async def collect(prompt: list[int], params: SamplingParams) -> list[list[int]]:
                found: dict[int, list[int]] = defaultdict(list)
                async for output in runtime.generate(prompt, params):
                    found[output.index] += output.token_ids
                return [found[index] for index in sorted(found)]

            together = await asyncio.gather(*(collect(prompt, PARAMS) for prompt in PROMPTS))
            stats = runtime.stats()
            assert (stats.prompt_tokens, stats.cached_tokens) == (sum(map(len, PROMPTS)), 0)
            assert (stats.finished, stats.open) == (6, 0)
            for prompt, choices in zip(PROMPTS, together, strict=True):
                singles = [await collect(prompt, PARAMS.of_choice(index)) for index in range(COUNT)]
                assert choices == [tokens for (tokens,) in singles]
                assert len({tuple(tokens) for tokens in choices}) == COUNT
            assert len({len(tokens) for choices in together for tokens in choices}) > 1

    asyncio.run(main())


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("nothing_left")
def test_through_the_blocking_form(model_folder: Path) -> None:
    with SyncRuntime(model_folder, **options(max_num_seqs=4)) as runtime:
        completions = runtime.complete(PROMPTS, PARAMS)
        assert [completion.index for completion in completions] == [0, 1, 2] * 2
        singles = [
            runtime.complete([prompt], PARAMS.of_choice(index))[0]
            for prompt in PROMPTS
            for index in range(COUNT)
        ]
        assert [c.token_ids for c in completions] == [single.token_ids for single in singles]
        assert [c.finish_reason for c in completions] == [single.finish_reason for single in singles]
