"""The embedding API without asyncio: a runtime on the event loop of a background thread.

    with SyncRuntime("HuggingFaceTB/SmolLM2-135M-Instruct") as runtime:
        for output in runtime.generate("The capital of France is"):
            print(output.text, end="")

Methods that `Runtime` has too do the same here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Collection, Coroutine, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from tpworker.config import RuntimeConfig
from tpworker.errors import RuntimeStopped
from tpworker.ipc.forks import Home
from tpworker.observe.tracing import MAX_BYTES
from tpworker.outputs import Completion, Health, Listener, RequestOutput, RuntimeEvent, Stats, TraceSummary
from tpworker.runtime.loading import Progress
from tpworker.runtime.runtime import NO_COPIES, STARTS_ONCE, Runtime
from tpworker.sampling_params import SamplingParams, checked

if TYPE_CHECKING:
    from torch import Tensor

    from tpworker.model.families import ModelSpec
    from tpworker.observe.snapshot import Snapshot
    from tpworker.observe.start import StartTimes
    from tpworker.observe.watch import GpuState
    from tpworker.text.tokenizer import Tokenizer

T = TypeVar("T")


class _NotRunning(RuntimeStopped):
    def __init__(self) -> None:
        super().__init__("the runtime is not running: use `with SyncRuntime(...) as runtime`")


class SyncRuntime:
    """`tpworker.Runtime`, with calls that block. Any thread may call it, several at once too.

    The arguments are those of `Runtime`; `progress` is called on the background thread.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        config: RuntimeConfig | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        self.runtime = Runtime(model, config=config, progress=progress, **options)
        """The asynchronous runtime; its coroutines are for the background thread only."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._over: asyncio.Event | None = None
        self._closing: set[asyncio.Task[None]] = set()  # of generators that were left behind
        self._process = Home()
        self._lock = threading.Lock()
        self._is_over = False  # its event loop takes no more

    def __reduce__(self) -> NoReturn:
        """It cannot be copied, nor sent to another process."""
        raise TypeError(NO_COPIES)

    # ------------------------------------------------------------------------ start and stop

    def start(self) -> None:
        """See `Runtime.start`."""
        running = threading.Event()
        if self._thread is not None:
            self._check_thread()
        with self._lock:
            if self._thread is not None:
                raise RuntimeStopped(STARTS_ONCE)
            self._process = Home()
            self._thread = threading.Thread(
                target=lambda: asyncio.run(self._live(running)), name="tpworker-runtime", daemon=True
            )
            self._thread.start()
        running.wait()
        try:
            self._call(self.runtime.start())
        except BaseException:
            self.stop()
            raise

    async def _live(self, running: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._over = over = asyncio.Event()
        running.set()
        await over.wait()
        with self._lock:
            self._is_over = True  # what was asked before becomes a task, and is cancelled

    def stop(self) -> None:
        """See `Runtime.stop`."""
        loop, thread, over = self._loop, self._thread, self._over
        if loop is None or thread is None or over is None:
            return
        self._check_thread()
        try:
            if self._lives():
                with contextlib.suppress(_NotRunning):  # another thread has stopped it meanwhile
                    self._call(self.runtime.stop())
        finally:
            with contextlib.suppress(RuntimeError):  # likewise
                loop.call_soon_threadsafe(over.set)
            thread.join()

    def __enter__(self) -> SyncRuntime:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is None or self._process.lost() is None:  # a fork that leaves has nothing to stop
            self.stop()

    def drain(self, timeout: float | None = None) -> None:
        """See `Runtime.drain`."""
        self._call(self.runtime.drain(timeout))

    # ------------------------------------------------------------------------------ requests

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """See `Runtime.generate`. Closing the generator, or leaving it behind, aborts the request."""
        outputs = self.runtime.generate(prompt, sampling, request_id=request_id)
        waiting: asyncio.Task[Any] | None = None

        async def following() -> RequestOutput | None:
            nonlocal waiting
            waiting = asyncio.current_task()
            return await anext(outputs, None)

        async def close() -> None:
            if waiting is not None and not waiting.done():  # an interrupt, here, has left it there
                waiting.cancel()
                await asyncio.wait([waiting])
            await outputs.aclose()

        try:
            while (output := self._call(following())) is not None:
                yield output
        finally:
            if self._thread is threading.current_thread():  # collected there: it cannot wait for itself
                task = asyncio.create_task(close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
            elif self._lives():
                with contextlib.suppress(_NotRunning):  # stopped meanwhile, and the request with it
                    self._call(close())

    def complete(
        self, prompts: Sequence[str | Sequence[int]], sampling: SamplingParams | None = None
    ) -> list[Completion]:
        """Completes all prompts, as many at once as the runtime has slots, and returns them in order.

        With `SamplingParams.n` there are so many completions for each prompt: all choices of the first one,
        by index, then all of the second, and so on.

        Args:
            prompts: texts, or lists of token ids.
            sampling: the same for all.

        Raises:
            TpworkerError: as `Runtime.generate`. The first error ends all of them.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is one string: give a list of prompts")
        return self._call(self._complete_all(prompts, checked(sampling)))

    async def _complete_all(
        self, prompts: Sequence[str | Sequence[int]], sampling: SamplingParams
    ) -> list[Completion]:
        num_choices = sampling.n
        at_once = asyncio.Semaphore(max(1, self.runtime.max_num_seqs // num_choices))

        async def complete(prompt: str | Sequence[int]) -> list[Completion]:
            async with at_once:
                return await self._complete(prompt, sampling)

        tasks = [asyncio.ensure_future(complete(prompt)) for prompt in prompts]
        try:
            return [completion for choices in await asyncio.gather(*tasks) for completion in choices]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _complete(
        self, prompt: str | Sequence[int], sampling: SamplingParams | None
    ) -> list[Completion]:
        by_index: dict[int, list[RequestOutput]] = {}
        async for output in self.runtime.generate(prompt, sampling):
            by_index.setdefault(output.index, []).append(output)
        return [_completion(by_index[index]) for index in sorted(by_index)]

    def abort(self, request_id: str) -> None:
        """See `Runtime.abort`."""

        async def abort() -> None:
            self.runtime.abort(request_id)

        self._call(abort())

    def reset_prefix_cache(self) -> None:
        """See `Runtime.reset_prefix_cache`."""
        self._call(self.runtime.reset_prefix_cache())

    @property
    def is_sleeping(self) -> bool:
        """See `Runtime.is_sleeping`."""
        return self.runtime.is_sleeping

    @property
    def weights_number(self) -> int:
        """See `Runtime.weights_number`."""
        return self.runtime.weights_number

    def sleep(self, level: int = 1, *, abort: bool = False) -> None:
        """See `Runtime.sleep`."""
        self._call(self.runtime.sleep(level, abort=abort))

    def wake_up(self, tags: Collection[str] | None = None) -> None:
        """See `Runtime.wake_up`."""
        self._call(self.runtime.wake_up(tags))

    def update_weights(
        self,
        source: str | os.PathLike[str] | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        *,
        abort: bool = False,
    ) -> int:
        """See `Runtime.update_weights`."""
        return self._call(self.runtime.update_weights(source, abort=abort))

    # ---------------------------------------------------------------------------- what it is

    def health(self) -> Health:
        """See `Runtime.health`."""
        return self.runtime.health()

    @property
    def events(self) -> tuple[RuntimeEvent, ...]:
        """See `Runtime.events`."""
        return self.runtime.events

    def add_listener(self, listener: Listener) -> None:
        """See `Runtime.add_listener`. It is called on the background thread."""
        self.runtime.add_listener(listener)

    def remove_listener(self, listener: Listener) -> None:
        """See `Runtime.remove_listener`."""
        self.runtime.remove_listener(listener)

    def start_trace(self, path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> None:
        """See `Runtime.start_trace`."""
        self.runtime.start_trace(path, max_bytes=max_bytes)

    def stop_trace(self) -> TraceSummary | None:
        """See `Runtime.stop_trace`."""
        return self._call(self.runtime.stop_trace())

    def trace_span(
        self, group: str, name: str, begun_ns: int, ended_ns: int, args: Mapping[str, object] | None = None
    ) -> None:
        """See `Runtime.trace_span`."""
        self.runtime.trace_span(group, name, begun_ns, ended_ns, args)

    def stats(self) -> Stats:
        """See `Runtime.stats`."""

        async def stats() -> Stats:
            return self.runtime.stats()

        return self._call(stats())

    def snapshot(self) -> Snapshot:
        """See `Runtime.snapshot`."""

        async def snapshot() -> Snapshot:
            return self.runtime.snapshot()

        return self._call(snapshot())

    def gpus(self) -> tuple[GpuState, ...]:
        """See `Runtime.gpus`."""
        return self.runtime.gpus()

    @property
    def start_times(self) -> StartTimes | None:
        """See `Runtime.start_times`."""
        return self.runtime.start_times

    @property
    def config(self) -> RuntimeConfig:
        """See `Runtime.config`."""
        return self.runtime.config

    @property
    def tokenizer(self) -> Tokenizer:
        """See `Runtime.tokenizer`."""
        return self.runtime.tokenizer

    @property
    def spec(self) -> ModelSpec:
        """See `Runtime.spec`."""
        return self.runtime.spec

    @property
    def model_folder(self) -> Path:
        """See `Runtime.model_folder`."""
        return self.runtime.model_folder

    @property
    def served_name(self) -> str:
        """See `Runtime.served_name`."""
        return self.runtime.served_name

    @property
    def max_model_len(self) -> int:
        """See `Runtime.max_model_len`."""
        return self.runtime.max_model_len

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the background thread. An interrupt (Ctrl-C) here cancels it there."""
        future = self._submit(coroutine)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise _NotRunning from None  # its event loop has ended before
        except BaseException:
            future.cancel()
            raise

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Has the background thread begin it. Raises RuntimeStopped where nobody would, ever."""
        try:
            if self._thread is not None:
                self._check_thread()
            with self._lock:
                if self._loop is None or not self._lives():
                    raise _NotRunning
                return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except BaseException:
            coroutine.close()
            raise

    def _check_thread(self) -> None:
        """Raises RuntimeStopped where a call would wait for ever: it has been started by then."""
        self._process.check()
        if self._thread is threading.current_thread():
            raise RuntimeStopped(
                "this is the thread of the runtime itself, on which `progress`, `on_event` and listeners are "
                "called: a call that blocks would wait for itself here. Have another thread make it"
            )

    def _lives(self) -> bool:
        """Whether its event loop takes what is to be done."""
        return self._thread is not None and self._thread.is_alive() and not self._is_over


def _completion(outputs: list[RequestOutput]) -> Completion:
    """All outputs of one choice as one."""
    last = outputs[-1]
    assert last.finish_reason is not None
    logprobs = tuple(one for output in outputs for one in output.logprobs or ())
    return Completion(
        request_id=last.request_id,
        text="".join(output.text for output in outputs),
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        num_prompt_tokens=last.num_prompt_tokens,
        num_cached_tokens=last.num_cached_tokens,
        index=last.index,
        logprobs=None if last.logprobs is None else logprobs,
        prompt_logprobs=next(
            (output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None), None
        ),
        num_draft_tokens=last.num_draft_tokens,
        num_accepted_tokens=last.num_accepted_tokens,
    )
