"""The status board: what every process is doing, in shared memory, for anybody to look at.

One row a process, written by that process alone, on cache lines of its own; a field is one aligned 64-bit
word, so that what is read is a value that was written (see SharedWords). Fields of one row are not read at
one instant. It costs a writer some tens of nanoseconds a field, and nobody is told: a board is for progress
displays, statistics and post-mortems; and for the two watchdogs, which end what has not moved for long.

    signature, sizes │ About, names, in JSON │ the owner's row │ a row each, in the names' order │ listing

It says itself whose rows it has, so that who was told nothing can read it, from outside. A board is one
generation's, and belongs to the runtime's process. A row:

    words  0 … 47   48 … 63                64 … 87            88 … 111           112 … 135
         ┌────────┬──────────────────────┬──────────────────┬──────────────────┬──────────────────┐
         │ fields │ when it came to each │ a histogram: sum,│ another          │ another          │
         │        │ of its phases        │ counts           │                  │                  │
         └────────┴──────────────────────┴──────────────────┴──────────────────┴──────────────────┘
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from tpworker.ipc.listing import NUM_WORDS as LISTING_WORDS
from tpworker.ipc.listing import Listing
from tpworker.ipc.memory import LINE, WORD, SharedWords
from tpworker.outputs import RUNTIME_STATES
from tpworker.version import version

NAME = "tpworker-board"
"""Of its memory, in /proc/PID/fd."""

_SIGNATURE = int.from_bytes(b"tpwb", "little")
_PAIR = 2 * LINE  # words; CPUs prefetch lines in pairs
_ROW = 10 * _PAIR  # words
_ENTERED = 6 * LINE  # the word that says when phase 0 was entered; those of the other phases follow
_SPANS = 8 * LINE  # where the first span's histogram begins: nanoseconds in all, then NUM_BUCKETS counts
_SPAN = 3 * LINE
_SIZE, _ENDED = 1, 2  # words behind the signature: bytes of the description; when the owner let go of it
_MAX_DESCRIPTION = 1 << 16  # bytes

NUM_BUCKETS = 20
"""Of a span's histogram. Bucket i counts what took 2^i µs at most and more than half of that; the first one
all that took less, the last one all that took more."""
BOUNDS_NS = tuple(1000 << bucket for bucket in range(NUM_BUCKETS - 1))
"""Up to where the buckets reach, all but the last: 1 µs to 262 ms."""


class Field(IntEnum):
    """A field of a row. Fields that hold a step hold step + 1: 0 is 'none yet'."""

    PID = 0
    PHASE = 1
    """A `Phase`."""
    PROGRESS_DONE = 2
    """How much of the phase is done, of PROGRESS_TOTAL (0: not known), in bytes."""
    PROGRESS_TOTAL = 3
    RECEIVED = 4
    """Last step whose plan has come, + 1."""
    ADMITTED = 5
    """Last step that passed the barrier, + 1."""
    LAUNCHED = 6
    """Last step handed to the device, + 1."""
    COMPLETED = 7
    """Last step that the device has finished, and on rank 0 whose result was sent, + 1."""
    BEAT = 8
    """When the process last said that it is alive: time.monotonic_ns(), one clock for all processes."""
    WEIGHTS = 9
    """Bytes of weights that the process holds."""
    COMPILED = 10
    """Kernels that it had to compile."""
    DEADLINE = 11
    """Of the scheduler: milliseconds that the steps in flight may take, see deadlines.py; 0: none yet."""
    LAST_ARRIVALS = 12
    """Steps to whose barrier the process came last: all others waited for it."""

    # Of the scheduler, and of the owner, the runtime: see scheduler/telling.py and runtime/telling.py. The
    # scheduler's counters begin at 0 with each generation.
    RUNNING = 24
    """Requests that have a slot; of the owner: that have had one, and may have lost it for a while."""
    WAITING = 25
    FREE_BLOCKS = 26
    """KV blocks that can be given out, those that only the prefix cache holds included."""
    TOTAL_BLOCKS = 27
    """KV blocks that requests can have."""
    PROMPT_TOKENS = 28
    """Of requests that got a slot."""
    CACHED_TOKENS = 29
    """Of these: found in the prefix cache."""
    PREFILLED_TOKENS = 30
    """Of prompts, that answered steps have computed."""
    OUTPUT_TOKENS = 31
    PREEMPTIONS = 32
    DRAFTS = 33
    """That were checked."""
    ACCEPTED = 34
    """Of these: that were right."""
    NUM_GAPS = 35
    """Answered steps that decode, which followed another at once."""
    GAPS = 36
    """Nanoseconds for which rank 0's device had nothing to do before these, together."""
    BUSY = 37
    """Nanoseconds for which it ran steps, together."""
    STATE = 38
    """Of the owner: its state's index in `RUNTIME_STATES`, + 1; 0: it has not said. So is the rest."""
    FINISHED = 39
    ABORTED = 40
    RESUMED = 41
    """Requests that went on after a restart, each as often as it did."""
    RESTARTS = 42
    """Generations that were started because one was lost."""


class Span(IntEnum):
    """Something that a process does again and again. How long it takes is a histogram in its row."""

    BARRIER = 0
    """Of a rank: from its coming to a step's barrier until all ranks had come."""
    PUBLISH = 1
    """Of rank 0: from the end of a step on the device until its tokens were sent."""
    COMPOSE = 2
    """Of the scheduler: from its waking up until the plans were sent that could be."""


class SpanTimes(NamedTuple):
    """How long a span took, each time since the process started."""

    total_ns: int
    counts: tuple[int, ...]
    """By bucket, see NUM_BUCKETS."""


class Phase(IntEnum):
    """What a process is at. It goes through them in this order; some have not all of them."""

    STARTING = 0
    IMPORTING = 1
    OPENING = 2
    """Its device."""
    LOADING = 3
    """Weights."""
    MEETING = 4
    """The other ranks, for collectives, as far as that is not done while weights are loaded."""
    ALLOCATING = 5
    """KV blocks, once all ranks have said how many they can hold."""
    WARMING_UP = 6
    """Every kind of step runs once."""
    CAPTURING = 7
    """Graphs."""
    READY = 8
    STOPPING = 9


class Row:
    """One process' row: `row[Field.LAUNCHED] = step + 1`. Only that process writes to it.

    Values are integers from 0 to 2^64 - 1; another is a ValueError.
    """

    __slots__ = ("_words", "name")

    def __init__(self, name: str, words: memoryview[int]) -> None:
        self.name = name
        self._words = words

    def __getitem__(self, field: Field) -> int:
        return self._words[field]

    def __setitem__(self, field: Field, value: int) -> None:
        self._words[field] = value

    @property
    def phase(self) -> Phase:
        """Field.PHASE as a `Phase`."""
        return Phase(self._words[Field.PHASE])

    def enter(self, phase: Phase) -> None:
        """The process has come to another phase, now."""
        self._words[Field.PROGRESS_DONE] = self._words[Field.PROGRESS_TOTAL] = 0
        self._words[_ENTERED + phase] = time.monotonic_ns()
        self._words[Field.PHASE] = phase

    def entered(self, phase: Phase) -> int:
        """When the process came to a phase: time.monotonic_ns(), 0 if it has not."""
        return self._words[_ENTERED + phase]

    def took(self, span: Span, nanoseconds: int) -> None:
        """A span has ended, which took so long; less than 0, as by clocks that differ, is nothing."""
        if nanoseconds < 0:
            nanoseconds = 0
        words, first = self._words, _SPANS + _SPAN * span
        words[first] += nanoseconds
        bucket = ((nanoseconds - 1) // 1000).bit_length() if nanoseconds else 0
        words[first + 1 + (bucket if bucket < NUM_BUCKETS else NUM_BUCKETS - 1)] += 1

    def times(self, span: Span) -> SpanTimes:
        """How long it has taken so far."""
        first = _SPANS + _SPAN * span
        total, *counts = self._words[first : first + 1 + NUM_BUCKETS].tolist()
        return SpanTimes(total, tuple(counts))


@dataclass(frozen=True, kw_only=True)
class About:
    """What does not change while a board lives."""

    version: str = ""
    """Of the tpworker that has made it."""
    pid: int = 0
    """Of the runtime's process, as that sees it."""
    created_ns: int = 0
    """time.monotonic_ns()."""
    generation: int = 0
    model: str = ""
    """A folder."""
    device: str = ""
    """'cpu' or 'cuda'."""
    gpus: tuple[str, ...] = ()
    """UUIDs, in rank order."""
    dtype: str = ""
    max_num_seqs: int = 0
    max_model_len: int = 0
    block_size: int = 0
    lookahead: int = 0
    num_drafts: int = 0


_FORMAT = zlib.crc32(
    repr(
        (
            [(one.name, one.value) for kind in (Field, Phase, Span) for one in kind],
            [field.name for field in dataclasses.fields(About)],
            RUNTIME_STATES,
            (_PAIR, _ROW, _ENTERED, _SPANS, _SPAN, NUM_BUCKETS, _SIZE, _ENDED, LISTING_WORDS),
        )
    ).encode()
)
"""What is where: another version's boards have another."""


class OtherVersion(ValueError):
    """It is a board, but another tpworker's, which puts other things elsewhere."""


class Board:
    """A row for each of a group of processes, by name. Make it with `create`, `attach` or `look`."""

    def __init__(self, memory: SharedWords, names: Sequence[str], about: About, num_words: int) -> None:
        self.fd = memory.fd
        self.about = about
        self._memory = memory
        self._end = memory.words[_ENDED : _ENDED + 1]
        first = _PAIR + num_words
        areas = [memory.words[first + _ROW * i : first + _ROW * (i + 1)] for i in range(1 + len(names))]
        self.owner = Row("tpworker-runtime", areas[0])
        """The row of the runtime's process."""
        self._rows = {name: Row(name, area) for name, area in zip(names, areas[1:], strict=True)}
        self.listing = Listing(memory.words[first + _ROW * (1 + len(names)) :])
        """Some of the open requests; the runtime writes it."""

    @classmethod
    def create(cls, names: Sequence[str], about: About | None = None) -> Board:
        """A new board, all fields 0; pass its `fd` on to the processes.

        Args:
            names: of the rows.
            about: what it tells of itself; version, pid and time are filled in.

        Raises:
            ValueError: a name occurs twice.
        """
        if len(set(names)) != len(names):
            raise ValueError(f"a name occurs twice: {', '.join(names)}")
        about = dataclasses.replace(
            about or About(), version=version(), pid=os.getpid(), created_ns=time.monotonic_ns()
        )
        text = json.dumps({"about": dataclasses.asdict(about), "names": list(names)}).encode()
        num_words = _padded(len(text))
        memory = SharedWords.create(NAME, _size(num_words, len(names)), _SIGNATURE << 32 | _FORMAT)
        padded = memoryview(text.ljust(num_words * WORD, b"\0")).cast("Q")
        memory.words[_PAIR : _PAIR + num_words] = padded
        memory.words[_SIZE] = len(text)
        return cls(memory, names, about, num_words)

    @classmethod
    def attach(cls, fd: int, names: Sequence[str]) -> Board:
        """The board that another process has created. The descriptor stays the caller's.

        Raises:
            ValueError: `fd` is not a board with these names in this order.
        """
        what = f"a board of {', '.join(names)}"
        board = cls._open(fd, what, writable=True)
        if (found := [row.name for row in board.rows()]) != list(names):
            board.close()
            raise ValueError(f"descriptor {fd} is not {what}: it is one of {', '.join(found)}")
        return board

    @classmethod
    def look(cls, fd: int) -> Board:
        """The same, whoever has rows there, and to read only. The descriptor stays the caller's.

        Raises:
            OtherVersion: another version's.
            ValueError: `fd` is not a board.
        """
        return cls._open(fd, "a board", writable=False)

    @classmethod
    def _open(cls, fd: int, what: str, *, writable: bool) -> Board:
        memory = SharedWords.open(fd, what, writable=writable)
        try:
            found = memory.words[0]
            if found >> 32 != _SIGNATURE:
                raise ValueError(f"descriptor {fd} is not {what}: signature {found:#x}")
            if found & 0xFFFFFFFF != _FORMAT:
                raise OtherVersion(f"descriptor {fd} is not {what}: it is another version's")
            size = memory.words[_SIZE]
            if not 0 < size <= min(_MAX_DESCRIPTION, (len(memory.words) - _PAIR) * WORD):
                raise ValueError(f"descriptor {fd} is not {what}: a description of {size} bytes")
            text = memory.words[_PAIR : _PAIR + _padded(size)].tobytes()[:size]
            try:
                names, about = _described(text)
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"descriptor {fd} is not {what}: its description is broken: {error}"
                ) from None
            if len(memory.words) != _size(_padded(size), len(names)):
                raise ValueError(f"descriptor {fd} is not {what}: {len(memory.words)} words")
            return cls(memory, names, about, _padded(size))
        except BaseException:
            memory.close()
            raise

    def row(self, name: str) -> Row:
        """The row of the process called `name`.

        Raises:
            KeyError: there is none.
        """
        return self._rows[name]

    def rows(self) -> list[Row]:
        """All rows, in the order of the names."""
        return list(self._rows.values())

    @property
    def is_over(self) -> bool:
        """Whether its owner has let go of it: its processes are gone."""
        return self._end[0] != 0

    def close(self) -> None:
        """Unmaps the memory, and closes `fd` on the side that created it. Rows are of no use then."""
        if self._memory.owns_fd:
            self._end[0] = time.monotonic_ns()
        for row in (self.owner, *self._rows.values()):
            row._words.release()
        self._end.release()
        self.listing.release()
        self._memory.close()


def _described(text: bytes) -> tuple[list[str], About]:
    data: dict[str, Any] = json.loads(text)
    about = data["about"]
    return data["names"], About(**{**about, "gpus": tuple(about["gpus"])})


def _padded(num_bytes: int) -> int:
    """Words of a description, in whole pairs of lines."""
    return -(-num_bytes // (_PAIR * WORD)) * _PAIR


def _size(num_words: int, num_rows: int) -> int:
    return _PAIR + num_words + _ROW * (1 + num_rows) + LISTING_WORDS
