"""The command line: `tpworker serve …`, `tpworker doctor …`.

Importing this, and being told of a mistake in an option, takes an instant: what serving needs is imported
when it is needed.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence

from tpworker.cli.options import DoctorOptions, Options, parse
from tpworker.errors import ConfigError, InvalidRequest, ModelError, TpworkerError

__all__ = ["DoctorOptions", "Options", "main", "parse"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 2 for a mistake of the user's, or 1 for a failure."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not whatever takes its place, or None
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: any text can be shown on any terminal
    try:
        options = parse(arguments)
        logging.basicConfig(format="%(asctime)s tpworker %(levelname)s %(message)s", level=logging.WARNING)
        if isinstance(options, DoctorOptions):
            from tpworker.doctor.doctor import run_doctor

            return run_doctor(options.config, options.as_json)
        from tpworker.cli.serve import ask, serve

        return serve(options) if options.ask is None else ask(options, options.ask)
    except (ConfigError, ModelError, InvalidRequest) as error:
        print(f"tpworker: error: {error}", file=sys.stderr)
        return 2
    except TpworkerError as error:
        print(f"tpworker: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the answer has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
