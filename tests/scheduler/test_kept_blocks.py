"""What a scheduler leaves to the next one is true, wherever it is killed, and nobody sees that it was."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import textwrap
import time
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.helpers import VOCAB, World, choices, expected, submit
from tests.scheduler.kept_world import KeptWorld, Killed, check
from tpworker.ipc.arrays import pack_int32, unpack_int32
from tpworker.ipc.messages import Abort, Failed, RankLoaded, Submit
from tpworker.scheduler.agreement import Offer
from tpworker.scheduler.kept_blocks import Entry, KeptBlocks, Root
from tpworker.scheduler.kv_blocks import BlockPool

SIZE = 4
ROOT = Root(bytes(32))
PROMPT = list(range(1, 11))


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("kept")
    yield fd
    os.close(fd)


def text(*values: int) -> bytes:
    return array("i", values).tobytes()


# ------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_what_is_written_is_read_by_the_next_one(fd: int, block_size: int) -> None:
    tokens = [text(*range(i, i + block_size)) for i in range(4)]
    entries = [
        Entry(1, 9, Root(b"s" * 32), tokens[0]),
        Entry(3, 2, 1, tokens[1]),
        Entry(4, 5, Root(bytes(32), 0), tokens[2]),
        Entry(2**40, 7, Root(bytes(32), 2**62), tokens[3]),
    ]
    table = KeptBlocks(fd, 10, block_size, False)
    for node, block, parent, content in entries:
        table.write(block, node, parent, content)
    table.write(3, 2, 1, tokens[1])
    table.clear(3)
    assert list(KeptBlocks(fd, 10, block_size, True).read()) == entries


@pytest.mark.parametrize(("num_blocks", "block_size"), [(11, SIZE), (10, 2 * SIZE), (10, 3)])
def test_a_table_of_another_cache_is_cleared(fd: int, num_blocks: int, block_size: int) -> None:
    """The last one has as many bytes."""
    KeptBlocks(fd, 10, SIZE, False).write(2, 1, ROOT, text(*range(SIZE)))
    assert list(KeptBlocks(fd, num_blocks, block_size, True).read()) == []
    assert list(KeptBlocks(fd, 10, SIZE, True).read()) == []


def test_a_table_whose_cache_is_gone_is_cleared(fd: int) -> None:
    KeptBlocks(fd, 10, SIZE, False).write(2, 1, ROOT, text(*range(SIZE)))
    assert list(KeptBlocks(fd, 10, SIZE, False).read()) == []


def test_only_if_all_ranks_have_kept_what_is_agreed_on_it_is_kept() -> None:
    def offer(*ranks: tuple[int, bool]) -> Offer:
        return Offer.of([RankLoaded(3, rank, *loaded) for rank, loaded in enumerate(ranks)])

    assert offer((8, True), (8, True)) == (8, True)
    assert offer((8, True), (8, False)) == (8, False)
    assert offer((8, True), (9, True)) == (8, False)


WRITER = """
import sys
from tpworker.scheduler.kept_blocks import KeptBlocks
table, node = KeptBlocks(int(sys.argv[1]), 8, 256, True), int(sys.argv[2])
print("begins", flush=True)
while True:
    node += 1
    block = 1 + node % 7
    table.clear(block)
    table.write(block, node, node - 7, node.to_bytes(8, "little") * 128)
"""


def test_a_writer_that_is_killed_leaves_nothing_half_written(fd: int) -> None:
    KeptBlocks(fd, 8, 256, False)
    newest, moment = 7, random.Random(0)
    for _ in range(8):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(fd), str(newest)]
        with subprocess.Popen(command, pass_fds=[fd], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begins\n"
            time.sleep(moment.random() / 100)
            process.kill()
        found = list(KeptBlocks(fd, 8, 256, True).read())
        assert len(found) >= 6, "all but the one that was being written"
        for node, block, parent, tokens in found:
            assert (block, parent) == (1 + node % 7, node - 7)
            assert tokens == node.to_bytes(8, "little") * 128
        assert found[-1].node > newest
        newest = found[-1].node


# -------------------------------------------------------------------------------- the next pool


def write_text(table: KeptBlocks, first: int, blocks: list[int], nodes: list[int]) -> None:
    """A text whose blocks are `first` repeated."""
    for place, (block, node) in enumerate(zip(blocks, nodes, strict=True)):
        table.write(block, node, nodes[place - 1] if place else ROOT, text(*[first] * SIZE))


def test_a_pool_finds_what_was_kept_and_evicts_old_texts_first_and_their_ends_before_them(fd: int) -> None:
    table = KeptBlocks(fd, 10, SIZE, False)
    write_text(table, 1, [5, 6], [1, 2])
    write_text(table, 2, [7, 3, 8], [3, 4, 6])
    table.write(4, 5, 2, text(*[1] * SIZE))  # the first text goes on, but the second has the newest end
    pool = BlockPool(10, SIZE, True, KeptBlocks(fd, 10, SIZE, True))
    pool.check_integrity([])
    assert (pool.num_cached, pool.num_free) == (6, 9)
    assert pool.match(array("i", [1] * 13), ROOT)[0] == [5, 6, 4]
    assert pool.match(array("i", [2] * 13), ROOT)[0] == [7, 3, 8]
    assert [pool.allocate(1) for _ in range(9)] == [[1], [2], [9], [4], [6], [5], [8], [3], [7]]
    assert list(table.read()) == []


def test_what_has_lost_its_beginning_is_not_kept_nor_is_its_name_given_again(fd: int) -> None:
    table = KeptBlocks(fd, 10, SIZE, False)
    write_text(table, 1, [1, 2, 3], [1, 7, 9])
    table.clear(2)
    pool = BlockPool(10, SIZE, True, KeptBlocks(fd, 10, SIZE, True))
    assert [entry.block for entry in table.read()] == [1]
    assert pool.register(ROOT, array("i", [5] * SIZE), pool.allocate(1)[0]) == 10
    assert pool.match(array("i", [1] * 13), ROOT)[0] == [1]


def test_what_has_been_evicted_before_it_was_answered_stays_unknown(fd: int) -> None:
    table = KeptBlocks(fd, 3, SIZE, False)
    pool = BlockPool(3, SIZE, True, table)
    blocks = pool.allocate(2)
    first = pool.register(ROOT, array("i", [1] * SIZE), blocks[0])
    pool.register(first, array("i", [1] * SIZE), blocks[1])
    registered = pool.take_unanswered()
    assert list(table.read()) == []
    pool.release(blocks)
    (block,) = pool.allocate(1)
    second = pool.register(first, array("i", [2] * SIZE), block)
    pool.answered(registered)
    assert [entry.node for entry in table.read()] == [first]
    pool.answered(pool.take_unanswered())
    assert [entry.node for entry in table.read()] == [first, second]


# --------------------------------------------------------------------------- the next scheduler


def killed(world: KeptWorld) -> KeptWorld:
    """The next world, with what the runtime has to send again."""
    world.go_on_without_scheduler()
    num_kept = check(world.fd, world.memory, world.texts_of)
    scheduler = world.scheduler.settings
    after = KeptWorld(
        scheduler.lookahead,
        before=world,
        num_blocks=len(world.memory.texts),
        block_size=scheduler.block_size,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        prefix_caching=scheduler.prefix_caching,
        num_drafts=scheduler.num_drafts,
    )
    assert after.num_kept == num_kept, "all that can be found is"
    after.scheduler.composer.check_integrity()
    for message in world.unfinished():
        after.submit(message)
    return after


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_drafts", [0, 4])
@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("block_size", [1, 4])
def test_a_running_request_finds_all_blocks_that_its_answered_tokens_fill(
    lookahead: int, num_drafts: int, caching: bool, block_size: int
) -> None:
    settings: dict[str, Any] = {"block_size": block_size, "prefix_caching": caching, "num_drafts": num_drafts}
    num_seen = 0
    for num_answers in range(1, 20, 3):
        world = KeptWorld(lookahead, max_num_batched_tokens=64, num_blocks=128, **settings)
        messages = [
            submit(1, PROMPT, max_tokens=24), submit(2, PROMPT[::-1], max_tokens=24, salt="a"),
            *choices(3, 2, PROMPT, max_tokens=24),
        ]  # fmt: skip
        for message in messages:
            world.submit(message)
        for _ in range(num_answers):
            world.compose()
            world.answer()
        running = {request.id: len(request.tokens) for request in world.scheduler.composer.running}
        after = killed(world)
        after.run()
        for request, known in running.items():
            if world.tokens[request]:
                assert after.cached[request] == (known - 1) // block_size * block_size
                num_seen += 1
        for message in messages:
            if message.request not in world.finished:
                assert after.tokens[message.request] == expected(message)
        os.close(world.fd)
    assert num_seen > 10


request_strategy = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, 2), min_size=1, max_size=24),
        "max_tokens": st.integers(1, 24),
        "seed": st.integers(0, 2),
        "stops": st.lists(st.integers(0, VOCAB - 1), max_size=2),
        "salt": st.sampled_from(["", "", "a"]),
        "num_choices": st.sampled_from([1, 1, 1, 3]),
        "abort_after": st.none() | st.none() | st.integers(0, 12),
    }
)


def submits(requests: list[dict[str, Any]]) -> tuple[list[Submit], dict[int, int]]:
    """All choices of all requests, and after which turn some of these are aborted."""
    messages: list[Submit] = []
    aborts = {}
    for request in requests:
        first = len(messages)
        if request["abort_after"] is not None:
            aborts[first] = request["abort_after"]
        for choice in range(request["num_choices"]):
            messages.append(
                submit(
                    first + choice,
                    request["prompt"],
                    group=first if request["num_choices"] > 1 else None,
                    salt=request["salt"],
                    max_tokens=request["max_tokens"],
                    seed=request["seed"] + choice,
                    stop_ids=pack_int32(request["stops"]),
                )
            )
    return messages, aborts


@settings(max_examples=120, deadline=None)
@given(
    requests=st.lists(request_strategy, min_size=1, max_size=6),
    lookahead=st.integers(0, 3),
    slots=st.integers(1, 4),
    num_blocks=st.integers(14, 40),
    caching=st.booleans(),
    num_drafts=st.sampled_from([0, 0, 2, 4]),
    deadlines=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_whenever_it_is_killed_what_it_leaves_is_true_and_outputs_are_those_without_the_fault(
    requests: list[dict[str, Any]],
    lookahead: int,
    slots: int,
    num_blocks: int,
    caching: bool,
    num_drafts: int,
    deadlines: list[int],
    seed: int,
) -> None:
    """Between any two stores to the table, plans sent and plans executed; ranks go on for a while."""
    world = KeptWorld(
        lookahead,
        num_blocks=num_blocks,
        seed=seed,
        max_num_seqs=slots,
        max_num_batched_tokens=16 * (1 + num_drafts),
        prefix_caching=caching,
        num_drafts=num_drafts,
    )
    messages, aborts = submits(requests)
    for message in messages:
        world.submit(message)
    outputs: dict[int, list[int]] = {}
    for deadline in [*deadlines, None]:
        world.deadline = deadline
        with contextlib.suppress(Killed):
            run_to_the_end(world, aborts)
            outputs |= world.tokens
            break
        world.board.close()
        outputs |= world.tokens
        world = killed(world)
    for message in messages:
        whole = expected(message)
        if message.request in aborts:
            assert outputs[message.request] == whole[: len(outputs[message.request])]
        else:
            assert outputs[message.request] == whole
    os.close(world.fd)


def run_to_the_end(world: KeptWorld, aborts: dict[int, int]) -> None:
    for turn in range(13):
        for request, when in aborts.items():
            if when == turn and request in world.submitted:
                world.scheduler.take(Abort(0, request))
                del world.submitted[request]
        world.compose()
        world.answer()
    world.run()


# ------------------------------------------------------------------- requests that are sent again


def test_a_request_that_comes_back_is_not_counted_again() -> None:
    world = World()
    for message in (
        submit(1, PROMPT),
        submit(2, PROMPT, num_delivered=3, max_tokens=9),
        Submit(0, 3, pack_int32(PROMPT), 0, submit(3, PROMPT).sampling, is_resumed=True),
    ):
        world.submit(message)
        world.tokens[message.request] = PROMPT[len(PROMPT) - message.num_delivered :]
    world.run()
    assert world.scheduler.load().prompt_tokens == len(PROMPT)
    assert set(world.cached) == {1, 2, 3}, "but the runtime hears of its slot"


@pytest.mark.parametrize("num_delivered", [0, 1, 5])
def test_logprobs_of_a_prompt_are_told_again_if_there_is_no_token_yet(num_delivered: int) -> None:
    """They come before the first token, or with it. Else the prompt would be computed for their sake."""
    first = submit(1, PROMPT, max_tokens=8, num_prompt_logprobs=2)
    output = expected(first)[:num_delivered]
    world = World()
    world.submit(submit(2, [*PROMPT, *expected(first)], max_tokens=1))
    while 2 not in world.finished:
        world.compose()
        world.answer()
    again = submit(1, [*PROMPT, *output], num_delivered, max_tokens=8, num_prompt_logprobs=2)
    world.submit(again)
    world.tokens[1] = output
    world.run()
    assert world.tokens[1] == expected(first)
    assert len(world.prompt_logprobs[1]) == (0 if num_delivered else len(PROMPT) - 1)
    assert world.cached[1] == ((len(PROMPT) + num_delivered - 1) // SIZE * SIZE if num_delivered else 0)


def test_a_request_that_does_not_fit_any_more_fails_alone() -> None:
    """A restart may find less memory than the runtime knew of."""
    world = World(num_blocks=8)
    world.scheduler.take(submit(1, PROMPT, max_tokens=30))
    world.submit(submit(2, PROMPT))
    failed = world.scheduler._committed.pop()
    assert failed == Failed(0, 1, "it may need 10 KV blocks, and there are 7 only since a restart")
    world.run()
    assert world.tokens[2] == expected(submit(2, PROMPT))
    assert unpack_int32(submit(2, PROMPT).tokens).tolist() == PROMPT
