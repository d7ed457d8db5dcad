"""tpworker on Ray Serve: each replica is a group of TP ranks, and a front before them speaks OpenAI's API.

    from ray import serve
    from tpworker.integrations.ray import build_app
    serve.run(build_app(model="…", tensor_parallel_size=2, num_replicas=2))

    Serve's proxy ─► Front (HTTP, text; keeps what was delivered) ─ handles ─► TpGroup, a Runtime each
                                                                      ✗ lost: on to another one

For `serve deploy` the import path is `tpworker.integrations.ray:app`, and the same options are its `args`.
docs/ray.md has it all, as it was run.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from tpworker.config import RuntimeConfig
from tpworker.errors import QueueFull, RuntimeStopped
from tpworker.integrations.autoscaling import OPEN
from tpworker.integrations.fleet import Fleet
from tpworker.integrations.options import Options
from tpworker.integrations.relay import Ask, Outputs, ReplicaLost
from tpworker.integrations.replica import Replica, Told, outputs_of
from tpworker.runtime.settings import StepSizes
from tpworker.server.app import create_app
from tpworker.server.options import FrontOptions

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from tpworker.integrations.replica import Item
    from tpworker.runtime.runtime import Runtime

logger = logging.getLogger(__name__)

TELL_SECONDS = 10.0
"""For which a front waits for all replicas to say how they do."""
HEALTH_TIMEOUT_S = 10.0
"""After three of which without an answer Serve gives a replica up."""
HEALTH_PERIOD_S = 2.0
_ANY_NUMBER = 1_000_000  # of requests, where something else bounds them
_LOST = (RayActorError, TaskCancelledError, RequestCancelledError, DeploymentUnavailableError)


def build_app(**options: Any) -> Any:
    """A Ray Serve application that serves a model.

    Args:
        options: those of `Options`; of `RuntimeConfig`, for each replica; and of `FrontOptions`.

    Raises:
        ConfigError: an option is unknown, or out of range.
    """
    return app(options)


def app(args: dict[str, Any]) -> Any:
    """As `build_app`, for `import_path` in a config file of Serve's."""
    config, front, options = Options.parted(args)
    config = options.on_device(config, _num_gpus())
    logger.info("each replica has %s", options.resources(config))
    groups = serve.deployment(TpGroup, name="TpGroup", **_group_options(config, options))
    fronts = serve.deployment(
        serve.ingress()(Front),
        name="Front",
        num_replicas=options.num_fronts,
        max_ongoing_requests=_ANY_NUMBER,  # it refuses by itself, in words of OpenAI's API
        ray_actor_options={"num_cpus": options.num_cpus_per_front},
        graceful_shutdown_timeout_s=options.shutdown_timeout,
        health_check_period_s=HEALTH_PERIOD_S,
    )
    return fronts.bind(
        groups.bind(config, options.max_items_per_second), config, front, options.max_open_requests
    )


def _num_gpus() -> float:
    """Of the whole cluster, in use or not."""
    return float(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0.0


def _group_options(config: RuntimeConfig, options: Options) -> dict[str, Any]:
    """What Serve is told of the replicas."""
    slots = StepSizes.of(config, config.device).max_num_seqs
    scale: Mapping[str, Any] = {"num_replicas": options.num_replicas}
    if options.autoscaling is not None:
        scale = {"autoscaling_config": options.autoscaling_config(slots)}
    return {
        **scale,
        "ray_actor_options": options.resources(config),
        # A few more than run at once, so that none idles; the others wait at the front, for whoever is free,
        # a replica that comes meanwhile included.
        "max_ongoing_requests": slots + max(4, slots // 4),
        "max_queued_requests": config.max_queue,
        "graceful_shutdown_timeout_s": options.shutdown_timeout,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "logging_config": {"enable_access_log": False},  # the front has one; fronts ask every few seconds
        **options.group_options,
    }


class TpGroup:
    """A replica: a runtime in Serve's actor, with the GPUs or cores that Ray gave it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: RuntimeConfig, items_per_second: float
    ) -> None:
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = Replica(config, name, items_per_second)
        try:
            await self._replica.start()
        except BaseException:
            await self._replica.stop()
            raise

    async def items(self, ask: Ask) -> AsyncGenerator[Item, None]:
        """See `Replica.items`."""
        async with aclosing(self._replica.items(ask)) as items:
            async for item in items:
                yield item

    async def tell(self, front: str) -> Told:
        """See `Replica.tell`."""
        return self._replica.tell(front)

    async def reset_prefix_cache(self) -> None:
        """See `Replica.reset_prefix_cache`."""
        await self._replica.reset_prefix_cache()

    async def check_health(self) -> None:
        """For Serve, which replaces a replica that raises."""
        self._replica.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve's autoscaler."""
        return {OPEN: float(self._replica.tell().stats.open)}

    async def __del__(self) -> None:
        """Serve calls it, once no request is open or `shutdown_timeout` is over."""
        if hasattr(self, "_replica"):
            await self._replica.stop()


class Front:
    """The HTTP front, for all replicas: tpworker's own routes."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, group: DeploymentHandle, config: RuntimeConfig, options: FrontOptions, max_open: int
    ) -> None:
        self._group = group
        self._items = group.options(method_name="items", stream=True)
        self._options = options
        self._fleet = Fleet(config, self._open, self._call_all, max_open)
        await self._fleet.start(await group.tell.remote(self._fleet.name))
        self._hearing = asyncio.create_task(self._fleet.keep_hearing(self._tell_all))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """For Serve."""
        return _without_id(create_app(cast("Runtime", self._fleet), self._options))

    async def _open(self, ask: Ask) -> Outputs:
        """Has a replica answer, which Serve chooses."""
        response = self._items.remote(ask)
        is_over = False
        try:
            async with aclosing(outputs_of(response)) as outputs:
                async for output in outputs:
                    yield output
            is_over = True
        except BackPressureError as error:
            raise QueueFull(
                "as many requests wait for a replica as max_queue allows: try again later, or raise it"
            ) from error
        except _LOST as error:
            is_over = True
            raise ReplicaLost(str(error).strip().partition("\n")[0]) from error
        finally:
            if not is_over:  # whoever asked has left: nobody needs the rest
                response.cancel()

    async def _call_all(self, method: str) -> None:
        """Has all replicas that there are call a method of theirs. One that comes later has nothing to do."""
        try:
            await self._group.broadcast(method).results_async()
        except DeploymentUnavailableError as error:
            raise RuntimeStopped("there is no replica: try again later") from error

    async def _tell_all(self, front: str) -> list[Told] | None:
        """How all replicas do; None: one is too busy to answer. That it is gone is for Serve to say."""
        try:
            answers = await self._group.broadcast("tell", front).results_async(
                timeout_s=TELL_SECONDS, return_exceptions=True
            )
        except DeploymentUnavailableError:
            return []  # there is none
        except (RayError, TimeoutError):
            return None
        return [one for one in answers if isinstance(one, Told)]

    async def __del__(self) -> None:
        """Serve calls it, once no request is open."""
        if hasattr(self, "_hearing"):
            self._hearing.cancel()
            self._fleet.close()


def _without_id(app: ASGIApp) -> ASGIApp:
    """An app that leaves X-Request-Id to Serve's proxy, or answers would have it twice: it is the proxy that
    gives a request its id, if its client does not."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def pass_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [header for header in message["headers"] if header[0].lower() != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, pass_on)

    return answer
