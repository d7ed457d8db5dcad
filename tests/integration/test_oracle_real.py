"""The default model at TP 8: scheduler, plan stream, barrier and eight ranks, against one rank alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpworker.ipc.arrays import pack_int32
from tpworker.ipc.messages import Sampling, Submit
from tpworker.testing.in_process import InProcessGroup

PROMPTS = (
    [504, 3575, 282, 4649, 314],
    [1604, 7604, 5340, 24, 94, 731],
    [5345, 1980, 253, 655, 28, 281, 253, 1165, 9353, 411, 260, 5109, 28],
    [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198],
)


def answers(folder: Path, num_ranks: int, lookahead: int) -> dict[int, tuple[list[int], str | None]]:
    """Greedy and seeded requests, all at once."""
    submits = [
        Submit(0, number, pack_int32(prompt), 0, Sampling(temperature, 1.0, 0, number, 20, 0, b""))
        for number, (prompt, temperature) in enumerate(
            (prompt, temperature) for prompt in PROMPTS for temperature in (0.0, 0.8)
        )
    ]
    with InProcessGroup(folder, num_ranks, lookahead=lookahead, check_agreement=True) as group:
        outputs = group.run(submits, 240)
        return {number: (output.tokens, output.finish_reason) for number, output in outputs.items()}


@pytest.mark.slow
def test_eight_ranks_say_what_one_says(real_model: Path) -> None:
    alone = answers(real_model, 1, 0)
    assert len({tuple(tokens) for tokens, _ in alone.values()}) == len(alone)
    assert answers(real_model, 8, 2) == alone
