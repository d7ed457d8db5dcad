"""The embedding API: a model, served by processes that this one starts, watches and stops.

    async with Runtime("HuggingFaceTB/SmolLM2-135M-Instruct", tensor_parallel_size=2) as runtime:
        async for output in runtime.generate("The capital of France is", SamplingParams(max_tokens=20)):
            print(output.text, end="")

`tpworker.SyncRuntime` is the same without asyncio.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import random
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tpworker.config import RuntimeConfig, SamplingParams
from tpworker.errors import ConfigError, InvalidRequest, ModelError, QueueFull, RuntimeFailed, RuntimeStopped
from tpworker.ipc.arrays import unpack_int32
from tpworker.ipc.messages import Abort, SchedulerLoad, StepOutput, Submit
from tpworker.observe.affinity import near_cpus
from tpworker.observe.gpus import resolve_gpus
from tpworker.observe.start import StartTimes
from tpworker.observe.watch import GpuState, GpuWatch
from tpworker.outputs import Health, RequestOutput, RuntimeState, Stats, StepRecord
from tpworker.runtime.admission import Limits, fit, pack_prompt, resolve_sampling
from tpworker.runtime.faults import Fault
from tpworker.runtime.generation import Generation, StartFailed
from tpworker.runtime.loading import (
    FoundModel,
    Progress,
    find_model,
    has_tokenizer,
    in_daemon_thread,
    load_tokenizer,
)
from tpworker.runtime.requests import Request, Requests
from tpworker.runtime.settings import rank_settings, resolve_max_model_len, scheduler_settings
from tpworker.runtime.supervisor import Group
from tpworker.runtime.tokenisers import SHORT_CHARS, Tokenisers

if TYPE_CHECKING:
    from tpworker.model.families import ModelSpec
    from tpworker.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")

NUM_RECENT_STEPS = 4096
RANK_MODULE = "tpworker.rank"
PROMISE_SECONDS = 1.0
"""How long, while the runtime drains, requests that were being prepared may take from there to `generate`."""
STARTS_ONCE = "a runtime starts once, and not after it was stopped: make a new one"


class Runtime:
    """A model served by a scheduler process and TP ranks, for one event loop. Start it once, stop it once.

    It installs no signal handlers and changes nothing that is global to the process (but standard descriptors
    that are closed: they are opened on /dev/null, or memory of ours could become one). Several may live in
    one. Every process that it starts ends with it, whatever happens to either.

    Args:
        model: a folder, a hub name, or None for the default model.
        config: all options at once; `model` and `options` change single ones of it.
        progress: called on the event loop while starting, with what is going on and how much of that is
            done, from 0 to 1, or None where nobody can tell.
        needs_tokenizer: refuse a model that has none, before a process is started.
        rank_module, scheduler_module: what the processes run, for tests and benchmarks.
        options: fields of `RuntimeConfig`.

    Raises:
        ConfigError: an option is out of range.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        config: RuntimeConfig | None = None,
        progress: Progress | None = None,
        needs_tokenizer: bool = False,
        rank_module: str = RANK_MODULE,
        scheduler_module: str = "tpworker.scheduler",
        **options: Any,
    ) -> None:
        if model is not None:
            options["model"] = os.fspath(model)
        self.config = dataclasses.replace(config or RuntimeConfig(), **options)
        """As it was given; `max_model_len` and `max_num_seqs` are what came of it."""
        self.start_times: StartTimes | None = None
        """Where the time of the start went, once it is ready."""
        self._progress = progress or _no_progress
        self._needs_tokenizer = needs_tokenizer
        self._modules = {"rank_module": rank_module, "scheduler_module": scheduler_module}
        self._state: RuntimeState = "stopped"
        self._is_used = False  # started or stopped before
        self._fault: Fault | None = None
        self._found: FoundModel | None = None
        self._tokenizer: Tokenizer | None = None
        self._max_model_len = self._max_num_seqs = 0
        self._device = self._dtype = ""
        self._limits: Limits | None = None
        self._total_blocks = 0
        self._generation: Generation | None = None
        self._gpu_watch: GpuWatch | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # the one it was started on, and works on
        self._tokenisers = Tokenisers()
        self._seeds = random.Random(self.config.seed)
        self._requests = Requests()  # those that the scheduler may still say something about
        self._open: dict[str, Request] = {}  # those whose consumers still wait for something
        self._num_preparing = 0  # requests to come, see `prepare`
        self._promises: list[float] = []  # until when each of those may still come, though we drain
        self._closed: asyncio.Future[None] | None = None  # set when one of them is closed, for `drain`
        self._num_finished = 0
        self._num_aborted = 0
        self._num_steps = 0
        self._load = SchedulerLoad(0, 0, 0, 0)
        self._records: deque[StepRecord] = deque(maxlen=NUM_RECENT_STEPS)

    # ------------------------------------------------------------------------ start and stop

    async def start(self) -> None:
        """Starts the processes, and returns when requests may come.

        Raises:
            ConfigError: the configuration cannot work on this machine, or with this model.
            ModelError: the model cannot be found, read, or served.
            RuntimeFailed: a process did not get ready; names it, with its traceback.
            RuntimeStopped: it was started or stopped before.
        """
        if self._is_used:
            raise RuntimeStopped(STARTS_ONCE)
        self._is_used = True
        self._loop = asyncio.get_running_loop()
        self._state = "starting"
        try:
            await self._start()
            if self.health().state != "starting":
                raise RuntimeStopped("the runtime was stopped while it started")
        except BaseException as error:
            was_stopped = self.health().state != "starting"
            await self.stop()
            if not isinstance(error, StartFailed):
                raise
            if was_stopped:
                raise RuntimeStopped("the runtime was stopped while it started") from None
            failure = self._start_error(error.fault)
            raise failure from failure.__cause__
        self._state = "ready"

    async def _start(self) -> None:
        began_ns = time.monotonic_ns()
        gpus = resolve_gpus(self.config)
        loop = asyncio.get_running_loop()

        def progress(text: str, fraction: float | None) -> None:
            loop.call_soon_threadsafe(self._progress, text, fraction)

        is_ours = self._modules["rank_module"] == RANK_MODULE  # others read what they read
        self._found = found = await in_daemon_thread(
            lambda: find_model(self.config, progress, check_weights=is_ours)
        )
        if self._state != "starting":
            raise RuntimeStopped("the runtime was stopped while it started")
        if self._needs_tokenizer and not has_tokenizer(found.folder):
            raise ModelError(
                f"there is no tokenizer in {found.folder}, and text needs one: fetch tokenizer.json"
            )
        self._max_model_len = resolve_max_model_len(self.config, found.spec)
        rank = rank_settings(self.config, found.spec, "cuda" if gpus else "cpu", self._max_model_len)
        self._device, self._dtype = rank.device, rank.dtype
        self._max_num_seqs = rank.max_num_seqs
        group = Group(
            generation=0,
            num_ranks=self.config.tensor_parallel_size,
            model=str(found.folder),
            scheduler=scheduler_settings(self.config, rank.device, self._max_model_len),
            rank=rank,
            rank_cpus=near_cpus(gpus),
            **self._modules,
        )
        if gpus:
            self._gpu_watch = GpuWatch(gpus)
        spawned_ns = time.monotonic_ns()
        self._generation = Generation(group, self._on_output, self._on_fault, self._requests.any_submitted)
        ready = asyncio.ensure_future(self._generation.ready(self.config.start_timeout, self._progress))
        tokenizer = in_daemon_thread(lambda: load_tokenizer(found.folder))
        try:
            both: list[asyncio.Future[Any]] = [ready, tokenizer]
            await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
            # Of two errors the tokenizer's is the plainer one.
            self._tokenizer = await tokenizer if tokenizer.done() else None
            if self._tokenizer is not None:
                self._found = found.with_tokenizer(self._tokenizer)
            num_kv_blocks = await ready
        finally:
            ready.cancel()
            tokenizer.cancel()
        self._total_blocks = num_kv_blocks - 1  # the null block is nobody's
        self._limits = Limits(
            self._max_model_len, found.spec.max_model_len, self._total_blocks * self.config.block_size
        )
        self._load = dataclasses.replace(self._load, free_blocks=self._total_blocks)
        if self._state == "starting":  # not stopped meanwhile, which takes the board away
            ranks = self._generation.ranks
            self.start_times = StartTimes.of(ranks, began_ns, spawned_ns, time.monotonic_ns())
            logger.info("%s", self.start_times)

    def _start_error(self, fault: Fault) -> Exception:
        """What a process said of the model or the configuration is for the user; the rest is a failure."""
        failure = _failure(fault)
        for kind in (ModelError, ConfigError):
            if fault.report is not None and fault.report.error == kind.__name__:
                error = kind(fault.report.summary)
                error.__cause__ = failure
                return error
        return failure

    async def stop(self) -> None:
        """Ends open requests with `RuntimeStopped`, stops all processes and waits until they are gone.

        May be called at any time, also more than once. When it is cancelled, the processes are killed.

        Raises:
            RuntimeStopped: it was started on another event loop, which must stop it; or had to, and has been
                closed: then the processes have been killed.
        """
        if self._generation is None or self._generation.is_over:
            self._loop = None  # nothing is left that belongs to it
        stray = self._astray()
        if stray is not None and self._loop is not None and not self._loop.is_closed():
            raise stray
        self._is_used = True
        if self._state != "failed":
            self._state = "stopped"
        self._tokenisers.abandon(_stopped)
        if stray is None:
            self._requests.fail_all(_stopped)
        if self._tokenizer is not None:
            self._tokenizer.close()  # a chat template may be running, which threads wait for
        try:
            if self._generation is not None:
                await self._generation.stop()
        finally:
            if self._gpu_watch is not None:
                self._gpu_watch.close()  # last: it waits for an answer of the driver, which may be sick
        self._loop = None
        if stray is not None:
            raise stray

    async def __aenter__(self) -> Runtime:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def drain(self, timeout: float | None = None) -> None:
        """Refuses new requests from now on, and waits until the open ones have ended, those included whose
        prompts are being prepared.

        Args:
            timeout: in seconds; None waits for ever.

        Raises:
            TimeoutError: some are still open after `timeout` seconds.
            RuntimeFailed: the runtime failed meanwhile.
            RuntimeStopped: it was started on another event loop.
        """
        self._check_loop()
        if self._state == "ready":
            self._state = "draining"
        try:
            async with asyncio.timeout(timeout):
                while (is_open := self._open or self._num_preparing) or self._promised():
                    if self._closed is None or self._closed.done():
                        self._closed = asyncio.get_running_loop().create_future()
                    await asyncio.wait([self._closed], timeout=None if is_open else PROMISE_SECONDS)
        except TimeoutError:
            num_open = len(self._open) + self._num_preparing
            raise TimeoutError(f"{num_open} requests are still open after {timeout:g} s") from None
        if self._fault is not None:
            raise _failure(self._fault)

    # ------------------------------------------------------------------------------ requests

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        default_max_tokens: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generates from a prompt; outputs come as tokens do, the last one with a `finish_reason`.

        It is an asynchronous generator: nothing happens before it is iterated, and closing it (`aclose`,
        or cancelling the task that waits for it) aborts the request. A generator that is merely left, as
        by `break`, is closed when it is collected; `contextlib.aclosing` closes it at once.

        Args:
            prompt: a text, to which the tokenizer adds what the model expects at its beginning; or token ids.
            sampling: what None leaves open is as the model's generation_config.json says.
            request_id: for `abort`; must not be that of another open request.
            default_max_tokens: where `sampling.max_tokens` is None: not as many as fit, but at most so
                many, or `min_tokens` if that is more.

        Raises:
            InvalidRequest: a parameter is out of range, or not supported.
            PromptTooLong: the prompt, or the prompt and max_tokens together, do not fit.
            QueueFull: as many requests wait as `max_queue` allows.
            RuntimeStopped: the runtime is not started, drains, was stopped, or started on another event loop.
            RuntimeFailed: a process has died, hung, diverged or raised; names it, with its traceback.
        """
        request = self._reserve(request_id)
        try:
            await self._submit(request, prompt, sampling or SamplingParams(), default_max_tokens)
            while True:
                self._check_loop()
                await request.arrival()
                output = request.take()
                if output.finish_reason is not None:
                    break
                yield output
        finally:
            self._close(request)
        yield output

    async def prepare(self, work: Callable[[], T], num_requests: int = 1, num_chars: int = 0) -> T:
        """Runs what makes the prompts of requests to come, in a thread. Meanwhile they count as waiting.

        For what must be done before `generate`, such as a chat template: without room nothing is done.

        Args:
            work: called in one of the threads that tokenise; its result is returned.
            num_requests: how many requests that will be.
            num_chars: of the texts that this is about: long ones must not have short ones wait.

        Raises:
            InvalidRequest: so many can never be open at once.
            QueueFull, RuntimeStopped, RuntimeFailed: as `generate` does.
        """
        self._check_room(num_requests)
        self._num_preparing += num_requests
        try:
            return await self._tokenisers.run(work, num_chars)
        finally:
            self._num_preparing -= num_requests
            if self._state == "draining":  # they were taken before that
                until = asyncio.get_running_loop().time() + PROMISE_SECONDS
                self._promises += [until] * num_requests
            self._wake_drain()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt, for `prepare`: what is too long for certain is not tokenised.

        Raises:
            PromptTooLong: its characters alone prove that it does not fit.
            InvalidRequest: as `Tokenizer.encode`.
        """
        self._check_length(text)
        return self.tokenizer.encode(text, add_special_tokens)

    def _check_length(self, text: str) -> None:
        assert self._limits is not None, "ready, but without limits"
        if len(text) > SHORT_CHARS:
            self._limits.check_length(self.tokenizer.at_least(text, self._limits.shortest), len(text))

    def abort(self, request_id: str) -> None:
        """Ends a request, whose last output then has the finish reason 'abort'. Unknown ids are ignored.

        Raises:
            RuntimeStopped: the runtime was started on another event loop.
        """
        self._check_loop()
        request = self._open.get(request_id)
        if request is not None:
            self._withdraw(request)
            request.end("abort")

    def _check_loop(self) -> None:
        """Raises RuntimeStopped where every wait would be for ever: on another event loop than its own."""
        stray = self._astray()
        if stray is not None:
            raise stray

    def _astray(self) -> RuntimeStopped | None:
        """What to say to who is not on the event loop of `start`; None: they are, or there is none yet."""
        if self._loop is None or self._loop is asyncio._get_running_loop():
            return None
        if self._loop.is_closed():
            return RuntimeStopped(
                "the event loop that this runtime was started on has been closed, as asyncio.run does in the "
                "end, and the runtime is of no use without it: start and use one within one asyncio.run, or "
                "take SyncRuntime"
            )
        return RuntimeStopped(
            "this runtime was started on another event loop: use it there (run_coroutine_threadsafe), or "
            "start one for each loop, or take SyncRuntime, which any thread may call"
        )

    def _reserve(self, request_id: str | None) -> Request:
        """A place in the queue, before anything is done that takes time."""
        self._check_room(1, is_promised=self._take_promise())
        if request_id in self._open:
            raise InvalidRequest(f"request_id {request_id!r} is that of another open request", "request_id")
        request = self._requests.open(request_id or f"request-{secrets.token_hex(8)}")
        self._open[request.request_id] = request
        return request

    def _promised(self) -> int:
        """How many requests may still come, while we drain, since they were prepared just now."""
        now = asyncio.get_running_loop().time()
        self._promises = [until for until in self._promises if until > now]
        return len(self._promises)

    def _take_promise(self) -> bool:
        if not self._promised():
            return False
        self._promises.pop()
        return True

    def _wake_drain(self) -> None:
        if self._closed is not None and not self._closed.done():
            self._closed.set_result(None)

    def _check_room(self, num_requests: int, is_promised: bool = False) -> None:
        """Whether so many more requests can be taken now."""
        if self._fault is not None:
            raise _failure(self._fault)
        if self._state != "ready" and not (self._state == "draining" and is_promised):
            raise RuntimeStopped(f"the runtime takes no requests: it is {self._state}")
        self._check_loop()
        slots, places = self._max_num_seqs, self.config.max_queue
        if num_requests > slots + places:
            raise InvalidRequest(
                f"{num_requests} prompts are more than the {slots + places} that can be open at once "
                f"(max_num_seqs={slots} and max_queue={places}): ask for fewer at a time, or raise "
                "--max-queue",
                "prompt",
            )
        waiting = self._requests.num_waiting + self._num_preparing
        if waiting + num_requests - (slots - self._requests.num_running) > places:
            more = f", and this is {num_requests} more" if num_requests > 1 else ""
            raise QueueFull(
                f"{waiting} requests wait already{more}; max_queue is {places}. "
                "Try again later, or raise --max-queue"
            )

    async def _submit(
        self,
        request: Request,
        prompt: str | Sequence[int],
        params: SamplingParams,
        default_max_tokens: int | None,
    ) -> None:
        """Checks what is asked for, and tells the scheduler."""
        spec = self.spec
        if isinstance(prompt, str):
            if len(prompt) > SHORT_CHARS:  # among the short ones, so as not to wait only to be refused
                await self._tokenisers.run(partial(self._check_length, prompt), 0)
            prompt = await self._tokenisers.run(partial(self.tokenizer.encode, prompt), len(prompt))
        elif isinstance(prompt, (bytes, bytearray)):
            raise InvalidRequest(f"the prompt is {type(prompt).__name__}: give text or token ids", "prompt")
        tokens = pack_prompt(prompt, spec)
        request.num_prompt = len(tokens) // 4
        assert self._limits is not None, "ready, but without limits"
        max_tokens = fit(params, request.num_prompt, self._limits)
        if params.max_tokens is None and default_max_tokens is not None:
            max_tokens = min(max_tokens, max(default_max_tokens, params.min_tokens))
        sampling = resolve_sampling(params, spec, max_tokens, self._seeds.getrandbits(63))
        stop_ids = unpack_int32(sampling.stop_ids)
        request.own_stop_ids = frozenset(params.stop_token_ids).difference(spec.eos_ids)
        if params.detokenize:
            from tpworker.text.stream import TextStream

            request.text = TextStream(
                self.tokenizer,
                params.stop,
                hidden_ids=stop_ids,
                min_tokens=params.min_tokens,
                prompt=unpack_int32(tokens),
            )
        if request in self._requests and self._generation is not None:  # else it was aborted meanwhile
            request.is_submitted = True
            self._generation.send(Submit(self._generation.number, request.number, tokens, 0, sampling))

    def _withdraw(self, request: Request) -> None:
        """Nobody wants its tokens any more."""
        if self._requests.close(request) and request.is_submitted and self._generation is not None:
            self._generation.send(Abort(self._generation.number, request.number))

    def _close(self, request: Request) -> None:
        """Its consumer has all it will get."""
        if self._loop is not None and self._astray() is not None:
            with suppress(RuntimeError):  # that loop has been closed: there is nothing left to tell
                self._loop.call_soon_threadsafe(self._close, request)
            return
        del self._open[request.request_id]
        self._withdraw(request)
        if request.finish in ("stop", "length"):
            self._num_finished += 1
        elif request.is_submitted:
            self._num_aborted += 1
        self._wake_drain()

    # ------------------------------------------------------------------ from the generation

    def _on_output(self, output: StepOutput) -> None:
        self._requests.deliver(output)
        self._num_steps += 1
        self._load = output.load
        timing = output.timing
        self._records.append(
            StepRecord(
                output.step,
                output.num_prefill_tokens,
                output.num_decodes,
                timing.launched,
                timing.started,
                timing.ended,
            )
        )

    def _on_fault(self, fault: Fault) -> None:
        self._fault = fault
        self._state = "failed"
        logger.error("%s", _failure(fault))
        self._requests.fail_all(lambda: _failure(fault))
        self._tokenisers.abandon(lambda: _failure(fault))

    # ---------------------------------------------------------------------------- what it is

    def health(self) -> Health:
        """Whether it can serve. Costs nothing; for readiness and liveness probes."""
        return Health(self._state, str(_failure(self._fault)) if self._fault is not None else None)

    def stats(self) -> Stats:
        """How busy it is, and what it has done so far."""
        return Stats(
            open=len(self._open) + self._num_preparing,
            running=self._requests.num_running,
            waiting=self._requests.num_waiting + self._num_preparing,
            free_blocks=self._load.free_blocks,
            total_blocks=self._total_blocks,
            steps=self._num_steps,
            prompt_tokens=self._load.prompt_tokens,
            cached_tokens=self._load.cached_tokens,
            output_tokens=self._requests.num_output_tokens,
            preemptions=self._load.preemptions,
            finished=self._num_finished,
            aborted=self._num_aborted,
            recent_steps=tuple(self._records),
        )

    def gpus(self) -> tuple[GpuState, ...]:
        """How the ranks' GPUs do, at most a second old; none on the CPU, and before the start."""
        return () if self._gpu_watch is None else self._gpu_watch.states()

    @property
    def device(self) -> str:
        """What the ranks run on: 'cpu' or 'cuda'; '' before the start."""
        return self._device

    @property
    def dtype(self) -> str:
        """Of weights, activations and KV cache, e.g. 'bfloat16'; '' before the start."""
        return self._dtype

    @property
    def has_tokenizer(self) -> bool:
        """Whether prompts may be text, and outputs have any."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer and chat template.

        Raises:
            InvalidRequest: the model's folder has none.
        """
        if self._tokenizer is None:
            raise InvalidRequest(
                f"there is no tokenizer in {self.model_folder}: give token ids, and detokenize=False",
                "prompt",
            )
        return self._tokenizer

    @property
    def spec(self) -> ModelSpec:
        """What config.json says of the model."""
        return self._model.spec

    @property
    def model_folder(self) -> Path:
        """Where the model lies on this machine."""
        return self._model.folder

    @property
    def served_name(self) -> str:
        """What to call the model towards clients: its hub name, or the last part of its folder."""
        name, folder = self._model.name, self._model.folder
        is_hub_name = Path(name).expanduser().absolute() != folder and self.config.model is not None
        return name if is_hub_name else os.path.basename(os.path.normpath(folder))

    @property
    def max_model_len(self) -> int:
        """Most tokens of one request, prompt and output together."""
        self._model  # noqa: B018  # raises before the start
        return self._max_model_len

    @property
    def max_num_seqs(self) -> int:
        """Most requests that run at once."""
        self._model  # noqa: B018  # raises before the start
        return self._max_num_seqs

    @property
    def _model(self) -> FoundModel:
        if self._found is None:
            raise RuntimeStopped("the runtime has not been started: use `async with Runtime(...) as runtime`")
        return self._found


def _failure(fault: Fault) -> RuntimeFailed:
    return RuntimeFailed(fault.summary, fault.process, fault.traceback)


def _stopped() -> RuntimeStopped:
    return RuntimeStopped("the runtime was stopped")


def _no_progress(text: str, fraction: float | None) -> None:
    pass
