"""The admission barrier: no rank launches step N before every rank has posted N with the same plan.

Shared memory, one cache line a rank, written by that rank alone. No lock, no counter that several write,
nothing to repair when somebody dies.

    word    0          1           2
          ┌──────────┬───────────┬────────────┐
    line 0│ signature│ abort code│ first step │                  header
          ├──────────┴───────────┴────────────┤
        1 │ digest ‖ count  │ steps passed    │                  rank 0
        2 │ digest ‖ count  │ steps passed    │                  rank 1
          └─────────────────┴─────────────────┘                  …
            high     low 32 bits

To post step N is one store of one aligned 64-bit word: digest of the plan in the high half, N + 1 modulo
2^32 in the low half (N + 1, so that zeroed memory reads 'nobody has come'). Steps are compared modulo 2^32
and taken to be within 2^31 of each other, so that counts run on beyond 2^32. The low half is also the futex
on which those who miss this rank sleep. 'Steps passed' is a whole 64-bit count, written when `wait` returns.

A rank may be one step ahead. Who reads N + 1 in a slot while it waits at N counts that rank as come, and
need not know its digest for N any more: the first rank F to pass N found N itself in every slot (nobody was
ahead of the first) with F's digest in all of them, so that all ranks agreed on N. Nobody can be two ahead,
since passing N + 1 needs everybody's post of N + 1. And nobody posts N + 1 without having passed N, since
`wait` refuses a step that is not the one after the last that passed: after a failure, every step.

Why it is right, also where memory is weakly ordered (AArch64, POWER, RISC-V)

- Nothing torn: an aligned 64-bit load or store is single-copy atomic on every 64-bit CPU that Linux runs
  on, and SharedWords says why CPython does exactly one. A slot is its old value or its new one. A rank that
  dies, dies before its store or after it; there is no half.
- Nothing is published through a slot. Whoever passes reads nothing else that another rank wrote to this
  memory (the plan came by message), so no load or store has to be ordered against the slot's. What the
  argument above needs is that a rank's post of N + 1 comes after its loads that passed N: a store behind a
  branch on a load's value is never performed before the load (a control dependency), on any of these CPUs.
- Nothing goes back: all CPUs see the values of one word in one order (coherence), so what was seen to have
  come stays come; a store is seen by everybody in finite time.
- No wake-up is lost: a rank stores first and wakes then, always. The kernel orders both sides with full
  barriers and re-reads the word under a lock before it lets a waiter sleep; so either the waiter is found
  asleep, or it sees the new value and does not sleep. (A writer that looked at a flag to skip the wake-up
  would need a full fence of its own between store and look, and Python has none.)

Sleeps are cut into slices all the same: that bounds how late an abort is noticed (the abort word is not the
word slept on), whatever else goes wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from tpworker.ipc import futex
from tpworker.ipc.limits import usable_cores
from tpworker.ipc.memory import LINE, WORD, SharedWords
from tpworker.ipc.patience import Patience

_SIGNATURE = int.from_bytes(b"tpwbarr1", "little")
_ABORT = 1
_FIRST = 2
_PASSED = 1  # of a rank's line

_LOW = 2**32 - 1
_HALF = 2**31

SLICE = 0.004
"""Longest sleep in the kernel, in seconds: an abort is noticed within 5 ms."""
SPIN = 50e-6
"""How long to look again and again before sleeping, in seconds, where there are cores enough."""
GRACE = 1.0
"""Once two digests differ, how long to wait for the other ranks' digests, to tell who is alone with its."""
_LOOKS = 16  # at a slot between two looks at clock and abort word, about a microsecond
_LONGEST_BACKOFF = 255  # waits


class BarrierError(Exception):
    """A step that is a gap or a repeat, or memory that makes no sense. Base of the others."""


class BarrierTimeout(BarrierError):
    """Not every rank came before the deadline, after `seconds`. `missing` are those who did not."""

    def __init__(self, message: str, missing: list[int], seconds: float) -> None:
        super().__init__(message)
        self.missing = missing
        self.seconds = seconds


class BarrierDiverged(BarrierError):
    """Ranks came to one step with different plans.

    `digests` has those of all ranks that came; `minority` are the ranks that are not of the largest group
    of equal digests, empty when two groups are the largest.
    """

    def __init__(self, message: str, digests: dict[int, int], minority: list[int]) -> None:
        super().__init__(message)
        self.digests = digests
        self.minority = minority


class BarrierAborted(BarrierError):
    """`abort` was called. `reason` is the code it was given."""

    def __init__(self, message: str, reason: int) -> None:
        super().__init__(message)
        self.reason = reason


def default_spin(num_ranks: int) -> float:
    """Seconds to spin: SPIN if every rank can have a core of its own, else 0 (it would starve its peers).

    The cores are those that this process may use, within its container's limit. Pin a rank to a core of its
    own after it has attached, or say `spin`.
    """
    return SPIN if usable_cores() >= num_ranks else 0.0


@dataclass(slots=True)
class _Place:
    """A rank's part of the memory, and whether it pays for this rank to spin.

    It does not where a peer needs this very core, or where one rank is late in every step. So after a spin
    in vain the next 1, 3, 7 … 255 waits sleep at once; every spin that was enough halves that number.
    """

    slot: int  # index of its word
    others: tuple[int, ...]  # indices of the others' words, its neighbour's first
    wake: Callable[[], int]  # those who sleep because this rank has not come
    sleep: Callable[[int, float], None]
    backoff: int = 0
    skip: int = 0  # waits yet to come that do not spin; -1: this one does

    def next_spin(self, budget: float) -> float:
        """How long to spin in the wait that begins now, in seconds."""
        if self.skip > 0:
            self.skip -= 1
            return 0.0
        self.skip = -1 if budget else 0
        return budget

    def spun(self, enough: bool) -> None:
        """That wait is over; `enough`: it took no longer than `next_spin` allowed."""
        if self.skip < 0:
            self.backoff = self.backoff // 2 if enough else min(2 * self.backoff + 1, _LONGEST_BACKOFF)
            self.skip = 0 if enough else self.backoff


class Barrier:
    """A barrier of `num_ranks` processes (or threads). Make it with `create` or `attach`.

    `wait` is for one thread a rank; `abort` and `position` are for anybody.
    """

    def __init__(self, memory: SharedWords, num_ranks: int, spin: float | None) -> None:
        self.fd = memory.fd
        self.num_ranks = num_ranks
        self.spin = default_spin(num_ranks) if spin is None else spin
        self._memory = memory
        self._words = memory.words
        slots = [LINE * (1 + rank) for rank in range(num_ranks)]
        self._places = {
            rank: _Place(
                slot,
                (*slots[rank + 1 :], *slots[:rank]),
                futex.waker(memory.address + slot * WORD),
                futex.sleeper(memory.address + slot * WORD, SLICE),
            )
            for rank, slot in enumerate(slots)
        }

    @classmethod
    def create(cls, num_ranks: int, *, first_step: int = 0, spin: float | None = None) -> Barrier:
        """A new barrier; pass its `fd` on to the ranks' processes.

        Args:
            num_ranks: at least 1.
            first_step: the step that every rank must post first.
            spin: seconds to spin before sleeping, for this object; None: `default_spin`.
        """
        memory = SharedWords.create("tpworker-barrier", _size(num_ranks), _SIGNATURE)
        words = memory.words
        words[_FIRST] = first_step
        for rank in range(num_ranks):
            slot = LINE * (1 + rank)
            words[slot] = first_step & _LOW
            words[slot + _PASSED] = first_step
        return cls(memory, num_ranks, spin)

    @classmethod
    def attach(cls, fd: int, num_ranks: int, *, spin: float | None = None) -> Barrier:
        """The barrier that another process has created. The descriptor stays the caller's.

        Raises:
            ValueError: `fd` is not a barrier for `num_ranks` ranks.
        """
        what = f"a barrier of {num_ranks} ranks"
        memory = SharedWords.attach(fd, _size(num_ranks), _SIGNATURE, what)
        return cls(memory, num_ranks, spin)

    def wait(self, rank: int, step: int, digest: int, timeout: float) -> bool:
        """Posts that `rank` has step `step` with the plan of this digest; returns when all ranks have.

        Returns:
            Whether it came last, and all others were there. Of ranks that come at one moment each may be.

        After any error, every later wait of this rank is an error too. What was posted is not taken back:
        when this rank gave up waiting for a late one, the late one finds it there and may pass.

        Args:
            rank: 0 … num_ranks - 1.
            step: one more than in this rank's wait before; the first is the barrier's `first_step`.
            digest: 32 bits, e.g. a CRC of the plan's bytes.
            timeout: seconds, from now, of the time in which this process runs (see `Patience`).

        Raises:
            BarrierTimeout: not all came in time. It names those missing, and the step they are at.
            BarrierDiverged: all came, or enough, but with different digests. It names who differs.
            BarrierAborted: at once if `abort` was called before; within 5 ms if it is called meanwhile.
            BarrierError: the step is a gap or a repeat. Nothing was posted.
            ValueError: the digest is not an integer of 32 bits. Nothing was posted.
        """
        words = self._words
        place = self._places[rank]
        slot = place.slot
        if words[_ABORT] or words[slot + _PASSED] != step or words[slot] & _LOW != step & _LOW:
            self._refuse(rank, step)
        post = (digest << 32) | ((step + 1) & _LOW)
        words[slot] = post
        place.wake()
        is_last = True
        for other in place.others:
            if words[other] != post:
                self._await_others(rank, step, post, timeout)
                is_last = False
                break
        words[slot + _PASSED] = step + 1
        return is_last

    def abort(self, reason_code: int = 1) -> None:
        """Ends all waits of all ranks, now and later. For any process or thread.

        Args:
            reason_code: for the exception's `reason`; not 0. Of several aborts, one is kept.
        """
        if reason_code <= 0:
            raise ValueError(f"reason_code={reason_code}: must be above 0")
        if not self._words[_ABORT]:
            self._words[_ABORT] = reason_code
        for place in self._places.values():
            place.wake()

    def position(self, rank: int) -> int | None:
        """The last step that `rank` has posted; None before its first."""
        words = self._words
        slot = self._places[rank].slot
        passed = words[slot + _PASSED]
        posted = passed + _ahead(words[slot], passed)
        return posted - 1 if posted > words[_FIRST] else None

    def close(self) -> None:
        """Unmaps the memory, and closes `fd` on the side that created it. Nobody may be waiting through
        this object; other processes are not affected."""
        self._memory.close()

    # ------------------------------------------------------------------------------ when not all have come

    def _await_others(self, rank: int, step: int, post: int, timeout: float) -> None:
        """Returns when all others have come, with this rank's digest: spins for a while, then sleeps."""
        words = self._words
        place = self._places[rank]
        patience: Patience | None = None  # begins where spinning, which is short, has ended
        spin_end = time.monotonic() + place.next_spin(min(self.spin, timeout))
        for other in place.others:
            while (seen := words[other]) != post:
                ahead = _ahead(seen, post)
                if ahead == 1:
                    break
                if ahead == 0:
                    self._differs(rank, step, patience or Patience(timeout))
                if ahead > 1:
                    raise BarrierError(f"rank {rank} at step {step} sees {self._where(other // LINE - 1)}")
                if words[_ABORT]:
                    self._aborted(rank, step)
                if time.monotonic() < spin_end:
                    for _ in range(_LOOKS):
                        if words[other] != seen:
                            break
                    continue
                patience = patience or Patience(timeout)
                if seconds := patience.slice():
                    self._places[other // LINE - 1].sleep(seen & _LOW, seconds)
                else:
                    self._timed_out(step, timeout)
        place.spun(time.monotonic() <= spin_end)

    def _timed_out(self, step: int, timeout: float) -> None:
        digests, missing = self._look(step)
        if len(set(digests.values())) > 1:
            raise _diverged(step, digests, missing)
        if missing:  # or else the last of them has come just now
            names = ", ".join(self._where(rank) for rank in missing)
            raise BarrierTimeout(f"step {step}: waited {timeout:g} s for {names}", missing, timeout)

    def _differs(self, rank: int, step: int, patience: Patience) -> NoReturn:
        """A digest is not ours. Who is wrong shows when the others have come, or soon enough."""
        patience = Patience(min(patience.left(), GRACE))
        while True:
            digests, missing = self._look(step)
            if not missing or not patience.left():
                raise _diverged(step, digests, missing)
            if self._words[_ABORT]:
                self._aborted(rank, step)
            time.sleep(0.001)

    def _look(self, step: int) -> tuple[dict[int, int], list[int]]:
        """The digests of the ranks that are at `step` now, and the ranks that have not come there."""
        digests, missing = {}, []
        for rank, place in self._places.items():
            word = self._words[place.slot]
            ahead = _ahead(word, step + 1)
            if ahead == 0:
                digests[rank] = word >> 32
            elif ahead < 0:
                missing.append(rank)
        return digests, missing

    def _where(self, rank: int) -> str:
        position = self.position(rank)
        return f"rank {rank} ({'before its first step' if position is None else f'at step {position}'})"

    def _aborted(self, rank: int, step: int) -> NoReturn:
        reason = self._words[_ABORT]
        raise BarrierAborted(f"rank {rank} at step {step}: the barrier was aborted, reason {reason}", reason)

    def _refuse(self, rank: int, step: int) -> NoReturn:
        if self._words[_ABORT]:
            self._aborted(rank, step)
        slot = self._places[rank].slot
        due = self._words[slot + _PASSED]
        if _ahead(self._words[slot], due):
            raise BarrierError(f"rank {rank}: step {step}, but it has posted step {due} and not passed it")
        kind = "a gap" if step > due else "a repeat"
        raise BarrierError(f"rank {rank}: step {step} is {kind}, its next is step {due}")


def _ahead(word: int, count: int) -> int:
    """How many steps the count in a slot is ahead of `count`; less than 0: behind. Both modulo 2^32."""
    return ((word - count + _HALF) & _LOW) - _HALF


def _diverged(step: int, digests: dict[int, int], missing: list[int]) -> BarrierDiverged:
    """The error for `digests` that are not all equal."""
    groups: dict[int, list[int]] = {}
    for rank, digest in digests.items():
        groups.setdefault(digest, []).append(rank)
    largest, second = sorted(groups.values(), key=len, reverse=True)[:2]
    majority = largest if len(largest) > len(second) else []
    minority = [rank for rank in digests if rank not in majority] if majority else []
    plans = "; ".join(f"{_ranks(ranks)} with digest {digest:#010x}" for digest, ranks in groups.items())
    who = f"{_ranks(minority)} against the majority" if majority else "no majority"
    absent = f"; {_ranks(missing)} did not come" if missing else ""
    message = f"step {step}: ranks have different plans, {who}: {plans}{absent}"
    return BarrierDiverged(message, digests, minority)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _size(num_ranks: int) -> int:
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks}: must be at least 1")
    return LINE * (1 + num_ranks)
