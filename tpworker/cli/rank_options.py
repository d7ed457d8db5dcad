"""The command line of `tpworker rank`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tpworker.cli.arguments import integer, number
from tpworker.errors import ConfigError, shown
from tpworker.values import MAX_RANKS, is_address

MOST_SECONDS = 86400.0


@dataclass(frozen=True)
class RankOptions:
    """What the command line of `tpworker rank` says, checked."""

    address: str
    rank: int | None
    """None: what the launcher says, or whichever is missing."""
    timeout: float
    """Seconds."""


def add_rank(commands: Any) -> None:
    """Adds the command.

    Args:
        commands: argparse's subparsers.
    """
    parser = commands.add_parser(
        "rank",
        usage="tpworker rank --join NAME [OPTION …]",
        help="be a TP rank of a runtime on this machine that waits for ranks started from outside",
        description="Be a TP rank of a runtime on this machine that waits for ranks started from outside "
        "(`tpworker serve --join-address NAME`, `Runtime(join_address=…)`): for torchrun, Slurm (srun), a "
        "Ray placement group. It ends with the runtime, with status 0 if that was stopped; with its "
        "launcher; and when it is sent SIGTERM. Which GPU it has is said by CUDA_VISIBLE_DEVICES and "
        "LOCAL_RANK or SLURM_LOCALID.",
        allow_abbrev=False,
    )
    parser.add_argument("--join", metavar="NAME", required=True, help="the runtime's join address")
    parser.add_argument(
        "--rank",
        type=integer,
        metavar="N",
        help="which rank to be (default: as RANK or SLURM_PROCID say, or else whichever is missing)",
    )
    parser.add_argument(
        "--timeout",
        type=number,
        default=600.0,
        metavar="SECONDS",
        help="how long to wait for the runtime, if it is not there yet (default: 600)",
    )


def rank_options(given: dict[str, Any]) -> RankOptions:
    """What was given, checked.

    Raises:
        ConfigError: a value is out of range.
    """
    address, rank, timeout = given["join"], given["rank"], given["timeout"]
    if not is_address(address):
        raise ConfigError(f"--join {shown(address)}: must be 1 to 64 of letters, digits, '.', '_' and '-'")
    if rank is not None and not 0 <= rank < MAX_RANKS:
        raise ConfigError(f"--rank {shown(rank)}: must be from 0 to {MAX_RANKS - 1}")
    if not 0 < timeout <= MOST_SECONDS:
        raise ConfigError(f"--timeout {shown(timeout)}: must be above 0 and at most {MOST_SECONDS:g} seconds")
    return RankOptions(address, rank, timeout)
