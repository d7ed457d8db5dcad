"""What a deployment of replicas is told, and what it comes to. No engine is imported for it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError, shown
from tpworker.server.options import FrontOptions

_OF_ONE_PROCESS = {"trace", "has_trace_context", "enable_sleep_mode", "enable_weight_updates", "join_address"}
"""What the front of a runtime in its own process can do, and one before replicas cannot; and where ranks are
to come to, which can be of one replica alone."""
POLICY = "tpworker.integrations.autoscaling:by_open_choices"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Those of the deployment. Beside them stand those of `RuntimeConfig` and `FrontOptions`."""

    num_replicas: int = 1
    """Groups of TP ranks, each with GPUs or cores of its own."""
    autoscaling: Mapping[str, Any] | None = None
    """In place of `num_replicas`: what Serve calls `autoscaling_config`, as `{"min_replicas": 1,
    "max_replicas": 4}`. Unless it says otherwise, a replica is to have as many open choices as slots."""
    num_cpus: float | None = None
    """Of each replica. None: one for each rank on the CPU; on GPUs 1, as ranks hardly compute there."""
    resources_of_node: Mapping[str, float] = field(default_factory=dict)
    """Ray resources of a name of your own that a replica needs, too."""
    max_items_per_second: float = 400.0
    """That a replica sends to fronts. Ray takes up to a millisecond of a core for each, at either end: with
    more tokens a second than that, several come together, later by at most the streams over this number."""
    num_fronts: int = 1
    """HTTP fronts. Each is one process, which tokenises and writes what all its requests get."""
    num_cpus_per_front: float = 1
    max_open_requests: int = 16384
    """At each front, those that wait for a replica included; one more gets status 429."""
    shutdown_timeout: float = 20.0
    """Seconds that a replica which is to go has for its requests; then they go on in another."""
    group_options: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else `serve.deployment` takes, for the replicas: a request router, say."""

    def __post_init__(self) -> None:
        for name, lowest in (("num_replicas", 1), ("num_fronts", 1), ("max_open_requests", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < lowest:
                raise ConfigError(f"{name}={shown(value)}: must be an integer from {lowest} on")
        for name in ("num_cpus", "num_cpus_per_front", "shutdown_timeout"):
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not 0 <= value < math.inf):
                raise ConfigError(f"{name}={shown(value)}: must be a number from 0 on")
        rate = self.max_items_per_second
        if type(rate) not in (int, float) or not 1 <= rate <= 1e6:
            raise ConfigError(f"max_items_per_second={shown(rate)}: must be from 1 to 1000000")
        if self.autoscaling is not None and self.num_replicas != 1:
            raise ConfigError(
                f"num_replicas={self.num_replicas} has no effect with autoscaling: give min_replicas and "
                "max_replicas there"
            )

    @classmethod
    def parted(cls, args: Mapping[str, Any]) -> tuple[RuntimeConfig, FrontOptions, Options]:
        """Options of all three, by their names.

        Raises:
            ConfigError: one is unknown, or out of range.
        """
        kinds = (RuntimeConfig, FrontOptions, cls)
        names = [{option.name for option in fields(kind)} - _OF_ONE_PROCESS for kind in kinds]
        known = sorted(set().union(*names))
        if unknown := sorted(set(args) - set(known)):
            close = difflib.get_close_matches(unknown[0], known, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"there is no option {unknown[0]}: {hint}")
        given = [{name: args[name] for name in args if name in of_kind} for of_kind in names]
        for name, value in given[1].items():  # a file has lists, and who gives one name, no list
            if name in ("served_model_names", "allowed_origins"):
                given[1][name] = (value,) if isinstance(value, str) else tuple(value)
        return RuntimeConfig(**given[0]), FrontOptions(**given[1]), cls(**given[2])

    def on_device(self, config: RuntimeConfig, num_gpus: float) -> RuntimeConfig:
        """What each replica is told: never `auto`, since it must not look for GPUs that are not its own.

        Args:
            num_gpus: of the cluster.
        """
        if config.device != "auto":
            return config
        return replace(config, device="cuda" if num_gpus >= config.tensor_parallel_size else "cpu")

    def resources(self, config: RuntimeConfig) -> dict[str, Any]:
        """What Ray is to give each replica, all of one node.

        Args:
            config: from `on_device`.
        """
        on_gpus = config.device == "cuda"
        usual = 1 if on_gpus else config.tensor_parallel_size
        asked: dict[str, Any] = {"num_cpus": usual if self.num_cpus is None else self.num_cpus}
        if on_gpus:
            asked["num_gpus"] = config.tensor_parallel_size
        if self.resources_of_node:
            asked["resources"] = dict(self.resources_of_node)
        return asked

    def autoscaling_config(self, slots: int) -> dict[str, Any]:
        """What Serve is told.

        Args:
            slots: requests that run at once in a replica.
        """
        return {
            "target_ongoing_requests": slots,
            "policy": {"policy_function": POLICY},
            **(self.autoscaling or {}),
        }
