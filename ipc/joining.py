"""How a process that somebody else has started becomes a rank's standby (see standby.py).

    outside process                                    runtime
      ├── connects to an abstract socket ───────────────►│  both look whether the other is of the same user
      ├── Hello: version, rank, CPUs, GPUs ─────────────►│  takes it, or says why not
      │◄── Accepted: its rank, what it is to run ────────┤
      ├── becomes that program, the connection its stdin │  from here on the connection is a control socket
      │◄── BYE: the runtime has ended, and why ──────────┤
      ├── LEFT: it ends, and why ───────────────────────►│  EOF without a word: it was killed

The first line of a Hello, and a refusal, are text, which any other version can read too.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from typing import Annotated

from tpworker.ipc.codec import MessageError, Within, pack_dataclass, unpack_dataclass
from tpworker.ipc.messages import Name, Rank
from tpworker.values import MAX_RANKS

MAX_HELLO_BYTES = 1 << 16
BYE = b"bye "
"""Begins the last message of a runtime; why it ended follows, nothing if it was asked to."""
LEFT = b"left "
"""Begins the last message of a process from outside; why it ends follows."""
ANY = -1

_GREETING = b"tpworker-join "
_YES, _NO = b"+", b"-"

GpuId = Annotated[str, Within(1, 128)]
Words = Annotated[str, Within(0, 1000)]


class Refused(Exception):
    """The runtime does not take this process; says why."""


class AnotherVersion(Exception):
    """Who says hello is of another version than this."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who wants to join, and what it has."""

    pid: Annotated[int, Within(1, 1 << 31)]
    rank: Annotated[int, Within(ANY, MAX_RANKS)]  # ANY: whichever is missing
    num_ranks: Annotated[int, Within(0, 1 << 20)]  # as its launcher counts them; 0: it does not say
    told_by: Words  # who told the rank: '--rank 1', 'RANK=1'
    cpus: tuple[Annotated[int, Within(0, 1 << 16)], ...]
    gpus: tuple[GpuId, ...] = ()  # UUIDs of those that it is shown, in CUDA's order
    gpu: Annotated[int, Within(ANY, 1 << 10)] = ANY  # which of them is its own; ANY: as its rank is numbered
    reachable: tuple[GpuId, ...] = ()  # UUIDs of all that it could use
    no_gpu: Words = ""  # why there are fewer than one might think


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a process that was taken is to be."""

    rank: Rank
    name: Name
    module: Name  # is run with `python -m`
    device: Name  # 'cpu' or 'cuda'
    log_format: Name
    log_level: Annotated[int, Within(0, 1000)]


def socket_address(name: str) -> str:
    """Where a runtime of this user listens for ranks under that name; another user's is another address."""
    return f"\0tpworker-join-{os.getuid()}-{name}"


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """The pid (as seen from here; 0: it cannot be) and the user id of whoever is at the other end."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, _ = struct.unpack("3i", packed)
    return pid, uid


def pack_hello(hello: Hello, version: str) -> bytes:
    """As it is sent."""
    return _GREETING + version.encode() + b"\n" + pack_dataclass(hello)


def unpack_hello(data: bytes, version: str) -> Hello:
    """The inverse.

    Raises:
        AnotherVersion: of tpworker than `version`.
        MessageError: it is none.
    """
    line, _, rest = data.partition(b"\n")
    if not line.startswith(_GREETING):
        raise MessageError("no tpworker that wants to join")
    theirs = line.removeprefix(_GREETING).decode(errors="replace")[:64]
    if theirs != version:
        raise AnotherVersion(theirs)
    return unpack_dataclass(Hello, rest)


def pack_answer(answer: Accepted | str) -> bytes:
    """As it is sent; a text says why not."""
    return _NO + answer.encode() if isinstance(answer, str) else _YES + pack_dataclass(answer)


def unpack_answer(data: bytes) -> Accepted:
    """The inverse.

    Raises:
        Refused: with the reason.
        MessageError: it is none.
    """
    if data[:1] == _NO:
        raise Refused(data[1:].decode(errors="replace"))
    if data[:1] != _YES:
        raise MessageError("an answer that is none")
    return unpack_dataclass(Accepted, data[1:])
