"""Which process is at fault, when several of them end at once.

A process that dies takes its peers along: their collectives fail, their barrier waits in vain. So what the
supervisor sees first is not always the cause. In this order, and among equals the first one seen:

    1. DIED      it ended without a report: killed by a signal, or crashed in native code
    2. RAISED    it reported an exception of its own
    3. ABORTED   it died of SIGABRT, which libraries also raise when a peer is gone
    4. WAITED    it reported that others did not come in time: these others are at fault; where masks did
                 not come, the scheduler that writes them
    5. LOST      it reported that the connection to a peer was lost

What happened also decides what may be used again: memory that outlives its process is good after a kill, a
hang or an exception, and not to be trusted after native code has crashed or a GPU has failed
(`Fault.forfeits`).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from tpworker.errors import RuntimeFailed
from tpworker.ipc.board import Phase
from tpworker.ipc.child import KEEPER_NAME, RANK_NAME, SCHEDULER_NAME, Report

#: Errors of these classes say that somebody else did not do something in time.
_WAITED = frozenset({"BarrierTimeout", "StepTimeout", "TimeoutError", "ChannelError"})
#: Of a rank, which may have wrapped it: what the scheduler writes did not come in time.
_NO_MASKS = "MasksMissing"
#: Of a rank: the process that owns memory of its GPU does not answer.
_NO_KEEPER = "KeeperSilent"
#: Words that say that somebody else has ended: of gloo, of NCCL, and our own, which may be wrapped.
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out waiting|BarrierAborted", re.IGNORECASE
)
#: Errors that say that what is wanted cannot be had here: the next process would say the same.
_REFUSALS = frozenset({"ConfigError", "ModelError", "KeeperFailed", "MemoryError", "OutOfMemoryError"})
#: Signals of code that has gone wrong, and may have written anywhere before.
_CRASHES = frozenset(
    {
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGABRT,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGTRAP,
        signal.SIGSYS,
    }
)
#: A GPU that could not do what it was asked for, as torch, CUDA's libraries, NCCL and Triton say it; that its
#: memory is full ('CUDA out of memory') is none. In a line that begins with it: a traceback indents what it
#: quotes.
_CUDA_ERROR = re.compile(
    r"^(?=\S).*(AcceleratorError|CUDA[ _]?((driver|runtime) )?error|\[CUDA\]|CU(BLAS|DNN)_STATUS_)",
    re.IGNORECASE | re.MULTILINE,
)


class Kind(IntEnum):
    """How much an ending says about the cause, most first."""

    DIED = 1
    RAISED = 2
    ABORTED = 3
    WAITED = 4
    LOST = 5


@dataclass(frozen=True, slots=True)
class Ending:
    """How one process ended.

    `status` is None while it is not known (it reported, or its pipe closed, but it still exits); negative:
    the number of the signal that killed it. `oom_kills`: how many processes the kernel has killed for want of
    memory since this one began, on the whole machine; None: it does not tell.
    """

    process: str
    status: int | None
    report: Report | None
    oom_kills: int | None = None
    progress: tuple[int, ...] = ()  # see `Standing`
    left: str = ""  # of a process that somebody else has started: what is known of its end, behind its name

    @property
    def was_killed(self) -> bool:
        """Whether it ended by SIGKILL, which none of ours sends before a fault is found."""
        return self.report is None and self.status == -signal.SIGKILL

    @property
    def was_killed_by_others(self) -> bool:
        """Whether a signal ended it that does not come of what a process does."""
        if self.left:  # it only forks others: nothing that it runs can have ended it
            return True
        return self.report is None and self.status is not None and self.status < 0 and not self.has_crashed

    @property
    def has_crashed(self) -> bool:
        """Whether it ended by a signal that native code gets for what it does."""
        return self.report is None and self.status is not None and -self.status in _CRASHES

    @property
    def forfeits(self) -> bool:
        """Whether nobody can vouch for the memory that it leaves, on the host and on its GPU: it has crashed,
        a GPU of its has failed, or nobody knows why it ended (native code that exits has a reason)."""
        if self.report is None:
            return not self.was_killed_by_others
        said = f"{self.report.error}: {self.report.summary}\n{self.report.traceback}"
        return _CUDA_ERROR.search(said) is not None

    @property
    def kind(self) -> Kind:
        if self.report is None:
            return Kind.ABORTED if self.status == -signal.SIGABRT else Kind.DIED
        if _LOST.search(f"{self.report.error}: {self.report.summary}"):
            return Kind.LOST
        if self.report.missing or self.report.error in _WAITED or self.misses_masks:
            return Kind.WAITED
        return Kind.RAISED

    @property
    def misses_masks(self) -> bool:
        """Whether it reported that masks did not come."""
        return self.report is not None and _NO_MASKS in f"{self.report.error}: {self.report.summary}"

    def describe(self) -> str:
        """What happened, in one line, beginning with the name of the process."""
        if self.report is not None:
            return f"{self.process} raised {self.report.error}: {self.report.summary}"
        if self.left:
            return f"{self.process} {self.left}"
        if self.status is None:
            return f"{self.process} ended without a word"
        if self.status < 0:
            killer = f": {_killer(self.oom_kills)}" if self.was_killed else ""
            return f"{self.process} was killed by {_signal_name(-self.status)}{killer}"
        return f"{self.process} ended with status {self.status}, without a report; its log may say more"


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a process is, while it lives: from the status board and from the kernel."""

    stopped: bool  # by SIGSTOP, or by a debugger
    progress: tuple[int, ...]  # of a rank: its phase, then the steps received, admitted, launched, completed


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a generation of processes ended."""

    process: str  # several, with commas, when they hang together and none can be singled out
    summary: str
    report: Report | None = None  # of the process at fault, if it could still write one
    traceback: str | None = None
    hung: bool = False  # the process lives, but does not go on
    forfeits: bool = False  # nobody can vouch for what is in memory that outlives the processes
    is_external: bool = False  # killed or stopped by somebody else: no request can have caused it
    is_final: bool = False  # others in their place would not get further

    @property
    def is_refusal(self) -> bool:
        """Whether a process has said that what is wanted of it cannot be had here."""
        return self.report is not None and self.report.error in _REFUSALS

    def failure(self) -> RuntimeFailed:
        """What everyone gets who waits for the runtime; a new one each, as an exception is raised once."""
        return RuntimeFailed(self.summary, self.process, self.traceback)


def gpu_fault(rank: int, summary: str) -> Fault:
    """The end of a rank whose GPU has failed, as `GpuWatch` tells of it."""
    process = RANK_NAME.format(rank)
    return Fault(process, f"{process} has lost its GPU: {summary}", forfeits=True, is_external=True)


def find_cause(endings: Sequence[Ending], standings: Mapping[str, Standing]) -> Fault:
    """The fault behind these endings, given in the order in which they were seen.

    Args:
        endings: at least one.
        standings: of each process that still lives, by name.
    """
    fault = _blame(endings, standings)
    progress = {ending.process: ending.progress for ending in endings}
    progress |= {name: standing.progress for name, standing in standings.items()}
    if doing := told_of(progress.get(fault.process, ())):
        fault = replace(fault, summary=f"{fault.summary}; {fault.process} {doing}")
    cause = min(endings, key=_rank_of)
    # Libraries abort when a peer is gone: only of the first to go that says something about its memory.
    forfeits = any(
        ending.forfeits and (ending is cause or ending.kind is not Kind.ABORTED) for ending in endings
    )
    # What the kernel kills for want of memory may have been made to want it by a request.
    is_external = (cause.was_killed_by_others and not cause.oom_kills) or (
        fault.process in standings and standings[fault.process].stopped
    )
    is_external = is_external and not forfeits
    lost_memory = fault.process == KEEPER_NAME  # and it was the keeper's
    return replace(fault, forfeits=forfeits or lost_memory, is_external=is_external)


def _blame(endings: Sequence[Ending], standings: Mapping[str, Standing]) -> Fault:
    first = min(endings, key=_rank_of)  # min keeps the first of equals
    if not standings and len(endings) > 1 and all(ending.was_killed for ending in endings):
        names = ", ".join(ending.process for ending in endings)
        killer = _killer(first.oom_kills)
        return Fault(names, f"all processes ({names}) were killed by SIGKILL at once: {killer}")
    report = first.report
    if report and first.kind in (Kind.WAITED, Kind.LOST):
        suspect = _suspect([RANK_NAME.format(rank) for rank in report.missing], standings)
        if suspect is not None and suspect != first.process:
            state = "is stopped (SIGSTOP or a debugger)" if standings[suspect].stopped else "hangs"
            summary = f"{suspect} {state}; {first.describe()}"
            return Fault(suspect, summary, traceback=report.traceback, hung=True)
        if first.misses_masks and SCHEDULER_NAME in standings:
            summary = f"{SCHEDULER_NAME} does not write masks; {first.describe()}"
            return Fault(SCHEDULER_NAME, summary, traceback=report.traceback, hung=True)
        ranks = [name for name, standing in standings.items() if standing.progress]
        if first.process == SCHEDULER_NAME and ranks:  # a collective hangs, and all are equally far
            return Fault(", ".join(ranks), first.describe(), traceback=report.traceback, hung=True)
    if report and report.error == _NO_KEEPER:
        summary = f"{KEEPER_NAME} hangs; {first.describe()}"
        return Fault(KEEPER_NAME, summary, traceback=report.traceback, hung=True)
    culprit = first.process
    if report and report.diverging:
        culprit = RANK_NAME.format(report.diverging[0])  # it may be its peers that say so
    return Fault(culprit, first.describe(), report, report.traceback if report else None)


def told_of(progress: tuple[int, ...]) -> str:
    """What a rank was doing, from its row: words behind its name; '' of who is no rank."""
    if not progress:
        return ""
    phase, received, admitted, launched, completed = progress
    if phase < Phase.READY:
        return f"was {Phase(phase).name.lower().replace('_', ' ')}"
    if completed < launched:
        return f"was on its device with step {completed}, collectives included"
    if launched < admitted:
        return f"was launching step {launched}"
    if admitted < received:
        return f"was at the barrier before step {admitted}"
    return f"was waiting for the plan of step {received}"


def _rank_of(ending: Ending) -> tuple[Kind, bool]:
    """The less, the nearer to the cause. Of those that waited, one that can say for whom is nearer."""
    names_nobody = ending.report is not None and not ending.report.missing
    return ending.kind, ending.kind is Kind.WAITED and names_nobody


def _suspect(named: Sequence[str], standings: Mapping[str, Standing]) -> str | None:
    """Who keeps the others waiting: one that is stopped; one that is named; one that is behind the rest."""
    for name, standing in standings.items():
        if standing.stopped:
            return name
    for name in named:
        if name in standings:
            return name
    ranks = {name: standing.progress for name, standing in standings.items() if standing.progress}
    behind = [name for name, progress in ranks.items() if progress == min(ranks.values())]
    return behind[0] if len(behind) < len(ranks) else None


def _killer(oom_kills: int | None) -> str:
    """Who has sent a SIGKILL, as far as it is known."""
    if oom_kills is None:
        return "by another program, by hand, or by the kernel for want of memory"
    if oom_kills:
        return f"by the kernel for want of memory, it seems: it has killed {oom_kills} here since the start"
    return "by another program or by hand, not by the kernel for want of memory"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
