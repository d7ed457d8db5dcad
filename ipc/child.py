"""What a child process is told, how it lives and dies with its parent, and how it says why it ended.

    runtime                                  child
      ├── lifeline: nothing ever comes ────────►│  EOF: the runtime's process is gone
      │◄── report pipe: at most one report ─────┤  EOF: the child is gone, the fastest sign there is
      ├── memfds ──────────────────────────────►│  barriers, board, masks, store, trace, what is kept
      └── standby, from a thread that stays ───►│  PDEATHSIG: the kernel kills the standby with that thread,
                                                   and the child with the standby, of which it was forked

The lifeline and PDEATHSIG cover each other: the lifeline works when the parent died before the child had
asked for PDEATHSIG; PDEATHSIG when the child hangs in native code and no Python thread gets to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, NoReturn, TypeVar

import setproctitle

from tpworker.ipc.codec import MessageError, Within, pack_dataclass, unpack_dataclass
from tpworker.ipc.messages import (
    MAX_BLOCKS,
    MAX_SEQUENCE,
    MAX_SLOTS,
    Generation,
    Name,
    NumDrafts,
    Rank,
)
from tpworker.ipc.outside import Outside
from tpworker.ipc.standby import MAX_BOOT_BYTES, Forked, serve, take_control
from tpworker.ipc.streams import leave, make_output_safe
from tpworker.logs import TEXT, make_formatter
from tpworker.values import MAX_RANKS

RANK_NAME = "tpworker-rank{}"
SCHEDULER_NAME = "tpworker-scheduler"
RANK_STANDBY = "tpworker-rank-standby"
OUTSIDE_STANDBY = "tpworker-rank{}-standby"  # of one rank, started from outside
SCHEDULER_STANDBY = "tpworker-scheduler-standby"
KEEPER_NAME = "tpworker-keeper"

READY = b"ready"
"""What a standby says once it can be forked; otherwise it sends a `Report`."""

STACKS_SIGNAL = signal.SIGUSR1
"""Asks a child for the Python stacks of all its threads, on its report pipe; it works in a hung child too."""

Descriptor = Annotated[int, Within(0, 1 << 20)]
Address = Annotated[str, Within(1, 256)]
Word = Annotated[str, Within(1, 32)]
Path = Annotated[str, Within(1, 4096)]
Seconds = Annotated[float, Within(0, 1e9)]

MAX_VOCAB = 1 << 24
MAX_UPDATES = 1 << 53
MAX_LOOKUP = 16  # tokens of an n-gram that is looked up

_MAX_SUMMARY = 2_000  # characters; up to 4 bytes each, and a whole report fits into a pipe
_MAX_TRACEBACK = 12_000

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------- what it is told


@dataclass(frozen=True, slots=True)
class KvEventsSettings:
    """Where changes of the prefix cache are published. Part of `SchedulerSettings`."""

    endpoint: Annotated[str, Within(1, 1024)]
    replay_endpoint: Annotated[str, Within(0, 1024)]  # empty: there is none
    buffer_steps: Annotated[int, Within(1, 1 << 20)]  # batches that can be heard again
    hwm: Annotated[int, Within(1, 1 << 30)]  # batches that wait for a slow reader
    max_queue_size: Annotated[int, Within(1, 1 << 30)]  # that wait to be published
    topic: Annotated[str, Within(0, 256)]
    medium: Word  # 'GPU' or 'CPU'


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
    step_timeout: Seconds  # 0: chosen from what steps take
    start_timeout: Seconds
    num_drafts: NumDrafts = 0  # of a slot, at most; 0: no speculation
    shortest_deadline: Seconds = 5.0  # of a step, if it is chosen
    kv_events: KvEventsSettings | None = None
    target_itl: Seconds = 0.0  # between two tokens of a request; 0: every step holds as much as it may
    target_ttft: Seconds = 0.0  # to its first token; with the other
    has_graphs: bool = False  # steps are padded to a few sizes


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
    step_timeout: Seconds  # 0: the scheduler chooses, and says so on the board
    start_timeout: Seconds
    speculative_method: Annotated[str, Within(0, 16)] = ""  # '', 'ngram' or 'mtp'
    num_drafts: NumDrafts = 0
    prompt_lookup_max: Annotated[int, Within(1, MAX_LOOKUP)] = 1  # tokens, of n-grams
    prompt_lookup_min: Annotated[int, Within(1, MAX_LOOKUP)] = 1
    kv_cache_dtype: Word = "auto"  # 'auto': that of `dtype`; or 'fp8'
    quantization: Annotated[str, Within(0, 16)] = ""  # '' or 'fp8', of weights that are not quantised


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
    blocks_fd: Descriptor  # what KV blocks hold, for the next generation
    log_format: Word = TEXT
    trace_fd: Descriptor | None = None  # who wants to know what it does, see trace.py; None: nobody


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
    kept_fd: Descriptor  # what outlives this rank's process, see rank/kept.py
    keeper_address: Annotated[str, Within(0, 256)] = ""  # where GPU memory is kept; empty: nowhere
    log_format: Word = TEXT
    trace_fd: Descriptor | None = None  # as the scheduler's
    weights_fd: Descriptor | None = None  # safetensors in place of those of the model's folder
    weights_number: Annotated[int, Within(0, MAX_UPDATES)] = 0  # of the weights: those of the start are 0
    num_sharing: Annotated[int, Within(0, MAX_RANKS)] = 0  # ranks that share this one's CPUs; 0: all do
    gpus: tuple[
        Annotated[str, Within(1, 128)], ...
    ] = ()  # all ranks', by UUID; (): as CUDA numbers them here


Boot = TypeVar("Boot", SchedulerBoot, RankBoot)


def board_names(num_ranks: int) -> list[str]:
    """The rows of the status board, which all processes attach alike: the scheduler, then the ranks."""
    return [SCHEDULER_NAME, *(RANK_NAME.format(rank) for rank in range(num_ranks))]


def pack_boot(boot: SchedulerBoot | RankBoot) -> bytes:
    """A boot message as a standby is sent it."""
    packed = pack_dataclass(boot)
    if len(packed) > MAX_BOOT_BYTES:
        raise MessageError(f"a boot message of {len(packed)} bytes; the limit is {MAX_BOOT_BYTES}")
    return packed


def descriptors_of(boot: SchedulerBoot | RankBoot) -> list[int]:
    """The descriptors that go with a boot message, all but the report pipe, in the order of its fields."""
    return [getattr(boot, name) for name in _descriptor_fields(boot)]


def _descriptor_fields(boot: SchedulerBoot | RankBoot) -> list[str]:
    names = (f.name for f in fields(boot) if f.name.endswith("_fd") and f.name != "report_fd")
    return [name for name in names if getattr(boot, name) is not None]


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


def run_child(
    boot_class: type[Boot], main: Callable[[Boot], None], prepare: Callable[[str], None] | None = None
) -> NoReturn:
    """The life of a standby, and of every child that is forked from it: each runs `main`, reports, ends.

    A child ends with status 0 when `main` returns and 1, with a report, when it raises. It ends
    without running exit handlers: threads and native libraries that hang there would keep it alive.

    Args:
        prepare: called in the standby with 'cpu' or 'cuda': imports what `main` would. It must start no
            thread, and not so much as look for a GPU: CUDA cannot be used in the child of a process that has.
    """
    is_ours = not sys.argv[5:]  # the pid of another launcher
    control, device = begin(is_ours), sys.argv[2]
    outside = None if is_ours else Outside(control, int(sys.argv[5]))
    gc.disable()  # or it looks through what torch is made of, time and again: a fifth of the import
    try:
        if prepare is not None:
            prepare(device)
    except BaseException as error:
        control.send(pack_dataclass(Report.of(error)))
        leave(1)
    gc.freeze()  # what is there is never looked through again: its pages stay shared with the children
    gc.enable()
    with contextlib.suppress(ConnectionError):  # the runtime is gone, as `serve` finds out
        control.send(READY)
    forked = serve(control, lambda fd, error: write_report(fd, Report.of(error)), outside)
    _live(forked, boot_class, main)


def begin(is_ours: bool = True) -> socket.socket:
    """What comes first in a process that lives as long as the runtime, whose arguments begin with its name,
    its device, and the format and the level of its log. Returns its control socket: EOF there means that the
    runtime is gone.

    Args:
        is_ours: whether the runtime has started it, with whose thread it is to end.
    """
    make_output_safe()
    control = take_control()
    _be_called(sys.argv[1], max(int(sys.argv[4]), logging.WARNING), sys.argv[3])
    if is_ours:
        _die_with_parent()
        # A service manager or a terminal may signal all processes at once; when to stop is for us to say.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()  # a crash in native code leaves its stacks on stderr
    return control


def _live(forked: Forked, boot_class: type[Boot], main: Callable[[Boot], None]) -> NoReturn:
    """The life of a child, from fork to end."""
    try:
        os.setsid()  # keys typed in a terminal (Ctrl-C, Ctrl-Z) are signals to all of a session
        boot = unpack_dataclass(boot_class, forked.request.boot)
        numbers: dict[str, Any] = dict(zip(_descriptor_fields(boot), forked.descriptors, strict=True))
        boot = replace(boot, report_fd=forked.report_fd, **numbers)
        _be_called(boot.name, boot.log_level, boot.log_format)
        _die_with_parent(forked.standby)
        _keep_to(forked.request.cpus)
        faulthandler.register(STACKS_SIGNAL, file=boot.report_fd, all_threads=True)
        threading.Thread(
            target=_watch_lifeline, args=(forked.lifeline,), name="lifeline", daemon=True
        ).start()
        main(boot)
    except BaseException as error:
        write_report(forked.report_fd, Report.of(error))
        leave(1)
    leave(0)


def _be_called(name: str, log_level: int, log_format: str) -> None:
    setproctitle.setproctitle(name)
    threading.current_thread().name = name
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(make_formatter(log_format, name, 2))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    logging.captureWarnings(True)  # of Python's own kind: records, too
    root.setLevel(max(logging.WARNING, log_level))
    logging.getLogger("tpworker").setLevel(log_level)


def _die_with_parent(parent: int | None = None) -> None:
    """Has the kernel end this process with its parent.

    Args:
        parent: the pid that it had when we came to be; None: somebody else looks after that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_pdeathsig = 1
    if libc.prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0) != 0:
        logger.warning("no PDEATHSIG: %s; the lifeline has to do", os.strerror(ctypes.get_errno()))
    if parent is not None and os.getppid() != parent:
        os._exit(1)  # it died before we had asked


def _keep_to(cpus: tuple[int, ...]) -> None:
    """Has this process run on these CPUs alone: before it has other threads, which would not follow."""
    if cpus:
        try:
            os.sched_setaffinity(0, cpus)
        except OSError as error:  # they were taken from us meanwhile
            logger.warning("it cannot be kept to its CPUs: %s", error)


def _watch_lifeline(lifeline: int) -> None:
    while os.read(lifeline, 1):
        pass
    os._exit(1)
