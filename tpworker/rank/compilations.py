"""How many kernels a rank had to compile, for the board: the first start on a machine has them all to make.

Triton keeps what it has compiled in a folder (~/.triton/cache), so later starts have none.
"""

from __future__ import annotations

import importlib
import threading
from typing import Any

from tpworker.ipc.board import Field, Row


def count_compilations(row: Row) -> None:
    """From now on, Field.COMPILED and Field.COMPILE_US of this process' row count."""
    compilation = importlib.import_module("triton").knobs.compilation

    lock = threading.Lock()  # several threads compile

    def note(*, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            with lock:
                row[Field.COMPILED] += 1
                row[Field.COMPILE_US] += times.total

    compilation.listener = note
