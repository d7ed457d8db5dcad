"""A scheduler that may be killed at any place, and a rank that executes plans late, or never, or one half."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.scheduler.helpers import VOCAB, Wire, World, expected
from tpworker.ipc.arrays import pack_int32, unpack_int32
from tpworker.ipc.messages import BatchPlan, Submit
from tpworker.ipc.wire import decode
from tpworker.scheduler.kept_blocks import KeptBlocks, Root
from tpworker.testing.fake_rank import FakeRank, _Slot

Text = tuple[int, ...]


class Killed(Exception):
    """The process is gone at this place."""


class Memory(FakeRank):
    """A rank, of whose blocks it is known which text each place was computed for."""

    def __init__(self, num_blocks: int, block_size: int, before: Memory | None = None) -> None:
        super().__init__(num_blocks, block_size, VOCAB)
        self.texts: list[list[Text]] = [[()] * block_size for _ in range(num_blocks)]
        if before is not None:
            self._blocks, self.texts = before._blocks, before.texts
        self.num_writes_left: int | None = None
        """Then it is killed."""

    def _write(self, state: _Slot, position: int, token: int) -> None:
        if self.num_writes_left is not None:
            if not self.num_writes_left:
                raise Killed
            self.num_writes_left -= 1
        super()._write(state, position, token)
        text = (*self._context(state, position), token)
        self.texts[state.blocks[position // self.block_size]][position % self.block_size] = text


def check(fd: int, memory: Memory, texts_of: dict[Root, list[Text]]) -> int:
    """Asserts that what a next scheduler would find is what the blocks hold.

    Returns:
        How many blocks that is.
    """
    size = memory.block_size
    table = KeptBlocks(fd, len(memory.texts), size, True)
    known: dict[int, tuple[Root, Text]] = {}
    for node, block, parent, tokens in table.read():
        if isinstance(parent, Root):
            root, before = parent, Text()
        elif parent in known:
            root, before = known[parent]
        else:
            continue  # its beginning is gone: nobody can find it
        text = before + tuple(array("i", tokens))
        known[node] = root, text
        ends = [text[: len(text) - size + i + 1] for i in range(size)]
        assert memory.texts[block] == ends, f"block {block} holds something else than content {node}"
        assert any(whole[: len(text)] == text for whole in texts_of[root]), "a text of another salt"
    return len(known)


class Watched:
    """A memoryview that tells of each store into it."""

    def __init__(self, view: Any, stored: Callable[[], None]) -> None:
        self._view, self._stored = view, stored

    def __getitem__(self, place: Any) -> Any:
        return self._view[place]

    def __setitem__(self, place: Any, value: Any) -> None:
        for part, item in _parts(place, value):
            self._view[part] = item
            self._stored()


def _parts(place: Any, value: Any) -> list[tuple[Any, Any]]:
    """A long store is made of shorter ones, between which the process may end."""
    if not isinstance(place, slice):
        return [(place, value)]
    half = len(value) // 2
    middle = place.start + half
    return [(slice(place.start, middle), value[:half]), (slice(middle, place.stop), value[half:])]


class Sender(Wire):
    """Tells when a plan has been sent."""

    def __init__(self, sent: Callable[[BatchPlan], None]) -> None:
        super().__init__()
        self._sent = sent

    def send_encoded(self, data: bytes) -> None:
        plan = decode(data)
        assert isinstance(plan, BatchPlan)
        self._sent(plan)


class KeptWorld(World):
    """A world of which a next one can be made. What it keeps is checked whenever anything changes.

    Args:
        before: the world before it, that was killed.
        deadline: stores to the table, plans sent and plans executed until it is killed; None: it is not.
    """

    def __init__(
        self,
        *arguments: Any,
        before: KeptWorld | None = None,
        deadline: int | None = None,
        num_blocks: int = 64,
        block_size: int = 4,
        **settings: Any,
    ) -> None:
        self.fd = before.fd if before else os.memfd_create("kept")
        kept = KeptBlocks(self.fd, num_blocks, block_size, before is not None)
        super().__init__(*arguments, num_blocks=num_blocks, block_size=block_size, kept=kept, **settings)
        self.num_kept = self.scheduler.composer.pool.num_cached
        self.memory = Memory(num_blocks, block_size, before and before.memory)
        self.rank = self.memory
        self.submitted: dict[int, Submit] = {}
        self.texts_of: dict[Root, list[Text]] = before.texts_of if before else {}
        self.deadline = deadline
        self.sent: deque[BatchPlan] = deque()
        self.scheduler._plans = [Sender(self._take)]  # type: ignore[list-item]
        watched: Any = kept
        watched._entries = Watched(kept._entries, self.happened)
        watched._bytes = Watched(kept._bytes, self.happened)

    def happened(self) -> None:
        """Something that must leave what is kept true. Raises Killed when its time has come."""
        check(self.fd, self.memory, self.texts_of)
        if self.deadline is not None:
            self.deadline -= 1
            if self.deadline < 0:
                raise Killed

    def submit(self, message: Submit) -> None:
        super().submit(message)
        self.submitted[message.request] = message
        tokens = unpack_int32(message.tokens).tolist()
        if message.num_delivered:
            self.tokens[message.request] = tokens[-message.num_delivered :]
        else:
            owner = message.request if message.group is None else message.group
            root = self.scheduler.composer.pool.root(message.salt, owner)
            self.texts_of.setdefault(root, []).append((*tokens, *expected(message)))

    def _take(self, plan: BatchPlan) -> None:
        self.sent.append(plan)
        self.happened()
        while self.sent and self._random.random() < 0.4:
            self._execute_one()

    def _execute_one(self) -> None:
        plan = self.sent.popleft()
        self.executed.append(plan)
        self.answers.append(self.rank.execute(plan))
        self.happened()

    def execute(self) -> None:
        self.scheduler.composer.check_integrity()

    def answer(self) -> bool:
        if not self.answers and self.sent:
            self._execute_one()
        return super().answer()

    def go_on_without_scheduler(self) -> None:
        """Ranks execute what was sent, up to any place, before they are killed too."""
        while self.sent and self._random.random() < 0.7:
            self.memory.execute(self.sent.popleft())
        if self.sent:
            self.memory.num_writes_left = self._random.randint(0, 12)
            with contextlib.suppress(Killed):
                self.memory.execute(self.sent.popleft())

    def unfinished(self) -> list[Submit]:
        """What the runtime sends to the next scheduler."""
        again = []
        for number, message in self.submitted.items():
            if number in self.finished:
                continue
            tokens, output = unpack_int32(message.tokens), self.tokens[number]
            prompt = tokens[: len(tokens) - message.num_delivered]
            tokens_now = pack_int32([*prompt, *output])
            again.append(replace(message, tokens=tokens_now, num_delivered=len(output)))
        return again
