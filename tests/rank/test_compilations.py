"""What Triton compiles is counted on the board. Triton itself is a stand-in, with its arguments."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest

from tpworker.ipc.board import Board, Field
from tpworker.rank.compilations import count_compilations, hash_kernels, wake_compiler


def test_kernels_that_come_from_the_cache_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    compilation = SimpleNamespace(listener=None)
    triton = SimpleNamespace(knobs=SimpleNamespace(compilation=compilation))
    monkeypatch.setitem(sys.modules, "triton", triton)
    board = Board.create(["rank"])
    row = board.row("rank")
    count_compilations(row)
    for cache_hit in (False, True, False):
        compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=cache_hit)
    assert row[Field.COMPILED] == 2
    board.close()


def test_the_compiler_is_woken_in_a_thread_whatever_it_is_like(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Drivers:
        @property
        def active(self) -> None:
            done.append(threading.current_thread().name)

    triton = SimpleNamespace(runtime=SimpleNamespace(driver=Drivers()))
    cache = SimpleNamespace(triton_key=lambda: done.append("key"))
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", cache)
    wake_compiler().join(20)
    assert done == ["tpworker-waking", "key"]
    failures: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", SimpleNamespace())  # it is elsewhere
    wake_compiler().join(20)
    monkeypatch.setitem(sys.modules, "triton", None)  # not to be imported
    wake_compiler().join(20)
    assert failures == []


def test_sources_of_our_kernels_are_hashed_once_they_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from tpworker.kernels.mask_kernel import _copy_masks

    monkeypatch.setattr(_copy_masks, "hash", None)  # where Triton keeps it
    hash_kernels()
    assert _copy_masks.hash


def test_kernels_are_not_hashed_where_there_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    hash_kernels()
