"""Masks in shared memory: sizes, who may see what when, and waits that end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ipc.ranks import DEADLINE, ROOT
from tpworker.ipc import futex
from tpworker.ipc.barrier import Barrier
from tpworker.ipc.masks import TURNS, MaskBoard, MasksMissing, words_of
from tpworker.ipc.messages import MAX_STEP

NUM_SLOTS, VOCAB = 5, 1000


@pytest.fixture
def board() -> Iterator[MaskBoard]:
    with closing(MaskBoard.create(NUM_SLOTS, VOCAB)) as made:
        yield made


def rows(board: MaskBoard) -> np.ndarray:
    """uint32 [TURNS, num_slots, num_words]; `board` cannot be closed before it is let go."""
    return np.frombuffer(board.memory, np.uint32).reshape(TURNS, board.num_slots, board.num_words)


# ------------------------------------------------------------------------------------------ memory


@given(st.integers(1, 300_000))
def test_a_row_has_a_bit_for_every_token_and_room_behind_the_last(vocab_size: int) -> None:
    """A rank reads its part word by word from where it begins: the last may end beyond the vocabulary."""
    bits = 32 * words_of(vocab_size)
    assert bits - vocab_size >= 1024
    assert bits - vocab_size < 2 * 1024 + 32
    assert words_of(vocab_size) % 32 == 0, "rows of a GPU's reads of 128 bytes"


@given(st.integers(1, 40), st.integers(1, 5000))
def test_the_memory_is_as_large_as_it_says_and_zero(num_slots: int, vocab_size: int) -> None:
    with closing(MaskBoard.create(num_slots, vocab_size)) as board:
        assert os.fstat(board.fd).st_size == board.num_bytes
        assert board.memory.nbytes == 4 * TURNS * num_slots * board.num_words
        assert board.address <= board.written_address < board.address + board.num_bytes - board.memory.nbytes
        assert not rows(board).any()
        assert board.num_written == 0


def test_masks_lie_as_gpus_read_them(board: MaskBoard) -> None:
    """Each row begins on a line of its own of 128 bytes, and so does the word that says what is written."""
    first = board.address + board.num_bytes - board.memory.nbytes
    assert first % 128 == 0
    assert 4 * board.num_words % 128 == 0
    assert board.written_address % 8 == 0
    assert first - board.written_address >= 64, "who spins on the word would share its line with masks"


def test_who_attaches_sees_what_is_written(board: MaskBoard) -> None:
    draw = np.random.default_rng(1)
    with closing(MaskBoard.attach(board.fd, NUM_SLOTS, VOCAB)) as other:
        assert (other.num_words, other.num_bytes) == (board.num_words, board.num_bytes)
        values = draw.integers(0, 2**32, rows(board).shape, np.uint32)
        rows(board)[:] = values
        assert (rows(other) == values).all()
        for step in (0, 1, 7):
            board.publish(step)
            assert other.num_written == step + 1
            other.wait(step, 0.0)
            for earlier in range(step):
                other.wait(earlier, 0.0)
        assert (rows(other) == values).all(), "what says that they are written is no part of them"
    board.publish(8)  # the descriptor is not the other's: it is open still


@pytest.mark.parametrize(("num_slots", "vocab_size"), [(NUM_SLOTS + 1, VOCAB), (NUM_SLOTS, VOCAB + 1024)])
def test_both_sides_must_know_the_same_sizes(board: MaskBoard, num_slots: int, vocab_size: int) -> None:
    with pytest.raises(
        ValueError, match=f"is not masks of {num_slots} slots and {vocab_size} tokens: .* bytes"
    ):
        MaskBoard.attach(board.fd, num_slots, vocab_size)


def test_other_memory_is_refused(board: MaskBoard) -> None:
    with closing(Barrier.create(2)) as barrier, pytest.raises(ValueError, match="is not masks of"):
        MaskBoard.attach(barrier.fd, NUM_SLOTS, VOCAB)
    forged = os.memfd_create("forged")
    try:
        os.ftruncate(forged, board.num_bytes)
        with pytest.raises(ValueError, match="signature 0x0 instead of"):
            MaskBoard.attach(forged, NUM_SLOTS, VOCAB)
    finally:
        os.close(forged)


def test_closing_leaves_nothing() -> None:
    board = MaskBoard.create(NUM_SLOTS, VOCAB)
    inode, descriptor = os.fstat(board.fd).st_ino, board.fd
    other = MaskBoard.attach(board.fd, NUM_SLOTS, VOCAB)
    other.close()
    board.close()
    board.close()
    with open("/proc/self/maps") as maps:
        assert not [line for line in maps if "tpworker-masks" in line and line.split()[4] == str(inode)]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


# ------------------------------------------------------------------------------------------ filling


def test_what_fills_masks_leaves_the_bits_behind_the_last_token_zero(board: MaskBoard) -> None:
    """Of logits that are of no token, too: whatever a grammar allows, nobody may choose them."""
    from tests.integration.guided import KINDS, VOCABULARY
    from tpworker.grammar import Compiler
    from tpworker.grammar.bits import Masks
    from tpworker.ipc.arrays import unpack_int32

    eos_ids = unpack_int32(VOCABULARY.eos_ids).tolist()
    compiler = Compiler(VOCABULARY.tokenizer, 32 * board.num_words, eos_ids)
    num_tokens = max(eos_ids) + 1
    masks = Masks(board.memory, board.num_words, 2)
    masks.fill([(compiler.matcher(kind.grammar), row) for row, kind in enumerate(KINDS[:NUM_SLOTS])])
    bits = np.unpackbits(rows(board).view(np.uint8), axis=-1, bitorder="little")
    assert bits[0, :, :num_tokens].any(axis=-1).all()
    assert not bits[0, :, num_tokens:].any()
    assert not bits[1].any(), "the other turn's are nobody's business"
    del masks


# -------------------------------------------------------------------------------------------- waits


@pytest.mark.parametrize("written", [None, 0, 4])
def test_masks_that_do_not_come_are_missed_in_time(board: MaskBoard, written: int | None) -> None:
    if written is not None:
        board.publish(written)
    count = 0 if written is None else written + 1
    with pytest.raises(
        MasksMissing, match=f"^step {count}: no masks .* within 0.02 s.* those of {count} steps"
    ):
        board.wait(count, 0.02)


def test_a_wait_for_what_is_written_does_not_sleep(board: MaskBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(value: int, seconds: float) -> None:
        raise AssertionError("it slept")

    board.publish(3)
    monkeypatch.setattr(board, "_sleep", sleep)
    board.wait(3, 0.0)
    board.wait(0, 100.0)
    with pytest.raises(AssertionError, match="it slept"):
        board.wait(4, 100.0)


def test_steps_may_be_left_out(board: MaskBoard) -> None:
    """Those without guided tokens have none, and are not published."""
    board.publish(9)
    board.wait(4, 0.0)
    with pytest.raises(MasksMissing):
        board.wait(10, 0.0)
    board.publish(MAX_STEP)  # nobody waits any more, see `Guides.let_go`
    board.wait(MAX_STEP - 1, 0.0)
    assert board.num_written == MAX_STEP + 1


def test_a_step_beyond_32_bits_is_waited_for_as_well(board: MaskBoard) -> None:
    """The kernel sleeps on the lower half of the word."""
    last = 2**32
    board.publish(last - 1)
    with pytest.raises(MasksMissing, match=f"step {last}: "):
        board.wait(last, 0.02)
    writer = threading.Timer(0.05, board.publish, (last,))
    writer.start()
    board.wait(last, DEADLINE)
    writer.join()


def test_who_sleeps_is_woken(board: MaskBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel: here nobody looks again before."""
    sleep, is_going_to = futex.sleeper(board.written_address, DEADLINE), threading.Event()

    def deep(value: int, seconds: float) -> None:
        is_going_to.set()
        sleep(value, DEADLINE)

    monkeypatch.setattr(board, "_sleep", deep)
    waiter = threading.Thread(target=board.wait, args=(0, DEADLINE))
    waiter.start()
    assert is_going_to.wait(DEADLINE)
    time.sleep(0.05)  # it sleeps by now, or will find at once that the word has changed
    board.publish(0)
    waiter.join(DEADLINE / 2)
    assert not waiter.is_alive()


# ------------------------------------------------------------------------------- between processes

READER = """
import json, random, sys, time
import numpy as np
from tpworker.ipc.masks import TURNS, MaskBoard, MasksMissing

fd, num_slots, vocab, steps, seed = map(int, sys.argv[1:])
board = MaskBoard.attach(fd, num_slots, vocab)
rows = np.frombuffer(board.memory, np.uint32).reshape(TURNS, num_slots, -1)
draw, torn, error = random.Random(seed), [], None
step = 0
try:
    while step < steps:
        if draw.random() < 0.02:
            time.sleep(draw.random() * 0.004)
        board.wait(step, 60.0)
        turn = rows[step % TURNS]
        if not (turn == step + 1).all():
            torn.append(step)
        sys.stdout.buffer.write(b".")  # the step is answered
        sys.stdout.flush()
        step += 1
except MasksMissing as why:
    error = str(why)
del rows, turn
sys.stderr.write(json.dumps({"torn": torn, "error": error, "steps": step}))
"""


@contextmanager
def readers(board: MaskBoard, count: int, steps: int, seed: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that wait for each step's masks, look whether all words are that step's, and answer it."""
    arguments = [board.fd, board.num_slots, VOCAB, steps]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READER, *map(str, arguments), str(seed + i)],
            cwd=ROOT,
            pass_fds=[board.fd],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def told(process: subprocess.Popen[bytes]) -> dict[str, object]:
    assert process.stderr is not None
    found: dict[str, object] = json.loads(process.stderr.read())
    return found


def test_nobody_sees_masks_of_another_step(board: MaskBoard) -> None:
    """Writer and readers hurry and dawdle; a step's masks are written once step N - 2 is answered by all."""
    seed, steps = random.randrange(2**32), 600
    draw = random.Random(seed)
    table = rows(board)
    with readers(board, 2, steps, seed) as processes:
        num_answered = [0, 0]
        for step in range(steps):
            while min(num_answered) + TURNS <= step:
                for i, process in enumerate(processes):
                    assert process.stdout is not None
                    if num_answered[i] + TURNS <= step:
                        answered = process.stdout.read(1)
                        assert answered == b".", (seed, told(process))
                        num_answered[i] += 1
            if draw.random() < 0.05:
                time.sleep(draw.random() * 0.002)
            for slot in draw.sample(range(NUM_SLOTS), NUM_SLOTS):
                table[step % TURNS, slot] = step + 1
            board.publish(step)
        found = [told(process) for process in processes]
    assert found == [{"torn": [], "error": None, "steps": steps}] * 2, seed
    del table


def test_the_test_sees_masks_that_are_written_too_early(board: MaskBoard) -> None:
    """Step N's before step N - 2 is answered: what the rule is there to prevent."""
    with readers(board, 1, 3, 0) as (process,):
        rows(board)[0] = 1
        rows(board)[1] = 2
        board.publish(1)
        assert process.stdout is not None
        assert process.stdout.read(2) == b".."
        rows(board)[0, 2] = 9
        board.publish(2)
        assert told(process)["torn"] == [2]


def test_a_writer_that_dies_is_missed(board: MaskBoard) -> None:
    """What it wrote stays; what it did not say is not there."""
    code = (
        "import sys, time\n"
        "from tpworker.ipc.masks import MaskBoard\n"
        "board = MaskBoard.attach(*map(int, sys.argv[1:]))\n"
        "board.memory.cast('B')[:32] = bytes([7] * 32)\n"
        "board.publish(0)\n"
        "print(flush=True)\n"
        "time.sleep(3600)\n"
    )
    command = [sys.executable, "-c", code, *map(str, (board.fd, NUM_SLOTS, VOCAB))]
    process = subprocess.Popen(command, pass_fds=[board.fd], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        board.wait(0, DEADLINE)
        assert process.stdout.readline() == b"\n"
    finally:
        process.kill()
        assert process.wait(DEADLINE) == -signal.SIGKILL
        process.stdout.close()
    assert (rows(board)[0, 0, :8] == 0x07070707).all()
    with pytest.raises(MasksMissing, match="step 1: no masks"):
        board.wait(1, 0.05)
