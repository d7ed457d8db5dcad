"""A model of the cache that is made of its events alone is the scheduler's own."""

from __future__ import annotations

import os
from array import array
from hashlib import sha256
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.helpers import World, choices, submit
from tpworker.ipc.kv_events import Contents
from tpworker.ipc.messages import Abort, ResetPrefixCache
from tpworker.scheduler.cache_events import CacheEvents
from tpworker.scheduler.kept_blocks import KeptBlocks, Root
from tpworker.scheduler.kv_blocks import BlockPool

SIZE = 4


class Model:
    """A router's view: which hashes are there, with their tokens and what stands before them."""

    def __init__(self) -> None:
        self.contents = Contents(SIZE, "GPU")
        self.blocks: dict[int, tuple[int | None, tuple[int, ...]]] = {}

    def hear(self, events: Any) -> None:
        for kind, *fields in self.contents.told(events):
            if kind == "AllBlocksCleared":
                self.blocks.clear()
            elif kind == "BlockRemoved":
                for removed in fields[0]:
                    del self.blocks[removed]
            else:
                hashes, before, tokens, size, *_ = fields
                assert len(tokens) == len(hashes) * size
                assert before is None or before in self.blocks, "behind what was never told of"
                for number, one in enumerate(hashes):
                    assert one not in self.blocks, "told of twice"
                    self.blocks[one] = before, tuple(tokens[number * size : (number + 1) * size])
                    before = one


def truth(pool: BlockPool) -> dict[int, tuple[int | None, tuple[int, ...]]]:
    """What can be found in the pool's tree, by the same hashes."""
    digests: dict[int, bytes] = {}
    blocks: dict[int, tuple[int | None, tuple[int, ...]]] = {}
    for (parent, tokens), (node, _) in sorted(pool._children.items(), key=lambda item: item[1][0]):
        before = parent.salt if isinstance(parent, Root) else digests.get(parent)
        if before is None:
            continue  # its beginning is gone: nobody finds it
        digests[node] = digest = sha256(before + tokens).digest()
        parent_hash = None if isinstance(parent, Root) else int.from_bytes(before[:8], "big")
        blocks[int.from_bytes(digest[:8], "big")] = parent_hash, tuple(array("i", tokens))
    return blocks


any_text = st.lists(st.integers(1, 2), min_size=1, max_size=28)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.tuples(any_text, st.sampled_from(["", "s"])), min_size=1, max_size=10),
    resets=st.sets(st.integers(0, 25), max_size=2),
    aborts=st.sets(st.integers(0, 9), max_size=3),
    num_blocks=st.sampled_from([12, 20, 64]),
    num_drafts=st.sampled_from([0, 3]),
)
def test_a_model_made_of_events_is_the_schedulers_tree(
    prompts: list[tuple[list[int], str]],
    resets: set[int],
    aborts: set[int],
    num_blocks: int,
    num_drafts: int,
) -> None:
    model = Model()
    fd = os.memfd_create("kept")
    world = World(
        num_blocks=num_blocks,
        kept=KeptBlocks(fd, num_blocks, SIZE, False),
        events=CacheEvents(model.hear),
        num_drafts=num_drafts,
    )
    scheduler = world.scheduler
    for turn in range(60):
        if turn < len(prompts):
            prompt, salt = prompts[turn]
            world.submit(submit(10 * turn, prompt, salt=salt, max_tokens=10))
        if turn in resets:
            scheduler.take(ResetPrefixCache(0, turn))
            scheduler._committed.pop()
        if turn in aborts:
            scheduler.take(Abort(0, 10 * turn))
        world.compose()
        world.answer()
        scheduler._events.flush()  # type: ignore[union-attr]
        assert model.blocks == truth(scheduler.composer.pool)
    next_model = Model()
    kept = KeptBlocks(fd, num_blocks, SIZE, True)
    events = CacheEvents(next_model.hear)
    pool = BlockPool(num_blocks, SIZE, True, kept, events)
    next_model.blocks[5] = None, ()  # of the generation before
    events.flush()
    assert next_model.blocks == truth(pool)
    assert next_model.blocks.items() <= model.blocks.items(), "hashes are the same after a restart"
    os.close(fd)


def test_choices_of_one_request_are_told_of_once() -> None:
    model = Model()
    world = World(events=CacheEvents(model.hear))
    for message in choices(0, 3, list(range(1, 10))):
        world.submit(message)
    world.run()
    world.scheduler._events.flush()  # type: ignore[union-attr]
    assert len(model.blocks) >= 2
