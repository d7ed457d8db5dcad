"""A runtime without processes and without a model: it says what it is told to, when it is told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tpworker.config import RuntimeConfig, SamplingParams
from tpworker.errors import InvalidRequest, PromptTooLong, QueueFull, RuntimeFailed, RuntimeStopped
from tpworker.observe.watch import GpuState
from tpworker.outputs import Health, RequestOutput, RuntimeState, Stats, StepRecord
from tpworker.text.stream import TextStream
from tpworker.text.tokenizer import Tokenizer

T = TypeVar("T")
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}"
    "{{ raise_exception('the first turn is the user\\'s') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    "{% if mood is defined %}({{ mood }}){% endif %}"
)


class _Fast:
    """As much of a transformers tokenizer as is used, without the second that importing that takes."""

    def __init__(self, backend: Backend, chat_template: str | None) -> None:
        self.backend_tokenizer = backend
        self.chat_template = chat_template
        self.special_tokens_map = {"eos_token": "<end>"}


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """Byte-level BPE without merges: a token is a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    return Tokenizer(_Fast(backend, chat_template))


@dataclass
class FakeRuntime:
    """The public interface of `tpworker.Runtime`, as far as the server uses it.

    `reply` maps a prompt's text to the text that is generated, a token (a byte) at a time. Before token
    `i` of any request `before(i)` is awaited: the place for delays, faults and gates.
    """

    reply: Callable[[str], str] = lambda prompt: f"You said {prompt!r}."
    before: Callable[[int], Any] | None = None
    abort_at: int | None = None
    max_model_len: int = 512
    max_request_len: int = 512
    vocab_size: int = 257
    max_queue: int = 1000
    state: RuntimeState = "ready"
    error: str | None = None
    start_error: Exception | None = None
    start_gate: asyncio.Event | None = None
    served_name: str = "fake-model"
    device: str = "cpu"
    dtype: str = "float32"
    the_tokenizer: Tokenizer | None = field(default_factory=byte_tokenizer)
    gpu_states: tuple[GpuState, ...] = ()
    requests: list[tuple[str, SamplingParams, str | None]] = field(default_factory=list)
    aborted: list[str | None] = field(default_factory=list)
    num_open: int = 0
    drained: float | None = None
    tokenising_threads: set[str] = field(default_factory=set)
    prepared_chars: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = RuntimeConfig()
        self._bytes = self.the_tokenizer or byte_tokenizer()
        self.start_times = None
        self.output_tokens = self.prompt_tokens = 0
        self._fault = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        self.state = "starting"
        if self.start_gate is not None:
            await self.start_gate.wait()
        if self.start_error is not None:
            self.state = "failed"
            raise self.start_error
        self.state = "ready"

    async def stop(self) -> None:
        if self.state != "failed":
            self.state = "stopped"
        self._fault.set()

    async def __aenter__(self) -> FakeRuntime:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def drain(self, timeout: float | None = None) -> None:
        self.state, self.drained = "draining", timeout
        async with asyncio.timeout(timeout):
            await self._idle.wait()

    def fail(self, process: str = "tpworker-rank1") -> None:
        self.state = "failed"
        self.error = f"{process} was killed by SIGKILL\nTraceback: secret details"
        self._fault.set()

    @property
    def has_tokenizer(self) -> bool:
        return self.the_tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        if self.the_tokenizer is None:
            raise InvalidRequest("there is no tokenizer", "prompt")
        return self.the_tokenizer

    def gpus(self) -> tuple[GpuState, ...]:
        return self.gpu_states

    def health(self) -> Health:
        return Health(self.state, self.error)

    def abort(self, request_id: str) -> None:
        raise AssertionError("the server aborts by closing the generator")

    def stats(self) -> Stats:
        steps = tuple(StepRecord(i, 0, 1, i * 1000, i * 1000 + 100, i * 1000 + 900) for i in range(1, 5))
        return Stats(
            open=self.num_open,
            running=self.num_open,
            waiting=0,
            free_blocks=90,
            total_blocks=100,
            steps=4,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=7,
            output_tokens=self.output_tokens,
            preemptions=3,
            finished=len(self.requests) - self.num_open - len(self.aborted),
            aborted=len(self.aborted),
            recent_steps=steps,
        )

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        default_max_tokens: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        sampling = sampling or SamplingParams()
        if sampling.max_tokens is None and default_max_tokens is not None:
            sampling = replace(sampling, max_tokens=max(default_max_tokens, sampling.min_tokens))
        if self.state != "ready":
            raise RuntimeStopped(f"the runtime is {self.state}")
        ids = await self._checked_ids(prompt, sampling)
        if sampling.detokenize:
            self.tokenizer  # noqa: B018  # raises without one
        text = self._bytes.decode(ids)
        self.requests.append((text, sampling, request_id))
        self.prompt_tokens += len(ids)
        self.num_open += 1
        self._idle.clear()
        try:
            async for output in self._outputs(request_id or "anonymous", text, len(ids), sampling):
                yield output
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted.append(request_id)
            raise
        finally:
            self.num_open -= 1
            if not self.num_open:
                self._idle.set()

    async def prepare(self, work: Callable[[], T], num_requests: int = 1, num_chars: int = 0) -> T:
        self._check_room(num_requests)
        self.prepared_chars.append(num_chars)
        return await asyncio.to_thread(work)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens)

    def _check_room(self, num_requests: int) -> None:
        if self.num_open + num_requests > self.max_queue:
            raise QueueFull(f"{self.num_open} requests wait already: try again later, or raise --max-queue")

    async def _checked_ids(self, prompt: str | Sequence[int], sampling: SamplingParams) -> list[int]:
        if isinstance(prompt, str):
            ids = await asyncio.to_thread(self._encode, prompt)
        else:
            ids = list(prompt)
        if not ids:
            raise InvalidRequest("the prompt is empty", "prompt")
        if not all(0 <= i <= 256 for i in ids):
            raise InvalidRequest("the prompt holds what is no token id", "prompt")
        if len(ids) + (sampling.max_tokens or 1) > self.max_model_len:
            raise PromptTooLong(
                f"{len(ids)} tokens and max_tokens={sampling.max_tokens} do not fit into {self.max_model_len}"
            )
        self._check_room(1)
        return ids

    def _encode(self, prompt: str) -> list[int]:
        self.tokenising_threads.add(threading.current_thread().name)
        return self.tokenizer.encode(prompt)

    async def _outputs(
        self, request_id: str, prompt: str, num_prompt: int, sampling: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        script = self._bytes.encode(self.reply(prompt), add_special_tokens=False)
        limit = sampling.max_tokens or self.max_model_len
        stream = TextStream(
            self._bytes,
            sampling.stop,
            min_tokens=sampling.min_tokens,
            skip_special_tokens=sampling.skip_special_tokens,
            include_stop=sampling.include_stop_str_in_output,
        )
        for position, token_id in enumerate(script[:limit]):
            if self.before is not None:
                await self._wait_or_fail(position)
            if position == self.abort_at:
                yield RequestOutput(request_id, "", (), "abort", None, num_prompt, 0, position)
                return
            self.output_tokens += 1
            delta = stream.push([token_id])
            finish: Any = None
            if delta.stopped is not None:
                finish = "stop"
            elif position + 1 == len(script[:limit]):
                finish = "stop" if limit >= len(script) else "length"
            text = delta.text + (stream.finish() if finish else "") if sampling.detokenize else ""
            yield RequestOutput(
                request_id,
                text,
                (token_id,),
                finish,
                delta.stopped,
                num_prompt,
                num_prompt // 2,
                position + 1,
            )
            if finish:
                return
            await asyncio.sleep(0)

    async def _wait_or_fail(self, position: int) -> None:
        assert self.before is not None
        waiting = asyncio.ensure_future(self.before(position))
        fault = asyncio.ensure_future(self._fault.wait())
        try:
            await asyncio.wait([waiting, fault], return_when=asyncio.FIRST_COMPLETED)
        finally:
            fault.cancel()
            if not waiting.done():
                waiting.cancel()
        if self._fault.is_set():
            if self.state == "failed":
                raise RuntimeFailed(
                    "tpworker-rank1 was killed by SIGKILL", "tpworker-rank1", "secret details"
                )
            raise RuntimeStopped("the runtime has stopped")
        waiting.result()
