"""A picture of steps: when the host launched them, and when the device ran them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tpworker.outputs import StepRecord

NUM_STEPS = 8


def steady_steps(steps: Sequence[StepRecord], number: int = NUM_STEPS) -> list[StepRecord]:
    """Consecutive steps from the middle of the longest run of plain decodes of one batch."""
    runs: list[list[StepRecord]] = [[]]
    for step in steps:
        last = runs[-1][-1] if runs[-1] else step
        if step.num_prefill_tokens or step.num_decodes != last.num_decodes:
            runs.append([])
        if not step.num_prefill_tokens:
            runs[-1].append(step)
    longest = max(runs, key=len)
    start = max(0, (len(longest) - number) // 2)
    return longest[start : start + number]


def draw(path: Path, title: str, panels: Mapping[str, Sequence[StepRecord]]) -> None:
    """Writes a picture, one panel over the other, all to one scale of time.

    Each step is a bar, as long as the device ran it, with an arrow that begins where the host launched it;
    what lies between two bars, red, is time that the device had nothing to do.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(panels), 1, sharex=True, squeeze=False, figsize=(11, 2.1 * len(panels) + 0.6)
    )
    for (name, steps), axes in zip(panels.items(), rows[:, 0], strict=True):
        _draw_panel(axes, name, steps)
    rows[-1, 0].set_xlabel("ms")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_panel(axes: Any, name: str, steps: Sequence[StepRecord]) -> None:
    origin = steps[0].started_ns

    def at(time_ns: int) -> float:
        return (time_ns - origin) / 1e6

    for index, step in enumerate(steps):
        start, end, launched = at(step.started_ns), at(step.ended_ns), at(step.launched_ns)
        axes.broken_barh([(start, end - start)], (0, 0.5), color=("#4c78a8", "#8cb0d6")[index % 2])
        axes.text(
            (start + end) / 2, 0.25, str(step.step), ha="center", va="center", fontsize=8, color="white"
        )
        axes.plot([launched, start], [1.0, 0.5], color="#888888", linewidth=0.8)
        axes.plot(launched, 1.0, marker="v", color="#333333", markersize=5)
    gaps = [(at(before.ended_ns), at(after.started_ns)) for before, after in pairwise(steps)]
    axes.broken_barh([(end, start - end) for end, start in gaps], (0, 0.5), color="#e45756", linewidth=0)
    axes.set_yticks([0.25, 1.0], ["device", "launched"])
    axes.set_ylim(-0.1, 1.2)
    axes.set_title(name, fontsize=9, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
