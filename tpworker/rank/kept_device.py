"""A rank's kept memory on its GPU: the keeper owns it, the rank maps it. The host's part is rank/kept.py."""

from __future__ import annotations

import logging
import select
import socket

import torch
from torch import Tensor

from tpworker.ipc.codec import pack_dataclass, unpack_dataclass
from tpworker.ipc.patience import Patience
from tpworker.rank.driver import Driver, DriverError
from tpworker.rank.keeper import AS_IT_IS, MAX_MESSAGE_BYTES, AreaAnswer, AreaRequest
from tpworker.rank.kept import NAMES, KeptMemory, Marks, OwnMemory

logger = logging.getLogger(__name__)

KEEPER_SECONDS = 20.0
"""How long the keeper may take to answer: at its start it makes a context on each GPU."""

_TRIAL = "trial"


class KeeperSilent(Exception):
    """The keeper lives, and does not answer."""


class KeeperFailed(Exception):
    """The keeper cannot do what it was asked for."""


def open_kept(fd: int, address: str, device: torch.device) -> KeptMemory:
    """The areas of this rank on its GPU; or, where GPU memory cannot be shared, memory of its own.

    Args:
        fd: of the marks.
        address: of the keeper; empty: there is none.
        device: the rank's GPU, which this thread uses already.

    Raises:
        KeeperSilent: it does not answer.
        OSError: it is gone.
    """
    if not address:
        return OwnMemory(device)
    memory = DeviceMemory(fd, address, device)
    try:
        memory.try_out()
    except (DriverError, KeeperFailed) as error:
        logger.warning("weights, keys and values on %s will not outlive this process: %s", device, error)
        memory.close()
        return OwnMemory(device)
    return memory


class DeviceMemory:
    """Areas in the memory of a GPU. Belongs to one thread.

    Args:
        fd, address, device: as those of `open_kept`.
    """

    def __init__(self, fd: int, address: str, device: torch.device) -> None:
        self._marks = Marks(fd)
        self._device = device
        self._driver: Driver | None = None
        self._mapped: dict[str, int] = {}
        self._keeper = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._keeper.connect(f"\0{address}")

    def try_out(self) -> None:
        """Maps a little memory. Raises DriverError or KeeperFailed: it cannot be done here."""
        driver = self._driver = Driver()
        driver.enter(self._device.index)
        driver.unmap(driver.map(self._ask(_TRIAL, 1).handle))
        self._ask(_TRIAL, 0)

    def keeps(self, name: str) -> bool:
        return name in NAMES

    def find(self, name: str, layout: str) -> Tensor | None:
        area = self._ask(name, AS_IT_IS)
        if area.num_bytes and self._marks.is_whole(name, layout, area.num_bytes, area.number):
            return self._map(name, area)
        self._marks.begin(name)
        self._ask(name, 0)
        return None

    def make(self, name: str, layout: str, num_bytes: int) -> Tensor:
        self._unmap(name)
        self._marks.begin(name)
        area = self._ask(name, num_bytes)
        self._marks.begin(name, layout, num_bytes, area.number)
        memory = self._map(name, area).zero_()
        torch.cuda.synchronize(self._device)  # it may be filled in other streams
        return memory

    def finish(self, name: str) -> None:
        torch.cuda.synchronize(self._device)
        self._marks.set(name)

    def close(self) -> None:
        """Leaves the keeper, which keeps what it has. Tensors that are mapped stay so."""
        self._keeper.close()
        self._marks.close()

    def _map(self, name: str, area: AreaAnswer) -> Tensor:
        assert self._driver is not None
        self._unmap(name)
        address = self._mapped[name] = self._driver.map(area.handle)
        with torch.inference_mode(False):  # or threads that are in no such mode could not fill it
            return torch.as_tensor(_Mapped(address, area.num_bytes), device=self._device)

    def _unmap(self, name: str) -> None:
        if name in self._mapped:
            assert self._driver is not None
            torch.cuda.synchronize(self._device)
            self._driver.unmap(self._mapped.pop(name))

    def _ask(self, name: str, num_bytes: int) -> AreaAnswer:
        self._keeper.send(pack_dataclass(AreaRequest(self._device.index, name, num_bytes)))
        patience, poll = Patience(KEEPER_SECONDS), select.poll()
        poll.register(self._keeper, select.POLLIN)
        while not poll.poll(patience.slice() * 1000):
            if not patience.left():
                raise KeeperSilent(f"tpworker-keeper has not answered within {KEEPER_SECONDS:g} s")
        data = self._keeper.recv(MAX_MESSAGE_BYTES)
        if not data:
            raise ConnectionResetError("connection closed by tpworker-keeper")
        answer = unpack_dataclass(AreaAnswer, data)
        if answer.error:
            raise KeeperFailed(f"tpworker-keeper: {answer.error}")
        return answer


class _Mapped:
    """Memory of a GPU, as libraries show it to one another."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }
