from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from tpworker.ipc.board import Phase
from tpworker.ipc.child import Report
from tpworker.runtime.faults import Ending, Kind, Standing, find_cause, gpu_fault

RANK0, RANK1, RANK2, SCHEDULER = "tpworker-rank0", "tpworker-rank1", "tpworker-rank2", "tpworker-scheduler"


def reported(process: str, error: str, summary: str = "", missing: tuple[int, ...] = ()) -> Ending:
    return Ending(process, 1, Report(error, summary, f"Traceback of {process}", missing, ()))


def diverging(process: str, ranks: tuple[int, ...]) -> Ending:
    return Ending(process, 1, Report("BarrierDiverged", "step 5: plans differ", "Traceback", (), ranks))


def at(step: int) -> tuple[int, ...]:
    """What the row of a rank says that waits for the plan of this step."""
    return (Phase.READY, step, step, step, step)


killed = Ending(RANK1, -signal.SIGKILL, None)
raised = reported(RANK1, "ValueError", "bad weights")
aborted = Ending(RANK0, -signal.SIGABRT, None)
waited = reported(RANK0, "BarrierTimeout", "rank 1 did not come", (1,))
maskless = reported(RANK0, "MasksMissing", "step 5: no masks")
lost = reported(
    RANK0, "RuntimeError", "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]"
)


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        (killed, Kind.DIED),
        (Ending(RANK1, None, None), Kind.DIED),
        (Ending(RANK1, 3, None), Kind.DIED),
        (raised, Kind.RAISED),
        (diverging(RANK1, (1,)), Kind.RAISED),
        (aborted, Kind.ABORTED),
        (waited, Kind.WAITED),
        (reported(RANK0, "StreamBroken", "BarrierTimeout: rank 1 did not come", (1,)), Kind.WAITED),
        (reported(SCHEDULER, "StepTimeout", "not answered"), Kind.WAITED),
        (reported(SCHEDULER, "ChannelError", "tpworker-rank1 did not connect within 5 s"), Kind.WAITED),
        (maskless, Kind.WAITED),
        (reported(RANK0, "StreamBroken", "MasksMissing: step 5: no masks"), Kind.WAITED),
        (reported(SCHEDULER, "MasksUnwritten", "step 5"), Kind.RAISED),
        (lost, Kind.LOST),
        (reported(RANK0, "RuntimeError", "Read error [127.0.0.1]:1: Connection reset by peer"), Kind.LOST),
        (reported(RANK0, "RuntimeError", "Timed out waiting 60000ms for recv operation"), Kind.LOST),
        (reported(RANK0, "BarrierAborted", "abort"), Kind.LOST),
        (reported(RANK0, "StreamBroken", "BarrierAborted: step 3"), Kind.LOST),
    ],
)
def test_what_an_ending_says(ending: Ending, kind: Kind) -> None:
    assert ending.kind is kind


@pytest.mark.parametrize("consequence", [aborted, waited, lost])
@pytest.mark.parametrize("cause", [killed, raised])
def test_a_cause_beats_its_consequences_whichever_is_seen_first(cause: Ending, consequence: Ending) -> None:
    for endings in ([cause, consequence], [consequence, cause]):
        assert find_cause(endings, {}).process == RANK1


def test_a_death_beats_an_exception_that_may_be_its_consequence() -> None:
    other = reported(RANK0, "RuntimeError", "something that no pattern knows")
    fault = find_cause([other, killed], {})
    assert fault.process == RANK1
    assert fault.summary.startswith(f"{RANK1} was killed by SIGKILL: by another program, by hand, or by the")
    assert fault.traceback is None


def test_of_equals_the_first_that_was_seen() -> None:
    other = reported(RANK0, "KeyError", "x")
    assert find_cause([raised, other], {}).process == RANK1
    assert find_cause([other, raised], {}).process == RANK0


def test_an_exception_comes_with_its_words_and_its_traceback() -> None:
    fault = find_cause([raised], {})
    assert fault.summary == f"{RANK1} raised ValueError: bad weights"
    assert fault.traceback == f"Traceback of {RANK1}"
    assert not fault.hung


def test_who_is_waited_for_is_at_fault() -> None:
    fault = find_cause([waited], {RANK1: Standing(False, at(1))})
    assert fault.process == RANK1
    assert fault.hung
    assert fault.summary == (
        f"{RANK1} hangs; {RANK0} raised BarrierTimeout: rank 1 did not come; "
        f"{RANK1} was waiting for the plan of step 1"
    )


def test_who_is_stopped_is_at_fault() -> None:
    standings = {
        RANK0: Standing(False, at(1)),
        RANK1: Standing(False, at(1)),
        RANK2: Standing(True, at(1)),
    }
    fault = find_cause([reported(SCHEDULER, "StepTimeout", "not answered", (1,))], standings)
    assert fault.process == RANK2
    assert "is stopped" in fault.summary


def test_who_is_behind_is_at_fault_where_nobody_is_named() -> None:
    standings = {
        SCHEDULER: Standing(False, ()),
        RANK0: Standing(False, at(7)),
        RANK1: Standing(False, at(6)),
    }
    timeout = reported(SCHEDULER, "StepTimeout", "not answered")
    assert find_cause([timeout], standings).process == RANK1
    level = {**standings, RANK1: standings[RANK0]}
    together = find_cause([timeout], level)
    assert together.process == f"{RANK0}, {RANK1}", "the scheduler only says so"
    assert together.hung


def test_the_scheduler_is_at_fault_where_masks_do_not_come() -> None:
    other = reported(RANK1, "StreamBroken", "MasksMissing: step 5: no masks")
    standings = {SCHEDULER: Standing(False, ())}
    for endings in ([maskless], [maskless, other], [other, maskless]):
        fault = find_cause(endings, standings)
        assert fault.process == SCHEDULER
        assert fault.hung
        assert fault.summary.startswith(f"{SCHEDULER} does not write masks; {endings[0].process} raised ")
    level = {**standings, RANK1: Standing(False, at(6)), RANK2: Standing(False, at(6))}
    assert find_cause([maskless], level).process == SCHEDULER


def test_masks_that_do_not_come_may_be_a_consequence() -> None:
    """Of a rank that is stopped, or behind, or has died: nobody answers the step that they depend on."""
    scheduler = {SCHEDULER: Standing(False, ())}
    assert find_cause([maskless], {**scheduler, RANK1: Standing(True, at(6))}).process == RANK1
    behind = {**scheduler, RANK1: Standing(False, at(5)), RANK2: Standing(False, at(6))}
    assert find_cause([maskless], behind).process == RANK1
    assert find_cause([maskless, killed], scheduler).process == RANK1
    assert find_cause([maskless, reported(SCHEDULER, "ValueError", "x")], {}).process == SCHEDULER
    assert find_cause([maskless], {SCHEDULER: Standing(True, ())}).summary.startswith(
        f"{SCHEDULER} is stopped"
    )


def test_who_says_whom_it_missed_is_believed_before_who_does_not() -> None:
    standings = {RANK1: Standing(False, at(6))}
    endings = [
        reported(SCHEDULER, "StepTimeout", "not answered"),
        waited,
    ]
    assert find_cause(endings, standings).process == RANK1


def test_a_rank_that_diverges_is_at_fault_though_others_say_so() -> None:
    assert find_cause([diverging(RANK0, (1,))], {}).process == RANK1
    assert find_cause([diverging(RANK0, ())], {}).process == RANK0  # of two nobody knows which


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (3, "ended with status 3"),
        (-signal.SIGSEGV, "killed by SIGSEGV"),
        (-40, "killed by signal 40"),
        (None, "ended without a word"),
    ],
)
def test_an_end_without_a_report_is_described(status: int | None, words: str) -> None:
    assert words in find_cause([Ending(RANK1, status, None)], {}).summary


@pytest.mark.parametrize(
    ("oom_kills", "words"),
    [
        (None, "by another program, by hand, or by the kernel for want of memory"),
        (0, "by another program or by hand, not by the kernel for want of memory"),
        (2, "by the kernel for want of memory, it seems: it has killed 2 here since the start"),
    ],
)
def test_want_of_memory_is_blamed_where_there_is_a_sign_of_it(oom_kills: int | None, words: str) -> None:
    endings = [Ending(name, -signal.SIGKILL, None, oom_kills) for name in (RANK1, SCHEDULER)]
    standing = {RANK0: Standing(False, (1,))}
    assert find_cause(endings, standing).summary == f"{RANK1} was killed by SIGKILL: {words}"
    fault = find_cause(endings, {})
    assert fault.process == f"{RANK1}, {SCHEDULER}"
    assert fault.summary == f"all processes ({RANK1}, {SCHEDULER}) were killed by SIGKILL at once: {words}"
    assert find_cause(endings[:1], {}).process == RANK1
    other = Ending(RANK0, -signal.SIGSEGV, None, oom_kills)
    assert find_cause([other, *endings], {}).process == RANK0


def cuda_error(process: str, error: str, summary: str, traceback: str = "") -> Ending:
    return Ending(process, 1, Report(error, summary, traceback, (), ()))


@pytest.mark.parametrize(
    ("ending", "forfeits", "is_external"),
    [
        (killed, False, True),
        (replace(killed, oom_kills=0), False, True),
        (replace(killed, oom_kills=1), False, False),  # a request may have taken the memory
        (Ending(RANK1, -signal.SIGXCPU, None), False, True),
        (raised, False, False),
        (waited, False, False),
        (Ending(RANK1, -signal.SIGSEGV, None), True, False),
        (Ending(RANK1, -signal.SIGBUS, None), True, False),
        (Ending(RANK1, -signal.SIGABRT, None), True, False),
        (Ending(RANK1, -signal.SIGFPE, None), True, False),
        (Ending(RANK1, -signal.SIGILL, None), True, False),
        (Ending(RANK1, None, None), True, False),  # nobody knows
        (Ending(RANK1, 3, None), True, False),
        (cuda_error(RANK1, "AcceleratorError", "CUDA error: an illegal memory access"), True, False),
        (cuda_error(RANK1, "AcceleratorError", "no words"), True, False),
        (cuda_error(RANK1, "RuntimeError", "CUDA driver error: device-side assert"), True, False),
        (cuda_error(RANK1, "RuntimeError", "Triton Error [CUDA]: misaligned address"), True, False),
        (cuda_error(RANK1, "DistBackendError", "NCCL error: unhandled cuda error"), True, False),
        (cuda_error(RANK1, "OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB"), False, False),
        (
            cuda_error(
                RANK1, "ValueError", "no", "RuntimeError: CUDA error: ECC\n\nDuring that\nValueError: no"
            ),
            True,
            False,
        ),
        (
            cuda_error(
                RANK1, "ValueError", "no", '  File "x.py"\n    raise no("CUDA error")\nValueError: no'
            ),
            False,
            False,
        ),
    ],
)
def test_what_an_ending_leaves(ending: Ending, forfeits: bool, is_external: bool) -> None:
    fault = find_cause([ending], {RANK0: Standing(False, at(1)), SCHEDULER: Standing(False, ())})
    assert (fault.forfeits, fault.is_external) == (forfeits, is_external)


def test_a_peer_that_aborts_forfeits_nothing_and_one_that_crashes_does() -> None:
    fault = find_cause([aborted, killed], {})
    assert (fault.process, fault.forfeits, fault.is_external) == (RANK1, False, True)
    crashed = Ending(RANK0, -signal.SIGSEGV, None)
    for endings in ([crashed, killed], [killed, crashed]):
        fault = find_cause(endings, {SCHEDULER: Standing(False, ())})
        assert (fault.forfeits, fault.is_external) == (True, False)
    broken = cuda_error(RANK0, "AcceleratorError", "CUDA error: unspecified launch failure")
    assert find_cause([killed, broken], {}).forfeits


def test_who_is_stopped_is_stopped_by_others_and_who_hangs_is_not() -> None:
    fault = find_cause([waited], {RANK1: Standing(True, at(1))})
    assert (fault.hung, fault.forfeits, fault.is_external) == (True, False, True)
    fault = find_cause([waited], {RANK1: Standing(False, at(1))})
    assert (fault.hung, fault.forfeits, fault.is_external) == (True, False, False)
    endings = [Ending(name, -signal.SIGKILL, None) for name in (RANK0, RANK1)]
    assert find_cause(endings, {}).is_external


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        ((Phase.LOADING, 0, 0, 0, 0), "was loading"),
        ((Phase.WARMING_UP, 0, 0, 0, 0), "was warming up"),
        ((Phase.READY, 0, 0, 0, 0), "was waiting for the plan of step 0"),
        ((Phase.READY, 8, 8, 8, 8), "was waiting for the plan of step 8"),
        ((Phase.READY, 8, 7, 7, 7), "was at the barrier before step 7"),
        ((Phase.READY, 8, 8, 7, 7), "was launching step 7"),
        ((Phase.READY, 8, 8, 8, 6), "was on its device with step 6, collectives included"),
    ],
)
def test_a_fault_says_what_its_rank_was_doing(progress: tuple[int, ...], words: str) -> None:
    stopped = {RANK1: Standing(True, progress), SCHEDULER: Standing(False, ())}
    assert find_cause([waited], stopped).summary.endswith(f"; {RANK1} {words}")
    died = Ending(RANK1, -signal.SIGSEGV, None, progress=progress)
    assert find_cause([died], {}).summary == f"{RANK1} was killed by SIGSEGV; {RANK1} {words}"
    told = reported(SCHEDULER, "ValueError", "no")
    assert find_cause([told], stopped).summary == f"{SCHEDULER} raised ValueError: no"


def test_a_gpu_that_fails_is_the_end_of_its_rank_and_of_what_its_memory_holds() -> None:
    fault = gpu_fault(1, "GPU 3 of rank 1 (GPU-x) reports critical error Xid 79: has fallen off the bus")
    assert fault.process == RANK1
    assert fault.summary.startswith(
        f"{RANK1} has lost its GPU: GPU 3 of rank 1 (GPU-x) reports critical error"
    )
    assert (fault.hung, fault.forfeits, fault.is_external) == (False, True, True)


def test_a_keeper_that_does_not_answer_is_at_fault_and_what_it_has_is_forfeit() -> None:
    report = Report("KeeperSilent", "tpworker-keeper has not answered within 20 s", "…", (), ())
    fault = find_cause([Ending("tpworker-rank1", 1, report)], {})
    assert (fault.process, fault.hung, fault.forfeits) == ("tpworker-keeper", True, True)
    assert fault.summary.startswith("tpworker-keeper hangs; tpworker-rank1 raised KeeperSilent")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_keeper_takes_what_it_has_along(number: int) -> None:
    """A kill says nothing against requests, as everywhere."""
    fault = find_cause([Ending("tpworker-keeper", -number, None)], {})
    assert (fault.process, fault.forfeits) == ("tpworker-keeper", True)
    assert fault.is_external == (number == signal.SIGKILL)
