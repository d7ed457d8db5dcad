"""What outlives the ranks of a generation, on the runtime's side: a memfd for each.

It is made once, and each generation's ranks find in it what those before them left (`rank/kept.py`), until
somebody says that nothing of it can be trusted.
"""

from __future__ import annotations

import os


class Keeping:
    """The kept memory of all ranks. Open until `close`, whatever becomes of the ranks.

    Args:
        num_ranks: TP size.
    """

    def __init__(self, num_ranks: int) -> None:
        self._fds: list[int] = []
        self._num_ranks = num_ranks
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

    def close(self) -> None:
        """Gives all of it back. More than once does no harm."""
        while self._fds:
            os.close(self._fds.pop())
