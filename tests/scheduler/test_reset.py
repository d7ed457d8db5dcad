"""After a reset of the prefix cache nothing that was computed before is found, whatever was on its way."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.helpers import VOCAB, World, choices, expected, submit
from tpworker.ipc.messages import Admission, ResetPrefixCache, Submit
from tpworker.scheduler.kept_blocks import KeptBlocks
from tpworker.testing.fake_rank import FakeRank, _Slot

SIZE = 4
PROMPT = list(range(1, 11))


class Epochs(FakeRank):
    """Knows of each place in its blocks how many resets there had been when its writer got the slot."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks, SIZE, VOCAB)
        self.now = 0
        self.of_blocks = [[-1] * SIZE for _ in range(num_blocks)]
        self._of_slots: dict[int, int] = {}

    def _admit(self, admission: Admission) -> None:
        super()._admit(admission)
        state = self.slots[admission.slot]
        self._of_slots[id(state)] = self.now
        for position in range(admission.num_cached):
            epoch = self.of_blocks[state.blocks[position // SIZE]][position % SIZE]
            assert epoch == self.now, f"found what was computed {self.now - epoch} resets ago"

    def _write(self, state: _Slot, position: int, token: int) -> None:
        super()._write(state, position, token)
        self.of_blocks[state.blocks[position // SIZE]][position % SIZE] = self._of_slots[id(state)]


class ResetWorld(World):
    def __init__(self, num_blocks: int = 64, **settings: Any) -> None:
        self.fd = os.memfd_create("kept")
        kept = KeptBlocks(self.fd, num_blocks, SIZE, False)
        super().__init__(num_blocks=num_blocks, kept=kept, **settings)
        self.rank = self.epochs = Epochs(num_blocks)
        self.num_blocks = num_blocks

    def reset(self) -> None:
        self.scheduler.take(ResetPrefixCache(0, self.epochs.now))
        assert self.scheduler._committed.pop() == ResetPrefixCache(0, self.epochs.now)
        self.epochs.now += 1
        self.scheduler.composer.check_integrity()
        assert self.kept() == set()

    def kept(self) -> set[int]:
        """The blocks that the next scheduler would find; all must be of now."""
        blocks = {entry.block for entry in KeptBlocks(self.fd, self.num_blocks, SIZE, True).read()}
        for block in blocks:
            assert set(self.epochs.of_blocks[block]) == {self.epochs.now}
        return blocks

    def finish(self, number: int) -> None:
        """Until that request has ended."""
        while number not in self.finished:
            self.compose()
            self.answer()

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def world() -> Any:
    world = ResetWorld()
    yield world
    world.close()


def test_who_runs_keeps_its_blocks_and_leaves_none(world: ResetWorld) -> None:
    world.submit(submit(1, PROMPT, max_tokens=20))
    for _ in range(4):
        world.compose()
        world.answer()
    world.reset()
    world.finish(1)
    assert world.tokens[1] == expected(submit(1, PROMPT, max_tokens=20))
    assert world.kept() == set(), "it has filled blocks since"
    for number, cached in ((2, 0), (3, 8)):
        world.submit(submit(number, PROMPT))
        world.finish(number)
        assert world.cached[number] == cached
    assert len(world.kept()) >= 2


def test_a_prompt_that_is_half_computed_is_found_by_nobody(world: ResetWorld) -> None:
    long = list(range(1, 41))  # three plans
    world.submit(submit(1, long))
    world.compose()
    world.reset()
    world.submit(submit(2, long))
    world.run()
    assert world.cached == {1: 0, 2: 0}
    assert world.scheduler.composer.num_cached_tokens == 0


any_text = st.lists(st.integers(1, 2), min_size=1, max_size=24)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.tuples(any_text, st.integers(1, 3)), min_size=1, max_size=8),
    resets=st.sets(st.integers(0, 20), max_size=4),
    late=st.integers(0, 20),
    num_blocks=st.sampled_from([14, 64]),
    num_drafts=st.sampled_from([0, 3]),
    caching=st.booleans(),
)
def test_nothing_from_before_a_reset_is_found(
    prompts: list[tuple[list[int], int]],
    resets: set[int],
    late: int,
    num_blocks: int,
    num_drafts: int,
    caching: bool,
) -> None:
    world = ResetWorld(num_blocks, num_drafts=num_drafts, prefix_caching=caching)
    messages: list[Submit] = []
    for prompt, count in prompts:
        messages += choices(10 * len(messages), count, prompt, max_tokens=12)
    for turn in range(21):
        if turn in resets:
            world.reset()
        for message in messages if turn == late else messages[:2] if turn == 0 else ():
            if message.request not in world.tokens:
                world.submit(message)
        world.compose()
        world.answer()
        world.kept()
    world.run()
    world.kept()
    for message in messages:
        assert world.tokens[message.request] == expected(message)
    world.close()
