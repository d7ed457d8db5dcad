"""Who is taken as a rank that was started from outside, and who is not."""

from __future__ import annotations

import os
import resource
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import eventually
from tpworker.errors import ConfigError
from tpworker.ipc.joining import (
    ANY,
    LEFT,
    Accepted,
    AnotherVersion,
    Hello,
    Refused,
    pack_hello,
    peer_of,
    socket_address,
    unpack_answer,
    unpack_hello,
)
from tpworker.runtime import joining
from tpworker.runtime.joining import Joining, NotJoined
from tpworker.runtime.outside import OutsideStandby
from tpworker.version import version

pytestmark = pytest.mark.usefixtures("nothing_left")

HELLO = Hello(pid=os.getpid(), rank=ANY, num_ranks=0, told_by="", cpus=(0, 1))


def new_name() -> str:
    return f"test-{os.getpid()}-{secrets.token_hex(4)}"


# ----------------------------------------------------------------------------------- who is taken


class Place:
    """Where ranks join, and connections to it."""

    def __init__(self, device: str = "cpu") -> None:
        self.joining = Joining(new_name(), 2, "some.module", device, 5.0)
        self.connections: list[socket.socket] = []

    def say(self, data: bytes) -> bytes:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connections.append(connection)
        connection.settimeout(20)
        connection.connect(socket_address(self.joining.name))
        connection.send(data)
        return connection.recv(1 << 16)

    def join(self, hello: Hello = HELLO, **changes: Any) -> Accepted:
        return unpack_answer(self.say(pack_hello(replace(hello, **changes), version())))

    def refusal(self, **changes: Any) -> str:
        with pytest.raises(Refused) as caught:
            self.join(**changes)
        return str(caught.value)


@pytest.fixture
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """What joins here is this process: nobody must kill it, and it does not end."""
    monkeypatch.setattr(OutsideStandby, "close", lambda self: self.leave_to_parent())
    monkeypatch.setattr(OutsideStandby, "dismiss", lambda self, why: None)
    place = Place(getattr(request, "param", "cpu"))
    yield place
    place.joining.close("")
    place.joining.close("")  # once more does no harm
    for connection in place.connections:
        connection.close()


def test_any_rank_is_whichever_is_missing(place: Place) -> None:
    assert place.joining.missing() == [0, 1]
    with pytest.raises(NotJoined):
        place.joining.standbys()
    assert place.join(rank=1).name == "tpworker-rank1-standby"
    assert place.joining.waits_for([0]).startswith("waiting for rank 0 to join ")
    accepted = place.join()
    assert (accepted.rank, accepted.module, accepted.device) == (0, "some.module", "cpu")
    assert [standby.rank for standby in place.joining.standbys()] == [0, 1]
    assert place.refusal() == "all 2 ranks are here"
    assert place.refusal(rank=1, told_by="RANK=1") == f"rank 1 (RANK=1) is here already: pid {os.getpid()}"


def test_who_waits_is_told_that_one_has_come(place: Place) -> None:
    come: list[bool] = []
    place.joining.on_change = lambda: come.append(True)
    place.join()
    eventually(lambda: come == [True])


def test_a_rank_that_has_gone_is_missing_and_its_place_free(place: Place) -> None:
    place.join(rank=0)
    place.join(rank=1)
    first, _ = place.joining.standbys()
    place.connections[0].send(LEFT + b"enough")
    first.read()
    assert place.joining.missing() == [0]
    assert first.ending.describe() == (
        f"tpworker-rank0-standby (pid {os.getpid()}, started from outside) has left: enough"
    )
    assert first.ending.was_killed_by_others
    assert not first.ending.forfeits
    place.join(rank=0)
    assert place.joining.standbys()[0] is not first


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_ranks": 3, "rank": 1}, "its launcher has started 3 processes, and tensor_parallel_size is 2"),
        ({"rank": 2, "told_by": "RANK=2"}, "RANK=2, and tensor_parallel_size is 2: ranks are 0 to 1"),
        ({"pid": 1}, r"it says it is pid 1, and is \d+ from here: .* PID namespace"),
    ],
)  # fmt: skip
def test_who_does_not_fit_is_refused(place: Place, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        place.join(**changes)
    assert place.joining.missing() == [0, 1]


def test_another_version_is_refused_in_words_that_it_can_read(place: Place) -> None:
    answer = place.say(pack_hello(HELLO, "0.0.1"))
    assert answer == b"-it is tpworker 0.0.1, and the runtime %s: start it with the same installation" % (
        version().encode()
    )
    with pytest.raises(AnotherVersion):
        unpack_hello(pack_hello(HELLO, "0.0.1"), version())
    assert place.say(b"GET / HTTP/1.1").startswith(b"-it did not say who it is")


def test_another_user_takes_no_descriptor(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who says nothing would hold one for seconds; and is told by its own side whose the runtime is."""
    with monkeypatch.context() as patch:
        patch.setattr(joining, "peer_of", lambda connection: (peer_of(connection)[0], 12345))
        for _ in range(3):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
                other.settimeout(20)
                other.connect(socket_address(place.joining.name))
                assert other.recv(1) == b""
    assert caplog.text.count("a process of user 12345 is not let in") == 1
    place.join()


def test_who_does_not_wait_for_the_answer_has_no_place(place: Place) -> None:
    hasty = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with place.joining._lock, hasty:  # it is not answered before it has left
        hasty.connect(socket_address(place.joining.name))
        hasty.send(pack_hello(replace(HELLO, rank=1), version()))
    place.join(rank=1)
    assert place.joining.missing() == [0]


def test_without_descriptors_it_waits_and_does_not_spin(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def wait(seconds: float) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        waited.append(seconds)

    monkeypatch.setattr(joining, "time", SimpleNamespace(sleep=wait, monotonic=time.monotonic))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as late:
        late.settimeout(20)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            late.connect(socket_address(place.joining.name))
            eventually(lambda: bool(waited))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        late.send(pack_hello(HELLO, version()))
        assert unpack_answer(late.recv(1 << 16)).rank == 0
    assert waited == [joining._NO_DESCRIPTORS_SECONDS]


def test_who_says_nothing_holds_up_nobody(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "HELLO_SECONDS", 0.5)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.settimeout(20)
        silent.connect(socket_address(place.joining.name))
        place.join()
        assert silent.recv(1000).startswith(b"-it did not say who it is")


def test_an_address_is_one_runtimes(place: Place) -> None:
    with pytest.raises(ConfigError, match="another runtime of yours waits for ranks there"):
        Joining(place.joining.name, 2, "some.module", "cpu", 5.0)


GPUS = ("GPU-a", "GPU-b")


@pytest.mark.parametrize("place", ["cuda"], indirect=True)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"gpus": GPUS}, {"gpus": GPUS}),  # by hand: each sees all
        ({"gpus": GPUS, "gpu": 0}, {"gpus": GPUS, "gpu": 1}),  # torchrun: LOCAL_RANK
        ({"gpus": GPUS[:1], "gpu": 0}, {"gpus": GPUS[1:], "gpu": 1}),  # srun and Ray: each sees its own
    ],
)
def test_each_has_a_gpu_of_its_own(place: Place, first: dict[str, Any], second: dict[str, Any]) -> None:
    assert place.join(rank=1, reachable=GPUS, **second).device == "cuda"
    place.join(rank=0, reachable=GPUS, **first)
    assert place.joining.gpus() == GPUS


@pytest.mark.parametrize("place", ["cuda"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpus": (), "no_gpu": "no driver"}, r"it sees no GPU \(no driver\): ranks run on GPUs"),
        ({"gpus": GPUS, "gpu": 2}, "it is to have GPU 2, and sees 2"),
        ({"gpus": GPUS, "gpu": 0}, "its GPU GPU-a is rank 0's already"),
        ({"gpus": GPUS[1:], "reachable": GPUS[1:]}, "may not both open GPUs GPU-b and GPU-a"),
    ],
)
def test_a_gpu_that_will_not_do_is_refused(place: Place, changes: dict[str, Any], reason: str) -> None:
    place.join(rank=0, gpus=GPUS[:1], reachable=GPUS)
    with pytest.raises(Refused, match=reason):
        place.join(**{"rank": 1, "reachable": GPUS, **changes})


def test_ranks_share_the_cpus_that_they_have_in_common(place: Place) -> None:
    place.join(cpus=(0, 1))
    place.join(cpus=(1, 2))
    first, second = place.joining.standbys()
    assert first.num_sharing([first, second]) == 2
    second.cpus = frozenset({2, 3})
    assert first.num_sharing([first, second]) == 1


def test_a_fork_keeps_no_connection_open(place: Place) -> None:
    """Or who has joined would not see that the runtime is gone, while a fork of its process lives."""
    place.join()
    eventually(lambda: not place.joining._silent)  # who has joined is answered a moment before
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(socket_address(place.joining.name))
        eventually(lambda: bool(place.joining._silent))
        ours = len([fd for fd in os.listdir("/proc/self/fd") if _is_of_place(int(fd), place)])
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            left = [fd for fd in os.listdir("/proc/self/fd") if _is_of_place(int(fd), place)]
            os.write(writer, str(len(left)).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        assert (ours, os.read(reader, 10)) == (3, b"0")  # it listens, one has joined, one is silent
        os.close(reader)
        os.close(writer)


def _is_of_place(fd: int, place: Place) -> bool:
    try:
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
            return False
    except FileNotFoundError:  # the one that listed them
        return False
    with socket.socket(fileno=os.dup(fd)) as one:
        return bool(one.getsockname() == socket_address(place.joining.name).encode())
