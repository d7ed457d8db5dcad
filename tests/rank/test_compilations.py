"""What Triton compiles is counted on the board. Triton itself is a stand-in, with its arguments."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from tpworker.ipc.board import Board, Field
from tpworker.rank.compilations import count_compilations


def test_kernels_that_come_from_the_cache_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    compilation = SimpleNamespace(listener=None)
    triton = SimpleNamespace(knobs=SimpleNamespace(compilation=compilation))
    monkeypatch.setitem(sys.modules, "triton", triton)
    board = Board.create(["rank"])
    row = board.row("rank")
    count_compilations(row)
    for microseconds, cache_hit in ((200_000, False), (900, True), (50_000, False)):
        compilation.listener(
            src=None, metadata={}, metadata_group={}, cache_hit=cache_hit,
            times=SimpleNamespace(total=microseconds),
        )  # fmt: skip
    assert (row[Field.COMPILED], row[Field.COMPILE_US]) == (2, 250_000)
    board.close()
