"""What the benchmarks share: numbers made from samples, where they were taken, and the JSON file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpworker.bench.summary import quantile
from tpworker.ipc.limits import usable_cores
from tpworker.observe.nvml import Nvml, NvmlUnavailable


@dataclass(frozen=True, slots=True)
class Summary:
    """Samples of several rounds. `low` and `high` are the lowest and highest median of a round."""

    median: float
    p99: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, rounds: Sequence[Sequence[float]]) -> Summary:
        """Of samples, round by round."""
        medians = [quantile(samples, 0.5) for samples in rounds]
        everything = [sample for samples in rounds for sample in samples]
        return cls(
            quantile(everything, 0.5), quantile(everything, 0.99), min(medians), max(medians), len(everything)
        )


def machine(commit: str | None = None) -> dict[str, Any]:
    """Where and with what the numbers were taken. `commit`: of this repository; None: git is asked."""
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu,
        "cores": usable_cores(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        **_gpus(),
        "commit": commit or _commit(),
        "load": os.getloadavg()[0],
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
    }


def _commit() -> str | None:
    """Of the checkout that this file is in, with a + if files differ from it; None where there is no git."""
    folder = Path(__file__).parents[1]
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None


def _gpus() -> dict[str, Any]:
    """All of the machine; nothing where there is none."""
    try:
        with closing(Nvml.connect()) as nvml:
            gpus = [nvml.gpu(uuid, index) for index, uuid in enumerate(nvml.handles)]
            driver = nvml.driver
    except NvmlUnavailable:
        return {}
    return {
        "gpus": [gpu.name for gpu in gpus],
        "nvlinks": [gpu.nvlinks or 0 for gpu in gpus],
        "driver": driver,
        "triton": _version("triton"),
        "fa3": _version("tokenspeed-fa3"),
    }


def _version(package: str) -> str | None:
    """None: not installed, or put on the path without its metadata."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def told_ranks(row: dict[str, Any]) -> str:
    """TP size of a row, and how many ranks stood in for it, if they did."""
    running = row.get("num_running", row["ranks"])
    return str(row["ranks"]) if running == row["ranks"] else f"{row['ranks']} (on {running})"


def save(path: str | None, data: dict[str, Any]) -> None:
    """Writes `data` as JSON, unless `path` is None. Summaries may be part of it."""
    if path is not None:
        Path(path).write_text(json.dumps(data, indent=1, default=asdict) + "\n")
