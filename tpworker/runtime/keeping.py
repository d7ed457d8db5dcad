"""What outlives a generation, on the runtime's side: a memfd for each rank, and one for the scheduler; on
GPUs the keeper besides, which owns the memory that ranks map (rank/keeper.py).

They are made once, and each generation's processes find in them what those before left (`rank/kept.py`,
`scheduler/kept_blocks.py`), until somebody says that nothing of it can be trusted, or that the memory is
wanted for something else.
"""

from __future__ import annotations

import os
import secrets
import socket

from tpworker.ipc.child import KEEPER_NAME
from tpworker.ipc.forks import GUARD, close_in_forks
from tpworker.runtime.standby import Standby

KEEPER_MODULE = "tpworker.rank.keeper"

_BACKLOG = 64


class Keeping:
    """The kept memory of a group. Open until `close`, whatever becomes of the processes.

    Args:
        num_ranks: TP size.
        device: where ranks keep memory: 'cuda', which takes a keeper, or 'cpu'.
    """

    def __init__(self, num_ranks: int, device: str = "cpu") -> None:
        self._fds: list[int] = []
        self._num_ranks = num_ranks
        self._has_keeper = device == "cuda"
        self._keeper: Standby | None = None
        self._killed: list[Standby] = []
        self._gpus: tuple[str, ...] = ()
        self.keeper_address = ""
        """Where ranks reach the keeper, once it was started; empty: there is none."""
        self.blocks_fd = -1
        """The descriptor for the scheduler's process to inherit; the same until `forget`."""
        self.forget()
        close_in_forks(self)

    def leave_to_parent(self) -> None:
        """See `forks.Holder`: what is kept is gigabytes, and to be free once the runtime is gone."""
        self._close_descriptors()

    def start(self, gpus: tuple[str, ...] = ()) -> tuple[Standby, ...]:
        """Starts the keeper, if there is to be one and none lives; of one that has died all is forgotten.
        To be called when no rank lives. Returns what must live for the ranks to do so.

        Args:
            gpus: by rank, the UUID of its GPU; none: as CUDA numbers them here. Of others all is forgotten.

        Raises:
            OSError: it cannot be started.
        """
        if not self._has_keeper:
            return ()
        if self._keeper is not None and (gpus != self._gpus or not self._keeper.is_alive):
            self.forget()
        self._gpus = gpus
        self._bury()  # before the next one is there, its memory is free again
        if self._keeper is None:
            self._keeper = self._start_keeper()
        return (self._keeper,)

    @property
    def keeper_pid(self) -> int | None:
        """The keeper's process; None: there is none."""
        return None if self._keeper is None else self._keeper.process.pid

    def fd(self, rank: int) -> int:
        """The descriptor for that rank's process to inherit; the same until `forget`."""
        return self._fds[rank]

    def forget(self) -> None:
        """Nothing that processes have left is trusted any more: those to come begin anew, and so does the
        keeper. To be called when no rank lives: what one of them holds is freed with it."""
        self._kill_keeper()
        self._close_descriptors()
        for rank in range(self._num_ranks):  # one by one: if the next one fails, these can still be closed
            self._fds.append(os.memfd_create(f"tpworker-kept{rank}", os.MFD_CLOEXEC))
        self.blocks_fd = os.memfd_create("tpworker-blocks", os.MFD_CLOEXEC)

    def forget_contents(self) -> None:
        """What keys and values were computed from is not so any more: nobody is to find any of them. Their
        memory stays. To be called when no scheduler lives."""
        blocks_fd, self.blocks_fd = self.blocks_fd, os.memfd_create("tpworker-blocks", os.MFD_CLOEXEC)
        os.close(blocks_fd)

    def give_back(self) -> None:
        """As `forget`, and when it returns the memory is free."""
        self.forget()
        self._bury()

    def close(self) -> None:
        """Gives all of it back, and waits until the keeper is gone. More than once does no harm."""
        self._close_descriptors()
        self._kill_keeper()
        self._bury()

    def _start_keeper(self) -> Standby:
        """It is bound here, so that ranks can connect at once, and wait for it."""
        address = f"tpworker-{os.getpid()}-keeper-{secrets.token_hex(8)}"
        with GUARD, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(f"\0{address}")
            listener.listen(_BACKLOG)
            number = listener.fileno()
            arguments = (str(self._num_ranks), str(number))
            variables = {"CUDA_VISIBLE_DEVICES": ",".join(self._gpus)} if self._gpus else {}
            keeper = Standby(KEEPER_NAME, KEEPER_MODULE, "cuda", arguments, (number,), variables)
        self.keeper_address = address
        return keeper

    def _kill_keeper(self) -> None:
        if self._keeper is not None:
            self._keeper.kill()
            self._killed.append(self._keeper)
            self._keeper, self.keeper_address = None, ""

    def _bury(self) -> None:
        """Waits until keepers that were killed are gone."""
        while self._killed:
            self._killed.pop().close()

    def _close_descriptors(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
        blocks_fd, self.blocks_fd = self.blocks_fd, -1  # first: in a fork the number may soon be another's
        if blocks_fd >= 0:
            os.close(blocks_fd)
