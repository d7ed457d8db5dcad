"""A picture of the levels: how soon, and how much."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpworker.bench.summary import Summary
from tpworker.errors import ConfigError, shown


def check_can_draw(file: str) -> None:
    """Raises ConfigError: the library that draws is not there, or does not draw files of that name."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.filetypes)
    if Path(file).suffix.lower().removeprefix(".") not in kinds:
        raise ConfigError(f"--plot {shown(file)}: its name must end in one of .{', .'.join(kinds)}")


def draw(path: Path, title: str, summaries: Sequence[Summary]) -> None:
    """Writes it: TTFT, TPOT and throughput of each level.

    Args:
        path: PNG, SVG, PDF …
        title: stands above.
        summaries: of the levels, in their order.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6))
    loads = [summary.load for summary in summaries]
    _draw_spreads(axes[0], "TTFT, ms", [summary.ttft for summary in summaries])
    _draw_spreads(axes[1], "TPOT, ms", [summary.tpot for summary in summaries])
    axes[2].bar(range(len(loads)), [summary.output_per_second for summary in summaries], color="#4c78a8")
    axes[2].set_title("output tokens/s", fontsize=9, loc="left")
    for one in axes:
        one.set_xticks(range(len(loads)), loads, fontsize=8, rotation=30 if len(loads) > 3 else 0)
        one.set_ylim(bottom=0)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    figure.suptitle(title, fontsize=9, parse_math=False)  # names of models may hold dollars
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_spreads(axes: Any, title: str, spreads: Sequence[Any]) -> None:
    for name, colour in (("p50", "#4c78a8"), ("p90", "#f2a93b"), ("p99", "#e45756")):
        points = [(at, 1e3 * getattr(one, name)) for at, one in enumerate(spreads) if one is not None]
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=name) if points else None
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(fontsize=8, frameon=False)
