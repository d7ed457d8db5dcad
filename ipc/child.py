"""What a child process is told, how it lives and dies with its parent, and how it says why it ended.

    parent                                   child
      ├── stdin: boot message, then silence ───►│  EOF: the parent is gone (the lifeline)
      │◄── report pipe: at most one report ─────┤  EOF: the child is gone, the fastest sign there is
      ├── memfds, inherited ───────────────────►│  barriers, board, masks, store
      └── the thread that starts it stays         PDEATHSIG: the kernel kills the child with that thread

The lifeline and PDEATHSIG cover each other: the lifeline works when the parent died before the child had
asked for PDEATHSIG; PDEATHSIG when the child hangs in native code and no Python thread gets to run.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NoReturn, TypeVar

import setproctitle

from tpworker.ipc.codec import MessageError, Within, pack_dataclass, unpack_dataclass
from tpworker.ipc.messages import (
    MAX_BLOCKS,
    MAX_RANKS,
    MAX_SEQUENCE,
    MAX_SLOTS,
    Generation,
    Name,
    NumDrafts,
    Rank,
)
from tpworker.ipc.streams import leave, make_output_safe

RANK_NAME = "tpworker-rank{}"
SCHEDULER_NAME = "tpworker-scheduler"

STACKS_SIGNAL = signal.SIGUSR1
"""Asks a child for the Python stacks of all its threads, on its report pipe; it works in a hung child too."""

Descriptor = Annotated[int, Within(0, 1 << 20)]
Address = Annotated[str, Within(1, 256)]
Word = Annotated[str, Within(1, 32)]
Path = Annotated[str, Within(1, 4096)]
Seconds = Annotated[float, Within(0, 1e9)]

MAX_VOCAB = 1 << 24
MAX_LOOKUP = 16  # tokens of an n-gram that is looked up

_MAX_BOOT_BYTES = 1 << 16  # what fits into a pipe: the parent never waits when it writes one
_MAX_SUMMARY = 2_000  # characters; up to 4 bytes each, and a whole report fits into a pipe
_MAX_TRACEBACK = 12_000

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------- what it is told


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """The part of the configuration that the scheduler needs, every default filled in."""

    lookahead: Annotated[int, Within(0, 64)]
    max_num_seqs: Annotated[int, Within(1, MAX_SLOTS)]
    max_num_batched_tokens: Annotated[int, Within(1, MAX_SEQUENCE)]
    max_model_len: Annotated[int, Within(2, MAX_SEQUENCE)]
    vocab_size: Annotated[int, Within(1, MAX_VOCAB)]
    block_size: Annotated[int, Within(1, MAX_SEQUENCE)]
    prefix_caching: bool
    step_timeout: Seconds
    start_timeout: Seconds
    num_drafts: NumDrafts = 0  # of a slot, at most; 0: no speculation


@dataclass(frozen=True, slots=True)
class RankSettings:
    """The part of the configuration that a rank needs."""

    lookahead: Annotated[int, Within(0, 64)]
    max_num_seqs: Annotated[int, Within(1, MAX_SLOTS)]
    max_num_batched_tokens: Annotated[int, Within(1, MAX_SEQUENCE)]
    max_model_len: Annotated[int, Within(2, MAX_SEQUENCE)]
    block_size: Annotated[int, Within(1, MAX_SEQUENCE)]
    num_kv_blocks: Annotated[int, Within(0, MAX_BLOCKS)]  # 0: from the device's free memory
    gpu_memory_utilization: Annotated[float, Within(0, 1)]
    device: Word  # 'cpu' or 'cuda'
    dtype: Word  # 'float32', …, or 'auto': what the checkpoint says
    load_format: Word
    seed: Annotated[int, Within(-(2**63), 2**63 - 1)]
    check_ranks_agree: bool
    step_timeout: Seconds
    start_timeout: Seconds
    speculative_method: Annotated[str, Within(0, 16)] = ""  # '', 'ngram' or 'mtp'
    num_drafts: NumDrafts = 0
    prompt_lookup_max: Annotated[int, Within(1, MAX_LOOKUP)] = 1  # tokens, of n-grams
    prompt_lookup_min: Annotated[int, Within(1, MAX_LOOKUP)] = 1


@dataclass(frozen=True, slots=True)
class SchedulerBoot:
    """All that the scheduler process is told by its parent."""

    generation: Generation
    name: Name
    log_level: Annotated[int, Within(0, 1000)]
    report_fd: Descriptor
    num_ranks: Annotated[int, Within(1, MAX_RANKS)]
    runtime_address: Address  # connects
    plan_addresses: tuple[Address, ...]  # binds; one a rank, in rank order
    result_address: Address  # binds; rank 0 connects
    board_fd: Descriptor
    masks_fd: Descriptor
    settings: SchedulerSettings


@dataclass(frozen=True, slots=True)
class RankBoot:
    """All that a rank is told by its parent."""

    generation: Generation
    name: Name
    log_level: Annotated[int, Within(0, 1000)]
    report_fd: Descriptor
    rank: Rank
    num_ranks: Annotated[int, Within(1, MAX_RANKS)]
    plan_address: Address  # connects
    result_address: Address  # rank 0 connects
    barrier_fd: Descriptor
    board_fd: Descriptor
    meeting_fd: Descriptor  # a second barrier, for the collectives of CPU ranks
    masks_fd: Descriptor
    store_fd: Descriptor  # an empty file, the same for all ranks, for whatever their collectives need
    model: Path
    settings: RankSettings


Boot = TypeVar("Boot", SchedulerBoot, RankBoot)


def board_names(num_ranks: int) -> list[str]:
    """The rows of the status board, which all processes attach alike: the scheduler, then the ranks."""
    return [SCHEDULER_NAME, *(RANK_NAME.format(rank) for rank in range(num_ranks))]


def pack_boot(boot: SchedulerBoot | RankBoot) -> bytes:
    """A boot message as the child reads it from its stdin."""
    packed = pack_dataclass(boot)
    if len(packed) > _MAX_BOOT_BYTES - 4:
        raise MessageError(f"a boot message of {len(packed)} bytes; the limit is {_MAX_BOOT_BYTES - 4}")
    return len(packed).to_bytes(4, "little") + packed


# ------------------------------------------------------------------------------------ how it reports


@dataclass(frozen=True, slots=True)
class Report:
    """Why a child ended, in its own words: the exception that left its main function.

    `missing` are the ranks that did not come in time, `diverging` those that do something else than the
    others, as attributes `missing` or `minority` of the exception, or of one that it was raised from, say.
    """

    error: Annotated[str, Within(1, 256)]  # the exception's class
    summary: Annotated[str, Within(0, _MAX_SUMMARY)]
    traceback: Annotated[str, Within(0, _MAX_TRACEBACK)]
    missing: tuple[Rank, ...]
    diverging: tuple[Rank, ...]

    @classmethod
    def of(cls, error: BaseException) -> Report:
        """The report of an exception, cut to what fits into a pipe; of the traceback the end is kept."""
        text = "".join(traceback.format_exception(error))
        return cls(
            error=type(error).__name__[:256],
            summary=_clean(str(error) or repr(error))[:_MAX_SUMMARY],
            traceback=_clean(text)[-_MAX_TRACEBACK:],
            missing=_ranks_in(error, "missing"),
            diverging=_ranks_in(error, "minority"),
        )


def _ranks_in(error: BaseException, attribute: str) -> tuple[int, ...]:
    while error.__cause__ is not None and not hasattr(error, attribute):
        error = error.__cause__
    return tuple(rank for rank in getattr(error, attribute, ()) if 0 <= rank < MAX_RANKS)


def _clean(text: str) -> str:
    return text.encode(errors="replace").decode()  # lone surrogates, from undecodable file names


_report_lock = threading.Lock()


def write_report(fd: int, report: Report) -> None:
    """Writes a child's report. The first one counts, if several threads find something to report.

    A zero byte and its length come first: stacks (`STACKS_SIGNAL`) are text before it.
    """
    packed = pack_dataclass(report)
    with _report_lock:  # who comes second shall not end the process before the first has been written
        os.write(fd, b"\0" + len(packed).to_bytes(4, "little") + packed)


def read_report(data: bytes) -> tuple[Report | None, str]:
    """The report and the stacks in all that came out of a report pipe. A report cut short is none."""
    stacks, _, rest = data.partition(b"\0")
    size = int.from_bytes(rest[:4], "little")
    report = unpack_dataclass(Report, rest[4 : 4 + size]) if size and len(rest) >= 4 + size else None
    return report, stacks.decode(errors="replace")


# ---------------------------------------------------------------------------------- how it lives


def run_child(boot_class: type[Boot], main: Callable[[Boot], None]) -> NoReturn:
    """The life of a child process: reads its boot message from stdin, runs `main`, reports, ends.

    The process ends with status 0 when `main` returns and 1, with a report, when it raises. It ends
    without running exit handlers: threads and native libraries that hang there would keep it alive.
    """
    make_output_safe()
    boot = _read_boot(boot_class)
    os.set_inheritable(boot.report_fd, False)  # EOF must mean that this process is gone, not its children
    setproctitle.setproctitle(boot.name)
    threading.current_thread().name = boot.name
    _die_with_parent()
    # A service manager or a terminal may signal all processes at once; when to stop is for the parent to say.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()  # a crash in native code leaves its stacks on stderr
    faulthandler.register(STACKS_SIGNAL, file=boot.report_fd, all_threads=True)
    _log_as(boot.name, boot.log_level)
    try:
        main(boot)
    except BaseException as error:
        write_report(boot.report_fd, Report.of(error))
        leave(1)
    leave(0)


def _read_boot(boot_class: type[Boot]) -> Boot:
    size = int.from_bytes(_read_exactly(0, 4), "little")
    if size > _MAX_BOOT_BYTES:
        raise MessageError(f"a boot message of {size} bytes; the limit is {_MAX_BOOT_BYTES}")
    return unpack_dataclass(boot_class, _read_exactly(0, size))


def _read_exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = os.read(fd, size - len(data))
        if not part:
            raise MessageError("no boot message on stdin: only tpworker itself starts this program")
        data += part
    return data


def _die_with_parent() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_pdeathsig = 1
    if libc.prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0) != 0:
        logger.warning("no PDEATHSIG: %s; the lifeline has to do", os.strerror(ctypes.get_errno()))
    lifeline = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # nothing else shall read from the lifeline
    os.close(null)
    threading.Thread(target=_watch_lifeline, args=(lifeline,), name="lifeline", daemon=True).start()


def _watch_lifeline(lifeline: int) -> None:
    while os.read(lifeline, 1):
        pass
    os._exit(1)


def _log_as(name: str, level: int) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name} %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("tpworker").setLevel(level)
