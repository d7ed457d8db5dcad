"""What outlives a generation, on the runtime's side: a memfd for each rank, and one for the scheduler.

They are made once, and each generation's processes find in them what those before left (`rank/kept.py`,
`scheduler/kept_blocks.py`), until somebody says that nothing of it can be trusted.
"""

from __future__ import annotations

import os


class Keeping:
    """The kept memory of a group. Open until `close`, whatever becomes of the processes.

    Args:
        num_ranks: TP size.
    """

    def __init__(self, num_ranks: int) -> None:
        self._fds: list[int] = []
        self._num_ranks = num_ranks
        self.blocks_fd = -1
        """The descriptor for the scheduler's process to inherit; the same until `forget`."""
        self.forget()

    def fd(self, rank: int) -> int:
        """The descriptor for that rank's process to inherit; the same until `forget`."""
        return self._fds[rank]

    def forget(self) -> None:
        """Nothing that ranks have left is trusted any more: those to come begin anew. To be called when no
        rank lives: what one of them holds is freed with it."""
        self.close()
        self._fds = [
            os.memfd_create(f"tpworker-kept{rank}", os.MFD_CLOEXEC) for rank in range(self._num_ranks)
        ]
        self.blocks_fd = os.memfd_create("tpworker-blocks", os.MFD_CLOEXEC)

    def close(self) -> None:
        """Gives all of it back. More than once does no harm."""
        while self._fds:
            os.close(self._fds.pop())
        if self.blocks_fd >= 0:
            os.close(self.blocks_fd)
            self.blocks_fd = -1
