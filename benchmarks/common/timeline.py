"""A picture of steps: when the host launched them, and when the device ran them.

Of GPUs' steps, from the file that `bench gpu --timeline` and `bench table --timeline` write:

    python -m benchmarks.common.timeline FILE PICTURE --model qwen3-8b --tp 2 --batch 64
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common.report import told_ranks
from benchmarks.steps.gpu_trace import KINDS, OTHER
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


# -------------------------------------------------------------------------------- from a GPU's trace

_COLORS = dict(
    zip(
        (*KINDS, OTHER),
        ("#f2a93b", "#54a24b", "#9d755d", "#4c78a8", "#8cb0d6", "#b279a2", "#bab0ac"),
        strict=True,
    )
)
_STEPS = ("#4c78a8", "#8cb0d6")
_GAP = "#e45756"
_ZOOM_US = 60


def draw_kernels(path: Path, title: str, panels: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes a picture: a panel for each run, all to one scale, and the end of a step of the last, enlarged.

    Args:
        panels: by title, steps as of gpu_trace.timeline.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    figure, rows = pyplot.subplots(len(panels) + 1, 1, figsize=(11, 1.7 * (len(panels) + 1) + 0.9))
    until = min(_end(steps[-1]) for steps in panels.values()) / 1e3
    for (name, steps), axes in zip(panels.items(), rows, strict=False):
        _draw_steps(axes, steps)
        axes.set_xlim(-0.02 * until, until)
        axes.set_title(name, fontsize=9, loc="left")
    last = list(panels.values())[-1]
    end, start = _draw_boundary(rows[-1], *last[len(last) // 2 - 1 : len(last) // 2 + 1])
    told = f"the same, enlarged: from one step to the next, {start - end:.1f} µs"
    rows[-1].set_title(told, fontsize=9, loc="left")
    used = {kernel[0] for step in last for kernel in step["kernels"]}
    colors = {kind: color for kind, color in _COLORS.items() if kind in used} | {"between two steps": _GAP}
    handles = [patches.Patch(color=color, label=kind) for kind, color in colors.items()]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _end(step: Mapping[str, Any]) -> float:
    return float(max(start + duration for _, start, duration in step["kernels"]))


def _draw_steps(axes: Any, steps: Sequence[Mapping[str, Any]]) -> None:
    """Each step a bar, ms, with an arrow from where the host launched it."""
    for index, step in enumerate(steps):
        start, end, launched = step["kernels"][0][1] / 1e3, _end(step) / 1e3, step["launch"][0] / 1e3
        axes.broken_barh([(start, end - start)], (0, 0.5), color=_STEPS[index % 2], linewidth=0)
        number = str(step["step"])
        axes.text((start + end) / 2, 0.25, number, ha="center", va="center", fontsize=8, color="white",
                  clip_on=True)  # fmt: skip
        axes.plot([launched, start], [1.0, 0.5], color="#888888", linewidth=0.8)
        axes.plot(launched, 1.0, marker="v", color="#333333", markersize=5)
    for before, after in pairwise(steps):
        end, start = _end(before) / 1e3, after["kernels"][0][1] / 1e3
        axes.broken_barh([(end, start - end)], (0, 0.5), color=_GAP, linewidth=0)
    axes.set_yticks([0.25, 1.0], ["GPU", "launched"])
    axes.set_ylim(-0.1, 1.2)
    axes.set_xlabel("ms", loc="right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_boundary(axes: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, float]:
    """The kernels around the end of a step, µs from there. Returns that end and the next step's start."""
    end, first = _end(before), float(after["kernels"][0][1])
    for kind, start, duration in (*before["kernels"], *after["kernels"]):
        if start + duration - end > -_ZOOM_US and start - end < _ZOOM_US:
            color = _COLORS[kind]
            axes.broken_barh([(start - end, duration)], (0, 0.5), color=color, edgecolor="white")
    axes.broken_barh([(0, first - end)], (0, 0.5), color=_GAP, edgecolor="white")
    axes.set_xlim(-_ZOOM_US, _ZOOM_US)
    axes.set_yticks([0.25], ["kernels"])
    axes.set_ylim(-0.1, 0.7)
    axes.set_xlabel("µs", loc="right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return end, first


def main(arguments: Sequence[str]) -> int:
    """Draws one shape and batch out of a file, overlap off above overlap on."""
    parser = argparse.ArgumentParser(prog="benchmarks.common.timeline", description="Draws GPUs' steps.")
    parser.add_argument("file", type=Path, help="that --timeline has written")
    parser.add_argument("picture", type=Path, help="PNG, SVG …")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    options = parser.parse_args(arguments)
    data = json.loads(options.file.read_text())
    shape = (options.model, options.tp, options.batch)
    rows = [row for row in data["rows"] if (row["model"], row["ranks"], row["batch"]) == shape]
    if not rows:
        print(f"{options.file} holds no such row", file=sys.stderr)
        return 1
    rows.sort(key=lambda row: row["lookahead"])
    panels = {
        f"overlap {'on, lookahead ' + str(row['lookahead']) if row['lookahead'] else 'off'}: "
        f"TPOT {row['tpot_ms']:.2f} ms without the profiler": row["steps"]
        for row in rows
    }
    gpus = data["machine"].get("gpus", ["GPU"])
    what = f"{options.model}, TP {told_ranks(rows[0])} on {gpus[0]}, {options.batch} requests decode"
    draw_kernels(options.picture, what, panels)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
