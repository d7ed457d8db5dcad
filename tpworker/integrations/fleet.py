"""Replicas as one runtime, for the HTTP front: it tokenises here, and they generate.

create_app(fleet) ──► Fleet.generate ──► Relay ──► open(ask) ──► a replica, chosen by the engine
                      Fleet.stats, health ◄── told, every few seconds ── each of them
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from tpworker.config import RuntimeConfig
from tpworker.errors import ConfigError, QueueFull, RuntimeStopped
from tpworker.integrations.records import Recorder
from tpworker.integrations.relay import Ask, Open, Outputs, Relay
from tpworker.integrations.replica import Told
from tpworker.integrations.sums import Sums
from tpworker.observe.looking import without_processes
from tpworker.observe.snapshot import Snapshot
from tpworker.observe.watch import GpuState
from tpworker.outputs import Health, Listener, RuntimeEvent, RuntimeState, Stats
from tpworker.runtime.admission import Limits
from tpworker.runtime.bell import Turns
from tpworker.runtime.collector import Collector, GeneratorCollector
from tpworker.runtime.facts import Facts
from tpworker.runtime.listeners import Listeners
from tpworker.runtime.loading import in_daemon_thread, load_tokenizer_of
from tpworker.runtime.start import Served, find, set_up
from tpworker.runtime.statistics import whole_of
from tpworker.runtime.tokenisers import SHORT_CHARS, Tokenisers
from tpworker.sampling_params import SamplingParams, checked

T = TypeVar("T")
logger = logging.getLogger(__name__)

HEAR_SECONDS = 2.0
"""How often a front asks all replicas how they do."""


class Fleet(Facts):
    """The public interface of `Runtime`, as far as the front uses it; the processes are the replicas'.

    Args:
        config: of each replica.
        open: has some replica answer a request.
        call_all: has all replicas do what the method of `Replica` with this name does, and waits for it.
        max_open: requests, each choice counted, that may be open here or wait for a replica.
    """

    def __init__(
        self, config: RuntimeConfig, open: Open, call_all: Callable[[str], Awaitable[None]], max_open: int
    ) -> None:
        super().__init__(config)
        self.name = secrets.token_hex(8)
        """Towards replicas, which drop what it has asked if they do not hear of it any more."""
        self._open = open
        self._call_all = call_all
        self._max_open = max_open
        self._sums = Sums()
        self._tokenisers = Tokenisers()
        self._turns = Turns()
        self._listeners = Listeners()
        self._num_open = 0
        self._num_preparing = 0

    async def start(self, told: Told) -> None:
        """Reads the model's files, but for its weights.

        Args:
            told: by one of the replicas.

        Raises:
            ModelError: they cannot be found or read here.
            ConfigError: they are others than the replica has.
        """
        here = replace(self.config, load_format="dummy")  # no weights are needed
        found = await find(here, lambda text, fraction: None, rank_module="")
        if found.spec.vocab_size != told.vocab_size:
            raise ConfigError(
                f"the model in {found.folder} has {found.spec.vocab_size} token ids, and the replicas' has "
                f"{told.vocab_size}: see to it that the same files lie there on all nodes"
            )
        setup = set_up(self.config, found, (), needs_tokenizer=False, rank_module="", scheduler_module="")
        rank = replace(setup.group.rank, device=told.device, dtype=told.dtype, max_num_seqs=told.max_num_seqs)
        tokenizer = await in_daemon_thread(partial(load_tokenizer_of, found))
        model = found if tokenizer is None else found.with_tokenizer(tokenizer)
        limits = Limits(told.max_model_len, found.spec.max_model_len, told.kv_tokens)
        self._setup = replace(setup, group=replace(setup.group, rank=rank))
        self._served = Served(model, tokenizer, limits, told.max_num_seqs, told.stats.total_blocks)
        self.hear([told])

    def close(self) -> None:
        """Ends what belongs to it here."""
        self._tokenisers.abandon(lambda: RuntimeStopped("the front was stopped"))
        if self.has_tokenizer:
            self.tokenizer.close()

    def hear(self, told: Sequence[Told]) -> None:
        """What the replicas that there are have told just now."""
        self._sums.hear(told)

    async def keep_hearing(self, tell_all: Callable[[str], Awaitable[Sequence[Told] | None]]) -> None:
        """Asks all replicas how they do, for ever: they take a front that does not for gone.

        Args:
            tell_all: what `Replica.tell` says to a front of this name, of all that there are; None: not known
                this time. Whatever it raises is logged when it begins, and costs this time only.
        """
        fails = False
        while True:
            await asyncio.sleep(HEAR_SECONDS)
            try:
                told = await tell_all(self.name)
                if told is not None:
                    self.hear(told)
            except Exception:
                if not fails:
                    logger.exception("replicas could not be asked how they do; they are asked again")
                fails = True
            else:
                if fails:
                    logger.info("replicas can be asked how they do again")
                fails = False

    # ------------------------------------------------------------------------------ requests

    async def prepare(
        self, work: Callable[[], T], num_requests: int = 1, num_chars: int = 0, blame: str = "prompt"
    ) -> T:
        """See `Runtime.prepare`."""
        self._check_taking(num_requests)
        self._num_preparing += num_requests
        try:
            return await self._tokenisers.run(work, num_chars)
        finally:
            self._num_preparing -= num_requests

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        default_max_tokens: int | None = None,
    ) -> Outputs:
        """See `Runtime.generate`. It goes on in another replica when one is lost."""
        sampling = checked(sampling)
        self._check_taking(sampling.n)
        request_id = request_id or f"request-{secrets.token_hex(8)}"
        if sampling.seed is None:  # wherever it goes on, it is this one
            sampling = replace(sampling, seed=secrets.randbits(63))
        self._num_open += sampling.n
        recorder = Recorder(self._listeners, request_id, sampling)
        relay = Relay(self._open)
        error: BaseException | None = None
        try:
            ids = await self._tokenise(prompt) if isinstance(prompt, str) else prompt
            recorder.submit()
            ask = Ask(tuple(ids), sampling, default_max_tokens, front=self.name)
            async with aclosing(relay.outputs(ask)) as outputs:
                async for output in outputs:
                    output = output._replace(request_id=request_id)
                    recorder.add(output, relay.num_moves)
                    yield output
        except BaseException as why:
            error = why
            raise
        finally:
            self._num_open -= sampling.n
            self._sums.num_moves += relay.num_moves
            recorder.close(relay.num_moves, error)

    async def collect(self, prompt: str | Sequence[int], *arguments: Any, **options: Any) -> Collector:
        """See `Runtime.collect`."""
        return GeneratorCollector(self.generate(prompt, *arguments, **options), self._turns)

    async def reset_prefix_cache(self) -> None:
        """See `Runtime.reset_prefix_cache`: of all replicas."""
        await self._call_all("reset_prefix_cache")

    async def _tokenise(self, text: str) -> list[int]:
        served = self._ready
        if len(text) > SHORT_CHARS:  # among the short ones, so as not to wait only to be refused
            await self._tokenisers.run(partial(served.check_length, text), 0)
        return await self._tokenisers.run(partial(served.needed_tokenizer().encode, text), len(text))

    def _check_taking(self, num_requests: int) -> None:
        """Raises RuntimeStopped: not yet. QueueFull: too many are open."""
        self._ready  # noqa: B018  # raises
        num_open = self._num_open + self._num_preparing
        if num_open + num_requests > self._max_open:
            raise QueueFull(
                f"{num_open} requests are open here, and {num_requests} more are too many: max_open_requests "
                f"is {self._max_open}. Try again later, or raise it"
            )

    # ---------------------------------------------------------------------------- what it is

    def health(self) -> Health:
        """'ready' while any replica is; without one it is 'recovering': requests wait for the next."""
        if self._served is None:
            return Health("starting")
        states: dict[RuntimeState, Health] = {told.health.state: told.health for told in self._sums.now}
        return states.get("ready") or states.get("recovering") or Health("recovering", "there is no replica")

    def stats(self) -> Stats:
        """Of all replicas together. Counters are of all that there have been; `open` are those of this front,
        whose requests may wait for a replica."""
        return self._sums.stats(self._num_open + self._num_preparing)

    @property
    def events(self) -> tuple[RuntimeEvent, ...]:
        """None: each replica has its own, in its log."""
        return ()

    def gpus(self) -> tuple[GpuState, ...]:
        """None: they are the replicas'."""
        return ()

    def snapshot(self) -> Snapshot:
        """What all replicas have done together; of processes, there are none here."""
        return without_processes(self._about, whole_of(self.stats(), self.health().state))

    @property
    def is_tracing(self) -> bool:
        """Never: what a timeline shows is in the replicas."""
        return False

    def start_trace(self, path: str | os.PathLike[str]) -> None:
        """Raises ConfigError."""
        raise ConfigError("there is no timeline of a fleet of replicas: trace a runtime of its own")

    async def stop_trace(self) -> None:
        """There is none."""

    def trace_span(self, *span: object) -> None:
        """See `is_tracing`: nobody calls it."""
        raise AssertionError("a span, and no trace")

    def add_listener(self, listener: Listener) -> None:
        """Tells somebody of tokens and requests from now on; steps and events are the replicas'."""
        self._listeners.add(listener)

    def remove_listener(self, listener: Listener) -> None:
        """See `Runtime.remove_listener`."""
        self._listeners.remove(listener)
