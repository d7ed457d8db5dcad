"""What the prefix cache holds, told to routers that send a prompt to where its beginning is.

    scheduler's thread                          a thread here
      put: a list, and a bell ──► bounded queue ──► hashes, msgpack ──► PUB: topic, number, batch
                                                                    └─► the last are kept ◄── ROUTER: replay

Wire format and sockets are those of vLLM's KV events (array-like batches): who reads those reads these.

    batch            [time, [event, …], 0]
    BlockStored      ["BlockStored", hashes, hash of what stands before, or None, token ids, block size, None,
                     medium, None]
    BlockRemoved     ["BlockRemoved", hashes, medium]
    AllBlocksCleared ["AllBlocksCleared"]

A hash is of a whole text, from its beginning to the end of the block, and of its salt: the same in all
replicas and after any restart. A generation's sequence numbers begin at its number times 2^40, with
AllBlocksCleared.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple

import msgpack
import zmq

from tpworker.ipc.arrays import unpack_int32
from tpworker.ipc.channels import ChannelError, new_socket
from tpworker.ipc.child import KvEventsSettings

logger = logging.getLogger(__name__)

GENERATION_BITS = 40
END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
CLOSE_SECONDS = 2.0
"""For what has been put to be told at the end."""

_SLICE = 8
"""So many blocks are looked at before another thread, the scheduler's above all, has the interpreter."""


class Stored(NamedTuple):
    """A content is known from now on."""

    node: int
    """Its number, never used again."""
    parent: int | bytes
    """The content before it; of a text's first block the digest of its salt."""
    tokens: bytes
    """int32, of its block alone."""


Event = Stored | int | None
"""What happened: `Stored`; the number of a content that is not known any more; None: none is."""


@dataclass(slots=True)
class _Content:
    digest: bytes
    parent: int | bytes
    children: set[int] = field(default_factory=set)


class Contents:
    """What has been told of, as events have it. A content is found by its beginning alone: when that is gone,
    so is what follows, whether or not its block still holds it.

    Args:
        block_size: tokens in a block.
        medium: where blocks are: 'GPU' or 'CPU'.
    """

    def __init__(self, block_size: int, medium: str) -> None:
        self._block_size = block_size
        self._medium = medium
        self._known: dict[int, _Content] = {}

    def told(self, events: list[Event]) -> list[list[Any]]:
        """Events in the wire's format; consecutive blocks of a text are one."""
        told: list[list[Any]] = []
        last: int | None = None  # the content that the last of these ends with
        for number, event in enumerate(events, 1):
            if event is None:
                self._known.clear()
                told.append(["AllBlocksCleared"])
                last = None
            elif isinstance(event, Stored):
                last = self._store(event, told, last)
            elif hashes := self._remove(event):
                told.append(["BlockRemoved", hashes, self._medium])
                last = None
            if number % _SLICE == 0:
                time.sleep(0)
        return told

    def _store(self, event: Stored, told: list[list[Any]], last: int | None) -> int | None:
        before: bytes | None = event.parent if isinstance(event.parent, bytes) else None
        if isinstance(event.parent, int):
            parent = self._known.get(event.parent)
            if parent is None:  # that was removed, or events were lost: nobody could find this one
                return last
            parent.children.add(event.node)
            before = parent.digest
        assert before is not None
        digest = sha256(before + event.tokens).digest()
        self._known[event.node] = _Content(digest, event.parent)
        tokens = unpack_int32(event.tokens).tolist()
        if last == event.parent and told:
            told[-1][1].append(_hash(digest))
            told[-1][3] += tokens
        else:
            parent_hash = _hash(before) if isinstance(event.parent, int) else None
            told.append(
                [
                    "BlockStored",
                    [_hash(digest)],
                    parent_hash,
                    tokens,
                    self._block_size,
                    None,
                    self._medium,
                    None,
                ]
            )
        return event.node

    def _remove(self, node: int) -> list[int]:
        """The hashes of a content and of all that follow it; none, if it was not known."""
        content = self._known.get(node)
        if content is None:
            return []
        if isinstance(content.parent, int):
            self._known[content.parent].children.discard(node)
        hashes, rest = [], [node]
        while rest:
            gone = self._known.pop(rest.pop())
            hashes.append(_hash(gone.digest))
            rest += gone.children
        return hashes


def _hash(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")


class KvEventPublisher:
    """Publishes from its making on, in a thread of its own. `put` and `close` belong to one other thread.

    Args:
        settings: where, and how much is kept.
        block_size: tokens in a block.
        generation: of the processes.

    Raises:
        ChannelError: an endpoint cannot be bound, or is none.
    """

    def __init__(self, settings: KvEventsSettings, block_size: int, generation: int) -> None:
        self._settings = settings
        self._contents = Contents(block_size, settings.medium)
        self._queue: deque[list[Event]] = deque()
        self._has_lost = False  # events, since the queue was full
        self._next = generation << GENERATION_BITS
        self._told: deque[tuple[bytes, bytes]] = deque(maxlen=settings.buffer_steps)
        self._pub = _open(zmq.PUB, settings.endpoint, settings.hwm)
        self._replay = None
        if settings.replay_endpoint:
            try:
                self._replay = _open(zmq.ROUTER, settings.replay_endpoint, settings.hwm, binds=True)
            except ChannelError:
                self._pub.close()
                raise
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def put(self, events: list[Event]) -> None:
        """Has events published, in order, as one batch; never waits. Where too many wait already they are
        lost, and the next ones begin with 'all cleared': nothing is ever claimed that may be gone."""
        if len(self._queue) >= self._settings.max_queue_size:
            self._has_lost = True
            return
        if self._has_lost:
            self._has_lost = False
            events = [None, *events]
        self._queue.append(events)
        os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """What was put is published, within `CLOSE_SECONDS`."""
        self._is_closing = True
        os.eventfd_write(self._bell, 1)
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._bell, zmq.POLLIN)
        if self._replay is not None:
            poller.register(self._replay, zmq.POLLIN)
        try:
            while not (self._is_closing and not self._queue):
                for one, _ in poller.poll():
                    if one == self._bell:
                        os.eventfd_read(self._bell)
                    else:
                        self._answer()
                while self._queue:
                    self._publish(self._queue.popleft())
        except Exception:
            logger.exception("KV events are not published any more")
        finally:
            self._pub.close(linger=round(CLOSE_SECONDS * 1000))
            if self._replay is not None:
                self._replay.close()

    def _publish(self, events: list[Event]) -> None:
        told = self._contents.told(events)
        if not told:
            return
        number = self._next.to_bytes(8, "big")
        self._next += 1
        batch: bytes = msgpack.packb([time.time(), told, 0])
        self._told.append((number, batch))
        self._pub.send_multipart([self._settings.topic.encode(), number, batch])

    def _answer(self) -> None:
        """A request to hear again of all batches from a number on. What is none is ignored."""
        assert self._replay is not None
        *to, first = self._replay.recv_multipart()
        if len(to) not in (1, 2) or len(first) != 8:
            return
        for number, batch in self._told:
            if number >= first:  # of one length, the most significant byte first
                self._replay.send_multipart([*to, number, batch])
        self._replay.send_multipart([*to, END_OF_REPLAY, b""])


def _open(kind: int, endpoint: str, hwm: int, binds: bool = False) -> zmq.Socket[bytes]:
    """Binds where the address is one of all of this machine's, or no network's; else connects, as vLLM."""
    socket = new_socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, hwm)
    socket.set(zmq.MAXMSGSIZE, 1 << 10)  # of what comes in
    binds = (
        binds or any(part in endpoint for part in ("*", "::", "0.0.0.0")) or not endpoint.startswith("tcp:")
    )
    try:
        if binds:
            socket.bind(endpoint)
        else:
            socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise ChannelError(f"{endpoint} cannot be {'bound' if binds else 'connected'}: {error}") from None
    return socket
