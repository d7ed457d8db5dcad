"""Real scheduler processes, one after the other, over the memory of ranks that this test plays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.scheduler.helpers import VOCAB, expected, submit
from tests.scheduler.kept_world import Memory
from tpworker.ipc.arrays import pack_int32, unpack_int32
from tpworker.ipc.board import Board
from tpworker.ipc.channels import Channel, new_address
from tpworker.ipc.child import (
    RANK_NAME,
    SCHEDULER_NAME,
    SCHEDULER_STANDBY,
    SchedulerBoot,
    SchedulerSettings,
    board_names,
)
from tpworker.ipc.masks import MaskBoard
from tpworker.ipc.messages import (
    Allocate,
    BatchPlan,
    Message,
    RankLoaded,
    RankReady,
    SchedulerReady,
    StepOutput,
    Stop,
    Submit,
)
from tpworker.runtime.standby import Standby
from tpworker.scheduler.kept_blocks import KeptBlocks

pytestmark = pytest.mark.usefixtures("nothing_left")

NUM_RANKS, NUM_BLOCKS, SIZE = 2, 32, 4
PROMPT = list(range(1, 11))
SECONDS = 30.0


class Group:
    """One generation: a scheduler process, and this test in the place of the runtime and the ranks."""

    def __init__(self, generation: int, fd: int, memory: Memory) -> None:
        self.generation, self.fd, self.memory = generation, fd, memory
        self.tokens: list[int] = []
        self.is_finished = False
        settings = SchedulerSettings(2, 4, 16, 64, VOCAB, SIZE, True, 60.0, 60.0)
        self._board = Board.create(board_names(NUM_RANKS))
        self._masks = MaskBoard.create(settings.max_num_seqs, VOCAB)
        addresses = [new_address(f"plan{rank}") for rank in range(NUM_RANKS)]
        self.runtime, result_address = Channel.bind(new_address("runtime")), new_address("result")
        boot = SchedulerBoot(
            generation, SCHEDULER_NAME, 20, 0, NUM_RANKS, self.runtime.address, tuple(addresses),
            result_address, self._board.fd, self._masks.fd, settings, fd,
        )  # fmt: skip
        self.standby = Standby(SCHEDULER_STANDBY, "tpworker.scheduler", "cpu")
        self.process = self.standby.fork(boot)
        self.plans = [Channel.connect(a, RANK_NAME.format(i), generation) for i, a in enumerate(addresses)]
        self.results = Channel.connect(result_address, RANK_NAME.format(0), generation)

    def offer(self, has_kept: bool) -> None:
        """Until the scheduler says how many blocks it shall be."""
        for rank, channel in enumerate(self.plans):
            channel.send(RankLoaded(self.generation, rank, NUM_BLOCKS, has_kept))
        for channel in self.plans:
            assert channel.receive(SECONDS) == Allocate(self.generation, NUM_BLOCKS)

    def ready(self) -> int:
        """Returns the number of blocks that were kept."""
        for rank, channel in enumerate(self.plans):
            channel.send(RankReady(self.generation, rank))
        self.runtime.accept(SCHEDULER_NAME, self.generation, SECONDS)
        message = self.runtime.receive(SECONDS)
        assert isinstance(message, SchedulerReady)
        return message.num_kept_blocks

    def submit(self, message: Submit) -> None:
        self.runtime.send(replace(message, generation=self.generation))

    def step(self) -> None:
        """A plan is executed and answered, and its tokens are delivered."""
        plan: Message | None = None
        for channel in self.plans:
            plan = channel.receive(SECONDS)
        assert isinstance(plan, BatchPlan)
        self.results.send(self.memory.execute(plan))
        output = self.runtime.receive(SECONDS)
        assert isinstance(output, StepOutput)
        self.tokens += unpack_int32(output.tokens)
        self.is_finished = bool(output.finished)

    def num_known(self) -> int:
        return len(list(KeptBlocks(self.fd, NUM_BLOCKS, SIZE, True).read()))

    def close(self) -> None:
        self.standby.close()  # and its child with it
        self.process.close()
        for channel in (*self.plans, self.results, self.runtime):
            channel.close()
        self._board.close()
        self._masks.close()


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("kept")
    yield fd
    os.close(fd)


def test_a_scheduler_that_was_killed_is_followed_by_one_that_finds_what_it_knew(fd: int) -> None:
    message = submit(1, PROMPT, max_tokens=30)
    first = Group(0, fd, Memory(NUM_BLOCKS, SIZE))
    first.offer(False)
    assert first.ready() == 0
    first.submit(message)
    for _ in range(9):
        first.step()
    first.close()

    second = Group(1, fd, Memory(NUM_BLOCKS, SIZE, first.memory))
    second.offer(True)
    num_known = (len(PROMPT) + 9 - 1) // SIZE
    assert second.ready() in (num_known - 1, num_known), "the last it may not have come to write"
    tokens = pack_int32([*PROMPT, *first.tokens])
    second.submit(replace(message, tokens=tokens, num_delivered=len(first.tokens)))
    while not second.is_finished:
        second.step()
    assert first.tokens + second.tokens == expected(message)
    second.runtime.send(Stop(1))
    assert second.process.wait(SECONDS)
    assert second.process.status == 0
    assert second.num_known() >= num_known
    second.close()

    third = Group(2, fd, Memory(NUM_BLOCKS, SIZE))
    third.offer(False)
    assert third.num_known() == 0, "cleared before there is another cache: it may be killed right now"
    assert third.ready() == 0
    third.close()
