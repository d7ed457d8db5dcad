"""The status board: what every process is doing, in shared memory, for anybody to look at.

One row a process, written by that process alone, on cache lines of its own; a field is one aligned 64-bit
word, so that what is read is a value that was written (see SharedWords). Fields of one row are not read at
one instant. It costs a writer some tens of nanoseconds a field, and nobody is told: a board is for progress
displays, statistics and post-mortems; and for the two watchdogs, which end what has not moved for long.

    words  0 … 31   32 … 47                48 … 71            72 … 95            96 … 119
         ┌────────┬──────────────────────┬──────────────────┬──────────────────┬──────────────────┐
         │ fields │ when it came to each │ a histogram: sum,│ another          │ another          │
         │        │ of its phases        │ counts           │                  │                  │
         └────────┴──────────────────────┴──────────────────┴──────────────────┴──────────────────┘
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from tpworker.ipc.memory import LINE, SharedWords

_SIGNATURE = int.from_bytes(b"tpwb", "little")
_ROW = 16 * LINE  # words; an even number of lines, as CPUs prefetch them in pairs
_ENTERED = 4 * LINE  # the word that says when phase 0 was entered; those of the other phases follow
_SPANS = 6 * LINE  # where the first span's histogram begins: nanoseconds in all, then NUM_BUCKETS counts
_SPAN = 3 * LINE

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


class Board:
    """A row for each of a group of processes, by name. Make it with `create` or `attach`."""

    def __init__(self, memory: SharedWords, names: Sequence[str]) -> None:
        self.fd = memory.fd
        self._memory = memory
        self._rows = {
            name: Row(name, memory.words[_ROW * (1 + i) : _ROW * (2 + i)]) for i, name in enumerate(names)
        }

    @classmethod
    def create(cls, names: Sequence[str]) -> Board:
        """A new board, all fields 0; pass its `fd` on to the processes.

        Raises:
            ValueError: a name occurs twice.
        """
        if len(set(names)) != len(names):
            raise ValueError(f"a name occurs twice: {', '.join(names)}")
        return cls(SharedWords.create("tpworker-board", _size(names), _signature(names)), names)

    @classmethod
    def attach(cls, fd: int, names: Sequence[str]) -> Board:
        """The board that another process has created. The descriptor stays the caller's.

        Raises:
            ValueError: `fd` is not a board with these names in this order.
        """
        what = f"a board of {', '.join(names)}"
        return cls(SharedWords.attach(fd, _size(names), _signature(names), what), names)

    def row(self, name: str) -> Row:
        """The row of the process called `name`.

        Raises:
            KeyError: there is none.
        """
        return self._rows[name]

    def rows(self) -> list[Row]:
        """All rows, in the order of the names."""
        return list(self._rows.values())

    def close(self) -> None:
        """Unmaps the memory, and closes `fd` on the side that created it. Rows are of no use then."""
        for row in self._rows.values():
            row._words.release()
        self._memory.close()


def _size(names: Sequence[str]) -> int:
    return _ROW * (1 + len(names))


def _signature(names: Sequence[str]) -> int:
    return _SIGNATURE << 32 | zlib.crc32("\0".join(names).encode())
