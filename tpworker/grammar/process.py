"""The process that compiles a grammar for the first time: nobody can say how long that takes.

A small schema may keep llguidance busy for minutes, and a thread cannot be stopped; bounded/child.py bounds
the time and memory of each. What has been compiled here is compiled again where it is used.

    {tokenizer: its JSON, vocab_size, eos_ids}  ──►  ready, or not, and why
    a grammar's text, another, …                ──►  what is wrong with it; "" if nothing is
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

import llguidance.numpy  # noqa: F401  # here, so that the import counts for neither bound

from tpworker.bounded import child
from tpworker.errors import one_line
from tpworker.grammar.compiler import Compiler
from tpworker.grammar.errors import LONGEST, GrammarError

NAME = "tpworker-grammar"


def main() -> NoReturn:
    """Serves the parent until it is gone."""
    child.serve(NAME, _prepare)


def _prepare(start: Any) -> tuple[str, child.Work | None]:
    try:
        compiler = Compiler(start["tokenizer"], start["vocab_size"], start["eos_ids"])
    except MemoryError:
        raise
    except BaseException as error:
        return _named(error), None
    # What native code writes as it panics is in our answer: clients could cause any number of such lines.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    return "", lambda grammar: what_is_wrong(compiler, grammar)


def what_is_wrong(compiler: Compiler, grammar: str) -> str:
    """Compiles a grammar and goes a few steps with it; what is wrong with it, or "".

    Raises:
        MemoryError: there is not enough.
    """
    try:
        compiler.try_out(grammar)
        return ""
    except MemoryError:
        raise
    except BaseException as error:  # a panic is no Exception
        if isinstance(error, RuntimeError) and "start new thread" in str(error):
            raise MemoryError from None  # there is none for its stack
        return _named(error)


def _named(error: BaseException) -> str:
    if isinstance(error, GrammarError):
        return str(error)
    return f"llguidance fails on it: {one_line(f'{type(error).__name__}: {error}', LONGEST)}"


if __name__ == "__main__":
    main()
