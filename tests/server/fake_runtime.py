"""A runtime without processes and without a model: it says what it is told to, when it is told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tests.server.fake_records import Record
from tpworker.config import RuntimeConfig
from tpworker.errors import InvalidRequest, QueueFull, RuntimeFailed, RuntimeStopped
from tpworker.ipc.board import Board
from tpworker.model.families.spec import ModelSpec, RopeSpec
from tpworker.observe.looking import look, without_processes
from tpworker.observe.snapshot import Snapshot, Whole
from tpworker.observe.watch import GpuState
from tpworker.outputs import (
    Health,
    Listener,
    RequestOutput,
    RuntimeEvent,
    RuntimeState,
    Stats,
    StepRecord,
    TokenLogprobs,
)
from tpworker.runtime.admission import Limits, check_priority, fit, pack_prompt, resolve_sampling
from tpworker.runtime.bell import Turns
from tpworker.runtime.collector import Collector, GeneratorCollector
from tpworker.runtime.facts import Facts
from tpworker.runtime.group import Group
from tpworker.runtime.loading import FoundModel
from tpworker.runtime.settings import rank_settings, scheduler_settings
from tpworker.runtime.start import Served, Setup
from tpworker.sampling_params import SamplingParams
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


def byte_tokenizer(
    chat_template: str | None = CHAT_TEMPLATE, special: Sequence[str] = (), added: Sequence[str] = ()
) -> Tokenizer:
    """Byte-level BPE without merges: a token is a byte, or the name of one that is special or added."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<end>", *special)]
    )
    backend.add_tokens([AddedToken(name, normalized=False) for name in added])
    return Tokenizer(_Fast(backend, chat_template))


def fake_spec(max_model_len: int, model_type: str = "", vocab_size: int = 257) -> ModelSpec:
    """A model whose vocabulary is that of `byte_tokenizer`."""
    return ModelSpec(
        family="llama",
        architecture="LlamaForCausalLM",
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        max_model_len=max_model_len,
        rms_norm_eps=1e-5,
        rope=RopeSpec(theta=10000.0),
        dtype="float32",
        eos_ids=(256,),
    )


def fake_logprob(token_id: int) -> float:
    """Of every place alike."""
    return -(token_id + 1) / 64


def fake_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    return TokenLogprobs(
        token_id, fake_logprob(token_id), tuple((i, fake_logprob(i)) for i in range(num_top))
    )


@dataclass(eq=False)
class FakeRuntime(Facts):
    """The public interface of `tpworker.Runtime`, as far as the server uses it. What it tells of a model, and
    what it checks of a request, is the real one's.

    `reply` maps a prompt's text to the text that is generated, a token (a byte) at a time; choice 1 adds "+1"
    to it, and so on. Before token `i` of any choice `before(i)` is awaited: the place for delays, faults and
    gates. The lower its id, the likelier is a token, wherever it stands: see `fake_logprob`.
    """

    reply: Callable[[str], str] = lambda prompt: f"You said {prompt!r}."
    before: Callable[[int], Any] | None = None
    abort_at: int | None = None
    longest: int = 512
    model_type: str = ""
    max_queue: int = 1000
    state: RuntimeState = "ready"
    error: str | None = None
    start_error: Exception | None = None
    start_gate: asyncio.Event | None = None
    is_found: bool = True
    the_tokenizer: Tokenizer | None = field(default_factory=byte_tokenizer)
    configured: RuntimeConfig = field(default_factory=RuntimeConfig)
    gpu_states: tuple[GpuState, ...] = ()
    listeners: list[Listener] = field(default_factory=list)
    draft_tokens: tuple[int, ...] = ()
    accepted_tokens: tuple[int, ...] = ()
    requests: list[tuple[str, SamplingParams, str | None]] = field(default_factory=list)
    aborted: list[str | None] = field(default_factory=list)
    events: tuple[RuntimeEvent, ...] = ()
    resumed_requests: int = 0
    lost: tuple[tuple[str, int], ...] = ()
    board: Board | None = None
    num_open: int = 0
    num_resets: int = 0
    changes: list[tuple[object, ...]] = field(default_factory=list)
    change_error: Exception | None = None
    drained: float | None = None
    tokenising_threads: set[str] = field(default_factory=set)
    prepared_chars: list[int] = field(default_factory=list)
    prepared_counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        Facts.__init__(self, self.configured)
        self._bytes = self.the_tokenizer or byte_tokenizer()
        self.start_times = None
        self.output_tokens = self.prompt_tokens = 0
        self._fault = asyncio.Event()
        self._turns = Turns()
        self._idle = asyncio.Event()
        self._idle.set()
        self._up = asyncio.Event()  # not while it recovers
        self._up.set()
        if self.is_found:
            self._find()
        if self.state == "ready":
            self.become_ready()

    def _find(self) -> None:
        vocab_size = self._bytes.description["vocab_size"]
        spec = fake_spec(self.longest, self.model_type, vocab_size)
        folder = Path("/fake-model" if self.config.model is None else "/somewhere")
        model = FoundModel(folder, spec, self.config.model or folder.name)
        scheduler = scheduler_settings(self.config, spec, "cpu", self.longest)
        rank = rank_settings(self.config, spec, "cpu", self.longest)
        group = Group(generation=0, num_ranks=2, model=str(folder), scheduler=scheduler, rank=rank)
        self._setup = Setup(model, group)

    def become_ready(self) -> None:
        """Requests are taken from now on."""
        self.state = "ready"
        limits = Limits(self.longest, self.longest, self.longest)
        self._served = Served(self._known.model, self.the_tokenizer, limits, self.max_num_seqs, 100)

    def add_listener(self, listener: Listener) -> None:
        self.listeners.append(listener)

    def remove_listener(self, listener: Listener) -> None:
        self.listeners.remove(listener)

    async def start(self) -> None:
        self.state = "starting"
        if self.start_gate is not None:
            await self.start_gate.wait()
        if self.start_error is not None:
            self.state = "failed"
            raise self.start_error
        self.become_ready()

    async def stop(self) -> None:
        if self.state != "failed":
            self.state = "stopped"
        self._fault.set()

    async def __aenter__(self) -> FakeRuntime:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def reset_prefix_cache(self) -> None:
        self.num_resets += 1

    @property
    def is_sleeping(self) -> bool:
        return self.state == "sleeping"

    async def sleep(self, level: int = 1, *, abort: bool = False) -> None:
        if level not in (1, 2):
            raise InvalidRequest(f"level={level}: must be 1 or 2", "level")
        self.state = "sleeping"
        self.changes.append(("sleep", level, abort))

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        self.changes.append(("wake_up", tags))
        if self.change_error is not None:
            raise self.change_error
        self.state = "ready"

    async def update_weights(self, source: str, *, abort: bool = False) -> int:
        if self.change_error is not None:
            raise self.change_error
        self.changes.append(("update", source, abort))
        return len(self.changes)

    async def drain(self, timeout: float | None = None) -> None:
        self.state, self.drained = "draining", timeout
        async with asyncio.timeout(timeout):
            await self._idle.wait()

    def fail(self, process: str = "tpworker-rank1") -> None:
        self.state = "failed"
        self.error = f"{process} was killed by SIGKILL\nTraceback: secret details"
        self._fault.set()

    def lose(self, process: str = "tpworker-rank1") -> None:
        """A process is lost; requests are taken, and wait."""
        self.state = "recovering"
        self.error = f"{process} was killed by SIGKILL at step 7\nTraceback: secret details"
        self._up.clear()

    def recover(self, seconds: float) -> None:
        """They go on."""
        self.state, self.error = "ready", None
        number = self.events[-1].generation + 1 if self.events else 1
        summary = "tpworker-rank1 was killed by SIGKILL at step 7"
        event = RuntimeEvent("recovered", 0.0, number, "tpworker-rank1", summary, seconds, self.num_open)
        self.events = (*self.events, event)[-64:]
        for listener in self.listeners:
            listener.on_event(event)
        self._up.set()

    def gpus(self) -> tuple[GpuState, ...]:
        return self.gpu_states

    def snapshot(self) -> Snapshot:
        if self.board is not None:
            return look(self.board)
        return without_processes(self._about, Whole(state=self.state, running=self.num_open))

    def health(self) -> Health:
        return Health(self.state, self.error)

    def abort(self, request_id: str) -> None:
        raise AssertionError("the server aborts by closing the generator")

    def stats(self) -> Stats:
        steps = tuple(StepRecord(i, 0, 1, i * 1000, i * 1000 + 100, i * 1000 + 900, 2) for i in range(1, 5))
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
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
            restarts=self.events[-1].generation if self.events else 0,
            resumed_requests=self.resumed_requests,
            lost=self.lost,
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
        if self.state not in ("ready", "recovering", "updating"):
            raise RuntimeStopped(f"the runtime is {self.state}")
        ids = await self._checked_ids(prompt, sampling)
        if sampling.detokenize:
            self.tokenizer  # noqa: B018  # raises without one
        text = self._bytes.decode(ids)
        self.requests.append((text, sampling, request_id))
        self.prompt_tokens += len(ids)
        self.num_open += sampling.n
        self._idle.clear()
        record, error = Record(request_id or "anonymous", len(ids), sampling), None
        try:
            async for output in self._choices(request_id or "anonymous", text, ids, sampling):
                record.add(self.listeners, output)
                yield output
        except BaseException as raised:
            error = raised
            if isinstance(raised, (GeneratorExit, asyncio.CancelledError)):
                self.aborted.append(request_id)
            raise
        finally:
            record.end(self.listeners, error)
            self.num_open -= sampling.n
            if not self.num_open:
                self._idle.set()

    async def collect(self, *arguments: Any, **options: Any) -> Collector:
        return GeneratorCollector(self.generate(*arguments, **options), self._turns)

    async def prepare(
        self, work: Callable[[], T], num_requests: int = 1, num_chars: int = 0, blame: str = "prompt"
    ) -> T:
        self._check_room(num_requests)
        self.prepared_counts.append(num_requests)
        self.prepared_chars.append(num_chars)
        return await asyncio.to_thread(work)

    def _check_room(self, num_requests: int) -> None:
        if self.num_open + num_requests > self.max_queue:
            raise QueueFull(f"{self.num_open} requests wait already: try again later, or raise --max-queue")

    async def _checked_ids(self, prompt: str | Sequence[int], sampling: SamplingParams) -> list[int]:
        if isinstance(prompt, str):
            ids = await asyncio.to_thread(self._encode, prompt)
        else:
            ids = list(prompt)
        tokens = pack_prompt(ids, self.spec)
        max_tokens = fit(sampling, len(tokens) // 4, self._ready.limits)
        encode = None if self.the_tokenizer is None else self.the_tokenizer.encode
        resolve_sampling(sampling, self.spec, max_tokens, seed=0, encode=encode)
        check_priority(sampling, self.config.scheduling_policy)
        self._check_room(sampling.n)
        return ids

    def _encode(self, prompt: str) -> list[int]:
        self.tokenising_threads.add(threading.current_thread().name)
        return self.encode(prompt)

    async def _choices(
        self, request_id: str, prompt: str, ids: Sequence[int], sampling: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        """A token of each in turn; the first output tells of the prompt."""
        told = None
        if sampling.prompt_logprobs is not None:
            told = (None, *(fake_logprobs(token, sampling.prompt_logprobs) for token in ids[1:]))
        choices = [
            self._outputs(request_id, index, prompt, len(ids), sampling) for index in range(sampling.n)
        ]
        while choices:
            for choice in tuple(choices):
                output = await anext(choice, None)
                if output is None:
                    choices.remove(choice)
                    continue
                if sampling.logprobs is not None:
                    logprobs = tuple(fake_logprobs(token, sampling.logprobs) for token in output.token_ids)
                    output = output._replace(logprobs=logprobs)
                yield output._replace(prompt_logprobs=told)
                told = None

    async def _outputs(
        self, request_id: str, index: int, prompt: str, num_prompt: int, sampling: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        reply = self.reply(prompt) + (f"+{index}" if index else "")
        script = self._bytes.encode(reply, add_special_tokens=False)
        limit = self.longest if sampling.max_tokens is None else sampling.max_tokens
        if not limit:
            yield RequestOutput(request_id, "", (), "length", None, num_prompt, num_prompt // 2, 0, index)
        stream = TextStream(
            self._bytes,
            sampling.stop,
            min_tokens=sampling.min_tokens,
            skip_special_tokens=sampling.skip_special_tokens,
            shown_special_tokens=sampling.shown_special_tokens,
            include_stop=sampling.include_stop_str_in_output,
        )
        for position, token_id in enumerate(script[:limit]):
            if self.before is not None or not self._up.is_set():
                await self._wait_or_fail(position)
            if position == self.abort_at:
                yield RequestOutput(request_id, "", (), "abort", None, num_prompt, 0, position, index)
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
                index,
            )
            if finish:
                return
            await asyncio.sleep(0)

    async def _wait_or_fail(self, position: int) -> None:
        async def wait() -> None:
            await self._up.wait()
            if self.before is not None:
                await self.before(position)

        waiting = asyncio.ensure_future(wait())
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
