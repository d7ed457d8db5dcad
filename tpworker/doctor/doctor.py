"""`tpworker doctor`: what a TP group would find on this machine, and what is missing for one.

It takes about a second, and touches no GPU: NVML is asked, CUDA is not started.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from typing import Any, TextIO

from tpworker.config import RuntimeConfig
from tpworker.doctor.check import Check, warning
from tpworker.doctor.gpu_checks import check_gpus
from tpworker.doctor.libraries import check_libraries
from tpworker.doctor.machine import check_machine, check_place
from tpworker.errors import ConfigError
from tpworker.observe.gpus import cuda_obstacle
from tpworker.observe.nvml import Gpu, Nvml, NvmlUnavailable, find_gpus, links
from tpworker.runtime.loading import check_working_directory

_COLOURS = {"ok": "32", "warning": "33", "missing": "31"}


def run_doctor(config: RuntimeConfig, as_json: bool, out: TextIO = sys.stdout) -> int:
    """Looks at everything, prints it, and returns 0 if the group would start, else 1."""
    report = examine(config)
    if as_json:
        print(
            json.dumps(report | {"checks": [asdict(check) for check in report["checks"]]}, indent=2), file=out
        )
    else:
        _print(report, out)
    return 0 if report["would_start"] else 1


def troubles(config: RuntimeConfig) -> list[Check]:
    """What is not as it should be, but for what a start says itself: of the model, and of GPUs not used."""
    report = examine(config, is_starting=True)
    return [check for check in report["checks"] if check.state != "ok"]


def examine(config: RuntimeConfig, is_starting: bool = False) -> dict[str, Any]:
    """What there is, and a `Check` for each thing that a group of this configuration needs.

    `is_starting` leaves out what a start says itself.
    """
    num_ranks = config.tensor_parallel_size
    with ExitStack() as stack:
        nvml: Nvml | None = None
        with suppress(NvmlUnavailable):  # `find_gpus` will say so
            nvml = stack.enter_context(closing(Nvml.connect()))
        found = find_gpus(nvml)
        obstacle = cuda_obstacle(num_ranks, found)
        device = config.device
        if device == "auto":
            device = "cuda" if obstacle is None else "cpu"
        is_default_model = config.model is None and not is_starting
        checks = [*check_machine(device, num_ranks), *check_libraries(device, is_default_model)]
        if device == "cuda":
            checks += check_gpus(nvml, found, num_ranks)
        elif is_starting:
            pass
        elif found.gpus and obstacle is not None and config.device == "auto":
            checks.append(warning("GPUs", f"{len(found.gpus)} found, but not used: {obstacle}", None))
        elif not found.gpus and found.problem and found.has_library and config.device == "auto":
            checks.append(warning("GPUs", f"none can be used: {found.problem}", None))
        if not is_starting:
            checks.append(check_place())
            checks += _check_model(config, device, found.gpus[:num_ranks])
        pairs = [] if nvml is None else list(links(nvml, found.gpus[:num_ranks]))
        return {
            "tensor_parallel_size": num_ranks,
            "device": device,
            "would_start": all(check.state != "missing" for check in checks),
            "driver": None if nvml is None else nvml.driver,
            "gpus": [
                asdict(gpu) | {"cpus": None if gpu.cpus is None else sorted(gpu.cpus)} for gpu in found.gpus
            ],
            "links": [{"gpus": [one.index, two.index]} | asdict(link) for one, two, link in pairs],
            "checks": checks,
        }


def _check_model(config: RuntimeConfig, device: str, gpus: tuple[Gpu, ...]) -> list[Check]:
    try:
        check_working_directory()
        from tpworker.doctor.model_check import check_default_model, check_model

        if config.model is None:
            return [check_default_model()]
        return list(check_model(config, device, gpus))
    except (ImportError, ConfigError) as error:  # each is told of among the other checks
        return [warning("model", f"not looked at: {error}", None)]


def _print(report: dict[str, Any], out: TextIO) -> None:
    checks: Sequence[Check] = report["checks"]
    width = max(len(check.subject) for check in checks)
    is_terminal = out.isatty()
    for check in checks:
        state = f"{check.state:7}"
        if is_terminal:
            state = f"\033[{_COLOURS[check.state]}m{state}\033[0m"
        print(f"{state}  {check.subject:{width}}  {check.found}", file=out)
        if check.remedy is not None:
            print(f"{'':9}{'':{width}}  → {check.remedy}", file=out)
    num_ranks, device = report["tensor_parallel_size"], report["device"]
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    num_missing = sum(check.state == "missing" for check in checks)
    verdict = "would start" if not num_missing else f"would not start: {num_missing} missing"
    print(f"\nA TP group of {ranks} on {'GPUs' if device == 'cuda' else 'the CPU'} {verdict}.", file=out)
