"""`tpworker rank`: a rank that somebody else starts, and that joins a runtime.

It says who it is, and becomes what it is told to be by exec: the standby of its rank, of the same pid.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from typing import NoReturn

from tpworker.cli.log_options import say
from tpworker.cli.rank_options import RankOptions
from tpworker.errors import ConfigError, RuntimeFailed
from tpworker.ipc.codec import MessageError
from tpworker.ipc.joining import (
    ANY,
    MAX_HELLO_BYTES,
    Accepted,
    Hello,
    Refused,
    pack_hello,
    peer_of,
    socket_address,
    unpack_answer,
)
from tpworker.ipc.outside import SIGNALS
from tpworker.ipc.spawn import child_environment
from tpworker.observe.gpus import find_all_gpus
from tpworker.observe.launch import find_launch
from tpworker.observe.nvml import find_gpus
from tpworker.values import MAX_RANKS
from tpworker.version import version

ANSWER_SECONDS = 30.0
"""How long a runtime may take to answer who has connected."""
_RETRY_SECONDS = 0.1


def run_rank(options: RankOptions) -> NoReturn:
    """Joins, and becomes the standby of its rank.

    Raises:
        ConfigError: the runtime refuses it, or it is another user's.
        RuntimeFailed: there is no runtime.
    """
    launcher = os.getppid()
    connection, accepted = _join(options, hello_of(options))
    os.dup2(connection.fileno(), 0)  # inheritable; the other is closed by exec
    os.execve(
        sys.executable,
        [
            sys.executable, "-P", "-m", accepted.module, accepted.name, accepted.device, accepted.log_format,
            str(accepted.log_level), str(launcher if launcher > 1 else 0),
        ],
        child_environment(accepted.device),
    )  # fmt: skip


def hello_of(options: RankOptions) -> Hello:
    """Who this process is. Raises ConfigError: its environment says nonsense."""
    launch = find_launch(os.environ, options.rank)
    shown_to_us = find_gpus()
    return Hello(
        pid=os.getpid(),
        rank=ANY if launch.rank is None else min(launch.rank, MAX_RANKS),
        num_ranks=launch.num_ranks or 0,
        told_by=launch.told_by,
        cpus=tuple(sorted(os.sched_getaffinity(0))),
        gpus=tuple(gpu.uuid for gpu in shown_to_us.gpus),
        gpu=ANY if launch.local is None else min(launch.local, 1 << 10),
        reachable=tuple(gpu.uuid for gpu in find_all_gpus().gpus),
        no_gpu=(shown_to_us.problem or "")[:1000],
    )


def _join(options: RankOptions, hello: Hello) -> tuple[socket.socket, Accepted]:
    """Connects as soon as the runtime is there, and is taken."""
    deadline, is_told = time.monotonic() + options.timeout, False
    while time.monotonic() < deadline:
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            with contextlib.suppress(ConnectionError, BlockingIOError):  # not there, no more, or very busy
                connection.connect(socket_address(options.address))
                accepted = _greet(connection, hello)
                undo.pop_all()
                return connection, accepted
        if not is_told:
            say(f"waiting for a runtime whose join address is {options.address!r}", logging.INFO)
            is_told = True
        time.sleep(_RETRY_SECONDS)
    raise RuntimeFailed(
        f"no runtime has been at {options.address!r} within {options.timeout:g} s (--timeout): start one "
        f"with --join-address {options.address}, on this machine, as this user, and in the same network "
        "namespace (container)"
    )


def _greet(connection: socket.socket, hello: Hello) -> Accepted:
    """Says who it is. Raises ConfigError: it is not taken; ConnectionError: the runtime has left."""
    _, uid = peer_of(connection)
    if uid != os.getuid():
        raise ConfigError(
            f"who listens at that join address is user {uid}, and this is user {os.getuid()}: they are told "
            "nothing; take another address"
        )
    connection.settimeout(ANSWER_SECONDS)
    # One that came before the program that it becomes has its handlers would end it: it is to hear it then.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        accepted = _ask(connection, hello)
    except BaseException:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        raise
    connection.settimeout(None)
    return accepted


def _ask(connection: socket.socket, hello: Hello) -> Accepted:
    try:
        connection.send(pack_hello(hello, version()))
        data = connection.recv(MAX_HELLO_BYTES)
        if not data:
            raise ConnectionResetError("the runtime has left")
        return unpack_answer(data)
    except TimeoutError:
        raise RuntimeFailed(f"the runtime has not answered within {ANSWER_SECONDS:g} s") from None
    except Refused as refused:
        raise ConfigError(f"the runtime refuses this process: {refused}") from None
    except MessageError as error:
        raise ConfigError(
            f"what listens at that join address is no tpworker of this version: {error}"
        ) from None
