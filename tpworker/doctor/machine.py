"""Whether this machine has what the processes of a group need of it: kernel, limits, shared memory, cores."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import select
import socket
import sys
from collections.abc import Iterator

from tpworker.doctor.check import Check, missing, ok, warning
from tpworker.errors import ConfigError
from tpworker.ipc.futex import sleeper
from tpworker.ipc.limits import cpu_quota, usable_cores
from tpworker.ipc.memory import SharedWords
from tpworker.runtime.loading import check_working_directory

RANK_DESCRIPTORS = 256
"""What a rank opens at most: memfds, sockets, and on GPUs the driver's files, of which there are dozens."""
SERVER_DESCRIPTORS = 2048
"""Connections to the HTTP front that a plain limit of 1024 would not allow: max_queue and max_num_seqs."""
SHM_BYTES = 64 << 20
"""What NCCL may want of /dev/shm for a rank, at most some tens of MB."""

_GIB = 1 << 30


def check_machine(device: str, num_ranks: int) -> Iterator[Check]:
    """All of it, for a group of `num_ranks` on 'cpu' or 'cuda'."""
    yield _kernel()
    yield _futex()
    yield _abstract_sockets()
    yield _process_handles()
    yield _memfds()
    if device == "cuda" and num_ranks > 1:
        yield _shm(num_ranks)
    yield _descriptors(num_ranks)
    yield _locked_memory()
    yield _cores(device, num_ranks, usable_cores(), cpu_quota())


def _kernel() -> Check:
    system = f"{platform.system()} {platform.release()} on {platform.machine()}"
    found = f"{system}, Python {platform.python_version()}"
    if sys.platform != "linux":
        return missing("system", found, "run it on Linux")
    return ok("system", found)


def check_place() -> Check:
    """Whether there is a working directory."""
    try:
        check_working_directory()
    except ConfigError as error:
        return missing("working directory", str(error), None)
    return ok("working directory", os.getcwd())


def _futex() -> Check:
    """Sleeps on a word that has changed already, which returns at once."""
    try:
        words = SharedWords.create("tpworker-doctor", 2, 1)
        try:
            sleeper(words.address, 0.001)(0, 0.0)
        finally:
            words.close()
    except OSError as error:
        return missing(
            "futex", f"the barrier cannot sleep: {error}", "allow the system call futex (seccomp profile)"
        )
    return ok("futex", "works on shared memory")


def _abstract_sockets() -> Check:
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(f"\0tpworker-{os.getpid()}-doctor")
    except OSError as error:
        return missing(
            "abstract sockets",
            str(error),
            "allow AF_UNIX sockets in the abstract namespace (AppArmor, seccomp)",
        )
    return ok("abstract sockets", "can be bound")


def _process_handles() -> Check:
    try:
        handle = os.pidfd_open(os.getpid())
    except OSError as error:
        return warning(
            "pidfd",
            f"{error}: the end of a process is seen by its pipe alone",
            "nothing must be done; Linux 5.3 and a seccomp profile with pidfd_open have it",
        )
    poll = select.poll()  # `select` refuses descriptors from 1024 on
    poll.register(handle, select.POLLIN)
    poll.poll(0)
    os.close(handle)
    return ok("pidfd", "the end of a process can be waited for")


def _memfds() -> Check:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "memfd_create"):
        return missing(
            "shared memory", "no memfd_create", "use a C library that has it (glibc 2.27, musl 1.1.20)"
        )
    try:
        SharedWords.create("tpworker-doctor", 1 << 10, 1).close()
    except OSError as error:
        return missing("shared memory", str(error), "allow the system call memfd_create (seccomp profile)")
    return ok("shared memory", "memfds can be made and sealed")


def _shm(num_ranks: int) -> Check:
    """tpworker itself does not use it. NCCL does, where ranks talk through the host."""
    try:
        state = os.statvfs("/dev/shm")
    except OSError as error:
        return warning(
            "/dev/shm", f"{error}: NCCL may need it", "mount a tmpfs there (docker run --shm-size=1g)"
        )
    free, wanted = state.f_bavail * state.f_frsize, SHM_BYTES * num_ranks
    found = f"{free / _GIB:.2f} GiB free"
    if free < wanted:
        remedy = (
            f"give it {wanted / _GIB:.2f} GiB (docker run --shm-size=1g, or remount it with a larger size)"
        )
        return warning("/dev/shm", f"{found}, and NCCL may need more for {_ranks(num_ranks)}", remedy)
    return ok("/dev/shm", f"{found}, for NCCL")


def _descriptors(num_ranks: int) -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(SERVER_DESCRIPTORS, 16 * num_ranks + RANK_DESCRIPTORS)
    found = "no limit" if soft == resource.RLIM_INFINITY else f"{soft} a process"
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return ok("open files", found)
    remedy = f"ulimit -n {wanted}" + (
        "" if hard == resource.RLIM_INFINITY or hard >= wanted else f" (the hard limit is {hard})"
    )
    if soft < RANK_DESCRIPTORS:
        return missing("open files", f"{found}, and a rank may need {RANK_DESCRIPTORS}", remedy)
    return warning("open files", f"{found}: enough for ranks, not for many clients at once", remedy)


def _locked_memory() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "no limit" if soft == resource.RLIM_INFINITY else f"{soft / (1 << 20):g} MiB a process"
    return ok("locked memory", f"{limit} (CUDA's pinned buffers do not count against it)")


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


def _cores(device: str, num_ranks: int, cores: int, quota: float | None = None) -> Check:
    """`quota`: cores' worth of time that a control group allows, perhaps why there are so few `cores`."""
    is_limited = quota is not None and quota < cores + 1
    limit = f" (the container's CPU limit is {quota:g})" if is_limited else ""
    found = f"{cores} for {_ranks(num_ranks)}{limit}"
    wanted = num_ranks if device == "cpu" else 2 * num_ranks + 2
    if cores >= wanted:
        return ok("cores", found)
    if device == "cpu":
        remedy = f"use fewer ranks: -tp {cores}" + ", or raise the limit" * is_limited
        return warning("cores", f"{found}: they take turns, and get slower", remedy)
    return warning(
        "cores",
        f"{found}: each wants one to launch steps and one to publish, scheduler and server one each",
        f"allow {wanted} (taskset, the container's CPU limit)",
    )
