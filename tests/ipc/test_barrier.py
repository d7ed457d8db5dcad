"""The admission barrier: nobody passes a step alone, and whoever is to blame is named."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ipc.ranks import DEADLINE, Rank, result, started
from tpworker.ipc import barrier as module
from tpworker.ipc.barrier import (
    SLICE,
    SPIN,
    Barrier,
    BarrierAborted,
    BarrierDiverged,
    BarrierError,
    BarrierTimeout,
    default_spin,
)
from tpworker.ipc.memory import LINE

WRAP = 2**32


@pytest.fixture(params=[2, 3, 4, 8])
def num_ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def make(num_ranks: int, first_step: int = 0) -> closing[Barrier]:
    return closing(Barrier.create(num_ranks, first_step=first_step, spin=0.0))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as executor:
        yield executor


def put(barrier: Barrier, rank: int, count: int, digest: int) -> None:
    """Another rank's post, without its process: `count` is its step + 1."""
    barrier._words[LINE * (1 + rank)] = digest << 32 | count % WRAP
    barrier._places[rank].wake()


# ------------------------------------------------------------------- invariant 2, with real processes


@pytest.mark.parametrize("spin", [0.0, SPIN], ids=["sleep", "spin"])
@pytest.mark.parametrize("first_step", [0, WRAP - 100], ids=["from 0", "past 2^32"])
def test_nobody_passes_before_all_have_come(num_ranks: int, first_step: int, spin: float) -> None:
    seed = random.randrange(2**32)
    with make(num_ranks, first_step) as barrier:
        jobs = [
            Rank(fd=barrier.fd, num_ranks=num_ranks, rank=rank, first_step=first_step, steps=600, seed=seed,
                 spin=spin)
            for rank in range(num_ranks)
        ]  # fmt: skip
        with started(jobs) as processes:
            results = [result(process) for process in processes]
        assert [r["passed"] for r in results] == [600] * num_ranks, results
        for step in range(600):
            last = max(r["came"][step] for r in results)
            first = min(r["left"][step] for r in results)
            assert first >= last, f"seed {seed}: at step {step} a rank left {last - first} ns too early"
        assert [barrier.position(rank) for rank in range(num_ranks)] == [first_step + 599] * num_ranks


def test_nobody_passes_a_step_with_different_plans(num_ranks: int) -> None:
    chance = random.Random()
    at, who = chance.randrange(1, 100), chance.randrange(num_ranks)  # from 1: all have started by then
    with make(num_ranks) as barrier:
        jobs = [
            Rank(
                fd=barrier.fd,
                num_ranks=num_ranks,
                rank=rank,
                steps=200,
                diverge_at=at if rank == who else None,
            )
            for rank in range(num_ranks)
        ]
        with started(jobs) as processes:
            results = [result(process) for process in processes]
    right = zlib.crc32(b"%d" % at)
    for r in results:
        assert (r.get("error"), r["passed"]) == ("BarrierDiverged", at), r
        assert r["minority"] == ([who] if num_ranks > 2 else [])
        assert {int(rank): digest for rank, digest in r["digests"].items()} == {
            rank: right ^ (1 << 17 if rank == who else 0) for rank in range(num_ranks)
        }


# ----------------------------------------------------------------------------- late, dead, divergent


@pytest.mark.parametrize("round_", range(2))
def test_a_killed_rank_is_named(round_: int) -> None:
    """Killed anywhere, also between two instructions of its post: the others name it, and nothing is torn."""
    with make(4) as barrier:
        jobs = [
            Rank(fd=barrier.fd, num_ranks=4, rank=rank, endless=True, delays=False, timeout=2.0)
            for rank in range(4)
        ]
        with started(jobs) as processes:
            until(lambda: (barrier.position(2) or 0) > 50)
            processes[2].send_signal(signal.SIGKILL)
            assert processes[2].wait(DEADLINE) == -signal.SIGKILL
            results = [result(processes[rank]) for rank in (0, 1, 3)]
            at = barrier.position(2)
            assert at is not None
            for r in results:
                assert r.get("error") == "BarrierTimeout", r
                assert r["missing"] == [2]
                assert f"rank 2 (at step {at})" in r["message"]
                assert r["passed"] == at + 1


def test_those_who_never_came_are_named() -> None:
    with make(4) as barrier:
        put(barrier, 2, 1, 7)
        for rank, missing in ((0, [1, 3]), (3, [1])):
            with pytest.raises(BarrierTimeout) as caught:
                barrier.wait(rank, 0, 7, 0.02)
            assert caught.value.missing == missing
            names = ", ".join(f"rank {rank} (before its first step)" for rank in missing)
            assert str(caught.value) == f"step 0: waited 0.02 s for {names}"


def test_a_deadline_of_zero_looks_once() -> None:
    with make(2) as barrier:
        put(barrier, 1, 1, 7)
        barrier.wait(0, 0, 7, 0.0)
        with pytest.raises(BarrierTimeout, match=r"rank 1 \(at step 0\)"):
            barrier.wait(0, 1, 7, 0.0)


@pytest.mark.parametrize("step", [0, WRAP - 1, 3 * WRAP + 5])
def test_the_minority_is_named(step: int) -> None:
    with make(5, first_step=step) as barrier:
        for rank, digest in ((1, 6), (2, 6), (3, 0xFFFFFFFF), (4, 7)):
            put(barrier, rank, step + 1, digest)
        with pytest.raises(BarrierDiverged) as caught:
            barrier.wait(0, step, 6, DEADLINE)
        assert caught.value.minority == [3, 4]
        assert caught.value.digests == {0: 6, 1: 6, 2: 6, 3: 0xFFFFFFFF, 4: 7}
        assert str(caught.value) == (
            f"step {step}: ranks have different plans, ranks 3, 4 against the majority: ranks 0, 1, 2 with "
            "digest 0x00000006; rank 3 with digest 0xffffffff; rank 4 with digest 0x00000007"
        )


def test_two_against_two_is_no_minority() -> None:
    with make(4) as barrier:
        for rank, digest in ((1, 7), (2, 8), (3, 8)):
            put(barrier, rank, 1, digest)
        with pytest.raises(BarrierDiverged, match="no majority") as caught:
            barrier.wait(0, 0, 7, DEADLINE)
        assert caught.value.minority == []


def test_a_divergent_rank_is_named_though_another_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 0.01)
    with make(4) as barrier:
        for rank, digest in ((1, 8), (2, 7)):
            put(barrier, rank, 1, digest)
        # rank 1 is looked at first: the deadline is far, and is not waited for
        with pytest.raises(BarrierDiverged, match=r"rank 1 against the majority.*; rank 3 did not come"):
            barrier.wait(0, 0, 7, 10 * DEADLINE)
    with make(4) as barrier:
        for rank, digest in ((2, 7), (3, 8)):
            put(barrier, rank, 1, digest)
        # rank 1 is looked at first, and waited for until the deadline
        with pytest.raises(BarrierDiverged, match=r"rank 3 against the majority.*; rank 1 did not come"):
            barrier.wait(0, 0, 7, 0.05)


def test_a_late_divergent_rank_is_waited_for(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two differ; only the third can tell who of them is alone."""
    monkeypatch.setattr(module, "GRACE", DEADLINE)
    with make(3) as barrier:
        put(barrier, 1, 1, 8)
        future = pool.submit(barrier.wait, 0, 0, 7, DEADLINE)
        until(lambda: barrier.position(0) == 0)
        put(barrier, 2, 1, 8)
        with pytest.raises(BarrierDiverged) as caught:
            future.result()
        assert caught.value.minority == [0]


# ----------------------------------------------------------------------------------------- step order


def test_a_gap_and_a_repeat_are_refused_and_not_posted() -> None:
    with make(2) as barrier:
        with pytest.raises(BarrierError, match="step 1 is a gap, its next is step 0"):
            barrier.wait(0, 1, 7, DEADLINE)
        assert barrier.position(0) is None
        for step in (0, 1, 2):
            put(barrier, 1, step + 1, 7)
            barrier.wait(0, step, 7, DEADLINE)
        for step, kind in ((0, "a repeat"), (2, "a repeat"), (4, "a gap"), (3 + WRAP, "a gap")):
            with pytest.raises(BarrierError, match=f"step {step} is {kind}, its next is step 3"):
                barrier.wait(0, step, 7, DEADLINE)
        assert barrier.position(0) == 2


@pytest.mark.parametrize("step", [0, 1])
def test_after_a_failure_every_step_is_refused(step: int) -> None:
    """Or else a rank could post N + 1 without having passed N, and others would take it as come to N."""
    with make(2) as barrier:
        with pytest.raises(BarrierTimeout):
            barrier.wait(0, 0, 7, 0.0)
        put(barrier, 1, 1, 7)
        with pytest.raises(BarrierError, match="has posted step 0 and not passed it"):
            barrier.wait(0, step, 7, DEADLINE)
        assert barrier.position(0) == 0


def test_a_digest_is_32_bits() -> None:
    with make(1) as barrier:
        for digest in (-1, 2**32):
            with pytest.raises(ValueError, match="Q"):
                barrier.wait(0, 0, digest, DEADLINE)
        assert barrier.position(0) is None
        barrier.wait(0, 0, 2**32 - 1, DEADLINE)
        barrier.wait(0, 1, 0, DEADLINE)


@pytest.mark.parametrize("step", [0, 17, WRAP - 3, WRAP - 2, WRAP - 1, WRAP, 5 * WRAP - 1])
def test_a_rank_may_be_one_step_ahead_but_not_two(step: int) -> None:
    with make(2, first_step=step) as barrier:
        put(barrier, 1, step + 2, 99)  # it passed `step`, so that it had our digest
        barrier.wait(0, step, 7, 0.0)
    with make(2, first_step=step) as barrier:
        put(barrier, 1, step + 3, 7)
        with pytest.raises(BarrierError, match="sees rank 1") as caught:
            barrier.wait(0, step, 7, 0.0)
        assert type(caught.value) is BarrierError


@given(st.integers(0, 2**70), st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**32 - 1))
def test_steps_are_compared_modulo_two_to_the_32(count: int, ahead: int, digest: int) -> None:
    assert module._ahead(digest << 32 | (count + ahead) % WRAP, count) == ahead


@pytest.mark.parametrize("first_step", [0, 1, WRAP - 4, WRAP - 1, WRAP, 7 * WRAP - 2])
def test_positions(first_step: int) -> None:
    with make(1, first_step) as barrier:
        assert barrier.position(0) is None
        for step in range(first_step, first_step + 6):
            barrier.wait(0, step, 7, 0.0)
            assert barrier.position(0) == step


def test_a_barrier_is_attached_to_where_it_is() -> None:
    """The steps are in the memory, not in the object."""
    with make(1, first_step=WRAP - 2) as barrier:
        barrier.wait(0, WRAP - 2, 7, 0.0)
        with closing(Barrier.attach(barrier.fd, 1)) as other:
            assert other.position(0) == WRAP - 2
            other.wait(0, WRAP - 1, 7, 0.0)
        assert barrier.position(0) == WRAP - 1
        barrier.wait(0, WRAP, 7, 0.0)


# ----------------------------------------------------------------------------------------------- abort


def test_abort_from_another_process_ends_all_waits() -> None:
    with make(4) as barrier:
        jobs = [Rank(fd=barrier.fd, num_ranks=4, rank=rank, steps=10, delays=False) for rank in range(3)]
        with started(jobs) as processes:
            until(lambda: all(barrier.position(rank) == 0 for rank in range(3)))
            barrier.abort(42)
            for process in processes:
                r = result(process)
                assert (r.get("error"), r.get("reason"), r["passed"]) == ("BarrierAborted", 42, 0), r
        # later waits fail at once, also of a rank that was not there, and also if all others have come
        with pytest.raises(BarrierAborted, match="rank 3 at step 0: the barrier was aborted, reason 42"):
            barrier.wait(3, 0, zlib.crc32(b"0"), DEADLINE)
        assert barrier.position(3) is None


def test_abort_is_seen_while_spinning(pool: ThreadPoolExecutor) -> None:
    with closing(Barrier.create(2, spin=DEADLINE)) as barrier:
        future = pool.submit(barrier.wait, 0, 0, 7, DEADLINE)
        until(lambda: barrier.position(0) == 0)
        barrier.abort()
        with pytest.raises(BarrierAborted):
            future.result()


def test_abort_is_seen_while_it_is_found_out_who_diverged(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", DEADLINE)
    with make(3) as barrier:
        put(barrier, 1, 1, 8)
        future = pool.submit(barrier.wait, 0, 0, 7, DEADLINE)
        until(lambda: barrier.position(0) == 0)
        barrier.abort()
        with pytest.raises(BarrierAborted):
            future.result()


def test_of_two_aborts_the_first_is_kept() -> None:
    with make(2) as barrier:
        barrier.abort(3)
        barrier.abort(4)
        with pytest.raises(BarrierAborted) as caught:
            barrier.wait(0, 0, 7, DEADLINE)
        assert caught.value.reason == 3
        with pytest.raises(ValueError, match="must be above 0"):
            barrier.abort(0)


@pytest.mark.parametrize("what", ["post", "abort"])
def test_no_wake_up_is_lost(what: str, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here nobody looks again by itself."""
    monkeypatch.setattr(module, "SLICE", 2 * DEADLINE)

    def steps(rank: int) -> None:
        for step in range(300):
            barrier.wait(rank, step, step, 2 * DEADLINE)

    with make(3) as barrier:
        pending = [pool.submit(steps, rank) for rank in range(3 if what == "post" else 2)]
        if what == "abort":
            until(lambda: barrier._places[2].wake() == 2)  # both were asleep for want of rank 2
            time.sleep(0.02)  # and are again

            def aborted() -> bool:
                barrier.abort()
                return all(future.done() for future in pending)

            until(aborted)
        try:
            for future in pending:
                error = future.exception(DEADLINE)
                assert error is None if what == "post" else isinstance(error, BarrierAborted)
        finally:
            barrier.abort()  # the pool waits for its threads


@pytest.mark.parametrize("what", ["post", "abort"])
def test_a_lost_wake_up_costs_one_slice(what: str, pool: ThreadPoolExecutor) -> None:
    """Here every wake-up is lost: a waiter looks again by itself, and does so within 5 ms."""
    assert SLICE < 0.005
    with make(2) as barrier:
        future = pool.submit(barrier.wait, 0, 0, 7, DEADLINE)
        until(lambda: barrier.position(0) == 0)
        if what == "post":
            barrier._words[LINE * 2] = 7 << 32 | 1
            future.result()
        else:
            barrier._words[1] = 5
            with pytest.raises(BarrierAborted):
                future.result()


# --------------------------------------------------------------------------------- waiting costs nothing


def test_waiting_uses_no_cpu() -> None:
    """Two waiters, one second each; what they use is a fraction of a percent."""
    with make(3) as barrier:
        jobs = [
            Rank(fd=barrier.fd, num_ranks=3, rank=rank, steps=1, delays=False, timeout=1.0) for rank in (0, 1)
        ]
        with started(jobs) as processes:
            for process in processes:
                r = result(process)
                assert r.get("error") == "BarrierTimeout", r
                assert r["cpu"] < 0.1


def test_spinning_in_vain_is_given_up_and_tried_again() -> None:
    with make(1) as barrier:
        place = barrier._places[0]

    def spins(enough: bool, waits: int) -> list[bool]:
        spun = []
        for _ in range(waits):
            spun.append(place.next_spin(SPIN) > 0)
            place.spun(enough and spun[-1])
        return spun

    assert spins(True, 3) == [True] * 3
    # in vain: one wait without, three without, seven without …
    assert spins(False, 14) == [True, False, True, *[False] * 3, True, *[False] * 7]
    assert sum(spins(False, 20_000)) < 100
    while not place.next_spin(SPIN):
        pass
    place.spun(True)
    assert place.backoff < module._LONGEST_BACKOFF
    assert spins(True, 100) == [True] * 100
    assert place.backoff == 0


def test_no_spinning_where_ranks_share_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "usable_cores", lambda: 4)
    assert default_spin(4) == SPIN
    assert default_spin(5) == 0.0
    with closing(Barrier.create(5)) as barrier, closing(Barrier.attach(barrier.fd, 5, spin=0.001)) as other:
        assert (barrier.spin, other.spin) == (0.0, 0.001)


# ------------------------------------------------------------------------------------------ the memory


def test_a_foreign_descriptor_is_refused() -> None:
    with make(3) as barrier:
        for num_ranks in (2, 4):
            with pytest.raises(ValueError, match=f"is not a barrier of {num_ranks} ranks"):
                Barrier.attach(barrier.fd, num_ranks)
        barrier._words[0] += 1
        with pytest.raises(ValueError, match="is not a barrier of 3 ranks: signature"):
            Barrier.attach(barrier.fd, 3)
    with pytest.raises(ValueError, match="num_ranks=0: must be at least 1"):
        Barrier.create(0)


def test_ranks_lie_on_lines_of_their_own() -> None:
    with make(8) as barrier:
        lines = [(barrier._memory.address + 8 * place.slot) / 64 for place in barrier._places.values()]
        assert all(line.is_integer() for line in lines)
        assert len(set(lines)) == 8


def test_nothing_is_left_behind() -> None:
    def traces() -> tuple[list[str], int, int]:
        maps = Path("/proc/self/maps").read_text()
        return sorted(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd")), maps.count("memfd:tpworker")

    before = traces()
    with make(2) as barrier:
        jobs = [Rank(fd=barrier.fd, num_ranks=2, rank=rank, endless=True) for rank in range(2)]
        with started(jobs) as processes:
            until(lambda: (barrier.position(0) or 0) > 10)
            assert re.search("memfd:tpworker-barrier", Path(f"/proc/{processes[0].pid}/maps").read_text())
            processes[0].kill()
        assert traces()[2] == before[2] + 1
        with closing(Barrier.attach(barrier.fd, 2)):
            pass
        os.fstat(barrier.fd)  # stays its creator's
    assert traces() == before


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.001)
