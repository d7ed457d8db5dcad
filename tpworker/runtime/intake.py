"""What happens for a request, from its place in the queue until its consumer has its last output.

    check_room ─► prepare (chat templates, several prompts) ─┐
                                                             ├─► reserve ─► submit ─► take, take … ─► close
    promises: what was being prepared when a drain began ────┘   places     checks, Submits    counts, Aborts

A request of several choices is as many towards the scheduler, and in all that is counted here. Whether the
runtime takes requests at all (it is ready; it has not failed) is for `Runtime` to say.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from tpworker.config import SchedulingPolicy
from tpworker.errors import InvalidRequest, QueueFull, shown
from tpworker.ipc.arrays import pack_int32, unpack_int32
from tpworker.ipc.messages import NO_LOGPROBS, Sampling, Submit
from tpworker.outputs import RequestOutput, RequestRecord
from tpworker.runtime.admission import check_priority, fit, pack_prompt, resolve_sampling
from tpworker.runtime.bell import Bell, Turns
from tpworker.runtime.choices import Choices
from tpworker.runtime.delivered import check_delivered, go_on_behind
from tpworker.runtime.dispatch import Dispatch
from tpworker.runtime.grammars import Grammars
from tpworker.runtime.listeners import Listeners
from tpworker.runtime.logprobs import LogprobRecord
from tpworker.runtime.requests import Request, Requests
from tpworker.runtime.start import Served
from tpworker.runtime.tokenisers import SHORT_CHARS, Tokenisers
from tpworker.sampling_params import SamplingParams, choice_seed
from tpworker.values import number

T = TypeVar("T")

PROMISE_SECONDS = 1.0
"""How long, while the runtime drains, requests that were being prepared may take from there to `generate`."""


class Intake:
    """The requests of a runtime, which belongs to one event loop's thread.

    Args:
        max_queue: how many may wait.
        seed: of the seeds of requests that bring none.
        policy: see `RuntimeConfig.scheduling_policy`.
        in_flight: see `Dispatch`.
        listeners: told of each request's end.
    """

    def __init__(
        self,
        max_queue: int,
        seed: int,
        policy: SchedulingPolicy,
        in_flight: int,
        listeners: Listeners | None = None,
    ) -> None:
        self._listeners = Listeners() if listeners is None else listeners
        self.requests = Requests(self._listeners)
        """Those that the scheduler may still say something about."""
        self.dispatch = Dispatch(self.requests, in_flight)
        """Where they go, once they are checked."""
        self.turns = Turns()
        """Of consumers that are called."""
        self.num_finished = 0
        self.num_aborted = 0
        self._max_queue = max_queue
        self._policy = policy
        self._seeds = random.Random(seed)
        self._tokenisers = Tokenisers()
        self._open: dict[str, Choices] = {}  # those whose consumers still wait for something
        self._num_open = 0  # choices of these that have not ended
        self._num_preparing = 0  # requests to come, see `prepare`
        self._promises: list[float] = []  # until when each of those may still come, though we drain
        self._closed: asyncio.Future[None] | None = None  # set when one of them is closed, for `all_closed`
        self._served: Served | None = None
        self._grammars: Grammars | None = None
        self._reading = asyncio.Lock()

    def serve(self, served: Served) -> None:
        """From now on requests are checked against what is served."""
        self._served = served
        spec = served.model.spec
        self._grammars = Grammars(served.tokenizer, spec.vocab_size, spec.eos_ids)

    @property
    def num_open(self) -> int:
        """Those that are being prepared included."""
        return self._num_open + self._num_preparing

    @property
    def num_waiting(self) -> int:
        """Those that have no slot yet; those that are being prepared included."""
        return self.requests.num_waiting + self._num_preparing

    # ------------------------------------------------------------------------------- a place

    def check_room(self, num_requests: int, parameter: str = "prompt") -> None:
        """Whether so many more requests can be taken now, each choice of each prompt counted.

        Args:
            num_requests: how many.
            parameter: to blame for them if they are too many: 'prompt', or what says how many choices.

        Raises:
            InvalidRequest: so many can never be open at once.
            QueueFull: as many wait as may.
        """
        slots, places = self._serving().max_num_seqs, self._max_queue
        if num_requests > slots + places:
            raise InvalidRequest(
                f"{num_requests} {'prompts' if parameter == 'prompt' else 'choices'} are more than the "
                f"{slots + places} that can be open at once (max_num_seqs={slots} and max_queue={places}): "
                "ask for fewer at a time, or raise --max-queue",
                parameter,
            )
        if self.num_waiting + num_requests - (slots - self.requests.num_running) > places:
            more = f", and this is {num_requests} more" if num_requests > 1 else ""
            raise QueueFull(
                f"{self.num_waiting} requests wait already{more}; max_queue is {places}. "
                "Try again later, or raise --max-queue"
            )

    async def prepare(self, work: Callable[[], T], num_requests: int, num_chars: int) -> T:
        """Runs what makes the prompts of so many requests, which count as waiting meanwhile."""
        self._num_preparing += num_requests
        try:
            return await self._tokenisers.run(work, num_chars)
        finally:
            self._num_preparing -= num_requests
            self._wake()

    def promise(self, num_requests: int) -> None:
        """So many requests have been prepared: they may come within a second, though others may not."""
        until = asyncio.get_running_loop().time() + PROMISE_SECONDS
        self._promises += [until] * num_requests

    def take_promise(self, num_choices: int) -> bool:
        """Whether a request that comes now had been promised. Each promise is good for one choice."""
        if self._promised() < num_choices:
            return False
        del self._promises[-num_choices:]
        return True

    def _promised(self) -> int:
        """How many requests may still come that were promised."""
        now = asyncio.get_running_loop().time()
        self._promises = [until for until in self._promises if until > now]
        return len(self._promises)

    def reserve(self, request_id: str | None, num_choices: int) -> Choices:
        """Places in the queue, before anything is done that takes time.

        Raises:
            InvalidRequest: there is an open request of this id, or it is no string; or see `check_room`.
            QueueFull: see `check_room`.
        """
        self.check_room(num_choices, "n")
        if request_id is not None and not isinstance(request_id, str):
            raise InvalidRequest(f"request_id={shown(request_id)}: must be a string", "request_id")
        if request_id in self._open:
            raise InvalidRequest(f"request_id {request_id!r} is that of another open request", "request_id")
        request_id = request_id or f"request-{secrets.token_hex(8)}"
        bell = Bell()
        first = self.requests.open(request_id, bell=bell)
        others = [self.requests.open(request_id, first, index, bell) for index in range(1, num_choices)]
        self._open[request_id] = choices = Choices([first, *others], bell)
        self._num_open += num_choices
        return choices

    # ---------------------------------------------------------------------- to the scheduler

    async def submit(
        self,
        choices: Choices,
        prompt: str | Sequence[int],
        params: SamplingParams,
        default_max_tokens: int | None,
        delivered: Sequence[int],
    ) -> None:
        """Checks what is asked for, and tells the scheduler. Errors are those of `Runtime.generate`."""
        check_priority(params, self._policy)
        served = self._serving()
        tokens = pack_prompt(await self._tokenise(prompt, served), served.model.spec)
        sampling = await self._resolve(params, len(tokens) // 4, default_max_tokens, served)
        known = check_delivered(delivered, params, sampling, served.model.spec)
        grammar = await self._grammar(params, served)
        for request in choices.requests:
            self._describe(request, tokens, params, sampling, served)
            if known:
                go_on_behind(known, request)
        choices.sampling, now = params, time.monotonic()
        for request in choices.requests:
            request.times.submitted = now
            if request in self.requests:  # else it was aborted meanwhile
                request.submit = self._made(request, tokens, params, sampling, grammar)
                self.dispatch.submit(request)

    def _describe(
        self, request: Request, tokens: bytes, params: SamplingParams, sampling: Sampling, served: Served
    ) -> None:
        """What is to be known of a request when its tokens come."""
        request.num_prompt = len(tokens) // 4
        request.wants_tokens = params.max_tokens != 0
        request.own_stop_ids = frozenset(params.stop_token_ids).difference(served.model.spec.eos_ids)
        prompt_logprobs = params.prompt_logprobs if request.index == 0 else None
        if params.logprobs is not None or prompt_logprobs is not None:
            prompt = () if prompt_logprobs is None else unpack_int32(tokens)
            request.logprobs = LogprobRecord(params.logprobs, prompt_logprobs, prompt)
        if params.detokenize:
            from tpworker.text.stream import TextStream

            request.text = TextStream(
                served.needed_tokenizer(),
                params.stop,
                hidden_ids=() if params.include_stop_str_in_output else unpack_int32(sampling.stop_ids),
                min_tokens=params.min_tokens,
                prompt=unpack_int32(tokens),
                skip_special_tokens=params.skip_special_tokens,
                shown_special_tokens=params.shown_special_tokens,
                include_stop=params.include_stop_str_in_output,
            )

    def _made(
        self,
        request: Request,
        tokens: bytes,
        params: SamplingParams,
        sampling: Sampling,
        grammar: str | None,
    ) -> Submit:
        """All that a scheduler is told of a request, of whatever generation it is."""
        return Submit(
            0,
            request.number,
            tokens,
            0,
            self._of_choice(sampling, request.index),
            request.first.number if params.n > 1 else None,
            params.priority,
            params.cache_salt or "",
            grammar,
        )

    @staticmethod
    def _of_choice(sampling: Sampling, index: int) -> Sampling:
        """Those of one choice: a seed of its own, and the prompt's logprobs with the first alone."""
        told = sampling.num_prompt_logprobs if index == 0 else NO_LOGPROBS
        return replace(sampling, seed=choice_seed(sampling.seed, index), num_prompt_logprobs=told)

    async def _tokenise(self, prompt: str | Sequence[int], served: Served) -> Sequence[int]:
        if isinstance(prompt, (bytes, bytearray)):
            raise InvalidRequest(f"the prompt is {type(prompt).__name__}: give text or token ids", "prompt")
        if not isinstance(prompt, str):
            return prompt
        if len(prompt) > SHORT_CHARS:  # among the short ones, so as not to wait only to be refused
            await self._tokenisers.run(partial(served.check_length, prompt), 0)
        return await self._tokenisers.run(partial(served.needed_tokenizer().encode, prompt), len(prompt))

    async def _resolve(
        self, params: SamplingParams, num_prompt: int, default_max_tokens: int | None, served: Served
    ) -> Sampling:
        max_tokens = fit(params, num_prompt, served.limits)
        default = number(default_max_tokens, int)
        if default is not None and not (type(default) is int and default > 0):
            raise InvalidRequest(
                f"default_max_tokens={shown(default)}: must be an integer from 1 on, or None",
                "default_max_tokens",
            )
        if params.max_tokens is None and default is not None:
            max_tokens = min(max_tokens, max(default, params.min_tokens))
        encode = None
        if params.bad_words and served.tokenizer is not None:
            encode = partial(served.tokenizer.encode, add_special_tokens=False)
        seed = self._seeds.getrandbits(63)
        work = partial(resolve_sampling, params, served.model.spec, max_tokens, seed, encode)
        if encode is None:
            return work()
        return await self._tokenisers.run(work, sum(map(len, params.bad_words)))  # up to 0.4 s

    async def _grammar(self, params: SamplingParams, served: Served) -> str | None:
        """What the output is held to, known to compile; the scheduler knows for what vocabulary."""
        if params.structured_outputs is None:
            return None
        assert self._grammars is not None, "a request before `serve`"
        grammar = await self._grammars.check(params.structured_outputs)
        async with self._reading:  # the vocabulary, once, however many wait for it: it is large
            if self.dispatch.vocabulary is None:
                tokenizer = await self._tokenisers.run(served.needed_tokenizer().to_json, 0)
                self.dispatch.vocabulary = tokenizer, pack_int32(sorted(served.model.spec.eos_ids))
        return grammar

    def _serving(self) -> Served:
        assert self._served is not None, "a request before `serve`"
        return self._served

    # ------------------------------------------------------------------------------- its end

    async def take(self, choices: Choices) -> RequestOutput:
        """The next output of a request some choice of which has not ended. Errors as in `Choices.take`."""
        request, output = await choices.take()
        if output.finish_reason is not None:
            self.ended(choices, request)
        return output

    def abort(self, request_id: str) -> None:
        """Ends a request, each choice with an output that says so. Unknown ids are ignored."""
        choices = self._open.get(request_id)
        if choices is not None:
            for request in list(choices.unended):  # who is told may take it at once
                self.dispatch.withdraw(request)
                request.end("abort")

    def abort_all(self) -> None:
        """As `abort`, of all that are open."""
        for request_id in list(self._open):
            self.abort(request_id)

    def close(self, choices: Choices) -> None:
        """Its consumer has all it will get, or wants no more."""
        del self._open[choices.request_id]
        for request in choices.unended:
            self.ended(choices, request)

    def ended(self, choices: Choices, request: Request) -> None:
        """The consumer has all it will get of this choice."""
        self._num_open -= 1
        self.dispatch.withdraw(request)
        if request.finish in ("stop", "length"):
            self.num_finished += 1
        elif request.submit is not None:
            self.num_aborted += 1
        if choices.sampling is not None and self._listeners:
            self._listeners.on_request_end(choices.record(request))
        self._wake()

    def open_records(self) -> list[RequestRecord]:
        """Of those that have been submitted and have not ended: how far they have come by now."""
        told = (choices for choices in self._open.values() if choices.sampling is not None)
        return [choices.record(request) for choices in told for request in choices.unended]

    def abandon_prompts(self, error: Callable[[], Exception]) -> None:
        """Whoever waits for a prompt to be made gets an error, though threads may go on; `error` makes it."""
        self._tokenisers.abandon(error)
        if self._grammars is not None:
            self._grammars.abandon(error)

    def close_processes(self) -> None:
        """Ends those that work on requests before the scheduler hears of them; threads may wait for one."""
        if self._grammars is not None:
            self._grammars.close()
        if self._served is not None and self._served.tokenizer is not None:
            self._served.tokenizer.close()

    async def all_closed(self) -> None:
        """Waits until none is open or being prepared, and none may still come that was promised."""
        while (is_open := self.num_open) or self._promised():
            if self._closed is None or self._closed.done():
                self._closed = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._closed], timeout=None if is_open else PROMISE_SECONDS)

    def _wake(self) -> None:
        if self._closed is not None and not self._closed.done():
            self._closed.set_result(None)
