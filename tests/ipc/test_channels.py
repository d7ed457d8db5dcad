from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import zmq

from tpworker.ipc.channels import Channel, ChannelError, Poller, accept_all, new_address
from tpworker.ipc.messages import PROTOCOL_VERSION, Hello, Stop
from tpworker.ipc.wire import encode


def pair(name: str = "test") -> tuple[Channel, Channel]:
    address = new_address(name)
    bound = Channel.bind(address)
    return bound, Channel.connect(address, "peer", 3)


def test_messages_in_order_both_ways() -> None:
    bound, connected = pair()
    bound.accept("peer", 3, 5)
    for generation in range(2000):
        connected.send(Stop(generation))
        bound.send(Stop(generation))
    for generation in range(2000):
        assert bound.receive(5) == Stop(generation)
        assert connected.receive(5) == Stop(generation)
    assert bound.receive_now() is None
    bound.close()
    connected.close()


def test_one_encoding_for_many() -> None:
    bound, connected = pair()
    bound.accept("peer", 3, 5)
    bound.send_encoded(encode(Stop(9)))
    assert connected.receive_encoded(5) == encode(Stop(9))
    bound.close()
    connected.close()


@pytest.mark.parametrize(
    ("name", "generation"), [("somebody else", 3), ("peer", 4)], ids=["name", "generation"]
)
def test_somebody_else_is_refused(name: str, generation: int) -> None:
    bound, connected = pair()
    with pytest.raises(ChannelError, match="expected Hello"):
        bound.accept(name, generation, 5)
    bound.close()
    connected.close()


def test_another_protocol_version_is_refused() -> None:
    with pytest.raises(ChannelError, match=f"version={PROTOCOL_VERSION + 1}"):
        Channel.check_hello(Hello(PROTOCOL_VERSION + 1, "peer", 3), "peer", 3)


def test_nobody_comes() -> None:
    bound = Channel.bind(new_address("test"))
    with pytest.raises(ChannelError, match="peer did not connect within 0"):
        bound.accept("peer", 0, 0.01)
    bound.close()


def test_the_peer_is_gone() -> None:
    bound, connected = pair()
    bound.accept("peer", 3, 5)
    connected.close()
    for _ in range(500):  # until ZeroMQ has noticed
        try:
            bound.send(Stop(0))
        except ChannelError as error:
            assert "nobody at the other end" in str(error)  # noqa: PT017
            break
        threading.Event().wait(0.01)
    else:
        pytest.fail("a message to nobody was accepted for 5 s")
    bound.close()


def test_accept_all_names_who_is_missing() -> None:
    addresses = [new_address("test") for _ in range(3)]
    bound = [Channel.bind(address) for address in addresses]
    connected = [Channel.connect(addresses[i], f"rank{i}", 0) for i in (0, 2)]
    with pytest.raises(ChannelError, match=r"^rank1 did not connect"):
        accept_all([(channel, f"rank{i}") for i, channel in enumerate(bound)], 0, 0.5)
    for channel in (*bound, *connected):
        channel.close()


def test_poller_gives_the_channels_that_have_something() -> None:
    first, second = pair("a"), pair("b")
    poller = Poller([first[0], second[0]])
    for bound, _ in (first, second):
        bound.accept("peer", 3, 5)
    assert poller.wait(0) == []
    second[1].send(Stop(1))
    assert poller.wait(5) == [second[0]]
    for channel in (*first, *second):
        channel.close()


def test_no_file_is_made_and_the_name_goes_with_the_process() -> None:
    address = new_address("visible")
    name = address.removeprefix("ipc://")
    bound = Channel.bind(address)
    assert name in Path("/proc/net/unix").read_text()
    bound.close()
    gone = threading.Event()
    for _ in range(200):  # the socket is closed by ZeroMQ's own thread
        if name not in Path("/proc/net/unix").read_text():
            gone.set()
            break
        gone.wait(0.02)
    assert gone.is_set()


def test_a_process_of_another_user_cannot_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    address = new_address("private")
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    bound = Channel.bind(address)
    connected = Channel.connect(address, "peer", 3)
    with pytest.raises(ChannelError, match="did not connect"):
        bound.accept("peer", 3, 0.3)
    bound.close()
    connected.close()


def test_what_others_do_with_zeromqs_global_context_does_not_concern_us() -> None:
    bound, connected = pair()
    bound.accept("peer", 3, 5)
    zmq.Context.instance().destroy()
    connected.send(Stop(1))
    assert bound.receive(5) == Stop(1)
    bound.close()
    connected.close()
