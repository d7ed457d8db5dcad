"""The command line: `tpworker serve …`, `tpworker doctor …`, `tpworker top …`, `tpworker bench …`,
`tpworker rank …`.

Importing this, and being told of a mistake in an option, takes an instant: what serving needs is imported
when it is needed.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tpworker.cli.interrupt import Interrupted, interruptible
from tpworker.cli.log_options import logging_to_stderr, say
from tpworker.cli.options import DoctorOptions, Options, parse
from tpworker.cli.rank_options import RankOptions
from tpworker.errors import ConfigError, InvalidRequest, ModelError, TpworkerError
from tpworker.logs import TEXT, format_in_use

if TYPE_CHECKING:
    from tpworker.bench.bench import BenchOptions
    from tpworker.top.top import TopOptions

__all__ = ["DoctorOptions", "Options", "main", "parse"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 2 for a mistake of the user's, or 1 for a failure."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not whatever takes its place, or None
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: any text can be shown on any terminal
    words = list(sys.argv[1:] if arguments is None else arguments)
    with ExitStack() as log:  # which the last words belong to
        try:
            with interruptible():
                return _run(words, log)
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            if words[:1] != ["serve"] or any(word.partition("=")[0] == "--ask" for word in words):
                return 128 + number
            say(f"{signal.Signals(number).name}: ended before it was ready", logging.WARNING)
            return 0
        except (ConfigError, ModelError, InvalidRequest) as error:
            say(str(error), logging.ERROR, label="error: ")
            return 2
        except TpworkerError as error:
            say(str(error), logging.ERROR)
            return 1
        except BrokenPipeError:  # whoever read the answer has left
            _forget_stdout()
            return 1
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                _forget_stdout()
                say(f"what it tells cannot be written: {error.strerror}", logging.ERROR)
                return 1
            if format_in_use() == TEXT:
                raise  # Python tells of it
            logging.getLogger("tpworker.cli").critical("this is a bug", exc_info=True)
            return 1


def _forget_stdout() -> None:
    """What is still to be written there is not, nor at Python's end: it would fail once more."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)


def _run(words: Sequence[str], log: ExitStack) -> int:
    options = parse(words)
    if isinstance(options, DoctorOptions):
        from tpworker.doctor.doctor import run_doctor

        logging.basicConfig(format="%(asctime)s tpworker %(levelname)s %(message)s", level=logging.WARNING)
        return run_doctor(options.config, options.as_json)
    if isinstance(options, RankOptions):
        from tpworker.cli.rank import run_rank

        run_rank(options)
    if not isinstance(options, Options):
        return _look_or_measure(options)
    from tpworker.cli.serve import ask, serve

    log.enter_context(logging_to_stderr(options.log))
    return serve(options) if options.ask is None else ask(options, options.ask)


def _look_or_measure(options: TopOptions | BenchOptions) -> int:
    from tpworker.bench.bench import BenchOptions, run_bench

    if isinstance(options, BenchOptions):
        return run_bench(options)
    from tpworker.top.top import run_top

    return run_top(options)
