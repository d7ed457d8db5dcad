"""The ZeroMQ endpoints. Nothing else in the project imports zmq, but kv_events.py.

A channel is one PAIR socket: exactly one peer at either end, messages in order, none dropped silently
(PUB and ROUTER drop). Addresses are random names in Linux' abstract socket namespace: they exist as long
as the listening process does, so that nothing is left behind whatever died, and only processes of the
same user may connect (the peer's credentials are checked by ZeroMQ).

The side that connects says Hello first; `accept` waits for it and compares protocol version, name and
generation, so that a late or foreign peer is refused before it can do harm.

A channel belongs to one thread.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Sequence

import zmq

from tpworker.ipc.codec import MessageError
from tpworker.ipc.messages import PROTOCOL_VERSION, Hello, Message
from tpworker.ipc.patience import Patience
from tpworker.ipc.wire import MAX_MESSAGE_BYTES, decode, encode

_contexts: dict[int, zmq.Context[zmq.Socket[bytes]]] = {}  # by process id


def _context() -> zmq.Context[zmq.Socket[bytes]]:
    """ZeroMQ's context of our own: what an embedding process does with the global one is not our business,
    nor ours its. And of this process' own: a context's threads do not survive a fork, and with those that it
    has inherited a forked process would wait for ever. (Its parent's stays as it is, never closed here.)"""
    return _contexts.get(os.getpid()) or _contexts.setdefault(os.getpid(), zmq.Context())


def new_socket(kind: int) -> zmq.Socket[bytes]:
    """A socket of this process' own context."""
    return _context().socket(kind)


class ChannelError(Exception):
    """A peer that did not come in time, is gone, or is not the one expected."""


def new_address(name: str) -> str:
    """A fresh address; `name` is only there to be read by people (in /proc/net/unix)."""
    return f"ipc://@tpworker-{os.getpid()}-{name}-{secrets.token_hex(8)}"


class Channel:
    """One end of a message channel. Make it with `bind` or `connect`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = new_socket(zmq.PAIR)
        self._socket.set(zmq.LINGER, 0)  # a peer that died must not keep us from leaving
        self._socket.set(zmq.SNDHWM, 0)  # bounded by lookahead and by max_queue, not here
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)

    @classmethod
    def bind(cls, address: str) -> Channel:
        """The listening end. Only processes of this user can connect."""
        channel = cls(address)
        channel._socket.set(zmq.IPC_FILTER_UID, os.getuid())
        channel._socket.bind(address)
        return channel

    @classmethod
    def connect(cls, address: str, name: str, generation: int) -> Channel:
        """The connecting end, which introduces itself at once."""
        channel = cls(address)
        channel._socket.connect(address)
        channel.send(Hello(PROTOCOL_VERSION, name, generation))
        return channel

    def accept(self, name: str, generation: int, timeout: float) -> None:
        """Waits until the peer called `name` has introduced itself.

        Raises:
            ChannelError: nobody within `timeout` seconds, or somebody else.
        """
        hello = self.receive(timeout)
        if hello is None:
            raise ChannelError(f"{name} did not connect within {timeout:g} s")
        self.check_hello(hello, name, generation)

    @staticmethod
    def check_hello(hello: Message, name: str, generation: int) -> None:
        """Raises ChannelError unless `hello` is what the peer called `name` must say first."""
        expected = Hello(PROTOCOL_VERSION, name, generation)
        if hello != expected:
            raise ChannelError(f"expected {expected}, got {hello}")

    def send(self, message: Message) -> None:
        """Queues a message; never waits for the peer.

        Raises:
            ChannelError: the peer is gone.
        """
        self.send_encoded(encode(message))

    def send_encoded(self, data: bytes) -> None:
        """Queues a message that is encoded already: a plan goes to every rank, and is encoded once."""
        try:
            self._socket.send(data, zmq.DONTWAIT)
        except zmq.Again:
            raise ChannelError(f"nobody at the other end of {self.address}") from None
        except zmq.ZMQError as error:  # the socket was closed
            raise ChannelError(f"{self.address}: {error}") from None

    def receive(self, timeout: float | None) -> Message | None:
        """The next message; None if there is none within `timeout` seconds in which this process runs (see
        `Patience`; None: waits for ever)."""
        data = self.receive_encoded(timeout)
        return None if data is None else decode(data)

    def receive_encoded(self, timeout: float | None) -> bytes | None:
        """As `receive`, not decoded."""
        if timeout is None:
            return self._socket.recv()
        try:
            return self._socket.recv(zmq.DONTWAIT)
        except zmq.Again:
            pass
        patience = Patience(timeout)
        while seconds := patience.slice():
            if self._socket.poll(_milliseconds(seconds)):
                return self._socket.recv(zmq.DONTWAIT)
        return None

    def receive_now(self) -> Message | None:
        """The next message if it is here already."""
        return self.receive(0)

    def fileno(self) -> int:
        """A descriptor for event loops. ZeroMQ signals it by edge, not level: when it is readable, and
        after every send, call `receive_now` until it gives None."""
        return int(self._socket.get(zmq.FD))

    def close(self) -> None:
        """Closes the socket; what was not sent yet is dropped."""
        self._socket.close()


def close_all(linger: float) -> None:
    """Closes every channel of this process, once what was sent has left it, or after `linger` seconds.

    For the end of a process: closing a single channel drops what was not sent yet.
    """
    _context().destroy(linger=round(linger * 1000))


class Poller:
    """Waits for a message on any of several channels of one thread.

    Args:
        channels: the thread's own.
        bells: descriptors that end a wait too, when they become readable.
    """

    def __init__(self, channels: Sequence[Channel], bells: Sequence[int] = ()) -> None:
        self._poller = zmq.Poller()
        self._channels = {channel._socket: channel for channel in channels}
        for channel in channels:
            self._poller.register(channel._socket, zmq.POLLIN)
        for bell in bells:
            self._poller.register(bell, zmq.POLLIN)

    def wait(self, timeout: float | None) -> list[Channel]:
        """The channels that have a message; none after `timeout` seconds (None: waits for ever), or where
        only bells rang."""
        events = self._poller.poll(None if timeout is None else _milliseconds(timeout))
        return [self._channels[socket] for socket, _ in events if socket in self._channels]


def _milliseconds(seconds: float) -> int:
    return math.ceil(max(0.0, seconds) * 1000)


def accept_all(expected: Sequence[tuple[Channel, str]], generation: int, timeout: float) -> None:
    """Waits until every expected peer has introduced itself on its channel.

    Raises:
        ChannelError: names those who did not come within `timeout` seconds, or the one who is not it.
    """
    patience = Patience(timeout)
    waiting = dict(expected)
    while waiting:
        ready = Poller(list(waiting)).wait(patience.slice())
        if not ready and not patience.left():
            raise ChannelError(f"{', '.join(waiting.values())} did not connect within {timeout:g} s")
        for channel in ready:
            hello = channel.receive_now()
            if hello is not None:
                Channel.check_hello(hello, waiting.pop(channel), generation)


__all__ = [
    "Channel",
    "ChannelError",
    "MessageError",
    "Poller",
    "accept_all",
    "close_all",
    "new_address",
    "new_socket",
]
