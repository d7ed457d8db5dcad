"""How many descriptors this process may have, and so how many connections."""

from __future__ import annotations

import resource
from contextlib import suppress

from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError
from tpworker.runtime.settings import StepSizes

NUM_IDLE = 4096
"""Connections that may be open besides those of requests: clients keep some for their next request."""
NUM_RESERVED = 256
"""Descriptors that are for no such connection: some 30 of the runtime; files that are opened now and then;
connections that have been accepted before it was seen that they are too many, and NUM_SURPLUS more."""
_NUM_RESERVED_PER_RANK = 4  # pipes and a process handle
_NUM_LEAST = 16
_NUM_NEEDED = 96
"""Besides those of ranks: with fewer, starts, answers and even ZeroMQ fail in the middle."""


def raise_descriptor_limit(config: RuntimeConfig) -> None:
    """Raise the soft limit of descriptors to what a server wants, as far as the hard one allows.

    For a process that is the server's own. Its children inherit the limit: none of them uses select(), for
    whose sake alone the usual limit is low, and NCCL wants many for itself.

    Raises:
        ConfigError: the hard limit is so low that no server can run.
    """
    wanted = _num_wanted(config) + _num_reserved(config)
    needed = _NUM_NEEDED + _NUM_RESERVED_PER_RANK * config.tensor_parallel_size
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        if hard < needed:
            raise ConfigError(
                f"{hard} files may be open (the hard limit of `ulimit -n`), and a server needs at least "
                f"{needed}, and better {wanted}: raise it (in a container --ulimit nofile=, under systemd "
                "LimitNOFILE=)"
            )
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # what cannot be raised, is what holds
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def max_connections(config: RuntimeConfig) -> int:
    """Most connections that a server may have: as many as it wants, or as there are descriptors for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _num_wanted(config)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(_NUM_LEAST, min(wanted, soft - _num_reserved(config)))


def _num_wanted(config: RuntimeConfig) -> int:
    """One connection for each request that can be open, and idle ones."""
    slots = StepSizes.of(config, "cuda").max_num_seqs  # on either device: on the CPU they are fewer
    return NUM_IDLE + slots + config.max_queue


def _num_reserved(config: RuntimeConfig) -> int:
    return NUM_RESERVED + _NUM_RESERVED_PER_RANK * config.tensor_parallel_size
