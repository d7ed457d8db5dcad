"""The keeper: a process that owns memory of the GPUs which outlives ranks, and does nothing else.

    rank i ── socket ──► keeper: what is there of this name? make it anew, so large; free it
           ◄── a handle, which the rank maps (CUDA IPC): milliseconds for any size

A rank that is killed takes nothing along but its mapping. The keeper ends with the runtime, and the driver
frees what it has. It is called with the socket that it listens at, as a descriptor, and the number of GPUs;
its stdin is a control socket as a standby's: EOF there means that the runtime is gone. It runs no kernel, and
imports no torch: a context on each GPU is all that it costs, some hundreds of MB of the GPU's memory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import select
import socket
import struct
import sys
import time
from dataclasses import dataclass
from typing import Annotated, NoReturn, Protocol

from tpworker.ipc.child import READY, begin
from tpworker.ipc.codec import MessageError, Within, pack_dataclass, unpack_dataclass
from tpworker.ipc.messages import Name, Rank, Text
from tpworker.ipc.streams import leave
from tpworker.rank.driver import HANDLE_BYTES, Driver, DriverError

MAX_MESSAGE_BYTES = 1 << 17

_MAX_AREA_BYTES = 1 << 50
_NO_DESCRIPTORS_SECONDS = 0.1  # after which it is looked whether some are free

AS_IT_IS = -1


@dataclass(frozen=True, slots=True)
class AreaRequest:
    """What a rank asks. An area is known by its GPU and its name."""

    device: Rank  # the number of the GPU
    name: Name
    num_bytes: Annotated[int, Within(AS_IT_IS, _MAX_AREA_BYTES)]  # AS_IT_IS; 0: freed; else made anew


@dataclass(frozen=True, slots=True)
class AreaAnswer:
    """What there is of the area after that."""

    num_bytes: Annotated[int, Within(0, _MAX_AREA_BYTES)] = 0  # 0: nothing
    number: Annotated[int, Within(0, 2**63)] = 0  # of the allocation: no two have the same
    handle: Annotated[bytes, Within(0, HANDLE_BYTES)] = b""
    error: Text = ""  # why not; empty: nothing went wrong


class Memory(Protocol):
    """What a keeper needs of `Driver`."""

    def enter(self, index: int) -> None: ...

    def allocate(self, num_bytes: int) -> int: ...

    def free(self, address: int) -> None: ...

    def export(self, address: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class _Area:
    address: int
    num_bytes: int
    number: int


class Areas:
    """All areas of all GPUs.

    Args:
        memory: to have them in.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._areas: dict[tuple[int, str], _Area] = {}

    def answer(self, request: AreaRequest) -> AreaAnswer:
        """Does what was asked."""
        key = request.device, request.name
        try:
            self._memory.enter(request.device)
            if request.num_bytes != AS_IT_IS and key in self._areas:
                self._memory.free(self._areas.pop(key).address)
            if request.num_bytes > 0:
                address = self._memory.allocate(request.num_bytes)
                self._areas[key] = _Area(address, request.num_bytes, secrets.randbits(63))
            area = self._areas.get(key)
            if area is None:
                return AreaAnswer()
            return AreaAnswer(area.num_bytes, area.number, self._memory.export(area.address))
        except DriverError as error:
            return AreaAnswer(error=str(error))


class NoMemory:
    """In the place of a driver that is not there."""

    def __init__(self, error: DriverError) -> None:
        self._error = error

    def enter(self, index: int) -> None:
        raise self._error

    def allocate(self, num_bytes: int) -> int:
        raise self._error

    def free(self, address: int) -> None:
        raise self._error

    def export(self, address: int) -> bytes:
        raise self._error


class Front:
    """Answers whoever connects and is of the same user.

    Args:
        listener: where they connect, SOCK_SEQPACKET: one message, one request.
        areas: to ask.
    """

    def __init__(self, listener: socket.socket, areas: Areas) -> None:
        self._listener = listener
        self._areas = areas
        self._clients: dict[int, socket.socket] = {}

    def serve(self, control: socket.socket) -> None:
        """Until there is EOF, or anything, at `control`."""
        poll = select.poll()
        for listening in (control, self._listener):
            poll.register(listening, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == control.fileno():
                    return
                if fd == self._listener.fileno():
                    if (client := self._accept()) is not None:
                        self._clients[client.fileno()] = client
                        poll.register(client, select.POLLIN)
                elif not self._answer(self._clients[fd]):
                    poll.unregister(fd)
                    self._clients.pop(fd).close()

    def _accept(self) -> socket.socket | None:
        try:
            client, _ = self._listener.accept()
        except OSError as error:  # it has left already; or no descriptors are free
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(_NO_DESCRIPTORS_SECONDS)  # it waits, and would be found again and again
            return None
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, uid, _ = struct.unpack("3i", credentials)
        if uid != os.getuid():
            client.close()
            return None
        client.setblocking(False)
        return client

    def _answer(self, client: socket.socket) -> bool:
        """Whether the client stays."""
        try:
            data = client.recv(MAX_MESSAGE_BYTES)
            if not data:
                return False
            client.send(pack_dataclass(self._areas.answer(unpack_dataclass(AreaRequest, data))))
        except (OSError, MessageError):  # it was killed; or it is none of ours
            return False
        return True


def main() -> NoReturn:
    """The life of a keeper."""
    control = begin()
    num_gpus, listener = int(sys.argv[5]), socket.socket(fileno=int(sys.argv[6]))
    memory: Memory
    try:
        memory = Driver()
        for index in range(num_gpus):
            with contextlib.suppress(DriverError):  # who asks for this GPU will be told
                memory.enter(index)
    except DriverError as error:
        memory = NoMemory(error)
    control.send(READY)
    Front(listener, Areas(memory)).serve(control)
    leave(0)


if __name__ == "__main__":
    main()
