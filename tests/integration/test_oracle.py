"""Lookahead 0, one request at a time, on one rank, is the oracle: nothing else changes a token.

fp32, a tiny random model; scheduler and ranks are real, as threads of this process.
"""

from __future__ import annotations

import itertools
import random
import threading
from pathlib import Path

import pytest

from tests.integration.conftest import VOCAB
from tpworker.ipc.arrays import pack_int32, unpack_int32
from tpworker.ipc.messages import Abort, Sampling, Submit
from tpworker.testing.in_process import InProcessGroup

Oracle = dict[int, tuple[list[int], str | None]]
"""By request, its tokens and why it ended."""


def requests() -> list[Submit]:
    """A mix: greedy and seeded, truncated and not, prompts that share prefixes, stops, short and long."""
    draw = random.Random(5)
    shared = [draw.randrange(VOCAB) for _ in range(30)]
    submits = []
    for number in range(12):
        prompt = shared[: draw.choice([0, 17, 30])] + [
            draw.randrange(VOCAB) for _ in range(draw.randint(1, 25))
        ]
        sampling = Sampling(
            temperature=draw.choice([0.0, 0.7, 1.3]),
            top_p=draw.choice([1.0, 0.9]),
            top_k=draw.choice([0, 0, 10]),
            seed=draw.randrange(2**40),
            max_tokens=draw.randint(1, 40),
            min_tokens=0,
            stop_ids=pack_int32(draw.sample(range(VOCAB), draw.choice([0, 3]))),
        )
        if number % 3 == 0:
            sampling = Sampling(0.9, 1.0, 0, number, 30, 12, pack_int32(draw.sample(range(VOCAB), 16)))
        submits.append(Submit(0, number, pack_int32(prompt), 0, sampling))
    return submits


def answers_alone(folder: Path) -> Oracle:
    """What each request gets with lookahead 0, alone, on one rank."""
    alone: Oracle = {}
    with InProcessGroup(folder, lookahead=0, prefix_caching=False) as group:
        for submit in requests():
            output = group.run([submit])[submit.request]
            alone[submit.request] = (output.tokens, output.finish_reason)
    assert {reason for _, reason in alone.values()} == {"stop", "length"}
    assert len({tuple(tokens) for tokens, _ in alone.values()}) == len(alone)
    return alone


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return answers_alone(folder)


def compare(group: InProcessGroup, oracle: Oracle) -> None:
    got = {number: (output.tokens, output.finish_reason) for number, output in group.outputs.items()}
    assert got == oracle
    group.scheduler.composer.check_integrity()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("lookahead", [0, 1, 2, 3, 4])
def test_every_lookahead_and_tp_size(folder: Path, oracle: Oracle, num_ranks: int, lookahead: int) -> None:
    with InProcessGroup(folder, num_ranks, lookahead=lookahead, check_agreement=True) as group:
        group.run(requests())
        compare(group, oracle)
        assert sum(output.num_cached for output in group.outputs.values()) > 0, "no prefix hit"


@pytest.mark.parametrize(
    ("num_ranks", "lookahead", "tokens"), [(1, 0, 32), (1, 2, 100), (2, 2, 40), (2, 0, 9)]
)
def test_batches_padded_to_the_sizes_of_graphs(
    folder: Path,
    oracle: Oracle,
    num_ranks: int,
    lookahead: int,
    tokens: int,
) -> None:
    """What CUDA ranks capture, run as it is, steps with chunks too; and the warm-up leaves no trace."""
    with InProcessGroup(
        folder,
        num_ranks,
        lookahead=lookahead,
        max_num_seqs=7,
        max_num_batched_tokens=tokens,
        prepare=True,
    ) as group:
        group.run(requests())
        compare(group, oracle)


@pytest.mark.parametrize(("num_ranks", "lookahead"), [(1, 0), (1, 2), (2, 2), (2, 4), (3, 1), (4, 3), (8, 2)])
def test_preemption(folder: Path, oracle: Oracle, num_ranks: int, lookahead: int) -> None:
    with InProcessGroup(folder, num_ranks, num_kv_blocks=20, lookahead=lookahead) as group:
        group.run(requests())
        compare(group, oracle)
        assert group.scheduler.composer.num_preemptions > 0


@pytest.mark.parametrize(("num_ranks", "prepare"), [(1, False), (2, False), (2, True)])
def test_random_delays_of_steps_and_copies(
    folder: Path, oracle: Oracle, num_ranks: int, prepare: bool
) -> None:
    """Invariant 4, too: a ring row or a buffer that is reused early would be caught in the act."""
    draw = random.Random(1)
    with InProcessGroup(
        folder,
        num_ranks,
        lookahead=3,
        jitter=lambda: draw.choice([0, 0, 0.002, 0.01]),
        max_num_seqs=5,
        prepare=prepare,
    ) as group:
        group.run(requests())
        compare(group, oracle)


def test_requests_that_come_and_go_in_between(folder: Path, oracle: Oracle) -> None:
    with InProcessGroup(folder, 2, lookahead=2, max_num_seqs=3, max_num_batched_tokens=10) as group:
        for submit in requests():
            group.send(submit)
            doomed = Submit(0, 100 + submit.request, submit.tokens, 0, submit.sampling)
            group.send(doomed)
            group.step(60)
            group.send(Abort(0, doomed.request))
            aborted = group.outputs.pop(doomed.request)
            whole = oracle[submit.request][0]
            assert aborted.tokens == whole[: len(aborted.tokens)]
            group.outputs.setdefault(doomed.request, aborted).finish_reason = "abort"
        group.wait()
        for number in oracle:
            del group.outputs[100 + number]
        compare(group, oracle)


def test_a_restart_goes_on_where_the_client_is(folder: Path, oracle: Oracle) -> None:
    """Re-admitted as prompt + delivered tokens, a request gives the rest of its tokens."""
    with InProcessGroup(folder, 2, lookahead=2) as group:
        again = []
        for submit in requests():
            delivered = oracle[submit.request][0][: submit.request]
            if len(delivered) == len(oracle[submit.request][0]):
                delivered = []
            known = [*unpack_int32(submit.tokens), *delivered]
            message = Submit(0, submit.request, pack_int32(known), len(delivered), submit.sampling)
            again.append(message)
            group.send(message)
            group.outputs[submit.request].tokens = list(delivered)
        group.wait()
        compare(group, oracle)


def test_overlap_is_real(folder: Path) -> None:
    """Step N + 1 is launched before the result of N is known, and before N is even done."""
    submit = Submit(0, 0, pack_int32([1, 2, 3]), 0, Sampling(0.0, 1.0, 0, 0, 30, 0, b""))

    def slow_steps() -> float:
        return 0.005 if threading.current_thread().name == "compute" else 0.0

    with InProcessGroup(folder, lookahead=2, jitter=slow_steps) as group:
        group.run([submit])
        steps = [step.timing for step in group.steps]
    early = [following.launched < step.ended for step, following in itertools.pairwise(steps)]
    assert sum(early) > len(early) * 3 // 4
    with InProcessGroup(folder, lookahead=0, jitter=slow_steps) as group:
        group.run([submit])
        steps = [step.timing for step in group.steps]
    assert not any(following.launched < step.ended for step, following in itertools.pairwise(steps))
