"""The command line as a process: `tpworker` and `python -m tpworker`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from tpworker.cli import main
from tpworker.ipc.streams import leave, make_stderr_safe


def run(command: Callable[[], int] = main) -> NoReturn:
    """Runs the command line and ends the process with its status.

    By then all that is ours has ended. Threads that have not, such as one with a prompt that nobody waits for
    any more, do not matter.
    """
    make_stderr_safe()
    status = command()
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the answer has left
        status = 1
    except OSError as error:
        print(f"tpworker: the answer cannot be written to stdout: {error.strerror}", file=sys.stderr)
        status = 1
    leave(status)


if __name__ == "__main__":
    run()
