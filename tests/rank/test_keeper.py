"""What the keeper answers, with memory that pretends to be a GPU's; and its process, without any."""

from __future__ import annotations

import dataclasses
import os
import resource
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import eventually
from tpworker.ipc.codec import pack_dataclass, unpack_dataclass
from tpworker.rank import keeper
from tpworker.rank.driver import Driver, DriverError
from tpworker.rank.keeper import (
    AS_IT_IS,
    MAX_MESSAGE_BYTES,
    AreaAnswer,
    AreaRequest,
    Areas,
    Front,
)
from tpworker.rank.kept import OwnMemory
from tpworker.rank.kept_device import DeviceMemory, KeeperFailed, KeeperSilent, open_kept
from tpworker.runtime.keeping import Keeping

GPU = torch.device("cuda", 1)


class Memory:
    """Of two GPUs, of 100 bytes each."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.entered: list[int] = []
        self._next = 1000

    def enter(self, index: int) -> None:
        if index > 1:
            raise DriverError(f"there is no GPU {index}")
        self.entered.append(index)

    def allocate(self, num_bytes: int) -> int:
        if sum(self.held.values()) + num_bytes > 100:
            raise DriverError("cuMemAlloc_v2 failed: CUDA_ERROR_OUT_OF_MEMORY (2)")
        self._next += 1
        self.held[self._next] = num_bytes
        return self._next

    def free(self, address: int) -> None:
        del self.held[address]

    def export(self, address: int) -> bytes:
        assert address in self.held
        return str(address).encode()


def test_an_area_is_there_until_it_is_made_anew_or_freed() -> None:
    memory = Memory()
    areas = Areas(memory)
    assert areas.answer(AreaRequest(0, "kv", AS_IT_IS)) == AreaAnswer()
    made = areas.answer(AreaRequest(0, "kv", 70))
    assert (made.num_bytes, made.handle) == (70, b"1001")
    assert areas.answer(AreaRequest(0, "kv", AS_IT_IS)) == made
    for other in (AreaRequest(1, "kv", AS_IT_IS), AreaRequest(0, "weights", AS_IT_IS)):
        assert areas.answer(other) == AreaAnswer()
    again = areas.answer(AreaRequest(0, "kv", 80))  # of 100 bytes: the 70 are free by then
    assert memory.held == {1002: 80}
    assert again.number != made.number
    assert areas.answer(AreaRequest(0, "kv", 0)) == AreaAnswer()
    assert not memory.held
    assert areas.answer(AreaRequest(0, "kv", 0)) == AreaAnswer()


def test_what_cannot_be_done_is_told_and_leaves_nothing() -> None:
    memory = Memory()
    areas = Areas(memory)
    areas.answer(AreaRequest(0, "kv", 70))
    assert "OUT_OF_MEMORY" in areas.answer(AreaRequest(0, "kv", 101)).error
    assert areas.answer(AreaRequest(0, "kv", AS_IT_IS)) == AreaAnswer()
    assert areas.answer(AreaRequest(2, "kv", 1)) == AreaAnswer(error="there is no GPU 2")


def test_two_allocations_never_have_the_same_number() -> None:
    """Or what one has left would be taken for what another should hold."""
    numbers = {Areas(Memory()).answer(AreaRequest(0, "kv", 9)).number for _ in range(20)}
    assert len(numbers) == 20


# ------------------------------------------------------------------------------------- its socket


class Served:
    """A front in a thread."""

    def __init__(self) -> None:
        self.address = f"tpworker-{os.getpid()}-test-keeper"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(f"\0{self.address}")
        listener.listen()
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sockets = listener, theirs, self.control
        self.front = Front(listener, Areas(Memory()))
        self.thread = threading.Thread(target=self.front.serve, args=(theirs,), daemon=True)
        self.thread.start()

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.settimeout(20)
        client.connect(f"\0{self.address}")
        return client

    def close(self) -> None:
        self.control.shutdown(socket.SHUT_RDWR)
        self.thread.join(20)
        assert not self.thread.is_alive()
        for one in self._sockets:
            one.close()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.close()


def ask(client: socket.socket, request: AreaRequest) -> AreaAnswer:
    client.send(pack_dataclass(request))
    return unpack_dataclass(AreaAnswer, client.recv(MAX_MESSAGE_BYTES))


def test_areas_outlive_whoever_asked_for_them(served: Served) -> None:
    with served.connect() as first:
        made = ask(first, AreaRequest(0, "kv", 70))
    with served.connect() as one, served.connect() as other:
        assert ask(one, AreaRequest(0, "kv", AS_IT_IS)) == made
        assert ask(other, AreaRequest(0, "kv", AS_IT_IS)) == made


def test_nonsense_ends_its_connection_alone(served: Served) -> None:
    with served.connect() as good, served.connect() as bad, served.connect() as hasty:
        made = ask(good, AreaRequest(0, "kv", 70))
        bad.send(b"\xc1 nonsense")
        assert bad.recv(10) == b""
        hasty.send(pack_dataclass(AreaRequest(0, "kv", AS_IT_IS)))
        hasty.close()
        assert ask(good, AreaRequest(0, "kv", AS_IT_IS)) == made


def test_other_users_are_not_answered(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpworker.rank.keeper.os.getuid", lambda: 12345)
    with served.connect() as client:
        assert client.recv(10) == b""


def test_without_descriptors_it_waits_and_does_not_spin(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def wait(seconds: float) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        waited.append(seconds)

    monkeypatch.setattr(keeper, "time", SimpleNamespace(sleep=wait))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as late:
        late.settimeout(20)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            late.connect(f"\0{served.address}")
            eventually(lambda: bool(waited))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert ask(late, AreaRequest(0, "kv", 70)).error == ""
    assert waited == [keeper._NO_DESCRIPTORS_SECONDS]


# ----------------------------------------------------------------------------------- the rank's side


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("tpworker-kept")
    yield fd
    os.close(fd)


def test_a_rank_is_told_what_the_keeper_could_not_do(served: Served, fd: int) -> None:
    memory = DeviceMemory(fd, served.address, GPU)
    assert memory.keeps("weights")
    assert memory.find("kv", "layout") is None
    with pytest.raises(KeeperFailed, match="tpworker-keeper: cuMemAlloc_v2 failed: CUDA_ERROR_OUT_OF_MEMORY"):
        memory.make("kv", "layout", 101)


def test_a_keeper_that_is_gone_or_silent_is_named(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served()
    memory = DeviceMemory(fd, served.address, GPU)
    memory.find("kv", "layout")
    served.close()
    for client in served.front._clients.values():
        client.close()
    with pytest.raises(OSError, match=r"closed by tpworker-keeper|Broken pipe"):
        memory.find("kv", "layout")
    with pytest.raises(ConnectionRefusedError):
        open_kept(fd, served.address, GPU)
    monkeypatch.setattr("tpworker.rank.kept_device.KEEPER_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{served.address}")
        listener.listen()
        silent = DeviceMemory(fd, served.address, GPU)
        with pytest.raises(KeeperSilent, match="tpworker-keeper has not answered within"):
            silent.find("kv", "layout")


def has_driver() -> bool:
    try:
        Driver()
    except DriverError:
        return False
    return True


@pytest.mark.skipif(has_driver(), reason="there is a driver")
@pytest.mark.usefixtures("nothing_left")
def test_where_memory_cannot_be_shared_a_rank_has_its_own(caplog: pytest.LogCaptureFixture) -> None:
    keeping = Keeping(2, "cuda")
    keeping.start()
    fd = os.memfd_create("tpworker-kept")
    assert keeping.keeper_address
    memory = open_kept(fd, keeping.keeper_address, GPU)
    assert isinstance(memory, OwnMemory)
    assert "will not outlive this process: there is no driver of CUDA's" in caplog.text
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(f"\0{keeping.keeper_address}")
    assert "there is no driver of CUDA's" in ask(client, AreaRequest(0, "kv", 5)).error
    client.close()
    os.close(fd)
    keeping.close()


def test_own_memory_is_zeros_and_not_found_again() -> None:
    memory = open_kept(0, "", torch.device("cpu"))
    area = memory.make("kv", "layout", 100)
    memory.finish("kv")
    assert not area.any()
    assert memory.find("kv", "layout") is None
    assert not memory.keeps("weights")


def test_requests_are_bounded() -> None:
    for wrong in ({"num_bytes": -2}, {"device": 64}, {"name": ""}):
        with pytest.raises(Exception, match="within"):
            unpack_dataclass(
                AreaRequest, pack_dataclass(dataclasses.replace(AreaRequest(0, "kv", 1), **wrong))
            )  # type: ignore[arg-type]
