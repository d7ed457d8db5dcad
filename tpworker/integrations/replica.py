"""A replica: a runtime, a group of TP ranks, for those who ask it from another process.

Every answer can be pickled, refusals too: an exception with fields of its own would lose them on the way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import NamedTuple

from tpworker.config import RuntimeConfig
from tpworker.errors import (
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    RequestError,
    RequestFailed,
    RuntimeFailed,
    RuntimeStopped,
)
from tpworker.integrations.relay import Ask, Outputs, ReplicaLost
from tpworker.outputs import Health, RequestOutput, Stats
from tpworker.runtime.runtime import Runtime

_WITH_PARAMETER = {kind.__name__: kind for kind in (InvalidRequest, PromptTooLong)}
_REFUSALS = {kind.__name__: kind for kind in (QueueFull, RequestFailed)}


FRONT_SECONDS = 60.0
"""After which a front that has not been heard of is gone, and so is whoever it has asked for. Engines do not
tell of that."""
LOST, ABSENT = "lost", "absent"


class Refusal(NamedTuple):
    """Why no more comes."""

    kind: str
    """The exception's class; or LOST, or ABSENT: the replica has failed or stops, and did so before."""
    message: str
    parameter: str | None = None


Item = RequestOutput | Refusal


@dataclass(frozen=True, slots=True)
class Told:
    """What a replica is, and how it does."""

    name: str
    """Of the replica: another one for each process."""
    health: Health
    stats: Stats
    """Without its `recent_steps`."""
    device: str
    dtype: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    kv_tokens: int
    """That all KV blocks together hold."""


class Replica:
    """A runtime for others. One event loop's, on which it is started and stopped.

    Args:
        config: of the runtime.
        name: see `Told`.
        items_per_second: of all requests together, at most, but for those that begin: where sending one costs
            more than making its token, several tokens are to come with it.
    """

    def __init__(self, config: RuntimeConfig, name: str, items_per_second: float) -> None:
        self._runtime = Runtime(config=config)
        self._name = name
        self._items_per_second = items_per_second
        self._num_streams = 0
        self._heard: dict[str, float] = {}  # of fronts: when

    async def start(self) -> None:
        """See `Runtime.start`."""
        await self._runtime.start()

    async def stop(self) -> None:
        """See `Runtime.stop`."""
        await self._runtime.stop()

    async def items(self, ask: Ask) -> AsyncGenerator[Item, None]:
        """The outputs of a request. A refusal is the last item."""
        lost = LOST if self._runtime.health().state in ("ready", "recovering") else ABSENT
        outputs = self._runtime.generate(
            ask.prompt, ask.sampling, default_max_tokens=ask.default_max_tokens, delivered=ask.delivered
        )
        if ask.front:
            self._hear_of(ask.front)
        self._num_streams += 1
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    yield output
                    if self._is_gone(ask.front):
                        raise RuntimeStopped("the front that asked for it is gone")
                    if output.finish_reason is None:  # what comes meanwhile comes together
                        await asyncio.sleep(self._num_streams / self._items_per_second)
        except RequestError as error:
            yield Refusal(type(error).__name__, str(error), getattr(error, "parameter", None))
        except RuntimeFailed as error:
            yield Refusal(lost, error.summary)
        except RuntimeStopped as error:
            yield Refusal(lost, str(error))
        finally:
            self._num_streams -= 1

    async def reset_prefix_cache(self) -> None:
        """See `Runtime.reset_prefix_cache`."""
        await self._runtime.reset_prefix_cache()

    def _hear_of(self, front: str) -> None:
        """It is there."""
        now = time.monotonic()
        self._heard = {name: when for name, when in self._heard.items() if now - when <= FRONT_SECONDS}
        self._heard[front] = now

    def _is_gone(self, front: str) -> bool:
        if not front:
            return False  # nobody says that it is there: whoever asked closes the stream
        when = self._heard.get(front)
        return when is None or time.monotonic() - when > FRONT_SECONDS

    def tell(self, front: str = "") -> Told:
        """What it is, and how it does. A front that asks is there."""
        if front:
            self._hear_of(front)
        runtime = self._runtime
        stats = replace(runtime.stats(), recent_steps=())
        return Told(
            name=self._name,
            health=runtime.health(),
            stats=stats,
            device=runtime.device,
            dtype=runtime.dtype,
            vocab_size=runtime.vocab_size,
            max_model_len=runtime.max_model_len,
            max_num_seqs=runtime.max_num_seqs,
            kv_tokens=stats.total_blocks * runtime.config.block_size,
        )

    def check(self) -> None:
        """Raises RuntimeFailed or RuntimeStopped unless it serves; while it recovers, it does."""
        health = self._runtime.health()
        if health.state == "failed":
            raise RuntimeFailed(health.summary)
        if health.state == "stopped":
            raise RuntimeStopped("the runtime was stopped")


async def outputs_of(items: AsyncIterator[Item]) -> Outputs:
    """The outputs among items from a replica. Raises what a refusal says; ReplicaLost: it takes none."""
    async for item in items:
        if isinstance(item, RequestOutput):
            yield item
        elif (kind := _WITH_PARAMETER.get(item.kind)) is not None:
            raise kind(item.message, item.parameter)
        elif (refused := _REFUSALS.get(item.kind)) is not None:
            raise refused(item.message)
        else:
            raise ReplicaLost(item.message, was_taken=item.kind == LOST)
