"""Attention is tried ahead of the steps that need it, and leaves nothing but the null block touched."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from tests.rank.test_runner import Rig
from tpworker.rank.ahead import attend_ahead


def test_each_size_is_run_once_beside_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    decoder, cache = rig.runner._decoder, rig.runner._cache
    run: list[tuple[int, bool]] = []
    attend_once = decoder.attend_once

    def note(count: int, width: int, cache: object) -> None:
        attend_once(count, width, rig.runner._cache)
        run.append((count, threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(decoder, "attend_once", note)
    with torch.inference_mode():
        for layer in (*cache.keys, *cache.values):
            layer.fill_(7.0)
    attend_ahead(decoder, cache, [4, 2, 1], 16, rig.device)()
    assert sorted(run) == [(1, False), (2, False), (4, False)]
    for layer in (*cache.keys, *cache.values):
        assert torch.isfinite(layer).all()
        assert (layer[1:] == 7.0).all()
    assert (cache.keys[0][0, 0] == 0).all(), "it stored something"
    rig.device.close()


def test_what_goes_wrong_is_left_to_the_step_that_needs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig()

    def fail(count: int, width: int, cache: object) -> None:
        if count == 2:
            raise RuntimeError("no such kernel")

    monkeypatch.setattr(rig.runner._decoder, "attend_once", fail)
    with caplog.at_level(logging.WARNING):
        attend_ahead(rig.runner._decoder, rig.runner._cache, [2, 1], 16, rig.device)()
    assert caplog.messages == ["attention of 2 sequences was not tried ahead: no such kernel"]
    rig.device.close()


def test_only_ranks_that_capture_do_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for captures in (False, True):
        rig = Rig()
        asked: list[list[int]] = []
        monkeypatch.setattr(
            "tpworker.rank.runner.attend_ahead",
            lambda decoder, cache, counts, width, device, asked=asked: asked.append(counts) or (lambda: None),
        )
        monkeypatch.setattr(rig.device, "captures", captures)
        rig.runner.prepare(8)
        assert asked == ([[4, 2, 1]] if captures else [])
        rig.device.close()
