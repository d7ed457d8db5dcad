"""Which captured step serves a batch."""

from __future__ import annotations

from collections.abc import Callable

from tpworker.ipc.drafting import MOST_ROWS
from tpworker.model.sampling import SamplingMode
from tpworker.rank.device import CpuDevice
from tpworker.rank.graphs import (
    GREEDY,
    MODES,
    MOST_TOKENS,
    Backlog,
    SlotGraphs,
    TokenGraphs,
    ladder,
    token_ladder,
)


def test_the_ladder_ends_at_the_largest_batch() -> None:
    assert ladder(1) == [1]
    assert ladder(7) == [1, 2, 4, 7]
    assert ladder(64) == [1, 2, 4, 8, 16, 32, 48, 64]
    for most in range(1, 600):
        sizes = ladder(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most


def test_a_batch_takes_the_next_larger_size_and_a_mode_that_does_what_it_needs() -> None:
    device = CpuDevice()
    done: list[tuple[int, int, SamplingMode]] = []
    graphs = SlotGraphs(20, (0,))
    assert graphs.find(3, 0, GREEDY) is None
    graphs.capture(device, lambda *kind: done.append(kind))
    assert done == [], "the CPU has nothing to capture"
    for count, size in [(0, 1), (1, 1), (3, 4), (4, 4), (9, 16), (17, 20), (20, 20)]:
        for random, truncate, suppress in [
            (False,) * 3,
            (True, False, False),
            (True, True, False),
            (False, False, True),
        ]:
            mode = SamplingMode(random, truncate, suppress)
            replay = graphs.find(count, 0, mode)
            assert replay is not None
            replay()
            taken_size, drafts, taken = done[-1]
            assert (taken_size, drafts) == (size, 0)
            assert taken in MODES
            needed = zip(
                (random, truncate, suppress), (taken.random, taken.truncate, taken.suppress), strict=True
            )
            assert all(has >= needs for needs, has in needed)
            if not (truncate or suppress):
                assert taken == mode, "sorting a vocabulary for nothing"
    device.close()


def test_steps_with_drafts_are_captured_for_as_many_slots_as_may_have_them() -> None:
    device = CpuDevice()
    done: list[tuple[int, int, SamplingMode]] = []
    graphs = SlotGraphs(256, (0, 1, 2, 4))
    graphs.capture(device, lambda *kind: done.append(kind))
    for drafts in (1, 2, 4):
        most = min(256, MOST_ROWS // (1 + drafts))
        for count in (1, 3, 100, most):
            for mode in (GREEDY, SamplingMode(True, False, False), SamplingMode(True, True, True)):
                replay = graphs.find(count, drafts, mode)
                assert replay is not None
                replay()
                size, taken_drafts, taken = done[-1]
                assert count <= size <= most
                assert taken_drafts == drafts
                assert taken.random >= mode.random
                assert taken.truncate >= mode.truncate
    assert set(graphs.kinds()) == set(graphs._replays)
    device.close()


def test_the_ladder_of_tokens_ends_at_the_budget_or_where_graphs_no_longer_pay() -> None:
    assert token_ladder(7) == [7]
    assert token_ladder(16) == [16]
    assert token_ladder(100) == [16, 32, 64, 96, 100]
    assert token_ladder(512)[-3:] == [448, 480, 512]
    assert token_ladder(10**6)[-1] == MOST_TOKENS
    for most in range(1, 2 * MOST_TOKENS):
        sizes = token_ladder(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == min(most, MOST_TOKENS)


def test_tokens_take_the_next_larger_size_if_there_is_one() -> None:
    device = CpuDevice()
    filled: list[int] = []
    done: list[int] = []
    graphs = TokenGraphs()
    assert graphs.size_for(1) is None
    graphs.capture(device, 100, filled.append, done.append)
    assert filled == [100, 96, 64, 32, 16]
    assert [graphs.size_for(count) for count in (1, 16, 17, 64, 65, 100, 101)] == [
        16, 16, 32, 64, 96, 100, None,
    ]  # fmt: skip
    for size in (16, 100):
        graphs.replay(size)
    assert done == [16, 100]
    device.close()


class Captor(CpuDevice):
    """Notes what it captures late, and what is replayed of it: captures are not run."""

    def __init__(self, done: list[object]) -> None:
        super().__init__()
        self._done = done
        self.num_captured = 0

    def capture_late(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_captured += 1
        return lambda: self._done.append("replay") or work()


def work_off(backlog: Backlog) -> None:
    while backlog:
        backlog.pop(0)()


def test_a_kind_that_is_captured_late_runs_as_it_is_and_is_captured_behind_the_largest() -> None:
    done: list[object] = []
    device, backlog = Captor(done), Backlog()
    graphs = SlotGraphs(20, (0, 1))
    graphs.capture_late(device, lambda *kind: done.append(kind), backlog)
    truncated = SamplingMode(True, True, False)

    def step(count: int, mode: SamplingMode) -> list[object]:
        done.clear()
        run = graphs.find(count, 0, mode)
        assert run is not None
        run()
        return list(done)

    assert step(3, truncated) == [(4, 0, MODES[1])], "padded, and in a mode that is captured"
    assert device.num_captured == 0
    work_off(backlog)
    assert device.num_captured == 2
    assert done == [(4, 0, MODES[1])], "a capture does not run"
    assert step(4, truncated) == ["replay", (4, 0, MODES[1])]
    assert step(1, GREEDY) == [(1, 0, GREEDY)]
    assert step(1, GREEDY) == [(1, 0, GREEDY)], "not captured yet"
    work_off(backlog)
    assert device.num_captured == 3
    assert set(graphs._replays) == {(20, 1, MODES[0]), (4, 0, MODES[1]), (1, 0, GREEDY)}
    assert step(20, MODES[0]) == [(20, 0, MODES[0])]
    device.close()


def test_tokens_have_their_sizes_before_any_is_captured() -> None:
    done: list[object] = []
    device, backlog = Captor(done), Backlog()
    graphs = TokenGraphs()
    graphs.capture_late(device, 100, done.append, backlog)
    assert [graphs.size_for(count) for count in (1, 17, 100, 101)] == [16, 32, 100, None]
    graphs.replay(32)
    work_off(backlog)
    graphs.replay(32)
    graphs.replay(100)
    assert done == [32, "replay", 32, "replay", 100], "the largest was captured first"
    assert device.num_captured == 2
    device.close()


def test_a_few_kinds_stand_for_all() -> None:
    graphs = SlotGraphs(200, (0, 4))
    samples = graphs.samples()
    assert {kind[1:] for kind in samples} == {kind[1:] for kind in graphs.kinds()}
    assert {kind[0] for kind in samples if not kind[1]} == {1, 2, 16, 200}
    assert len(samples) < len(graphs.kinds()) / 2
