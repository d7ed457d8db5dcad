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
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, NoReturn, TypeVar

from tpworker.config import RuntimeConfig
from tpworker.errors import RuntimeStopped
from tpworker.ipc.messages import Said, StepOutput
from tpworker.ipc.trace import Kind
from tpworker.observe.gpus import gpus_by_uuid, resolve_gpus
from tpworker.observe.start import StartTimes
from tpworker.observe.watch import GpuWatch
from tpworker.outputs import RequestOutput, RuntimeEvent
from tpworker.runtime.changeable import Changeable
from tpworker.runtime.collector import RequestCollector
from tpworker.runtime.faults import Fault
from tpworker.runtime.generation import Generation, StartFailed
from tpworker.runtime.loading import Progress
from tpworker.runtime.processes import Processes
from tpworker.runtime.recovery import Restarts
from tpworker.runtime.start import RANK_MODULE, SCHEDULER_MODULE, find, set_up, start_error, until_ready
from tpworker.sampling_params import SamplingParams, checked

logger = logging.getLogger(__name__)

T = TypeVar("T")

STARTS_ONCE = "a runtime starts once, and not after it was stopped: make a new one"
NO_COPIES = (
    "a runtime cannot be copied, or sent to another process (pickled): send its RuntimeConfig, make one there"
)


class Runtime(Changeable):
    """A model served by a scheduler process and TP ranks, for one event loop of one process. Start it once,
    stop it once.

    It installs no signal handlers and changes nothing that is global to the process (but standard descriptors
    that are closed: they are opened on /dev/null, or memory of ours could become one). Several may live in
    one. Every process that it starts ends with it, whatever happens to either.

    Args:
        model: a folder, a hub name, or None for the default model.
        config: all options at once; `model` and `options` change single ones of it.
        progress: called on the event loop while starting, with what is going on and how much of that is
            done, from 0 to 1, or None where nobody can tell.
        needs_tokenizer: refuse a model that has none, before a process is started.
        on_event: called on the event loop when processes are lost, and when requests go on.
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
        on_event: Callable[[RuntimeEvent], None] | None = None,
        rank_module: str = RANK_MODULE,
        scheduler_module: str = SCHEDULER_MODULE,
        **options: Any,
    ) -> None:
        if model is not None:
            options["model"] = os.fspath(model)
        super().__init__(dataclasses.replace(config or RuntimeConfig(), **options), on_event)
        self.start_times: StartTimes | None = None
        """Where the time of the start went, once it is ready."""
        self._progress = progress or _no_progress
        self._needs_tokenizer = needs_tokenizer
        self._rank_module, self._scheduler_module = rank_module, scheduler_module
        self._is_used = False  # started or stopped before

    def __reduce__(self) -> NoReturn:
        """It cannot be copied, nor sent to another process."""
        raise TypeError(NO_COPIES)

    # ------------------------------------------------------------------------ start and stop

    async def start(self) -> None:
        """Starts the processes, and returns when requests may come.

        Raises:
            ConfigError: the configuration cannot work on this machine, or with this model.
            ModelError: the model cannot be found, read, or served.
            RuntimeFailed: a process did not get ready; names it, with its traceback.
            RuntimeStopped: it was started or stopped before.
        """
        self._home.check_process()
        if self._is_used:
            raise RuntimeStopped(STARTS_ONCE)
        self._is_used = True
        self._home.enter()
        self._state = "starting"
        try:
            await self._start()
        except BaseException as error:
            was_stopped = self.health().state != "starting"
            await self.stop()
            if not isinstance(error, StartFailed):
                raise
            if was_stopped:
                raise _stopped_while_starting() from None
            failure = start_error(error.fault)
            raise failure from failure.__cause__
        self._state = "ready"
        self._telling.wake()

    async def _start(self) -> None:
        began_ns = time.monotonic_ns()
        gpus = resolve_gpus(self.config)
        model = await find(self.config, self._progress, self._rank_module)
        self._check_starting()
        self._setup = setup = set_up(
            self.config,
            model,
            gpus,
            needs_tokenizer=self._needs_tokenizer,
            rank_module=self._rank_module,
            scheduler_module=self._scheduler_module,
        )
        spawned_ns = time.monotonic_ns()
        restarts = Restarts(self.config.max_restarts, self.config.restart_window)
        requests = self._intake.requests
        self._trace = self._tracing.teller(setup.group.generation)
        group = dataclasses.replace(setup.group, trace_fd=self._tracing.fd)
        self._processes = processes = Processes(group, restarts, requests, self._events, self)
        self._telling.tell()
        if gpus and not self.config.join_address:
            self._gpu_watch = GpuWatch(gpus, on_fault=processes.blame_gpu)
        self._served = await until_ready(setup, processes, self._progress)
        if joined := gpus_by_uuid(processes.joined_gpus):
            self._gpu_watch = GpuWatch(joined, on_fault=processes.blame_gpu)
        self._check_starting()  # stopping takes the board away
        ranks = processes.generation.ranks
        self.start_times = StartTimes.of(ranks, began_ns, spawned_ns, time.monotonic_ns())
        logger.info("%s", self.start_times)
        self._sleeping = self._make_sleeping(processes, self._served.model)
        self._intake.serve(self._served)
        if processes.is_up:
            self._intake.dispatch.resume(processes.generation)

    def _check_starting(self) -> None:
        """Whether it has neither failed nor been stopped meanwhile."""
        self._check_not_failed()
        if self._state != "starting":
            raise _stopped_while_starting()

    async def stop(self) -> None:
        """Ends open requests with `RuntimeStopped`, stops all processes and waits until they are gone.

        May be called at any time, also more than once. When it is cancelled, the processes are killed.

        Raises:
            RuntimeStopped: it was started on another event loop, which must stop it; or had to, and has been
                closed: then the processes have been killed; or by the process that this one is a fork of.
        """
        self._home.check_process()
        if self._processes is None or self._processes.is_over:
            self._home.leave()
        stray = self._home.astray()
        if stray is not None and not self._home.is_closed:
            raise stray
        self._is_used = True
        if self._state != "failed":
            self._state = "stopped"
        self._intake.abandon_prompts(_stopped)
        if stray is None:
            self._intake.requests.fail_all(_stopped)
            self._intake.dispatch.abandon(_stopped)
        self._intake.close_processes()
        self._telling.close()
        try:
            if self._processes is not None:
                await self._processes.stop()
        finally:
            await self._close_trace()
            if self._sleeping is not None and stray is None:
                self._sleeping.close()
            if self._gpu_watch is not None:
                self._gpu_watch.close()  # last: it waits for an answer of the driver, which may be sick
        self._home.leave()
        if stray is not None:
            raise stray

    async def __aenter__(self) -> Runtime:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._home.lost() is None:  # in a fork that leaves the block there is nothing to stop
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
        self._home.check()
        if self._state == "ready":
            self._state = "draining"
            self._telling.wake()
        try:
            async with asyncio.timeout(timeout):
                await self._intake.all_closed()
        except TimeoutError:
            num_open = self._intake.num_open
            raise TimeoutError(f"{num_open} requests are still open after {timeout:g} s") from None
        self._check_not_failed()

    # ------------------------------------------------------------------------------ requests

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        default_max_tokens: int | None = None,
        delivered: Sequence[int] = (),
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generates from a prompt; outputs come as tokens do, the last one with a `finish_reason`.

        With `SamplingParams.n` there are several choices. Each output is of one of them (`index`), and each
        choice has a last output; it ends when all have ended.

        It is an asynchronous generator: nothing happens before it is iterated, and closing it (`aclose`,
        or cancelling the task that waits for it) aborts the request. A generator that is merely left, as
        by `break`, is closed when it is collected; `contextlib.aclosing` closes it at once.

        Args:
            prompt: a text, to which the tokenizer adds what the model expects at its beginning; or token ids.
            sampling: what None leaves open is as the model's generation_config.json says.
            request_id: for `abort`; must not be that of another open request.
            default_max_tokens: where `sampling.max_tokens` is None: not as many as fit, but at most so
                many, or `min_tokens` if that is more.
            delivered: token ids of the output that its client has already, from a runtime that was lost, say.
                Outputs go on behind them. With the same seed they are what that one's would have been.

        Raises:
            InvalidRequest: a parameter is out of range, or not supported.
            PromptTooLong: the prompt, or the prompt and max_tokens together, do not fit.
            QueueFull: as many requests wait as `max_queue` allows.
            RequestFailed: what an output, of any choice, is held to cannot be followed to its end.
            RuntimeStopped: the runtime is not started, drains, was stopped, or started on another event loop,
                or by the process that this one is a fork of.
            RuntimeFailed: processes died, hung, diverged or raised too often; names the last one.
            TypeError: `sampling` is something else.
        """
        options: dict[str, Any] = {"default_max_tokens": default_max_tokens, "delivered": delivered}
        collector = await self.collect(prompt, sampling, request_id=request_id, **options)
        try:
            while True:
                output = await collector.next()
                if collector.is_over:
                    break
                yield output
        finally:
            collector.close()
        yield output

    async def collect(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        default_max_tokens: int | None = None,
        delivered: Sequence[int] = (),
    ) -> RequestCollector:
        """The same for who would rather be called when something has come than wait for it in a task. Returns
        when it has been submitted; it is to be closed. Arguments and errors are those of `generate`."""
        sampling = checked(sampling)
        self._check_taking(sampling.n)
        choices = self._intake.reserve(request_id, sampling.n)
        self._telling.wake()
        collector = RequestCollector(self._home, self._intake, choices)
        try:
            await self._intake.submit(choices, prompt, sampling, default_max_tokens, delivered)
        except BaseException:
            collector.close()
            raise
        return collector

    async def prepare(
        self, work: Callable[[], T], num_requests: int = 1, num_chars: int = 0, blame: str = "prompt"
    ) -> T:
        """Runs what makes the prompts of requests to come, in a thread. Meanwhile they count as waiting.

        For what must be done before `generate`, such as a chat template: without room nothing is done.

        Args:
            work: called in one of the threads that tokenise; its result is returned.
            num_requests: how many requests that will be, each choice of each prompt counted.
            num_chars: of the texts that this is about: long ones must not have short ones wait.
            blame: the parameter that makes them so many.

        Raises:
            InvalidRequest: so many can never be open at once.
            QueueFull, RuntimeStopped, RuntimeFailed: as `generate` does.
        """
        self._check_taking()
        self._intake.check_room(num_requests, blame)
        self._telling.wake()
        try:
            return await self._intake.prepare(work, num_requests, num_chars)
        finally:
            if self._state == "draining":  # they were taken before that
                self._intake.promise(num_requests)

    def abort(self, request_id: str) -> None:
        """Ends a request, whose last output, or that of each choice that had not ended, then has the finish
        reason 'abort'. Unknown ids are ignored.

        Raises:
            RuntimeStopped: the runtime was started on another event loop.
        """
        self._home.check()
        self._intake.abort(request_id)

    # ------------------------------------------------------------------- from the processes

    def on_output(self, output: Said) -> None:
        """For `Processes`."""
        if not isinstance(output, StepOutput):
            self._intake.dispatch.deliver(output)
            return
        self._trace.begin(output.step)
        self._intake.dispatch.deliver(output)
        self._listeners.on_step(self._steps.add(output))
        self._trace.end(Kind.DELIVERED, len(output.tokens) // 4)

    def on_lost(self, fault: Fault) -> None:
        """For `Processes`."""
        self._fault = fault
        self._intake.dispatch.interrupt(fault)
        self._steps.restart()
        self._telling.wake()

    def on_recovered(self, generation: Generation) -> int:
        """For `Processes`."""
        was_lost, self._fault = self._fault is not None, None
        self._trace = self._tracing.teller(generation.number)
        num_requests = self._intake.dispatch.resume(generation)
        self._num_resumed += num_requests if was_lost else 0
        self._telling.wake()
        return num_requests

    def on_suspended(self) -> None:
        """For `Processes`."""
        self._fault = None
        self._intake.dispatch.suspend()
        self._steps.restart()

    def on_failed(self, fault: Fault) -> None:
        """For `Processes`."""
        self._fault = fault
        self._state = "failed"
        self._intake.requests.fail_all(fault.failure)
        self._intake.dispatch.abandon(fault.failure)
        self._intake.abandon_prompts(fault.failure)


def _stopped_while_starting() -> RuntimeStopped:
    return RuntimeStopped("the runtime was stopped while it started")


def _stopped() -> RuntimeStopped:
    return RuntimeStopped("the runtime was stopped")


def _no_progress(text: str, fraction: float | None) -> None:
    pass
