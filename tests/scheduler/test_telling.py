"""What the scheduler tells on the status board."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.scheduler.helpers import World, submit
from tpworker.ipc.board import Field
from tpworker.ipc.messages import StepTiming
from tpworker.scheduler import telling

FIELDS = (Field.RUNNING, Field.WAITING, Field.FREE_BLOCKS, Field.TOTAL_BLOCKS)


def told(world: World, *fields: Field, is_idle: bool = True) -> list[int]:
    world.scheduler._telling.tell(0, is_idle)
    return [world.board.rows()[0][field] for field in fields]


def finish(world: World) -> None:
    while world.compose() or world.answer():
        pass


def test_how_busy_it_is() -> None:
    world = World(lookahead=0, num_blocks=17, block_size=4)  # one is the null block; 4 slots
    assert told(world, *FIELDS) == [0, 0, 16, 16]
    for number in range(5):
        world.submit(submit(number, [number] * 4, max_tokens=4))
    assert told(world, *FIELDS) == [0, 5, 16, 16]
    world.compose()
    assert told(world, *FIELDS)[:2] == [4, 1]
    assert told(world, Field.FREE_BLOCKS)[0] < 16
    assert told(world, Field.PROMPT_TOKENS, Field.PREFILLED_TOKENS, Field.OUTPUT_TOKENS) == [16, 0, 0]
    world.answer()
    assert told(world, Field.PROMPT_TOKENS, Field.PREFILLED_TOKENS, Field.OUTPUT_TOKENS) == [16, 16, 4]
    finish(world)
    assert told(world, *FIELDS) == [0, 0, 16, 16]
    assert told(world, Field.OUTPUT_TOKENS) == [5 * 4]
    for number, tokens in ((5, [1] * 4 + [2] * 4), (6, [1] * 4 + [3] * 4)):
        world.submit(submit(number, tokens, max_tokens=1))
        finish(world)
    assert told(world, Field.CACHED_TOKENS) == [8], "of both the first block was known"


def test_gaps_lie_before_steps_that_decode_and_follow_another() -> None:
    world = World(lookahead=0)

    def run(*times: tuple[int, int]) -> None:
        for started, ended in times:
            world.compose()
            world.answers[0] = replace(world.answers[0], timing=StepTiming(0, started, ended))
            world.answer()

    world.submit(submit(1, [1, 2, 3], max_tokens=3))
    run((100, 110), (117, 127), (130, 140))
    assert told(world, Field.NUM_GAPS, Field.GAPS, Field.BUSY) == [2, 7 + 3, 30]
    world.submit(submit(2, [1, 2, 3], max_tokens=2))
    run((1000, 1010), (1011, 1021))  # before the first of these there was nothing to do
    assert told(world, Field.NUM_GAPS, Field.GAPS, Field.BUSY) == [3, 7 + 3 + 1, 50]


def test_it_writes_seldom_but_what_stays_there_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    clock = iter([0, telling.INTERVAL_NS - 1, telling.INTERVAL_NS, telling.INTERVAL_NS + 1])
    monkeypatch.setattr(telling.time, "monotonic_ns", lambda: next(clock))
    for expected, is_idle in ((1, False), (1, False), (3, False), (4, True)):
        world.submit(submit(len(world.tokens), [1], max_tokens=1))
        assert told(world, Field.WAITING, is_idle=is_idle) == [expected]
