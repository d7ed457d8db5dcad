"""Triton's compiler, as a rank sees it: how many kernels it had to compile, for the board, and its beginning.

Triton keeps what it has compiled in a folder (~/.triton/cache), so later starts have none.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from typing import Any

from tpworker.ipc.board import Field, Row


def hash_compiler() -> None:
    """What the first kernel of a process waits for, even one that is in the folder: a hash of the whole
    compiler, which takes half a second. Done once, it is known to whoever is forked from this process, too.
    """
    with contextlib.suppress(Exception):  # whatever it is, who needs the compiler will be told
        importlib.import_module("triton.runtime.cache").triton_key()


def hash_kernels() -> None:
    """What the first launch of each of our kernels waits for: a hash of its source, and of all that it calls.
    Of the modules that have been imported; known from then on to whoever is forked from this process, too.
    """
    with contextlib.suppress(Exception):
        kernel = importlib.import_module("triton").JITFunction
        for name, module in list(sys.modules.items()):
            if name.startswith("tpworker.kernels."):
                for value in vars(module).values():
                    if isinstance(value, kernel):
                        value.cache_key  # noqa: B018  # it is made when it is asked for


def wake_compiler() -> threading.Thread:
    """Begins with what else the first kernel of a process waits for: Triton's driver, on the first start a
    module in C to be compiled. Goes on in a thread.

    Nothing depends on it: who comes too early does the same.
    """
    thread = threading.Thread(target=_wake, name="tpworker-waking", daemon=True)
    thread.start()
    return thread


def _wake() -> None:
    with contextlib.suppress(Exception):  # whatever it is, who needs the compiler will be told
        importlib.import_module("triton").runtime.driver.active  # noqa: B018  # it is made when it is asked for
    hash_compiler()


def count_compilations(row: Row) -> None:
    """From now on, Field.COMPILED of this process' row counts."""
    compilation = importlib.import_module("triton").knobs.compilation

    lock = threading.Lock()  # several threads compile

    def note(*, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            with lock:
                row[Field.COMPILED] += 1

    compilation.listener = note
