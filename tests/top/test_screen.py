"""Frames: what stands where, in any size."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.top.snapshots import gpu, snapshot
from tpworker.errors import printable
from tpworker.observe.snapshot import Rank, Request, Scheduler, Snapshot, Whole
from tpworker.top.rates import History, rates_of
from tpworker.top.screen import frame
from tpworker.top.text import bar, count, duration, in_ascii, percent, rate, size, span


def shown(width: int = 80, height: int | None = 24, note: str = "q quits", **group: object) -> list[str]:
    before, after = snapshot(0, **group), snapshot(2, **group)  # type: ignore[arg-type]
    return [line.plain for line in frame(after, rates_of(before, after), width, height, note)]


def test_80_columns_on_gpus() -> None:
    lines = shown(num_ranks=2, on_gpus=True, num_requests=20)
    assert len(lines) == 24
    assert lines[:5] == [
        "tpworker 0.1.0  zai-org/GLM-4.5-Air  cuda bfloat16  pid 4242  since 3:14   ready",
        "steps       100/s  4.0 µs gap  96% busy  200 done  100 µs skew  30 µs to publish",
        "requests    8/64 running  3 waiting  1,234 done  1 aborted  2 restarts",
        "tokens/s    800 output  50 prompt  40% of prompts cached",
        f"KV blocks   {'█' * 38}{'░' * 12} 75%  750 of 1,000",
    ]
    assert lines[6:11] == [
        "process    state  step   CPU  memory  waits  last  GPU  GPU memory  temp  power",
        "runtime    ready         25%    800M                                           ",
        "scheduler  ready   202   50%     90M                                           ",
        "rank0      ready   201  100%    2.0G     1%    0%  99%   130G/141G  61°C   655W",
        "rank1      ready   201  100%    2.0G     0%  100%  99%   130G/141G  61°C   655W",
    ]
    assert "memory  waits" not in shown(width=78, on_gpus=True)[6]
    assert lines[12].split() == ["oldest", "requests", "state", "age", "prompt", "output", "number"]
    assert len([line for line in lines if line.startswith("chatcmpl-")]) == 10
    assert lines[-1] == "q quits"


def test_a_wide_terminal_shows_more() -> None:
    lines = shown(width=160, num_ranks=2, on_gpus=True, num_requests=2)
    heading = next(line for line in lines if line.startswith("process"))
    assert {"memory", "behind", "weights"} <= set(heading.split())
    assert any("chatcmpl-" + "0" * 32 in line for line in lines), "names are whole"


def test_ranks_and_requests_share_what_room_there_is() -> None:
    lines = shown(num_ranks=64, num_requests=16)
    assert len(lines) == 24
    assert "… and 56 more ranks: a taller terminal shows them" in lines
    assert len([line for line in lines if line.startswith("chatcmpl-")]) == 3
    low = shown(height=11, num_ranks=2, num_requests=16)
    assert [line.split(" ")[0] for line in low[5:]] == ["", "process", "runtime", "scheduler", "…", "q"]
    assert len(shown(height=None, note="", num_ranks=64, num_requests=16)) == 5 + 1 + 67 + 1 + 17


def test_a_start() -> None:
    starting = Snapshot(
        version="0.1.0", model="m", runtime=Whole(state="starting"), scheduler=Scheduler(phase="loading"),
        ranks=(Rank(rank=0, phase="loading", progress=0.426), Rank(rank=1, phase="importing")),
    )  # fmt: skip
    text = "\n".join(line.plain for line in frame(starting, History().add(starting), 80, 24))
    assert "starting" in text
    assert "rank0      loading 43%" in text
    assert "rank1      importing" in text
    nothing = Snapshot(version="0.1.0", runtime=Whole(state="recovering"))
    lines = [line.plain for line in frame(nothing, History().add(nothing), 80, 24, "no answer")]
    assert lines[0].endswith("recovering")
    assert (len(lines), lines[-1]) == (24, "no answer")


def test_drafts_are_told_of_where_there_are_some() -> None:
    before, after = replace(snapshot(0), num_drafts=4), replace(snapshot(2), num_drafts=4)
    assert frame(after, rates_of(before, after), 80)[3].plain.endswith("75% of drafts right")


@given(
    st.integers(1, 200),
    st.integers(1, 60),
    st.integers(0, 9),
    st.integers(0, 20),
    st.booleans(),
    st.text(max_size=40),
)
def test_no_frame_is_too_large_and_nothing_in_it_is_no_text(
    width: int, height: int, num_ranks: int, num_requests: int, on_gpus: bool, text: str
) -> None:
    seen = snapshot(1, num_ranks, num_requests, on_gpus)
    seen = replace(
        seen, model=text, runtime=replace(seen.runtime, state=text),
        requests=(Request(name=text, state=text), *seen.requests[1:]),
    )  # fmt: skip
    lines = frame(seen, History().add(seen), width, height, text)
    assert len(lines) <= height
    assert all(line.cell_len <= width for line in lines)
    assert all(line.plain.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (count(1234), "1,234"), (count(123_456), "123.5k"), (count(12_300_000), "12.3M"), (count(None), "–"),
        (count(float("nan")), "–"), (rate(0), "0"), (rate(3.14), "3.1"), (rate(50), "50"),
        (percent(0.567), "57%"), (size(512 << 20), "512M"), (size(3 << 29), "1.5G"),
        (size(141 << 30), "141G"),
        (span(4.21e-6), "4.2 µs"), (span(999.7e-6), "1.0 ms"), (span(0.0123), "12 ms"), (span(2), "2.0 s"),
        (duration(4.2), "4.2s"), (duration(192), "3:12"), (duration(18192), "5:03:12"),
        (duration(187200), "2d04h"), (bar(0.5, 4), "██░░"), (bar(7, 3), "███"), (bar(None, 2), "░░"),
        (printable("a\x1b[31m\n\u202eb"), "a?[31m??b"), (in_ascii("4 µs █░ é"), "4 us #. ?"),
    ],
)  # fmt: skip
def test_figures(told: str, text: str) -> None:
    assert told == text


def test_what_a_gpu_does_not_tell_is_left_out() -> None:
    before, after = snapshot(0, on_gpus=True), snapshot(1, on_gpus=True)
    silent = gpu(utilization=None, memory_used=None, memory_total=None, temperature=None, power=None)
    after = replace(after, ranks=tuple(replace(rank, gpu=silent) for rank in after.ranks))
    heading = frame(after, rates_of(before, after), 80)[6].plain
    assert "temp" not in heading
    assert "power" not in heading
