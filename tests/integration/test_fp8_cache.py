"""Keys and values in FP8: answers do not depend on lookahead, ranks, chunks, preemption or prefix hits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_features import ids, sampling
from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.messages import Submit
from tpworker.testing.in_process import InProcessGroup, Output


def submits() -> list[Submit]:
    """Six, of which three begin alike; two are random."""
    prompts = [ids(7, 24) + ids(seed, 5 + 7 * seed) if seed % 2 else ids(seed, 9) for seed in range(6)]
    return [
        Submit(0, i, pack_int32(prompt), 0, sampling(*(["random"] if i > 3 else []), seed=i))
        for i, prompt in enumerate(prompts)
    ]


def answers(folder: Path, num_ranks: int = 1, **options: Any) -> list[list[int]]:
    with InProcessGroup(folder, num_ranks, check_agreement=True, **options) as group:
        outputs: dict[int, Output] = group.run(submits())
        return [outputs[i].tokens for i in range(6)]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    return answers(folder, lookahead=0, prefix_caching=False, kv_cache_dtype="fp8")


@pytest.mark.parametrize(
    "options",
    [
        {"num_ranks": 2},
        {"num_kv_blocks": 24},  # preempts
        {"max_num_batched_tokens": 9, "lookahead": 4},
        {"num_drafts": 3, "num_ranks": 2},
    ],
    ids=str,
)
def test_answers_are_the_same(folder: Path, expected: list[list[int]], options: dict[str, Any]) -> None:
    assert answers(folder, kv_cache_dtype="fp8", **options) == expected


def test_rounding_shows(folder: Path) -> None:
    """In logprobs: this model's tokens are likely enough to stay."""
    told = []
    for kv_cache_dtype in ("auto", "fp8"):
        with InProcessGroup(folder, lookahead=0, kv_cache_dtype=kv_cache_dtype) as group:
            asked = Submit(0, 0, pack_int32(ids(7, 24)), 0, sampling("logprobs", seed=1))
            told.append([logprob for logprob, _ in group.run([asked])[0].logprobs])
    differences = [abs(one - other) for one, other in zip(*told, strict=True)]
    assert 1e-4 < max(differences) < 0.3
