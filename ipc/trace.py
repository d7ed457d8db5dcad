"""What the threads of all processes did, and when: rings of records in shared memory, for a timeline.

    a thread of any process                    the runtime's process
      put ──► record ──► head       ring        drain ──► records up to where the head was ──► tail
                full: one more is lost

One ring a thread, which alone writes to it, records of fixed size, times in nanoseconds of CLOCK_MONOTONIC,
one clock for all processes. Nobody is woken, and nobody waits: who is too quick for the reader loses records,
and their number is kept. A word of the header says whether anybody wants to know; while nobody does, a thread
looks at it once a step. The memory is a memfd of the runtime's for all generations: what a process has told
before it died is there still, and the next one goes on behind it.

Why it is right, also where memory is weakly ordered (AArch64, POWER, RISC-V)

- Nothing torn: head, tail and the word of the header are aligned words, each written by one side alone, and
  one access of the CPU (see SharedWords). Records are not, and are never read while they are written.
- A record is read once it is there. To see a head does not mean to see the record before it, and Python has
  no fence. So the reader takes what was before the head at its look before, and sleeps for milliseconds
  between two looks: when a head is seen, the stores before it have been carried out, and each is seen by
  everybody in finite time, far less than that, whatever becomes of its thread. Nor can the reader have loaded
  the record earlier than that, since to sleep is to enter the kernel.
- It is not written over while it is read. The reader stores its tail behind the record's loads, and the
  writer stores the next record there behind its load of that tail. Both stores are behind a branch on what
  was loaded (a Python integer is made in a way that depends on its value; the writer compares), and such a
  store is never performed before the load (a control dependency), on any of these CPUs.
- What is seen late does no harm: an old tail, also that from before the switch, has a record lost and
  counted; an old switch, a step left out or one more told.
- A process that is killed leaves a head that counts whole records. The next one of its name begins when it
  has been reaped, so that all its stores are seen.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from tpworker.ipc.child import RankBoot, SchedulerBoot
from tpworker.ipc.memory import LINE, WORD, SharedWords

RECORDS = 4096
"""Of one ring."""

_SIGNATURE = int.from_bytes(b"tptrace1", "little")
_ON = LINE  # whether anybody wants to know
_HEAD, _LOST = 0, 1  # words of a ring: the writer's
_TAIL = LINE  # and the reader's
_FIRST = 2 * LINE  # of a ring's records
_RECORD = struct.Struct("<8Q")
_VALUES = 6
_RING = _FIRST + RECORDS * _RECORD.size // WORD  # words
_ZEROES = (0,) * _VALUES


class Kind(IntEnum):
    """What a record tells of one step. Values that are times are called so: `_at`."""

    PLANNED = 1
    """By the scheduler: begun_at, composed_at, streamed_at; tokens of prompts << 32 | slots that decode; free
    KV blocks; requests that run << 32 | that wait."""
    COMMITTED = 2
    """By the scheduler: begun_at, ended_at; tokens; requests that ended."""
    LAUNCHED = 3
    """By a rank's launch thread: received_at, admitted_at, launched_at."""
    PUBLISHED = 4
    """By a rank's publisher: noticed_at, sent_at; and of the device: started_at, ended_at."""
    DELIVERED = 5
    """By the runtime: begun_at, ended_at; tokens."""


class Record(NamedTuple):
    """What was told."""

    ring: int
    kind: int
    generation: int
    step: int
    values: tuple[int, ...]


RUNTIME_RING, SCHEDULER_RING = 0, 1


def launch_ring(rank: int) -> int:
    """The ring of a rank's launch thread."""
    return 2 + 2 * rank


def publisher_ring(rank: int) -> int:
    """The ring of a rank's publisher."""
    return 3 + 2 * rank


class Teller:
    """A thread's way to tell of its steps: times first, and all of a step as one record.

        begin(step) … mark() … mark() … end(kind, …)

    What is left out of that order is a record that is not made. Belongs to one thread.

    Args:
        ring: words of the ring; None: nobody will ever want to know.
        on: the word that says whether anybody does.
        generation: of this process.
    """

    __slots__ = ("_generation", "_head", "_on", "_ring", "_step", "_times")

    def __init__(
        self, ring: memoryview[int] | None = None, on: memoryview[int] | None = None, generation: int = 0
    ) -> None:
        self._ring = memoryview(bytearray(_FIRST * WORD)).cast("Q") if ring is None else ring
        self._on = memoryview(bytes(WORD)).cast("Q") if on is None else on
        self._head = self._ring[_HEAD]
        self._generation = generation
        self._step = 0
        self._times: list[int] | None = None

    def begin(self, step: int) -> None:
        """The thread comes to a step. Whether anybody wants to know is decided now, for all of it."""
        if self._on[0]:
            self._step = step
            self._times = [time.monotonic_ns()]
        else:
            self._times = None

    def mark(self) -> None:
        """A part of the step is over."""
        if self._times is not None:
            self._times.append(time.monotonic_ns())

    @property
    def is_told(self) -> bool:
        """Whether the step is: what only its record needs may be left out otherwise."""
        return self._times is not None

    def end(self, kind: Kind, *more: int) -> None:
        """And the last one: makes the record, of the times and what else there is, 6 values at most, each
        from 0 to 2^64 - 1."""
        if self._times is not None:
            self._put(kind, *self._times, time.monotonic_ns(), *more)
            self._times = None

    def _put(self, kind: Kind, *values: int) -> None:
        ring, head = self._ring, self._head
        if head - ring[_TAIL] >= RECORDS:
            ring[_LOST] += 1
            return
        told = kind | self._generation << 8, self._step, *values, *_ZEROES[len(values) :]
        _RECORD.pack_into(ring, _place(head), *told)
        self._head = ring[_HEAD] = head + 1


class Rings:
    """The rings of a group's threads. Make it with `create` or `attach`."""

    def __init__(self, memory: SharedWords, num_ranks: int) -> None:
        self.fd = memory.fd
        self._memory = memory
        self._on = memory.words[_ON : _ON + 1]
        starts = (2 * LINE + i * _RING for i in range(publisher_ring(num_ranks - 1) + 1))
        self._rings = [memory.words[start : start + _RING] for start in starts]
        self._heads = [0] * len(self._rings)  # at the last look

    @classmethod
    def create(cls, num_ranks: int) -> Rings:
        """New rings, which nobody wants to be filled; pass `fd` on to the processes."""
        return cls(SharedWords.create("tpworker-trace", _size(num_ranks), _SIGNATURE), num_ranks)

    @classmethod
    def attach(cls, fd: int, num_ranks: int) -> Rings:
        """Those that another process has created. The descriptor stays the caller's.

        Raises:
            ValueError: `fd` has not the rings of so many ranks.
        """
        what = f"rings of {num_ranks} ranks"
        return cls(SharedWords.attach(fd, _size(num_ranks), _SIGNATURE, what), num_ranks)

    def teller(self, ring: int, generation: int) -> Teller:
        """For the one thread whose ring it is."""
        return Teller(self._rings[ring], self._on, generation)

    # ------------------------------------------------------------------------------- the reader

    def switch(self, is_on: bool) -> None:
        """From now on somebody wants to know; or nobody. What is there from before is forgotten."""
        if is_on:
            for ring in self._rings:
                ring[_TAIL] = ring[_HEAD]
            self._heads = [ring[_HEAD] for ring in self._rings]
        self._on[0] = int(is_on)

    def lost(self) -> int:
        """Records that were lost since the rings were made, because they came too quickly."""
        return sum(ring[_LOST] for ring in self._rings)

    def drain(self) -> Iterator[Record]:
        """What was there at the call before, ring by ring, each in its order. Some milliseconds after it."""
        heads, self._heads = self._heads, self._look()
        for index, (ring, head) in enumerate(zip(self._rings, heads, strict=True)):
            tail = ring[_TAIL]
            while tail < head:
                kind, step, *values = _RECORD.unpack_from(ring, _place(tail))
                tail = ring[_TAIL] = tail + 1
                yield Record(index, kind & 0xFF, kind >> 8, step, tuple(values))

    def _look(self) -> list[int]:
        """The heads now; the last ring's first, so that a step is not seen before what led to it."""
        return [ring[_HEAD] for ring in reversed(self._rings)][::-1]

    def close(self) -> None:
        """Unmaps the memory, and closes `fd` on the side that created it. Tellers are of no use then."""
        for words in (*self._rings, self._on):
            words.release()
        self._memory.close()


def scheduler_teller(boot: SchedulerBoot) -> Teller:
    """For the scheduler's thread."""
    return _tellers(boot, SCHEDULER_RING)[0]


def rank_tellers(boot: RankBoot) -> list[Teller]:
    """Two, for a rank's launch thread and for its publisher."""
    return _tellers(boot, launch_ring(boot.rank), publisher_ring(boot.rank))


def _tellers(boot: SchedulerBoot | RankBoot, *rings: int) -> list[Teller]:
    if boot.trace_fd is None:
        return [Teller() for _ in rings]
    attached = Rings.attach(boot.trace_fd, boot.num_ranks)
    return [attached.teller(ring, boot.generation) for ring in rings]


def _place(number: int) -> int:
    """Where in a ring its record of this number is, in bytes."""
    return _FIRST * WORD + number % RECORDS * _RECORD.size


def _size(num_ranks: int) -> int:
    return 2 * LINE + (publisher_ring(num_ranks - 1) + 1) * _RING
