"""Which CPUs a rank's process keeps to: those near its GPU.

Between NUMA nodes a launch, a copy from pinned memory and a look at shared memory all take longer, and where
the kernel puts a process is luck. What is set already, with taskset or for a container, is only narrowed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from tpworker.observe.nvml import Gpu

logger = logging.getLogger(__name__)

CPUS_PER_RANK = 2
"""Fewer are worse than distant ones: a rank has a thread that launches steps and one that publishes them."""


def near_cpus(
    gpus: Sequence[Gpu], allowed: AbstractSet[int] | None = None
) -> tuple[frozenset[int] | None, ...]:
    """For each rank the CPUs that it shall keep to; None: whatever it is given.

    Args:
        gpus: of the ranks, in their order.
        allowed: CPUs that this process may use; None: as the kernel says.
    """
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    near = [frozenset(gpu.cpus & allowed) if gpu.cpus else frozenset() for gpu in gpus]
    chosen: list[frozenset[int] | None] = []
    for rank, cpus in enumerate(near):
        sharers = sum(1 for other in near if other & cpus)
        if not cpus or cpus == allowed:  # not known, none of ours, or nothing to choose
            chosen.append(None)
        elif len(cpus) < CPUS_PER_RANK * sharers:
            logger.info(
                "rank %d is not kept to CPUs %s near its GPU: too few for the %d ranks there",
                rank, ranges(cpus), sharers,
            )  # fmt: skip
            chosen.append(None)
        else:
            logger.info("rank %d keeps to CPUs %s, near GPU %d", rank, ranges(cpus), gpus[rank].index)
            chosen.append(cpus)
    return tuple(chosen)


def ranges(numbers: AbstractSet[int]) -> str:
    """A set of CPUs as the kernel writes it: 0-3,8."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in parts)
