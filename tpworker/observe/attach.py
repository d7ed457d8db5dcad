"""Finds the status board of a tpworker from outside: by the pid of any of its processes.

A board is a memfd without a name in any file system; the kernel shows it among a process' descriptors, to
whoever may look at that process: its own user, and root.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tpworker.errors import ConfigError
from tpworker.ipc.board import NAME, About, Board, OtherVersion
from tpworker.observe.processes import PROC, inner_pid, user_of
from tpworker.version import version

_LINK = f"/memfd:{NAME}"


class NoBoard(ConfigError):
    """There is nothing to look at; says why, and what to do."""


class Attached:
    """A board that is being looked at. Use it as a context manager, or `close` it.

    Args:
        pid: of the runtime's process, or of another that has the board.
        board: is closed with this.
        num_others: further runtimes in that process.
    """

    def __init__(self, pid: int, board: Board, num_others: int = 0) -> None:
        self.pid, self.board, self.num_others = pid, board, num_others

    def close(self) -> None:
        """Lets go of the board."""
        self.board.close()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def attach(pid: int, proc: Path = PROC) -> Attached:
    """The newest board that a process has, of its own or, if it is a child of a runtime, of that.

    Args:
        pid: as this process sees it.
        proc: for tests.

    Raises:
        NoBoard: there is no such process; it is another user's; it has no board, or one of another version.
    """
    boards = _boards_of(pid, proc)
    try:
        owned = [board for board in boards if board.about.pid == inner_pid(pid, proc)]
        board = max(owned or boards, key=lambda board: board.about.created_ns)
    except ValueError:
        raise NoBoard(_nothing(pid, proc)) from None
    for other in boards:
        if other is not board:
            other.close()
    if not owned and (attached := _of_owner(board.about, proc)) is not None:
        board.close()
        return attached
    return Attached(pid, board, max(0, len(owned) - 1))


def _of_owner(about: About, proc: Path) -> Attached | None:
    """By the runtime's process, if that is the one of this number here."""
    try:
        attached = attach(about.pid, proc) if inner_pid(about.pid, proc) == about.pid else None
    except NoBoard:
        return None
    if attached is not None and attached.board.about.pid != about.pid:
        attached.close()
        return None
    return attached


def running(proc: Path = PROC) -> list[tuple[int, About]]:
    """The runtimes whose processes this user may look at, with what their boards tell: by pid, in order."""
    found = []
    for entry in sorted(proc.iterdir(), key=lambda path: (len(path.name), path.name)):
        if entry.name.isdecimal():
            with suppress(NoBoard, OSError):
                pid = int(entry.name)
                boards = _boards_of(pid, proc)
                abouts = [board.about for board in boards]
                for board in boards:
                    board.close()
                found += [(pid, about) for about in abouts if about.pid == inner_pid(pid, proc)]
    return found


def _boards_of(pid: int, proc: Path) -> list[Board]:
    """Those that a process has, and that are not over."""
    boards: list[Board] = []
    seen = set()  # a process has several descriptors of each
    for link in _links(pid, proc):
        try:
            fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # it has just closed it
        try:
            is_sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK  # it cannot shrink under us
            if is_sealed and (inode := os.stat(fd).st_ino) not in seen:
                seen.add(inode)
                board = Board.look(fd)
                if board.is_over:
                    board.close()
                else:
                    boards.append(board)
        except OtherVersion:
            raise NoBoard(_other_version(pid, proc)) from None
        except (ValueError, OSError):
            continue
        finally:
            os.close(fd)
    return boards


def _links(pid: int, proc: Path) -> Iterator[Path]:
    folder = proc / str(pid) / "fd"
    try:
        for path in folder.iterdir():
            with suppress(OSError):
                if os.readlink(path).removesuffix(" (deleted)") == _LINK:
                    yield path
    except FileNotFoundError:
        raise NoBoard(f"there is no process {pid}: see `ps`, or leave the number out") from None
    except PermissionError:
        raise NoBoard(f"process {pid} ({_name(pid, proc)}) {_why_not(pid, proc)}") from None
    except ProcessLookupError:
        raise NoBoard(f"process {pid} has just ended") from None


def _why_not(pid: int, proc: Path) -> str:
    if user_of(pid, proc) == os.geteuid():
        return "is this user's, but the system lets only root look at it: ask as root, or by its URL"
    return "is another user's: only its own and root may look at it"


def _nothing(pid: int, proc: Path) -> str:
    return (
        f"process {pid} ({_name(pid, proc)}) shows no status board: it is no tpworker, or one that has no "
        "processes at this moment, since it begins to start, recovers or sleeps"
    )


def _other_version(pid: int, proc: Path) -> str:
    python = ""
    with suppress(OSError):
        python = os.readlink(proc / str(pid) / "exe")
    return (
        f"process {pid} ({_name(pid, proc)}) runs another version of tpworker than this one ({version()}), "
        f"which cannot read its status board: use its own{f', by {python} -m tpworker top' if python else ''}"
    )


def _name(pid: int, proc: Path) -> str:
    with suppress(OSError):
        return (proc / str(pid) / "comm").read_text(errors="replace").strip() or "?"
    return "?"
