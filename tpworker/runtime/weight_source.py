"""Where the ranks of every generation have their weights from: a folder, or tensors that somebody gave.

Tensors are written to a memfd of the runtime's, in host memory, which stays as long as they are served: a
generation that comes after a fault may have to read them again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tpworker.errors import InvalidRequest
from tpworker.ipc.forks import close_in_forks
from tpworker.runtime.group import Group
from tpworker.runtime.loading import FoundModel, in_daemon_thread


class WeightSource:
    """The weights that are served, and those that are to be.

    Args:
        model: as it was found at the start.
        with_mtp: its head for multi-token prediction is used.
    """

    def __init__(self, model: FoundModel, *, with_mtp: bool = False) -> None:
        self.is_dropped = False
        """Whether there are none: they were tensors, and are gone."""
        self.number = 0
        """Of those that are served; each update has the next one."""
        self._spec, self._shapes = model.spec, model.shapes
        self._with_mtp = with_mtp
        self._fd = -1
        self._numbers = 0  # given out
        close_in_forks(self)

    def leave_to_parent(self) -> None:
        """See `forks.Holder`."""
        self.close()

    def close(self) -> None:
        """Gives back what tensors take. Once more does no harm."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def drop(self) -> None:
        """As little memory as possible is to be held: tensors are gone; a folder can be read again."""
        self.is_dropped = self.is_dropped or self._fd >= 0
        self.close()

    @asynccontextmanager
    async def take(self, source: object, group: Group) -> AsyncGenerator[Group, None]:
        """Looks at weights without touching anything, and gives what is to be started with them. When the
        body ends well, they are those that are served; otherwise the old ones stay.

        Args:
            source: a folder, or pairs of names and tensors.

        Raises:
            ModelError: they are of another model, or not whole.
            InvalidRequest: it is neither.
        """
        self._numbers += 1
        number, fd, shapes = self._numbers, -1, self._shapes
        new = replace(group, weights_number=number, rank=replace(group.rank, load_format="auto"))
        if isinstance(source, (str, os.PathLike)):
            folder = Path(os.fspath(source)).expanduser().absolute()
            shapes = await in_daemon_thread(lambda: self._look_at(folder))
            new = replace(new, model=str(folder), weights_fd=None)
        else:
            fd = await self._written(_pairs(source))
            new = replace(new, weights_fd=fd)
        try:
            yield new
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        self.close()
        self.number, self._fd, self._shapes, self.is_dropped = number, fd, shapes, False

    def _look_at(self, folder: Path) -> Mapping[str, tuple[int, ...]]:
        from tpworker.checkpoint.likeness import check_likeness

        return check_likeness(folder, self._spec, self._shapes, with_mtp=self._with_mtp)

    async def _written(self, pairs: Iterable[Any]) -> int:
        """A file with these tensors. It is written in a thread, which nobody waits for who is cancelled."""
        lock, is_left, written = threading.Lock(), False, [-1]

        def write() -> None:
            from tpworker.checkpoint.tensor_file import write_tensors

            fd = os.memfd_create("tpworker-weights", os.MFD_CLOEXEC)
            try:
                write_tensors(fd, pairs, self._spec, with_mtp=self._with_mtp)
                with lock:
                    if not is_left:
                        written[0], fd = fd, -1
            finally:
                if fd >= 0:
                    os.close(fd)

        writing = in_daemon_thread(write)
        try:
            await writing
        except BaseException:
            with lock:
                is_left = True
            if written[0] >= 0:
                os.close(written[0])
            raise
        return written[0]


def name_of(group: Group) -> str:
    """What to call its weights."""
    return group.model if group.weights_fd is None else "tensors"


def _pairs(source: object) -> Iterable[Any]:
    """Raises InvalidRequest: it is nothing of the kind."""
    if isinstance(source, Mapping):
        return source.items()
    if isinstance(source, (bytes, bytearray)) or not isinstance(source, Iterable):
        raise InvalidRequest(
            f"update_weights: {type(source).__name__} is no source of weights: give a folder, or pairs "
            "(name, tensor)",
            "source",
        )
    return source
