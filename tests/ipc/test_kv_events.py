"""What subscribers hear of the prefix cache, read as vLLM's own subscribers read it."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from tpworker.ipc.channels import ChannelError, new_socket
from tpworker.ipc.child import KvEventsSettings
from tpworker.ipc.kv_events import END_OF_REPLAY, Contents, Event, KvEventPublisher, Stored

ROOT = bytes(32)
SIZE = 2
SECONDS = 20_000  # milliseconds, for a message


def text(*tokens: int) -> bytes:
    return array("i", tokens).tobytes()


def hash_of(*blocks: bytes, salt: bytes = ROOT) -> int:
    digest = salt
    for block in blocks:
        digest = sha256(digest + block).digest()
    return int.from_bytes(digest[:8], "big")


A, B, C = text(1, 2), text(3, 4), text(5, 6)


def told(*events: Event) -> list[list[Any]]:
    return Contents(SIZE, "GPU").told(list(events))


def test_blocks_that_follow_each_other_are_one_event() -> None:
    events = told(None, Stored(1, ROOT, A), Stored(2, 1, B), Stored(3, 1, C))
    assert events == [
        ["AllBlocksCleared"],
        ["BlockStored", [hash_of(A), hash_of(A, B)], None, [1, 2, 3, 4], SIZE, None, "GPU", None],
        ["BlockStored", [hash_of(A, C)], hash_of(A), [5, 6], SIZE, None, "GPU", None],
    ]


def test_a_salt_makes_it_another_text() -> None:
    salt = b"s" * 32
    first, second = told(Stored(1, ROOT, A), Stored(2, salt, A))
    assert (first[1], second[1]) == ([hash_of(A)], [hash_of(A, salt=salt)])
    assert first[1] != second[1]
    assert (first[2], second[2]) == (None, None)


def test_what_has_lost_its_beginning_is_removed_with_it_and_comes_back_on_its_own() -> None:
    contents = Contents(SIZE, "CPU")
    contents.told([Stored(1, ROOT, A), Stored(2, 1, B), Stored(3, 2, C)])
    (removed,) = contents.told([1])
    assert removed == ["BlockRemoved", [hash_of(A), hash_of(A, B), hash_of(A, B, C)], "CPU"]
    assert contents.told([3, 2, Stored(4, 2, C)]) == [], "neither twice, nor behind what is gone"
    assert [event[1] for event in contents.told([Stored(5, ROOT, A)])] == [[hash_of(A)]]
    assert contents.told([None, 5]) == [["AllBlocksCleared"]]


# -------------------------------------------------------------------------------------- sockets


class Subscriber:
    """Reads as vLLM's example does."""

    def __init__(self, endpoint: str, topic: str) -> None:
        self.sub = new_socket(zmq.SUB)
        self.sub.set(zmq.RCVTIMEO, SECONDS)
        self.sub.set(zmq.SUBSCRIBE, topic.encode())
        self.sub.connect(endpoint)

    def next(self) -> tuple[bytes, int, list[Any]]:
        topic, number, batch = self.sub.recv_multipart()
        return topic, int.from_bytes(number, "big"), msgpack.unpackb(batch)

    def close(self) -> None:
        self.sub.close(linger=0)


def settings(tmp_path: Path, **changes: Any) -> KvEventsSettings:
    fields: dict[str, Any] = {
        "endpoint": f"ipc://{tmp_path}/events", "replay_endpoint": f"ipc://{tmp_path}/replay",
        "buffer_steps": 3, "hwm": 1000, "max_queue_size": 100, "topic": "kv@1", "medium": "GPU",
    }  # fmt: skip
    return KvEventsSettings(**{**fields, **changes})


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[KvEventPublisher]:
    publisher = KvEventPublisher(settings(tmp_path), SIZE, 3)
    yield publisher
    publisher.close()
    assert not publisher._thread.is_alive()


def test_batches_come_numbered_and_the_last_can_be_had_again(
    publisher: KvEventPublisher, tmp_path: Path
) -> None:
    subscriber = Subscriber(f"ipc://{tmp_path}/events", "kv@1")
    first = 3 << 40
    publisher.put([None])
    node = 0
    while not node or not subscriber.sub.poll(100):  # the subscription is on its way
        node += 1
        publisher.put([Stored(node, ROOT, text(node, node))])
    topic, number, (when, events, data_parallel_rank) = subscriber.next()
    if number == first:
        assert events == [["AllBlocksCleared"]]
        topic, number, (when, events, data_parallel_rank) = subscriber.next()
    assert (topic, data_parallel_rank) == (b"kv@1", 0)
    assert abs(when - time.time()) < 60
    node = number - first
    assert events == [
        ["BlockStored", [hash_of(text(node, node))], None, [node, node], SIZE, None, "GPU", None]
    ]
    dealer = new_socket(zmq.DEALER)
    dealer.set(zmq.RCVTIMEO, SECONDS)
    dealer.set(zmq.LINGER, 0)
    dealer.connect(f"ipc://{tmp_path}/replay")
    for asked in (b"nonsense?", b""):
        dealer.send_multipart([b"", asked])
    dealer.send_multipart([b"", (0).to_bytes(8, "big")])
    again = []
    while (frames := dealer.recv_multipart())[1] != END_OF_REPLAY:
        again.append(int.from_bytes(frames[1], "big"))
    assert again == list(range(max(first, number - 2), number + 1)), "the last three"
    dealer.send_multipart([b"", number.to_bytes(8, "big")])
    _, told_number, batch = dealer.recv_multipart()
    assert int.from_bytes(told_number, "big") == number
    assert msgpack.unpackb(batch)[1] == events
    assert dealer.recv_multipart() == [b"", END_OF_REPLAY, b""]
    dealer.close()
    subscriber.close()


def test_what_is_lost_is_not_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(KvEventPublisher, "_run", lambda self: None)  # its thread is busy elsewhere
    publisher = KvEventPublisher(settings(tmp_path, max_queue_size=2), SIZE, 0)
    for node in range(1, 5):
        publisher.put([Stored(node, ROOT, text(node, node))])
    publisher._queue.popleft()
    publisher.put([1, Stored(5, 3, B), Stored(6, ROOT, C)])
    monkeypatch.undo()
    pub = type("Pub", (), {"send_multipart": lambda _, message: heard.append(message)})()
    monkeypatch.setattr(publisher, "_pub", pub)
    while publisher._queue:
        publisher._publish(publisher._queue.popleft())
    assert [[event[0] for event in msgpack.unpackb(batch)[1]] for _, _, batch in heard] == [
        ["BlockStored"],
        ["AllBlocksCleared", "BlockStored"],
    ]
    assert msgpack.unpackb(heard[1][2])[1][1][1] == [hash_of(C)]


def test_an_endpoint_that_is_taken_or_none_is_named(publisher: KvEventPublisher, tmp_path: Path) -> None:
    with pytest.raises(ChannelError, match=r"ipc:///nowhere/at/all cannot be bound"):
        KvEventPublisher(settings(tmp_path, endpoint="ipc:///nowhere/at/all"), SIZE, 0)
    taken = new_socket(zmq.ROUTER)
    port = taken.bind_to_random_port("tcp://127.0.0.1")
    with pytest.raises(ChannelError, match=rf"0.1:{port} cannot be bound: Address already in use"):
        KvEventPublisher(
            settings(tmp_path, endpoint=f"ipc://{tmp_path}/e", replay_endpoint=f"tcp://127.0.0.1:{port}"),
            SIZE, 0,
        )  # fmt: skip
    taken.close()
