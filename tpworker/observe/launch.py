"""What a launcher says to a process that it starts: its rank, how many there are, which GPU is its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tpworker.errors import ConfigError, shown


@dataclass(frozen=True, slots=True)
class Launch:
    """A process among others."""

    rank: int | None = None
    """None: nobody says."""
    num_ranks: int | None = None
    """Processes in all; None: nobody says."""
    local: int | None = None
    """Its number on this machine; None: nobody says."""
    told_by: str = ""
    """Who says which rank it is, as 'RANK=1'."""


_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, and what does as it does
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),  # srun
)
_MOST = 1 << 20


def find_launch(environment: Mapping[str, str], rank: int | None = None) -> Launch:
    """What the environment says, of the first launcher that is found there.

    Args:
        environment: of the process.
        rank: counts more, and says nothing of how many there are.

    Raises:
        ConfigError: a variable is no number.
    """
    for rank_name, size_name, local_name in _LAUNCHERS:
        if rank_name not in environment:
            continue
        local = _number(environment, local_name)
        if rank is not None:
            return Launch(rank, None, local, f"--rank {rank}")
        number = _number(environment, rank_name)
        return Launch(number, _number(environment, size_name), local, f"{rank_name}={number}")
    return Launch() if rank is None else Launch(rank, None, None, f"--rank {rank}")


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal()) or int(value) > _MOST:
        raise ConfigError(
            f"the environment says {name}={shown(value)}, which is no number from 0 to {_MOST}: correct it, "
            "or unset it and give --rank"
        )
    return int(value)
